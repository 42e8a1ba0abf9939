"""Pairs of transports, sessions between them, and transfers whose use of memory is watched.

`testing.transports` makes its checks of these. An implementer provides a factory, as `swarm.transport.registry` calls
it (`pairs_of`), or a function that opens a `Pair`.

Must not know: what a transport promises.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TypeAlias

from swarm.errors import StoreError, SwarmError, TransportError
from swarm.net.listener import Listener
from swarm.store import Span
from swarm.testing.require import require
from swarm.transport import AdoptingTransport, Inbound, Outbound, Transfer, Transport
from swarm.transport.pace import Unlimited
from swarm.transport.registry import Factory, TransportConfig

DEADLINE_S = 30.0  # of a check; most take milliseconds
MIB = 1 << 20


@dataclass
class Pair:
    """Two open transports of the same scheme. `asker` can reach `holder`."""

    holder: Transport
    asker: Transport


MakePair: TypeAlias = Callable[[], AbstractAsyncContextManager[Pair]]
"""Opens a pair and closes its transports at the end. An asker can reach the holders of other pairs too."""


def pairs_of(factory: Factory) -> MakePair:
    """Pairs of a factory's transports on loopback, each with a listener that hands connections to `adopt`."""

    @contextlib.asynccontextmanager
    async def make_pair() -> AsyncIterator[Pair]:
        async with contextlib.AsyncExitStack() as stack:
            yield Pair(*[await stack.enter_async_context(_opened(factory)) for _ in range(2)])

    return make_pair


@contextlib.asynccontextmanager
async def _opened(factory: Factory) -> AsyncIterator[Transport]:
    listener = await Listener.open("127.0.0.1", 0)
    here = listener.address
    try:
        transport = factory(TransportConfig(here, here, Unlimited(), congestion=None, identity=None, encrypted=False))
        if transport is None:
            raise AssertionError("the factory returns None: the transport cannot be used on this machine")
        routes = {transport.opening: transport.adopt} if isinstance(transport, AdoptingTransport) else {}
        listener.serve(routes, _hang_up)
        try:
            yield transport
        finally:
            await transport.close()
    finally:
        await listener.close()


async def _hang_up(sock: socket.socket) -> None:
    sock.close()


@contextlib.asynccontextmanager
async def session(make_pair: MakePair) -> AsyncIterator[tuple[Outbound, Inbound, Pair]]:
    """Both ends of a session between the transports of a new pair."""
    async with make_pair() as pair:
        outbound, inbound = await connect(pair)
        yield outbound, inbound, pair


async def connect(pair: Pair, token: str | None = None) -> tuple[Outbound, Inbound]:
    """Opens a session of a pair with a token, by default a new token."""
    token = token or secrets.token_hex(16)
    pair.holder.admit(token)
    require(pair.asker.reach(pair.holder.address), "`reach` says False for an address that `connect` can reach")
    inbound = await pair.asker.connect(pair.holder.address, token, timeout_s=5)
    return await pair.holder.accept(token, timeout_s=5), inbound


def transfer(number: int, size: int, idle_timeout_s: float = 10) -> Transfer:
    """A transfer with a long idle timeout."""
    return Transfer(number, size, idle_timeout_s)


async def outcome(work: Awaitable[object]) -> BaseException | None:
    """The error that `work` ends with, or None."""
    try:
        await work
    except (SwarmError, OSError, asyncio.CancelledError) as error:
        return error
    return None


class Views(Iterator[memoryview]):
    """Lends `sizes` bytes of a buffer, view by view, and records its use."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.buffer = bytearray(sum(sizes))
        self.advanced = 0
        self.finished = False
        self.closed = False
        self.first = threading.Event()
        self._views = self._lend(sizes)

    def __next__(self) -> memoryview:
        return next(self._views)

    def close(self) -> None:
        """As the generator of a store: no view is lent any more."""
        self.closed = True
        self._views.close()

    def require_filled(self, data: bytes) -> None:
        """Raises AssertionError unless all views were filled with `data`."""
        require(self.buffer == data, "other bytes arrive than were sent")
        require(self.finished, "`receive` returns before the views were advanced after the last one")

    def _lend(self, sizes: Sequence[int]) -> Generator[memoryview, None, None]:
        offset = 0
        for size in sizes:
            self.advanced += 1
            self.first.set()
            yield memoryview(self.buffer)[offset : offset + size]
            offset += size
        self.finished = True


class HalfSource:
    """Lends half of the bytes, waits until it is released, and lends the rest."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.half_sent = threading.Event()
        self.released = threading.Event()

    def lend(self) -> Iterator[Span]:
        """The spans. The second blocks its thread until `released` is set."""
        half = len(self._data) // 2
        yield memoryview(self._data)[:half]
        self.half_sent.set()
        if not self.released.wait(DEADLINE_S):
            raise StoreError("never released")
        yield memoryview(self._data)[half:]


def random_bytes(size: int, seed: int = 0) -> bytes:
    """The same bytes for the same seed."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - contents, not secrets


async def send(outbound: Outbound, agreed: Transfer, data: bytes) -> None:
    """Sends `data` as one span."""
    await outbound.send(agreed, iter([memoryview(data)]))


def start(
    outbound: Outbound, inbound: Inbound, agreed: Transfer, spans: Iterator[Span], views: Iterator[memoryview]
) -> tuple[asyncio.Task[None], asyncio.Task[None]]:
    """Tasks of both ends of a transfer: that of `receive`, that of `send`."""
    return asyncio.create_task(inbound.receive(agreed, views)), asyncio.create_task(outbound.send(agreed, spans))


async def move(outbound: Outbound, inbound: Inbound, number: int, data: bytes) -> None:
    """Sends and receives `data`. Raises AssertionError for other bytes."""
    views = Views([len(data)])
    agreed = transfer(number, len(data))
    await asyncio.gather(inbound.receive(agreed, views), send(outbound, agreed, data))
    views.require_filled(data)


async def happened(event: threading.Event) -> None:
    """Waits for an event of a thread."""
    while not event.is_set():  # noqa: ASYNC110 - set on a thread; the check has a deadline
        await asyncio.sleep(0.005)


async def require_soon(holds: Callable[[], bool], promise: str) -> None:
    """Raises AssertionError with the broken promise if a condition does not hold within 5 s."""
    deadline = asyncio.get_running_loop().time() + 5
    while not holds():
        require(asyncio.get_running_loop().time() < deadline, promise)
        await asyncio.sleep(0.01)


async def require_usable(outbound: Outbound, inbound: Inbound) -> None:
    """Raises AssertionError unless the session lives and moves bytes."""
    require(inbound.alive, "the session is dead after an error that it should survive")
    await move(outbound, inbound, 1000, random_bytes(3 * MIB + 5, 9))


async def require_usable_or_dead(outbound: Outbound, inbound: Inbound) -> None:
    """As `require_usable`, but a session may also say that it is dead."""
    try:
        await move(outbound, inbound, 1001, random_bytes(3 * MIB + 5, 9))
    except TransportError:
        require(not inbound.alive, "a session that fails says that it is alive")


async def require_error(work: Awaitable[object], kind: type[BaseException]) -> None:
    """Raises AssertionError unless `work` ends with an error of this kind."""
    require_kinds([await outcome(work)], kind)


def require_kinds(errors: Sequence[BaseException | None], *kinds: type[BaseException]) -> None:
    """Raises AssertionError unless each error is of its kind."""
    for error, kind in zip(errors, kinds, strict=True):
        require(isinstance(error, kind), f"{kind.__name__} is expected, not {error!r}")
