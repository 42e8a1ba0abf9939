"""Gossip, driven: a node's view of all members, kept by datagrams.

Feeds the gossip machine with what arrives, with the time and with what this node tells, and carries out what it says:
sends datagrams, and hands every change of a member on. Nobody waits here: a datagram that is lost, late or no gossip at
all costs nothing but time.

Must not know: links, artifacts, sockets. What a `Profile` says is the node's to decide.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from swarm.membership.config import SwimConfig
from swarm.membership.swim import (
    Conflict,
    ContactFound,
    Event,
    Leave,
    MemberChanged,
    PacketReceived,
    ProfileChanged,
    Send,
    Swim,
    Tick,
)
from swarm.net.environment import Environment
from swarm.protocol import packets
from swarm.protocol.messages import Address, NodeId
from swarm.protocol.packets import Profile, Record
from swarm.security.rate_limit import MUTE_S, RateLimiter

JOIN_TIMEOUT_S = 1.0  # a member answers in a round trip; where none has by then, datagrams may not get through
CONTACTS_WAITING_MAX = 64  # found before the node has an address; the machine remembers no more either
# Of one address: a member answers probes and passes rumours on, a few a second, and all it knows to who joins.
DATAGRAMS_PER_S, DATAGRAMS_BURST = 500.0, 5000.0
TIMER_LATE_S = 0.001  # timers may be a little early, and a machine that is asked too soon is asked in vain

log = logging.getLogger("swarm")


class SwimDriver:
    """The gossip of one node. `changed` is called with the record of every member that changed."""

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
        self.unreadable = 0  # datagrams that were no gossip
        self._environment = environment
        self._config = config
        self._rng = rng
        self._clock = clock
        self._changed = changed
        self._rate_limiter = RateLimiter(rate_per_s=DATAGRAMS_PER_S, burst=DATAGRAMS_BURST)
        self._waiting: dict[Address, None] = {}
        self._asked_at: float | None = None  # the first contact
        self._told = Profile()
        self._timer: asyncio.TimerHandle | None = None

    def open(self, node: NodeId, address: Address, name: str, profile: Profile) -> None:
        """Begins to gossip under this id and name; others send to `address`."""
        self._told = profile
        self.machine = Swim(
            node, address, name=name, config=self._config, now=self._clock(), rng=self._rng, profile=profile
        )
        for contact in self._waiting:
            self._handle(ContactFound(contact))
        self._waiting.clear()
        self._plan()

    def found(self, address: Address) -> None:
        """Somebody may be there to ask for members. The address is a literal."""
        self._asked_at = self._clock() if self._asked_at is None else self._asked_at
        if self.machine is not None:
            self._handle(ContactFound(address))
        elif len(self._waiting) < CONTACTS_WAITING_MAX:
            self._waiting[address] = None

    def hear(self, source: Address, datagram: bytes) -> None:
        """A datagram arrived."""
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

    def tell(self, profile: Profile) -> None:
        """What this node is and holds now; cheap when nothing has changed."""
        if profile != self._told:
            self._told = profile
            self._handle(ProfileChanged(profile))

    def close(self) -> None:
        """Says goodbye, and nothing more."""
        self._handle(Leave())
        if self._timer:
            self._timer.cancel()

    def members(self) -> list[Record]:
        """All others that are alive or suspect, by id."""
        return self.machine.members() if self.machine is not None else []

    def member(self, node: NodeId) -> Record | None:
        """One other, be it dead; None where it is unknown."""
        return self.machine.member(node) if self.machine is not None else None

    @property
    def joining(self) -> bool:
        """Whether somebody was just asked who there is and has not told yet."""
        if self.machine is None or self.machine.joined or self._asked_at is None:
            return False
        return self._clock() - self._asked_at < JOIN_TIMEOUT_S

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
        """Sets the one timer there is to when the machine wants it."""
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
        self._environment.drain()  # or a loop that stalled would blame others for answers that lie here
        self._handle(Tick())

    def __repr__(self) -> str:
        return f"<SwimDriver {self.machine!r}, {self.unreadable} datagrams were no gossip>"
