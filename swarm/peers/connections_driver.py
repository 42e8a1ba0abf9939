"""Links: dialled as `membership` decides, greeted, listened to, and given up.

Owns every open link from hello to goodbye, and who of their other ends counts as a peer: one link a node, the welcome
one. What peers say of artifacts, and what is said to them, is the node's.

Must not know: artifacts, datagrams, sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

from swarm.content.manifest import Digest
from swarm.errors import (
    NotAdmitted,
    PeerError,
    PeerTimeout,
    RemoteProtocolError,
    SettingsError,
    SwarmError,
    VersionSkew,
)
from swarm.journal import ArtifactsAnnounced, Joined, Left, Unreached
from swarm.net.environment import Environment
from swarm.net.websocket import Link
from swarm.peers import connections
from swarm.peers.connections import Connections
from swarm.peers.host import Host
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import Address, Announcement, AnyMessage, Hello
from swarm.security.rate_limit import MUTE_S, RateLimiter

HELLO_TIMEOUT_S = 5.0
# Of one node: a frame holds up to 256 messages, news and requests come some 100 a second at most.
MESSAGES_PER_S, MESSAGES_BURST = 2000.0, 10_000.0
WARNINGS_MAX = 1000  # different ones; strangers cannot make this node remember more

log = logging.getLogger("swarm")


class Party(Host, Protocol):
    """What a node does for its links."""

    def hello(self, token: str) -> Hello:
        """The greeting that offers this token."""

    def token(self) -> str:
        """A fresh one, for one link."""

    def reached(self, address: Address) -> None:
        """A node was dialled there, and greeted."""

    def joined(self, peer: Peer) -> None:
        """There is a link to this node."""

    def left(self, peer: Peer, why: str) -> None:
        """There is none any more; what was agreed on over it has ended."""

    def hear(self, peer: Peer, message: AnyMessage) -> None:
        """A peer says something of artifacts. Raises RemoteProtocolError for what a well-behaved one would not say."""

    def noticed(self) -> None:
        """Somebody came, went or failed to answer."""


class ConnectionsDriver:
    """All links of one node. `peers` of the party are kept here."""

    def __init__(self, environment: Environment, machine: Connections, *, party: Party) -> None:
        self.machine = machine
        self.warned: dict[str, None] = {}
        self._environment = environment
        self._party = party
        self._rate_limiter = RateLimiter(rate_per_s=MESSAGES_PER_S, burst=MESSAGES_BURST)
        self._links: dict[int, Peer] = {}  # all that said hello, welcome or not
        self._numbers = itertools.count()
        self._opened = asyncio.Event()  # the world may bring links before it is open
        self._closing = False

    def open(self) -> None:
        """Links may be greeted from now on."""
        self._opened.set()

    async def close(self, reason: str) -> None:
        """Says goodbye to everyone."""
        self._closing = True
        for peer in list(self._links.values()):
            with contextlib.suppress(PeerError):
                await peer.link.send(messages.Bye(reason))

    def meet(self, event: connections.Event) -> None:
        """Tells the membership machine, and does what it says."""
        for action in self.machine.handle(event, self._party.now()):
            match action:
                case connections.Dial(address):
                    self._party.spawn(self._dial(address), f"dial {address}")
                case connections.Welcome(number, addresses):
                    self._welcome(self._links[number], addresses)
                case connections.Drop(number, why):
                    if dropped := self._links.get(number):
                        dropped.why_gone = why
                        self._forget(dropped, why)  # now: closing waits for an answer that may not come
                        self._party.spawn(dropped.close(), f"drop link to {dropped.name}")
        if not isinstance(event, connections.Tick):
            self._party.noticed()

    async def converse(self, link: Link, *, dialled: Address | None = None) -> None:
        """The life of one link, from hello to goodbye."""
        token = self._party.token()
        for transport in self._environment.transports:
            transport.admit(token)
        try:
            peer = await self._greet(link, token)
            try:
                await self._listen(peer, dialled)
            finally:
                await peer.close()
        except PeerError as error:
            # The peer is told why by its own side of the same check.
            level = logging.WARNING if isinstance(error, VersionSkew | RemoteProtocolError) else logging.DEBUG
            self._log_once(level, str(error))
            if dialled:
                self._failed(dialled, error)
        finally:
            await link.close()
            for transport in self._environment.transports:
                await transport.revoke(token)

    async def _dial(self, address: Address) -> None:
        try:
            link = await self._environment.dial(address)
        except (PeerError, SettingsError) as error:
            self._log_once(logging.WARNING if isinstance(error, NotAdmitted) else logging.DEBUG, str(error))
            self._failed(address, error)
        else:
            await self.converse(link, dialled=address)

    def _failed(self, address: Address, error: SwarmError) -> None:
        self._party.record("node", Unreached(address, error))
        self.meet(connections.DialFailed(address))

    async def _greet(self, link: Link, token: str) -> Peer:
        await self._opened.wait()  # opening has its own deadlines, and ends all links when it fails
        await link.send(self._party.hello(token))
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
        if self._rate_limiter.is_muted(theirs.node, self._party.now()):
            raise PeerError(link.remote, "flooded this node, and is muted for a while")
        return Peer(next(self._numbers), link, theirs, token=token, transports=self._environment.transports)

    async def _listen(self, peer: Peer, dialled: Address | None) -> None:
        self._links[peer.number] = peer
        writer = self._party.spawn(peer.write(), f"write to {peer.name}")
        why = "closed the link"
        if dialled:
            self._party.reached(dialled)
        try:
            holds = _wholes(peer.hello.artifacts)
            self.meet(connections.LinkUp(peer.number, peer.node, peer.hello.address, dialled, holds))
            while True:
                self._hear(peer, await peer.link.receive())
        except PeerError as error:
            why = peer.why_gone or error.why
            if isinstance(error, RemoteProtocolError):
                self._log_once(logging.WARNING, str(error))
        finally:
            writer.cancel()
            del self._links[peer.number]
            self._forget(peer, why)
            if not self._closing:
                self.meet(connections.LinkDown(peer.number))

    def _welcome(self, peer: Peer, others: tuple[Address, ...]) -> None:
        if twin := self._party.peers.get(peer.node):
            self._forget(twin, "another link is open")
        self._party.peers[peer.node] = peer
        self._party.record(peer.node, Joined(peer.node, peer.name, peer.hello.address, peer.scheme))
        self._party.record(peer.node, ArtifactsAnnounced(peer.node, peer.hello.artifacts))
        if others:
            peer.post(messages.Members(others))
        self._party.joined(peer)

    def _forget(self, peer: Peer, why: str) -> None:
        """What was agreed on over a link ends with it, if it is the one that counts."""
        if self._party.peers.get(peer.node) is not peer:
            return
        peer.why_gone = peer.why_gone or why
        del self._party.peers[peer.node]
        self._party.record(peer.node, Left(peer.node, why))
        self._party.left(peer, why)

    def _hear(self, peer: Peer, message: AnyMessage) -> None:
        if self._rate_limiter.charge(peer.node, self._party.now()):
            raise RemoteProtocolError(peer.name, f"floods this node with messages: it is muted for {MUTE_S:g} s")
        match message:
            case messages.Bye(reason):
                peer.why_gone = peer.why_gone or f"left: {reason}"
                raise PeerError(peer.name, peer.why_gone)
            case messages.Hello():
                raise RemoteProtocolError(peer.name, "said hello twice")
            case _ if self._party.peers.get(peer.node) is not peer:
                return  # the other of two links, about to be dropped
            case messages.Members(addresses):
                self.meet(connections.AddressesShared(addresses))
            case messages.Announce(artifacts):
                self.meet(connections.HoldingsAnnounced(peer.number, _wholes(artifacts)))
                self._party.hear(peer, message)
            case _:
                self._party.hear(peer, message)

    def _log_once(self, level: int, text: str) -> None:
        if text not in self.warned and len(self.warned) < WARNINGS_MAX:
            if level >= logging.WARNING:
                self.warned[text] = None
            log.log(level, "%s", text)

    def __repr__(self) -> str:
        return f"<ConnectionsDriver {len(self._links)} links | {self.machine!r}>"


def _wholes(artifacts: Iterable[Announcement]) -> Mapping[Digest, bool]:
    return {announced.digest: announced.chunks == announced.chunks_total for announced in artifacts}
