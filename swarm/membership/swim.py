"""The membership of a node as a state machine: SWIM with Lifeguard's extensions, and memberlist's anti-entropy.

Das, Gupta, Motivala 2002 (SWIM); Dadgar, Phillips, Currey 2017 (Lifeguard). docs/gossip.md has formats and times.

In every period the node pings one member, in turn. Without an Ack in time `indirect_probes` other members ping it too;
without any Ack it is suspect. A suspect has `suspicion_mult * log10(n + 1)` periods to refute that with a greater
incarnation; then it is declared dead. Rumours travel on probes and in Gossip; each receiver passes a rumour on
`retransmit_mult * log10(n + 1)` times. Sync finds the records that rumours missed: it walks the ring of node ids, a
window at a time.

           no Ack, direct or not           no refutation
    ALIVE ───────────────────────> SUSPECT ──────────────> DEAD ──> forgotten
      ^  <──────────────────────────┘                       │        after `dead_memory_s`
      └──────── greater incarnation, of the member ─────────┘

A member has several addresses, and may be reached at one of them only: where its packets come from, if it tells that
address or has answered there. Until then a Ping without rumours goes to each address. A member that tells no address of
use here is known once it was heard. So a made-up record makes a node send little to the addresses in it: rumours go to
members that were heard, as long as there are enough of them.

Only memory grows with the number of members: windows are bounded, and a member announces new profiles the more rarely
the more members there are. Time is the time between two events. When it leaps or goes back, or the caller says so
(`Paused`), this node slept: no member is suspected for that, and every suspect has its time again.

Must not know: sockets, clocks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from swarm.errors import LocalProtocolError
from swarm.journal import Paused
from swarm.membership.config import SwimConfig
from swarm.membership.member_table import MemberTable, RumourQueue, SyncWalk, refute
from swarm.membership.probes import Probe, Prober
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
from swarm.protocol import packets
from swarm.protocol.messages import Address, NodeId
from swarm.protocol.packets import (
    Ack,
    Packet,
    Ping,
    PingRequest,
    Profile,
    Record,
    Rumour,
    State,
    Status,
    Sync,
    SyncReply,
)

LEAP_PERIODS = 5  # probe periods; a longer step between two events was sleep
CONTACTS_MAX = 64  # addresses to join by; discovery repeats itself, so the oldest may go
REPLIES_MAX = 8  # datagrams in an answer: the smallest receive buffers hold them
SAMPLED = 2  # members drawn for one that gets rumours: so that those that were heard are usually enough
LEAVE_FANOUT = 8  # members that get the goodbye directly; some of 8 datagrams arrive
CONFLICTS_MAX = 3  # records of an earlier process with this id end after one or two; those of a live node do not


class Swim:
    """The members as node `node` knows them. Others send datagrams to one of `addresses`.

    `usable`: the addresses of a record that this node can send to, the best first.
    A process that reuses its earlier id may start at incarnation 0: it learns the later incarnation when it joins.
    """

    def __init__(
        self,
        node: NodeId,
        addresses: tuple[Address, ...],
        *,
        name: str,
        config: SwimConfig,
        now: float,
        rng: random.Random,
        profile: Profile | None = None,
        incarnation: int = 0,
        usable: Callable[[tuple[Address, ...]], tuple[Address, ...]] = lambda addresses: addresses,
    ) -> None:
        announced = packets.quantised(profile or Profile())
        record = Record(node, incarnation, State.ALIVE, 0, name[: packets.LABEL_MAX], addresses, announced)
        self._own = packets.fitted(record)
        self._config = config
        self._rng = rng
        self._members = MemberTable(rng=rng)
        self._rumours = RumourQueue()
        self._contacts: dict[Address, None] = {}
        self._usable = usable
        self._heard: dict[NodeId, Address] = {}  # where members are reached
        self._sources: dict[NodeId, Address] = {}  # where packets of members came from that do not tell that address
        self._actions: list[Action] = []
        self._conflicts = 0
        # `_clock`: the time that has passed, without sleep; `_seen_at`: the caller's time of the latest event.
        self._clock, self._seen_at = 0.0, now
        self._prober = Prober(config=config, clock=0.0, rng=rng)
        self._suspects: dict[NodeId, float] = {}  # time at which each is declared dead
        self._tombstones: dict[NodeId, float] = {}  # time at which each is forgotten
        self._gossip_at = 0.0
        self._sync_at = 0.0
        self._publish_at = math.inf
        self._quiet_until = 0.0
        self._pending = announced
        self._walk = SyncWalk()

    def handle(self, event: Event, now: float) -> list[Action]:
        """Applies an event and returns the actions that follow from it. `now`: seconds; it may go back."""
        if self._own.state is State.LEFT:
            return []
        self._pass_time(now)
        match event:
            case Paused():
                self._start_again()
            case ContactFound(address):
                self._add_contact(address)
            case PacketReceived(source, packet):
                self._receive(source, packet)
            case ProfileChanged(profile):
                self._change_profile(profile)
            case AddressesChanged(addresses):
                self._own = packets.replace(self._own, addresses=addresses)
                self._change_profile(self._pending)
                self._publish()
            case Leave():
                self._leave()
                return self._done()
            case Tick():
                pass
            case _:
                raise LocalProtocolError(f"swim cannot handle {event!r}")
        self._act_on_time()
        return self._done()

    def wait_s(self, now: float) -> float:
        """Seconds until the next Tick is due; at most a probe period, or the machine would take the wait for sleep."""
        if self._own.state is State.LEFT:
            return math.inf
        gossip_at = self._gossip_at if self._rumours and len(self._members) else math.inf
        times = (self._prober.due_at(), gossip_at, self._sync_at, self._publish_at, *self._suspects.values())
        return max(0.0, min(min(times) - self._clock - (now - self._seen_at), self._config.probe_interval_s))

    def __len__(self) -> int:
        """The number of other members that are alive or suspect."""
        return len(self._members)

    @property
    def own(self) -> Record:
        """The record of this node."""
        return self._own

    @property
    def joined(self) -> bool:
        """Whether the whole ring of ids was compared once."""
        return self._walk.whole

    def members(self) -> list[Record]:
        """All other members that are alive or suspect, by id."""
        return [record for record in self._members.records() if record.state < State.DEAD]

    def member(self, node: NodeId) -> Record | None:
        """The record of another member, alive or dead; None if it is unknown or forgotten."""
        return self._members.get(node)

    # Time

    def _pass_time(self, now: float) -> None:
        passed = now - self._seen_at
        self._seen_at = now
        if 0 <= passed <= LEAP_PERIODS * self._config.probe_interval_s:
            self._clock += passed
            return
        self._start_again()

    def _start_again(self) -> None:
        """The node slept: Acks and refutations may be lost, and other members may have declared this node dead."""
        self._prober.reset(self._clock)
        self._walk, self._sync_at = SyncWalk(), self._clock
        for node in self._suspects:
            self._suspects[node] = self._clock + self._config.suspicion_s(len(self._members) + 1)

    def _act_on_time(self) -> None:
        if probe := self._prober.overdue(self._clock):
            self._probe_indirectly(probe)
        if self._prober.ended(self._clock):
            self._end_period()
        for node in [node for node, until in self._suspects.items() if self._clock >= until]:
            suspect = self._members.get(node)
            if suspect is None:
                raise LocalProtocolError(f"{self!r}: {node} is suspected and unknown")
            self._merge(Status(node, suspect.incarnation, State.DEAD, suspect.version))
        if self._clock >= self._sync_at:
            self._begin_sync()
        if self._clock >= self._publish_at:
            self._publish()
        if self._clock >= self._gossip_at and self._rumours:
            self._gossip_at = self._clock + self._config.gossip_interval_s
            for member in self._sample(self._config.gossip_fanout):
                if rumours := self._rumours_for(member.node):
                    self._send_to(member, packets.Gossip(self._own.node, rumours))

    # Probes

    def _end_period(self) -> None:
        target = self._prober.failed()
        if target and self._usable(target.addresses):
            self._heard.pop(target.node, None)  # it may have moved: all its addresses are tried
        if target and (known := self._members.get(target.node)) and known.state is State.ALIVE:
            self._merge(Status(known.node, known.incarnation, State.SUSPECT, known.version))
        if probe := self._prober.begin(self._members.next_to_probe(), self._clock):
            self._ping(probe.sequence, probe.target)
        # The suspicion or its refutation may be lost: the suspects next to be declared dead are pinged again.
        for node in sorted(self._suspects, key=self._suspects.__getitem__)[: self._config.indirect_probes]:
            if (suspect := self._members.get(node)) and not (probe and probe.target.node == node):
                self._ping(self._rng.getrandbits(32), suspect)
        for node in [node for node, until in self._tombstones.items() if self._clock >= until]:
            del self._tombstones[node]
            self._members.forget(node)

    def _ping(self, sequence: int, target: Record) -> None:
        if target.node in self._heard:
            self._send_to(target, Ping(sequence, self._own.node, target.node, self._rumours_for(target.node)))
            return
        accused = () if target.state is State.ALIVE else (target.status,)  # it can refute that only if it hears of it
        source = self._sources.get(target.node)
        for address in dict.fromkeys([*self._usable(target.addresses), *([source] if source else [])]):
            self._send(address, Ping(sequence, self._own.node, target.node, accused))

    def _send_to(self, member: Record, packet: Packet) -> None:
        if address := self._place(member):
            self._send(address, packet)

    def _place(self, member: Record) -> Address | None:
        """Where to send more than a Ping: where the member is reached, else a random address of it."""
        if heard := self._heard.get(member.node):
            return heard
        usable = self._usable(member.addresses)
        return self._rng.choice(usable) if usable else None

    def _sample(self, count: int) -> list[Record]:
        """Random living members, those first that were heard."""
        found = self._members.sample(SAMPLED * count)
        return sorted(found, key=lambda member: member.node not in self._heard)[:count]

    def _probe_indirectly(self, probe: Probe) -> None:
        for member in self._members.sample(self._config.indirect_probes, but=probe.target.node):
            rumours = self._rumours_for(member.node)
            self._send_to(member, PingRequest(probe.sequence, self._own.node, probe.target.node, rumours))

    def _ping_for(self, source: Address, request: PingRequest) -> None:
        # Only members are pinged: a stranger must not direct this node's datagrams to an address.
        target = self._members.get(request.target)
        if target and (sequence := self._prober.relay(source, request, self._clock)) is not None:
            self._ping(sequence, target)

    # Received packets

    def _receive(self, source: Address, packet: Packet) -> None:
        if packet.sender == self._own.node and not isinstance(packet, Sync):
            return  # this node at another address, or another node with this id, which a Sync will show
        if isinstance(packet, Sync):
            self._answer(source, packet)
            return
        self._hear(packet.sender, source, answer=isinstance(packet, Ack))
        if isinstance(packet, SyncReply):
            self._receive_reply(source, packet)
            return
        for rumour in packet.rumours:
            self._merge(rumour)
        match packet:
            case Ping(sequence, sender, target) if target == self._own.node:
                rumours = (self._own.status, *self._rumours_for(sender))  # the status ends a suspicion of the sender
                self._send(source, Ack(sequence, self._own.node, rumours))
            case PingRequest():
                self._ping_for(source, packet)
            case Ack():
                if relay := self._prober.acknowledged(packet):
                    self._send(relay.address, Ack(relay.sequence, packet.sender, ()))

    def _hear(self, node: NodeId, source: Address, *, answer: bool = False) -> None:
        """A packet of a member came from this address. It counts if the member tells it, or answers a Ping there.

        An Ack that another member passes on comes from an address that was not pinged.
        """
        member = self._members.get(node)
        if member is None or member.state >= State.DEAD:
            return
        if source in member.addresses or (answer and self._sources.get(node) == source and node not in self._heard):
            self._heard[node] = source
        elif not answer:
            self._sources[node] = source

    def _introduce(self, record: Record, source: Address) -> None:
        """Merges the record that a member sent about itself: it is reached at least where that came from."""
        if not self._usable(record.addresses):
            self._heard[record.node] = source
        self._merge(record)
        known = self._members.get(record.node)
        if known is None or known.state >= State.DEAD:
            self._heard.pop(record.node, None)

    def _merge(self, rumour: Rumour, *, pass_on: bool = True) -> None:
        """Merges a rumour, queues it if it is news, and sets the deadlines that depend on it."""
        if rumour.node == self._own.node:
            self._refute(rumour)
            return
        if isinstance(rumour, Record) and not self._is_reachable(rumour):
            return
        before = self._members.get(rumour.node)
        after = self._members.merge(rumour)
        if after is None:
            return
        if pass_on:
            self._rumours.put(after if before is None or after.version != before.version else after.status)
        if before is None or (before.state, before.incarnation) != (after.state, after.incarnation):
            self._suspects.pop(after.node, None)
            self._tombstones.pop(after.node, None)
            if after.state is State.SUSPECT:
                self._suspects[after.node] = self._clock + self._config.suspicion_s(len(self._members) + 1)
            elif after.state >= State.DEAD:
                self._tombstones[after.node] = self._clock + self._config.dead_memory_s
                self._heard.pop(after.node, None)
                self._sources.pop(after.node, None)
        if after.state < State.DEAD and (before is None or before.state >= State.DEAD):
            # In a burst of newcomers, or when a partition heals, rumours miss some members: compare more often.
            self._walk.hurry()
            self._sync_at = min(self._sync_at, self._clock + self._config.probe_interval_s)
        if before is None or before.state is not after.state or before.version != after.version:
            self._actions.append(MemberChanged(after))

    def _is_reachable(self, record: Record) -> bool:
        known = record.node in self._heard or self._members.get(record.node) is not None
        return known or bool(self._usable(record.addresses))

    def _refute(self, rumour: Rumour) -> None:
        """Refutes a wrong rumour about this node, of another member or of an earlier process with its id."""
        refuted = refute(self._own, rumour)
        if refuted is None:
            return
        if rumour.state is not State.ALIVE:
            self._prober.add_doubt(1)
        elif isinstance(rumour, Record):
            self._conflicts += 1
            if self._conflicts == CONFLICTS_MAX:
                self._actions.append(Conflict(rumour.address))
        self._rumours.put(refuted.status if refuted.version == self._own.version else refuted)
        self._own = refuted

    def _rumours_for(self, node: NodeId) -> tuple[Rumour, ...]:
        """The rumours that fit into a datagram. A suspect gets its own status first, to refute it."""
        room_bytes = packets.DATAGRAM_BYTES_MAX - packets.PACKET_HEAD_BYTES
        first: list[Rumour] = []
        if (known := self._members.get(node)) and known.state is not State.ALIVE:
            first.append(known.status)
        times = self._config.retransmits(len(self._members) + 1)
        return (*first, *self._rumours.take(room_bytes, times=times))

    # Anti-entropy

    def _add_contact(self, address: Address) -> None:
        if address not in self._own.addresses:
            self._contacts.pop(address, None)
            self._contacts[address] = None
            if len(self._contacts) > CONTACTS_MAX:
                del self._contacts[next(iter(self._contacts))]
            if not self._walk.whole:
                self._sync_at = min(self._sync_at, self._clock)

    def _begin_sync(self) -> None:
        """Compares a window with a member, and with a lost member or contact that may be beyond a partition."""
        hurry = self._walk.hurried or not len(self._members)
        interval_s = self._config.probe_interval_s if hurry else self._config.sync_interval_s
        self._sync_at = self._clock + interval_s
        if beyond := self._beyond():
            self._sync(self._rng.choice(beyond))
        for member in self._members.sample(1):  # the walk waits for the last answer, which is the more likely
            if address := self._place(member):
                self._sync(address)

    def _beyond(self) -> list[Address]:
        members = self.members()
        here = {address for member in members for address in member.addresses} | set(self._heard.values())
        addresses = [address for member in self._members.lost() for address in self._usable(member.addresses)]
        return [address for address in (*addresses, *self._contacts) if address not in here]

    def _sync(self, address: Address) -> None:
        sequence, first = self._rng.getrandbits(32), self._walk.cursor
        last, statuses = self._members.window(first, room_bytes=packets.SYNC_BYTES - packets.size(self._own))
        self._walk.asked(sequence, last)
        self._send(address, Sync(sequence, self._own, first, last, statuses))

    def _answer(self, source: Address, sync: Sync) -> None:
        if sync.sender == self._own.node:
            self._refute(sync.record)
            return
        known = self._members.get(sync.sender)
        # A wrong record of the sender is returned: only the sender can refute it.
        contradiction = (known,) if known and refute(sync.record, known) else ()
        self._introduce(sync.record, source)
        self._hear(sync.sender, source)
        lacking, wants = self._members.compare(sync, own=self._own)
        for status in sync.statuses:
            self._merge(self._members.softened(status))
        if wants or contradiction:
            self._send(source, SyncReply(sync.sequence, self._own.node, contradiction, wants, None))
        parts = packets.batches(lacking) or [()]
        for number, part in enumerate(parts[:REPLIES_MAX], start=1):
            until = sync.last if number == len(parts) else part[-1].node if number == REPLIES_MAX else None
            self._send(source, SyncReply(sync.sequence, self._own.node, part, (), until))

    def _receive_reply(self, source: Address, reply: SyncReply) -> None:
        for record in reply.records:
            if record.node == reply.sender:
                self._introduce(record, source)
            self._merge(self._members.softened(record), pass_on=self._walk.whole)
        wanted = [self._own if node == self._own.node else self._members.get(node) for node in reply.wants]
        for part in packets.batches(record for record in wanted if record)[:REPLIES_MAX]:
            self._send(source, packets.Gossip(self._own.node, part))
        if reply.until and self._walk.settled(reply.sequence, reply.until):
            self._sync(source)

    # Announcements

    def _change_profile(self, profile: Profile) -> None:
        self._pending = packets.fitted(packets.replace(self._own, profile=packets.quantised(profile))).profile
        at = self._clock if profile.leaving else self._quiet_until
        self._publish_at = math.inf if self._pending == self._own.profile else at

    def _publish(self) -> None:
        # Jitter: members that start together would announce together for ever.
        quiet_s = self._config.between_profiles_s(len(self._members) + 1) * self._rng.uniform(0.75, 1.25)
        self._publish_at, self._quiet_until = math.inf, self._clock + quiet_s
        self._own = packets.replace(self._own, version=packets.next_after(self._own.version), profile=self._pending)
        self._rumours.put(self._own)

    def _leave(self) -> None:
        self._own = packets.replace(self._own, state=State.LEFT)
        for member in self._members.sample(LEAVE_FANOUT):
            self._send_to(member, packets.Gossip(self._own.node, (self._own.status,)))

    def _send(self, address: Address, packet: Packet) -> None:
        self._actions.append(Send(address, packet))

    def _done(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold."""
        self._members.check()
        records = self._members.records()
        if set(self._suspects) != {record.node for record in records if record.state is State.SUSPECT}:
            raise LocalProtocolError(f"{self!r}: the deadlines are not those of the suspects")
        if set(self._tombstones) != {record.node for record in records if record.state >= State.DEAD}:
            raise LocalProtocolError(f"{self!r}: the tombstones are not the dead members")
        if self._members.get(self._own.node) or self._own.state not in (State.ALIVE, State.LEFT):
            raise LocalProtocolError(f"{self!r}: its own record is among the others, or dead")
        if not (self._heard.keys() | self._sources.keys()) <= {record.node for record in records}:
            raise LocalProtocolError(f"{self!r}: remembers where strangers were heard")
        if len(self._contacts) > CONTACTS_MAX or len(self._rumours) > 2 * len(records) + 2:
            raise LocalProtocolError(f"{self!r}: remembers too much")

    def __repr__(self) -> str:
        own, lost = self._own, len(self._members.lost())
        return (
            f"<Swim {own.name} {own.state.name.lower()} {own.incarnation} | {len(self._members)} members | "
            f"{len(self._suspects)} suspect | {lost} dead | {len(self._rumours)} rumours | doubt {self._prober.doubt}>"
        )
