"""Several connections of one session: how many, which one carries a transfer, and the loss of one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

import pytest

from swarm.errors import TransportError
from swarm.net.listener import Listener
from swarm.protocol.messages import STREAMS_MAX
from swarm.transport import Transfer, tcp
from swarm.transport.streams import GROWTH_MIN, WINDOW_S, Growth, InboundStreams, OutboundStreams
from swarm.transport.tcp import TcpTransport

TOKEN, OTHER_TOKEN = "0123456789abcdef" * 2, "fedcba9876543210" * 2
DEADLINE_S = 20.0


def grown(most: int, rates: dict[int, float]) -> list[int]:
    """The streams that are wanted over time, where so many have this rate and as many are opened as are wanted."""
    growth, now, received, wanted = Growth(most), 0.0, 0.0, [1]
    for _ in range(40):
        streams = wanted[-1]
        wanted.append(growth.look(now=now, received_bytes=int(received), streams=streams, outstanding=2 * streams))
        now += WINDOW_S
        received += rates[streams] * WINDOW_S
    return sorted(set(wanted))


def test_are_streams_doubled_while_the_rate_grows() -> None:
    linear = {streams: 4e9 * streams for streams in range(1, 17)}
    assert grown(16, linear) == [1, 2, 4, 8, 16]
    assert grown(6, linear) == [1, 2, 4, 6]


def test_does_a_full_link_get_two_streams_at_most() -> None:
    full = dict.fromkeys(range(1, 17), 1e8)
    assert grown(16, full) == [1, 2]


def test_does_growth_end_where_it_gains_too_little() -> None:
    rates = {1: 4e9, 2: 8e9, 4: 8e9 * (GROWTH_MIN - 0.05), 8: 4e10}
    assert grown(16, rates) == [1, 2, 4]


def test_does_a_machine_of_few_cores_keep_one_stream() -> None:
    assert grown(1, {1: 4e9}) == [1]


def test_is_a_rate_that_requests_bound_no_reason_for_more_streams() -> None:
    growth = Growth(16)
    looks = [growth.look(now=n * WINDOW_S, received_bytes=n * 10**8, streams=1, outstanding=1) for n in range(9)]
    assert looks == [1] * 9


@contextlib.asynccontextmanager
async def session(streams: int) -> AsyncIterator[tuple[InboundStreams, OutboundStreams, TcpTransport]]:
    async def hang_up(sock: socket.socket) -> None:
        sock.close()

    listener = await Listener.open("127.0.0.1", 0)
    holder, asker = TcpTransport(*listener.address), TcpTransport("127.0.0.1", 1)
    listener.serve({holder.opening: holder.adopt}, hang_up)
    holder.admit(TOKEN)
    try:
        async with asyncio.timeout(DEADLINE_S):
            inbound = await asker.connect(holder.address, TOKEN, timeout_s=5)
            assert isinstance(inbound, InboundStreams)
            await inbound.open(streams)
            outbound = await holder.accept(TOKEN, timeout_s=5)
            assert isinstance(outbound, OutboundStreams)
            while outbound.streams < streams:  # noqa: ASYNC110 - the last verdict is here: a turn or two
                await asyncio.sleep(0)
            yield inbound, outbound, holder
    finally:
        await asker.close()
        await holder.close()
        await listener.close()


def test_do_transfers_go_through_all_connections_at_once() -> None:
    async def scenario() -> None:
        async with session(4) as (inbound, outbound, _):
            contents = {number: os.urandom(3 << 20) for number in range(12)}
            rooms = {number: bytearray(len(content)) for number, content in contents.items()}
            transfers = [Transfer(number, len(content), idle_timeout_s=5) for number, content in contents.items()]
            await asyncio.gather(
                *(inbound.receive(transfer, iter([memoryview(rooms[transfer.id])])) for transfer in transfers),
                *(outbound.send(transfer, iter([memoryview(contents[transfer.id])])) for transfer in transfers),
            )
            assert rooms == contents
            used = [stream.received_bytes for stream in inbound._streams]
            assert len(used) == 4
            assert all(used)
            assert sum(used) == inbound.received_bytes

    asyncio.run(scenario())


def test_does_the_loss_of_one_connection_end_the_session() -> None:
    async def scenario() -> None:
        async with session(3) as (inbound, outbound, _):
            waiting = asyncio.create_task(
                inbound.receive(Transfer(1, 9, idle_timeout_s=5), iter([memoryview(bytearray(9))]))
            )
            await asyncio.sleep(0)
            outbound._streams[2]._lose("cut")
            with pytest.raises(TransportError, match="tcp session"):
                await waiting
            assert not inbound.alive
            assert not outbound.alive

    asyncio.run(scenario())


def test_is_a_connection_of_an_unknown_session_closed() -> None:
    async def scenario() -> None:
        async with session(1) as (inbound, outbound, holder):
            (token,) = holder._admitted
            assert not holder._join(token, 99, outbound._streams[0])
            assert inbound.alive

    asyncio.run(scenario())


def test_are_the_connections_of_all_sessions_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with session(2) as (_, _outbound, holder):
            monkeypatch.setattr(tcp, "CONNECTIONS_MAX", 3)
            other = TcpTransport("127.0.0.1", 1)
            holder.admit(OTHER_TOKEN)
            inbound = await other.connect(holder.address, OTHER_TOKEN, timeout_s=5)
            assert isinstance(inbound, InboundStreams)
            await holder.accept(OTHER_TOKEN, timeout_s=5)
            assert holder.connections == 3, "a first connection is always taken"
            with pytest.raises(TransportError, match="as many connections as it takes"):
                await inbound.open(2)
            assert inbound.alive
            monkeypatch.setattr(tcp, "CONNECTIONS_MAX", 1)
            with pytest.raises(TransportError, match="this node has 1 connections"):
                await inbound.open(2)
            await inbound._open(2)  # as a session does that grows
            looks = [inbound._growth.look(now=n, received_bytes=n << 30, streams=1, outstanding=9) for n in range(3)]
            assert looks == [1, 1, 1], "it does not try again for each transfer"
            await other.close()

    asyncio.run(scenario())


def test_are_there_no_more_connections_than_a_session_may_have() -> None:
    async def scenario() -> None:
        async with session(STREAMS_MAX) as (_, outbound, _holder):
            assert not outbound.join(outbound._streams[0])
            assert outbound.streams == STREAMS_MAX

    asyncio.run(scenario())
