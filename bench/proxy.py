"""A proxy in front of one node, TCP and UDP, that can be told to cut, to hang and to flip bits.

Datagrams of every source leave from a socket of their own, as through a router that translates addresses (NAT).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Any

Address = tuple[str, int]

READ_BYTES = 64 << 10


class Proxy:
    """`async with Proxy(here, there)`: traffic to `here` goes on to `there`, and back."""

    def __init__(self, here: Address, there: Address) -> None:
        self._here, self._there = here, there
        self._cut_until = self._hung_until = 0.0
        self._flip_after: int | None = None  # bytes from now
        self._rng = random.Random(0)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sources: dict[Address, asyncio.DatagramTransport] = {}

    def cut(self, duration_s: float) -> None:
        """Resets all connections, and new connections for so long; datagrams are lost."""
        self._cut_until = time.monotonic() + duration_s
        for writer in self._writers:
            writer.transport.abort()

    def hang(self, duration_s: float) -> None:
        """Carries nothing for so long; datagrams are lost."""
        self._hung_until = time.monotonic() + duration_s

    def flip(self, after_bytes: int, dice: random.Random) -> None:
        """Flips a bit of the traffic that follows these next bytes."""
        self._flip_after, self._rng = after_bytes, dice

    async def __aenter__(self) -> Proxy:
        loop = asyncio.get_running_loop()
        self._server = await asyncio.start_server(self._connected, *self._here)
        self._datagrams, _ = await loop.create_datagram_endpoint(lambda: _Relay(self._outward), local_addr=self._here)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for transport in (self._datagrams, *self._sources.values()):
            transport.close()
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            if time.monotonic() < self._cut_until:
                return
            there, onward = await asyncio.open_connection(*self._there)
            self._writers.add(onward)
            ways = [(reader, onward), (there, writer)]
            tasks = [asyncio.create_task(self._pump(*way)) for way in ways]
            self._tasks.update(tasks)
            await asyncio.wait(tasks)
            self._tasks.difference_update(tasks)
            self._writers.discard(onward)
            onward.transport.abort()
        except OSError:
            pass  # the node does not listen
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(READ_BYTES):
                await asyncio.sleep(max(0.0, self._hung_until - time.monotonic()))
                writer.write(self._flipped(data))
                await writer.drain()
            writer.write_eof()

    def _flipped(self, data: bytes) -> bytes:
        if self._flip_after is None or not data:
            return data
        if self._flip_after >= len(data):
            self._flip_after -= len(data)
            return data
        changed = bytearray(data)
        changed[self._flip_after] ^= 1 << self._rng.randrange(8)
        self._flip_after = None
        return bytes(changed)

    def _outward(self, data: bytes, source: Address) -> None:
        task = asyncio.get_running_loop().create_task(self._send(data, source))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, data: bytes, source: Address) -> None:
        if source not in self._sources:
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Relay(lambda answer, _: self._datagrams.sendto(answer, source)), remote_addr=self._there
            )
            self._sources[source] = transport
        if time.monotonic() > max(self._cut_until, self._hung_until):
            self._sources[source].sendto(self._flipped(data))


class _Relay(asyncio.DatagramProtocol):
    def __init__(self, carry: Any) -> None:
        self._carry = carry

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._carry(data, addr[:2])
