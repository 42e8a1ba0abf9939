"""`plan`, by views: which chunk is requested from which peer?"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.protocol.messages import NodeId
from swarm.transfer import scheduler
from swarm.transfer.scheduler import DownloadView, PeerView, plan

FAST, SLOW = NodeId("fast"), NodeId("slow")


def view(
    holds: dict[str, str],
    *,
    missing: str,
    requested: Sequence[int] | None = None,
    busy: dict[str, int] | None = None,
    superseeds: str = "",
) -> DownloadView:
    """Masks as strings of 0 and 1; `gives` names the seeds that choose, one letter each."""
    peers = [
        PeerView(NodeId(name), _mask(bits), (busy or {}).get(name, 0), 0.0, name in superseeds)
        for name, bits in holds.items()
    ]
    return _view(_mask(missing), np.array(requested or [0] * len(missing), dtype=np.uint8), peers)


def _view(
    missing: scheduler.Mask, requested: npt.NDArray[np.uint8], peers: list[PeerView], most: int = 64
) -> DownloadView:
    """What a download shows of these peers: those that it may ask, and what of the others matters."""
    free = missing & (requested == 0)
    others = [peer for peer in peers if not peer.superseeds]
    return DownloadView(
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
def test_plan_by_table(what: str, seen: DownloadView, wanted: list[tuple[str, tuple[int, ...], str]]) -> None:
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
def test_what_seeds_are_asked_for(what: str, seen: DownloadView, wanted: dict[str, tuple[int, bool]]) -> None:
    superseed = {ask.peer: (ask.count, ask.starving) for ask in plan(seen, random.Random(0)) if ask.why == "its choice"}
    assert superseed == wanted, what


def test_the_last_copy_of_a_chunk_is_asked_of_a_seed_by_name() -> None:
    seen = view({"s": "1", "a": "1"}, missing="1", requested=[1], busy={"a": 1}, superseeds="s")
    assert plan(seen, random.Random(0)) == [scheduler.PlannedRequest(NodeId("s"), "endgame", (0,))]


@pytest.mark.parametrize(("superseeds", "peers", "most"), [(True, 1, 2), (True, 50, 2), (False, 4, 2), (False, 5, 1)])
def test_how_many_batches_are_tied_to_one_peer(superseeds: bool, peers: int, most: int) -> None:
    assert scheduler.outstanding_max(superseeds, peers) == most


def test_a_fast_peer_is_asked_for_a_run_and_a_slow_one_for_a_chunk() -> None:
    holds = np.ones(100, dtype=np.bool_)
    fast = PeerView(FAST, holds, 0, 64 * 10 / scheduler.BATCH_S)
    slow = PeerView(SLOW, holds, 0, 64 / scheduler.BATCH_S / 10)
    seen = _view(holds, np.zeros(100, dtype=np.uint8), [fast, slow])
    sizes = {ask.peer: max(1, len(ask.chunks)) for ask in plan(seen, random.Random(1))}
    assert sizes[SLOW] == 1
    assert 1 < sizes[FAST] <= 10


@st.composite
def views(draw: st.DrawFn) -> DownloadView:
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
        peers.append(PeerView(NodeId(name), holds, outstanding, draw(st.floats(0, 1e6)), draw(st.booleans())))
    return _view(missing, requested, peers, draw(st.integers(1, 5)))


@given(seen=views(), seed=st.integers(0, 1000))
@settings(max_examples=200)
def test_plan_never_asks_for_what_it_should_not(seen: DownloadView, seed: int) -> None:
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
@settings(max_examples=200)
def test_plan_leaves_no_peer_idle_that_could_help(seen: DownloadView, seed: int) -> None:
    asked = plan(seen, random.Random(seed))
    taken = {chunk for ask in asked for chunk in ask.chunks}
    free = seen.missing & (seen.requested == 0)
    free[list(taken)] = False
    idle = {peer.name for peer in seen.peers if not peer.outstanding} - {ask.peer for ask in asked}
    assert not any((free & peer.holds).any() for peer in seen.peers if peer.name in idle)
