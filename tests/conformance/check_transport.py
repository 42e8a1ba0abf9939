"""The contract of transports as a program: what swarm/transport/__init__.py promises, every transport is asked here.

`check_transport(make_pair)` runs all of it; `CHECKS` lets a test runner name each question. `make_pair` opens a holder
and an asker that can reach it; two pairs can reach each other too.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import secrets
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TypeAlias

import pytest

from swarm.errors import LocalProtocolError, StoreError, SwarmError, TransportError
from swarm.store import FileSpan, Span
from swarm.transport import Inbound, Outbound, Transfer, Transport

DEADLINE_S = 30.0
BIG = 24 << 20
MIB = 1 << 20


@dataclass
class Pair:
    holder: Transport
    asker: Transport


MakePair: TypeAlias = Callable[[], AbstractAsyncContextManager[Pair]]
Check: TypeAlias = Callable[[MakePair], Awaitable[None]]


def check_transport(make_pair: MakePair) -> None:
    """Every question, one after another. Raises what the first wrong answer raises."""
    for check in CHECKS:
        run_check(check, make_pair)


def run_check(check: Check, make_pair: MakePair) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await check(make_pair)

    asyncio.run(within_deadline())


@contextlib.asynccontextmanager
async def session(make_pair: MakePair) -> AsyncIterator[tuple[Outbound, Inbound, Pair]]:
    async with make_pair() as pair:
        outbound, inbound = await connect(pair)
        yield outbound, inbound, pair


async def connect(pair: Pair, token: str | None = None) -> tuple[Outbound, Inbound]:
    token = token or secrets.token_hex(16)
    pair.holder.admit(token)
    assert pair.asker.reach(pair.holder.address)
    inbound = await pair.asker.connect(pair.holder.address, token, timeout_s=5)
    return await pair.holder.accept(token, timeout_s=5), inbound


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def transfer(number: int, size: int, idle_timeout_s: float = 10) -> Transfer:
    return Transfer(number, size, idle_timeout_s)


class Views:
    """Lends `sizes` bytes of one buffer, one view after another, and remembers how it was treated."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.buffer = bytearray(sum(sizes))
        self.sizes = sizes
        self.advanced = 0
        self.finished = False
        self.closed = False
        self.first = threading.Event()

        self._views = self._lend()

    def lend(self) -> Iterator[memoryview]:
        return self

    def __iter__(self) -> Iterator[memoryview]:
        return self

    def __next__(self) -> memoryview:
        return next(self._views)

    def close(self) -> None:
        self.closed = True
        self._views.close()

    def _lend(self) -> Generator[memoryview, None, None]:
        offset = 0
        for size in self.sizes:
            self.advanced += 1
            self.first.set()
            yield memoryview(self.buffer)[offset : offset + size]
            offset += size
        self.finished = True


class HalfSource:
    """Lends half of the bytes, then waits until it is released, then lends the rest."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.half_sent = threading.Event()
        self.released = threading.Event()

    def lend(self) -> Iterator[Span]:
        half = len(self.data) // 2
        yield memoryview(self.data)[:half]
        self.half_sent.set()
        if not self.released.wait(DEADLINE_S):
            raise StoreError("never released")
        yield memoryview(self.data)[half:]


async def happened(event: threading.Event) -> None:
    while not event.is_set():  # noqa: ASYNC110 - set on a thread; the check has a deadline
        await asyncio.sleep(0.005)


async def move(outbound: Outbound, inbound: Inbound, number: int, data: bytes) -> None:
    views = Views([len(data)])
    agreed = transfer(number, len(data))
    await asyncio.gather(inbound.receive(agreed, views.lend()), outbound.send(agreed, iter([memoryview(data)])))
    assert views.buffer == data
    assert views.finished


async def still_usable(outbound: Outbound, inbound: Inbound) -> None:
    assert inbound.alive
    await move(outbound, inbound, 1000, some_bytes(3 * MIB + 5, 9))


async def usable_or_dead(outbound: Outbound, inbound: Inbound) -> None:
    try:
        await move(outbound, inbound, 1001, some_bytes(3 * MIB + 5, 9))
    except TransportError:
        assert not inbound.alive


async def outcome(work: Awaitable[None]) -> BaseException | None:
    try:
        await work
    except (SwarmError, OSError, asyncio.CancelledError) as error:
        return error
    return None


async def check_sizes_arrive(make_pair: MakePair) -> None:
    async with session(make_pair) as (outbound, inbound, _):
        for number, size in enumerate((0, 1, 2, MIB - 1, MIB, MIB + 1, BIG)):
            await move(outbound, inbound, number, some_bytes(size, size))


async def check_file_spans_arrive_in_odd_views(make_pair: MakePair) -> None:
    data = some_bytes(5 * MIB + 12345)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        views = Views([1, 0, 7, 3 * MIB, 65_537, len(data) - 1 - 7 - 3 * MIB - 65_537, 0])
        spans: list[Span] = [
            FileSpan(file.fileno(), 0, 11),
            memoryview(data)[11 : MIB + 3],
            memoryview(b""),
            FileSpan(file.fileno(), MIB + 3, len(data) - MIB - 3),
        ]
        async with session(make_pair) as (outbound, inbound, _):
            agreed = transfer(1, len(data))
            await asyncio.gather(inbound.receive(agreed, views.lend()), outbound.send(agreed, iter(spans)))
        assert views.buffer == data
        assert views.finished


async def check_several_transfers_in_any_order(make_pair: MakePair) -> None:
    async with session(make_pair) as (outbound, inbound, _):
        for numbers in (range(8), range(15, 7, -1)):
            contents = {number: some_bytes(MIB // 2 + number, number) for number in numbers}
            views = {number: Views([100, len(data) - 100]) for number, data in contents.items()}
            async with asyncio.TaskGroup() as tasks:
                for number in sorted(numbers):
                    agreed = transfer(number, len(contents[number]))
                    tasks.create_task(inbound.receive(agreed, views[number].lend()))
                for number in numbers:
                    agreed = transfer(number, len(contents[number]))
                    tasks.create_task(outbound.send(agreed, iter([memoryview(contents[number])])))
            for number, data in contents.items():
                assert views[number].buffer == data


async def check_receive_posted_late(make_pair: MakePair) -> None:
    data = some_bytes(2 * MIB)
    async with session(make_pair) as (outbound, inbound, _):
        agreed = transfer(1, len(data))
        begun = threading.Event()

        def spans() -> Iterator[Span]:
            begun.set()
            yield memoryview(data)

        sending = asyncio.create_task(outbound.send(agreed, spans()))
        await asyncio.sleep(0.05)  # long enough for its first frames; being early would only make this easier
        views = Views([len(data)])
        await inbound.receive(agreed, views.lend())
        await sending
        assert begun.is_set()
        assert views.buffer == data


async def check_cancel_before_first_byte(make_pair: MakePair) -> None:
    async with session(make_pair) as (outbound, inbound, _):
        data = some_bytes(MIB)
        views = Views([len(data)])
        receiving = asyncio.create_task(inbound.receive(transfer(1, len(data)), views.lend()))
        await asyncio.sleep(0)
        receiving.cancel()
        assert isinstance(await outcome(receiving), asyncio.CancelledError)
        assert views.advanced == 0
        # The holder did not hear of it in time and sends all the same.
        await outcome(outbound.send(transfer(1, len(data)), iter([memoryview(data)])))
        assert views.advanced == 0
        await usable_or_dead(outbound, inbound)


async def check_cancelled_receive_leaves_views_alone(make_pair: MakePair) -> None:
    async with session(make_pair) as (outbound, inbound, _):
        data = some_bytes(4 * MIB)
        source, views = HalfSource(data), Views([4096] * 1024)
        agreed = transfer(1, len(data))
        receiving = asyncio.create_task(inbound.receive(agreed, views.lend()))
        sending = asyncio.create_task(outbound.send(agreed, source.lend()))
        await happened(source.half_sent)
        await happened(views.first)
        receiving.cancel()
        assert isinstance(await outcome(receiving), asyncio.CancelledError)
        assert views.closed
        before, advanced = bytes(views.buffer), views.advanced
        source.released.set()
        await outcome(sending)
        await usable_or_dead(outbound, inbound)
        assert (bytes(views.buffer), views.advanced) == (before, advanced)


async def check_cancelled_send_fails_the_receive(make_pair: MakePair) -> None:
    async with session(make_pair) as (outbound, inbound, _):
        data = some_bytes(4 * MIB)
        source, views = HalfSource(data), Views([len(data)])
        agreed = transfer(1, len(data))
        receiving = asyncio.create_task(inbound.receive(agreed, views.lend()))
        sending = asyncio.create_task(outbound.send(agreed, source.lend()))
        queued = asyncio.create_task(outbound.send(transfer(2, 1), iter([memoryview(b"x")])))
        second = asyncio.create_task(inbound.receive(transfer(2, 1), Views([1]).lend()))
        await happened(source.half_sent)
        queued.cancel()
        sending.cancel()
        await asyncio.sleep(0)  # they hear of it before the source goes on, or there is nothing left to cancel
        source.released.set()
        ends = [(await outcome(a), await outcome(b)) for a, b in ((queued, second), (sending, receiving))]
        if ends[0] != (None, None):  # where transfers travel side by side, the second is over when it is cancelled
            assert isinstance(ends[0][0], asyncio.CancelledError)
            assert isinstance(ends[0][1], TransportError)
        assert isinstance(ends[1][0], asyncio.CancelledError)
        assert isinstance(ends[1][1], TransportError)
        assert views.closed
        await usable_or_dead(outbound, inbound)


async def check_silence_times_out(make_pair: MakePair) -> None:
    async with session(make_pair) as (outbound, inbound, _):
        data = some_bytes(2 * MIB)
        source, views = HalfSource(data), Views([len(data)])
        agreed = transfer(1, len(data), idle_timeout_s=0.5)
        sending = asyncio.create_task(outbound.send(agreed, source.lend()))
        try:
            assert isinstance(await outcome(inbound.receive(agreed, views.lend())), TransportError)
            assert source.half_sent.is_set()
            assert views.closed
        finally:
            source.released.set()
        await outcome(sending)
        await usable_or_dead(outbound, inbound)


async def check_holder_gone(make_pair: MakePair) -> None:
    async with session(make_pair) as (outbound, inbound, pair):
        source, views = HalfSource(some_bytes(2 * MIB)), Views([MIB, MIB])
        agreed = transfer(1, 2 * MIB)
        receiving = asyncio.create_task(inbound.receive(agreed, views.lend()))
        queued = asyncio.create_task(inbound.receive(transfer(2, 1), Views([1]).lend()))
        sending = asyncio.create_task(outbound.send(agreed, source.lend()))
        await happened(source.half_sent)
        closing = asyncio.create_task(pair.holder.close())
        assert isinstance(await outcome(receiving), TransportError)
        assert isinstance(await outcome(queued), TransportError)
        assert views.closed
        assert not inbound.alive
        source.released.set()
        assert isinstance(await outcome(sending), TransportError)
        await closing
        assert isinstance(await outcome(inbound.receive(transfer(3, 1), Views([1]).lend())), TransportError)


async def check_asker_gone(make_pair: MakePair) -> None:
    async with session(make_pair) as (outbound, inbound, _):
        source, views = HalfSource(some_bytes(BIG)), Views([BIG])
        agreed = transfer(1, BIG)
        receiving = asyncio.create_task(inbound.receive(agreed, views.lend()))
        sending = asyncio.create_task(outbound.send(agreed, source.lend()))
        await happened(source.half_sent)
        await inbound.close()
        assert isinstance(await outcome(receiving), TransportError)
        assert not inbound.alive
        source.released.set()
        assert isinstance(await outcome(sending), TransportError)


async def check_error_out_of_spans(make_pair: MakePair) -> None:
    error = StoreError("changed while it was served")

    def spans() -> Iterator[Span]:
        yield memoryview(bytes(MIB))
        raise error

    async with session(make_pair) as (outbound, inbound, _):
        for number, size in enumerate((2 * MIB, MIB)):  # in the middle, and by the check after the last byte
            views = Views([size])
            receiving = asyncio.create_task(inbound.receive(transfer(number, size), views.lend()))
            assert await outcome(outbound.send(transfer(number, size), spans())) is error
            assert isinstance(await outcome(receiving), TransportError)
            assert views.closed
            await still_usable(outbound, inbound)


async def check_error_out_of_views(make_pair: MakePair) -> None:
    error = StoreError("disk full")

    def views(good: int) -> Iterator[memoryview]:
        for _ in range(good):
            yield memoryview(bytearray(MIB))
        raise error

    async with session(make_pair) as (outbound, inbound, _):
        for number in range(4):  # before the first view, in the middle, and after the last
            agreed = transfer(number, 3 * MIB)
            sending = asyncio.create_task(outbound.send(agreed, iter([memoryview(bytes(3 * MIB))])))
            assert await outcome(inbound.receive(agreed, views(number))) is error
            await outcome(sending)
            await still_usable(outbound, inbound)


async def check_wrong_sizes(make_pair: MakePair) -> None:
    async with session(make_pair) as (outbound, inbound, _):
        for number, length in enumerate((0, 99, 101, 3 * MIB)):  # spans that are not what was agreed
            receiving = asyncio.create_task(inbound.receive(transfer(number, 100), Views([100]).lend()))
            sent = await outcome(outbound.send(transfer(number, 100), iter([memoryview(bytes(length))])))
            assert isinstance(sent, LocalProtocolError)
            assert isinstance(await outcome(receiving), TransportError)
        for number, expected in enumerate((99, 101, 3 * MIB), 10):  # ends that did not agree
            views = Views([expected])
            receiving = asyncio.create_task(inbound.receive(transfer(number, expected), views.lend()))
            await outcome(outbound.send(transfer(number, 100), iter([memoryview(bytes(100))])))
            assert isinstance(await outcome(receiving), TransportError)
            assert views.closed
        for number, room in enumerate((0, 99, 101), 20):  # views that are not what was agreed
            receiving = asyncio.create_task(inbound.receive(transfer(number, 100), Views([room]).lend()))
            await outcome(outbound.send(transfer(number, 100), iter([memoryview(bytes(100))])))
            assert isinstance(await outcome(receiving), LocalProtocolError)
        await still_usable(outbound, inbound)


async def check_two_sources_at_once(make_pair: MakePair) -> None:
    async with make_pair() as first, make_pair() as second:
        data = [some_bytes(8 * MIB, seed) for seed in range(2)]
        both = [await connect(first), await connect(Pair(second.holder, first.asker))]
        async with asyncio.TaskGroup() as tasks:
            for (outbound, inbound), content in zip(both, data, strict=True):
                for number in range(3):
                    tasks.create_task(move(outbound, inbound, number, content))


async def check_unknown_token_is_refused(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        pair.holder.admit(secrets.token_hex(16))
        stranger = secrets.token_hex(16)
        with pytest.raises(TransportError, match="token"):
            await pair.asker.connect(pair.holder.address, stranger, timeout_s=5)
        with pytest.raises(TransportError):
            await pair.holder.accept(stranger, timeout_s=5)
        assert not pair.asker.reach("no address at all")


async def check_accept_waits_no_longer_than_told(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        token = secrets.token_hex(16)
        pair.holder.admit(token)
        with pytest.raises(TransportError):
            await pair.holder.accept(token, timeout_s=0.01)
        accepting = asyncio.create_task(pair.holder.accept(token, timeout_s=10))
        inbound = await pair.asker.connect(pair.holder.address, token, timeout_s=5)
        await move(await accepting, inbound, 1, b"hello")


async def check_latest_session_counts(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        token = secrets.token_hex(16)
        _, first = await connect(pair, token)
        await first.close()
        for _ in range(3):
            inbound = await pair.asker.connect(pair.holder.address, token, timeout_s=5)
            for number in itertools.count():  # the holder may hear of the new session a moment after its asker does
                outbound = await pair.holder.accept(token, timeout_s=5)
                data, views = some_bytes(1000), Views([1000])
                agreed = transfer(number, 1000, idle_timeout_s=1)
                receiving = asyncio.create_task(inbound.receive(agreed, views.lend()))
                failed = await outcome(outbound.send(agreed, iter([memoryview(data)])))
                done, _ = await asyncio.wait({receiving}, timeout=0.2)
                if done and not failed:
                    assert views.buffer == data
                    break
                receiving.cancel()
                await outcome(receiving)


async def check_revoke(make_pair: MakePair) -> None:
    async with make_pair() as pair:
        token = secrets.token_hex(16)
        outbound, inbound = await connect(pair, token)
        kept_outbound, kept_inbound = await connect(pair)
        receiving = asyncio.create_task(inbound.receive(transfer(1, 1), Views([1]).lend()))
        await asyncio.sleep(0)
        await pair.holder.revoke(token)
        assert isinstance(await outcome(receiving), TransportError)
        assert not inbound.alive
        assert isinstance(await outcome(outbound.send(transfer(2, 0), iter([]))), TransportError)
        with pytest.raises(TransportError):
            await pair.asker.connect(pair.holder.address, token, timeout_s=5)
        await still_usable(kept_outbound, kept_inbound)


async def check_memory_can_be_freed_at_once(make_pair: MakePair) -> None:
    async with session(make_pair) as (outbound, inbound, _):
        views = Views([MIB, MIB])
        agreed = transfer(1, 2 * MIB)
        sending = asyncio.create_task(outbound.send(agreed, iter([memoryview(bytes(2 * MIB))])))
        await inbound.receive(agreed, views.lend())
        views.buffer.clear()  # BufferError while anybody still holds a view of it
        await sending


async def check_no_thread_outlives_close(make_pair: MakePair) -> None:
    before = set(threading.enumerate())
    async with session(make_pair) as (outbound, inbound, _):
        await move(outbound, inbound, 1, b"x" * MIB)
    await asyncio.get_running_loop().shutdown_default_executor()
    deadline = asyncio.get_running_loop().time() + 5
    while leaked := set(threading.enumerate()) - before:
        assert asyncio.get_running_loop().time() < deadline, leaked
        await asyncio.sleep(0.01)


async def check_no_descriptor_outlives_close(make_pair: MakePair) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with session(make_pair) as (outbound, inbound, _):
        await move(outbound, inbound, 1, b"x" * MIB)
    deadline = asyncio.get_running_loop().time() + 5
    while len(os.listdir("/proc/self/fd")) > before:
        assert asyncio.get_running_loop().time() < deadline, "a socket was left open"
        await asyncio.sleep(0.01)


CHECKS: tuple[Check, ...] = tuple(
    check for name, check in list(globals().items()) if name.startswith("check_") and name != "check_transport"
)
