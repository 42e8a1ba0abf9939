"""The download machine, by lists of events: which actions does each one cause?"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.content import Content

from swarm.content.bitfield import Bitfield
from swarm.content.promise import ListedFile, Listing, promise
from swarm.errors import LocalProtocolError
from swarm.journal import Paused
from swarm.protocol.messages import NodeId
from swarm.transfer import download, download_events, scheduler
from swarm.transfer.download import Download
from swarm.transfer.download_events import (
    Announce,
    Ask,
    Ban,
    Cancel,
    ChunkCorrupt,
    ChunksVerified,
    Complete,
    Connect,
    GiveUp,
    Granted,
    OriginReadEnded,
    PeerHas,
    PeerJoined,
    PeerLeft,
    Refused,
    SessionGrew,
    Tick,
    TransferBroke,
    TransferEnded,
    TransferFailed,
)

IDLE_S, STALL_S = 20.0, 30.0
A, B, SEED, LIAR, HONEST = (NodeId(name) for name in ("a", "b", "seed", "liar", "honest"))


class Fetch:
    """A download of `chunks` chunks of which `held` are here; every step is checked."""

    def __init__(
        self,
        chunks: int,
        *,
        held: Sequence[int] = (),
        seed: int = 0,
        abandon_s: float = math.inf,
        wanted: Sequence[int] | None = None,
    ) -> None:
        self.machine = Download(
            Content.random(0, chunks=chunks, chunk_bytes=64).manifest,
            Bitfield(chunks, held),
            node=NodeId("here"),
            now=0.0,
            idle_timeout_s=IDLE_S,
            stall_timeout_s=STALL_S,
            transfer_ids=itertools.count(),
            rng=random.Random(seed),
            abandon_s=abandon_s,
            wanted=None if wanted is None else Bitfield(chunks, wanted),
        )
        self.now = 0.0

    def tell(self, event: download_events.Event, *, at: float | None = None) -> list[download_events.Action]:
        self.now = self.now if at is None else at
        actions = self.machine.handle(event, self.now)
        self.machine.check()
        return actions

    def joined(self, peer: str, *, superseeds: bool = False) -> list[Ask]:
        return asks(self.tell(PeerJoined(NodeId(peer), Bitfield.full(self.machine.held.length), superseeds)))

    def later(self, seconds: float) -> list[Ask]:
        return asks(self.tell(Tick(), at=self.now + seconds))


def asks(actions: Sequence[download_events.Action]) -> list[Ask]:
    return [action for action in actions if isinstance(action, Ask)]


def test_the_copy_that_loses_the_endgame_is_cancelled() -> None:
    fetch = Fetch(2, held=[0])
    (slow,) = fetch.joined("a")
    (fast,) = fetch.joined("b")
    assert (slow.chunks, fast.chunks, fast.why) == ((1,), (1,), "endgame")
    actions = fetch.tell(ChunksVerified(B, fast.transfer, (1,)))
    assert actions[:2] == [Announce((1,)), Cancel(A, slow.transfer, "arrived from another peer")]
    assert actions[-1] == Complete()


def test_chunks_that_are_verified_together_are_announced_together() -> None:
    fetch = Fetch(4)
    fetch.tell(PeerJoined(A, Bitfield.full(4), usual_bytes_per_s=1e9))
    assert fetch.tell(ChunksVerified(A, 0, (1,)))[0] == Announce((1,))
    assert fetch.tell(ChunksVerified(A, 0, (0, 1, 2)), at=1.0)[0] == Announce((0, 2), scheduler.ANNOUNCE_MIN_S / 2)
    assert fetch.machine.sources == {"a": sum(fetch.machine.manifest.chunks[chunk].size for chunk in range(3))}


def test_a_copy_that_others_have_brought_bit_by_bit_is_cancelled() -> None:
    fetch = Fetch(3, held=[0])
    fetch.tell(PeerJoined(A, Bitfield.full(3), usual_bytes_per_s=1e9))
    slow = next(number for number, transfer in fetch.machine._transfers.items() if transfer.chunks == {1, 2})
    assert Cancel(A, slow, "arrived from another peer") not in fetch.tell(ChunksVerified(B, 7, (1,)))
    assert Cancel(A, slow, "arrived from another peer") in fetch.tell(ChunksVerified(NodeId("c"), 8, (2,)))


def test_a_third_copy_is_never_asked_for() -> None:
    fetch = Fetch(2, held=[0])
    assert [len(fetch.joined(peer)) for peer in "abcd"] == [1, 1, 0, 0]


def test_a_chunk_that_arrives_twice_counts_once() -> None:
    fetch = Fetch(4, held=[0])
    fetch.joined("a")
    ask = fetch.joined("b")[0]
    fetch.tell(ChunksVerified(B, ask.transfer, (ask.chunks[0],)))
    assert fetch.tell(ChunksVerified(A, 0, (ask.chunks[0],))) == []
    assert sum(fetch.machine.sources.values()) == fetch.machine.manifest.chunks[ask.chunks[0]].size


def test_what_is_asked_says_how_much_came_since_the_download_began() -> None:
    fetch = Fetch(64)
    (first,) = fetch.joined("a")[:1]
    assert first.pace_bytes_per_s == 0
    fetch.tell(ChunksVerified(A, first.transfer, (first.chunks[0],)), at=2.0)
    size = fetch.machine.manifest.chunks[first.chunks[0]].size
    assert fetch.joined("b")[0].pace_bytes_per_s == round(size / 2.0)


def test_the_third_corrupt_chunk_bans() -> None:
    fetch = Fetch(8)
    fetch.joined("liar")
    for number in range(download.CORRUPT_CHUNKS_MAX):
        fetch.now += 10.0
        fetch.tell(Tick())
        transfer = min(fetch.machine._transfers)
        chunk = min(fetch.machine._transfers[transfer].chunks)
        last = fetch.tell(ChunkCorrupt(LIAR, transfer, chunk))
        assert any(isinstance(action, Ban) for action in last) == (number == download.CORRUPT_CHUNKS_MAX - 1)
        fetch.tell(TransferEnded(LIAR, transfer))
    assert last[-1] == Ban(LIAR, "sent 3 wrong chunks")
    assert all(isinstance(action, Cancel) for action in last[:-1])
    assert fetch.machine.rejected_chunks == 3
    assert fetch.joined("liar") == [], "who is banned stays banned"


def test_a_refused_chunk_is_asked_elsewhere_and_the_peer_rests() -> None:
    fetch = Fetch(2, held=[0])
    (ask,) = fetch.joined("a")
    assert fetch.tell(Refused(A, ask.transfer, "busy", 2.0)) == [TransferFailed(A, ask.transfer, "refused: busy")]
    (elsewhere,) = fetch.joined("b")
    assert (elsewhere.peer, elsewhere.chunks) == ("b", (1,))
    fetch.tell(PeerLeft(B, "gone"))
    assert fetch.tell(Tick(), at=1.9) == []
    (again,) = asks(fetch.tell(Tick(), at=2.1))
    assert again.peer == "a"


def test_each_failure_in_a_row_doubles_the_rest_and_a_chunk_ends_it() -> None:
    fetch = Fetch(64)
    rests, number = [], fetch.joined("a")[0].transfer
    for _ in range(7):
        for transfer in list(fetch.machine._transfers):
            if transfer != number:
                fetch.machine._end(transfer)
        fetch.tell(TransferBroke(A, number, "broke"))
        began = fetch.now
        while not (found := asks(fetch.tell(Tick(), at=fetch.now + 0.0625))):
            pass
        number = found[0].transfer
        rests.append(fetch.now - began)
    assert rests == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    fetch.tell(ChunksVerified(A, number, (found[0].chunks[0],)))
    assert fetch.machine._peers[A].failures == 0


def test_who_leaves_gives_its_chunks_back() -> None:
    fetch = Fetch(4)
    of_a = {chunk for ask in fetch.joined("a") for chunk in ask.chunks}
    assert of_a
    fetch.tell(PeerLeft(A, "closed the link"))
    of_b: set[int] = set()
    found = fetch.joined("b")
    while found:
        of_b |= {chunk for ask in found for chunk in ask.chunks}
        for ask in found:
            for chunk in ask.chunks:
                fetch.tell(ChunksVerified(B, ask.transfer, (chunk,)))
        found = [new for ask in found for new in asks(fetch.tell(TransferEnded(B, ask.transfer)))]
    assert of_b >= of_a


def test_what_is_not_granted_is_cancelled_in_time_and_what_is_granted_is_not() -> None:
    fetch = Fetch(3, held=[0])
    transfers = [ask.transfer for ask in fetch.joined("a")]
    while len(transfers) < 2:
        transfers += [ask.transfer for ask in asks(fetch.tell(Tick()))]
    fetch.tell(Granted(A, transfers[0], tuple(fetch.machine._transfers[transfers[0]].chunks)))
    assert fetch.tell(Tick(), at=download.GRANT_PATIENCE_S) == []
    actions = fetch.tell(Tick(), at=download.GRANT_PATIENCE_S + 0.1)
    why = "did not grant within 10 s"
    assert actions == [Cancel(A, transfers[1], why), TransferFailed(A, transfers[1], why)]


def test_what_is_granted_is_cancelled_when_its_peer_sends_nothing() -> None:
    fetch = Fetch(3, held=[0])
    first, second = fetch.joined("a") + fetch.later(0.0)
    fetch.tell(Granted(A, first.transfer, first.chunks), at=1.0)
    fetch.tell(Granted(A, second.transfer, second.chunks), at=2.0)
    assert fetch.tell(Tick({A: 7}), at=5.0) == []
    assert fetch.tell(Tick({A: 7}), at=5.0 + IDLE_S) == [], "a byte of one transfer counts for both"
    why = f"sent nothing for {IDLE_S:g} s"
    numbers = first.transfer, second.transfer
    expected = [kind(A, number, why) for number in numbers for kind in (Cancel, TransferFailed)]
    assert fetch.tell(Tick({A: 7}), at=5.1 + IDLE_S) == expected
    assert fetch.machine._peers[A].failures == 2


def test_after_a_pause_every_deadline_of_a_fetch_starts_again() -> None:
    fetch = Fetch(4, held=[0], abandon_s=STALL_S)
    granted, asked = fetch.joined("a") + fetch.later(0.0)
    fetch.tell(Granted(A, granted.transfer, granted.chunks))
    fetch.tell(PeerJoined(B, Bitfield(4)))
    late = 0.9 * min(IDLE_S, STALL_S, download.GRANT_PATIENCE_S)
    assert fetch.tell(Tick(), at=late) == []
    assert fetch.tell(Paused(3600.0)) == []
    assert fetch.tell(Tick(), at=late + 0.9 * download.GRANT_PATIENCE_S) == []
    cancelled = fetch.tell(Tick(), at=late + download.GRANT_PATIENCE_S + 0.1)
    assert [action.transfer for action in cancelled if isinstance(action, Cancel)] == [asked.transfer]
    cancelled = fetch.tell(Tick(), at=late + IDLE_S + 0.1)
    assert granted.transfer in [action.transfer for action in cancelled if isinstance(action, Cancel)]
    assert not any(isinstance(action, GiveUp) for action in fetch.tell(Tick(), at=late + STALL_S))
    assert any(isinstance(action, GiveUp) for action in fetch.tell(Tick(), at=late + STALL_S + 0.1))


def test_after_a_pause_a_resting_peer_is_asked_at_once() -> None:
    fetch = Fetch(3)
    ask = fetch.joined("a")[0]
    fetch.tell(Refused(A, ask.transfer, "busy", 3600.0))
    assert [action.peer for action in asks(fetch.tell(Paused(10.0)))] == [A]


def test_who_sends_slowly_is_not_cancelled() -> None:
    fetch = Fetch(3, held=[0])
    ask = fetch.joined("a")[0]
    fetch.tell(Granted(A, ask.transfer, ask.chunks))
    for size in range(1, 5):
        actions = fetch.tell(Tick({A: size}), at=0.3 * IDLE_S * size)
        assert not any(isinstance(action, Cancel) and action.transfer == ask.transfer for action in actions)


def test_a_peer_is_connected_to_once_before_the_first_request() -> None:
    fetch = Fetch(4)
    joined = PeerJoined(A, Bitfield.full(4))
    connect, ask, *_ = fetch.tell(joined)
    assert connect == Connect(A)
    assert isinstance(ask, Ask)
    assert Connect(A) not in fetch.tell(joined)
    fetch.tell(PeerLeft(A, "gone"))
    assert Connect(A) in fetch.tell(joined)


def test_the_first_chunk_is_announced_at_once_and_what_follows_when_it_is_due() -> None:
    fetch = Fetch(8)
    fetch.joined("a")
    assert fetch.tell(ChunksVerified(A, 0, (1,)), at=1.0)[0] == Announce((1,))
    assert fetch.machine.due_at == math.inf
    for chunk in (2, 3):
        actions = fetch.tell(ChunksVerified(A, 0, (chunk,)), at=1.0)
        assert not any(isinstance(action, Announce) for action in actions)
    due_at = fetch.machine.due_at
    assert due_at == 1.0 + scheduler.ANNOUNCE_MIN_S
    assert not any(isinstance(action, Announce) for action in fetch.tell(Tick(), at=due_at - 0.001))
    assert fetch.tell(Tick(), at=due_at)[0] == Announce((2, 3), scheduler.ANNOUNCE_MIN_S / 2)
    assert fetch.machine.due_at == math.inf


def test_do_peers_hear_of_the_chunks_of_a_range_before_its_end() -> None:
    fetch = Fetch(4)
    assert fetch.tell(ChunksVerified(A, 0, (1,)), at=1.0)[0] == Announce((1,))
    assert not any(isinstance(a, Announce) for a in fetch.tell(ChunksVerified(A, 0, (2,))))
    assert fetch.tell(OriginReadEnded()) == [Announce((2,))]
    assert fetch.tell(OriginReadEnded()) == []


def test_is_a_chunk_of_a_promise_that_is_read_again_told_to_peers_again() -> None:
    """Its digests may be others now: a peer that still expects the first ones would count the bytes as wrong."""
    content = "sha256:" + "a" * 64
    manifest = promise(Listing("o", "", (ListedFile("f", 3 << 18, content),)))
    machine = Download(
        manifest, Bitfield(3), node=B, now=0.0, idle_timeout_s=IDLE_S, stall_timeout_s=STALL_S,
        transfer_ids=itertools.count(), rng=random.Random(0),
    )  # fmt: skip
    assert machine.handle(ChunksVerified(A, 0, (0,)), 1.0) == [Announce((0,))]
    assert machine.handle(ChunksVerified(A, 1, (0,)), 1.2) == [Announce((0,))]
    assert machine.sources == {A: 1 << 18}, "it counts once"


@pytest.mark.parametrize("how", ["complete", "stalled", "stopped"])
def test_the_last_chunks_are_announced_however_a_download_ends(how: str) -> None:
    fetch = Fetch(8)
    fetch.joined("a")
    fetch.tell(ChunksVerified(A, 0, (0,)))
    fetch.tell(ChunksVerified(A, 0, (1,)))
    if how == "complete":
        last = tuple(range(2, 8))
        assert fetch.tell(ChunksVerified(A, 0, last))[0] == Announce((1, *last))
    else:
        actions = fetch.tell(Tick(), at=STALL_S + 1.0) if how == "stalled" else fetch.machine.stop()
        assert actions[0] == Announce((1,))
    assert fetch.machine.done
    assert fetch.machine.due_at == math.inf
    assert fetch.machine.stop() == []


def test_the_transfers_of_a_peer_that_leaves_have_failed() -> None:
    fetch = Fetch(4)
    ask = fetch.joined("a")[0]
    assert fetch.tell(PeerLeft(A, "gone"))[0] == TransferFailed(A, ask.transfer, "gone")
    assert fetch.tell(TransferBroke(A, ask.transfer, "the session broke")) == []


def test_a_stalled_download_gives_up_once_and_says_what_it_tried() -> None:
    fetch = Fetch(4, held=[0])
    ask = fetch.joined("a")[0]
    fetch.tell(PeerJoined(B, Bitfield(4)))
    fetch.tell(Refused(A, ask.transfer, "busy", 3600.0))
    fetch.tell(PeerLeft(A, "closed the link"))
    assert not any(isinstance(action, GiveUp) for action in fetch.tell(Tick(), at=STALL_S))
    (giving_up,) = fetch.tell(Tick(), at=STALL_S + 1.0)
    assert giving_up == GiveUp(3, STALL_S + 1.0, ("a: closed the link", "b: holds nothing that is missing"))
    assert fetch.machine.done
    assert fetch.tell(Tick(), at=STALL_S + 2.0) == []
    assert fetch.joined("c") == []


def test_a_transfer_that_fails_after_its_peer_left_does_not_hide_why_it_left() -> None:
    fetch = Fetch(2)
    ask = fetch.joined("a")[0]
    fetch.tell(PeerLeft(A, "left: shutting down"))
    fetch.tell(TransferBroke(A, ask.transfer, "the session broke"))
    *_, giving_up = fetch.tell(Tick(), at=STALL_S + 1.0)
    assert isinstance(giving_up, GiveUp)
    assert giving_up.tried == ("a: left: shutting down",)


def test_every_chunk_puts_the_stall_off() -> None:
    fetch = Fetch(4)
    (ask, *_) = fetch.joined("a")
    fetch.tell(ChunksVerified(A, ask.transfer, (ask.chunks[0],)), at=STALL_S - 1.0)
    assert not any(isinstance(action, GiveUp) for action in fetch.tell(Tick(), at=2 * STALL_S - 2.0))
    assert isinstance(fetch.tell(Tick(), at=2 * STALL_S)[-1], GiveUp)


def test_a_download_with_an_alternative_gives_up_soon_after_its_last_holder_left() -> None:
    fetch = Fetch(4, abandon_s=1.0)
    fetch.joined("a")
    fetch.tell(PeerJoined(B, Bitfield(4)))  # holds nothing
    assert not any(isinstance(action, GiveUp) for action in fetch.tell(Tick(), at=10.0))
    fetch.tell(PeerLeft(A, "closed the link"), at=10.1)
    assert not any(isinstance(action, GiveUp) for action in fetch.tell(Tick(), at=10.9))
    fetch.tell(PeerHas(B, (3,)))
    fetch.later(2.0)
    assert not fetch.machine.done, "a holder is back"
    fetch.tell(PeerLeft(B, "closed the link"))
    giving_up = fetch.tell(Tick(), at=fetch.now + 1.1)[-1]
    assert giving_up == GiveUp(4, fetch.now, ("a: closed the link", "b: closed the link"))


def test_a_download_without_an_alternative_waits_for_a_holder() -> None:
    fetch = Fetch(4)
    fetch.joined("a")
    fetch.tell(PeerLeft(A, "closed the link"), at=1.0)
    fetch.later(STALL_S - 2.0)
    assert not fetch.machine.done


def test_complete_comes_once_and_then_nothing() -> None:
    fetch = Fetch(2, held=[0, 1])
    assert fetch.tell(Tick()) == [Complete()]
    for event in (Tick(), PeerHas(A, (1,)), PeerLeft(A, "x"), TransferEnded(A, 0)):
        assert fetch.tell(event, at=1000.0) == []
    assert fetch.joined("b") == []


def test_have_makes_a_peer_worth_asking() -> None:
    fetch = Fetch(4)
    assert fetch.tell(PeerJoined(A, Bitfield(4))) == [Connect(A)]
    (ask,) = asks(fetch.tell(PeerHas(A, (2,))))
    assert (ask.peer, ask.chunks) == ("a", (2,))


def test_a_seed_that_chooses_is_asked_for_some_and_again_when_they_are_here() -> None:
    fetch = Fetch(3)
    ask = fetch.joined("seed", superseeds=True)[0]
    assert (ask.chunks, ask.count, ask.starving) == ((), 1, True)
    assert fetch.machine._requested.sum() == 0, "nobody knows yet which one comes"
    assert len(fetch.later(0.0)) == 1, "one more, so that the wire never waits"
    assert fetch.tell(Granted(SEED, ask.transfer, (2,))) == []
    assert list(fetch.machine._requested) == [0, 0, 1]
    actions = fetch.tell(ChunksVerified(SEED, ask.transfer, (2,))) + fetch.tell(TransferEnded(SEED, ask.transfer))
    assert actions[0] == Announce((2,))
    assert [(again.chunks, again.count) for again in asks(actions)] == [((), 1)]
    assert fetch.machine.sources == {"seed": fetch.machine.manifest.chunks[2].size}


def test_a_seed_that_declines_rests_for_as_long_as_it_says_and_has_not_failed() -> None:
    fetch = Fetch(3)
    ask = fetch.joined("seed", superseeds=True)[0]
    assert fetch.tell(Refused(SEED, ask.transfer, "nothing_to_give", 0.1)) == []
    assert fetch.later(0.09) == []
    assert [again.peer for again in fetch.later(0.02)] == ["seed"]
    assert fetch.machine._peers[SEED].failures == 0


def test_what_a_failed_gift_was_to_bring_is_asked_elsewhere() -> None:
    fetch = Fetch(2, held=[0])
    ask = fetch.joined("seed", superseeds=True)[0]
    fetch.tell(Granted(SEED, ask.transfer, (1,)))
    assert [new.why for new in fetch.joined("b")] == ["endgame"], "it is on its way"
    fetch.tell(PeerLeft(B, "gone"))
    fetch.tell(TransferBroke(SEED, ask.transfer, "broke"))
    assert [(new.chunks, new.why) for new in fetch.joined("c")] == [((1,), "rarest")]


def test_a_gift_that_fails_before_it_is_known_leaves_nothing_behind() -> None:
    fetch = Fetch(2)
    ask = fetch.joined("seed", superseeds=True)[0]
    fetch.tell(TransferBroke(SEED, ask.transfer, "broke"))
    assert fetch.machine._requested.sum() == 0
    assert ask.transfer not in fetch.machine._transfers


def test_a_chunk_that_is_asked_of_a_peer_may_also_be_given_and_the_slower_copy_is_cancelled() -> None:
    fetch = Fetch(3, held=[0])
    gift = fetch.joined("seed", superseeds=True)[0]
    asked = next(ask for ask in fetch.joined("a") if ask.peer == "a")
    fetch.tell(Granted(SEED, gift.transfer, asked.chunks))
    assert fetch.machine._requested[asked.chunks[0]] == 2
    actions = fetch.tell(ChunksVerified(SEED, gift.transfer, (asked.chunks[0],)))
    assert Cancel(A, asked.transfer, "arrived from another peer") in actions
    assert fetch.machine._requested[asked.chunks[0]] == 0


def test_a_gift_of_what_is_here_already_does_no_harm() -> None:
    fetch = Fetch(3, held=[0])
    ask = fetch.joined("seed", superseeds=True)[0]
    fetch.tell(Granted(SEED, ask.transfer, (0,)))
    assert fetch.tell(ChunksVerified(SEED, ask.transfer, (0,))) == []
    fetch.tell(TransferEnded(SEED, ask.transfer))
    assert fetch.machine._requested.sum() == 0


def test_a_grant_of_a_transfer_that_is_not_awaited_changes_nothing() -> None:
    fetch = Fetch(3)
    fetch.joined("seed", superseeds=True)
    fetch.later(0.0)
    before = repr(fetch.machine)
    assert fetch.tell(Granted(SEED, 999, (0, 1))) == []
    assert fetch.machine._requested.sum() == 0
    assert repr(fetch.machine) == before


def test_a_gift_that_is_never_granted_is_cancelled_in_time() -> None:
    fetch = Fetch(3)
    transfers = [ask.transfer for ask in fetch.joined("seed", superseeds=True) + fetch.later(0.0)]
    actions = fetch.tell(Tick(), at=download.GRANT_PATIENCE_S + 0.1)
    why = "did not grant within 10 s"
    assert actions == [kind(SEED, number, why) for number in transfers for kind in (Cancel, TransferFailed)]


def test_among_many_peers_a_newcomer_ties_one_batch_to_each_and_two_to_a_seed() -> None:
    fetch = Fetch(64)
    names = "abcdefgh"
    for name in names:
        fetch.tell(PeerJoined(NodeId(name), Bitfield(64)))
    fetch.tell(PeerJoined(SEED, Bitfield.full(64), True))
    for name in names:
        fetch.tell(PeerHas(NodeId(name), tuple(range(64))))
    for _ in range(3):
        fetch.later(0.0)
    outstanding = {name: len(peer.transfers) for name, peer in fetch.machine._peers.items()}
    assert outstanding == {**dict.fromkeys(names, 1), "seed": 2}


def test_a_download_refuses_what_is_no_event() -> None:
    with pytest.raises(LocalProtocolError, match="cannot handle"):
        Fetch(1).machine.handle("hello", 0.0)  # type: ignore[arg-type]


def test_a_download_reads_at_night() -> None:
    fetch = Fetch(8, held=[0, 1, 2])
    ask = fetch.joined("a")[0]
    fetch.tell(Granted(A, ask.transfer, ask.chunks), at=1.0)
    fetch.machine._transfers[ask.transfer].size = 3_000_000
    fetch.tell(TransferEnded(A, ask.transfer), at=2.0)
    digest = fetch.machine.manifest.digest[:8]
    in_flight = len(fetch.machine._transfers)
    assert repr(fetch.machine) == f"<Download {digest} 3/8 chunks | 1 peers | {in_flight} in flight | 3.0 MB/s>"
    assert in_flight > 0


def test_check_sees_a_count_that_is_off() -> None:
    fetch = Fetch(4)
    fetch.joined("a")
    fetch.machine._requested[:] = 0
    with pytest.raises(LocalProtocolError, match="requested counts add up"):
        fetch.machine.check()


@given(seed=st.integers(0, 2**32), steps=st.lists(st.integers(0, 8), max_size=60))
@settings(max_examples=60)
def test_whatever_happens_an_honest_peer_completes_it(seed: int, steps: list[int]) -> None:
    fetch, dice = Fetch(9, seed=seed), random.Random(seed)
    completed = 0
    for step in steps:
        peer = NodeId(dice.choice("abc"))
        transfer = dice.choice([*fetch.machine._transfers] or [0])
        if known := fetch.machine._transfers.get(transfer):
            peer = known.peer
        chunk, *more = (
            dice.sample(sorted(known.chunks), dice.randint(1, len(known.chunks))) if known and known.chunks else [0]
        )
        fits = known and (tuple(known.chunks) or tuple(dice.sample(range(9), 2)))
        events: list[download_events.Event] = [
            PeerJoined(peer, Bitfield(9, dice.sample(range(9), 5)), peer == "c"),
            Granted(peer, transfer, fits) if fits else Tick(),
            PeerHas(peer, (dice.randrange(9),)),
            PeerLeft(peer, "left"),
            ChunksVerified(peer, transfer, (chunk, *more)) if known and known.chunks else Tick(),
            ChunkCorrupt(peer, transfer, chunk) if known and known.chunks else Tick(),
            TransferEnded(peer, transfer),
            TransferBroke(peer, transfer, "failed"),
            Refused(peer, transfer, "nothing_to_give", 0.1),
        ]
        actions = fetch.tell(events[step], at=fetch.now + 0.1)
        completed += actions.count(Complete())
    todo = fetch.joined("honest")
    for _ in range(200):
        if fetch.machine.done:
            break
        actions = fetch.tell(Tick(), at=fetch.now + 0.1)
        for ask in [*todo, *asks(actions)]:
            if ask.peer == "honest":
                for chunk in ask.chunks:
                    actions += fetch.tell(ChunksVerified(HONEST, ask.transfer, (chunk,)))
                actions += fetch.tell(TransferEnded(HONEST, ask.transfer))
        todo = asks(actions)
        completed += actions.count(Complete())
    assert completed == 1
    assert fetch.machine.held.complete


def test_a_session_of_several_streams_is_asked_for_a_batch_and_one_ahead_for_each() -> None:
    fetch = Fetch(64)
    (first,) = fetch.joined("a")
    assert first.streams == 1
    actions = [*asks(fetch.tell(SessionGrew(A, 4))), *fetch.later(0.0)]
    asked = [first, *actions]
    assert len(asked) == 4 * scheduler.BATCHES_OUTSTANDING
    assert {ask.streams for ask in actions} == {4}
    chunks = [chunk for ask in asked for chunk in ask.chunks]
    assert len(set(chunks)) == len(chunks)


def test_the_rate_of_transfers_side_by_side_is_that_of_all_of_them() -> None:
    fetch = Fetch(4096)
    (first,) = fetch.joined("a")
    for ask in [first, *asks(fetch.tell(SessionGrew(A, 4)))]:
        fetch.tell(Granted(A, ask.transfer, ask.chunks))
    total = 0
    for step in range(1, 40):  # four transfers end at almost the same time, every 10 ms
        ending = sorted(fetch.machine._transfers)[:4]
        for place, number in enumerate(ending):
            transfer = fetch.machine._transfers[number]
            total += transfer.size
            chunks = tuple(sorted(transfer.chunks))
            fetch.tell(ChunksVerified(A, number, chunks), at=step * 0.01 + place * 1e-6)
            for ask in asks(fetch.tell(TransferEnded(A, number))):
                fetch.tell(Granted(A, ask.transfer, ask.chunks))
    assert 0.3 < fetch.machine._peers[A].rate_bytes_per_s / (total / fetch.now) < 3


def test_a_timer_that_fires_early_by_rounding_is_not_set_again() -> None:
    fetch = Fetch(64)
    (first,) = fetch.joined("a")
    fetch.tell(Granted(A, first.transfer, first.chunks))
    announced = fetch.tell(ChunksVerified(A, first.transfer, first.chunks))
    assert Announce(first.chunks) in announced
    (second, *_) = asks(fetch.tell(TransferEnded(A, first.transfer)))
    fetch.tell(Granted(A, second.transfer, second.chunks))
    assert not [a for a in fetch.tell(ChunksVerified(A, second.transfer, second.chunks)) if isinstance(a, Announce)]
    assert math.isfinite(fetch.machine.due_at)
    early = math.nextafter(fetch.machine.due_at, 0.0)
    assert second.chunks in [a.chunks for a in fetch.tell(Tick(), at=early) if isinstance(a, Announce)]
    assert fetch.machine.due_at == math.inf


# A part of the chunks


def test_a_part_is_complete_with_its_chunks_and_no_other_is_asked_for() -> None:
    fetch = Fetch(6, held=[1], wanted=[1, 2, 4])
    (ask, *more) = fetch.joined("a")
    asked = [chunk for request in (ask, *more) for chunk in request.chunks]
    for request in (ask, *more):
        actions = fetch.tell(ChunksVerified(A, request.transfer, request.chunks))
        fetch.tell(TransferEnded(A, request.transfer))
        for again in asks(actions):
            asked += again.chunks
            actions = fetch.tell(ChunksVerified(A, again.transfer, again.chunks))
    assert sorted(asked) == [2, 4]
    assert actions[-1] == Complete()
    assert list(fetch.machine.held) == [1, 2, 4]


def test_a_part_that_is_here_is_complete_at_once() -> None:
    assert Fetch(6, held=[0, 3, 5], wanted=[3, 5]).tell(Tick()) == [Complete()]


def test_a_seed_is_asked_for_no_more_than_the_part() -> None:
    (ask, *_) = Fetch(64, wanted=[7, 8]).joined("seed", superseeds=True)
    assert ask.count <= 2


def test_a_peer_without_a_wanted_chunk_is_not_asked_until_it_has_one() -> None:
    fetch = Fetch(6, wanted=[2, 3])
    assert asks(fetch.tell(PeerJoined(A, Bitfield(6, [0, 1, 4])))) == []
    assert asks(fetch.tell(PeerHas(A, (5,)))) == []
    (ask,) = asks(fetch.tell(PeerHas(A, (3,))))
    assert ask.chunks == (3,)


def test_the_endgame_of_a_part_copies_its_chunks_only() -> None:
    fetch = Fetch(8, wanted=[5])
    (first,) = fetch.joined("a")
    (second,) = fetch.joined("b")
    assert (first.chunks, second.chunks, second.why) == ((5,), (5,), "endgame")


def test_a_part_that_stalls_counts_what_it_misses() -> None:
    fetch = Fetch(8, held=[0], wanted=[0, 1, 2])
    fetch.tell(PeerJoined(A, Bitfield(8, [5, 6])))
    give_up = fetch.tell(Tick(), at=STALL_S + 1.0)[-1]
    assert isinstance(give_up, GiveUp)
    assert give_up.missing == 2


def test_a_part_with_an_alternative_gives_up_when_no_peer_holds_a_chunk_of_it() -> None:
    fetch = Fetch(4, wanted=[0], abandon_s=1.0)
    fetch.tell(PeerJoined(A, Bitfield(4, [1, 2, 3])))
    assert isinstance(fetch.tell(Tick(), at=1.5)[-1], GiveUp)


@given(seed=st.integers(0, 2**32), wanted=st.sets(st.integers(0, 15), min_size=1))
@settings(max_examples=60)
def test_whatever_the_part_it_ends_with_exactly_its_chunks(seed: int, wanted: set[int]) -> None:
    fetch, dice = Fetch(16, seed=seed, wanted=sorted(wanted)), random.Random(seed)
    todo = [*fetch.joined("a"), *asks(fetch.tell(PeerJoined(B, Bitfield(16, dice.sample(range(16), 8)))))]
    for _ in range(100):
        if not todo:
            break
        ask = todo.pop(dice.randrange(len(todo)))
        for event in (ChunksVerified(ask.peer, ask.transfer, ask.chunks), TransferEnded(ask.peer, ask.transfer)):
            todo += asks(fetch.tell(event))
    assert fetch.machine.done
    assert set(fetch.machine.held) == wanted
