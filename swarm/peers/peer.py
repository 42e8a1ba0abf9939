"""A linked node: its link with an outbox, the artifacts that it announced, and the session that reads its chunks.

Messages wait in the outbox until they are written to the link. Those that may wait share the frame of the next that may
not: on slow links a packet costs both ends more than the messages in it. A peer that leaves too many unread is cut off;
so is the peer with the fullest outbox when the outboxes of all peers together are too full (`Backlog`). A sender of
much waits for `room`.

A session is opened where the node is reached: at the address that was dialled, or that its link comes from, else at one
that it tells. A node cannot direct the connections of this one to other places: an offer of a transport that has its
connections at the port of the node says AT_NODE in place of an address.

Owns all that ends with the link. Must not know: the meaning of messages.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial

from swarm.content.manifest import Digest
from swarm.errors import TransportError
from swarm.net.dialling import race
from swarm.net.link import Link
from swarm.protocol.messages import (
    AT_NODE,
    FRAME_MESSAGES_MAX,
    Address,
    Announcement,
    Grant,
    Have,
    Hello,
    Holdings,
    Interest,
    ManifestPart,
    Message,
    Request,
)
from swarm.transport import Inbound, Transport, told_address

OUTBOX_MAX = 4096  # unread messages, then the peer is cut off
OUTBOX_BYTES_MAX = 8 << 20  # holdings of the largest artifact take 128 KiB
BACKLOG_BYTES_MAX = 32 << 20  # in the outboxes of all peers of a node
ROOM_BYTES = 64 << 10  # an outbox with fewer bytes has room for a part of a manifest
MESSAGE_BYTES = 256  # of a message besides its payload
CONNECT_TIMEOUT_S = 5.0
STAGGER_S = 1.0  # between two addresses: the first is proven or likely, and a handshake among many takes its time

log = logging.getLogger("swarm")


class Backlog:
    """The bytes in the outboxes of all peers of a node."""

    def __init__(self) -> None:
        self.bytes = 0
        self._peers: dict[Peer, int] = {}

    def add(self, peer: Peer, size: int) -> None:
        """Counts bytes, or forgets them with a negative `size`. Beyond BACKLOG_BYTES_MAX cuts off the fullest peer."""
        self.bytes += size
        left = self._peers.pop(peer, 0) + size
        if left:
            self._peers[peer] = left
        if self.bytes > BACKLOG_BYTES_MAX:
            fullest = max(self._peers, key=self._peers.__getitem__)
            fullest.cut_off(f"left {self._peers[fullest]} bytes unread, the most of all peers")

    def __repr__(self) -> str:
        return f"<Backlog {self.bytes} bytes for {len(self._peers)} peers>"


class Peer:
    """The node at the other end of an open link. It presents `token` when it opens a session to this node.

    `addresses`: where it is reached, the best first; none if it can only dial. `told`: those to tell others.
    """

    def __init__(
        self,
        number: int,
        link: Link,
        hello: Hello,
        *,
        token: str,
        transports: Sequence[Transport],
        addresses: tuple[Address, ...] = (),
        told: tuple[Address, ...] = (),
        backlog: Backlog | None = None,
    ) -> None:
        self.number = number
        self.node = hello.node
        self.hello = hello
        self.token = token
        self.link = link
        self.addresses = addresses
        self.told = told
        self.artifacts: dict[Digest, Announcement] = {a.digest: a for a in hello.artifacts}
        self.interests: set[Digest] = set()  # digests of which it wants `Have` messages
        self.own_interests: set[Digest] = set()  # digests of which this node wants `Have` messages
        self.leaving = False  # it drains: what it holds is not counted on
        self.why_gone: str | None = None  # why the link ends, known before it has ended
        self._outbox: deque[Message] = deque()  # until they are written to the link
        self._posted = asyncio.Event()  # a message that may not wait, or no longer
        self._waiting: asyncio.TimerHandle | None = None  # for those that may
        self._unsent_bytes = 0
        self._backlog = backlog or Backlog()
        self._room = asyncio.Event()
        self._room.set()
        self._overflowed = asyncio.Event()
        self._session: Inbound | None = None
        self._connecting = asyncio.Lock()
        self._closed = False
        self._transports = transports
        self._given_up: set[str] = set()  # schemes that failed to connect
        self._logged: set[str] = set()  # schemes whose choice is in the log
        self._route = next(iter(self._routes()), None)

    @property
    def name(self) -> str:
        """Its name in logs and reports."""
        return self.hello.name

    @property
    def address(self) -> Address:
        """Its address in logs and reports: of its link if it takes no connections."""
        return self.addresses[0] if self.addresses else Address(self.link.remote)

    @property
    def readable(self) -> bool:
        """Whether chunks can be read from it: not if it takes no connections."""
        return bool(self._routes())

    @property
    def scheme(self) -> str:
        """Scheme of the transport that this peer is read through; `none` without a usable one."""
        return self._route[0].scheme if self._route else "none"

    @property
    def usual_bytes_per_s(self) -> float:
        """The rate to expect of that transport; 0 if there is no expectation."""
        return self._route[0].usual_bytes_per_s if self._route else 0.0

    def post(self, message: Message, *, within_s: float = 0.0) -> None:
        """Queues a message. Messages of a turn of the event loop share a frame; this one may wait for others.

        A peer that leaves too many unread is cut off. For a peer that has left this does nothing.
        """
        if self._closed or self._overflowed.is_set():
            return
        size = _bytes(message)
        if len(self._outbox) >= OUTBOX_MAX:
            self.cut_off(f"left {OUTBOX_MAX} messages unread")
        elif self._unsent_bytes + size > OUTBOX_BYTES_MAX:
            self.cut_off(f"left {self._unsent_bytes} bytes unread")
        else:
            self._outbox.append(message)
            self._count(size)
            if within_s <= 0:
                self._posted.set()
            elif not self._posted.is_set():
                self._wait(within_s)

    @property
    def unread_bytes(self) -> int:
        """Bytes in its outbox."""
        return self._unsent_bytes

    async def room(self) -> bool:
        """Waits until fewer than ROOM_BYTES are unread; False for a peer that has left."""
        await self._room.wait()
        return not (self._closed or self._overflowed.is_set())

    async def write(self) -> None:
        """Sends posted messages until the link breaks or the peer is cut off, and then closes the link."""
        overflow = asyncio.create_task(self._overflowed.wait())
        sending = asyncio.create_task(self._send_all())
        try:
            await asyncio.wait([overflow, sending], return_when=asyncio.FIRST_COMPLETED)
        finally:
            overflow.cancel()
            sending.cancel()
            await asyncio.gather(overflow, sending, return_exceptions=True)
            self._empty()
            await self.link.close()

    async def _send_all(self) -> None:
        while True:
            await self._posted.wait()
            self._wait_no_more()
            batch = tuple(itertools.islice(self._outbox, FRAME_MESSAGES_MAX))
            await self.link.send(*batch)
            for message in batch[: len(self._outbox)]:  # none if the peer was cut off meanwhile
                self._outbox.popleft()
                self._count(-_bytes(message))
            if not self._outbox:
                self._posted.clear()

    def cut_off(self, why: str) -> None:
        """Ends the link and drops its outbox."""
        self.why_gone = self.why_gone or why
        self._overflowed.set()
        self._empty()

    def _count(self, size: int) -> None:
        self._unsent_bytes += size
        if self._unsent_bytes < ROOM_BYTES:
            self._room.set()
        else:
            self._room.clear()
        self._backlog.add(self, size)

    def _empty(self) -> None:
        """Drops what will not be sent. A sender that waits for room learns that the peer has left."""
        self._wait_no_more()
        self._outbox.clear()
        self._count(-self._unsent_bytes)

    def _wait(self, within_s: float) -> None:
        loop = asyncio.get_running_loop()
        if self._waiting is None or loop.time() + within_s < self._waiting.when():
            self._wait_no_more()
            self._waiting = loop.call_later(within_s, self._posted.set)

    def _wait_no_more(self) -> None:
        if self._waiting:
            self._waiting.cancel()
            self._waiting = None

    async def session(self) -> Inbound:
        """The open session to this peer. Raises TransportError."""
        if self._session is not None and self._session.alive and not (self._closed or self._connecting.locked()):
            return self._session
        async with self._connecting:
            self._check_open()
            if self._session is None or not self._session.alive:
                if self._session is not None:
                    await self._session.close()
                session = await self._connect()
                if self._closed:  # `close` came first, and did not see this session
                    await session.close()
                self._check_open()
                self._session = session
            return self._session

    async def _connect(self) -> Inbound:
        """A session over the preferred usable transport. Raises TransportError.

        A transport that fails is not tried with this peer again while another transport is usable.
        """
        while routes := self._routes():
            self._route = transport, places = routes[0]
            try:
                session = await self._open(transport, places)
            except TransportError as error:
                self._given_up.add(transport.scheme)
                if not (rest := self._routes()):
                    self._given_up.clear()  # it may work later
                    raise
                log.warning("%s is read over %s from now on: %s", self.name, rest[0][0].scheme, error)
            else:
                self._log_choice(transport, [other.scheme for other, _ in routes[1:]])
                return session
        if not self.addresses and any(AT_NODE in offer.address for offer in self.hello.transports):
            raise TransportError(f"{self.name} takes no connections: it was started without --listen")
        raise TransportError(f"{self.name} offers no transport that this node can use")

    async def _open(self, transport: Transport, places: tuple[str, ...]) -> Inbound:
        """A session at one of these addresses, tried side by side. Raises TransportError."""
        attempts = [
            partial(transport.connect, place, self.hello.token, timeout_s=CONNECT_TIMEOUT_S) for place in places
        ]
        try:
            return await race(attempts, discard=_close, stagger_s=STAGGER_S)
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def _routes(self) -> list[tuple[Transport, tuple[str, ...]]]:
        """This node's transports, preferred first, that the peer offers, each with the addresses within reach."""
        offers = {offer.scheme: offer.address for offer in self.hello.transports}
        routes = []
        for transport in self._transports:
            if transport.scheme in offers and transport.scheme not in self._given_up:
                places = tuple(filter(transport.reach, self._places(transport, offers[transport.scheme])))
                if places:
                    routes.append((transport, places))
        return routes

    def _places(self, transport: Transport, offered: str) -> list[str]:
        """The addresses that an offer stands for."""
        if AT_NODE in offered:
            return [offered.replace(AT_NODE, address) for address in self.addresses]
        return [] if AT_NODE in told_address(transport) else [offered]

    def _log_choice(self, transport: Transport, others: list[str]) -> None:
        """Logs each transport once: a broken session is opened again."""
        if transport.scheme not in self._logged:
            self._logged.add(transport.scheme)
            possible = f"{', '.join(others)} also possible" if others else "no other transport is possible"
            log.info("transport=%s to %s because %s; %s", transport.scheme, self.name, transport.reason, possible)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"{self.name} is gone")

    async def close(self) -> None:
        """Ends the session and the link."""
        self._closed = True
        self._empty()
        if self._session is not None:
            await self._session.close()
        await self.link.close()

    def __repr__(self) -> str:
        return f"<Peer {self.name} {self.address} {self.scheme} | {len(self.artifacts)} artifacts>"


async def _close(session: Inbound) -> None:
    await session.close()


def _bytes(message: Message) -> int:
    """Approximate memory of a message in a single outbox. The contents of other types are shared by all outboxes."""
    match message:
        case ManifestPart(data=data):
            return MESSAGE_BYTES + len(data)
        case Interest(bits=bits, wanted=wanted):
            return MESSAGE_BYTES + len(bits) + len(wanted)
        case Holdings(bits=bits):
            return MESSAGE_BYTES + len(bits)
        case Have(runs=runs):
            return MESSAGE_BYTES + 16 * len(runs)
        case Request(chunks=chunks) | Grant(chunks=chunks):
            return MESSAGE_BYTES + 8 * len(chunks)
        case _:
            return MESSAGE_BYTES
