"""Every transport keeps the contract."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from swarm.listener import Listener
from swarm.transport.inproc import InprocTransport
from swarm.transport.pace import TokenBucket
from swarm.transport.tcp import MAGIC, TcpTransport

from .check_transport import CHECKS, Check, MakePair, Pair, run_check


async def _hang_up(sock: socket.socket) -> None:
    sock.close()


@contextlib.asynccontextmanager
async def tcp_pair(*, rate_bytes_per_s: float | None = None) -> AsyncIterator[Pair]:
    listeners = [await Listener.open("127.0.0.1", 0) for _ in range(2)]
    pace = TokenBucket(rate_bytes_per_s) if rate_bytes_per_s else None
    holder, asker = (TcpTransport(*listener.address, pace=pace) for listener in listeners)
    for listener, transport in zip(listeners, (holder, asker), strict=True):
        listener.serve({MAGIC: transport.adopt}, _hang_up)
    try:
        yield Pair(holder, asker)
    finally:
        for listener, transport in zip(listeners, (holder, asker), strict=True):
            await transport.close()
            await listener.close()


@contextlib.asynccontextmanager
async def inproc_pair(*, rate_bytes_per_s: float | None = None) -> AsyncIterator[Pair]:
    pace = TokenBucket(rate_bytes_per_s) if rate_bytes_per_s else None
    pair = Pair(InprocTransport(pace=pace), InprocTransport())
    try:
        yield pair
    finally:
        await pair.holder.close()
        await pair.asker.close()


@contextlib.asynccontextmanager
async def paced_tcp_pair() -> AsyncIterator[Pair]:
    async with tcp_pair(rate_bytes_per_s=200e6) as pair:  # slices of 1 MiB at most, so that waiting is exercised
        yield pair


def _name(value: Callable[..., object]) -> str:
    return value.__name__.removeprefix("check_")


@pytest.mark.parametrize("check", CHECKS, ids=_name)
@pytest.mark.parametrize("make_pair", [inproc_pair, tcp_pair, paced_tcp_pair], ids=_name)
def test_keeps_the_contract(make_pair: MakePair, check: Check) -> None:
    run_check(check, make_pair)
