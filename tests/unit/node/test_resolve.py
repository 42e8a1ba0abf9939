"""From a model id to a manifest, between real nodes in one process whose links are queues."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarm.content.manifest import ChunkEntry, Digest, FileEntry, HashScheme, Manifest, ModelId
from swarm.content.promise import ListedFile, Listing, promise
from swarm.errors import (
    ManifestConflict,
    ManifestNotFound,
    NotAdmitted,
    PeerTimeout,
    PeerUnreachable,
    RevisionNotFound,
    SettingsError,
    Unsigned,
)
from swarm.hashing.cpu import chunk_digests
from swarm.journal import Resolved
from swarm.net.environment import Found
from swarm.net.link import Link
from swarm.net.udp import Hear
from swarm.node import agreement, manifest_answers
from swarm.node.node import Node
from swarm.node.resolve import full_digest, resolve
from swarm.peers.peer import Peer
from swarm.protocol.messages import Address, AnyMessage, Message, NodeId, Origin, decode, encode
from swarm.security import signatures
from swarm.store.memory_store import MemoryStore
from swarm.transport import Transport
from swarm.transport.inproc import InprocHub, InprocTransport

ORG_OTHER = ModelId("org/other")

OTHER_CLUSTER = "other-cluster"
DEADLINE_S = 20.0
MODEL = ModelId("org/model")
ORIGIN = Origin("ef" * 20, {})


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    asyncio.run(within_deadline())


class QueueLink:
    """One end of a link in memory."""

    def __init__(self, remote: str) -> None:
        self.remote, self.local = remote, "here"
        self.member: str | None = None
        self.twin = self
        self._inbox: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def send(self, *several: Message) -> None:
        await asyncio.sleep(0)
        for message in several:
            self.twin._inbox.put_nowait(encode(message))

    async def receive(self) -> AnyMessage:
        frame = await self._inbox.get()
        if frame is None:
            raise PeerUnreachable(self.remote, "closed the link")
        return decode(frame)

    async def close(self) -> None:
        self.twin._inbox.put_nowait(None)
        self._inbox.put_nowait(None)


class Street(dict[str, "QueueWorld"]):
    """Who lives at which address."""

    def __init__(self) -> None:
        super().__init__()
        self.datagrams_pass = True
        self.hub = InprocHub("street")

    def node(self, name: str, *, knows: Iterable[str] = (), publishers: Sequence[str] = ()) -> Node:
        return Node(QueueWorld(self, name, tuple(knows)), name=name, publishers=publishers)


class QueueWorld:
    """A world of queues: see `Environment`."""

    transports: Sequence[Transport] = ()

    def __init__(self, street: Street, address: str, known: tuple[str, ...]) -> None:
        self.addresses = (Address(address),)
        self.local, self.on_loopback = Address(address), False
        self.confined = False
        self.names_peers = bool(known)
        self.unresolved: Sequence[str] = ()
        self.resolving = False
        self._street = street
        self._address = address
        self._known = known
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(
        self,
        node: NodeId,
        accept: Callable[[Link], Awaitable[None]],
        found: Found,
        hear: Hear,
    ) -> Address:
        self.transports = [InprocTransport(self._street.hub)]
        self._accept, self._hear = accept, hear
        self._street[self._address] = self
        for address in self._known:
            asyncio.get_running_loop().call_soon(found, (Address(address),), True)
        return Address(self._address)

    def port_at(self, local: str) -> int:
        return 0

    def reached(
        self, claimed: Sequence[str], *, remote: str | None = None, port: int = 0, dialled: Address | None = None
    ) -> tuple[Address, ...]:
        return tuple(dict.fromkeys([*([dialled] if dialled else []), *map(Address, claimed)]))

    async def dial(self, addresses: Sequence[Address]) -> Link:
        address = addresses[0]
        if address == OTHER_CLUSTER:
            raise NotAdmitted(address, "has another cluster key; give both the same key file")
        if address not in self._street:
            raise PeerUnreachable(address, "nobody lives there")
        near, far = QueueLink(address), QueueLink(self._address)
        near.twin, far.twin = far, near
        self._street[address].accept(far)
        return near

    def accept(self, link: Link) -> None:
        async def converse() -> None:
            await self._accept(link)

        task = asyncio.create_task(converse())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def send(self, address: str, datagram: bytes) -> None:
        if (target := self._street.get(address)) and self._street.datagrams_pass:
            asyncio.get_running_loop().call_soon(target._hear, Address(self._address), datagram)

    def drain(self) -> None:
        """Nothing waits."""

    paused_s = 0.0

    async def close(self) -> None:
        self._street.pop(self._address, None)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for transport in self.transports:
            await transport.close()


class Promised(MemoryStore):
    """A promise of the same file, as nodes announce it that read it from its origin."""

    def __init__(self, size: int = 4) -> None:
        content = "sha256:" + hashlib.sha256(bytes(size)).hexdigest()
        super().__init__(promise(Listing("origin", ORIGIN.commit, (ListedFile("zeros", size, content),))))


class Zeros(MemoryStore):
    """A whole artifact of zeros; `size` tells one from another."""

    def __init__(self, size: int = 4) -> None:
        scheme = HashScheme(leaf_bytes=1024)
        chunk = ChunkEntry(size, chunk_digests(scheme, [bytes(size)]).xxh3.hex())
        super().__init__(Manifest(1, "checkpoint", "", scheme, size, (FileEntry("zeros", size, "", (chunk,)),)))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what a node knows is no event; the scenario's deadline ends this
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def newcomer_of(*names: str) -> AsyncIterator[list[Node]]:
    """Open nodes with these names, and last a newcomer that knows them all."""
    street = Street()
    async with contextlib.AsyncExitStack() as stack:
        nodes = [*map(street.node, names), street.node("newcomer", knows=names)]
        yield [await stack.enter_async_context(node) for node in nodes]


def test_is_a_served_model_found_with_its_origin() -> None:
    async def scenario() -> None:
        async with newcomer_of("seed") as (seed, newcomer):
            seed.serve(MODEL, source := Zeros(), origin=ORIGIN)
            manifest, origin = await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S)
            assert (manifest, origin) == (source.manifest, ORIGIN)

    run(scenario)


def test_does_the_journal_say_how_it_went() -> None:
    async def scenario() -> None:
        async with newcomer_of("seed") as (seed, newcomer):
            seed.serve(MODEL, source := Zeros())
            await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S)
            with pytest.raises(ManifestNotFound):
                await resolve(newcomer, ORG_OTHER, digest=None, find_timeout_s=0.01)
            found, missed = (entry.event for entry in newcomer.journal if isinstance(entry.event, Resolved))
            assert (found.model_id, found.digest, found.error) == (MODEL, source.manifest.digest, None)
            assert found.agreed_at_s is not None
            assert found.began_at_s <= found.agreed_at_s <= newcomer.now()
            assert (missed.model_id, missed.digest, missed.agreed_at_s) == ("org/other", None, None)
            assert str(missed.error).startswith("no peer serves 'org/other'")

    run(scenario)


def test_is_a_model_found_that_is_served_later() -> None:
    async def scenario() -> None:
        async with newcomer_of("seed") as (seed, newcomer):
            finding = asyncio.create_task(resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S))
            await until(lambda: bool(newcomer.peers))
            seed.serve(MODEL, source := Zeros())
            assert (await finding)[0] == source.manifest

    run(scenario)


def test_does_a_model_of_this_node_need_no_peer() -> None:
    async def scenario() -> None:
        async with Street().node("alone") as node:
            node.serve(MODEL, source := Zeros(), origin=ORIGIN)
            found = await resolve(node, MODEL, digest=None, find_timeout_s=0.01)
            assert found == (source.manifest, ORIGIN)
            assert found == await resolve(
                node, ModelId("other/name"), digest=source.manifest.digest, find_timeout_s=0.01
            )

    run(scenario)


@pytest.mark.parametrize("knows", [[], ["nowhere"], ["seed"]])
def test_does_a_model_without_seeds_say_which_nodes_were_asked(knows: list[str]) -> None:
    async def scenario() -> None:
        street = Street()
        async with street.node("seed") as seed, street.node("newcomer", knows=knows) as newcomer:
            seed.serve(ORG_OTHER, other := Zeros())
            words = {
                "seed": f"seed at seed serves org/other ({other.manifest.digest[:16]})",
                "nowhere": "nowhere: nobody lives there",
            }
            await until(lambda: newcomer.tried() == [words[name] for name in knows])
            with pytest.raises(ManifestNotFound) as caught:
                await resolve(newcomer, MODEL, digest=None, find_timeout_s=0.01)
            assert caught.value.tried == tuple(words[name] for name in knows)

    run(scenario)


@pytest.mark.parametrize("find_timeout_s", [None, math.inf])
def test_does_a_wrong_key_end_the_search_at_once_in_one_line(find_timeout_s: float | None) -> None:
    async def scenario() -> None:
        street = Street()
        async with street.node("newcomer", knows=[OTHER_CLUSTER]) as newcomer:
            with pytest.raises(ManifestNotFound) as caught:
                await resolve(newcomer, MODEL, digest=None, find_timeout_s=find_timeout_s)
            line = f"{OTHER_CLUSTER}: has another cluster key; give both the same key file"
            assert caught.value.tried == (line,)
            assert str(caught.value).count("key file") == 1
            assert "swarm serve" not in str(caught.value), "that would not help"

    run(scenario)


def test_does_a_wrong_key_not_hide_a_node_that_has_the_model() -> None:
    async def scenario() -> None:
        street = Street()
        async with street.node("seed") as seed, street.node("newcomer", knows=[OTHER_CLUSTER, "seed"]) as newcomer:
            seed.serve(MODEL, source := Zeros())
            assert (await resolve(newcomer, MODEL, digest=None, find_timeout_s=None))[0] == source.manifest

    run(scenario)


def test_is_the_search_short_where_no_node_is_found_and_endless_if_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "NOTHING_FOUND_S", 0.05)

    async def scenario() -> None:
        street = Street()
        async with street.node("newcomer") as newcomer:
            with pytest.raises(ManifestNotFound, match="no peer was found"):
                await resolve(newcomer, MODEL, digest=None, find_timeout_s=None)
            waiting = asyncio.create_task(resolve(newcomer, MODEL, digest=None, find_timeout_s=math.inf))
            async with street.node("seed", knows=["newcomer"]) as seed:
                seed.serve(MODEL, source := Zeros())
                assert (await waiting)[0] == source.manifest

    run(scenario)


def test_do_two_contents_of_one_name_name_who_holds_them() -> None:
    async def scenario() -> None:
        async with newcomer_of("one", "two") as (one, two, newcomer):
            one.serve(MODEL, first := Zeros(4))
            two.serve(MODEL, second := Zeros(8))
            await until(lambda: len(newcomer.holders(MODEL)) == 2)
            with pytest.raises(ManifestConflict, match="choose the digest with --digest") as caught:
                await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S)
            assert caught.value.holders == {
                first.manifest.digest: ("one (one)",),
                second.manifest.digest: ("two (two)",),
            }
            pinned = second.manifest.digest
            assert (await resolve(newcomer, MODEL, digest=pinned, find_timeout_s=DEADLINE_S))[0] == second.manifest

    run(scenario)


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(signatures.create(tmp_path / "k"), signatures.read_key(tmp_path / "k"))


@dataclass(frozen=True)
class Publisher:
    name: str
    key: Ed25519PrivateKey

    def origin(self, source: Zeros, *, model_id: ModelId = MODEL, revision: str = "") -> Origin:
        """An origin with the publisher's signature."""
        signed = signatures.sign(self.key, model_id, source.manifest.digest, revision=revision)
        return Origin("", {}, (revision,) if revision else (), signatures=(signed,))


def test_is_what_a_publisher_signed_chosen_whoever_carries_it(publisher: Publisher) -> None:
    """A liar serves other bytes under the id; one of two holders of the right ones withholds the signature."""

    async def scenario() -> None:
        street, right = Street(), Zeros(8)
        everybody = ["liar", "silent", "carrier"]
        async with (
            street.node("liar") as liar,
            street.node("silent") as silent,
            street.node("carrier") as carrier,
            street.node("newcomer", knows=everybody, publishers=[publisher.name]) as newcomer,
        ):
            wrong = Zeros(4)
            liar.serve(MODEL, wrong, origin=Origin("", {}, signatures=publisher.origin(right).signatures))
            silent.serve(MODEL, right)
            carrier.serve(MODEL, Zeros(8), origin=publisher.origin(right))
            await until(lambda: sum(map(len, newcomer.holders(MODEL).values())) == 3)
            manifest, origin = await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S)
            assert manifest == right.manifest
            assert origin is not None
            assert origin.signatures == publisher.origin(right).signatures
            with pytest.raises(Unsigned):
                await resolve(newcomer, MODEL, digest=wrong.manifest.digest, find_timeout_s=0.5)

    run(scenario)


def test_is_a_signature_for_another_id_or_revision_none(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "OTHER_REVISION_S", 0.1)

    async def scenario() -> None:
        street = Street()
        async with (
            street.node("seed") as seed,
            street.node("newcomer", knows=["seed"], publishers=[publisher.name]) as newcomer,
        ):
            seed.serve(MODEL, old := Zeros(4), origin=publisher.origin(Zeros(4), revision="v1"))
            seed.serve(ORG_OTHER, other := Zeros(8), origin=publisher.origin(Zeros(8), model_id=ORG_OTHER))
            found, _ = await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S, revision="v1")
            assert found == old.manifest
            with pytest.raises(Unsigned, match="'org/model@v2' is served, but not signed for this id and revision"):
                await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S, revision="v2")
            with pytest.raises(Unsigned, match=r"swarm sign PATH --key KEY"):
                await resolve(newcomer, MODEL, digest=other.manifest.digest, find_timeout_s=DEADLINE_S)

    run(scenario)


@pytest.mark.parametrize("commit", [ORIGIN.commit, "ab" * 20])
def test_is_a_promise_the_same_content_as_a_manifest_of_its_commit(commit: str) -> None:
    async def scenario() -> None:
        async with newcomer_of("seed", "reader") as (seed, reader, newcomer):
            seed.serve(MODEL, served := Zeros(4), origin=ORIGIN)
            reader.serve(MODEL, Promised(), origin=Origin(commit, {}))
            await until(lambda: len(newcomer.holders(MODEL)) == 2)
            if commit == ORIGIN.commit:
                found = await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S)
                assert found[0].digest == served.manifest.digest
            else:
                with pytest.raises(ManifestConflict):
                    await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S)

    run(scenario)


def test_is_a_conflict_with_this_node_told_as_such() -> None:
    async def scenario() -> None:
        street = Street()
        async with street.node("one") as one, street.node("me", knows=["one"]) as me:
            one.serve(MODEL, Zeros(4))
            me.serve(MODEL, own := Zeros(8))
            await until(lambda: len(me.holders(MODEL)) == 2)
            with pytest.raises(ManifestConflict, match="at this node") as caught:
                await resolve(me, MODEL, digest=None, find_timeout_s=DEADLINE_S)
            assert caught.value.holders[own.manifest.digest] == ("this node",)

    run(scenario)


def test_is_a_pinned_digest_found_under_another_name_only() -> None:
    async def scenario() -> None:
        async with newcomer_of("seed") as (seed, newcomer):
            seed.serve(ModelId("another/name"), source := Zeros(4))
            seed.serve(MODEL, Zeros(8))
            pinned = source.manifest.digest
            assert (await resolve(newcomer, MODEL, digest=pinned, find_timeout_s=DEADLINE_S))[0] == source.manifest
            with pytest.raises(ManifestNotFound):
                await resolve(newcomer, MODEL, digest=Digest("0" * 64), find_timeout_s=0.01)

    run(scenario)


def test_is_a_manifest_that_is_not_the_announced_one_asked_elsewhere() -> None:
    async def scenario() -> None:
        async with newcomer_of("liar", "seed") as (liar, seed, newcomer):
            for node in (liar, seed):
                node.serve(MODEL, source := Zeros())
            other = Zeros(8).manifest
            liar.manifest_requests._lookup = lambda digest: (other, None)  # answers with another manifest's bytes
            await until(lambda: len(newcomer.holders_of(source.manifest.digest)) == 2)
            assert (await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S))[0] == source.manifest

    run(scenario)


@pytest.mark.parametrize("answer", ["another manifest", "nothing"])
def test_is_every_failure_told_once(answer: str) -> None:
    async def scenario() -> None:
        async with newcomer_of("liar") as (liar, newcomer):
            liar.serve(MODEL, Zeros(4))
            other = Zeros(8).manifest
            liar.manifest_requests._lookup = lambda digest: (other, None) if answer == "another manifest" else None
            with pytest.raises(ManifestNotFound) as caught:
                await resolve(newcomer, MODEL, digest=None, find_timeout_s=0.5)
            (tried,) = caught.value.tried
            assert tried.startswith("liar: ")

    run(scenario)


def test_does_a_peer_that_leaves_midway_leave_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        street = Street()
        silent, seed = street.node("silent"), street.node("seed")
        async with seed, silent, street.node("newcomer", knows=["silent", "seed"]) as newcomer:
            asked = asyncio.Event()

            async def never(*_: object) -> None:
                asked.set()
                await asyncio.Event().wait()

            monkeypatch.setattr(silent.manifest_requests, "send_manifests", never)
            silent.serve(MODEL, source := Zeros())
            finding = asyncio.create_task(resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S))
            await asked.wait()
            seed.serve(MODEL, Zeros())
            await silent.close()
            assert (await finding)[0] == source.manifest

    run(scenario)


def test_does_a_peer_that_never_answers_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_answers, "MANIFEST_TIMEOUT_S", 0.05)

    async def never(*_: object) -> None: ...

    async def scenario() -> None:
        async with newcomer_of("silent") as (silent, newcomer):
            monkeypatch.setattr(silent.manifest_requests, "send_manifests", never)
            silent.serve(MODEL, Zeros())
            with pytest.raises(ManifestNotFound, match="did not send its manifest"):
                await resolve(newcomer, MODEL, digest=None, find_timeout_s=0.1)

    run(scenario)


def test_do_two_fetches_of_one_artifact_on_one_node_both_end() -> None:
    async def scenario() -> None:
        async with newcomer_of("seed") as (seed, newcomer):
            seed.serve(MODEL, source := Zeros())

            async def fetch() -> int:
                manifest, _ = await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S)
                return sum((await newcomer.fetch(MODEL, Zeros(manifest.size))).sources.values())

            assert list(await asyncio.gather(fetch(), fetch(), fetch())) == [4, 4, 4]
            assert newcomer.described(source.manifest.digest)

    run(scenario)


def test_may_trusted_machines_alone_introduce_a_model() -> None:
    async def scenario() -> None:
        street = Street()
        good, bad = "10.1.0.5:7000", "10.2.0.5:7000"
        async with street.node(good) as one, street.node(bad) as two, street.node("me", knows=[good, bad]) as me:
            one.serve(MODEL, right := Zeros(4))
            two.serve(MODEL, Zeros(8))
            await until(lambda: len(me.holders(MODEL)) == 2)
            for trusted in (["10.1.0.0/16"], ["10.9.9.9", "10.1.0.5"]):
                found, _ = await resolve(me, MODEL, digest=None, find_timeout_s=DEADLINE_S, trusted=trusted)
                assert found == right.manifest
            with pytest.raises(ManifestConflict):
                await resolve(me, MODEL, digest=None, find_timeout_s=DEADLINE_S, trusted=["10.0.0.0/8"])
            with pytest.raises(ManifestNotFound, match=r"10\.2\.0\.5:7000\) may not introduce it"):
                await resolve(me, MODEL, digest=None, find_timeout_s=0.01, trusted=["10.3.0.0/16"])

    run(scenario)


@pytest.mark.parametrize("revision", ["main", "feature/x", "ef" * 20, "efefefe"])
def test_is_a_revision_found_by_name_and_by_commit_among_two(revision: str) -> None:
    async def scenario() -> None:
        async with newcomer_of("one", "two") as (one, two, newcomer):
            first = Origin("ef" * 20, {}, ("main", "feature/x"))
            one.serve(MODEL, wanted := Zeros(4), origin=first)
            two.serve(MODEL, Zeros(8), origin=Origin("", {}, ("v2",)))
            await until(lambda: len(newcomer.holders(MODEL)) == 2)
            found = await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S, revision=revision)
            assert found == (wanted.manifest, first)
            with pytest.raises(ManifestConflict, match=r"swarm fetch org/model@(main|v2), swarm fetch org/model@"):
                await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S)

    run(scenario)


@pytest.mark.parametrize("revision", ["v3", "efefef", "efefefe0", "e", "MAIN"])
def test_does_a_revision_that_is_not_served_name_the_others(revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "OTHER_REVISION_S", 0.1)

    async def scenario() -> None:
        async with newcomer_of("seed") as (seed, newcomer):
            seed.serve(MODEL, Zeros(), origin=Origin("ef" * 20, {}, ("main",)))
            with pytest.raises(RevisionNotFound, match=r"not its revision '\w+'; there is main = efef.*@main$"):
                await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S, revision=revision)
            assert (await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S))[1] is not None

    run(scenario)


def test_is_a_content_without_a_revision_never_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "OTHER_REVISION_S", 0.1)

    async def scenario() -> None:
        async with Street().node("alone") as node:
            node.serve(MODEL, Zeros())
            with pytest.raises(RevisionNotFound, match="serve it with --revision LABEL"):
                await resolve(node, MODEL, digest=None, find_timeout_s=DEADLINE_S, revision="main")

    run(scenario)


def test_do_first_digits_choose_a_digest_that_is_announced() -> None:
    async def scenario() -> None:
        async with newcomer_of("one", "two") as (one, two, newcomer):
            one.serve(MODEL, first := Zeros(4))
            two.serve(MODEL, Zeros(8))
            found = await full_digest(newcomer, MODEL, first.manifest.digest[:6], find_timeout_s=DEADLINE_S)
            assert found == first.manifest.digest
            await until(lambda: len(newcomer.holders(MODEL)) == 2)
            with pytest.raises(SettingsError, match=r"^digest: '' begins [0-9a-f]{64}, [0-9a-f]{64}; say more digits"):
                await full_digest(newcomer, MODEL, "", find_timeout_s=DEADLINE_S)
            with pytest.raises(ManifestNotFound, match="one at one serves org/model"):
                await full_digest(newcomer, MODEL, "not digits", find_timeout_s=0.1)
            with pytest.raises(SettingsError, match=rf"of org/model, and none of org/other; .* say {found}$"):
                await full_digest(newcomer, ModelId("org/other"), found[:6], find_timeout_s=DEADLINE_S)
            assert await full_digest(one, MODEL, first.manifest.digest[:6], find_timeout_s=0.1) == found

    run(scenario)


def test_does_a_holder_that_does_not_answer_say_nothing_about_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed node is linked until its heartbeat is missed. Another holder of the same content is asked as well."""
    monkeypatch.setattr(manifest_answers, "ORIGIN_TIMEOUT_S", 0.1)
    monkeypatch.setattr(agreement, "OTHER_REVISION_S", 0.3)

    async def scenario() -> None:
        async with newcomer_of("dumb", "other") as (dumb, other, newcomer):
            wanted = Origin("", {}, ("v1",))
            dumb.serve(MODEL, first := Zeros(4), origin=wanted)
            other.serve(MODEL, Zeros(8), origin=Origin("", {}, ("v2",)))
            await until(lambda: len(newcomer.holders(MODEL)) == 2)
            asked: list[NodeId] = []
            answered = newcomer.manifest_requests.answered_origin

            async def silent(peer: Peer, digest: Digest, *, timeout_s: float) -> Origin | None:
                asked.append(peer.node)
                if peer.node == dumb.id and asked.count(dumb.id) < 4:
                    raise PeerTimeout(peer.name, "is killed")
                return await answered(peer, digest, timeout_s=timeout_s)

            monkeypatch.setattr(newcomer.manifest_requests, "answered_origin", silent)
            found = await resolve(newcomer, MODEL, digest=None, find_timeout_s=DEADLINE_S, revision="v1")
            assert found[0] == first.manifest
            assert asked.count(dumb.id) >= 4

    run(scenario)
