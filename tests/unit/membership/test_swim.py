"""The gossip machine, by lists of events: what does `Swim` say, believe and refute?"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.content.manifest import Digest, ModelId
from swarm.errors import LocalProtocolError
from swarm.journal import Paused
from swarm.membership import config, swim
from swarm.membership.member_table import MemberTable, RumourQueue, SyncWalk, refute
from swarm.membership.swim import Swim
from swarm.membership.swim_events import (
    Action,
    AddressesChanged,
    Conflict,
    ContactFound,
    Event,
    Leave,
    MemberChanged,
    PacketReceived,
    ProfileChanged,
    Send,
    Tick,
)
from swarm.protocol import messages, packets
from swarm.protocol.messages import Address, NodeId
from swarm.protocol.packets import (
    Ack,
    Holding,
    Packet,
    Ping,
    PingRequest,
    Profile,
    Record,
    State,
    Status,
    Sync,
    SyncReply,
)

AT_2 = Address("at-2")

ME, ANN, BEN, CAT = (NodeId("0" * 15 + digit) for digit in "1234")
T = config.lan()


def record(
    node: str,
    *,
    incarnation: int = 0,
    state: State = State.ALIVE,
    version: int = 0,
    profile: Profile | None = None,
    address: str | None = None,
) -> Record:
    return Record(
        NodeId(node),
        incarnation,
        state,
        version,
        node[-1:],
        (Address(address or f"at-{node[-1:]}"),),
        profile or Profile(),
    )


def holding(chunks: int, *, of: int = 80, model_id: str = "org/model", digest: str = "a" * 64) -> Holding:
    return Holding(ModelId(model_id), Digest(digest), "checkpoint", chunks, of, chunks == of)


class Member:
    """The machine of `node`; every step is checked, and everything it says must fit into a datagram."""

    def __init__(self, *known: str, node: str = ME, profile: Profile | None = None, incarnation: int = 0) -> None:
        self.now = 100.0
        dice = random.Random(0)
        self.machine = Swim(
            NodeId(node),
            (Address(f"at-{node[-1]}"),),
            name="me",
            config=T,
            now=self.now,
            rng=dice,
            profile=profile,
            incarnation=incarnation,
        )
        if known:
            self.hear(*(record(node) for node in known))
            self.wait(0.0)

    def do(self, event: Event) -> list[Action]:
        actions = self.machine.handle(event, self.now)
        self.machine.check()
        for action in actions:
            if isinstance(action, Send):
                assert packets.decode(packets.encode(action.packet)) == action.packet
        return actions

    def get(self, packet: Packet, *, source: str = "at-2") -> list[Action]:
        return self.do(PacketReceived(Address(source), packet))

    def hear(self, *told: packets.Rumour) -> list[Action]:
        return self.get(packets.Gossip(NodeId("e" * 16), told))

    def wait(self, seconds: float) -> list[Action]:
        """Lets time pass tick by tick."""
        end, actions = self.now + seconds, list[Action]()
        while (wait_s := self.machine.wait_s(self.now)) <= end - self.now:
            self.now += max(wait_s, 1e-6)
            actions += self.do(Tick())
        self.now = end
        return actions

    def state_of(self, node: str) -> State | None:
        known = self.machine.member(NodeId(node))
        return known.state if known else None


def sent(actions: Iterable[Action], kind: type[Packet]) -> list[tuple[str, Packet]]:
    return [(a.address, a.packet) for a in actions if isinstance(a, Send) and isinstance(a.packet, kind)]


def told(actions: Iterable[Action], node: str) -> list[packets.Rumour]:
    """What was said of a node, in all packets."""
    sent_packets = [a.packet for a in actions if isinstance(a, Send)]
    return [
        r
        for p in sent_packets
        if isinstance(p, Ping | Ack | PingRequest | packets.Gossip)
        for r in p.rumours
        if r.node == node
    ]


def changes(actions: Iterable[Action]) -> list[tuple[str, State]]:
    return [(a.record.node, a.record.state) for a in actions if isinstance(a, MemberChanged)]


# Probes


def test_a_member_is_probed_every_period_and_an_ack_settles_it() -> None:
    me = Member(ANN)
    for _ in range(5):
        [(address, ping)] = sent(me.wait(T.probe_interval_s), Ping)
        assert isinstance(ping, Ping)
        assert (address, ping.target) == ("at-2", ANN)
        me.get(Ack(ping.sequence, ANN, ()))
    assert me.state_of(ANN) is State.ALIVE


def test_members_are_probed_in_turn() -> None:
    me = Member(ANN, BEN, CAT)
    probed = []
    for _ in range(6):
        [(_, ping)] = sent(me.wait(T.probe_interval_s), Ping)
        assert isinstance(ping, Ping)
        probed.append(ping.target)
        me.get(Ack(ping.sequence, ping.target, ()))
    assert set(probed[:3]) == set(probed[3:]) == {ANN, BEN, CAT}


def test_silence_leads_to_others_being_asked_then_to_suspicion_then_to_death() -> None:
    me = Member(ANN, BEN, CAT)
    [(_, ping)] = sent(me.wait(T.probe_interval_s), Ping)
    assert isinstance(ping, Ping)
    asked = sent(me.wait(T.probe_timeout_s), PingRequest)
    assert {address for address, _ in asked} == {"at-2", "at-3", "at-4"} - {f"at-{ping.target[-1]}"}
    assert me.state_of(ping.target) is State.ALIVE
    assert (ping.target, State.SUSPECT) in changes(me.wait(T.probe_interval_s))
    me.wait(T.suspicion_s(4) * 0.8)
    assert me.state_of(ping.target) is State.SUSPECT
    actions = me.wait(T.suspicion_s(4) * 0.2 + 0.01)
    assert (ping.target, State.DEAD) in changes(actions)
    assert told(actions + me.wait(1.0), ping.target)


@pytest.mark.parametrize("wrong", ["sequence", "sender"])
def test_an_ack_of_something_else_settles_nothing(wrong: str) -> None:
    me = Member(ANN, BEN)
    [(_, ping)] = sent(me.wait(T.probe_interval_s), Ping)
    assert isinstance(ping, Ping)
    other = BEN if ping.target == ANN else ANN
    me.get(Ack(ping.sequence + 1, ping.target, ()) if wrong == "sequence" else Ack(ping.sequence, other, ()))
    me.wait(T.probe_interval_s)
    assert me.state_of(ping.target) is State.SUSPECT


def test_a_ping_for_another_member_is_sent_and_its_ack_passed_on() -> None:
    me = Member(ANN, BEN)
    [(address, ping)] = sent(me.get(PingRequest(77, ANN, BEN, ())), Ping)
    assert isinstance(ping, Ping)
    assert address == "at-3"
    assert sent(me.get(Ack(ping.sequence, BEN, ()), source="at-3"), Ack) == [("at-2", Ack(77, BEN, ()))]
    assert sent(me.get(Ack(ping.sequence, BEN, ()), source="at-3"), Ack) == []


def test_a_stranger_is_not_pinged_for_anybody() -> None:
    assert sent(Member(ANN).get(PingRequest(1, ANN, CAT, ())), Ping) == []


def test_a_ping_for_the_process_that_had_this_port_before_is_not_answered() -> None:
    me = Member(ANN)
    assert sent(me.get(Ping(5, ANN, CAT, ())), Ack) == []
    assert [packet.sequence for _, packet in sent(me.get(Ping(6, ANN, ME, ())), Ack) if isinstance(packet, Ack)] == [6]


def test_who_gets_no_acks_grows_patient_with_others() -> None:
    me = Member(*(f"{number:016x}" for number in range(2, 40)))

    def probes(seconds: float) -> int:
        return len({p.sequence for _, p in sent(me.wait(seconds), PingRequest) if isinstance(p, PingRequest)})

    assert probes(20.0) > 2 * probes(20.0) > 0


def test_a_suspect_is_asked_again_before_it_is_declared_dead() -> None:
    me = Member(ANN, BEN, CAT)
    me.hear(Status(BEN, 4, State.SUSPECT, 0))
    pings = [p for _, p in sent(me.wait(2 * T.probe_interval_s), Ping) if isinstance(p, Ping) and p.target == BEN]
    assert len(pings) == 2
    assert all(Status(BEN, 4, State.SUSPECT, 0) in ping.rumours for ping in pings)


def test_an_ack_says_how_its_sender_is_even_when_nothing_is_new() -> None:
    me = Member(incarnation=5)
    [(_, ack)] = sent(me.get(Ping(1, ANN, ME, ())), Ack)
    assert isinstance(ack, Ack)
    assert ack.rumours == (Status(ME, 5, State.ALIVE, 0),)


# Suspicion and refutation


def test_a_suspect_refutes_with_its_next_incarnation() -> None:
    me = Member(ANN)
    me.hear(Status(ANN, 0, State.SUSPECT, 0))
    assert me.state_of(ANN) is State.SUSPECT
    me.hear(Status(ANN, 0, State.ALIVE, 0))
    assert me.state_of(ANN) is State.SUSPECT
    me.hear(Status(ANN, 1, State.ALIVE, 0))
    me.wait(0.9)
    assert me.state_of(ANN) is State.ALIVE


@pytest.mark.parametrize("state", [State.SUSPECT, State.DEAD, State.LEFT])
def test_this_node_refutes_at_once_and_tells_so_in_the_ack(state: State) -> None:
    me = Member(ANN, incarnation=3)
    [(_, ack)] = sent(me.get(Ping(1, ANN, ME, (Status(ME, 3, state, 0),))), Ack)
    assert isinstance(ack, Ack)
    assert Status(ME, 4, State.ALIVE, 0) in ack.rumours


LAST = packets.VERSIONS - 1


@pytest.mark.parametrize("state", [State.SUSPECT, State.DEAD, State.LEFT])
@pytest.mark.parametrize("claimed", [LAST, LAST // 2, LAST // 2 + 1, 1 << 40])
def test_no_incarnation_is_too_late_to_be_refuted(claimed: int, state: State) -> None:
    """A rumour with the last incarnation that there is would be the last word about a member."""
    me, other = Member(ANN), Member(ME, ANN, node=BEN)
    for accused in (claimed, (claimed + 5) % packets.VERSIONS):
        rumour = Status(ME, accused, state, 0)
        other.hear(rumour)
        me.hear(rumour)
        other.hear(me.machine.own.status)
        assert other.state_of(ME) is State.ALIVE


def test_no_version_is_too_late_for_new_contents() -> None:
    me, other = Member(ANN), Member(ME, node=BEN)
    for claimed in (LAST // 2, LAST - 1):
        false = record(ME, incarnation=claimed, version=claimed, address="elsewhere")
        other.hear(false)
        me.hear(false)
        other.hear(me.machine.own)
        assert other.machine.member(ME) == me.machine.own
    assert (me.machine.own.address, me.machine.own.version) == ("at-1", LAST)
    me.do(ProfileChanged(Profile(host="h")))
    news = [rumour for rumour in told(me.wait(20.0), ME) if isinstance(rumour, Record)]
    other.hear(*news)
    assert news
    assert other.machine.member(ME) == me.machine.own
    assert me.machine.own.profile.host == "h"


def test_that_a_member_leaves_is_told_at_once() -> None:
    me = Member(ANN)
    me.do(ProfileChanged(Profile(host="a")))
    me.wait(0.3)
    me.do(ProfileChanged(Profile(host="b")))
    assert me.machine.own.profile.host == "a", "profiles are told now and then"
    me.do(ProfileChanged(Profile(host="b", leaving=True)))
    assert me.machine.own.profile.leaving
    assert any(isinstance(rumour, Record) and rumour.profile.leaving for rumour in told(me.wait(0.3), ME))


@given(st.integers(0, LAST), st.lists(st.integers(0, LAST), max_size=4))
def test_the_next_number_comes_after_all_that_were_claimed_one_after_the_other(own: int, claims: list[int]) -> None:
    for claim in claims:
        following = packets.next_after(own, claim)
        assert packets.is_newer(following, own)
        if packets.is_newer(claim, own):
            assert packets.is_newer(following, claim)
        own = following


def test_an_old_accusation_is_not_worth_an_answer() -> None:
    me = Member(ANN, incarnation=3)
    me.hear(Status(ME, 2, State.DEAD, 0))
    assert me.machine.own.incarnation == 3


def test_a_suspect_hears_of_it_in_every_ping() -> None:
    me = Member(ANN)
    me.hear(Status(ANN, 0, State.SUSPECT, 0))
    for _ in range(3):
        [(_, ping)] = sent(me.wait(T.probe_interval_s), Ping)
        assert isinstance(ping, Ping)
        assert Status(ANN, 0, State.SUSPECT, 0) in ping.rumours
        me.get(Ack(ping.sequence, ANN, ()))


def test_a_late_rumour_does_not_revive_the_dead() -> None:
    me = Member(ANN, BEN)
    me.hear(Status(BEN, 0, State.DEAD, 0))
    assert changes(me.hear(record(BEN, version=1))) == [(BEN, State.DEAD)]  # news of it, and it stays dead
    assert [member.node for member in me.machine.members()] == [ANN]


def test_the_dead_are_forgotten_in_the_end() -> None:
    me = Member(ANN)
    me.hear(Status(ANN, 0, State.DEAD, 0))
    me.wait(T.dead_memory_s - 10)
    assert me.state_of(ANN) is State.DEAD
    me.wait(20.0)
    assert me.state_of(ANN) is None


def test_a_tombstone_is_not_taken_from_others() -> None:
    me = Member(ANN)
    me.hear(record(BEN, state=State.DEAD), Status(CAT, 0, State.DEAD, 0))
    assert me.state_of(BEN) is None
    assert me.state_of(CAT) is None


def test_a_comparison_makes_a_suspect_of_a_member_that_others_think_dead() -> None:
    me = Member(ANN, BEN)
    me.get(Sync(1, record(ANN), packets.ID_FIRST, packets.ID_LAST, (Status(BEN, 0, State.DEAD, 0),)))
    assert me.state_of(BEN) is State.SUSPECT
    me = Member(ANN, BEN)
    me.get(SyncReply(1, ANN, (record(BEN, state=State.DEAD),), (), None))
    assert me.state_of(BEN) is State.SUSPECT


def test_who_left_is_told_of_and_never_suspected() -> None:
    me = Member(ANN, BEN)
    actions = me.hear(Status(BEN, 0, State.LEFT, 0))
    assert changes(actions) == [(BEN, State.LEFT)]
    assert Status(BEN, 0, State.LEFT, 0) in told(actions + me.wait(1.0), BEN)


def test_leaving_says_goodbye_and_then_nothing() -> None:
    me = Member(ANN, BEN)
    goodbyes = sent(me.do(Leave()), packets.Gossip)
    assert sorted(address for address, _ in goodbyes) == ["at-2", "at-3"]
    assert all(Status(ME, 0, State.LEFT, 0) in p.rumours for _, p in goodbyes if isinstance(p, packets.Gossip))
    assert me.get(Ping(1, ANN, ME, ())) == []
    assert me.machine.wait_s(me.now) == math.inf


# Coming back


def test_a_process_that_comes_back_under_its_id_overrules_what_it_said_before() -> None:
    me = Member()
    me.get(SyncReply(1, ANN, (record(ME, incarnation=5, version=17, address="old"),), (), None))
    own = me.machine.own
    assert (own.incarnation, own.version, own.address) == (6, 18, "at-1")


def test_who_comes_back_with_the_same_numbers_is_told_of_the_contradiction() -> None:
    me = Member(BEN)
    news = sent(
        me.get(Sync(1, record(BEN, address="new"), packets.ID_FIRST, packets.ID_LAST, ()), source="new"), SyncReply
    )
    assert record(BEN) in [r for _, packet in news if isinstance(packet, SyncReply) for r in packet.records]
    own = refute(record(BEN, address="new"), record(BEN))
    assert own
    assert (own.incarnation, own.version, own.address) == (1, 1, "new")


def test_a_living_twin_is_reported() -> None:
    me, found = Member(ANN), list[Action]()
    for number in range(1, 5):
        twin = record(ME, incarnation=10 * number, version=10 * number, address="elsewhere")
        found += [action for action in me.hear(twin) if isinstance(action, Conflict)]
    assert found == [Conflict(Address("elsewhere"))]


def test_two_nodes_on_one_host_are_two() -> None:
    me = Member()
    me.hear(record(ANN, address="10.0.0.1:7000"), record(BEN, address="10.0.0.1:7001"))
    assert len(me.machine.members()) == 2


# Clocks


@pytest.mark.parametrize("leap_s", [3600.0, -3600.0, 86_400.0 * 365])
def test_a_leap_of_the_clock_blames_no_member(leap_s: float) -> None:
    me = Member(ANN, BEN, CAT)
    me.hear(Status(BEN, 0, State.SUSPECT, 0))
    me.wait(T.probe_interval_s)
    me.now += leap_s
    actions = me.do(Tick())
    assert changes(actions) == []
    assert sent(actions, Sync), "it asks at once what it missed"
    assert me.machine.wait_s(me.now) <= T.probe_interval_s
    me.wait(T.probe_interval_s * 0.9)
    assert me.state_of(ANN) is me.state_of(CAT) is State.ALIVE


def test_after_a_pause_a_suspect_has_its_time_again() -> None:
    me = Member(ANN, BEN, CAT)
    me.hear(Status(BEN, 0, State.SUSPECT, 0))
    suspicion_s = T.suspicion_s(4)
    me.wait(0.9 * suspicion_s)
    actions = me.do(Paused(40.0))
    assert changes(actions) == []
    assert sent(actions, Sync), "it asks at once what it missed"
    me.wait(0.9 * suspicion_s)
    assert me.state_of(BEN) is State.SUSPECT
    me.wait(0.2 * suspicion_s)
    assert me.state_of(BEN) is State.DEAD


def test_time_goes_on_after_the_clock_went_back() -> None:
    me = Member(ANN)
    me.now -= 50.0
    assert sent(me.wait(3.0), Ping)


# Rumours


def test_news_is_told_a_bounded_number_of_times() -> None:
    me = Member(ANN, BEN, CAT)
    me.wait(2.0)
    actions = me.hear(Status(BEN, 3, State.ALIVE, 0))
    times = [r for r in told(actions + me.wait(30.0), BEN) if r == Status(BEN, 3, State.ALIVE, 0)]
    assert len(times) == T.retransmits(4)


def test_spread_prefers_what_was_sent_least_and_then_the_newest() -> None:
    spread = RumourQueue()
    old, new = Status(ANN, 1, State.ALIVE, 0), Status(BEN, 1, State.ALIVE, 0)
    room = packets.size(old)
    spread.put(old)
    spread.put(new)
    assert [spread.take(room, times=2) for _ in range(5)] == [[new], [old], [old], [new], []]
    assert not spread


def test_spread_replaces_older_news_of_a_member() -> None:
    spread = RumourQueue()
    for incarnation in range(5):
        spread.put(Status(ANN, incarnation, State.ALIVE, 0))
    assert spread.take(1000, times=1) == [Status(ANN, 4, State.ALIVE, 0)]
    assert not spread


def test_progress_is_told_in_eighths() -> None:
    me = Member(ANN)
    versions = []
    for chunks in range(81):
        me.do(ProfileChanged(Profile((holding(chunks),))))
        me.wait(3.0)
        versions.append(me.machine.own.version)
    assert versions[-1] == 1 + 1 + 8  # nothing, something, and each eighth
    assert me.machine.own.profile.artifacts[0].chunks == 80


def test_profiles_are_told_the_more_rarely_the_more_members_there_are() -> None:
    def told_in_a_minute(members: int) -> int:
        me = Member(*(f"{number:016x}" for number in range(2, 2 + members)))
        before = me.machine.own.version
        for number in range(600):
            me.do(ProfileChanged(Profile((holding(80 * (number % 2)),))))
            me.wait(0.1)
        return me.machine.own.version - before

    assert told_in_a_minute(100) * 4 < told_in_a_minute(3) <= 61


# Comparing


def test_a_newcomer_asks_the_members_it_was_told_of_until_one_answers() -> None:
    me = Member()
    assert [address for address, _ in sent(me.do(ContactFound(AT_2)), Sync)] == ["at-2"]
    assert [address for address, _ in sent(me.wait(T.probe_interval_s), Sync)] == ["at-2"]


def test_a_newcomer_learns_of_everyone_from_one_member() -> None:
    many = [f"{number:016x}" for number in range(3, 400)]
    ann, me = Member(*many, node=ANN), Member()
    inbox = [(ann, packet) for _, packet in sent(me.do(ContactFound(AT_2)), Sync)]
    bursts = []
    while inbox:
        to, packet = inbox.pop(0)
        source, other = ("at-1", me) if to is ann else ("at-2", ann)
        back = [a.packet for a in to.get(packet, source=source) if isinstance(a, Send) and a.address == source]
        inbox += [(other, answer) for answer in back if isinstance(answer, Sync | SyncReply)]
        bursts.append(len(back))
    assert {member.node for member in me.machine.members()} == {ANN, *many}
    assert ann.state_of(ME) is State.ALIVE
    assert max(bursts) <= swim.REPLIES_MAX + 1


def test_a_comparison_brings_both_to_the_later_view() -> None:
    me = Member(ANN, BEN, CAT)
    me.hear(record(BEN, version=2))
    theirs = (
        Status(BEN, 0, State.ALIVE, 1),
        Status(CAT, 0, State.ALIVE, 7),
        Status(NodeId("9" * 16), 0, State.ALIVE, 0),
    )
    news = [p for _, p in sent(me.get(Sync(1, record(ANN), packets.ID_FIRST, packets.ID_LAST, theirs)), SyncReply)]
    records = [r for packet in news if isinstance(packet, SyncReply) for r in packet.records]
    assert {r.node for r in records} == {ME, BEN}
    assert [packet.wants for packet in news if isinstance(packet, SyncReply) and packet.wants] == [(CAT, "9" * 16)]
    assert [packet.until for packet in news if isinstance(packet, SyncReply)][-1] == packets.ID_LAST


def test_wants_are_answered() -> None:
    me = Member(ANN, BEN)
    [(address, packet)] = [
        (a, p)
        for a, p in sent(me.get(SyncReply(1, ANN, (), (BEN, ME, NodeId("9" * 16)), None), source="x"), packets.Gossip)
        if a == "x"
    ]
    assert isinstance(packet, packets.Gossip)
    assert {r.node for r in packet.rumours} >= {BEN, ME}
    assert address == "x"


def test_a_walk_ignores_answers_that_lead_nowhere() -> None:
    walk = SyncWalk()
    walk.asked(7, BEN)
    assert not walk.settled(8, BEN)
    assert not walk.settled(7, CAT)
    assert walk.cursor == packets.ID_FIRST
    assert walk.settled(7, ANN)
    assert walk.cursor == BEN
    assert not walk.settled(7, ANN)


def test_the_lost_are_asked_so_that_a_partition_can_heal() -> None:
    me = Member(ANN, BEN)
    me.hear(Status(BEN, 0, State.DEAD, 0))
    asked = {address for address, _ in sent(me.wait(3 * T.sync_interval_s), Sync)}
    assert "at-3" in asked
    me = Member(ANN, BEN)
    me.hear(Status(BEN, 0, State.LEFT, 0))
    assert "at-3" not in {address for address, _ in sent(me.wait(3 * T.sync_interval_s), Sync)}


# The view


RUMOURS = st.builds(
    lambda node, incarnation, state, version, full: (
        record(node, incarnation=incarnation, state=state, version=version, profile=Profile(omitted=version))
        if full
        else Status(node, incarnation, state, version)
    ),
    st.sampled_from([ANN, BEN]),
    st.integers(0, 3),
    st.sampled_from(State),
    st.integers(0, 3),
    st.booleans(),
)


@given(st.lists(RUMOURS, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_rumours_does_not_matter(heard: list[packets.Rumour], dice: random.Random) -> None:
    def view(order: list[packets.Rumour]) -> list[Record]:
        roster = MemberTable(rng=random.Random(0))
        for rumour in [record(ANN), record(BEN), *order]:
            roster.merge(rumour)
            roster.check()
        return roster.records()

    shuffled = [*heard, *heard]
    dice.shuffle(shuffled)
    assert view(heard) == view(shuffled)


@given(st.lists(st.tuples(RUMOURS, st.floats(0, 3)), max_size=30))
def test_the_machine_survives_whatever_is_said(heard: list[tuple[packets.Rumour, float]]) -> None:
    me = Member(ANN, BEN)
    for rumour, pause_s in heard:
        me.hear(rumour, msgspec.structs.replace(rumour, node=ME))
        me.wait(pause_s)
    assert me.machine.own.state is State.ALIVE


def test_what_is_no_event_raises() -> None:
    with pytest.raises(LocalProtocolError):
        Member().do("tick")  # type: ignore[arg-type]


def test_says_repr_how_things_are() -> None:
    me = Member(ANN, BEN, CAT)
    me.hear(Status(CAT, 0, State.DEAD, 0), Status(BEN, 0, State.SUSPECT, 0))
    me.wait(0.0)
    assert repr(me.machine).startswith("<Swim me alive 0 | 2 members | 1 suspect | 1 dead | ")


# Limits and presets


def test_a_member_with_too_much_to_tell_leaves_some_out_and_says_so() -> None:
    all_of_it = Profile(tuple(holding(80, model_id="m" * 256, digest=f"{n:064x}") for n in range(40)))
    me = Member(ANN, profile=all_of_it)
    own = me.machine.own
    assert own.profile.omitted + len(own.profile.artifacts) == 40
    assert packets.size(own) <= packets.RECORD_BYTES_MAX
    me.do(ProfileChanged(Profile((*all_of_it.artifacts, holding(1)), transports=("tcp",))))
    records = [r for r in told(me.wait(10.0), ME) if isinstance(r, Record)]
    assert records, "the longest record still finds room in a datagram"


def test_the_longest_names_fit() -> None:
    long = "\U0001f600" * 100
    profile = Profile(
        (), 0, tuple(f"{'x' * 15}{c}" for c in "abcdefgh"), long, long, 1 << 31, 1 << 31, "9" * packets.SOFTWARE_MAX
    )
    machine = Swim(
        NodeId("f" * 16),
        (Address("[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255]:65535"),) * messages.ADDRESSES_OWN_MAX,
        name=long,
        config=T,
        now=0.0,
        rng=random.Random(0),
        profile=profile,
    )
    assert packets.size(machine.own) <= packets.RECORD_BYTES_MAX
    assert len(packets.encode(Sync(1 << 31, machine.own, ANN, BEN, ()))) <= packets.DATAGRAM_BYTES_MAX


def test_presets_differ_as_their_networks_do() -> None:
    for patient, hasty in itertools.pairwise([config.wan(), config.lan(), config.local()]):
        assert patient.probe_interval_s > hasty.probe_interval_s
        assert patient.suspicion_s(32) > hasty.suspicion_s(32)
    for preset in (config.wan(), config.lan(), config.local()):
        assert preset.probe_timeout_s < preset.probe_interval_s


NEAR, FAR_AWAY = Address("10.0.0.2:1"), Address("[fd00::2]:1")


def test_a_member_with_several_addresses_is_pinged_at_each_until_it_answers_at_one() -> None:
    me = Member()
    me.hear(packets.replace(record(ANN), addresses=(NEAR, FAR_AWAY)))
    pings = sent(me.wait(2 * T.probe_interval_s), Ping)
    assert {address for address, _ in pings} == {NEAR, FAR_AWAY}
    for _, ping in pings:
        assert packets.size(ping) < 100, "little goes to addresses that were only told"
    (last,) = {ping for _, ping in pings[-2:] if isinstance(ping, Ping)}
    me.get(Ack(last.sequence, ANN, ()), source=FAR_AWAY)
    assert sent(me.wait(2 * T.probe_interval_s), Ping)[0][0] == FAR_AWAY


def test_a_member_whose_addresses_are_of_no_use_counts_once_it_was_heard() -> None:
    me = Member()
    me.machine._usable = lambda addresses: ()
    me.hear(record(ANN))
    assert me.state_of(ANN) is None
    me.get(Sync(1, record(ANN), packets.ID_FIRST, packets.ID_LAST, ()), source=NEAR)
    assert me.state_of(ANN) is State.ALIVE
    assert {address for address, _ in sent(me.wait(2 * T.probe_interval_s), Ping)} == {NEAR}


def test_new_addresses_of_this_node_are_told() -> None:
    me = Member(ANN)
    me.do(AddressesChanged((NEAR,)))
    (said,) = {r for r in told(me.wait(1.0), ME) if isinstance(r, Record)}
    assert (said.addresses, said.version) == ((NEAR,), 1)
