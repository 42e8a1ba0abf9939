"""The shares of a node: what do peers get to know of them, and are their messages passed on to the right fetch?"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from sim.content import BytesStore, Content

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Digest, ModelId
from swarm.content.selection import part_id
from swarm.errors import RemoteProtocolError, SettingsError, SourceChanged, StoreError
from swarm.journal import Withdrawn
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import Announcement, NodeId
from swarm.store import IsRight
from swarm.transfer import download_events as events
from swarm.transfer.download_driver import DownloadDriver
from swarm.transfer.file_watch import watch_files
from swarm.transfer.shares import Share, Shares

CHUNKS = 8
MODEL, OTHER = ModelId("org/model"), ModelId("org/other")
CONTENT = Content.random(0, chunks=CHUNKS, chunk_bytes=64)
OTHER_CONTENT = Content.random(1, chunks=CHUNKS, chunk_bytes=64)
DIGEST = CONTENT.manifest.digest
ME, THEM, OTHER_NODE = NodeId("5" * 16), NodeId("6" * 16), NodeId("7" * 16)


def announced(*, chunks: int) -> Announcement:
    """The artifact as a newcomer announces it."""
    return Announcement(MODEL, DIGEST, "checkpoint", 512, chunks, CHUNKS, False)


class Source(BytesStore):
    """The whole artifact; `closed` once it is."""

    def __init__(self) -> None:
        super().__init__(CONTENT.manifest, CONTENT.files)
        self.closed = False

    def close(self) -> None:
        self.closed = True


class FakePeer:
    """A peer that keeps the messages sent to it."""

    usual_bytes_per_s = 7.0
    readable = True

    def __init__(self, node: NodeId, *announced: Announcement) -> None:
        self.node, self.name = node, f"peer-{node[:2]}"
        self.said: list[messages.Message] = []
        self.artifacts = {announcement.digest: announcement for announcement in announced}
        self.interests: set[Digest] = set()
        self.own_interests: set[Digest] = set()
        self.leaving = False

    def post(self, message: messages.Message, *, within_s: float = 0.0) -> None:
        self.said.append(message)


class FakeDownload:
    """A download that keeps its events."""

    promise = None

    def __init__(self) -> None:
        self.handled: list[events.Event] = []
        self.met: list[str] = []
        self.failed: list[str] = []
        self.ticks = 0

    def handle(self, event: events.Event) -> None:
        self.handled.append(event)

    def meet(self, peer: Peer) -> None:
        self.met.append(peer.name)

    def fail(self, error: Exception) -> None:
        self.failed.append(str(error))

    def tick(self) -> None:
        self.ticks += 1


class Node:
    """A node of shares alone, with one peer that announces the artifact as a seed."""

    def __init__(self) -> None:
        self.them = FakePeer(THEM, Announcement(MODEL, DIGEST, "checkpoint", 512, CHUNKS, CHUNKS, True))
        self.peer = cast(Peer, self.them)
        self.peers: dict[NodeId, Peer] = {THEM: self.peer}
        self.now = 0.0
        self.tasks: list[asyncio.Task[Any]] = []
        self.changes = 0
        self.complete_elsewhere = False
        self.stopped: list[Share] = []
        self.may_stop = asyncio.Event()
        self.may_stop.set()
        host = SimpleNamespace(
            id=ME, name="me", peers=self.peers, now=lambda: self.now, record=lambda *_: None, spawn=self.spawn
        )
        self.shares = Shares(
            host=host,
            rng=random.Random(0),
            changed=self.change,
            distance=lambda node: 1,
            stop_uploads=self.stop_uploads,
            complete_elsewhere=lambda _: self.complete_elsewhere,
        )

    def change(self) -> None:
        self.changes += 1

    async def stop_uploads(self, share: Share) -> None:
        await self.may_stop.wait()
        self.stopped.append(share)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    def fetch(self, *held: int) -> tuple[Share, FakeDownload]:
        download = FakeDownload()
        share = Share(MODEL, Source(), Bitfield(CHUNKS, list(held)), None, download=cast(DownloadDriver, download))
        self.shares.add(share)
        return share, download


def run(scenario: Callable[[Node], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await scenario(Node())

    asyncio.run(main())


def test_is_a_served_artifact_announced_to_peers_and_to_gossip() -> None:
    async def scenario(node: Node) -> None:
        node.shares.serve(MODEL, Source(), None)
        announced = Announcement(MODEL, DIGEST, "checkpoint", CONTENT.manifest.size, CHUNKS, CHUNKS, True)
        assert node.them.said == [messages.Announce((announced,), leaving=False)]
        assert node.shares.announcements() == (announced,)
        assert node.changes == 1
        holding = node.shares.shares[DIGEST].holding()
        assert (holding.digest, holding.chunks, holding.superseeds) == (DIGEST, CHUNKS, True)

    run(scenario)


@pytest.mark.parametrize(
    ("model_id", "fetching", "why"),
    [("", False, "model_id"), (OTHER, False, "is offered as 'org/model'"), (MODEL, True, "this node is fetching")],
    ids=["unsayable", "two names", "while it fetches"],
)
def test_is_what_cannot_be_served_an_error_of_the_user(model_id: str, fetching: bool, why: str) -> None:
    async def scenario(node: Node) -> None:
        if fetching:
            node.fetch()
        else:
            node.shares.serve(MODEL, Source(), None)
        with pytest.raises(SettingsError, match=why):
            node.shares.serve(ModelId(model_id), Source(), None)

    run(scenario)


def test_is_interest_shown_once_in_what_is_fetched_and_there() -> None:
    async def scenario(node: Node) -> None:
        elsewhere = FakePeer(NodeId("7" * 16))
        node.peers[elsewhere.node] = cast(Peer, elsewhere)
        _, download = node.fetch(1)
        node.shares.show_interest(node.peer)
        interest = messages.Interest(DIGEST, Bitfield(CHUNKS, [1]).pack(), b"")
        assert [message for message in node.them.said if isinstance(message, messages.Interest)] == [interest]
        assert not any(isinstance(message, messages.Interest) for message in elsewhere.said)
        assert download.met == ["peer-66"]

    run(scenario)


def test_does_a_part_say_what_it_wants_and_how_much_of_it_is_here() -> None:
    async def scenario(node: Node) -> None:
        share, _ = node.fetch(1, 2)
        share.wanted = Bitfield(CHUNKS, [2, 3, 4])
        part = part_id(share.wanted)
        assert share.announcement().wanted == share.holding().wanted == messages.HeldPart(part, 1, 3)
        assert not share.announcement().fetched
        node.them.said.clear()
        node.peer.own_interests.clear()
        node.shares.show_interest(node.peer)
        bits, wanted = (Bitfield(CHUNKS, chunks).pack() for chunks in ([1, 2], [2, 3, 4]))
        assert node.them.said == [messages.Interest(DIGEST, bits, wanted)]
        for chunk in (3, 4):
            share.held.add(chunk)
        assert share.announcement().fetched
        share.wanted = Bitfield.full(CHUNKS)
        assert share.announcement().wanted is None, "a part of all is no part"

    run(scenario)


def test_does_a_fetch_that_will_not_serve_ask_for_all_and_tell_only_seeds_what_arrives() -> None:
    async def scenario(node: Node) -> None:
        share, _ = node.fetch()
        share.wanted, share.sought = Bitfield(CHUNKS, [7]), Bitfield(CHUNKS, [1, 2, 7])
        newcomer = FakePeer(NodeId("7" * 16))
        newcomer.interests.add(DIGEST)
        node.peers[newcomer.node] = cast(Peer, newcomer)
        node.them.said.clear()
        node.peer.own_interests.clear()
        node.shares.show_interest(node.peer)
        bits, wanted = Bitfield(CHUNKS).pack(), Bitfield(CHUNKS, [1, 2, 7]).pack()
        assert node.them.said == [messages.Interest(DIGEST, bits, wanted)]
        part = share.announcement().wanted
        assert part is not None
        assert (part.chunks, part.chunks_total) == (0, 1), "what it will serve is what it announces"
        node.shares.send_have(DIGEST, [1, 2], to_seeds=True)
        assert node.them.said[1:] == [messages.Have(DIGEST, ((1, 2),))]
        assert newcomer.said == []

    run(scenario)


def test_does_a_share_carry_a_fetch_that_it_does_not_serve() -> None:
    async def scenario(node: Node) -> None:
        share = Share(MODEL, Source(), Bitfield(CHUNKS, [3]), None, wanted=Bitfield(CHUNKS, [3]))
        share.settled.set()
        undo = share.lend(Bitfield.full(CHUNKS))
        assert (share.users, share.settled.is_set(), list(share.held)) == (2, False, [3])
        undo()
        assert (share.users, share.sought) == (1, None)

    run(scenario)


def test_is_the_part_of_a_peer_passed_to_the_super_seeding() -> None:
    async def scenario(node: Node) -> None:
        node.shares.serve(MODEL, Source(), None)
        superseed = node.shares.shares[DIGEST].superseed
        assert superseed is not None
        bits, wanted = Bitfield(CHUNKS).pack(), Bitfield(CHUNKS, [6, 7]).pack()
        node.shares.on_interest(node.peer, messages.Interest(DIGEST, bits, wanted))
        assert superseed.choose(THEM, CHUNKS, starving=True, rank=0, seeds=1) == (6, 7)
        with pytest.raises(RemoteProtocolError):
            node.shares.on_interest(node.peer, messages.Interest(DIGEST, bits, bytes(9)))

    run(scenario)


def test_does_a_share_that_grows_serve_what_it_had_and_can_it_go_back() -> None:
    async def scenario(node: Node) -> None:
        old, new = Source(), BytesStore(CONTENT.manifest)
        share = Share(MODEL, old, Bitfield(CHUNKS, [0, 1]), None, wanted=Bitfield(CHUNKS, [0, 1]))
        share.settled.set()
        node.shares.add(share)
        held = Bitfield(CHUNKS, [1])
        undo = share.extend(new, held, None)
        assert (list(share.held), share.users, share.settled.is_set()) == ([0, 1], 2, False)
        first, second = (
            b"".join(bytes(s) for s in share.source.spans(CONTENT.manifest.chunks[n]) if isinstance(s, memoryview))
            for n in (0, 1)
        )
        assert (first, second) == (CONTENT.files[0], bytes(64)), (
            "the first from the old source, the second from the new"
        )
        undo()
        assert (share.source, list(share.held), share.users) == (old, [0, 1], 1)

    run(scenario)


def test_does_a_whole_source_take_the_place_of_a_part() -> None:
    async def scenario(node: Node) -> None:
        part = Source()
        share = Share(MODEL, part, Bitfield(CHUNKS, [0]), None, wanted=Bitfield(CHUNKS, [0]))
        share.settled.set()
        node.shares.add(share)
        node.shares.serve(MODEL, Source(), None)
        assert node.shares.shares[DIGEST] is share
        assert (share.held.complete, share.announcement().superseeds, share.users) == (True, True, 2)
        node.shares.release(DIGEST)
        node.shares.release(DIGEST)
        await asyncio.gather(*node.tasks)
        assert part.closed

    run(scenario)


def test_does_an_answer_to_interest_make_a_source() -> None:
    async def scenario(node: Node) -> None:
        _, download = node.fetch()
        holds = Bitfield(CHUNKS, [0, 3])
        node.shares.on_holdings(node.peer, messages.Holdings(DIGEST, holds.pack()))
        (joined,) = download.handled
        assert isinstance(joined, events.PeerJoined)
        assert (joined.peer, joined.superseeds, joined.distance, joined.usual_bytes_per_s) == (THEM, True, 1, 7.0)
        assert list(joined.holds) == [0, 3]
        node.shares.on_holdings(node.peer, messages.Holdings(Digest("cd" * 32), b""))
        assert len(download.handled) == 1

    run(scenario)


def test_is_interest_answered_and_followed_by_news() -> None:
    async def scenario(node: Node) -> None:
        node.them.artifacts.clear()
        share, _ = node.fetch(2)
        node.them.said.clear()
        node.shares.send_have(DIGEST, [2])
        assert node.them.said == [], "it has shown no interest"
        node.shares.on_interest(node.peer, messages.Interest(DIGEST, Bitfield(CHUNKS).pack(), b""))
        share.held.add(4)
        node.shares.send_have(DIGEST, [5, 4])
        assert node.them.said == [
            messages.Holdings(DIGEST, Bitfield(CHUNKS, [2]).pack()),
            messages.Have(DIGEST, ((4, 2),)),
        ]

    run(scenario)


def test_do_chunks_of_a_peer_reach_the_fetch_or_the_super_seeding() -> None:
    async def scenario(node: Node) -> None:
        _, download = node.fetch()
        node.shares.on_have(node.peer, messages.Have(DIGEST, ((1, 2),)))
        node.shares.on_have(node.peer, messages.Have(Digest("cd" * 32), ((1, 2),)))
        assert download.handled == [events.PeerHas(THEM, (1, 2))]
        seed = Node()
        seed.shares.serve(MODEL, Source(), None)
        superseed = seed.shares.shares[DIGEST].superseed
        assert superseed is not None
        seed.shares.on_interest(seed.peer, messages.Interest(DIGEST, Bitfield(CHUNKS).pack(), b""))
        seed.shares.on_have(seed.peer, messages.Have(DIGEST, ((0, CHUNKS - 1),)))
        assert superseed.choose(THEM, 2, starving=True, rank=0, seeds=1) == (CHUNKS - 1,)

    run(scenario)


@pytest.mark.parametrize(
    "tell",
    [
        lambda shares, peer: shares.on_have(peer, messages.Have(DIGEST, ((7, 2),))),
        lambda shares, peer: shares.on_holdings(peer, messages.Holdings(DIGEST, bytes(9))),
        lambda shares, peer: shares.on_interest(peer, messages.Interest(DIGEST, bytes(9), b"")),
    ],
    ids=["chunks beyond the end", "long holdings", "long interest"],
)
def test_is_nonsense_about_chunks_an_error_of_the_peer(tell: Callable[[Shares, Peer], None]) -> None:
    async def scenario(node: Node) -> None:
        share, download = node.fetch()
        share.superseed = cast(Any, SimpleNamespace(joined=lambda *_: None))
        with pytest.raises(RemoteProtocolError):
            tell(node.shares, node.peer)
        assert download.handled == []

    run(scenario)


def test_does_a_peer_that_serves_it_no_more_leave_the_fetch_and_may_come_back() -> None:
    async def scenario(node: Node) -> None:
        _, download = node.fetch()
        whole = tuple(node.them.artifacts.values())
        node.shares.on_announce(node.peer, messages.Announce((), leaving=False))
        assert download.handled == [events.PeerLeft(THEM, "does not serve it any more")]
        node.them.said.clear()
        node.shares.on_announce(node.peer, messages.Announce(whole, leaving=False))
        assert [type(message) for message in node.them.said] == [messages.Interest]
        node.shares.peer_left(node.peer, "closed the link")
        assert download.handled[1:] == [events.PeerLeft(THEM, "closed the link")]

    run(scenario)


def test_is_an_artifact_served_until_its_last_user_releases_it() -> None:
    async def scenario(node: Node) -> None:
        first, second = Source(), Source()
        node.shares.serve(MODEL, first, None)
        node.shares.serve(MODEL, second, None)
        node.shares.release(DIGEST)
        assert DIGEST in node.shares.shares
        node.may_stop.clear()
        node.shares.release(DIGEST)
        await asyncio.sleep(0)
        assert node.them.said[-1] == messages.Announce((), leaving=False)
        assert not first.closed, "an upload reads it"
        node.may_stop.set()
        await asyncio.gather(*node.tasks)
        assert first.closed
        assert second.closed
        assert node.shares.withdraw(DIGEST, "again") is None

    run(scenario)


def test_only_here_is_what_a_peer_lacks_and_no_other_node_has() -> None:
    async def scenario(node: Node) -> None:
        node.shares.serve(MODEL, Source(), None)
        share = node.shares.shares[DIGEST]
        assert node.shares.only_here(share) == set()
        node.shares.on_interest(node.peer, messages.Interest(DIGEST, Bitfield(CHUNKS, [0]).pack(), b""))
        assert node.shares.only_here(share) == set(range(1, CHUNKS))
        node.complete_elsewhere = True
        assert node.shares.only_here(share) == set()

    run(scenario)


def test_chunks_of_a_peer_that_leaves_are_not_counted_on() -> None:
    async def scenario(node: Node) -> None:
        node.shares.serve(MODEL, Source(), None)
        share = node.shares.shares[DIGEST]
        other = FakePeer(OTHER_NODE)
        node.peers[OTHER_NODE] = cast(Peer, other)
        node.shares.on_interest(node.peer, messages.Interest(DIGEST, Bitfield(CHUNKS, [0, 1]).pack(), b""))
        node.shares.on_interest(cast(Peer, other), messages.Interest(DIGEST, Bitfield(CHUNKS, [2]).pack(), b""))
        assert node.shares.only_here(share) == {3, 4, 5, 6, 7}
        node.shares.on_announce(node.peer, messages.Announce((announced(chunks=2),), leaving=True))
        assert node.them.leaving
        assert node.shares.only_here(share) == {0, 1, 3, 4, 5, 6, 7}

    run(scenario)


def test_a_node_that_leaves_tells_its_peers_and_those_that_come() -> None:
    async def scenario(node: Node) -> None:
        node.shares.serve(MODEL, Source(), None)
        node.shares.joined(node.peer)
        assert not any(isinstance(said, messages.Announce) and said.leaving for said in node.them.said)
        changes = node.changes
        node.shares.leave()
        assert node.changes == changes + 1, "gossip tells it too"
        assert node.them.said[-1] == messages.Announce(node.shares.announcements(), leaving=True)
        late = FakePeer(OTHER_NODE)
        node.shares.joined(cast(Peer, late))
        assert late.said == [node.them.said[-1]]

    run(scenario)


def test_a_newcomer_whose_fetch_failed_keeps_no_seed_from_leaving() -> None:
    async def scenario(node: Node) -> None:
        node.shares.serve(MODEL, Source(), None)
        share = node.shares.shares[DIGEST]
        node.shares.on_interest(node.peer, messages.Interest(DIGEST, Bitfield(CHUNKS, [0]).pack(), b""))
        assert node.shares.only_here(share)
        node.shares.on_announce(node.peer, messages.Announce((), leaving=False))
        assert node.shares.only_here(share) == set()
        assert not node.them.interests

    run(scenario)


def test_only_here_of_a_fetched_share_is_everything_while_a_peer_fetches() -> None:
    async def scenario(node: Node) -> None:
        share, _ = node.fetch(*range(CHUNKS))
        node.shares.on_interest(node.peer, messages.Interest(DIGEST, Bitfield(CHUNKS, [0]).pack(), b""))
        assert node.shares.only_here(share) == set(), "a fetch that runs is no seed"
        share.download = None
        share.settled.set()
        node.shares.on_announce(node.peer, messages.Announce((announced(chunks=1),), leaving=False))
        assert node.shares.feeds
        assert node.shares.only_here(share) == set(range(CHUNKS))
        node.shares.on_announce(node.peer, messages.Announce((announced(chunks=CHUNKS),), leaving=True))
        assert not node.shares.feeds
        assert node.shares.only_here(share) == set(), "it was a newcomer, and leaves complete"

    run(scenario)


def test_a_lost_share_is_withdrawn_recorded_and_told_until_it_is_served_again() -> None:
    async def scenario(node: Node) -> None:
        node.shares.serve(MODEL, lost := Source(), None)
        waiting = asyncio.create_task(node.shares.until_lost(DIGEST))
        await asyncio.sleep(0)
        node.shares.lose(DIGEST, StoreError("its file changed"))
        expected = Withdrawn(MODEL, DIGEST, "its file changed")
        assert await waiting == await node.shares.until_lost(DIGEST) == expected
        assert node.shares.lost == {DIGEST: expected}
        assert node.shares.announcements() == ()
        await asyncio.gather(*node.tasks)
        assert lost.closed
        node.shares.lose(DIGEST, StoreError("again"))  # nothing is served
        assert node.shares.lost == {DIGEST: expected}
        node.shares.serve(MODEL, Source(), None)
        assert not node.shares.lost
        node.shares.lose(DIGEST, StoreError("its file changed"))
        node.shares.release(DIGEST)
        assert not node.shares.lost

    run(scenario)


class Watched(Source):
    """Files that change when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = asyncio.Event()
        self.error: StoreError | None = None
        self._loop = asyncio.get_running_loop()

    def demand_unchanged(self, is_right: IsRight) -> None:
        self._loop.call_soon_threadsafe(self.looked.set)
        if self.error:
            raise self.error
        assert all(map(is_right, self.manifest.chunks))


@pytest.mark.parametrize(
    "error", [SourceChanged("model.bin", "it is gone"), StoreError("model.bin: Input/output error")]
)
def test_files_are_looked_at_while_no_peer_requests_them(monkeypatch: pytest.MonkeyPatch, error: StoreError) -> None:
    monkeypatch.setattr("swarm.transfer.file_watch.WATCH_EVERY_S", 0.001)

    async def scenario(node: Node) -> None:
        node.shares.serve(MODEL, watched := Watched(), None)
        node.shares.serve(OTHER, BytesStore(OTHER_CONTENT.manifest, OTHER_CONTENT.files), None)
        watch = asyncio.create_task(watch_files(node.shares))
        async with asyncio.timeout(10):
            await watched.looked.wait()
            assert not node.shares.lost
            watched.error = error
            assert (await node.shares.until_lost(DIGEST)).why == str(error)
        watch.cancel()
        assert [a.model_id for a in node.shares.announcements()] == [OTHER]

    run(scenario)


def test_does_closing_not_leave_a_withdrawn_source_open() -> None:
    async def scenario(node: Node) -> None:
        node.may_stop.clear()
        node.shares.serve(MODEL, withdrawn := Source(), None)
        node.shares.withdraw(DIGEST, "its file changed")
        node.shares.serve(MODEL, served := Source(), None)
        node.shares.close()
        assert withdrawn.closed
        assert served.closed
        for task in node.tasks:
            task.cancel()

    run(scenario)


def test_does_withdrawing_end_the_fetch_and_waiting_for_it() -> None:
    async def scenario(node: Node) -> None:
        share, download = node.fetch()
        waiting = asyncio.create_task(node.shares.settled(DIGEST))
        await asyncio.sleep(0)
        assert not waiting.done()
        node.shares.withdraw(DIGEST, "the fetch failed")
        assert download.failed == ["org/model was withdrawn: the fetch failed"]
        share.settled.set()
        assert await waiting is None

    run(scenario)


def test_is_progress_announced_about_once_a_second() -> None:
    async def scenario(node: Node) -> None:
        _, download = node.fetch()
        node.them.said.clear()
        for step in range(1, 13):
            node.now = step * 0.25
            node.shares.tick()
        assert download.ticks == 12
        assert [type(message) for message in node.them.said] == [messages.Announce] * 2

    run(scenario)


def test_is_the_rank_that_among_linked_seeds() -> None:
    async def scenario(node: Node) -> None:
        assert node.shares.rank(DIGEST) == (0, 2)
        seed = Announcement(MODEL, DIGEST, "checkpoint", 512, CHUNKS, CHUNKS, True)
        for number, superseeds in ((1, True), (2, False)):
            peer = FakePeer(NodeId(f"{number:016x}"), msgspec.structs.replace(seed, superseeds=superseeds))
            node.peers[peer.node] = cast(Peer, peer)
        assert node.shares.rank(DIGEST) == (1, 3)
        assert repr(node.shares) == "<Shares 0 artifacts, 0 arriving>"

    run(scenario)


def test_is_interest_in_unknown_artifacts_forgotten_and_that_in_withdrawn_ones() -> None:
    """Each digest that a peer names would be one more to remember, for as long as its link lasts."""

    async def scenario(node: Node) -> None:
        share, _ = node.fetch(2)
        for number in range(1000):
            node.shares.on_interest(node.peer, messages.Interest(Digest(f"{number:064x}"), b"", b""))
        assert node.them.interests == set()
        node.shares.on_interest(node.peer, messages.Interest(DIGEST, Bitfield(CHUNKS).pack(), b""))
        assert node.them.interests == {DIGEST}
        share.download = None
        node.shares.withdraw(DIGEST, "not served any more")
        assert node.them.interests == set()

    run(scenario)
