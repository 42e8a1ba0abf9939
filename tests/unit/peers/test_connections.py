"""The connections machine, by lists of events: which addresses are dialled, which links dropped?"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.content.manifest import Digest, ModelId
from swarm.errors import LocalProtocolError
from swarm.journal import Paused
from swarm.peers import connections, selection
from swarm.peers.connections import (
    AddressDiscovered,
    AddressesShared,
    Connections,
    Dial,
    DialFailed,
    Drop,
    LinkDown,
    LinkUp,
    MemberUpdated,
    ShareNodes,
    Wanted,
    Welcome,
)
from swarm.protocol.messages import NODES_MAX, Address, NodeId
from swarm.protocol.packets import Holding, Profile, Record, State

A_1 = Address("a:1")
ALIAS_1 = Address("alias:1")
B_1 = Address("b:1")
C_1 = Address("c:1")
E_1 = Address("e:1")
M3_1 = Address("m3:1")
ME_1 = Address("me:1")
SEED_1 = Address("seed:1")
STRANGER_1 = Address("stranger:1")

SMALL, BIG = NodeId("1" * 16), NodeId("2" * 16)


def found(address: Address, lasting: bool) -> AddressDiscovered:
    return AddressDiscovered((address,), lasting)


def shared(addresses: Iterable[Address]) -> AddressesShared:
    return AddressesShared(tuple((address,) for address in addresses))


def up(
    link: int,
    node: NodeId,
    address: Address,
    dialled: Address | None = None,
    holds: Mapping[Digest, bool] | None = None,
) -> LinkUp:
    """A link to a node that tells one address."""
    reached = dict.fromkeys([*([dialled] if dialled else []), address])
    return LinkUp(link, node, tuple(reached), dialled, holds or {}, (address,))


def updated(record: Record) -> MemberUpdated:
    return MemberUpdated(record, record.addresses)


def dial(address: Address) -> Dial:
    return Dial((address,))


def welcome(link: int, addresses: tuple[Address, ...]) -> Welcome:
    return Welcome(link, tuple((address,) for address in addresses))


class Knows:
    """The membership machine of one node; every step is checked."""

    def __init__(self, node: str = SMALL, *, host: str = "") -> None:
        self.machine = Connections(NodeId(node), rng=random.Random(1), host=host)
        self.now = 0.0

    def tell(self, event: connections.Event, *, at: float | None = None) -> list[connections.Action]:
        self.now = self.now if at is None else at
        actions = self.machine.handle(event, self.now)
        self.machine.check()
        return actions


def test_a_found_address_is_dialled_once() -> None:
    knows = Knows()
    assert knows.tell(found(B_1, True)) == [dial(B_1)]
    assert knows.tell(found(B_1, False)) == []
    assert knows.tell(connections.Tick(), at=60.0) == []
    assert knows.machine.unanswered() == ["b:1"]


def test_an_address_that_fails_is_tried_less_and_less_often() -> None:
    knows, pauses = Knows(), []
    knows.tell(found(B_1, True))
    for _ in range(8):
        knows.tell(DialFailed(B_1))
        began = knows.now
        while not knows.tell(connections.Tick(), at=knows.now + 0.25):
            pass
        pauses.append(knows.now - began)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]
    assert knows.machine.tried() == ["b:1: no answer (tried 8 times)"]


def test_after_a_pause_an_address_that_failed_is_dialled_at_once() -> None:
    knows = Knows()
    knows.tell(found(B_1, True))
    for number in range(8):
        knows.tell(DialFailed(B_1), at=100.0 * number)
        knows.tell(connections.Tick(), at=100.0 * number + 50.0)
    knows.tell(DialFailed(B_1))
    assert knows.tell(connections.Tick(), at=knows.now + 1.0) == []
    assert knows.tell(Paused(60.0)) == [dial(B_1)]


@pytest.mark.parametrize("lasting", [True, False])
def test_only_what_was_given_by_hand_is_never_forgotten(lasting: bool) -> None:
    knows = Knows()
    knows.tell(found(B_1, lasting))
    for number in range(1, connections.FAILURES_MAX + 1):
        knows.tell(DialFailed(B_1), at=100.0 * number)
        knows.tell(connections.Tick(), at=100.0 * number + 50.0)
    assert bool(knows.machine.tried()) is lasting


@pytest.mark.parametrize("small_hears_first", ["own", "other"])
@pytest.mark.parametrize("big_hears_first", ["own", "other"])
def test_both_ends_keep_the_same_one_of_two_links(small_hears_first: str, big_hears_first: str) -> None:
    kept = {}
    for node, other, first in ((SMALL, BIG, small_hears_first), (BIG, SMALL, big_hears_first)):
        knows = Knows(node)
        own = up(1, NodeId(other), Address(f"{other}:1"), dialled=Address(f"{other}:1"))
        theirs = up(2, NodeId(other), Address(f"{other}:1"), dialled=None)
        events = [own, theirs] if first == "own" else [theirs, own]
        actions = [action for event in events for action in knows.tell(event)]
        (dropped,) = [action.link for action in actions if isinstance(action, Drop)]
        kept[node] = "small dialled" if (dropped == 2) == (node == SMALL) else "big dialled"
    assert kept == {SMALL: "small dialled", BIG: "small dialled"}


def test_of_two_links_that_the_same_end_dialled_the_newer_stays() -> None:
    knows = Knows()
    knows.tell(up(1, BIG, B_1, dialled=None))
    assert knows.tell(up(2, BIG, B_1, dialled=None)) == [
        Drop(1, "another link is open"),
        welcome(2, ()),
    ]
    assert knows.tell(LinkDown(1)) == []
    assert repr(knows.machine) == "<Connections 11111111 1 links | 1 addresses | 0 members>"


def test_a_second_address_of_a_linked_node_is_not_dialled_again_and_again() -> None:
    knows = Knows(BIG)
    knows.tell(found(ALIAS_1, True))
    assert knows.tell(up(1, SMALL, A_1, dialled=None)) == [welcome(1, ())]
    assert knows.tell(up(2, SMALL, A_1, dialled=ALIAS_1)) == [Drop(2, "another link is open")]
    assert knows.tell(connections.Tick(), at=60.0) == []
    assert knows.tell(LinkDown(2)) == []
    assert knows.tell(LinkDown(1)) == []
    assert set(knows.tell(connections.Tick(), at=61.0)) == {dial(A_1), dial(ALIAS_1)}


def test_the_own_address_is_dialled_once_and_never_again() -> None:
    knows = Knows()
    knows.tell(found(ME_1, True))
    assert knows.tell(up(1, SMALL, Address("10.0.0.1:1"), dialled=ME_1)) == [Drop(1, "this is myself")]
    assert knows.tell(shared((ME_1,))) == []
    assert knows.tell(found(ME_1, True)) == []


def test_a_stranger_cannot_have_an_address_taken_for_the_own_one() -> None:
    knows = Knows()
    knows.tell(found(SEED_1, True))
    knows.tell(DialFailed(SEED_1))
    assert knows.tell(up(1, SMALL, SEED_1, dialled=None)) == [Drop(1, "this is myself")]
    assert knows.tell(connections.Tick(), at=60.0) == [dial(SEED_1)]


def test_the_own_addresses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "OWN_MAX", 2)
    knows = Knows()
    for number, address in enumerate(("me:1", "me:2", "me:3")):
        knows.tell(up(number, SMALL, ME_1, dialled=Address(address)))
    assert knows.tell(shared((Address("me:3"), Address("me:2")))) == []
    assert knows.tell(shared((ME_1,))) == [dial(ME_1)]


def test_a_claimed_address_keeps_no_node_from_dialling_what_was_given_by_hand() -> None:
    knows = Knows()
    knows.tell(found(SEED_1, True))
    knows.tell(DialFailed(SEED_1))
    knows.tell(up(1, BIG, SEED_1, dialled=None))
    assert knows.tell(connections.Tick(), at=0.4) == []
    knows.tell(LinkDown(1))
    assert knows.tell(up(2, BIG, SEED_1, dialled=None), at=0.5) == [welcome(2, ()), dial(SEED_1)]


def test_a_claimed_address_that_was_not_given_by_hand_is_not_dialled() -> None:
    knows = Knows()
    knows.tell(up(1, BIG, B_1, dialled=None))
    assert knows.tell(shared((B_1,)), at=60.0) == []


def test_who_hangs_up_at_once_is_dialled_less_and_less_often_until_a_link_lasts() -> None:
    knows, pauses = Knows(), []
    knows.tell(found(B_1, False))
    for number in range(8):
        knows.tell(up(number, BIG, B_1, dialled=B_1))
        knows.tell(LinkDown(number), at=knows.now + connections.BRIEF_S / 2)
        began = knows.now
        while not knows.tell(connections.Tick(), at=knows.now + 0.25):
            pass
        pauses.append(knows.now - began)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0]
    assert knows.machine.tried() == ["b:1: hung up at once, 8 times"]
    assert knows.machine.unanswered() == []
    knows.tell(up(9, BIG, B_1, dialled=B_1))
    knows.tell(LinkDown(9), at=knows.now + connections.BRIEF_S)
    assert knows.machine.tried() == ["b:1: not connected just now"]
    assert knows.tell(connections.Tick(), at=knows.now + connections.RETRY_FIRST_S) == [dial(B_1)]


def test_a_link_that_gives_way_to_its_twin_has_not_failed() -> None:
    knows = Knows(BIG)
    knows.tell(up(1, SMALL, A_1, dialled=A_1))
    knows.tell(up(2, SMALL, A_1, dialled=None))
    knows.tell(LinkDown(1))
    knows.tell(LinkDown(2))
    assert knows.machine.tried() == ["a:1: not connected just now"]


def test_an_address_that_fails_for_days_is_still_dialled() -> None:
    knows = Knows()
    knows.tell(found(B_1, True))
    for number in range(2000):
        knows.tell(DialFailed(B_1), at=100.0 * number)
        assert knows.tell(connections.Tick(), at=100.0 * number + 50.0) == [dial(B_1)]


def test_a_lost_link_is_dialled_again_after_a_moment() -> None:
    knows = Knows()
    knows.tell(up(1, BIG, B_1, dialled=None))
    assert knows.tell(LinkDown(1)) == []
    assert knows.tell(connections.Tick(), at=connections.RETRY_FIRST_S) == [dial(B_1)]


def test_one_address_is_enough_to_hear_of_the_others() -> None:
    knows = Knows()
    for number, name in enumerate("bcd"):
        actions = knows.tell(up(number, NodeId(name * 16), Address(f"{name}:1"), dialled=None))
    assert actions == [welcome(2, (B_1, C_1))]
    assert knows.tell(shared((E_1, B_1))) == [dial(E_1)]


def test_links_and_addresses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LINKS_MAX", 1)
    monkeypatch.setattr(connections, "KNOWN_MAX", 2)
    knows = Knows()
    knows.tell(up(1, BIG, B_1, dialled=None))
    assert knows.tell(up(2, NodeId("3" * 16), C_1, dialled=None)) == [Drop(2, "too many links")]
    assert knows.tell(shared((Address("d:1"), E_1, Address("f:1")))) == []
    assert repr(knows.machine) == "<Connections 11111111 1 links | 2 addresses | 0 members>"


def record(number: int, *, state: State = State.ALIVE, chunks: int | None = None, host: str = "") -> Record:
    """A member of a large swarm that holds so many of 8 chunks, or nothing; its address is `mN:1`."""
    artifacts = () if chunks is None else (Holding(ModelId("org/model"), DIGEST, "checkpoint", chunks, 8, chunks == 8),)
    node = f"{0x30 + number:016x}"
    return Record(NodeId(node), 0, state, 0, f"m{number}", (Address(f"m{number}:1"),), Profile(artifacts, host=host))


DIGEST = Digest("ab" * 32)
WANT = Wanted(frozenset({DIGEST}))


def large(knows: Knows, *, holding: int = 40, seeds: int = 1, host: str = "", near: int = 0) -> None:
    """Gossip knows of 60 members: `holding` have half, `seeds` of them all, and `near` of them are on this host."""
    for number in range(60):
        chunks = None if number >= holding else 8 if number < seeds else 4
        knows.tell(updated(record(number, chunks=chunks, host=host if number < near else "elsewhere")))


def drops(actions: list[connections.Action]) -> list[str]:
    return [action.why for action in actions if isinstance(action, Drop)]


def dialled(actions: list[connections.Action]) -> list[int]:
    return sorted(int(action.addresses[0][1:-2]) for action in actions if isinstance(action, Dial))


def linked(
    knows: Knows, numbers: list[int], *, by: str | None = "dialled", chunks: int = 4
) -> list[connections.Action]:
    actions = []
    for number in numbers:
        address = Address(f"m{number}:1")
        holds = {DIGEST: chunks == 8} if chunks else {}
        link = up(number, record(number).node, address, address if by else None, holds)
        actions += knows.tell(link)
    return actions


def test_in_a_small_swarm_every_member_that_gossip_names_is_dialled() -> None:
    knows = Knows()
    for number in range(selection.LINKS_WANTED):
        assert knows.tell(updated(record(number))) == []
    assert dialled(knows.tell(connections.Tick())) == list(range(selection.LINKS_WANTED))
    assert knows.tell(connections.Tick(), at=60.0) == []


def test_in_a_large_swarm_no_member_that_wants_nothing_is_dialled() -> None:
    knows = Knows()
    large(knows)
    assert knows.tell(connections.Tick(), at=60.0) == []
    assert knows.tell(found(M3_1, False)) == []
    assert dialled(knows.tell(found(M3_1, True))) == [3], "but those given by hand are"


def test_an_address_that_gossip_does_not_know_is_dialled_as_if_there_were_none() -> None:
    knows = Knows()
    large(knows)
    assert knows.tell(found(STRANGER_1, False)) == [dial(STRANGER_1)]


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


def test_a_newcomer_is_full_to_members_but_not_to_strangers_that_gossip_may_not_reach() -> None:
    knows = Knows()
    large(knows)
    knows.tell(WANT)
    assert not drops(linked(knows, list(range(selection.LINKS_FULL)), by=None))
    assert drops(linked(knows, [50], by=None)) == ["full while it fetches"]
    assert not drops(knows.tell(up(99, NodeId("f" * 16), STRANGER_1, None, {})))
    knows.tell(Wanted(frozenset()))
    assert not drops(linked(knows, [51], by=None)), "who has everything takes more"


def test_two_fetches_have_links_for_each() -> None:
    knows = Knows()
    large(knows)
    knows.tell(WANT)
    linked(knows, dialled(knows.tell(connections.Tick(), at=1.0)))
    other = "cd" * 32
    holding = (Holding(ModelId("org/other"), Digest(other), "checkpoint", 8, 8, True),)
    alone = record(200)
    knows.tell(updated(Record(alone.node, 0, State.ALIVE, 0, "m200", (Address("m200:1"),), Profile(holding))))
    assert dialled(knows.tell(Wanted(frozenset({DIGEST, Digest(other)})))) == [200]


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
        knows.tell(found(Address(f"m{number}:1"), False))
    linked(knows, useless, chunks=0)
    linked(knows, [59], by=None, chunks=0)
    large(knows)
    actions = knows.tell(WANT)
    assert {action.link for action in actions if isinstance(action, Drop)} == set(useless), "not who dialled in"
    assert len(dialled(actions)) == selection.LINKS_FIRST + 1, "the seed"


def test_links_of_no_use_to_either_end_close_after_a_while() -> None:
    knows = Knows()
    large(knows, seeds=40)
    chosen = dialled(knows.tell(WANT))
    linked(knows, chosen[1:], chunks=8)
    linked(knows, chosen[:1], chunks=4)
    knows.tell(found(Address(f"m{chosen[1]}:1"), True))
    knows.tell(Wanted(frozenset()))
    assert knows.tell(connections.Tick(), at=connections.IDLE_S / 2) == []
    ended = [
        action.link for action in knows.tell(connections.Tick(), at=connections.IDLE_S) if isinstance(action, Drop)
    ]
    assert ended == chosen[2:], "but for who still fetches, and who was given by hand"
    assert knows.tell(connections.Tick(), at=2 * connections.IDLE_S) == []


def test_the_dead_are_dropped_and_not_dialled() -> None:
    knows = Knows()
    knows.tell(updated(record(1)))
    knows.tell(connections.Tick())
    linked(knows, [1])
    assert knows.tell(updated(record(1, state=State.SUSPECT))) == []
    assert knows.tell(updated(record(1, state=State.DEAD))) == [Drop(1, "gossip says that it is dead")]
    assert knows.tell(LinkDown(1)) == []
    assert knows.tell(connections.Tick(), at=60.0) == []
    knows.tell(updated(record(1)))
    assert dialled(knows.tell(connections.Tick())) == [1]


def test_where_datagrams_do_not_get_through_every_member_is_dialled() -> None:
    knows = Knows()
    knows.tell(up(99, BIG, B_1, dialled=None))
    told = shared(tuple(Address(f"m{number}:1") for number in range(40)))
    assert len(dialled(knows.tell(told))) == selection.LINKS_MOST
    assert len(dialled(knows.tell(connections.Tick(), at=connections.GOSSIP_LATE_S))) == 40 - selection.LINKS_MOST


def test_a_member_that_holds_more_than_it_could_say_is_asked_for_what_no_other_is_known_to_hold() -> None:
    knows = Knows()
    large(knows, holding=0)
    full = record(5)
    profile = Profile(omitted=3)
    knows.tell(updated(Record(full.node, 0, State.ALIVE, 1, full.name, full.addresses, profile)))
    assert dialled(knows.tell(Wanted(frozenset(), unresolved=True))) == [5]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_whatever_happens_the_links_are_few(seed: int) -> None:
    knows, dice, open_ = Knows(host="here"), random.Random(seed), dict[str, int]()
    dialling: list[str] = []
    for step in range(300):
        number = dice.randrange(80)
        somebody = record(number, chunks=dice.choice([None, 4, 8]), host=dice.choice(["here", "there"]))
        events: list[connections.Event] = [
            connections.Tick(),
            WANT,
            Wanted(frozenset()),
            updated(somebody),
            updated(record(number, state=State.DEAD)),
            found(somebody.address, dice.random() < 0.1),
            up(1000 + step, somebody.node, somebody.address, None),
        ]
        if dialling and dice.random() < 0.5:
            address = dialling.pop(dice.randrange(len(dialling)))
            answer = up(
                step, record(int(address[1:-2])).node, Address(address), Address(address), {DIGEST: dice.random() < 0.5}
            )
            events = [DialFailed(Address(address)), answer]
        elif open_ and dice.random() < 0.2:
            events = [LinkDown(open_.pop(dice.choice(list(open_))))]
        event = dice.choice(events)
        actions = knows.tell(event, at=knows.now + dice.random())
        if isinstance(event, LinkUp):
            open_[event.node] = event.link
        dialling += [action.addresses[0] for action in actions if isinstance(action, Dial)]


def test_a_membership_refuses_what_is_no_event() -> None:
    with pytest.raises(LocalProtocolError, match="cannot handle"):
        Knows().machine.handle("hello", 0.0)  # type: ignore[arg-type]


def test_members_with_ever_new_artifacts_leave_nothing_behind() -> None:
    knows = Knows()
    for number in range(2000):
        held = Holding(ModelId("m"), Digest(f"{number:064x}"), "checkpoint", 4, 4, True)
        profile = Profile((held,), 0, ("tcp",))
        record = Record(NodeId("4" * 16), 0, State.ALIVE, number, "m", (Address(f"h:{number + 1}"),), profile)
        knows.tell(updated(record))
        knows.tell(connections.Tick(), at=knows.now + 1.0)
    assert len(knows.machine._seeds) == 1
    assert len(knows.machine._known) <= connections.KNOWN_MAX


TWO = (Address("10.0.0.1:1"), Address("[fd00::1]:1"))


def test_a_node_with_several_addresses_is_one_dial() -> None:
    knows = Knows()
    assert knows.tell(AddressDiscovered(TWO, False)) == [Dial(TWO)]
    assert knows.tell(AddressDiscovered(TWO, False)) == []
    assert knows.machine.unanswered() == [TWO[0]]
    reached = LinkUp(1, BIG, (TWO[1], TWO[0]), dialled=TWO[0])
    assert knows.tell(reached) == [Welcome(1, ())]
    assert knows.machine.tried() == []
    assert knows.tell(connections.Tick(), at=60.0) == []


def test_an_address_of_a_node_that_leads_to_this_one_is_left_out_of_the_next_dial() -> None:
    knows = Knows()
    knows.tell(AddressDiscovered(TWO, False))
    assert knows.tell(LinkUp(1, SMALL, (TWO[1],), dialled=TWO[0])) == [Drop(1, "this is myself"), Dial(TWO[:1])]


def test_a_node_that_can_only_dial_is_welcome_and_never_dialled() -> None:
    knows = Knows()
    assert knows.tell(LinkUp(1, BIG, (), dialled=None)) == [Welcome(1, ())]
    assert knows.tell(LinkDown(1), at=60.0) == []
    assert knows.tell(connections.Tick(), at=120.0) == []


def test_a_node_that_gossip_does_not_reach_is_told_of_later_nodes() -> None:
    knows = Knows()
    knows.tell(LinkUp(1, BIG, (), dialled=None))
    knows.tell(up(2, NodeId("3" * 16), B_1))
    assert ShareNodes(1, ((B_1,),)) in knows.tell(connections.Tick(), at=connections.GOSSIP_LATE_S)
    assert not [a for a in knows.tell(connections.Tick(), at=60.0) if a == ShareNodes(1, ((B_1,),))], "once"


def test_members_are_shared_with_nodes_that_gossip_does_not_reach_alone() -> None:
    knows = Knows()
    large(knows, holding=NODES_MAX)
    (told,) = [a for a in knows.tell(LinkUp(1, BIG, (), dialled=None)) if isinstance(a, Welcome)]
    assert len(told.nodes) == min(60, NODES_MAX)
    (told,) = [a for a in knows.tell(up(2, record(1).node, Address("m1:1"))) if isinstance(a, Welcome)]
    assert told.nodes == ()


def test_told_addresses_do_not_make_a_scanner() -> None:
    knows, dialled_addresses = Knows(), 0
    for second in range(30):
        for number in range(64):
            told = tuple(Address(f"10.{second}.{number}.{host}:22") for host in range(8))
            actions = knows.tell(AddressesShared((told,)), at=float(second))
            dials = [action for action in actions if isinstance(action, Dial)]
            dialled_addresses += sum(len(action.addresses) for action in dials)
            for action in dials:
                actions = knows.tell(DialFailed(action.addresses[0]))
                dialled_addresses += sum(len(a.addresses) for a in actions if isinstance(a, Dial))
    most = connections.STRANGE_BURST + 30 * connections.STRANGE_PER_S
    assert dialled_addresses <= most + 8 * connections.LINKS_MAX


def test_it_is_known_when_only_a_user_can_change_that_no_node_answers() -> None:
    knows = Knows()
    assert knows.machine.alone
    assert not knows.machine.refused
    knows.tell(found(B_1, True))
    assert not knows.machine.alone
    assert not knows.machine.refused, "no answer yet"
    knows.tell(DialFailed(B_1, "has another cluster key", final=True))
    assert knows.machine.refused
    assert knows.machine.tried() == ["b:1: has another cluster key"]
    knows.tell(found(C_1, True))
    assert not knows.machine.refused, "another one may answer"
    knows.tell(DialFailed(C_1, "no program listens there"))
    assert not knows.machine.refused, "it may just be starting"
