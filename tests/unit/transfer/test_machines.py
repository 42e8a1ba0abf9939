"""The pure machines, by lists of events: what do `Download`, `Upload`, `Connections` and `plan` do about them?"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim.content import Content

from swarm.content.bitfield import Bitfield
from swarm.errors import LocalProtocolError
from swarm.peers import connections, selection
from swarm.peers.connections import Connections, Dial, DialFailed, Drop, Found, LinkDown, LinkUp, Told, Welcome
from swarm.protocol.packets import Holding, Profile, Record, State
from swarm.transfer import download, scheduler, upload
from swarm.transfer.download import (
    Announce,
    Ask,
    Ban,
    Cancel,
    ChunkCorrupt,
    ChunksVerified,
    Complete,
    Declined,
    Download,
    GiveUp,
    Granted,
    PeerHas,
    PeerJoined,
    PeerLeft,
    TransferEnded,
    TransferFailed,
)
from swarm.transfer.scheduler import PeerView, View, plan
from swarm.transfer.upload import Cancelled, Ended, Grant, Refuse, Requested, Stop, Upload

STALL_S = 30.0

# Download


class Fetch:
    """A download of `chunks` chunks of which `held` are here; every step is checked."""

    def __init__(self, chunks: int, *, held: Sequence[int] = (), seed: int = 0) -> None:
        self.machine = Download(
            Content.random(0, chunks=chunks, chunk_bytes=64).manifest,
            Bitfield(chunks, held),
            node="here",
            now=0.0,
            stall_timeout_s=STALL_S,
            transfer_ids=itertools.count(),
            rng=random.Random(seed),
        )
        self.now = 0.0

    def tell(self, event: download.Event, *, at: float | None = None) -> list[download.Action]:
        self.now = self.now if at is None else at
        actions = self.machine.handle(event, self.now)
        self.machine.check()
        return actions

    def joined(self, peer: str, *, superseeds: bool = False) -> list[Ask]:
        return asks(self.tell(PeerJoined(peer, Bitfield.full(self.machine.held.length), superseeds)))

    def later(self, seconds: float) -> list[Ask]:
        return asks(self.tell(download.Tick(), at=self.now + seconds))


def asks(actions: Sequence[download.Action]) -> list[Ask]:
    return [action for action in actions if isinstance(action, Ask)]


def test_the_copy_that_loses_the_endgame_is_cancelled() -> None:
    fetch = Fetch(2, held=[0])
    (slow,) = fetch.joined("a")
    (fast,) = fetch.joined("b")
    assert (slow.chunks, fast.chunks, fast.why) == ((1,), (1,), "endgame")
    actions = fetch.tell(ChunksVerified("b", fast.transfer, (1,)))
    assert actions[:2] == [Announce((1,)), Cancel("a", slow.transfer, "arrived from another peer")]
    assert actions[-1] == Complete()


def test_chunks_that_are_verified_together_are_announced_together() -> None:
    fetch = Fetch(4)
    fetch.tell(PeerJoined("a", Bitfield.full(4), usual_bytes_per_s=1e9))
    assert fetch.tell(ChunksVerified("a", 0, (1,)))[0] == Announce((1,))
    assert fetch.tell(ChunksVerified("a", 0, (0, 1, 2)))[0] == Announce((0, 2))
    assert fetch.machine.sources == {"a": sum(fetch.machine.manifest.chunks[chunk].size for chunk in range(3))}


def test_a_copy_that_others_have_brought_bit_by_bit_is_cancelled() -> None:
    fetch = Fetch(3, held=[0])
    fetch.tell(PeerJoined("a", Bitfield.full(3), usual_bytes_per_s=1e9))
    slow = next(number for number, transfer in fetch.machine._transfers.items() if transfer.chunks == {1, 2})
    assert Cancel("a", slow, "arrived from another peer") not in fetch.tell(ChunksVerified("b", 7, (1,)))
    assert Cancel("a", slow, "arrived from another peer") in fetch.tell(ChunksVerified("c", 8, (2,)))


def test_a_third_copy_is_never_asked_for() -> None:
    fetch = Fetch(2, held=[0])
    assert [len(fetch.joined(peer)) for peer in "abcd"] == [1, 1, 0, 0]


def test_a_chunk_that_arrives_twice_counts_once() -> None:
    fetch = Fetch(4, held=[0])
    fetch.joined("a")
    ask = fetch.joined("b")[0]
    fetch.tell(ChunksVerified("b", ask.transfer, (ask.chunks[0],)))
    assert fetch.tell(ChunksVerified("a", 0, (ask.chunks[0],))) == []
    assert sum(fetch.machine.sources.values()) == fetch.machine.manifest.chunks[ask.chunks[0]].size


def test_what_is_asked_says_how_much_came_since_the_download_began() -> None:
    fetch = Fetch(64)
    (first,) = fetch.joined("a")[:1]
    assert first.pace_bytes_per_s == 0
    fetch.tell(ChunksVerified("a", first.transfer, (first.chunks[0],)), at=2.0)
    size = fetch.machine.manifest.chunks[first.chunks[0]].size
    assert fetch.joined("b")[0].pace_bytes_per_s == round(size / 2.0)


def test_the_third_corrupt_chunk_bans() -> None:
    fetch = Fetch(8)
    fetch.joined("liar")
    for number in range(download.CORRUPT_CHUNKS_MAX):
        fetch.now += 10.0
        fetch.tell(download.Tick())
        transfer = min(fetch.machine._transfers)
        chunk = min(fetch.machine._transfers[transfer].chunks)
        last = fetch.tell(ChunkCorrupt("liar", transfer, chunk))
        assert any(isinstance(action, Ban) for action in last) == (number == download.CORRUPT_CHUNKS_MAX - 1)
        fetch.tell(TransferEnded("liar", transfer))
    assert last[-1] == Ban("liar", "sent 3 wrong chunks")
    assert all(isinstance(action, Cancel) for action in last[:-1])
    assert fetch.machine.rejected_chunks == 3
    assert fetch.joined("liar") == [], "who is banned stays banned"


def test_a_refused_chunk_is_asked_elsewhere_and_the_peer_rests() -> None:
    fetch = Fetch(2, held=[0])
    (ask,) = fetch.joined("a")
    assert fetch.tell(TransferFailed("a", ask.transfer, "refused: busy", retry_s=2.0)) == []
    (elsewhere,) = fetch.joined("b")
    assert (elsewhere.peer, elsewhere.chunks) == ("b", (1,))
    fetch.tell(PeerLeft("b", "gone"))
    assert fetch.tell(download.Tick(), at=1.9) == []
    (again,) = asks(fetch.tell(download.Tick(), at=2.1))
    assert again.peer == "a"


def test_each_failure_in_a_row_doubles_the_rest_and_a_chunk_ends_it() -> None:
    fetch = Fetch(64)
    rests, number = [], fetch.joined("a")[0].transfer
    for _ in range(7):
        for transfer in list(fetch.machine._transfers):
            if transfer != number:
                fetch.machine._end(transfer)
        fetch.tell(TransferFailed("a", number, "broke"))
        began = fetch.now
        while not (found := asks(fetch.tell(download.Tick(), at=fetch.now + 0.0625))):
            pass
        number = found[0].transfer
        rests.append(fetch.now - began)
    assert rests == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    fetch.tell(ChunksVerified("a", number, (found[0].chunks[0],)))
    assert fetch.machine._peers["a"].failures == 0


def test_who_leaves_gives_its_chunks_back() -> None:
    fetch = Fetch(4)
    of_a = {chunk for ask in fetch.joined("a") for chunk in ask.chunks}
    assert of_a
    fetch.tell(PeerLeft("a", "closed the link"))
    of_b: set[int] = set()
    found = fetch.joined("b")
    while found:
        of_b |= {chunk for ask in found for chunk in ask.chunks}
        for ask in found:
            for chunk in ask.chunks:
                fetch.tell(ChunksVerified("b", ask.transfer, (chunk,)))
        found = [new for ask in found for new in asks(fetch.tell(TransferEnded("b", ask.transfer)))]
    assert of_b >= of_a


def test_what_is_not_granted_is_cancelled_in_time_and_what_is_granted_is_not() -> None:
    fetch = Fetch(3, held=[0])
    transfers = [ask.transfer for ask in fetch.joined("a")]
    while len(transfers) < 2:
        transfers += [ask.transfer for ask in asks(fetch.tell(download.Tick()))]
    fetch.tell(Granted("a", transfers[0], tuple(fetch.machine._transfers[transfers[0]].chunks)))
    assert fetch.tell(download.Tick(), at=download.GRANT_PATIENCE_S) == []
    actions = fetch.tell(download.Tick(), at=download.GRANT_PATIENCE_S + 0.1)
    assert actions == [Cancel("a", transfers[1], "not granted in time")]


def test_a_stalled_download_gives_up_once_and_says_what_it_tried() -> None:
    fetch = Fetch(4, held=[0])
    ask = fetch.joined("a")[0]
    fetch.tell(PeerJoined("b", Bitfield(4)))
    fetch.tell(TransferFailed("a", ask.transfer, "refused: busy", retry_s=3600.0))
    fetch.tell(PeerLeft("a", "closed the link"))
    assert not any(isinstance(action, GiveUp) for action in fetch.tell(download.Tick(), at=STALL_S))
    (giving_up,) = fetch.tell(download.Tick(), at=STALL_S + 1.0)
    assert giving_up == GiveUp(3, STALL_S + 1.0, ("a: closed the link", "b: holds nothing that is missing"))
    assert fetch.machine.done
    assert fetch.tell(download.Tick(), at=STALL_S + 2.0) == []
    assert fetch.joined("c") == []


def test_a_transfer_that_fails_after_its_peer_left_does_not_hide_why_it_left() -> None:
    fetch = Fetch(2)
    ask = fetch.joined("a")[0]
    fetch.tell(PeerLeft("a", "left: shutting down"))
    fetch.tell(TransferFailed("a", ask.transfer, "the session broke"))
    *_, giving_up = fetch.tell(download.Tick(), at=STALL_S + 1.0)
    assert isinstance(giving_up, GiveUp)
    assert giving_up.tried == ("a: left: shutting down",)


def test_every_chunk_puts_the_stall_off() -> None:
    fetch = Fetch(4)
    (ask, *_) = fetch.joined("a")
    fetch.tell(ChunksVerified("a", ask.transfer, (ask.chunks[0],)), at=STALL_S - 1.0)
    assert not any(isinstance(action, GiveUp) for action in fetch.tell(download.Tick(), at=2 * STALL_S - 2.0))
    assert isinstance(fetch.tell(download.Tick(), at=2 * STALL_S)[-1], GiveUp)


def test_complete_comes_once_and_then_nothing() -> None:
    fetch = Fetch(2, held=[0, 1])
    assert fetch.tell(download.Tick()) == [Complete()]
    for event in (download.Tick(), PeerHas("a", (1,)), PeerLeft("a", "x"), TransferEnded("a", 0)):
        assert fetch.tell(event, at=1000.0) == []
    assert fetch.joined("b") == []


def test_have_makes_a_peer_worth_asking() -> None:
    fetch = Fetch(4)
    assert fetch.tell(PeerJoined("a", Bitfield(4))) == []
    (ask,) = asks(fetch.tell(PeerHas("a", (2,))))
    assert (ask.peer, ask.chunks) == ("a", (2,))


def test_a_seed_that_chooses_is_asked_for_some_and_again_when_they_are_here() -> None:
    fetch = Fetch(3)
    ask = fetch.joined("seed", superseeds=True)[0]
    assert (ask.chunks, ask.count, ask.starving) == ((), 1, True)
    assert fetch.machine._requested.sum() == 0, "nobody knows yet which one comes"
    assert len(fetch.later(0.0)) == 1, "one more, so that the wire never waits"
    assert fetch.tell(Granted("seed", ask.transfer, (2,))) == []
    assert list(fetch.machine._requested) == [0, 0, 1]
    actions = fetch.tell(ChunksVerified("seed", ask.transfer, (2,))) + fetch.tell(TransferEnded("seed", ask.transfer))
    assert actions[0] == Announce((2,))
    assert [(again.chunks, again.count) for again in asks(actions)] == [((), 1)]
    assert fetch.machine.sources == {"seed": fetch.machine.manifest.chunks[2].size}


def test_a_seed_that_declines_rests_for_as_long_as_it_says_and_has_not_failed() -> None:
    fetch = Fetch(3)
    ask = fetch.joined("seed", superseeds=True)[0]
    assert fetch.tell(Declined("seed", ask.transfer, 0.1)) == []
    assert fetch.later(0.09) == []
    assert [again.peer for again in fetch.later(0.02)] == ["seed"]
    assert fetch.machine._peers["seed"].failures == 0


def test_what_a_failed_gift_was_to_bring_is_asked_elsewhere() -> None:
    fetch = Fetch(2, held=[0])
    ask = fetch.joined("seed", superseeds=True)[0]
    fetch.tell(Granted("seed", ask.transfer, (1,)))
    assert [new.why for new in fetch.joined("b")] == ["endgame"], "it is on its way"
    fetch.tell(PeerLeft("b", "gone"))
    fetch.tell(TransferFailed("seed", ask.transfer, "broke"))
    assert [(new.chunks, new.why) for new in fetch.joined("c")] == [((1,), "rarest")]


def test_a_gift_that_fails_before_it_is_known_leaves_nothing_behind() -> None:
    fetch = Fetch(2)
    ask = fetch.joined("seed", superseeds=True)[0]
    fetch.tell(TransferFailed("seed", ask.transfer, "broke"))
    assert fetch.machine._requested.sum() == 0
    assert ask.transfer not in fetch.machine._transfers


def test_a_chunk_that_is_asked_of_a_peer_may_also_be_given_and_the_slower_copy_is_cancelled() -> None:
    fetch = Fetch(3, held=[0])
    gift = fetch.joined("seed", superseeds=True)[0]
    asked = next(ask for ask in fetch.joined("a") if ask.peer == "a")
    fetch.tell(Granted("seed", gift.transfer, asked.chunks))
    assert fetch.machine._requested[asked.chunks[0]] == 2
    actions = fetch.tell(ChunksVerified("seed", gift.transfer, (asked.chunks[0],)))
    assert Cancel("a", asked.transfer, "arrived from another peer") in actions
    assert fetch.machine._requested[asked.chunks[0]] == 0


def test_a_gift_of_what_is_here_already_does_no_harm() -> None:
    fetch = Fetch(3, held=[0])
    ask = fetch.joined("seed", superseeds=True)[0]
    fetch.tell(Granted("seed", ask.transfer, (0,)))
    assert fetch.tell(ChunksVerified("seed", ask.transfer, (0,))) == []
    fetch.tell(TransferEnded("seed", ask.transfer))
    assert fetch.machine._requested.sum() == 0


def test_a_grant_of_a_transfer_that_nobody_waits_for_changes_nothing() -> None:
    fetch = Fetch(3)
    fetch.joined("seed", superseeds=True)
    fetch.later(0.0)
    before = repr(fetch.machine)
    assert fetch.tell(Granted("seed", 999, (0, 1))) == []
    assert fetch.machine._requested.sum() == 0
    assert repr(fetch.machine) == before


def test_a_gift_that_is_never_granted_is_cancelled_in_time() -> None:
    fetch = Fetch(3)
    transfers = [ask.transfer for ask in fetch.joined("seed", superseeds=True) + fetch.later(0.0)]
    actions = fetch.tell(download.Tick(), at=download.GRANT_PATIENCE_S + 0.1)
    assert actions == [Cancel("seed", number, "not granted in time") for number in transfers]


def test_among_many_peers_a_newcomer_ties_one_batch_to_each_and_two_to_a_seed() -> None:
    fetch = Fetch(64)
    names = "abcdefgh"
    for name in names:
        fetch.tell(PeerJoined(name, Bitfield(64)))
    fetch.tell(PeerJoined("seed", Bitfield.full(64), True))
    for name in names:
        fetch.tell(PeerHas(name, tuple(range(64))))
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
    fetch.tell(Granted("a", ask.transfer, ask.chunks), at=1.0)
    fetch.machine._transfers[ask.transfer].size = 3_000_000
    fetch.tell(TransferEnded("a", ask.transfer), at=2.0)
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
@settings(max_examples=60, deadline=None)
def test_whatever_happens_an_honest_peer_completes_it(seed: int, steps: list[int]) -> None:
    fetch, dice = Fetch(9, seed=seed), random.Random(seed)
    completed = 0
    for step in steps:
        peer = dice.choice("abc")
        transfer = dice.choice([*fetch.machine._transfers] or [0])
        if known := fetch.machine._transfers.get(transfer):
            peer = known.peer
        chunk, *more = (
            dice.sample(sorted(known.chunks), dice.randint(1, len(known.chunks))) if known and known.chunks else [0]
        )
        fits = known and (tuple(known.chunks) or tuple(dice.sample(range(9), 2)))
        events: list[download.Event] = [
            PeerJoined(peer, Bitfield(9, dice.sample(range(9), 5)), peer == "c"),
            Granted(peer, transfer, fits) if fits else download.Tick(),
            PeerHas(peer, (dice.randrange(9),)),
            PeerLeft(peer, "left"),
            ChunksVerified(peer, transfer, (chunk, *more)) if known and known.chunks else download.Tick(),
            ChunkCorrupt(peer, transfer, chunk) if known and known.chunks else download.Tick(),
            TransferEnded(peer, transfer),
            TransferFailed(peer, transfer, "failed"),
            Declined(peer, transfer, 0.1),
        ]
        actions = fetch.tell(events[step], at=fetch.now + 0.1)
        completed += actions.count(Complete())
    todo = fetch.joined("honest")
    for _ in range(200):
        if fetch.machine.done:
            break
        actions = fetch.tell(download.Tick(), at=fetch.now + 0.1)
        for ask in [*todo, *asks(actions)]:
            if ask.peer == "honest":
                for chunk in ask.chunks:
                    actions += fetch.tell(ChunksVerified("honest", ask.transfer, (chunk,)))
                actions += fetch.tell(TransferEnded("honest", ask.transfer))
        todo = asks(actions)
        completed += actions.count(Complete())
    assert completed == 1
    assert fetch.machine.held.complete


# Schedule


def view(
    holds: dict[str, str],
    *,
    missing: str,
    requested: Sequence[int] | None = None,
    busy: dict[str, int] | None = None,
    superseeds: str = "",
) -> View:
    """Masks as strings of 0 and 1; `gives` names the seeds that choose, one letter each."""
    peers = [
        PeerView(name, _mask(bits), (busy or {}).get(name, 0), 0.0, name in superseeds) for name, bits in holds.items()
    ]
    return _view(_mask(missing), np.array(requested or [0] * len(missing), dtype=np.uint8), peers)


def _view(missing: scheduler.Mask, requested: npt.NDArray[np.uint8], peers: list[PeerView], most: int = 64) -> View:
    """What a download shows of these peers: those that it may ask, and what of the others matters."""
    free = missing & (requested == 0)
    others = [peer for peer in peers if not peer.superseeds]
    return View(
        free=free,
        free_count=int(free.sum()),
        missing=missing,
        requested=requested,
        rarity=_rarity(peers, len(missing)),
        chunk_bytes=64,
        batch_chunks_max=most,
        peers=[peer for peer in peers if peer.outstanding < scheduler.outstanding_max(peer.superseeds, len(peers))],
        peers_total=len(peers),
        starving=scheduler.starving(sum(peer.outstanding > 0 for peer in others), len(others)),
    )


def _rarity(peers: Sequence[PeerView], chunks: int) -> scheduler.Counts:
    return sum((peer.holds.astype(np.int32) for peer in peers), np.zeros(chunks, dtype=np.int32))


def _mask(bits: str) -> scheduler.Mask:
    return np.array([bit == "1" for bit in bits])


@pytest.mark.parametrize(
    ("what", "seen", "wanted"),
    [
        ("nobody is there", view({}, missing="11"), []),
        ("nothing is missing", view({"a": "11"}, missing="00"), []),
        ("nobody has it", view({"a": "10"}, missing="01"), []),
        ("the only one", view({"a": "01"}, missing="11"), [("a", (1,), "rarest")]),
        ("everybody is busy", view({"a": "11"}, missing="11", busy={"a": 2}), []),
        ("the rarest first", view({"a": "111", "b": "110"}, missing="111", busy={"b": 2}), [("a", (2,), "rarest")]),
        ("asked already", view({"a": "11"}, missing="11", requested=[1, 0], busy={"a": 1}), [("a", (1,), "rarest")]),
        ("endgame", view({"a": "1", "b": "1"}, missing="1", requested=[1], busy={"a": 1}), [("b", (0,), "endgame")]),
        ("two copies at most", view({"a": "1", "b": "1"}, missing="1", requested=[2]), []),
        ("some are free", view({"a": "10", "b": "11"}, missing="11", requested=[1, 0], busy={"b": 2}), []),
    ],
)  # fmt: skip
def test_plan_by_table(what: str, seen: View, wanted: list[tuple[str, tuple[int, ...], str]]) -> None:
    assert [(ask.peer, ask.chunks, ask.why) for ask in plan(seen, random.Random(0))] == wanted, what


@pytest.mark.parametrize(
    ("what", "seen", "wanted"),
    [
        ("alone with a seed", view({"s": "1111"}, missing="1111", superseeds="s"), {"s": (1, True)}),
        ("it has no chunk free", view({"s": "11"}, missing="11", requested=[1, 1], busy={"s": 1}, superseeds="s"), {}),
        ("one more batch", view({"s": "1111"}, missing="1111", busy={"s": 1}, superseeds="s"), {"s": (1, True)}),
        ("and not a third", view({"s": "1111"}, missing="1111", busy={"s": 2}, superseeds="s"), {}),
        ("two seeds", view({"s": "11", "t": "11"}, missing="11", superseeds="st"), {"s": (1, True), "t": (1, True)}),
        ("fed by a peer", view({"s": "11", "a": "11"}, missing="11", busy={"a": 2}, superseeds="s"), {"s": (1, False)}),
        ("a peer is idle", view({"s": "11", "a": "00"}, missing="11", superseeds="s"), {"s": (1, True)}),
        (
            "half of its peers feed it",
            view({"s": "11", "a": "00", "b": "11"}, missing="11", busy={"b": 2}, superseeds="s"),
            {"s": (1, False)},
        ),
        (
            "less than half of its peers feed it",
            view({"s": "11", "a": "00", "b": "00", "c": "11"}, missing="11", busy={"c": 2}, superseeds="s"),
            {"s": (1, True)},
        ),
        (
            "three streams of many peers are enough",
            view(
                {"s": "1", **dict.fromkeys("abcdefgh", "0")}, missing="1", busy=dict.fromkeys("abc", 1), superseeds="s"
            ),
            {"s": (1, False)},
        ),
    ],
)
def test_what_seeds_are_asked_for(what: str, seen: View, wanted: dict[str, tuple[int, bool]]) -> None:
    superseed = {ask.peer: (ask.count, ask.starving) for ask in plan(seen, random.Random(0)) if ask.why == "its choice"}
    assert superseed == wanted, what


def test_the_last_copy_of_a_chunk_is_asked_of_a_seed_by_name() -> None:
    seen = view({"s": "1", "a": "1"}, missing="1", requested=[1], busy={"a": 1}, superseeds="s")
    assert plan(seen, random.Random(0)) == [scheduler.Ask("s", "endgame", (0,))]


@pytest.mark.parametrize(("superseeds", "peers", "most"), [(True, 1, 2), (True, 50, 2), (False, 4, 2), (False, 5, 1)])
def test_how_many_batches_are_tied_to_one_peer(superseeds: bool, peers: int, most: int) -> None:
    assert scheduler.outstanding_max(superseeds, peers) == most


def test_a_fast_peer_is_asked_for_a_run_and_a_slow_one_for_a_chunk() -> None:
    holds = np.ones(100, dtype=np.bool_)
    fast = PeerView("fast", holds, 0, 64 * 10 / scheduler.BATCH_S)
    slow = PeerView("slow", holds, 0, 64 / scheduler.BATCH_S / 10)
    seen = _view(holds, np.zeros(100, dtype=np.uint8), [fast, slow])
    sizes = {ask.peer: max(1, len(ask.chunks)) for ask in plan(seen, random.Random(1))}
    assert sizes["slow"] == 1
    assert 1 < sizes["fast"] <= 10


@st.composite
def views(draw: st.DrawFn) -> View:
    chunks = draw(st.integers(1, 12))
    masks = st.lists(st.booleans(), min_size=chunks, max_size=chunks).map(np.array)
    missing = draw(masks)
    requested = np.zeros(chunks, dtype=np.uint8)
    peers = []
    for name in "abcd"[: draw(st.integers(0, 4))]:
        holds, outstanding = draw(masks), draw(st.integers(0, scheduler.BATCHES_OUTSTANDING))
        possible = np.flatnonzero(holds & missing & (requested < scheduler.COPIES_MAX))
        asked = [int(i) for i in possible[: draw(st.integers(0, 3))]] if outstanding else []
        requested[asked] += 1
        peers.append(PeerView(name, holds, outstanding, draw(st.floats(0, 1e6)), draw(st.booleans())))
    return _view(missing, requested, peers, draw(st.integers(1, 5)))


@given(seen=views(), seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_plan_never_asks_for_what_it_should_not(seen: View, seed: int) -> None:
    peers = {peer.name: peer for peer in seen.peers}
    outstanding = {peer.name: peer.outstanding for peer in seen.peers}
    copies = seen.requested.copy()
    for ask in plan(seen, random.Random(seed)):
        peer, chunks = peers[ask.peer], list(ask.chunks)
        outstanding[ask.peer] += 1
        assert bool(chunks) != bool(ask.count), "chunks, or a number of them"
        assert max(len(chunks), ask.count) <= seen.batch_chunks_max
        if ask.count:
            assert peer.superseeds, "it does not choose"
            assert (seen.missing & (seen.requested == 0)).any(), "nothing is left to choose from"
            continue
        assert chunks == sorted(set(chunks))
        assert peer.holds[chunks].all(), "it lacks one of them"
        assert seen.missing[chunks].all(), "one of them is here"
        assert not (peer.outstanding and ask.why == "endgame"), "the other copy may be its own"
        if ask.why != "endgame":
            assert not peer.superseeds, "a seed chooses"
            assert not copies[chunks].any(), "somebody else was asked for one of them"
        copies[chunks] += 1
    assert (copies <= scheduler.COPIES_MAX).all()
    for name, count in outstanding.items():
        assert count <= max(
            scheduler.outstanding_max(peers[name].superseeds, seen.peers_total), peers[name].outstanding
        )


@given(seen=views(), seed=st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_plan_leaves_nobody_idle_who_could_help(seen: View, seed: int) -> None:
    asked = plan(seen, random.Random(seed))
    taken = {chunk for ask in asked for chunk in ask.chunks}
    free = seen.missing & (seen.requested == 0)
    free[list(taken)] = False
    idle = {peer.name for peer in seen.peers if not peer.outstanding} - {ask.peer for ask in asked}
    assert not any((free & peer.holds).any() for peer in seen.peers if peer.name in idle)


# Upload


def told(machine: Upload, *events: upload.Event) -> list[upload.Action]:
    actions = []
    for event in events:
        actions += machine.handle(event)
        machine.check()
    return actions


def test_a_free_slot_goes_to_who_got_least() -> None:
    machine = Upload(slots=1)
    told(machine, *(Requested("greedy", number, 100) for number in range(4)), Requested("modest", 9, 100))
    order: list[str] = ["greedy"]
    done: upload.Event = Ended("greedy", 0, 1.0)
    while grants := told(machine, done):
        assert isinstance(grants[0], Grant)
        order.append(grants[0].peer)
        done = Ended(grants[0].peer, grants[0].transfer, 1.0)
    assert order == ["greedy", "modest", "greedy", "greedy", "greedy"]


@pytest.mark.parametrize("sources", [0, 1])
def test_who_comes_late_is_not_served_alone_until_it_has_caught_up(sources: int) -> None:
    machine = Upload(slots=1)
    told(machine, Requested("idle", 0, 1, sources), Ended("idle", 0, 0.01))
    for number in range(100):
        told(machine, Requested("old", number, 100, sources), Ended("old", number, 1.0))
    old, new = ([Requested(peer, number, 100, sources) for number in range(100, 105)] for peer in ("old", "new"))
    told(machine, old[0], *new, old[1])
    ends = [Ended(peer, number, 1.0) for peer, number in (("old", 100), ("new", 100), ("new", 101))]
    granted = [action.peer for action in told(machine, *ends)]
    assert "old" in granted, "it waits for a newcomer to get all that it has"
    assert "new" in granted


def test_nobody_gets_a_second_slot_while_somebody_waits_for_a_first() -> None:
    """Else the slots of a seed fill with slow newcomers, and its link is idle."""
    machine = Upload(slots=3)
    told(machine, Requested("slow", 0, 1), Requested("slow", 1, 1), Requested("quick", 0, 1000))
    told(machine, Requested("slow", 2, 1), *(Requested(peer, 0, 1000) for peer in ("late", "later")))
    assert told(machine, Ended("quick", 0, 1.0)) == [Grant("late", 0, 0)]
    assert told(machine, Ended("late", 0, 1.0)) == [Grant("later", 0, 0)]
    assert told(machine, Ended("slow", 0, 9.0)) == [Grant("slow", 2, 2)], "when nobody waits the link must not be idle"


def test_who_takes_long_gets_less() -> None:
    quick, slow = Want(seconds=1.0), Want(seconds=3.0)
    got = served_of({"quick": quick, "slow": slow}, rounds=400)
    assert got["quick"] == pytest.approx(3 * got["slow"], rel=0.1), "both hold the slot equally long"


def test_whoever_imports_for_its_machine_is_charged_by_bytes_and_sources() -> None:
    quick, slow = Want(seconds=1.0, sources=2), Want(seconds=3.0, sources=1)
    got = served_of({"quick": quick, "slow": slow}, rounds=300)
    assert got["slow"] == pytest.approx(2 * got["quick"], rel=0.1), (
        "one parent of two gives half as much as the only one"
    )


def test_can_both_ways_to_be_charged_be_compared() -> None:
    alone, importing = Want(seconds=1.0), Want(seconds=1.0, sources=1)
    got = served_of({"alone": alone, "importing": importing}, rounds=200)
    assert got["alone"] == pytest.approx(got["importing"], rel=0.1)


def test_transfers_that_are_cut_short_are_charged_and_say_nothing_of_the_usual_rate() -> None:
    machine = Upload(slots=1)
    told(machine, Requested("stays", 0, 100), Ended("stays", 0, 1.0))
    told(machine, Requested("quits", 0, 1 << 30), Ended("quits", 0, 2.0, whole=False))
    told(machine, Requested("other", 0, 1), *(Requested("stays", number, 100) for number in range(1, 4)))
    told(machine, Requested("quits", 1, 100))
    ends = [Ended("other", 0, 0.1), Ended("stays", 1, 0.5), Ended("stays", 2, 0.6)]
    assert [action.peer for action in told(machine, *ends)] == ["stays", "stays", "quits"], "200 bytes after 150"


def test_does_nobody_wait_for_ever_for_who_always_quits() -> None:
    machine = Upload(slots=1)
    told(machine, *(Requested("quits", number, 100) for number in range(3)), Requested("stays", 0, 100))
    assert told(machine, Ended("quits", 0, 1.0, whole=False)) == [Grant("stays", 0, 0)]


@pytest.mark.parametrize("sources", [0, 1])
def test_who_fell_behind_gets_more_than_the_fastest(sources: int) -> None:
    fast, behind = Want(pace=100.0, sources=sources), Want(pace=50.0, sources=sources)
    got = served_of({"fast": fast, "behind": behind}, rounds=500)
    assert got["behind"] == pytest.approx(4 * got["fast"], rel=0.1), "charged by the square of the pace"


@pytest.mark.parametrize("sources", [0, 1])
def test_who_claims_to_get_nothing_cannot_have_everything(sources: int) -> None:
    honest, liar = Want(pace=100.0, sources=sources), Want(pace=0.0, sources=sources)
    got = served_of({"honest": honest, "liar": liar}, rounds=650)
    assert got["honest"] == pytest.approx(10, abs=1), f"charged as if it got 1 / {upload.SLOWEST} of the fastest"


@dataclass(frozen=True)
class Want:
    """What a peer says of itself, and how long each of its transfers takes."""

    pace: float = 0.0
    seconds: float = 1.0
    sources: int = 0


def served_of(wants: dict[str, Want], *, rounds: int) -> Counter[str]:
    """Transfers of peers that always want more, out of so many, one at a time."""
    machine, numbers = Upload(slots=1), itertools.count()

    def ask(peer: str) -> Requested:
        return Requested(peer, next(numbers), 100, wants[peer].sources, wants[peer].pace)

    for peer in wants:
        told(machine, *(ask(peer) for _ in range(3)))
    got: Counter[str] = Counter()
    name, number = next(iter(wants)), 0
    for _ in range(rounds):
        (grant,) = told(machine, Ended(name, number, wants[name].seconds))
        assert isinstance(grant, Grant)
        name, number = grant.peer, grant.transfer
        got[name] += 1
        told(machine, ask(name))
    return got


def test_slots_and_transfers_per_peer_are_limited() -> None:
    machine = Upload(slots=3)
    grants = told(machine, *(Requested(peer, number, 1) for peer in "abc" for number in range(3)))
    assert grants == [Grant("a", 0, 0), Grant("a", 1, 1), Grant("b", 0, 0)]
    assert repr(machine) == "<Upload 3/3 slots | 6 waiting | 3 peers>"


def test_a_queue_that_is_full_refuses() -> None:
    machine = Upload(slots=1)
    most = 1 + upload.QUEUED_PER_PEER_MAX
    assert told(machine, *(Requested("a", number, 1) for number in range(most))) == [Grant("a", 0, 0)]
    assert told(machine, Requested("a", most, 1)) == [Refuse("a", most, "busy", upload.BUSY_RETRY_S)]


def test_a_cancelled_transfer_is_not_granted() -> None:
    machine = Upload(slots=1)
    told(machine, Requested("a", 0, 1), Requested("a", 1, 1), Requested("a", 2, 1))
    assert told(machine, Cancelled("a", 1)) == []
    assert told(machine, Ended("a", 0, 1.0)) == [Grant("a", 2, 1)]


def test_a_cancelled_transfer_on_the_wire_is_stopped_and_keeps_its_slot_until_it_has() -> None:
    machine = Upload(slots=1)
    told(machine, Requested("a", 0, 1), Requested("b", 0, 1))
    assert told(machine, Cancelled("a", 0)) == [Stop("a", 0)]
    assert told(machine, Ended("a", 0, 1.0)) == [Grant("b", 0, 0)]


def test_who_leaves_is_stopped_and_the_others_go_on() -> None:
    machine = Upload(slots=2)
    told(machine, *(Requested("a", number, 1) for number in range(4)), Requested("b", 0, 1))
    assert told(machine, upload.PeerLeft("a")) == [Stop("a", 0), Stop("a", 1), Grant("b", 0, 0)]
    assert told(machine, Ended("a", 0, 1.0), Ended("a", 1, 1.0), Cancelled("a", 2), upload.PeerLeft("a")) == []


@given(seed=st.integers(0, 2**32), slots=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_everything_asked_for_is_granted_once_and_in_order(seed: int, slots: int) -> None:
    machine, dice = Upload(slots=slots), random.Random(seed)
    wanted = {peer: list(range(dice.randrange(upload.QUEUED_PER_PEER_MAX))) for peer in "abcde"}
    ahead = {peer: iter(numbers) for peer, numbers in wanted.items()}
    active: list[Grant] = []
    granted: dict[str, list[int]] = {peer: [] for peer in wanted}
    for _ in range(1000):
        peer = dice.choice("abcde")
        number = next(ahead[peer], None)
        events: list[upload.Event] = [] if number is None else [Requested(peer, number, dice.randrange(1, 100))]
        if active and dice.random() < 0.5:
            over = active.pop(dice.randrange(len(active)))
            events.append(Ended(over.peer, over.transfer, dice.random()))
        for action in told(machine, *events):
            assert isinstance(action, Grant)
            assert action.sequence == len(granted[action.peer])
            granted[action.peer].append(action.transfer)
            active.append(action)
    assert granted == wanted


def test_an_upload_refuses_what_is_no_event() -> None:
    with pytest.raises(LocalProtocolError, match="cannot handle"):
        Upload(slots=1).handle("hello")  # type: ignore[arg-type]


# Connections

SMALL, BIG = "1" * 16, "2" * 16


class Knows:
    """The membership machine of one node; every step is checked."""

    def __init__(self, node: str = SMALL, *, host: str = "") -> None:
        self.machine = Connections(node, rng=random.Random(1), host=host)
        self.now = 0.0

    def tell(self, event: connections.Event, *, at: float | None = None) -> list[connections.Action]:
        self.now = self.now if at is None else at
        actions = self.machine.handle(event, self.now)
        self.machine.check()
        return actions


def test_a_found_address_is_dialled_once() -> None:
    knows = Knows()
    assert knows.tell(Found("b:1", True)) == [Dial("b:1")]
    assert knows.tell(Found("b:1", False)) == []
    assert knows.tell(connections.Tick(), at=60.0) == []
    assert knows.machine.unanswered() == ["b:1"]


def test_an_address_that_fails_is_tried_less_and_less_often() -> None:
    knows, pauses = Knows(), []
    knows.tell(Found("b:1", True))
    for _ in range(8):
        knows.tell(DialFailed("b:1"))
        began = knows.now
        while not knows.tell(connections.Tick(), at=knows.now + 0.25):
            pass
        pauses.append(knows.now - began)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]
    assert knows.machine.tried() == ["b:1: no answer, tried 8 times"]


@pytest.mark.parametrize("lasting", [True, False])
def test_only_what_was_given_by_hand_is_never_forgotten(lasting: bool) -> None:
    knows = Knows()
    knows.tell(Found("b:1", lasting))
    for number in range(1, connections.FAILURES_MAX + 1):
        knows.tell(DialFailed("b:1"), at=100.0 * number)
        knows.tell(connections.Tick(), at=100.0 * number + 50.0)
    assert bool(knows.machine.tried()) is lasting


@pytest.mark.parametrize("small_hears_first", ["own", "other"])
@pytest.mark.parametrize("big_hears_first", ["own", "other"])
def test_both_ends_keep_the_same_one_of_two_links(small_hears_first: str, big_hears_first: str) -> None:
    kept = {}
    for node, other, first in ((SMALL, BIG, small_hears_first), (BIG, SMALL, big_hears_first)):
        knows = Knows(node)
        own = LinkUp(1, other, f"{other}:1", dialled=f"{other}:1")
        theirs = LinkUp(2, other, f"{other}:1", dialled=None)
        events = [own, theirs] if first == "own" else [theirs, own]
        actions = [action for event in events for action in knows.tell(event)]
        (dropped,) = [action.link for action in actions if isinstance(action, Drop)]
        kept[node] = "small dialled" if (dropped == 2) == (node == SMALL) else "big dialled"
    assert kept == {SMALL: "small dialled", BIG: "small dialled"}


def test_of_two_links_that_the_same_end_dialled_the_newer_stays() -> None:
    knows = Knows()
    knows.tell(LinkUp(1, BIG, "b:1", dialled=None))
    assert knows.tell(LinkUp(2, BIG, "b:1", dialled=None)) == [
        Drop(1, "another link is open"),
        Welcome(2, ()),
    ]
    assert knows.tell(LinkDown(1)) == []
    assert repr(knows.machine) == "<Connections 11111111 1 links | 1 addresses | 0 members>"


def test_a_second_address_of_a_linked_node_is_not_dialled_again_and_again() -> None:
    knows = Knows(BIG)
    knows.tell(Found("alias:1", True))
    assert knows.tell(LinkUp(1, SMALL, "a:1", dialled=None)) == [Welcome(1, ())]
    assert knows.tell(LinkUp(2, SMALL, "a:1", dialled="alias:1")) == [Drop(2, "another link is open")]
    assert knows.tell(connections.Tick(), at=60.0) == []
    assert knows.tell(LinkDown(2)) == []
    assert knows.tell(LinkDown(1)) == []
    assert set(knows.tell(connections.Tick(), at=61.0)) == {Dial("a:1"), Dial("alias:1")}


def test_the_own_address_is_dialled_once_and_never_again() -> None:
    knows = Knows()
    knows.tell(Found("me:1", True))
    assert knows.tell(LinkUp(1, SMALL, "10.0.0.1:1", dialled="me:1")) == [Drop(1, "this is myself")]
    assert knows.tell(Told(("me:1",))) == []
    assert knows.tell(Found("me:1", True)) == []


def test_a_stranger_cannot_have_an_address_taken_for_the_own_one() -> None:
    knows = Knows()
    knows.tell(Found("seed:1", True))
    knows.tell(DialFailed("seed:1"))
    assert knows.tell(LinkUp(1, SMALL, "seed:1", dialled=None)) == [Drop(1, "this is myself")]
    assert knows.tell(connections.Tick(), at=60.0) == [Dial("seed:1")]


def test_the_own_addresses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "OWN_MAX", 2)
    knows = Knows()
    for number, address in enumerate(("me:1", "me:2", "me:3")):
        knows.tell(LinkUp(number, SMALL, "me:1", dialled=address))
    assert knows.tell(Told(("me:3", "me:2"))) == []
    assert knows.tell(Told(("me:1",))) == [Dial("me:1")]


def test_a_claimed_address_keeps_nobody_from_dialling_what_was_given_by_hand() -> None:
    knows = Knows()
    knows.tell(Found("seed:1", True))
    knows.tell(DialFailed("seed:1"))
    knows.tell(LinkUp(1, BIG, "seed:1", dialled=None))
    assert knows.tell(connections.Tick(), at=0.4) == []
    knows.tell(LinkDown(1))
    assert knows.tell(LinkUp(2, BIG, "seed:1", dialled=None), at=0.5) == [Welcome(2, ()), Dial("seed:1")]


def test_a_claimed_address_that_nobody_gave_by_hand_is_not_dialled() -> None:
    knows = Knows()
    knows.tell(LinkUp(1, BIG, "b:1", dialled=None))
    assert knows.tell(Told(("b:1",)), at=60.0) == []


def test_who_hangs_up_at_once_is_dialled_less_and_less_often_until_a_link_lasts() -> None:
    knows, pauses = Knows(), []
    knows.tell(Found("b:1", False))
    for number in range(8):
        knows.tell(LinkUp(number, BIG, "b:1", dialled="b:1"))
        knows.tell(LinkDown(number), at=knows.now + connections.BRIEF_S / 2)
        began = knows.now
        while not knows.tell(connections.Tick(), at=knows.now + 0.25):
            pass
        pauses.append(knows.now - began)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]
    assert knows.machine.tried() == ["b:1: hung up at once, 8 times"]
    assert knows.machine.unanswered() == []
    knows.tell(LinkUp(9, BIG, "b:1", dialled="b:1"))
    knows.tell(LinkDown(9), at=knows.now + connections.BRIEF_S)
    assert knows.machine.tried() == ["b:1: not connected just now"]
    assert knows.tell(connections.Tick(), at=knows.now + connections.RETRY_FIRST_S) == [Dial("b:1")]


def test_a_link_that_gives_way_to_its_twin_has_not_failed() -> None:
    knows = Knows(BIG)
    knows.tell(LinkUp(1, SMALL, "a:1", dialled="a:1"))
    knows.tell(LinkUp(2, SMALL, "a:1", dialled=None))
    knows.tell(LinkDown(1))
    knows.tell(LinkDown(2))
    assert knows.machine.tried() == ["a:1: not connected just now"]


def test_an_address_that_fails_for_days_is_still_dialled() -> None:
    knows = Knows()
    knows.tell(Found("b:1", True))
    for number in range(2000):
        knows.tell(DialFailed("b:1"), at=100.0 * number)
        assert knows.tell(connections.Tick(), at=100.0 * number + 50.0) == [Dial("b:1")]


def test_a_lost_link_is_dialled_again_after_a_moment() -> None:
    knows = Knows()
    knows.tell(LinkUp(1, BIG, "b:1", dialled=None))
    assert knows.tell(LinkDown(1)) == []
    assert knows.tell(connections.Tick(), at=connections.RETRY_FIRST_S) == [Dial("b:1")]


def test_one_address_is_enough_to_hear_of_the_others() -> None:
    knows = Knows()
    for number, name in enumerate("bcd"):
        actions = knows.tell(LinkUp(number, name * 16, f"{name}:1", dialled=None))
    assert actions == [Welcome(2, ("b:1", "c:1"))]
    assert knows.tell(Told(("e:1", "b:1"))) == [Dial("e:1")]


def test_links_and_addresses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LINKS_MAX", 1)
    monkeypatch.setattr(connections, "KNOWN_MAX", 2)
    knows = Knows()
    knows.tell(LinkUp(1, BIG, "b:1", dialled=None))
    assert knows.tell(LinkUp(2, "3" * 16, "c:1", dialled=None)) == [Drop(2, "too many links")]
    assert knows.tell(Told(("d:1", "e:1", "f:1"))) == []
    assert repr(knows.machine) == "<Connections 11111111 1 links | 2 addresses | 0 members>"


def record(number: int, *, state: State = State.ALIVE, chunks: int | None = None, host: str = "") -> Record:
    """A member of a large swarm that holds so many of 8 chunks, or nothing; its address is `mN:1`."""
    artifacts = () if chunks is None else (Holding("org/model", DIGEST, "checkpoint", chunks, 8, chunks == 8),)
    node = f"{0x30 + number:016x}"
    return Record(node, 0, state, 0, f"m{number}", f"m{number}:1", Profile(artifacts, host=host))


DIGEST = "ab" * 32
WANT = connections.Wants(frozenset({DIGEST}))


def large(knows: Knows, *, holding: int = 40, seeds: int = 1, host: str = "", near: int = 0) -> None:
    """Gossip knows of 60 members: `holding` have half, `seeds` of them all, and `near` of them are on this host."""
    for number in range(60):
        chunks = None if number >= holding else 8 if number < seeds else 4
        knows.tell(connections.Heard(record(number, chunks=chunks, host=host if number < near else "elsewhere")))


def drops(actions: list[connections.Action]) -> list[str]:
    return [action.why for action in actions if isinstance(action, Drop)]


def dialled(actions: list[connections.Action]) -> list[int]:
    return sorted(int(action.address[1:-2]) for action in actions if isinstance(action, Dial))


def linked(
    knows: Knows, numbers: list[int], *, by: str | None = "dialled", chunks: int = 4
) -> list[connections.Action]:
    actions = []
    for number in numbers:
        address = f"m{number}:1"
        holds = {DIGEST: chunks == 8} if chunks else {}
        up = LinkUp(number, record(number).node, address, address if by else None, holds)
        actions += knows.tell(up)
    return actions


def test_in_a_small_swarm_everybody_that_gossip_names_is_dialled() -> None:
    knows = Knows()
    for number in range(selection.LINKS_WANTED):
        assert knows.tell(connections.Heard(record(number))) == []
    assert dialled(knows.tell(connections.Tick())) == list(range(selection.LINKS_WANTED))
    assert knows.tell(connections.Tick(), at=60.0) == []


def test_in_a_large_swarm_nobody_is_dialled_who_wants_nothing() -> None:
    knows = Knows()
    large(knows)
    assert knows.tell(connections.Tick(), at=60.0) == []
    assert knows.tell(Found("m3:1", False)) == []
    assert dialled(knows.tell(Found("m3:1", True))) == [3], "but those given by hand are"


def test_an_address_that_gossip_does_not_know_is_dialled_as_if_there_were_none() -> None:
    knows = Knows()
    large(knows)
    assert knows.tell(Found("stranger:1", False)) == [Dial("stranger:1")]


@pytest.mark.parametrize("seeds", [1, 3, 40])
def test_who_wants_something_dials_a_few_that_hold_it_and_a_seed_among_them(seeds: int) -> None:
    knows = Knows()
    large(knows, seeds=seeds)
    first = dialled(knows.tell(WANT))
    on_top = min(seeds, selection.SEEDS_WANTED)
    assert len(first) == selection.LINKS_FIRST + on_top
    assert min(first) < seeds
    rest = dialled(knows.tell(connections.Tick(), at=selection.SETTLE_S))
    assert len(first) + len(rest) == selection.LINKS_WANTED + on_top
    assert not set(first) & set(rest)
    assert max(rest) < 40
    assert knows.tell(connections.Tick(), at=1.0) == []


def test_who_fetches_is_full_to_members_but_not_to_strangers_whom_gossip_may_not_reach() -> None:
    knows = Knows()
    large(knows)
    knows.tell(WANT)
    assert not drops(linked(knows, list(range(selection.LINKS_FULL)), by=None))
    assert drops(linked(knows, [50], by=None)) == ["full while it fetches"]
    assert not drops(knows.tell(LinkUp(99, "f" * 16, "stranger:1", None, {})))
    knows.tell(connections.Wants(frozenset()))
    assert not drops(linked(knows, [51], by=None)), "who has everything takes more"


def test_two_fetches_have_links_for_each() -> None:
    knows = Knows()
    large(knows)
    knows.tell(WANT)
    linked(knows, dialled(knows.tell(connections.Tick(), at=1.0)))
    other = "cd" * 32
    holding = (Holding("org/other", other, "checkpoint", 8, 8, True),)
    alone = record(200)
    knows.tell(connections.Heard(Record(alone.node, 0, State.ALIVE, 0, "m200", "m200:1", Profile(holding))))
    assert dialled(knows.tell(connections.Wants(frozenset({DIGEST, other})))) == [200]


def test_half_of_those_chosen_are_of_this_host() -> None:
    knows = Knows(host="here")
    large(knows, seeds=0, host="here", near=30)
    chosen = [*dialled(knows.tell(WANT)), *dialled(knows.tell(connections.Tick(), at=1.0))]
    assert sum(number < 30 for number in chosen) == selection.LINKS_WANTED // 2
    knows = Knows(host="here")
    large(knows, seeds=0, host="here", near=3)
    chosen = [*dialled(knows.tell(WANT)), *dialled(knows.tell(connections.Tick(), at=1.0))]
    assert {0, 1, 2} < set(chosen)


def test_links_of_no_use_give_way() -> None:
    knows = Knows()
    useless = list(range(45, 45 + selection.LINKS_MOST))
    for number in useless:
        knows.tell(Found(f"m{number}:1", False))
    linked(knows, useless, chunks=0)
    linked(knows, [59], by=None, chunks=0)
    large(knows)
    actions = knows.tell(WANT)
    assert {action.link for action in actions if isinstance(action, Drop)} == set(useless), "not who dialled in"
    assert len(dialled(actions)) == selection.LINKS_FIRST + 1, "the seed"


def test_links_that_nobody_can_use_end_after_a_while() -> None:
    knows = Knows()
    large(knows, seeds=40)
    chosen = dialled(knows.tell(WANT))
    linked(knows, chosen[1:], chunks=8)
    linked(knows, chosen[:1], chunks=4)
    knows.tell(Found(f"m{chosen[1]}:1", True))
    knows.tell(connections.Wants(frozenset()))
    assert knows.tell(connections.Tick(), at=connections.IDLE_S / 2) == []
    ended = [
        action.link for action in knows.tell(connections.Tick(), at=connections.IDLE_S) if isinstance(action, Drop)
    ]
    assert ended == chosen[2:], "but for who still fetches, and who was given by hand"
    assert knows.tell(connections.Tick(), at=2 * connections.IDLE_S) == []


def test_the_dead_are_dropped_and_not_dialled() -> None:
    knows = Knows()
    knows.tell(connections.Heard(record(1)))
    knows.tell(connections.Tick())
    linked(knows, [1])
    assert knows.tell(connections.Heard(record(1, state=State.SUSPECT))) == []
    assert knows.tell(connections.Heard(record(1, state=State.DEAD))) == [Drop(1, "gossip says that it is dead")]
    assert knows.tell(LinkDown(1)) == []
    assert knows.tell(connections.Tick(), at=60.0) == []
    knows.tell(connections.Heard(record(1)))
    assert dialled(knows.tell(connections.Tick())) == [1]


def test_where_datagrams_do_not_get_through_everybody_is_dialled() -> None:
    knows = Knows()
    knows.tell(LinkUp(99, BIG, "b:1", dialled=None))
    told = Told(tuple(f"m{number}:1" for number in range(40)))
    assert len(dialled(knows.tell(told))) == selection.LINKS_MOST
    assert len(dialled(knows.tell(connections.Tick(), at=connections.GOSSIP_LATE_S))) == 40 - selection.LINKS_MOST


def test_somebody_who_holds_more_than_it_could_say_is_asked_for_what_nobody_is_known_to_hold() -> None:
    knows = Knows()
    large(knows, holding=0)
    full = record(5)
    profile = Profile(omitted=3)
    knows.tell(connections.Heard(Record(full.node, 0, State.ALIVE, 1, full.name, full.address, profile)))
    assert dialled(knows.tell(connections.Wants(frozenset(), more=True))) == [5]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_whatever_happens_the_links_are_few(seed: int) -> None:
    knows, dice, open_ = Knows(host="here"), random.Random(seed), dict[str, int]()
    dialling: list[str] = []
    for step in range(300):
        number = dice.randrange(80)
        somebody = record(number, chunks=dice.choice([None, 4, 8]), host=dice.choice(["here", "there"]))
        events: list[connections.Event] = [
            connections.Tick(),
            WANT,
            connections.Wants(frozenset()),
            connections.Heard(somebody),
            connections.Heard(record(number, state=State.DEAD)),
            Found(somebody.address, dice.random() < 0.1),
            LinkUp(1000 + step, somebody.node, somebody.address, None),
        ]
        if dialling and dice.random() < 0.5:
            address = dialling.pop(dice.randrange(len(dialling)))
            up = LinkUp(step, record(int(address[1:-2])).node, address, address, {DIGEST: dice.random() < 0.5})
            events = [DialFailed(address), up]
        elif open_ and dice.random() < 0.2:
            events = [LinkDown(open_.pop(dice.choice(list(open_))))]
        event = dice.choice(events)
        actions = knows.tell(event, at=knows.now + dice.random())
        if isinstance(event, LinkUp):
            open_[event.node] = event.link
        dialling += [action.address for action in actions if isinstance(action, Dial)]


def test_a_membership_refuses_what_is_no_event() -> None:
    with pytest.raises(LocalProtocolError, match="cannot handle"):
        Knows().machine.handle("hello", 0.0)  # type: ignore[arg-type]
