"""Who is a member, how it is, and what it holds: SWIM as a state machine.

Every period one member is probed, in turn: Ping; no Ack in time: `indirect_probes` others are asked to try; still
none: it is suspected, everybody hears so, and it has `suspicion_mult * log10(n + 1)` periods to refute that by a
greater incarnation before it is declared dead. Rumours travel on the probes and in Gossip; each receiver tells one
`retransmit_mult * log10(n + 1)` times. What they miss is found by Sync: a walk along the ring of node ids, a window
at a time.

           no Ack, direct or not           nobody refutes
    ALIVE ───────────────────────> SUSPECT ──────────────> DEAD ──> forgotten
      ^  <──────────────────────────┘                       │        after `dead_memory_s`
      └─────── a greater incarnation, only by itself ───────┘

Nothing here grows with the number of members but memory: the windows are bounded, and members tell of new profiles the
more rarely the more there are. Time is what passes between two events; when it leaps or goes back, this node slept,
and nobody is blamed for that.

Must not know: sockets, clocks.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TypeAlias

from swarm.errors import LocalProtocolError
from swarm.membership.config import SwimConfig
from swarm.membership.member_table import MemberTable, RumourQueue, SyncWalk, refute
from swarm.membership.probes import Probe, Prober
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

LEAP_PERIODS = 5  # time that passes in one step of more than so many probe periods was slept
CONTACTS_MAX = 64  # addresses by which to join; discovery repeats itself, so the oldest may go
NEWS_MAX = 8  # datagrams in one answer: fits into the smallest receive buffers
LEAVE_FANOUT = 8  # members told of a goodbye directly; so many are not all lost
CONFLICTS_MAX = 3  # a predecessor with this node's id is outvoted once or twice; a living twin goes on


@dataclass(frozen=True)
class ContactFound:
    """Discovery names an address. It is asked for members, now and whenever no member is known there."""

    address: Address


@dataclass(frozen=True)
class PacketReceived:
    """A datagram arrived, from this address. `packets.decode` has accepted it."""

    source: Address
    packet: Packet


@dataclass(frozen=True)
class ProfileChanged:
    """This node holds, does or is something else now. Others hear of it in due time."""

    profile: Profile


@dataclass(frozen=True)
class Leave:
    """This node is about to end. It says goodbye, and is silent from then on."""


@dataclass(frozen=True)
class Tick:
    """`wait_s` is over."""


@dataclass(frozen=True)
class Send:
    """Send this packet as one datagram."""

    address: Address
    packet: Packet


@dataclass(frozen=True)
class MemberChanged:
    """A member is new, or in another state, or has another profile."""

    record: Record


@dataclass(frozen=True)
class Conflict:
    """Another living node uses this node's id: one of both must take another one."""

    address: Address


Event: TypeAlias = ContactFound | PacketReceived | ProfileChanged | Leave | Tick
Action: TypeAlias = Send | MemberChanged | Conflict


class Swim:
    """One member's view of all. `node` is its id, `address` where others send datagrams to.

    A process that comes back under an id it had before may start at incarnation 0: it learns the rest when it joins.
    """

    def __init__(
        self,
        node: NodeId,
        address: Address,
        *,
        name: str,
        config: SwimConfig,
        now: float,
        rng: random.Random,
        profile: Profile | None = None,
        incarnation: int = 0,
    ) -> None:
        told = packets.quantised(profile or Profile())
        record = Record(node, incarnation, State.ALIVE, 0, name[: packets.LABEL_MAX], address, told)
        self._own = packets.fitted(record)
        self._config = config
        self._rng = rng
        self._members = MemberTable(rng=rng)
        self._rumours = RumourQueue()
        self._contacts: dict[Address, None] = {}
        self._actions: list[Action] = []
        self._conflicts = 0
        # Time as it passes for this machine, from 0; `_told` is the caller's at its last event.
        self._clock, self._told = 0.0, now
        self._prober = Prober(config=config, clock=0.0, rng=rng)
        self._suspects: dict[NodeId, float] = {}  # when each is declared dead
        self._tombs: dict[NodeId, float] = {}  # when each is forgotten; in that order
        self._gossip_at = 0.0
        self._sync_at = 0.0
        self._publish_at = math.inf
        self._quiet_until = 0.0
        self._pending = told
        self._walk = SyncWalk()

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about one event, at `now` on a clock in seconds that should not go back, but may."""
        if self._own.state is State.LEFT:
            return []
        self._pass_time(now)
        match event:
            case ContactFound(address):
                self._found(address)
            case PacketReceived(source, packet):
                self._hear(source, packet)
            case ProfileChanged(profile):
                self._tell(profile)
            case Leave():
                self._leave()
                return self._done()
            case Tick():
                pass
            case _:
                raise LocalProtocolError(f"gossip cannot handle {event!r}")
        self._act_on_time()
        return self._done()

    def wait_s(self, now: float) -> float:
        """Seconds until the next Tick is due; at most a probe period, or this node would seem to have slept."""
        if self._own.state is State.LEFT:
            return math.inf
        gossip_at = self._gossip_at if self._rumours and len(self._members) else math.inf
        times = (self._prober.due_at(), gossip_at, self._sync_at, self._publish_at, *self._suspects.values())
        return max(0.0, min(min(times) - self._clock - (now - self._told), self._config.probe_interval_s))

    def __len__(self) -> int:
        """How many others are alive or suspect."""
        return len(self._members)

    @property
    def own(self) -> Record:
        """What this node says of itself."""
        return self._own

    @property
    def joined(self) -> bool:
        """Whether this node has compared the whole ring with others once."""
        return self._walk.whole

    def members(self) -> list[Record]:
        """Everybody else who is alive or suspect, by id."""
        return [record for record in self._members.records() if record.state < State.DEAD]

    def member(self, node: NodeId) -> Record | None:
        """One other member, be it dead, unless it is unknown or forgotten."""
        return self._members.get(node)

    # Time

    def _pass_time(self, now: float) -> None:
        passed = now - self._told
        self._told = now
        if 0 <= passed <= LEAP_PERIODS * self._config.probe_interval_s:
            self._clock += passed
            return
        # Asleep, stopped, or on a clock that was set: answers may be lost, and others may think this node dead.
        self._prober.void(self._clock)
        self._walk, self._sync_at = SyncWalk(), self._clock

    def _act_on_time(self) -> None:
        if probe := self._prober.late(self._clock):
            self._ask_others(probe)
        if self._prober.ended(self._clock):
            self._end_period()
        for node in [node for node, until in self._suspects.items() if self._clock >= until]:
            suspect = self._members.get(node)
            if suspect is None:
                raise LocalProtocolError(f"{self!r}: {node} is suspected and unknown")
            self._believe(Status(node, suspect.incarnation, State.DEAD, suspect.version))
        if self._clock >= self._sync_at:
            self._begin_sync()
        if self._clock >= self._publish_at:
            self._publish()
        if self._clock >= self._gossip_at and self._rumours:
            self._gossip_at = self._clock + self._config.gossip_interval_s
            for member in self._members.some(self._config.gossip_fanout):
                if told := self._rumours_for(member.node):
                    self._send(member.address, packets.Gossip(self._own.node, told))

    # Probes

    def _end_period(self) -> None:
        target = self._prober.failed()
        if target and (known := self._members.get(target.node)) and known.state is State.ALIVE:
            self._believe(Status(known.node, known.incarnation, State.SUSPECT, known.version))
        if probe := self._prober.begin(self._members.next_to_probe(), self._clock):
            self._ping(probe.sequence, probe.target)
        # One that was refuted may not have heard the refutation: those about to be declared dead are asked again.
        for node in sorted(self._suspects, key=self._suspects.__getitem__)[: self._config.indirect_probes]:
            if (suspect := self._members.get(node)) and not (probe and probe.target.node == node):
                self._ping(self._rng.getrandbits(32), suspect)
        for node in [node for node, until in self._tombs.items() if self._clock >= until]:
            del self._tombs[node]
            self._members.forget(node)

    def _ping(self, sequence: int, target: Record) -> None:
        self._send(target.address, Ping(sequence, self._own.node, target.node, self._rumours_for(target.node)))

    def _ask_others(self, probe: Probe) -> None:
        for member in self._members.some(self._config.indirect_probes, but=probe.target.node):
            told = self._rumours_for(member.node)
            self._send(member.address, PingRequest(probe.sequence, self._own.node, probe.target.node, told))

    def _ping_for(self, source: Address, request: PingRequest) -> None:
        # Only members are pinged: a stranger must not choose where this node's datagrams go.
        target = self._members.get(request.target)
        if target and (sequence := self._prober.relay(source, request, self._clock)) is not None:
            self._ping(sequence, target)

    # What others say

    def _hear(self, source: Address, packet: Packet) -> None:
        if packet.sender == self._own.node and not isinstance(packet, Sync):
            return  # this node under another address, or a twin, which a Sync will show
        if isinstance(packet, Sync):
            self._answer(source, packet)
            return
        if isinstance(packet, SyncReply):
            self._hear_news(source, packet)
            return
        for rumour in packet.rumours:
            self._believe(rumour)
        match packet:
            case Ping(sequence, sender, target) if target == self._own.node:
                told = (self._own.status, *self._rumours_for(sender))  # whoever doubted it needs nobody else
                self._send(source, Ack(sequence, self._own.node, told))
            case PingRequest():
                self._ping_for(source, packet)
            case Ack():
                if relay := self._prober.acknowledged(packet):
                    self._send(relay.address, Ack(relay.sequence, packet.sender, ()))

    def _believe(self, rumour: Rumour, *, pass_on: bool = True) -> None:
        """Merges one rumour, passes it on if it is news, and keeps the times that depend on it."""
        if rumour.node == self._own.node:
            self._hear_of_self(rumour)
            return
        before = self._members.get(rumour.node)
        after = self._members.merge(rumour)
        if after is None:
            return
        if before is None or after.version != before.version:
            news: Rumour = after
        else:
            news = after.status
        if pass_on:
            self._rumours.put(news)
        if before is None or (before.state, before.incarnation) != (after.state, after.incarnation):
            self._suspects.pop(after.node, None)
            self._tombs.pop(after.node, None)
            if after.state is State.SUSPECT:
                self._suspects[after.node] = self._clock + self._config.suspicion_s(len(self._members) + 1)
            elif after.state >= State.DEAD:
                self._tombs[after.node] = self._clock + self._config.dead_memory_s
        if after.state < State.DEAD and (before is None or before.state >= State.DEAD):
            # A burst of newcomers, or a partition that heals: rumours miss a few, so compare more often for a while.
            self._walk.hurry()
            self._sync_at = min(self._sync_at, self._clock + self._config.probe_interval_s)
        if before is None or before.state is not after.state or before.version != after.version:
            self._actions.append(MemberChanged(after))

    def _hear_of_self(self, rumour: Rumour) -> None:
        """Refutes what is wrong about this node: by others, or by a process that had its id before it."""
        refuted = refute(self._own, rumour)
        if refuted is None:
            return
        if rumour.state is not State.ALIVE:
            self._prober.weaken(1)
        elif isinstance(rumour, Record):
            self._conflicts += 1
            if self._conflicts == CONFLICTS_MAX:
                self._actions.append(Conflict(rumour.address))
        self._rumours.put(refuted.status if refuted.version == self._own.version else refuted)
        self._own = refuted

    def _rumours_for(self, node: NodeId) -> tuple[Rumour, ...]:
        """What a datagram to a member has room for. One that is doubted hears that first: it is the one to know."""
        room_bytes = packets.DATAGRAM_BYTES_MAX - packets.PACKET_HEAD_BYTES
        first: list[Rumour] = []
        if (known := self._members.get(node)) and known.state is not State.ALIVE:
            first.append(known.status)
        times = self._config.retransmits(len(self._members) + 1)
        return (*first, *self._rumours.take(room_bytes, times=times))

    # What rumours missed

    def _found(self, address: Address) -> None:
        if address != self._own.address:
            self._contacts.pop(address, None)
            self._contacts[address] = None
            if len(self._contacts) > CONTACTS_MAX:
                del self._contacts[next(iter(self._contacts))]
            if not self._walk.whole:
                self._sync_at = min(self._sync_at, self._clock)

    def _begin_sync(self) -> None:
        """Compares a window with a member, and with somebody who may live beyond a partition."""
        hurry = self._walk.hurried or not len(self._members)
        interval_s = self._config.probe_interval_s if hurry else self._config.sync_interval_s
        self._sync_at = self._clock + interval_s
        partners = [member.address for member in self._members.some(1)]
        if beyond := self._beyond():
            partners.insert(0, self._rng.choice(beyond))
        for address in partners:  # the walk waits for the last one's answer, which is the likelier one
            self._sync(address)

    def _beyond(self) -> list[Address]:
        here = {member.address for member in self.members()}
        addresses = [member.address for member in self._members.lost()]
        return [address for address in (*addresses, *self._contacts) if address not in here]

    def _sync(self, address: Address) -> None:
        sequence, first = self._rng.getrandbits(32), self._walk.cursor
        last, statuses = self._members.window(first, room_bytes=packets.SYNC_BYTES - packets.size(self._own))
        self._walk.asked(sequence, last)
        self._send(address, Sync(sequence, self._own, first, last, statuses))

    def _answer(self, source: Address, sync: Sync) -> None:
        if sync.sender == self._own.node:
            self._hear_of_self(sync.record)
            return
        known = self._members.get(sync.sender)
        # What is thought of the sender and is not so: only the sender can refute that it is dead, or came back.
        contradiction = (known,) if known and refute(sync.record, known) else ()
        self._believe(sync.record)
        lacking, wants = self._members.compare(sync, own=self._own)
        for status in sync.statuses:
            self._believe(self._members.softened(status))
        if wants or contradiction:
            self._send(source, SyncReply(sync.sequence, self._own.node, contradiction, wants, None))
        parts = packets.batches(lacking) or [()]
        for number, part in enumerate(parts[:NEWS_MAX], start=1):
            until = sync.last if number == len(parts) else part[-1].node if number == NEWS_MAX else None
            self._send(source, SyncReply(sync.sequence, self._own.node, part, (), until))

    def _hear_news(self, source: Address, news: SyncReply) -> None:
        for record in news.records:
            self._believe(self._members.softened(record), pass_on=self._walk.whole)
        wanted = [self._own if node == self._own.node else self._members.get(node) for node in news.wants]
        for part in packets.batches(record for record in wanted if record)[:NEWS_MAX]:
            self._send(source, packets.Gossip(self._own.node, part))
        if news.until and self._walk.settled(news.sequence, news.until):
            self._sync(source)

    # What this node says

    def _tell(self, profile: Profile) -> None:
        self._pending = packets.fitted(packets.replace(self._own, profile=packets.quantised(profile))).profile
        self._publish_at = math.inf if self._pending == self._own.profile else self._quiet_until

    def _publish(self) -> None:
        # Not all at once, however much they are in step: what begins together would stay together.
        quiet_s = self._config.between_profiles_s(len(self._members) + 1) * self._rng.uniform(0.75, 1.25)
        self._publish_at, self._quiet_until = math.inf, self._clock + quiet_s
        self._own = packets.replace(self._own, version=self._own.version + 1, profile=self._pending)
        self._rumours.put(self._own)

    def _leave(self) -> None:
        self._own = packets.replace(self._own, state=State.LEFT)
        for member in self._members.some(LEAVE_FANOUT):
            self._send(member.address, packets.Gossip(self._own.node, (self._own.status,)))

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
            raise LocalProtocolError(f"{self!r}: not every suspect, or somebody else, has a deadline")
        if set(self._tombs) != {record.node for record in records if record.state >= State.DEAD}:
            raise LocalProtocolError(f"{self!r}: not every dead member, or a living one, is to be forgotten")
        if self._members.get(self._own.node) or self._own.state not in (State.ALIVE, State.LEFT):
            raise LocalProtocolError(f"{self!r}: believes others about itself")
        if len(self._contacts) > CONTACTS_MAX or len(self._rumours) > 2 * len(records) + 2:
            raise LocalProtocolError(f"{self!r}: remembers too much")

    def __repr__(self) -> str:
        own, lost = self._own, len(self._members.lost())
        return (
            f"<Swim {own.name} {own.state.name.lower()} {own.incarnation} | {len(self._members)} members | "
            f"{len(self._suspects)} suspect | {lost} dead | {len(self._rumours)} rumours | doubt {self._prober.doubt}>"
        )
