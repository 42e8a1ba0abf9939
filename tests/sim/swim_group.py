"""Many gossip machines under one virtual network: datagrams are delayed, lost, or stopped by a partition.

A heap of (time, what happens) is the whole world: no event loop, no socket, and a run is a function of its seed. Every
datagram is encoded and decoded, so that its size is real and only what the wire can say gets through.

Must not know: nodes, links.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from swarm.errors import LocalProtocolError
from swarm.membership.config import SwimConfig
from swarm.membership.swim import Swim
from swarm.membership.swim_events import (
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
from swarm.protocol.packets import Profile, Record, State

UDP_IP_BYTES = 28  # what every datagram costs on top
SEEN_MAX = 100_000


@dataclass(frozen=True)
class Seen:
    """One member saw another one change."""

    at: float
    by: str
    whom: str
    state: State


@dataclass
class Host:
    """Where one machine runs. Its clock shows `skew_s` more than the network's."""

    address: str
    machine: Swim
    side: int = 0
    up: bool = True  # else it neither hears nor does anything
    skew_s: float = 0.0
    sent_bytes: int = 0
    sent_datagrams: int = 0
    tick_at: float = field(default=float("inf"))


class SwimGroup:
    """The network. `delay_s` is the shortest and longest way of a datagram, `loss` the share that vanishes."""

    def __init__(
        self,
        *,
        seed: int,
        config: SwimConfig,
        delay_s: tuple[float, float] = (0.0005, 0.002),
        loss: float = 0.0,
        checked: bool = True,
    ) -> None:
        self.now = 0.0
        self.hosts: dict[str, Host] = {}  # by address
        self.loss = loss
        self.seen: deque[Seen] = deque(maxlen=SEEN_MAX)
        self.conflicts: list[str] = []
        self._rng = random.Random(seed)  # dice of a game
        self._config = config
        self._delay_s = delay_s
        self._checked = checked
        self._happens: list[tuple[float, int, str, PacketReceived | Tick]] = []
        self._order = 0
        self._news = False

    def add(
        self, name: str, *, contacts: tuple[str, ...] = (), node: str | None = None, profile: Profile | None = None
    ) -> Host:
        """A new member at an address of its own, which finds its contacts. An address that is taken is taken over."""
        dice = random.Random(self._rng.getrandbits(64))  # dice of a game
        node = node or f"{self._rng.getrandbits(64):016x}"
        machine = Swim(
            NodeId(node),
            (Address(name),),
            name=name,
            config=self._config,
            now=self.now,
            rng=dice,
            profile=profile,
        )
        host = self.hosts[name] = Host(name, machine)
        for contact in contacts:
            self._do(host, ContactFound(Address(contact)))
        self._plan(host)
        return host

    def tell(self, name: str, profile: Profile) -> None:
        """A member holds something else now."""
        self._do(self.hosts[name], ProfileChanged(profile))

    def kill(self, name: str) -> None:
        """A member vanishes."""
        self.hosts[name].up = False

    def leave(self, name: str) -> None:
        """A member says goodbye."""
        self._do(self.hosts[name], Leave())
        self.hosts[name].up = False

    def wake(self, name: str, *, skew_s: float = 0.0) -> None:
        """A member that was stopped goes on, on a clock that shows so much more than before."""
        host = self.hosts[name]
        host.up = True
        host.skew_s += skew_s
        self._do(host, Tick())

    def partition(self, names: set[str]) -> None:
        """These hosts reach each other only."""
        for host in self.hosts.values():
            host.side = int(host.address in names)

    def heal(self) -> None:
        """Ends the partition."""
        self.partition(set())

    def run(self, seconds: float) -> None:
        """Lets time pass."""
        end = self.now + seconds
        while self._happens and self._happens[0][0] <= end:
            self._step()
        self.now = end

    def until(self, condition: Callable[[], bool], *, limit_s: float) -> float:
        """Lets time pass until the condition holds, and returns how long that took. Raises LocalProtocolError.

        The condition is asked again when some member has seen something; it must depend on nothing else.
        """
        began = self.now
        while not condition():
            self._news = False
            while not self._news:
                if self.now - began > limit_s or not self._happens:
                    raise LocalProtocolError(f"not within {limit_s:g} s: {[h.machine for h in self.living()][:8]}")
                self._step()
        return self.now - began

    def living(self) -> list[Host]:
        """Hosts that are up."""
        return [host for host in self.hosts.values() if host.up]

    def agreed(self) -> bool:
        """Whether everyone who is up knows exactly the others who are up as alive, with their latest profiles."""
        living = [host.machine for host in self.living()]
        truth = {machine.own.node: machine.own for machine in living}
        return all(
            {member.node: _told(member) for member in machine.members()}
            == {node: _told(own) for node, own in truth.items() if node != machine.own.node}
            for machine in living
        )

    def knows(self, name: str) -> int:
        """How many others a member takes for alive or suspect."""
        return len(self.hosts[name].machine)

    def _step(self) -> None:
        at, _, address, event = heapq.heappop(self._happens)
        self.now = at
        host = self.hosts[address]
        if isinstance(event, Tick):
            if at != host.tick_at:
                return  # another one was planned since
            host.tick_at = float("inf")
        elif self.hosts[event.source].side != host.side:
            return
        if host.up:
            self._do(host, event)

    def _do(self, host: Host, event: Event) -> None:
        for action in host.machine.handle(event, self.now + host.skew_s):
            match action:
                case Send(address, packet):
                    self._carry(host, address, packets.encode(packet))
                case MemberChanged(record):
                    self._news = True
                    self.seen.append(Seen(self.now, host.address, record.address, record.state))
                case Conflict(address):
                    self._news = True
                    self.conflicts.append(address)
        if self._checked:
            host.machine.check()
        self._plan(host)

    def _carry(self, host: Host, address: str, datagram: bytes) -> None:
        host.sent_bytes += len(datagram) + UDP_IP_BYTES
        host.sent_datagrams += 1
        target = self.hosts.get(address)
        if target is None or target.side != host.side or self._rng.random() < self.loss:
            return
        self._push(
            self.now + self._rng.uniform(*self._delay_s),
            address,
            PacketReceived(Address(host.address), packets.decode(datagram)),
        )

    def _plan(self, host: Host) -> None:
        # Timers of a real loop are late, never early.
        tick_at = self.now + host.machine.wait_s(self.now + host.skew_s) + 1e-6
        if tick_at < host.tick_at:
            host.tick_at = tick_at
            self._push(tick_at, host.address, Tick())

    def _push(self, at: float, address: str, event: PacketReceived | Tick) -> None:
        self._order += 1
        heapq.heappush(self._happens, (at, self._order, address, event))


def _told(record: Record) -> tuple[State, int, str, Profile]:
    return record.state, record.version, record.address, record.profile
