"""One connected peer: its link with an outbox, what it said of itself, and the session its chunks are read through.

Owns what lives exactly as long as one link does. It does not interpret messages and takes no decisions: `node` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from swarm.errors import TransportError
from swarm.link import Link
from swarm.messages import Announcement, Hello, Message
from swarm.transport import Inbound, Transport

OUTBOX_MAX = 4096  # messages a peer may leave unread before it counts as gone
CONNECT_TIMEOUT_S = 5.0


class Peer:
    """A node at the other end of an open link. `token` is what it must show to open a session to this node."""

    def __init__(self, number: int, link: Link, hello: Hello, *, token: str, transports: Sequence[Transport]) -> None:
        self.number = number
        self.node = hello.node
        self.hello = hello
        self.token = token
        self.link = link
        self.artifacts: dict[str, Announcement] = {a.digest: a for a in hello.artifacts}
        self.wants: set[str] = set()  # digests it asked to hear about
        self.asked: set[str] = set()  # digests it was asked to tell about
        self.why_gone: str | None = None  # set by whoever cuts it off
        self._outbox: asyncio.Queue[Message] = asyncio.Queue(OUTBOX_MAX)
        self._overflowed = asyncio.Event()
        self._session: Inbound | None = None
        self._connecting = asyncio.Lock()
        self._route = _route(hello, transports)

    @property
    def name(self) -> str:
        """What people call it."""
        return self.hello.name

    @property
    def scheme(self) -> str:
        """The transport that this peer is read through, and why it is that one."""
        return self._route[0].scheme if self._route else "none"

    def post(self, message: Message) -> None:
        """Queues a message. A peer that leaves too many unread is cut off; to one that is gone nothing is sent."""
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            self.why_gone = self.why_gone or f"left {OUTBOX_MAX} messages unread"
            self._overflowed.set()

    async def write(self) -> None:
        """Sends what is posted until the link breaks or the peer is cut off, and then closes the link."""
        overflow = asyncio.create_task(self._overflowed.wait())
        sending = asyncio.create_task(self._send_all())
        try:
            await asyncio.wait([overflow, sending], return_when=asyncio.FIRST_COMPLETED)
        finally:
            overflow.cancel()
            sending.cancel()
            await asyncio.gather(overflow, sending, return_exceptions=True)
            await self.link.close()

    async def _send_all(self) -> None:
        while True:
            await self.link.send(await self._outbox.get())

    async def session(self) -> Inbound:
        """The open session to this peer. Raises TransportError."""
        async with self._connecting:
            if self._session is None or not self._session.alive:
                if self._route is None:
                    raise TransportError(f"{self.name} offers no transport that this node can use")
                if self._session is not None:
                    await self._session.close()
                transport, address = self._route
                self._session = await transport.connect(address, self.hello.token, timeout_s=CONNECT_TIMEOUT_S)
            return self._session

    async def close(self) -> None:
        """Ends the session and the link."""
        if self._session is not None:
            await self._session.close()
        await self.link.close()

    def __repr__(self) -> str:
        return f"<Peer {self.name} {self.hello.address} {self.scheme} | {len(self.artifacts)} artifacts>"


def _route(hello: Hello, transports: Sequence[Transport]) -> tuple[Transport, str] | None:
    """The first of this node's transports, preferred first, that the peer offers at an address reachable from here."""
    offers = {offer.scheme: offer.address for offer in hello.transports}
    for transport in transports:
        address = offers.get(transport.scheme)
        if address is not None and transport.reach(address):
            return transport, address
    return None
