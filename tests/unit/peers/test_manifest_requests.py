"""Questions between two nodes: do answers arrive whole, once, and never too late?"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from swarm.content.manifest import Digest, FileEntry, HashScheme, Manifest
from swarm.errors import PeerError, PeerTimeout, RemoteProtocolError
from swarm.peers import manifest_requests as requests_module
from swarm.peers.manifest_requests import ASKED_MAX, ManifestRequests
from swarm.peers.peer import MESSAGE_BYTES, Peer
from swarm.protocol import messages
from swarm.protocol.messages import (
    Address,
    AnyMessage,
    Hello,
    ManifestPart,
    ManifestRequest,
    Message,
    NodeId,
    Origin,
    OriginReply,
    OriginRequest,
)

DEADLINE_S = 10.0
DIGEST = Digest("ab" * 32)
ORIGIN = Origin("ef" * 20, {})


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    asyncio.run(within_deadline())


class NoLink:
    remote, local = "nowhere", "here"
    member: str | None = None

    async def send(self, *several: Message) -> None: ...

    async def receive(self) -> AnyMessage:
        raise AssertionError

    async def close(self) -> None: ...


class FakePeer(Peer):
    """Its outbox is a list."""

    def __init__(self) -> None:
        hello = Hello(1, "0", NodeId("0" * 16), "them", 0, (Address("127.0.0.1:1"),), "cd" * 16, (), ())
        super().__init__(0, NoLink(), hello, token="ef" * 16, transports=())
        self.posted: list[Message] = []

    def post(self, message: Message, *, within_s: float = 0.0) -> None:
        self.posted.append(message)


def real_peer() -> Peer:
    """Whose outbox waits for `write`."""
    hello = Hello(1, "0", NodeId("0" * 16), "them", 0, (Address("127.0.0.1:1"),), "cd" * 16, (), ())
    return Peer(0, NoLink(), hello, token="ef" * 16, transports=())


def nothing(digest: str) -> None:
    return None


def large_manifest() -> Manifest:
    """Whose bytes need three parts."""
    header = "x" * (2 * messages.MANIFEST_PART_BYTES)
    return Manifest(1, "checkpoint", "", HashScheme(), 4, (FileEntry("a", 0, header, ()),))


async def asked(manifest_requests: ManifestRequests, peer: Peer) -> asyncio.Task[bytes]:
    """A question that is on its way."""
    task = asyncio.create_task(manifest_requests.manifest(peer, DIGEST, timeout_s=DEADLINE_S))
    await asyncio.sleep(0)
    return task


def test_does_a_manifest_in_parts_arrive_whole() -> None:
    async def scenario() -> None:
        manifest = large_manifest()
        holder, asker = ManifestRequests(lambda digest: (manifest, None)), ManifestRequests(nothing)
        us, them = FakePeer(), FakePeer()
        waiting = asyncio.create_task(asker.manifest(them, manifest.digest, timeout_s=DEADLINE_S))
        await asyncio.sleep(0)
        assert them.posted == [ManifestRequest(manifest.digest)]
        assert holder.on_manifest_request(us, ManifestRequest(manifest.digest))
        await holder.send_manifests(us)
        assert len(us.posted) == 3
        for part in us.posted:
            assert isinstance(part, ManifestPart)
            asker.on_manifest_part(them, part)
        assert await waiting == manifest.encoded

    run(scenario)


def test_do_two_who_ask_the_same_share_one_answer() -> None:
    async def scenario() -> None:
        peer, manifest_requests = FakePeer(), ManifestRequests(nothing)
        first, second = await asked(manifest_requests, peer), await asked(manifest_requests, peer)
        assert peer.posted == [ManifestRequest(DIGEST)]
        manifest_requests.on_manifest_part(peer, ManifestPart(DIGEST, 2, 0, b"a"))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        manifest_requests.on_manifest_part(peer, ManifestPart(DIGEST, 2, 1, b"b"))
        assert await second == b"ab"
        origins = [asyncio.create_task(manifest_requests.origin(peer, DIGEST, timeout_s=DEADLINE_S)) for _ in range(2)]
        await asyncio.sleep(0)
        assert peer.posted[1:] == [OriginRequest(DIGEST)]
        manifest_requests.on_origin_reply(peer, OriginReply(DIGEST, ORIGIN))
        assert await asyncio.gather(*origins) == [ORIGIN, ORIGIN]

    run(scenario)


def test_is_a_peer_asked_whose_link_was_replaced_a_moment_ago() -> None:
    async def scenario() -> None:
        peer, manifest_requests = FakePeer(), ManifestRequests(nothing)
        peer.why_gone = "another link is open"
        with pytest.raises(PeerError, match="another link is open"):
            await manifest_requests.manifest(peer, DIGEST, timeout_s=DEADLINE_S)
        assert await manifest_requests.origin(peer, DIGEST, timeout_s=DEADLINE_S) is None
        assert not peer.posted

    run(scenario)


def test_is_an_answered_question_asked_again() -> None:
    async def scenario() -> None:
        peer, manifest_requests = FakePeer(), ManifestRequests(nothing)
        for data in (b"a", b"b"):
            waiting = await asked(manifest_requests, peer)
            manifest_requests.on_manifest_part(peer, ManifestPart(DIGEST, 1, 0, data))
            assert await waiting == data
        assert len(peer.posted) == 2

    run(scenario)


@pytest.mark.parametrize(
    "parts",
    [
        [ManifestPart(DIGEST, 4, 0, b"")],
        [ManifestPart(DIGEST, 1, 0, b"ab")],
        [ManifestPart(DIGEST, 4, 0, b"ab"), ManifestPart(DIGEST, 4, 3, b"d")],
        [ManifestPart(DIGEST, 4, 0, b"ab"), ManifestPart(DIGEST, 4, 1, b"bc")],
        [ManifestPart(DIGEST, 4, 0, b"ab"), ManifestPart(DIGEST, 3, 2, b"cd")],
    ],
    ids=["empty", "too long", "gap", "overlap", "shrinks"],
)
def test_are_parts_that_do_not_fit_the_peers_fault(parts: list[ManifestPart]) -> None:
    async def scenario() -> None:
        peer, manifest_requests = FakePeer(), ManifestRequests(nothing)
        waiting = await asked(manifest_requests, peer)
        *fine, wrong = parts
        for part in fine:
            manifest_requests.on_manifest_part(peer, part)
        with pytest.raises(RemoteProtocolError, match="do not fit together"):
            manifest_requests.on_manifest_part(peer, wrong)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    run(scenario)


def test_are_answers_without_a_question_ignored() -> None:
    async def scenario() -> None:
        peer, manifest_requests = FakePeer(), ManifestRequests(nothing)
        manifest_requests.on_manifest_part(peer, ManifestPart(DIGEST, 2, 0, b"no"))
        manifest_requests.on_origin_reply(peer, OriginReply(DIGEST, ORIGIN))
        assert peer.posted == []
        waiting = await asked(manifest_requests, peer)
        manifest_requests.on_manifest_part(peer, ManifestPart(DIGEST, 2, 0, b"ab"))
        assert await waiting == b"ab"

    run(scenario)


def test_does_a_peer_without_the_manifest_end_the_question() -> None:
    async def scenario() -> None:
        holder, asker, us, them = ManifestRequests(nothing), ManifestRequests(nothing), FakePeer(), FakePeer()
        holder.on_manifest_request(us, ManifestRequest(DIGEST))
        await holder.send_manifests(us)
        assert us.posted == [ManifestPart(DIGEST, 0, 0, b"")]
        waiting = await asked(asker, them)
        asker.on_manifest_part(them, ManifestPart(DIGEST, 0, 0, b""))
        with pytest.raises(PeerError, match="does not have the manifest"):
            await waiting

    run(scenario)


def test_does_a_peer_that_leaves_end_its_questions_only() -> None:
    async def scenario() -> None:
        peer, manifest_requests = FakePeer(), ManifestRequests(nothing)
        waiting = await asked(manifest_requests, peer)
        origin = asyncio.create_task(manifest_requests.origin(peer, DIGEST, timeout_s=DEADLINE_S))
        await asyncio.sleep(0)
        manifest_requests.on_manifest_part(peer, ManifestPart(DIGEST, 2, 0, b"a"))
        manifest_requests.peer_left(NodeId("f" * 16), "somebody else")
        assert not waiting.done()
        manifest_requests.peer_left(peer.node, "was killed")
        with pytest.raises(PeerError, match="them: was killed"):
            await waiting
        assert await origin is None

    run(scenario)


def test_does_a_silent_peer_end_in_time() -> None:
    async def scenario() -> None:
        peer, manifest_requests = FakePeer(), ManifestRequests(nothing)
        with pytest.raises(PeerTimeout, match="did not send its manifest"):
            await manifest_requests.manifest(peer, DIGEST, timeout_s=0.01)
        assert await manifest_requests.origin(peer, DIGEST, timeout_s=0.01) is None

    run(scenario)


@pytest.mark.parametrize("origin", [None, ORIGIN])
def test_is_an_origin_told(origin: Origin | None) -> None:
    async def scenario() -> None:
        manifest, peer = large_manifest(), FakePeer()
        ManifestRequests(lambda digest: (manifest, origin)).on_origin_request(peer, OriginRequest(DIGEST))
        ManifestRequests(nothing).on_origin_request(peer, OriginRequest(DIGEST))
        assert peer.posted == [OriginReply(DIGEST, origin), OriginReply(DIGEST, None)]

    run(scenario)


@pytest.mark.parametrize(("files", "told"), [(10, ("etags", "beside")), (6000, ("etags",)), (12_000, ())])
def test_do_files_beside_a_model_make_way_for_its_etags_in_a_frame(files: int, told: tuple[str, ...]) -> None:
    etags = {f"{number:0>80}": "0" * 40 for number in range(files)}
    full = Origin("ef" * 20, etags, (), {"README.md": b"x" * 250_000})

    async def scenario() -> None:
        manifest, peer = large_manifest(), FakePeer()
        ManifestRequests(lambda digest: (manifest, full)).on_origin_request(peer, OriginRequest(DIGEST))
        expected = {("etags", "beside"): full, ("etags",): Origin("ef" * 20, etags), (): None}
        assert peer.posted == [OriginReply(DIGEST, expected[told])]

    run(scenario)


def test_does_a_peer_that_asks_again_and_does_not_read_wait_for_one_part() -> None:
    """A request of 90 bytes is answered with megabytes: what is not read must not pile up."""

    async def scenario() -> None:
        manifest, peer = large_manifest(), real_peer()
        holder = ManifestRequests(lambda digest: (manifest, None))
        began = [holder.on_manifest_request(peer, ManifestRequest(manifest.digest)) for _ in range(1000)]
        assert began == [True, *[False] * 999]
        sending = asyncio.create_task(holder.send_manifests(peer))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not sending.done()
        assert peer.unread_bytes <= messages.MANIFEST_PART_BYTES + MESSAGE_BYTES
        peer.cut_off("left")
        await sending
        assert peer.unread_bytes == 0
        assert holder.on_manifest_request(peer, ManifestRequest(manifest.digest)), "nothing is remembered of it"

    run(scenario)


def test_how_many_manifests_may_a_peer_ask_for_at_once() -> None:
    async def scenario() -> None:
        peer, holder = FakePeer(), ManifestRequests(nothing)
        for number in range(ASKED_MAX):
            holder.on_manifest_request(peer, ManifestRequest(Digest(f"{number:064x}")))
        holder.on_manifest_request(peer, ManifestRequest(Digest(f"{0:064x}")))
        with pytest.raises(RemoteProtocolError, match="more than 64 manifests at once"):
            holder.on_manifest_request(peer, ManifestRequest(DIGEST))

    run(scenario)


def test_does_an_answer_begin_again_when_it_is_asked_for_again() -> None:
    async def scenario() -> None:
        peer, manifest_requests = FakePeer(), ManifestRequests(nothing)
        waiting = await asked(manifest_requests, peer)
        for part in (
            ManifestPart(DIGEST, 4, 2, b"cd"),  # of an answer that was given up
            ManifestPart(DIGEST, 4, 0, b"ab"),
            ManifestPart(DIGEST, 4, 0, b"ab"),
            ManifestPart(DIGEST, 4, 2, b"cd"),
        ):
            manifest_requests.on_manifest_part(peer, part)
        assert await waiting == b"abcd"

    run(scenario)


def test_is_the_memory_of_all_arriving_manifests_together_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_module, "ARRIVING_BYTES_MAX", 5)

    async def scenario() -> None:
        peer, manifest_requests = FakePeer(), ManifestRequests(nothing)
        digests = [Digest(f"{number:064x}") for number in range(3)]
        waiting = [
            asyncio.create_task(manifest_requests.manifest(peer, digest, timeout_s=DEADLINE_S)) for digest in digests
        ]
        await asyncio.sleep(0)
        for digest in digests:
            manifest_requests.on_manifest_part(peer, ManifestPart(digest, 4, 0, b"ab"))
        with pytest.raises(PeerError, match="one manifest too many"):
            await waiting[2]
        for digest in digests[:2]:
            manifest_requests.on_manifest_part(peer, ManifestPart(digest, 4, 2, b"cd"))
        assert await asyncio.gather(*waiting[:2]) == [b"abcd", b"abcd"]

    run(scenario)
