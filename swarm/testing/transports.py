"""The contract of `swarm.transport.Transport` as a program.

Each function of `CHECKS` is a promise; its docstring states it. `check_transport` runs them all, `run_check` a single
check, so that a test runner can name it:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_does_it_keep_the_contract(check):
        run_check(check, pairs_of(MyTransport))

Must not know: how a transport moves bytes, how a pair is opened (`testing.transport_pairs`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeAlias

from swarm.errors import LocalProtocolError, StoreError, TransportError
from swarm.store import FileSpan, Span
from swarm.testing.require import require
from swarm.testing.transport_pairs import (
    DEADLINE_S,
    MIB,
    HalfSource,
    MakePair,
    Pair,
    Views,
    connect,
    happened,
    move,
    outcome,
    random_bytes,
    require_error,
    require_kinds,
    require_soon,
    require_usable,
    require_usable_or_dead,
    send,
    session,
    start,
    transfer,
)

BIG = 24 * MIB

Check: TypeAlias = Callable[[MakePair], Awaitable[None]]


def check_transport(make_pair: MakePair) -> None:
    """Runs every check of CHECKS. Raises AssertionError, or the error of the transport, at the first broken promise."""
    for check in CHECKS:
        run_check(check, make_pair)


def run_check(check: Check, make_pair: MakePair) -> None:
    """Runs a check on an event loop of its own. Raises TimeoutError after DEADLINE_S."""

    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await check(make_pair)

    asyncio.run(within_deadline())


async def check_scheme(make_pair: MakePair) -> None:
    """The scheme, equal at both ends, is 1 to 16 of a-z and _; `reason` is a text."""
    async with make_pair() as pair:
        scheme = pair.holder.scheme
        require(re.fullmatch("[a-z_]{1,16}", scheme), f"the scheme {scheme!r} is not 1 to 16 of a-z and _")
        require(pair.asker.scheme == scheme, "both ends have a scheme of their own")
        require(pair.holder.reason, "`reason` is empty")


async def check_sizes_arrive(make_pair: MakePair) -> None:
    """Transfers of 0 bytes to 24 MiB arrive whole, and exactly."""
    async with session(make_pair) as (outbound, inbound, _):
        for number, size in enumerate((0, 1, 2, MIB - 1, MIB, MIB + 1, BIG)):
            await move(outbound, inbound, number, random_bytes(size, size))


async def check_file_spans_arrive_in_odd_views(make_pair: MakePair) -> None:
    """Spans of files and of memory, also empty spans, fill views that are cut at other places."""
    data = random_bytes(5 * MIB + 12345)
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
            await asyncio.gather(inbound.receive(agreed, views), outbound.send(agreed, iter(spans)))
        views.require_filled(data)


async def check_several_transfers_in_any_order(make_pair: MakePair) -> None:
    """Transfers that are posted at once arrive, in whichever order the holder sends them."""
    async with session(make_pair) as (outbound, inbound, _):
        for numbers in (range(8), range(15, 7, -1)):
            contents = {number: random_bytes(MIB // 2 + number, number) for number in numbers}
            views = {number: Views([100, len(data) - 100]) for number, data in contents.items()}
            async with asyncio.TaskGroup() as tasks:
                for number in sorted(numbers):
                    tasks.create_task(inbound.receive(transfer(number, len(contents[number])), views[number]))
                for number in numbers:
                    tasks.create_task(send(outbound, transfer(number, len(contents[number])), contents[number]))
            for number, data in contents.items():
                views[number].require_filled(data)


async def check_receive_posted_late(make_pair: MakePair) -> None:
    """A `send` waits for its `receive`."""
    data = random_bytes(2 * MIB)
    async with session(make_pair) as (outbound, inbound, _):
        agreed, views, begun = transfer(1, len(data)), Views([len(data)]), threading.Event()

        def spans() -> Iterator[Span]:
            begun.set()
            yield memoryview(data)

        sending = asyncio.create_task(outbound.send(agreed, spans()))
        await asyncio.sleep(0.05)  # long enough for its first frames; being early would only make this easier
        await inbound.receive(agreed, views)
        await sending
        require(begun.is_set(), "a transfer arrived whose spans were never advanced")
        views.require_filled(data)


async def check_cancel_before_first_byte(make_pair: MakePair) -> None:
    """A `receive` that is cancelled before its `send` never touches its views; the holder may not know, and sends."""
    async with session(make_pair) as (outbound, inbound, _):
        data = random_bytes(MIB)
        views = Views([len(data)])
        receiving = asyncio.create_task(inbound.receive(transfer(1, len(data)), views))
        await asyncio.sleep(0)
        receiving.cancel()
        await require_error(receiving, asyncio.CancelledError)
        require(views.advanced == 0, "a cancelled receive had advanced its views")
        await outcome(send(outbound, transfer(1, len(data)), data))
        require(views.advanced == 0, "a cancelled receive advances its views")
        await require_usable_or_dead(outbound, inbound)


async def check_cancelled_receive_leaves_views_alone(make_pair: MakePair) -> None:
    """Once a cancelled `receive` has returned, its views are closed and their memory is not written to."""
    async with session(make_pair) as (outbound, inbound, _):
        data = random_bytes(4 * MIB)
        source, views = HalfSource(data), Views([4096] * 1024)
        receiving, sending = start(outbound, inbound, transfer(1, len(data)), source.lend(), views)
        await happened(source.half_sent)
        await happened(views.first)
        receiving.cancel()
        await require_error(receiving, asyncio.CancelledError)
        require(views.closed, "the views of a cancelled receive are not closed")
        before, advanced = bytes(views.buffer), views.advanced
        source.released.set()
        await outcome(sending)
        await require_usable_or_dead(outbound, inbound)
        require((bytes(views.buffer), views.advanced) == (before, advanced), "a cancelled receive writes to its views")


async def check_cancelled_send_fails_the_receive(make_pair: MakePair) -> None:
    """A `send` that is cancelled aborts the transfer on both ends, in its middle and before its first byte."""
    async with session(make_pair) as (outbound, inbound, _):
        data = random_bytes(4 * MIB)
        source, views = HalfSource(data), Views([len(data)])
        receiving, sending = start(outbound, inbound, transfer(1, len(data)), source.lend(), views)
        second, queued = start(outbound, inbound, transfer(2, 1), iter([memoryview(b"x")]), Views([1]))
        await happened(source.half_sent)
        queued.cancel()
        sending.cancel()
        await asyncio.sleep(0)  # they hear of it before the source goes on, or there is nothing left to cancel
        source.released.set()
        ends = await outcome(queued), await outcome(second)
        if ends[1] is not None:  # None: transfers travel side by side, and it had arrived when it was cancelled
            require_kinds(ends, asyncio.CancelledError, TransportError)
        require_kinds((await outcome(sending), await outcome(receiving)), asyncio.CancelledError, TransportError)
        require(views.closed, "the views of an aborted transfer are not closed")
        await require_usable_or_dead(outbound, inbound)


async def check_silence_times_out(make_pair: MakePair) -> None:
    """A `receive` fails when nothing arrives for its idle timeout in the middle of a transfer."""
    async with session(make_pair) as (outbound, inbound, _):
        source, views = HalfSource(random_bytes(2 * MIB)), Views([2 * MIB])
        agreed = transfer(1, 2 * MIB, idle_timeout_s=0.5)
        receiving, sending = start(outbound, inbound, agreed, source.lend(), views)
        try:
            await require_error(receiving, TransportError)
            require(source.half_sent.is_set(), "the idle timeout ran before the first byte")
            require(views.closed, "the views of a failed receive are not closed")
        finally:
            source.released.set()
        await outcome(sending)
        await require_usable_or_dead(outbound, inbound)


async def check_holder_gone(make_pair: MakePair) -> None:
    """When the holder closes, all transfers of both ends fail, and the session is dead."""
    async with session(make_pair) as (outbound, inbound, pair):
        source, views = HalfSource(random_bytes(2 * MIB)), Views([MIB, MIB])
        receiving, sending = start(outbound, inbound, transfer(1, 2 * MIB), source.lend(), views)
        queued = asyncio.create_task(inbound.receive(transfer(2, 1), Views([1])))
        await happened(source.half_sent)
        closing = asyncio.create_task(pair.holder.close())
        await require_error(receiving, TransportError)
        await require_error(queued, TransportError)
        require(views.closed, "the views of a failed receive are not closed")
        require(not inbound.alive, "a session is alive after its holder closed")
        source.released.set()
        await require_error(sending, TransportError)
        await closing
        await require_error(inbound.receive(transfer(3, 1), Views([1])), TransportError)


async def check_asker_gone(make_pair: MakePair) -> None:
    """When the asker closes the session, transfers of both ends fail."""
    async with session(make_pair) as (outbound, inbound, _):
        source, views = HalfSource(random_bytes(BIG)), Views([BIG])
        receiving, sending = start(outbound, inbound, transfer(1, BIG), source.lend(), views)
        await happened(source.half_sent)
        await inbound.close()
        await require_error(receiving, TransportError)
        require(not inbound.alive, "a session is alive after its asker closed it")
        source.released.set()
        await require_error(sending, TransportError)


async def check_error_out_of_spans(make_pair: MakePair) -> None:
    """An error out of spans aborts the transfer, comes out of `send` unchanged, and keeps the session."""
    error = StoreError("changed while it was served")

    def spans() -> Iterator[Span]:
        yield memoryview(bytes(MIB))
        raise error

    async with session(make_pair) as (outbound, inbound, _):
        for number, size in enumerate((2 * MIB, MIB)):  # in the middle, and by the check after the last byte
            views = Views([size])
            receiving, sending = start(outbound, inbound, transfer(number, size), spans(), views)
            require(await outcome(sending) is error, "an error out of spans does not come out of `send`")
            await require_error(receiving, TransportError)
            require(views.closed, "the views of an aborted transfer are not closed")
            await require_usable(outbound, inbound)


async def check_error_out_of_views(make_pair: MakePair) -> None:
    """An error out of views comes out of `receive` unchanged, and keeps the session."""
    error = StoreError("disk full")

    def views(good: int) -> Iterator[memoryview]:
        for _ in range(good):
            yield memoryview(bytearray(MIB))
        raise error

    async with session(make_pair) as (outbound, inbound, _):
        for number in range(4):  # before the first view, in the middle, and after the last
            agreed = transfer(number, 3 * MIB)
            sending = asyncio.create_task(send(outbound, agreed, bytes(3 * MIB)))
            failed = await outcome(inbound.receive(agreed, views(number)))
            require(failed is error, "an error out of views does not come out of `receive`")
            await outcome(sending)
            await require_usable(outbound, inbound)


async def check_wrong_sizes(make_pair: MakePair) -> None:
    """Spans or views that are not `size` bytes are a LocalProtocolError; ends of different sizes a TransportError."""
    async with session(make_pair) as (outbound, inbound, _):
        for number, length in enumerate((0, 99, 101, 3 * MIB)):
            spans: Iterator[Span] = iter([memoryview(bytes(length))])
            receiving, sending = start(outbound, inbound, transfer(number, 100), spans, Views([100]))
            await require_error(sending, LocalProtocolError)
            await require_error(receiving, TransportError)
        for number, expected in enumerate((99, 101, 3 * MIB), 10):
            views = Views([expected])
            receiving = asyncio.create_task(inbound.receive(transfer(number, expected), views))
            await outcome(send(outbound, transfer(number, 100), bytes(100)))
            await require_error(receiving, TransportError)
            require(views.closed, "the views of a failed receive are not closed")
        for number, room in enumerate((0, 99, 101), 20):
            receiving = asyncio.create_task(inbound.receive(transfer(number, 100), Views([room])))
            await outcome(send(outbound, transfer(number, 100), bytes(100)))
            await require_error(receiving, LocalProtocolError)
        await require_usable(outbound, inbound)


async def check_two_sources_at_once(make_pair: MakePair) -> None:
    """An asker receives from two holders at once; transfer ids are unique for a session only."""
    async with make_pair() as first, make_pair() as second:
        both = [await connect(first), await connect(Pair(second.holder, first.asker))]
        async with asyncio.TaskGroup() as tasks:
            for seed, (outbound, inbound) in enumerate(both):
                for number in range(3):
                    tasks.create_task(move(outbound, inbound, number, random_bytes(8 * MIB, seed)))


async def check_unknown_token_is_refused(make_pair: MakePair) -> None:
    """`connect` and `accept` fail for a token that was not admitted; the error of `connect` says so."""
    async with make_pair() as pair:
        pair.holder.admit(secrets.token_hex(16))
        stranger = secrets.token_hex(16)
        error = await outcome(pair.asker.connect(pair.holder.address, stranger, timeout_s=5))
        require_kinds([error], TransportError)
        require("token" in str(error), f"the error of a refused token does not say so: {error}")
        await require_error(pair.holder.accept(stranger, timeout_s=5), TransportError)
        require(not pair.asker.reach("no address at all"), "`reach` says True for what is no address")


async def check_accept_waits_no_longer_than_told(make_pair: MakePair) -> None:
    """`accept` waits for a session until its timeout."""
    async with make_pair() as pair:
        token = secrets.token_hex(16)
        pair.holder.admit(token)
        await require_error(pair.holder.accept(token, timeout_s=0.01), TransportError)
        accepting = asyncio.create_task(pair.holder.accept(token, timeout_s=10))
        inbound = await pair.asker.connect(pair.holder.address, token, timeout_s=5)
        await move(await accepting, inbound, 1, b"hello")


async def check_latest_session_counts(make_pair: MakePair) -> None:
    """After a session broke, `accept` returns the next session that the same token opened."""
    async with make_pair() as pair:
        token = secrets.token_hex(16)
        _, first = await connect(pair, token)
        await first.close()
        for _ in range(3):
            inbound = await pair.asker.connect(pair.holder.address, token, timeout_s=5)
            for number in itertools.count():  # the holder may hear of the new session a moment after its asker does
                outbound = await pair.holder.accept(token, timeout_s=5)
                data, views = random_bytes(1000), Views([1000])
                agreed = transfer(number, 1000, idle_timeout_s=1)
                receiving, sending = start(outbound, inbound, agreed, iter([memoryview(data)]), views)
                failed = await outcome(sending)
                done, _ = await asyncio.wait({receiving}, timeout=0.2)
                if done and not failed:
                    require(views.buffer == data, "other bytes arrive than were sent")
                    break
                receiving.cancel()
                await outcome(receiving)


async def check_revoke(make_pair: MakePair) -> None:
    """`revoke` ends the sessions of a token, refuses the token from then on, and leaves other sessions alone."""
    async with make_pair() as pair:
        token = secrets.token_hex(16)
        outbound, inbound = await connect(pair, token)
        kept_outbound, kept_inbound = await connect(pair)
        receiving = asyncio.create_task(inbound.receive(transfer(1, 1), Views([1])))
        await asyncio.sleep(0)
        await pair.holder.revoke(token)
        await require_error(receiving, TransportError)
        require(not inbound.alive, "a session is alive after its token was revoked")
        await require_error(outbound.send(transfer(2, 0), iter([])), TransportError)
        await require_error(pair.asker.connect(pair.holder.address, token, timeout_s=5), TransportError)
        await require_usable(kept_outbound, kept_inbound)


async def check_memory_can_be_freed_at_once(make_pair: MakePair) -> None:
    """When `receive` returns, nothing refers to its views: the memory may be freed."""
    async with session(make_pair) as (outbound, inbound, _):
        views = Views([MIB, MIB])
        agreed = transfer(1, 2 * MIB)
        sending = asyncio.create_task(send(outbound, agreed, bytes(2 * MIB)))
        await inbound.receive(agreed, views)
        views.buffer.clear()  # BufferError while a view of it exists
        await sending


async def check_no_thread_outlives_close(make_pair: MakePair) -> None:
    """The threads of a transport end within 5 s of `close`."""
    before = set(threading.enumerate())
    async with session(make_pair) as (outbound, inbound, _):
        await move(outbound, inbound, 1, b"x" * MIB)
    await asyncio.get_running_loop().shutdown_default_executor()
    await require_soon(lambda: set(threading.enumerate()) <= before, "a thread is left after `close`")


async def check_no_descriptor_outlives_close(make_pair: MakePair) -> None:
    """The sockets and files of a transport are closed within 5 s of `close`."""
    before = len(os.listdir("/proc/self/fd"))
    async with session(make_pair) as (outbound, inbound, _):
        await move(outbound, inbound, 1, b"x" * MIB)
    await require_soon(lambda: len(os.listdir("/proc/self/fd")) <= before, "a socket is left open after `close`")


CHECKS: tuple[Check, ...] = tuple(
    check for name, check in list(globals().items()) if name.startswith("check_") and name != "check_transport"
)
