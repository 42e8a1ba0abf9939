"""The asyncio half of `Swim`: passes it datagrams, time and the profile of this node, and sends its packets.

No caller waits here: a lost or late datagram costs time only. Must not know: links, artifacts, sockets, the contents of
a `Profile`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from swarm.journal import Paused
from swarm.membership.config import SwimConfig
from swarm.membership.swim import Swim
from swarm.membership.swim_events import (
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
from swarm.net.environment import Environment
from swarm.protocol import packets
from swarm.protocol.messages import Address, NodeId
from swarm.protocol.packets import Profile, Record
from swarm.security.rate_limit import MUTE_S, RateLimiter

JOIN_TIMEOUT_S = 1.0  # a contact answers in a round trip; without an answer by then datagrams may be blocked
CONTACTS_WAITING_MAX = 64  # found before `open`; the machine remembers no more either
# Of an address: a member sends probes and rumours, a few packets a second, and all records to a newcomer.
DATAGRAMS_PER_S, DATAGRAMS_BURST = 500.0, 5000.0
SPREAD_ROUNDS = 5  # (1 + 3)^5 is a thousand members
TIMER_LATE_S = 0.001  # timers may be early, and an early Tick has no effect

log = logging.getLogger("swarm")


class SwimDriver:
    """The gossip of a node. `changed` is called with every new record of a member."""

    def __init__(
        self,
        environment: Environment,
        *,
        config: SwimConfig,
        rng: random.Random,
        clock: Callable[[], float],
        changed: Callable[[Record], None],
    ) -> None:
        self.machine: Swim | None = None  # until `open`
        self.unreadable = 0  # datagrams that are no gossip
        self._environment = environment
        self._config = config
        self._rng = rng
        self._clock = clock
        self._changed = changed
        self._rate_limiter = RateLimiter(rate_per_s=DATAGRAMS_PER_S, burst=DATAGRAMS_BURST)
        self._waiting: dict[Address, None] = {}
        self._contacted_at: float | None = None  # time of the first contact
        self._announced = Profile()
        self._timer: asyncio.TimerHandle | None = None

    def open(self, node: NodeId, addresses: tuple[Address, ...], name: str, profile: Profile) -> None:
        """Joins under this id and name; others send to one of the addresses."""
        self._announced = profile
        self.machine = Swim(
            node,
            addresses,
            name=name,
            config=self._config,
            now=self._clock(),
            rng=self._rng,
            profile=profile,
            usable=self._environment.reached,
        )
        for contact in self._waiting:
            self._handle(ContactFound(contact))
        self._waiting.clear()
        self._plan()

    def found(self, address: Address) -> None:
        """Adds a contact: a node may be at this address, which is a literal."""
        self._contacted_at = self._clock() if self._contacted_at is None else self._contacted_at
        if self.machine is not None:
            self._handle(ContactFound(address))
        elif len(self._waiting) < CONTACTS_WAITING_MAX:
            self._waiting[address] = None

    def receive(self, source: Address, datagram: bytes) -> None:
        """Handles a datagram."""
        now = self._clock()
        if self._rate_limiter.charge(source, now):
            log.warning("%s floods this node with datagrams: it is muted for %g s", source, MUTE_S)
        if self._rate_limiter.is_muted(source, now):
            return
        try:
            packet = packets.decode(datagram)
        except ValueError as error:
            self.unreadable += 1
            log.debug("a datagram from %s is no gossip: %s", source, error)
            return
        self._handle(PacketReceived(source, packet))

    def announce(self, profile: Profile) -> None:
        """Announces the profile of this node; cheap when it is the same."""
        if profile != self._announced:
            self._announced = profile
            self._handle(ProfileChanged(profile))

    def paused(self, seconds: float) -> None:
        """This process stood still."""
        self._environment.drain()  # what arrived meanwhile is news
        self._handle(Paused(seconds))

    def moved(self, addresses: tuple[Address, ...]) -> None:
        """Tells others new addresses of this node; cheap when they are the same."""
        if self.machine is not None and addresses != self.machine.own.addresses:
            self._handle(AddressesChanged(addresses))

    def close(self) -> None:
        """Leaves; no packet is sent afterwards."""
        self._handle(Leave())
        if self._timer:
            self._timer.cancel()

    def members(self) -> list[Record]:
        """All other members that are alive or suspect, by id."""
        return self.machine.members() if self.machine is not None else []

    def member(self, node: NodeId) -> Record | None:
        """The record of another member, alive or dead; None if it is unknown."""
        return self.machine.member(node) if self.machine is not None else None

    @property
    def spread_s(self) -> float:
        """Seconds in which news reaches the members: in each round a member tells it `gossip_fanout` more."""
        return SPREAD_ROUNDS * self._config.gossip_interval_s

    @property
    def joining(self) -> bool:
        """Whether a contact was found within JOIN_TIMEOUT_S and none has answered yet."""
        if self.machine is None or self.machine.joined or self._contacted_at is None:
            return False
        return self._clock() - self._contacted_at < JOIN_TIMEOUT_S

    def _handle(self, event: Event) -> None:
        if self.machine is None:
            return
        try:
            for action in self.machine.handle(event, self._clock()):
                match action:
                    case Send(address, packet):
                        self._environment.send(address, packets.encode(packet))
                    case MemberChanged(record):
                        self._changed(record)
                    case Conflict(address):
                        node = self.machine.own.node
                        log.warning("the node at %s uses this node's id %s too; restart one of both", address, node)
        finally:
            self._plan()

    def _plan(self) -> None:
        """Sets the timer to the next Tick of the machine."""
        if self.machine is None:
            return
        loop = asyncio.get_running_loop()
        wait_s = self.machine.wait_s(self._clock())
        due_at = loop.time() + wait_s + TIMER_LATE_S
        if self._timer is None or due_at < self._timer.when():
            if self._timer:
                self._timer.cancel()
            self._timer = loop.call_at(due_at, self._tick) if wait_s < float("inf") else None

    def _tick(self) -> None:
        self._timer = None
        self._environment.drain()  # or, after a stall of the loop, Acks that wait in the socket would be late
        self._handle(Tick())

    def __repr__(self) -> str:
        return f"<SwimDriver {self.machine!r}, {self.unreadable} datagrams were no gossip>"
