"""Every transport keeps the contract."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import time
import warnings
from collections.abc import AsyncIterator, Callable
from unittest import mock

import pytest

from swarm.net.listener import Listener
from swarm.security import cluster_key
from swarm.security.certificates import Identity
from swarm.security.cluster_key import Keyring
from swarm.security.record_seal import CANNOT
from swarm.testing.transport_pairs import MakePair, Pair
from swarm.testing.transports import CHECKS, Check, run_check
from swarm.transport import Inbound, tcp
from swarm.transport.inproc import InprocTransport
from swarm.transport.pace import TokenBucket
from swarm.transport.streams import InboundStreams
from swarm.transport.tcp import TcpTransport
from swarm.transport.torch_distributed import TorchDistTransport

MEMBER = Identity(Keyring((cluster_key.generate(),)), "a" * 16, now_s=time.time())


async def _hang_up(sock: socket.socket) -> None:
    sock.close()


@contextlib.asynccontextmanager
async def pair_of(listeners: list[Listener], holder: TcpTransport, asker: TcpTransport) -> AsyncIterator[Pair]:
    for listener, transport in zip(listeners, (holder, asker), strict=True):
        listener.serve({transport.opening: transport.adopt}, _hang_up)
    try:
        yield Pair(holder, asker)
    finally:
        for listener, transport in zip(listeners, (holder, asker), strict=True):
            await transport.close()
            await listener.close()


@contextlib.asynccontextmanager
async def tcp_pair(*, rate_bytes_per_s: float | None = None, identity: Identity | None = None) -> AsyncIterator[Pair]:
    listeners = [await Listener.open("127.0.0.1", 0) for _ in range(2)]
    pace = TokenBucket(rate_bytes_per_s) if rate_bytes_per_s else None
    holder, asker = (TcpTransport(*listener.address, pace=pace, identity=identity) for listener in listeners)
    async with pair_of(listeners, holder, asker) as pair:
        yield pair


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


@contextlib.asynccontextmanager
async def gloo_pair() -> AsyncIterator[Pair]:
    listeners = [await Listener.open("127.0.0.1", 0) for _ in range(2)]
    transports = [TorchDistTransport(*listener.address, backend="gloo") for listener in listeners]
    async with pair_of(listeners, *transports) as pair:
        yield pair


@contextlib.asynccontextmanager
async def tls_pair(*, rate_bytes_per_s: float | None = None) -> AsyncIterator[Pair]:
    async with tcp_pair(rate_bytes_per_s=rate_bytes_per_s, identity=MEMBER) as pair:
        yield pair


@contextlib.asynccontextmanager
async def paced_tls_pair() -> AsyncIterator[Pair]:
    async with tls_pair(rate_bytes_per_s=200e6) as pair:
        yield pair


@contextlib.asynccontextmanager
async def bare_tls_pair() -> AsyncIterator[Pair]:
    """Ends without libcrypto."""
    with mock.patch.object(tcp, "new_share", return_value=CANNOT):
        async with tls_pair() as pair:
            yield pair


class _ManyStreams(TcpTransport):
    """Sessions of four connections from the start, instead of once a rate grew."""

    async def connect(self, address: str, token: str, *, timeout_s: float) -> Inbound:
        session = await super().connect(address, token, timeout_s=timeout_s)
        assert isinstance(session, InboundStreams)
        await session.open(4)
        assert session.streams == 4
        return session


@contextlib.asynccontextmanager
async def streams_pair(*, rate_bytes_per_s: float | None = None) -> AsyncIterator[Pair]:
    listeners = [await Listener.open("127.0.0.1", 0) for _ in range(2)]
    pace = TokenBucket(rate_bytes_per_s) if rate_bytes_per_s else None
    async with pair_of(listeners, *(_ManyStreams(*listener.address, pace=pace) for listener in listeners)) as pair:
        yield pair


@contextlib.asynccontextmanager
async def tls_streams_pair() -> AsyncIterator[Pair]:
    listeners = [await Listener.open("127.0.0.1", 0) for _ in range(2)]
    transports = [_ManyStreams(*listener.address, identity=MEMBER) for listener in listeners]
    async with pair_of(listeners, *transports) as pair:
        yield pair


def _name(value: Callable[..., object]) -> str:
    return value.__name__.removeprefix("check_")


@pytest.mark.parametrize("check", CHECKS, ids=_name)
@pytest.mark.parametrize(
    "make_pair",
    [
        inproc_pair, tcp_pair, paced_tcp_pair, tls_pair, paced_tls_pair, bare_tls_pair, gloo_pair, streams_pair,
        tls_streams_pair,
    ],
    ids=_name,
)  # fmt: skip
def test_keeps_the_contract(make_pair: MakePair, check: Check) -> None:
    run_check(check, make_pair)


def test_are_nodes_of_a_forked_child_out_of_reach_within_the_process() -> None:
    """Both processes number their nodes from where they parted."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        theirs.send(InprocTransport().address)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the test may have threads; the child does next to nothing
        process = context.Process(target=child)
        process.start()
    address = ours.recv()
    process.join()
    transports = [InprocTransport() for _ in range(3)]
    assert address.rpartition("/")[0] not in {each.address.rpartition("/")[0] for each in transports}
    assert not transports[0].reach(address)
