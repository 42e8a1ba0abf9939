"""The upload machine, by lists of events: which peer is granted a slot next?"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import LocalProtocolError
from swarm.protocol.messages import NodeId
from swarm.transfer import upload
from swarm.transfer.upload import Cancelled, Ended, Grant, Refuse, Requested, Stop, Upload

A = NodeId("a")
B = NodeId("b")
GREEDY = NodeId("greedy")
IDLE = NodeId("idle")
LATE = NodeId("late")
OLD = NodeId("old")
OTHER = NodeId("other")
QUITS = NodeId("quits")
SLOW = NodeId("slow")
STAYS = NodeId("stays")


def told(machine: Upload, *events: upload.Event) -> list[upload.Action]:
    actions = []
    for event in events:
        actions += machine.handle(event)
        machine.check()
    return actions


def test_a_node_that_drains_ends_what_runs_and_grants_only_what_no_other_node_has() -> None:
    machine = Upload(slots=1)
    told(machine, Requested(A, 0, 100), Requested(A, 1, 100), Requested(B, 2, 100), Requested(B, 3, 100))
    refused = told(machine, upload.Drain(frozenset({(B, 3)})))
    assert refused == [Refuse(peer, number, "leaving", upload.LEAVING_RETRY_S) for peer, number in ((A, 1), (B, 2))]
    assert told(machine, Requested(A, 4, 100)) == [Refuse(A, 4, "leaving", upload.LEAVING_RETRY_S)]
    assert told(machine, Requested(A, 5, 100, only_here=True)) == []
    assert not machine.idle
    assert told(machine, Ended(A, 0, 1.0)) == [Grant(B, 3, 0)]
    assert told(machine, Ended(B, 3, 1.0)) == [Grant(A, 5, 1)]
    assert told(machine, Ended(A, 5, 1.0)) == []
    assert machine.idle


def test_a_free_slot_goes_to_who_got_least() -> None:
    machine = Upload(slots=1)
    told(machine, *(Requested(GREEDY, number, 100) for number in range(4)), Requested(NodeId("modest"), 9, 100))
    order: list[str] = ["greedy"]
    done: upload.Event = Ended(GREEDY, 0, 1.0)
    while grants := told(machine, done):
        assert isinstance(grants[0], Grant)
        order.append(grants[0].peer)
        done = Ended(grants[0].peer, grants[0].transfer, 1.0)
    assert order == ["greedy", "modest", "greedy", "greedy", "greedy"]


@pytest.mark.parametrize("sources", [0, 1])
def test_who_comes_late_is_not_served_alone_until_it_has_caught_up(sources: int) -> None:
    machine = Upload(slots=1)
    told(machine, Requested(IDLE, 0, 1, sources), Ended(IDLE, 0, 0.01))
    for number in range(100):
        told(machine, Requested(OLD, number, 100, sources), Ended(OLD, number, 1.0))
    old, new = (
        [Requested(NodeId(peer), number, 100, sources) for number in range(100, 105)] for peer in ("old", "new")
    )
    told(machine, old[0], *new, old[1])
    ends = [Ended(NodeId(peer), number, 1.0) for peer, number in (("old", 100), ("new", 100), ("new", 101))]
    granted = [action.peer for action in told(machine, *ends)]
    assert "old" in granted, "it waits for a newcomer to get all that it has"
    assert "new" in granted


def test_no_peer_gets_a_second_slot_while_another_waits_for_a_first() -> None:
    """Else the slots of a seed fill with slow newcomers, and its link is idle."""
    machine = Upload(slots=3)
    told(machine, Requested(SLOW, 0, 1), Requested(SLOW, 1, 1), Requested(NodeId("quick"), 0, 1000))
    told(machine, Requested(SLOW, 2, 1), *(Requested(NodeId(peer), 0, 1000) for peer in ("late", "later")))
    assert told(machine, Ended(NodeId("quick"), 0, 1.0)) == [Grant(LATE, 0, 0)]
    assert told(machine, Ended(LATE, 0, 1.0)) == [Grant(NodeId("later"), 0, 0)]
    assert told(machine, Ended(SLOW, 0, 9.0)) == [Grant(SLOW, 2, 2)], "when nobody waits the link must not be idle"


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
    told(machine, Requested(STAYS, 0, 100), Ended(STAYS, 0, 1.0))
    told(machine, Requested(QUITS, 0, 1 << 30), Ended(QUITS, 0, 2.0, whole=False))
    told(machine, Requested(OTHER, 0, 1), *(Requested(STAYS, number, 100) for number in range(1, 4)))
    told(machine, Requested(QUITS, 1, 100))
    ends = [Ended(OTHER, 0, 0.1), Ended(STAYS, 1, 0.5), Ended(STAYS, 2, 0.6)]
    assert [action.peer for action in told(machine, *ends)] == ["stays", "stays", "quits"], "200 bytes after 150"


def test_does_no_peer_wait_for_ever_for_one_that_always_quits() -> None:
    machine = Upload(slots=1)
    told(machine, *(Requested(QUITS, number, 100) for number in range(3)), Requested(STAYS, 0, 100))
    assert told(machine, Ended(QUITS, 0, 1.0, whole=False)) == [Grant(STAYS, 0, 0)]


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
        return Requested(NodeId(peer), next(numbers), 100, wants[peer].sources, wants[peer].pace)

    for peer in wants:
        told(machine, *(ask(peer) for _ in range(3)))
    got: Counter[str] = Counter()
    name, number = next(iter(wants)), 0
    for _ in range(rounds):
        (grant,) = told(machine, Ended(NodeId(name), number, wants[name].seconds))
        assert isinstance(grant, Grant)
        name, number = grant.peer, grant.transfer
        got[name] += 1
        told(machine, ask(name))
    return got


def test_slots_and_transfers_per_peer_are_limited() -> None:
    machine = Upload(slots=3)
    grants = told(machine, *(Requested(NodeId(peer), number, 1) for peer in "abc" for number in range(3)))
    assert grants == [Grant(A, 0, 0), Grant(A, 1, 1), Grant(B, 0, 0)]
    assert repr(machine) == "<Upload 3/3 slots | 6 waiting | 3 peers>"


def test_a_queue_that_is_full_refuses() -> None:
    machine = Upload(slots=1)
    most = 1 + upload.QUEUED_PER_PEER_MAX
    assert told(machine, *(Requested(A, number, 1) for number in range(most))) == [Grant(A, 0, 0)]
    assert told(machine, Requested(A, most, 1)) == [Refuse(A, most, "busy", upload.BUSY_RETRY_S)]


def test_a_cancelled_transfer_is_not_granted() -> None:
    machine = Upload(slots=1)
    told(machine, Requested(A, 0, 1), Requested(A, 1, 1), Requested(A, 2, 1))
    assert told(machine, Cancelled(A, 1)) == []
    assert told(machine, Ended(A, 0, 1.0)) == [Grant(A, 2, 1)]


def test_a_cancelled_transfer_on_the_wire_is_stopped_and_keeps_its_slot_until_it_has() -> None:
    machine = Upload(slots=1)
    told(machine, Requested(A, 0, 1), Requested(B, 0, 1))
    assert told(machine, Cancelled(A, 0)) == [Stop(A, 0)]
    assert told(machine, Ended(A, 0, 1.0)) == [Grant(B, 0, 0)]


def test_who_leaves_is_stopped_and_the_others_go_on() -> None:
    machine = Upload(slots=2)
    told(machine, *(Requested(A, number, 1) for number in range(4)), Requested(B, 0, 1))
    assert told(machine, upload.PeerLeft(A)) == [Stop(A, 0), Stop(A, 1), Grant(B, 0, 0)]
    assert told(machine, Ended(A, 0, 1.0), Ended(A, 1, 1.0), Cancelled(A, 2), upload.PeerLeft(A)) == []


@given(seed=st.integers(0, 2**32), slots=st.integers(1, 4))
@settings(max_examples=60)
def test_everything_asked_for_is_granted_once_and_in_order(seed: int, slots: int) -> None:
    machine, dice = Upload(slots=slots), random.Random(seed)
    wanted = {peer: list(range(dice.randrange(upload.QUEUED_PER_PEER_MAX))) for peer in "abcde"}
    ahead = {peer: iter(numbers) for peer, numbers in wanted.items()}
    active: list[Grant] = []
    granted: dict[str, list[int]] = {peer: [] for peer in wanted}
    for _ in range(1000):
        peer = dice.choice("abcde")
        number = next(ahead[peer], None)
        events: list[upload.Event] = [] if number is None else [Requested(NodeId(peer), number, dice.randrange(1, 100))]
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


def grants_of(actions: list[upload.Action]) -> Counter[str]:
    return Counter(action.peer for action in actions if isinstance(action, Grant))


def test_a_session_of_several_streams_gets_a_transfer_for_each() -> None:
    machine = Upload(slots=8)
    actions = told(machine, *(Requested(A, number, 1, streams=4) for number in range(8)))
    assert grants_of(actions) == {"a": 4}
    assert machine.active == upload.ACTIVE_PER_PEER_MAX
    assert grants_of(told(machine, Ended(A, 0, 1.0))) == {"a": 1}


def test_slots_are_shared_by_peers_and_not_by_streams() -> None:
    machine = Upload(slots=4)
    actions = told(machine, *(Requested(GREEDY, number, 1, streams=8) for number in range(16)))
    assert grants_of(actions) == {"greedy": 8}
    actions = told(machine, *(Requested(A, number, 1) for number in range(3)))
    assert grants_of(actions) == {"a": 2}  # at once: the further streams of another take no slots
    waiting = told(machine, Requested(B, 0, 1), Ended(GREEDY, 0, 1.0))
    assert grants_of(waiting) == {}  # while a peer waits for a slot, no further stream starts
    assert grants_of(told(machine, Ended(A, 0, 1.0))) == {"b": 1}
