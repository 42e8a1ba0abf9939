"""Peers that lie, break the protocol, fall silent or disagree, and newcomers that are real processes."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Chunk, ChunkEntry, FileEntry, HashScheme, Manifest
from swarm.hashing.cpu import chunk_digests
from swarm.protocol import messages
from swarm.store import Span
from swarm.transport import Outbound, Transfer

from .lying import LyingPeer, Question, heard
from .processes import DEADLINE_S, MODEL, QUICK, Ended, Machine, contents, write_model

pytestmark = pytest.mark.integration

SLOW_SEED = ("--upload-limit", "8MB/s")  # leaves the liar time to be asked often enough


@dataclass(frozen=True)
class Lie:
    """What a newcomer that has only such a peer exits with, and says."""

    kind: type[LyingPeer]
    code: int
    why: str


def errors_alone(lies: Sequence[Lie], *, machine: Machine, model: Path, out: Path) -> list[tuple[str, Ended]]:
    """Every newcomer knows one liar and nobody else. They run side by side, because most of the time they wait."""
    found = []
    with contextlib.ExitStack() as liars:
        fetches = []
        for lie in lies:
            liar = liars.enter_context(lie.kind.of(model))
            fetches.append((lie, machine.fetch(out / lie.kind.__name__, peers=[liar.address])))
        for lie, newcomer in fetches:
            ended = newcomer.end()
            line = ended.error(lie.code)
            assert lie.why in line
            assert lie.code == 3 or f"{lie.kind.__name__}: " in line
            found.append((lie.why, ended))
    assert contents(out) == {}
    return found


def complete_beside(
    lies: Sequence[Lie], *flags: str, machine: Machine, model: Path, out: Path
) -> tuple[list[LyingPeer], dict[str, Any]]:
    """One newcomer knows all the liars, and one honest seed."""
    seed = machine.serve(model, *flags, "--name", "honest")
    with contextlib.ExitStack() as stack:
        liars = [stack.enter_context(lie.kind.of(model)) for lie in lies]
        report = machine.fetch(out, peers=[*(liar.address for liar in liars), seed.address]).end().report
    assert contents(out) == contents(model)
    assert report["rejected_chunks"] == 0
    return liars, report


# Manifests


class Bytes:
    """A source of one byte string."""

    def __init__(self, manifest: Manifest, data: bytes) -> None:
        self.manifest = manifest
        self._data = data

    def spans(self, chunk: Chunk) -> Iterator[Span]:
        yield memoryview(self._data)[: chunk.size]

    def close(self) -> None:
        pass


def liar_about(*files: tuple[str, int]) -> LyingPeer:
    """Its manifest has these paths and sizes; what it sends is what the manifest says."""
    data, scheme = b"evil", HashScheme()
    entry = ChunkEntry(len(data), chunk_digests(scheme, [memoryview(data)]).xxh3.hex())
    entries = tuple(FileEntry(path, size, "", (entry,)) for path, size in files)
    manifest = Manifest(1, "checkpoint", "", scheme, 1 << 20, entries)
    return LyingPeer(manifest, Bytes(manifest, data))


LYING_MANIFESTS: dict[str, tuple[list[tuple[str, int]], str]] = {
    "parent": ([("../../etc/x", 4)], "'../../etc/x' leaves its directory"),
    "absolute": ([("ABSOLUTE/x", 4)], "is absolute"),
    "twice": ([("x", 4), ("x", 4)], "path given twice: 'x'"),
    "giant": ([("x", 1 << 60)], "<= 281474976710656"),
    "too_few_chunks": ([("x", 1 << 40)], "chunks of 'x' do not add up"),
    "own_directory": ([(".swarm/x", 4)], "names swarm's own directory"),
    "file_and_directory": ([("x", 4), ("x/y", 4)], "'x' is both a file and a directory"),
}


def test_are_lying_manifests_refused_and_nothing_written(machine: Machine, tmp_path: Path) -> None:
    deep = tmp_path / "deep" / "below"
    with contextlib.ExitStack() as liars:
        fetches = {}
        for name, (files, _) in LYING_MANIFESTS.items():
            placed = [(path.replace("ABSOLUTE", str(tmp_path / "absolute")), size) for path, size in files]
            liar = liars.enter_context(liar_about(*placed))
            fetches[name] = liar, machine.fetch(deep / name, peers=[liar.address])
        for name, (liar, newcomer) in fetches.items():
            line = newcomer.end().error(3)
            assert LYING_MANIFESTS[name][1] in line
            assert line.count("LyingPeer: manifest: ") == 1, "a peer asked again and again is named once"
            assert liar.asked == []
    assert not deep.parent.exists()
    assert [path for path in tmp_path.rglob("*") if path.name in ("x", "y")] == []


class OtherDigest(LyingPeer):
    def manifest_parts(self) -> Iterator[messages.ManifestPart]:
        other = self.encoded.replace(b"a.safetensors", b"A.safetensors")
        yield messages.ManifestPart(self.digest, len(other), 0, other)


class PartsWithAGap(LyingPeer):
    def manifest_parts(self) -> Iterator[messages.ManifestPart]:
        yield messages.ManifestPart(self.digest, len(self.encoded), 0, self.encoded[:10])
        yield messages.ManifestPart(self.digest, len(self.encoded), 20, self.encoded[20:])


class TooManyParts(LyingPeer):
    def manifest_parts(self) -> Iterator[messages.ManifestPart]:
        yield messages.ManifestPart(self.digest, 100, 0, self.encoded)


class NoManifest(LyingPeer):
    def manifest_parts(self) -> Iterator[messages.ManifestPart]:
        yield messages.ManifestPart(self.digest, 0, 0, b"")


BAD_MANIFESTS = [
    Lie(OtherDigest, 3, "a peer altered it"),
    Lie(PartsWithAGap, 3, "parts of a manifest that do not fit"),
    Lie(TooManyParts, 3, "parts of a manifest that do not fit"),
    Lie(NoManifest, 3, "does not have the manifest that it announced"),
]


def test_is_a_manifest_that_is_not_the_announced_one_refused(machine: Machine, model: Path, out: Path) -> None:
    errors_alone(BAD_MANIFESTS, machine=machine, model=model, out=out)


def test_does_an_honest_seed_help_where_peers_send_other_manifests(machine: Machine, model: Path, out: Path) -> None:
    complete_beside(BAD_MANIFESTS, machine=machine, model=model, out=out)


# Bytes


class WrongBytes(LyingPeer):
    def spans(self, chunks: list[Chunk]) -> Iterator[Span]:
        for chunk in chunks:
            yield memoryview(bytes(chunk.size))


class TooFew(LyingPeer):
    async def carry(self, transfer: Transfer, chunks: list[Chunk], outbound: Outbound) -> None:
        less = dataclasses.replace(transfer, size=transfer.size - 1)
        await outbound.send(less, iter([memoryview(bytes(less.size))]))


class TooMany(LyingPeer):
    async def carry(self, transfer: Transfer, chunks: list[Chunk], outbound: Outbound) -> None:
        more = dataclasses.replace(transfer, size=transfer.size + 1)
        await outbound.send(more, iter([memoryview(bytes(more.size))]))


class Nothing(LyingPeer):
    async def carry(self, transfer: Transfer, chunks: list[Chunk], outbound: Outbound) -> None:
        await asyncio.Event().wait()


class HalfAndThenNothing(LyingPeer):
    def spans(self, chunks: list[Chunk]) -> Iterator[Span]:
        yield memoryview(bytes(chunks[0].size // 2))
        threading.Event().wait(4 * float(QUICK["SWARM_IDLE_TIMEOUT_S"]))
        raise ValueError("it never meant to")


class AnotherChunk(LyingPeer):
    """Right bytes, of a chunk that is as long and that nobody asked for."""

    def spans(self, chunks: list[Chunk]) -> Iterator[Span]:
        known = self.manifest.chunks
        for chunk in chunks:
            others = [one for one in known if one.size == chunk.size and one.digest != chunk.digest]
            yield from super().spans(others[:1]) if others else iter([memoryview(bytes(chunk.size))])


class RefusesWhatItClaims(LyingPeer):
    """It says that it holds everything, and has nothing of it when it is asked."""

    async def answer(self, socket: web.WebSocketResponse, request: messages.Request) -> None:
        self.asked.append(request)
        await self.say(socket, messages.Refuse(request.transfer, "not_held", 0.0))


ANOTHER_CHUNK = Lie(AnotherChunk, 4, "sent 3 wrong chunks")
EMPTY_CLAIM = Lie(RefusesWhatItClaims, 4, "")
CORRUPT = Lie(WrongBytes, 4, "sent 3 wrong chunks")
BAD_TRANSFERS = [
    Lie(TooFew, 4, "the peer sent "),
    Lie(TooMany, 4, "the peer sends more than"),
    Lie(Nothing, 4, "sent nothing for 1 s"),
    Lie(HalfAndThenNothing, 4, " for 1 s"),  # the session and the fetch notice at the same time
]


def test_does_a_fetch_from_a_bad_source_alone_end_with_its_name(machine: Machine, model: Path, out: Path) -> None:
    errors_alone([CORRUPT, ANOTHER_CHUNK, EMPTY_CLAIM, *BAD_TRANSFERS], machine=machine, model=model, out=out)


def test_is_a_peer_banned_after_three_wrong_chunks_and_the_rest_fetched_elsewhere(
    machine: Machine, tmp_path: Path, out: Path
) -> None:
    model = write_model(tmp_path / "model", size=16_000_000)
    seed = machine.serve(model, *SLOW_SEED, "--name", "honest")
    with WrongBytes.of(model) as liar:
        newcomer = machine.fetch(out, peers=[liar.address, seed.address])
        report = newcomer.end().report
    assert contents(out) == contents(model)
    assert report["sources"].keys() == {"honest"}
    assert report["rejected_chunks"] >= 3  # more may be on their way by then
    assert f"banned WrongBytes ({liar.address}): sent 3 wrong chunks" in newcomer.err


def test_does_a_fetch_complete_from_an_honest_seed_beside_bad_sources(
    machine: Machine, tmp_path: Path, out: Path
) -> None:
    model = write_model(tmp_path / "model", size=16_000_000)
    liars, report = complete_beside(BAD_TRANSFERS, *SLOW_SEED, machine=machine, model=model, out=out)
    assert all(liar.asked for liar in liars)
    assert report["sources"].keys() == {"honest"}


# Words


class OtherVersion(LyingPeer):
    def hello(self) -> messages.Hello:
        return msgspec.structs.replace(super().hello(), protocol=messages.PROTOCOL + 1)


class Garbage(LyingPeer):
    async def greeted(self, socket: web.WebSocketResponse) -> None:
        await socket.send_str('{"type": "Have", "digest": [[[')


class UnknownMessage(LyingPeer):
    async def greeted(self, socket: web.WebSocketResponse) -> None:
        await socket.send_str('{"type": "Execute", "code": "rm"}')


class Binary(LyingPeer):
    async def greeted(self, socket: web.WebSocketResponse) -> None:
        await socket.send_bytes(b"\0" * 10)


class Giant(LyingPeer):
    async def greeted(self, socket: web.WebSocketResponse) -> None:
        await socket.send_str('{"type": "Bye", "reason": "' + "x" * (2 * messages.FRAME_BYTES_MAX) + '"}')


class HelloTwice(LyingPeer):
    async def greeted(self, socket: web.WebSocketResponse) -> None:
        await self.say(socket, self.hello())


class LongHoldings(LyingPeer):
    def holdings(self) -> messages.Message:
        return messages.Holdings(self.digest, b"\xff" * 1000)


class HaveBeyondTheEnd(LyingPeer):
    def holdings(self) -> messages.Message:
        return messages.Have(self.digest, ((0, len(self.manifest.chunks) + 1),))


BAD_WORDS = [
    Lie(
        OtherVersion,
        3,
        f"speaks protocol {messages.PROTOCOL + 1} (swarm 9.9), this node speaks {messages.PROTOCOL}; upgrade",
    ),
    Lie(Garbage, 3, "sent an invalid message"),
    Lie(UnknownMessage, 3, "sent an invalid message"),
    Lie(Binary, 3, "sent a binary frame"),
    Lie(Giant, 3, "exceeds limit"),
    Lie(HelloTwice, 3, "said hello twice"),
    Lie(LongHoldings, 4, "bitfield of 1000 bytes"),
    Lie(HaveBeyondTheEnd, 4, "has chunks beyond the"),
]


def test_does_a_fetch_from_a_peer_that_breaks_the_protocol_say_how(machine: Machine, model: Path, out: Path) -> None:
    for why, ended in errors_alone(BAD_WORDS, machine=machine, model=model, out=out):
        assert sum(why in line for line in ended.err.splitlines()) <= 2, "said once, and once more in the error"


def test_does_a_fetch_complete_beside_peers_that_break_the_protocol(machine: Machine, model: Path, out: Path) -> None:
    complete_beside(BAD_WORDS, machine=machine, model=model, out=out)


# Grants


class Silent(LyingPeer):
    """Nothing follows its grants, so that it is them that the newcomer judges."""

    async def carry(self, transfer: Transfer, chunks: list[Chunk], outbound: Outbound) -> None:
        await asyncio.Event().wait()


class GrantsNothing(Silent):
    def granted(self, request: messages.Request) -> tuple[int, ...]:
        return ()


class GrantsTooMuch(Silent):
    def granted(self, request: messages.Request) -> tuple[int, ...]:
        return tuple(range(request.count + 1))


class GrantsOneTwice(Silent):
    def granted(self, request: messages.Request) -> tuple[int, ...]:
        return (0,) * max(2, request.count)


class GrantsBeyondTheEnd(Silent):
    def granted(self, request: messages.Request) -> tuple[int, ...]:
        return (len(self.manifest.chunks),)


class GrantsOthers(Silent):
    superseeds = False

    def granted(self, request: messages.Request) -> tuple[int, ...]:
        return tuple((index + 1) % len(self.manifest.chunks) for index in request.chunks)


class GrantsTwice(Silent):
    async def answer(self, socket: web.WebSocketResponse, request: messages.Request) -> None:
        for _ in range(2):
            await super().answer(socket, request)


NOT_ASKED = "chunks that it was not asked for"
BAD_GRANTS = [
    Lie(GrantsNothing, 4, f"grants 0 {NOT_ASKED}"),
    Lie(GrantsTooMuch, 4, f"grants 2 {NOT_ASKED}"),
    Lie(GrantsOneTwice, 4, f"grants 2 {NOT_ASKED}"),
    Lie(GrantsBeyondTheEnd, 4, f"grants 1 {NOT_ASKED}"),
    Lie(GrantsOthers, 4, f"grants 1 {NOT_ASKED}"),
    Lie(GrantsTwice, 4, "twice"),
]


def test_does_a_fetch_from_a_peer_that_grants_what_was_not_asked_for_say_so(
    machine: Machine, model: Path, out: Path
) -> None:
    errors_alone(BAD_GRANTS, machine=machine, model=model, out=out)


def test_does_a_fetch_complete_beside_peers_that_grant_what_was_not_asked_for(
    machine: Machine, model: Path, out: Path
) -> None:
    liars, report = complete_beside(BAD_GRANTS, *SLOW_SEED, machine=machine, model=model, out=out)
    assert all(liar.asked for liar in liars)
    assert report["sources"].keys() == {"honest"}


# Questions


def request(number: int, *, chunks: tuple[int, ...] = (), count: int = 0) -> Question:
    return lambda announced: messages.Request("tcp", announced.digest, number, chunks, count, True, 1, 0, 1)


def interest(announced: messages.Announcement) -> messages.Message:
    return messages.Interest(announced.digest, Bitfield(announced.chunks_total).pack(), b"")


def beyond_the_end(announced: messages.Announcement) -> messages.Message:
    return request(1, chunks=(announced.chunks_total,))(announced)


@pytest.mark.parametrize(
    ("questions", "why"),
    [
        ([request(1, chunks=(0,), count=1)], "asked for chunks in a way that cannot be answered"),
        ([request(1)], "asked for chunks in a way that cannot be answered"),
        ([request(7, chunks=(0,)), request(7, chunks=(1,))], "asked for transfer 7 twice"),
        ([interest, request(7, count=1), request(7, count=1)], "asked for transfer 7 twice"),
    ],
    ids=["chunks_and_a_count", "neither", "number_twice", "number_twice_for_gifts"],
)
def test_does_a_seed_hang_up_on_bad_questions_and_serve_the_next(
    questions: Sequence[Question], why: str, machine: Machine, model: Path, out: Path
) -> None:
    seed = machine.serve(model)
    answers = asyncio.run(heard(seed.address, *questions))
    assert not any(isinstance(answer, messages.Refuse) for answer in answers)
    seed.wait_for(f"stranger: {why}")
    assert machine.fetch(out, peers=[seed.address]).end().code == 0
    assert contents(out) == contents(model)


def test_does_a_seed_refuse_what_it_does_not_hold_or_would_not_give(machine: Machine, model: Path) -> None:
    seed = machine.serve(model)
    reasons = {beyond_the_end: "not_held", request(1, count=1): "nothing_to_give"}  # to who shows no interest
    for question, reason in reasons.items():
        *_, answer = asyncio.run(heard(seed.address, question, last=messages.Refuse))
        assert isinstance(answer, messages.Refuse)
        assert answer.reason == reason


# Nobody, or two


def test_is_a_model_without_holders_an_error_that_names_what_was_tried(
    machine: Machine, model: Path, out: Path
) -> None:
    seed = machine.serve(model, "--name", "other-seed")
    nobody = "127.0.0.1:1"
    line = machine.fetch(out, peers=[seed.address, nobody], model_id="org/other").end().error(3)
    assert "no peer serves 'org/other' (searched for 2" in line
    assert f"other-seed at {seed.address} serves {MODEL} ({seed.digest[:16]})" in line
    assert f"{nobody}: no program listens there" in line
    assert not out.exists()


def test_are_two_contents_under_one_id_an_error_until_one_is_chosen(
    machine: Machine, model: Path, out: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other", size=1_000_000, seed=2)
    one, two = machine.serve(model, "--name", "one"), machine.serve(other, "--name", "two")
    peers = [one.address, two.address]
    line = machine.fetch(out, peers=peers).end().error(3)
    digests = [word for word in line.replace("(", " ").split() if len(word) == 64]
    assert len(digests) == 2, line
    assert f"at one ({one.address})" in line
    assert f"at two ({two.address})" in line
    assert not out.exists()
    found = []
    for number, digest in enumerate(digests):
        chosen = tmp_path / f"chosen-{number}"
        assert machine.fetch(chosen, "--digest", digest, peers=peers).end().report["digest"] == digest
        found.append(contents(chosen))
    assert contents(model) in found
    assert contents(other) in found


def test_is_an_impossible_digest_refused_at_once(machine: Machine, out: Path) -> None:
    line = machine.fetch(out, "--digest", "abc", peers=[]).end().error(2)
    assert "digest: 'abc'" in line


def test_is_a_seed_that_vanishes_between_two_fetches_no_hang(machine: Machine, model: Path, out: Path) -> None:
    seed = machine.serve(model)
    seed.kill()
    assert f"{seed.address}: no program listens there" in machine.fetch(out, peers=[seed.address]).end().error(3)


def test_do_many_strangers_that_say_nothing_leave_room_for_a_newcomer(machine: Machine, model: Path, out: Path) -> None:
    seed = machine.serve(model)
    host, port = seed.address.split(":")

    async def crowd() -> int:
        async with asyncio.timeout(DEADLINE_S):
            opened = await asyncio.gather(*(asyncio.open_connection(host, int(port)) for _ in range(300)))
            newcomer = machine.fetch(out, peers=[seed.address])
            code = (await asyncio.to_thread(newcomer.end)).code
            for _, writer in opened:
                writer.close()
            await asyncio.gather(*(writer.wait_closed() for _, writer in opened), return_exceptions=True)
            return code

    assert asyncio.run(crowd()) == 0
    assert contents(out) == contents(model)
