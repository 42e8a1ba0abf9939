"""Several TCP connections that carry the transfers of a session side by side.

A connection uses one core at each end, since a single thread receives, hashes and lands its bytes. An asker opens more
connections while that raises the rate, each with a thread. They are one session: transfers are posted once for all
connections, the holder sends each transfer through the connection with the shortest queue, and the loss of a connection
ends the session.

    asker   receive(7) ──> posted: 5 6 7 <── stream 0: DATA 5 DATA 5 END 5 <── send(5)   holder
                                         <── stream 1: DATA 6 DATA 6 ...   <── send(6)

Must not know: how connections are opened, the contents of transfers.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator

from swarm.errors import TransportError
from swarm.protocol.messages import STREAMS_MAX
from swarm.store import AnySpan, View
from swarm.transport import Transfer
from swarm.transport.tcp_inbound import TcpInbound
from swarm.transport.tcp_outbound import TcpOutbound

CORES_PER_STREAM = 4  # on fewer cores, more threads wait for each other and for the GIL
WINDOW_S = 0.02  # of a rate measurement: 80 MB at the rate of a stream
GROWTH_MIN = 1.2  # least gain of the rate for twice the streams; below, the number stays


def streams_most() -> int:
    """Most connections of a session, by the cores that this process may use."""
    return min(STREAMS_MAX, max(1, len(os.sched_getaffinity(0)) // CORES_PER_STREAM))


class Growth:
    """The number of connections of a session: doubled while that raises the rate. Told the time."""

    def __init__(self, most: int) -> None:
        self.wanted = 1
        self._most = most
        self._rate = 0.0  # with half as many streams
        self._window: tuple[float, int] | None = None  # its begin, and the bytes received until then

    def look(self, *, now: float, received_bytes: int, streams: int, outstanding: int) -> int:
        """The wanted number of connections, given `streams` open connections and `outstanding` posted transfers."""
        if self.wanted >= self._most or streams < self.wanted or outstanding <= streams:
            self._window = None  # enough, being opened, or posted transfers bound the rate
            return self.wanted
        if self._window is None:
            self._window = now, received_bytes
            return self.wanted
        began, before = self._window
        if now - began >= WINDOW_S:
            rate = (received_bytes - before) / (now - began)
            if rate >= GROWTH_MIN * self._rate:
                self.wanted = min(2 * self.wanted, self._most)
            else:
                self._most = self.wanted
            self._rate, self._window = rate, None
        return self.wanted

    def stop(self, streams: int) -> None:
        """No more than these can be had."""
        self.wanted = self._most = streams


class InboundStreams:
    """The asker's end of a session. `dial` opens a connection beside the first."""

    on_device = False

    def __init__(self, first: TcpInbound, *, most: int, dial: Callable[[TcpInbound], Awaitable[TcpInbound]]) -> None:
        self._streams = [first]
        self._growth = Growth(most)
        self._dial = dial
        self._dialling: asyncio.Task[None] | None = None
        self._outstanding = 0
        self._closed = False

    async def receive(self, transfer: Transfer, views: Iterator[View]) -> None:
        """As Inbound; the holder chooses the connection."""
        self._outstanding += 1
        self._grow()
        try:
            await self._streams[0].receive(transfer, views)
        finally:
            self._outstanding -= 1

    async def open(self, wanted: int) -> None:
        """Dials until `wanted` connections are open. Raises TransportError."""
        while len(self._streams) < wanted:  # in turn: the holder accepts ascending counts only
            self._streams.append(await self._dial(self._streams[0]))

    @property
    def streams(self) -> int:
        """Connections that are open."""
        return len(self._streams)

    @property
    def received_bytes(self) -> int:
        """Bytes of all connections so far."""
        return sum(stream.received_bytes for stream in self._streams)

    @property
    def alive(self) -> bool:
        """Whether every connection can carry another transfer."""
        return all(stream.alive for stream in self._streams)

    async def close(self) -> None:
        """Closes all connections; transfers in flight fail with TransportError."""
        self._closed = True
        if self._dialling:
            self._dialling.cancel()
            await asyncio.gather(self._dialling, return_exceptions=True)
        await asyncio.gather(*(stream.close() for stream in self._streams))

    def _grow(self) -> None:
        if self._dialling is None:
            wanted = self._growth.look(
                now=time.monotonic(), received_bytes=self.received_bytes, streams=self.streams,
                outstanding=self._outstanding,
            )  # fmt: skip
            if wanted > self.streams and self.alive:
                self._dialling = asyncio.create_task(self._open(wanted), name="open streams")

    async def _open(self, wanted: int) -> None:
        try:
            await self.open(wanted)
        except TransportError:  # the connections that are open go on
            self._growth.stop(self.streams)
        finally:
            self._dialling = None

    def __repr__(self) -> str:
        return f"<InboundStreams {len(self._streams)} {self._streams[0]!r}>"


class OutboundStreams:
    """The holder's end of a session."""

    on_device = False

    def __init__(self, first: TcpOutbound, count: int) -> None:
        self.count = count  # of the first connection's preamble: connections that join name it
        self._streams = [first]

    def join(self, stream: TcpOutbound) -> bool:
        """Adds a connection; False when there are STREAMS_MAX or the session is lost."""
        if len(self._streams) >= STREAMS_MAX or not self.alive:
            return False
        self._streams.append(stream)
        return True

    async def send(self, transfer: Transfer, spans: Iterator[AnySpan]) -> None:
        """As Outbound, through the connection with the shortest queue."""
        await min(self._streams, key=lambda stream: stream.queued).send(transfer, spans)

    @property
    def streams(self) -> int:
        """Connections that are open."""
        return len(self._streams)

    @property
    def alive(self) -> bool:
        """Whether every connection can carry another transfer."""
        return all(stream.alive for stream in self._streams)

    async def close(self) -> None:
        """Closes all connections."""
        await asyncio.gather(*(stream.close() for stream in self._streams))

    def __repr__(self) -> str:
        return f"<OutboundStreams {len(self._streams)} {self._streams[0]!r}>"
