"""The asyncio half of `Connections`: dials, exchanges Hello, reads links and closes them.

Owns all open links and `peers`, the linked nodes by id. Two links may lead to one node for a moment; the link that the
machine welcomed is the peer. Messages of a peer go to the handler of their type. `Hello` and `Bye` are handled here.

Must not know: artifacts, datagrams, sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from swarm.content.manifest import Digest
from swarm.errors import (
    NotAdmitted,
    PeerError,
    PeerTimeout,
    RemoteProtocolError,
    SettingsError,
    VersionSkew,
)
from swarm.journal import ArtifactsAnnounced, Joined, Left, Unreached
from swarm.net.environment import Environment
from swarm.net.link import Link
from swarm.peers import connections
from swarm.peers.connections import Connections
from swarm.peers.host import LinkHost
from swarm.peers.peer import Backlog, Peer
from swarm.protocol import messages
from swarm.protocol.messages import Address, Announcement, AnyMessage, Hello, NodeId
from swarm.security.rate_limit import MUTE_S, RateLimiter

HELLO_TIMEOUT_S = 5.0
GREETINGS_MAX = 128  # accepted links without Hello at once; each takes a connection, 300 KB inside TLS
# Of one node. A frame holds up to 256 messages; a busy peer sends some 100 announcements and requests a second.
MESSAGES_PER_S, MESSAGES_BURST = 2000.0, 10_000.0
WARNINGS_MAX = 1000  # different lines; strangers cannot make this node remember more

Handler: TypeAlias = Callable[[Peer, Any], None]  # raises RemoteProtocolError for a message that breaks the protocol

log = logging.getLogger("swarm")


class ConnectionsDriver:
    """All links of a node. `warned`: the warnings that were logged, each once."""

    def __init__(self, environment: Environment, machine: Connections, *, host: LinkHost, rng: random.Random) -> None:
        self.machine = machine
        self.peers: dict[NodeId, Peer] = {}
        self.warned: dict[str, None] = {}
        self._environment = environment
        self._host = host
        self._rng = rng
        self._rate_limiter = RateLimiter(rate_per_s=MESSAGES_PER_S, burst=MESSAGES_BURST)
        self._backlog = Backlog()
        self._greeting: dict[Link, None] = {}  # accepted, and without Hello: the oldest first
        self._links: dict[int, Peer] = {}  # after Hello, welcomed or not
        self._numbers = itertools.count()
        self._handlers: Mapping[type[AnyMessage], Handler] = {}
        self._opened = asyncio.Event()  # the environment may accept links before the node is open
        self._closing = False

    def open(self, handlers: Mapping[type[AnyMessage], Handler]) -> None:
        """Accepts links from now on. `handlers` has an entry for every type of message but Hello and Bye."""
        self._handlers = handlers
        self._opened.set()

    async def close(self, reason: str) -> None:
        """Sends Bye over every link."""
        self._closing = True
        for peer in list(self._links.values()):
            with contextlib.suppress(PeerError):
                await peer.link.send(messages.Bye(reason))

    def handle(self, event: connections.Event) -> None:
        """Passes an event to the machine and carries out its actions."""
        for action in self.machine.handle(event, self._host.now()):
            match action:
                case connections.Dial(addresses):
                    self._host.spawn(self._dial(addresses), f"dial {addresses[0]}")
                case connections.Welcome(number, nodes):
                    self._welcome(self._links[number], nodes)
                case connections.ShareNodes(number, nodes):
                    self._links[number].post(messages.Members(nodes))
                case connections.Drop(number, why):
                    if dropped := self._links.get(number):
                        dropped.why_gone = why
                        self._remove(dropped, why)  # before the link closes, which waits for the other end
                        self._host.spawn(dropped.close(), f"drop link to {dropped.name}")
        if not isinstance(event, connections.Tick):
            self._host.peers_changed()

    def on_members(self, peer: Peer, message: messages.Members) -> None:
        """A peer shares the addresses of its peers."""
        told = (self._environment.reached(addresses, remote=peer.link.remote) for addresses in message.nodes)
        self.handle(connections.AddressesShared(tuple(addresses for addresses in told if addresses)))

    def on_announce(self, peer: Peer, message: messages.Announce) -> None:
        """A peer announces its artifacts."""
        self.handle(connections.HoldingsAnnounced(peer.number, _complete_by_digest(message.artifacts)))

    async def run_link(self, link: Link, *, dialled: Address | None = None) -> None:
        """Runs an accepted or dialled link from Hello until it ends."""
        token = f"{self._rng.getrandbits(128):032x}"
        for transport in self._environment.transports:
            transport.admit(token)
        try:
            with self._counted(link) if dialled is None else contextlib.nullcontext():
                peer = await self._exchange_hello(link, token, dialled=dialled is not None)
            try:
                await self._read(peer, dialled)
            finally:
                await peer.close()
        except PeerError as error:
            # The other end makes the same checks and logs its own reason.
            level = logging.WARNING if isinstance(error, VersionSkew | RemoteProtocolError) else logging.DEBUG
            self._log_once(level, str(error))
            if dialled:
                self._dial_failed(dialled, error)
        finally:
            await link.close()
            for transport in self._environment.transports:
                await transport.revoke(token)

    @contextlib.contextmanager
    def _counted(self, link: Link) -> Iterator[None]:
        """Counts a link without Hello; beyond GREETINGS_MAX the oldest is closed."""
        self._greeting[link] = None
        if len(self._greeting) > GREETINGS_MAX:
            oldest = next(iter(self._greeting))
            del self._greeting[oldest]
            self._host.spawn(oldest.close(), f"close link from {oldest.remote}")
        try:
            yield
        finally:
            self._greeting.pop(link, None)

    async def _dial(self, addresses: tuple[Address, ...]) -> None:
        try:
            link = await self._environment.dial(addresses)
        except (PeerError, SettingsError) as error:
            # While this node looks for a model, its error tells it, in one line.
            telling = isinstance(error, NotAdmitted) and not self.machine.looks_for_nodes
            self._log_once(logging.WARNING if telling else logging.DEBUG, str(error))
            self._dial_failed(addresses[0], error)
        else:
            await self.run_link(link, dialled=addresses[0])

    def _dial_failed(self, address: Address, error: PeerError | SettingsError) -> None:
        self._host.record("node", Unreached(address, error))
        final = isinstance(error, SettingsError) or error.final
        self.handle(connections.DialFailed(address, error.why.removeprefix(f"{address} "), final))

    async def _exchange_hello(self, link: Link, token: str, *, dialled: bool) -> Peer:
        await self._opened.wait()  # opening has deadlines of its own, and ends all links when it fails
        await link.send(self._host.hello(token, self._environment.port_at(link.local)))
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                theirs = await link.receive()
        except TimeoutError:
            raise PeerTimeout(link.remote, f"said no hello within {HELLO_TIMEOUT_S:g} s") from None
        if not isinstance(theirs, Hello):
            raise RemoteProtocolError(link.remote, f"began with {type(theirs).__name__} instead of Hello")
        if theirs.protocol != messages.PROTOCOL:
            raise VersionSkew(link.remote, theirs=theirs.protocol, ours=messages.PROTOCOL, software=theirs.software)
        if link.member not in (None, theirs.node):
            raise RemoteProtocolError(
                link.remote, f"says that it is {theirs.node}, but its certificate is that of {link.member}"
            )
        if self._rate_limiter.is_muted(theirs.node, self._host.now()):
            raise PeerError(link.remote, "flooded this node, and is muted for a while")
        dialled_at = Address(link.remote) if dialled else None
        known = [*theirs.addresses, *([link.remote] if dialled else [])]  # of a port mapping only the latter is right
        told = self._environment.reached(known, remote=link.remote)
        reached = self._environment.reached(theirs.addresses, remote=link.remote, port=theirs.port, dialled=dialled_at)
        return Peer(
            next(self._numbers),
            link,
            theirs,
            token=token,
            transports=self._environment.transports,
            addresses=reached,
            told=told,
            backlog=self._backlog,
        )

    async def _read(self, peer: Peer, dialled: Address | None) -> None:
        self._links[peer.number] = peer
        writer = self._host.spawn(peer.write(), f"write to {peer.name}")
        why = "closed the link"
        if dialled:
            self._host.dialled(peer.addresses[0])
        try:
            holds = _complete_by_digest(peer.hello.artifacts)
            self.handle(connections.LinkUp(peer.number, peer.node, peer.addresses, dialled, holds, peer.told))
            while True:
                self._receive(peer, await peer.link.receive())
        except PeerError as error:
            why = peer.why_gone or error.why
            if isinstance(error, RemoteProtocolError):
                self._log_once(logging.WARNING, str(error))
        finally:
            writer.cancel()
            del self._links[peer.number]
            self._remove(peer, why)
            if not self._closing:
                self.handle(connections.LinkDown(peer.number))

    def _receive(self, peer: Peer, message: AnyMessage) -> None:
        if self._rate_limiter.charge(peer.node, self._host.now()):
            raise RemoteProtocolError(peer.name, f"floods this node with messages: it is muted for {MUTE_S:g} s")
        if isinstance(message, messages.Bye):
            peer.why_gone = peer.why_gone or f"left: {message.reason}"
            raise PeerError(peer.name, peer.why_gone)
        if isinstance(message, messages.Hello):
            raise RemoteProtocolError(peer.name, "said hello twice")
        if self.peers.get(peer.node) is peer:  # not a second link that is about to be dropped
            self._handlers[type(message)](peer, message)

    def _welcome(self, peer: Peer, others: tuple[tuple[Address, ...], ...]) -> None:
        if twin := self.peers.get(peer.node):
            self._remove(twin, "another link is open")
        self.peers[peer.node] = peer
        self._host.record(peer.node, Joined(peer.node, peer.name, peer.address, peer.scheme))
        self._host.record(peer.node, ArtifactsAnnounced(peer.node, peer.hello.artifacts))
        if others:
            peer.post(messages.Members(others))
        self._host.peer_joined(peer)

    def _remove(self, peer: Peer, why: str) -> None:
        """Removes a peer, unless another link to its node is the peer."""
        if self.peers.get(peer.node) is not peer:
            return
        peer.why_gone = peer.why_gone or why
        del self.peers[peer.node]
        self._host.record(peer.node, Left(peer.node, why))
        self._host.peer_left(peer, why)

    def _log_once(self, level: int, text: str) -> None:
        if text not in self.warned and len(self.warned) < WARNINGS_MAX:
            if level >= logging.WARNING:
                self.warned[text] = None
            log.log(level, "%s", text)

    def __repr__(self) -> str:
        return f"<ConnectionsDriver {len(self._links)} links | {self.machine!r}>"


def _complete_by_digest(artifacts: Iterable[Announcement]) -> Mapping[Digest, bool]:
    return {announced.digest: announced.chunks == announced.chunks_total for announced in artifacts}
