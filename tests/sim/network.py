"""The simulated network: hosts with rates and delays, links between them, faults, and a host's `Environment`.

    control:  send -> encoded -> delay of both hosts -> decoded -> receive    in order, counted in bytes, free of charge
    datagram: send -> lost by lot, or delay of both hosts -> heard            counted in bytes, free of charge
    bulk:     slice -> sender's uplink -> receiver's downlink -> delay        each direction of a host is one queue

Each direction of a host serves slices one after another in the order in which they were sent: it is a time at which it
is free again. Sessions keep one slice on the line at a time, so several sessions share an uplink by turns. The model
errs in this: a slice that waits for a downlink does not hold up its sender's uplink, which forgives at most one slice
a session; control messages take none of the rate; but for datagrams nothing is lost at random, and no rate grows
slowly like TCP's.

Over a road that is blocked (a partition, a host that fell silent) nothing arrives and nobody is told. Links over it
break once their heartbeat would have noticed; if it is healed before, what was on the way arrives, as TCP would send
it again.

Must not know: machines, nodes' inner life, scenarios.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from swarm.errors import PeerTimeout, PeerUnreachable, RemoteProtocolError
from swarm.net.environment import Found
from swarm.net.host_environment import DIAL_TIMEOUT_S
from swarm.net.link import Link
from swarm.net.udp import Hear
from swarm.net.websocket import HEARTBEAT_S
from swarm.protocol import messages
from swarm.protocol.messages import Address, AnyMessage, Message, NodeId
from swarm.transport import Transport
from swarm.transport.inproc import InprocHub, InprocTransport

from .clock import VirtualLoop, network_time, within

HEARTBEAT_MISSED_S = 1.5 * HEARTBEAT_S  # the ping is due, and its answer is awaited for half as long again
DIAL_ROUND_TRIPS = 2  # one for TCP, one for the WebSocket
CONTINUES_S = 1e-6  # a slice that starts this soon after the one before belongs to the same stream


@dataclass
class Host:
    """One machine. `delay_s` is the way from it to the middle of the network: two hosts are the sum of theirs apart."""

    name: str
    up_bytes_per_s: float
    down_bytes_per_s: float
    delay_s: float
    side: int = 0  # of a partition; only hosts of one side reach each other
    dead: bool = False  # the process is gone; the machine answers that nobody is there
    silent: bool = False  # the machine is gone; packets vanish
    up_free_at: float = 0.0
    down_free_at: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    control_bytes: int = 0  # sent
    control_messages: int = 0
    datagram_bytes: int = 0  # sent
    datagrams_pass: bool = True  # else a firewall stops them, both ways


class Fabric:
    """All hosts and what connects them. One slice is at most `slice_bytes`; `loss` is the part of datagrams that is
    lost, by `rng`."""

    def __init__(self, *, slice_bytes: int, loss: float = 0.0, rng: random.Random | None = None) -> None:
        self.hosts: dict[str, Host] = {}
        self.loss = loss
        self._rng = rng or random.Random(0)  # dice that can be thrown again
        self.hub = InprocHub("simulation")
        self.slices = _Slices(slice_bytes)
        self._worlds: dict[str, SimulatedEnvironment] = {}
        self._planes: dict[str, Host] = {}  # by transport address
        self._ends: dict[MemoryLink, None] = {}  # of all links that are not broken
        self._arrivals: dict[tuple[str, str], float] = {}  # last slice of each pair
        self._changed = asyncio.Event()

    def add(
        self, name: str, *, up_bytes_per_s: float, down_bytes_per_s: float, delay_s: float, known: Iterable[str]
    ) -> SimulatedEnvironment:
        """A new host, and the world that a node on it sees; `known` are addresses given to it by hand."""
        host = self.hosts[name] = Host(name, up_bytes_per_s, down_bytes_per_s, delay_s)
        environment = self._worlds[name] = SimulatedEnvironment(self, host, tuple(known))
        return environment

    def kill(self, name: str, *, silent: bool) -> None:
        """Ends a host: its links break now, or, if it falls silent, once their heartbeats are missed."""
        host = self.hosts[name]
        if silent:
            host.silent = True
            self._doubt_links()
            return
        host.dead = True
        for end in self._ends_of(host.name):
            end.snap("the connection was reset")

    def cut(self, one: str, other: str) -> None:
        """Breaks the links between two hosts, for both ends at once; they may dial again."""
        for end in self._ends_of(one):
            if other in (end.here.name, end.there.name):
                end.snap("the connection was reset")

    def partition(self, names: Iterable[str]) -> None:
        """These hosts reach each other only, from now on."""
        for name in names:
            self.hosts[name].side = 1
        self._doubt_links()

    def heal(self) -> None:
        """Ends the partition."""
        for host in self.hosts.values():
            host.side = 0
        self._changed.set()
        for end in list(self._ends):
            end.resend()
            end.twin.resend()  # which may be closed, and its last words still be on the way

    def pause(self, name: str) -> None:
        """The process on a host stands still; its system keeps its connections, and answers nothing for it."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.pause(name)
        self.hosts[name].silent = True
        self._doubt_links()

    def resume(self, name: str) -> None:
        """It goes on."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.hosts[name].silent = False
        loop.resume(name)
        self._changed.set()
        for end in list(self._ends):
            end.resend()
            end.twin.resend()

    def blocked(self, one: Host, other: Host) -> bool:
        """Whether packets between two hosts vanish."""
        return one.silent or other.silent or one.dead or other.dead or one.side != other.side

    def distance_s(self, one: Host, other: Host) -> float:
        """Delay from one host to another."""
        return one.delay_s + other.delay_s

    def plug(self, address: str, host: Host) -> None:
        """Tells to which host a transport belongs."""
        self._planes[address] = host

    async def line(self, source: str, target: str, size: int) -> None:
        """The way of one slice between two transports: see `transport.inproc.Line`."""
        sender, receiver = self._planes[source], self._planes[target]
        await self._passable(sender, receiver)
        leaves_at = self._leave(sender, receiver, size, network_time())
        # A downlink is taken when the slice sets out, or one from a busy sender would hold up those of all others.
        await asyncio.sleep(leaves_at - network_time())
        await asyncio.sleep(self._arrive(sender, receiver, size, leaves_at) - network_time())
        await self._passable(sender, receiver)

    async def dial(self, host: Host, address: str) -> Link:
        """A link to the node at an address. Raises PeerUnreachable, or PeerTimeout when nothing comes back."""
        target = self.hosts.get(address)
        if target is None:
            raise PeerUnreachable(address, "no such host")
        if self.blocked(host, target) and not target.dead:
            await asyncio.sleep(DIAL_TIMEOUT_S)
            raise PeerTimeout(address, f"no answer within {DIAL_TIMEOUT_S:g} s")
        await asyncio.sleep(2 * DIAL_ROUND_TRIPS * self.distance_s(host, target))
        environment = self._worlds[address]
        if target.dead or not environment.listening:
            raise PeerUnreachable(address, "connection refused")
        near, far = MemoryLink(self, host, target), MemoryLink(self, target, host)
        near.twin, far.twin = far, near
        self._ends |= {near: None, far: None}
        environment.accept(far)
        return near

    def carry(self, host: Host, address: str, datagram: bytes) -> None:
        """A datagram sets out, and may arrive."""
        host.datagram_bytes += len(datagram)
        target = self.hosts.get(address)
        if target is None or self._rng.random() < self.loss:
            return

        def arrive() -> None:
            open_ = host.datagrams_pass and target.datagrams_pass and not self.blocked(host, target)
            if open_ and self.hosts[address] is target:
                environment = self._worlds[address]
                loop.call_soon(environment.hear, host.name, datagram, context=within(address))

        loop = asyncio.get_running_loop()
        loop.call_later(self.distance_s(host, target), arrive)

    def forget(self, end: MemoryLink) -> None:
        """An end of a link is broken."""
        self._ends.pop(end, None)

    def _leave(self, sender: Host, receiver: Host, size: int, now: float) -> float:
        """When a slice that is ready now sets out; the uplink is taken from then on."""
        delay_s, pair = self.distance_s(sender, receiver), (sender.name, receiver.name)
        # `line` returns on arrival, but a sender does not wait for it: a stream's next slice left while this one flew.
        streaming = now - self._arrivals.get(pair, -math.inf) <= CONTINUES_S
        leaves_at = max(sender.up_free_at, now - delay_s if streaming else now)
        sender.up_free_at = leaves_at + size / sender.up_bytes_per_s
        sender.sent_bytes += size
        return leaves_at

    def _arrive(self, sender: Host, receiver: Host, size: int, left_at: float) -> float:
        """When a slice that set out then is there whole; the downlink is taken until then."""
        sent_at = left_at + size / sender.up_bytes_per_s
        receiver.down_free_at = max(left_at, receiver.down_free_at) + size / receiver.down_bytes_per_s
        receiver.received_bytes += size
        arrives_at = max(sent_at, receiver.down_free_at) + self.distance_s(sender, receiver)
        self._arrivals[sender.name, receiver.name] = arrives_at
        return arrives_at

    async def _passable(self, one: Host, other: Host) -> None:
        while self.blocked(one, other):
            self._changed.clear()
            await self._changed.wait()  # whoever sends gives up by its own deadline

    def _ends_of(self, name: str) -> list[MemoryLink]:
        return [end for end in self._ends if name in (end.here.name, end.there.name)]

    def _doubt_links(self) -> None:
        loop = asyncio.get_running_loop()
        for end in self._ends:
            if self.blocked(end.here, end.there):
                loop.call_later(HEARTBEAT_MISSED_S, end.miss_heartbeat)


class MemoryLink:
    """One end of a link: see `Link`. Only what `messages` can say gets through."""

    def __init__(self, fabric: Fabric, here: Host, there: Host) -> None:
        self.remote, self.local = there.name, here.name
        self.member: str | None = None  # nobody lies here about who it is
        self.here, self.there = here, there
        self.twin: MemoryLink
        self._fabric = fabric
        self._broken: str | None = None
        self._flying: deque[bytes | None] = deque()  # towards the twin; None is the end
        self._delayed = 0  # of them, how many would have arrived if the road were open
        self._inbox: deque[bytes] = deque()
        self._arrived = asyncio.Event()

    async def send(self, *several: Message) -> None:
        """See Link."""
        await asyncio.sleep(0)  # a socket lets others run here, and code must bear it
        if self._broken is not None:
            raise PeerUnreachable(self.remote, self._broken)
        for message in several:
            frame = messages.encode(message)
            self.here.control_bytes += len(frame)
            self.here.control_messages += 1
            self._carry(frame)

    async def receive(self) -> AnyMessage:
        """See Link."""
        while not self._inbox:
            if self._broken is not None:
                raise PeerUnreachable(self.remote, self._broken)
            self._arrived.clear()
            await self._arrived.wait()
        try:
            return messages.decode(self._inbox.popleft())
        except ValueError as error:
            raise RemoteProtocolError(self.remote, f"sent an invalid message: {error}") from error

    async def close(self) -> None:
        """See Link."""
        if self._broken is None:
            self._break("this end closed the link")
            self._carry(None)

    def snap(self, why: str) -> None:
        """Breaks at once; what is on the way is lost."""
        self._flying.clear()
        self._inbox.clear()
        self._break(why)

    def miss_heartbeat(self) -> None:
        """Time for an answer is over: breaks, unless the road is open again."""
        if self._fabric.blocked(self.here, self.there):
            self.snap("answered no ping")

    def resend(self) -> None:
        """The road may be open again."""
        delayed, self._delayed = self._delayed, 0
        for _ in range(delayed):
            self._deliver()

    def _carry(self, frame: bytes | None) -> None:
        self._flying.append(frame)
        delay_s = self._fabric.distance_s(self.here, self.there)
        asyncio.get_running_loop().call_later(delay_s, self._deliver)

    def _deliver(self) -> None:
        """One more message has arrived: the oldest, whatever timer it was."""
        if self._fabric.blocked(self.here, self.there):
            self._delayed += 1
        elif self._flying:
            self.twin.hear(self._flying.popleft())

    def hear(self, frame: bytes | None) -> None:
        """A message, or the end, arrives."""
        if frame is None:
            self._break("closed the link")
        elif self._broken is None:
            self._inbox.append(frame)
        self._arrived.set()

    def _break(self, why: str) -> None:
        if self._broken is None:
            self._broken = why
            self._fabric.forget(self)
            self._arrived.set()


class SimulatedEnvironment:
    """What one node is put into: see `Environment`."""

    def __init__(self, fabric: Fabric, host: Host, known: tuple[str, ...]) -> None:
        self.transports: Sequence[Transport] = ()
        self.local, self.on_loopback = Address(host.name), False
        self.confined = False
        self.names_peers = bool(known)
        self.unresolved: Sequence[str] = ()
        self.resolving = False
        self.listening = False
        self._fabric = fabric
        self._host = host
        self._known = known
        self._accept: Callable[[Link], Awaitable[None]] | None = None
        self._hear: Hear | None = None
        self._incoming: dict[asyncio.Task[None], None] = {}

    async def open(
        self,
        node: NodeId,
        accept: Callable[[Link], Awaitable[None]],
        found: Found,
        hear: Hear,
    ) -> Address:
        """See Environment. The address is the host's name."""
        transport = InprocTransport(self._fabric.hub, line=self._fabric.line, pace=self._fabric.slices)
        self._fabric.plug(transport.address, self._host)
        self.transports = [transport]
        self._accept, self._hear = accept, hear
        self.listening = True
        for address in self._known:
            asyncio.get_running_loop().call_soon(found, (Address(address),), True)
        return Address(self._host.name)

    def accept(self, link: Link) -> None:
        """Somebody dialled this node."""
        if self._accept is not None:
            task = asyncio.create_task(
                self._converse(link, self._accept), name=f"link to {self._host.name}", context=within(self._host.name)
            )
            self._incoming[task] = None
            task.add_done_callback(lambda done: self._incoming.pop(done, None))

    @property
    def addresses(self) -> tuple[Address, ...]:
        """See Environment."""
        return (Address(self._host.name),)

    async def dial(self, addresses: Sequence[Address]) -> Link:
        """See Environment. Hosts have one address each."""
        return await self._fabric.dial(self._host, addresses[0])

    def port_at(self, local: str) -> int:
        """See Environment. Addresses have no ports here."""
        return 0

    def reached(
        self, claimed: Sequence[str], *, remote: str | None = None, port: int = 0, dialled: Address | None = None
    ) -> tuple[Address, ...]:
        """See Environment. Nobody lies here."""
        return tuple(dict.fromkeys([*([dialled] if dialled else []), *map(Address, claimed)]))

    def send(self, address: str, datagram: bytes) -> None:
        """See Environment."""
        self._fabric.carry(self._host, address, datagram)

    def drain(self) -> None:
        """See Environment. Nothing waits here."""

    @property
    def paused_s(self) -> float:
        """See Environment."""
        loop = asyncio.get_running_loop()
        return loop.paused_s if isinstance(loop, VirtualLoop) else 0.0

    def hear(self, source: str, datagram: bytes) -> None:
        """A datagram arrives."""
        if self.listening and self._hear:
            self._hear(Address(source), datagram)

    async def close(self) -> None:
        """See Environment."""
        self.listening = False
        tasks = list(self._incoming)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for transport in self.transports:
            await transport.close()

    async def _converse(self, link: Link, accept: Callable[[Link], Awaitable[None]]) -> None:
        await accept(link)


class _Slices:
    """A `Pace` that delays nothing and cuts transfers into slices, so that verification sees chunk after chunk."""

    def __init__(self, slice_bytes: int) -> None:
        self.slice_bytes: int | None = slice_bytes

    def take(self, size: int) -> float:
        return 0.0
