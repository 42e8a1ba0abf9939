"""Do sessions keep the contract over a lane that puts calls off, as those of GPUs do?"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import queue
import socket
from collections.abc import AsyncIterator
from typing import ClassVar

import pytest
import torch

from swarm import cuda
from swarm.bitfield import Bitfield
from swarm.errors import TransportError
from swarm.hashing import cuda as hashing_cuda
from swarm.landing import Landed, Landings
from swarm.listener import Listener
from swarm.store import DeviceView, View, staging, tensors
from swarm.store.tensors import IntoStore, TensorSource
from swarm.transport import two_sided
from swarm.transport.stream import PlainStream, Stream
from swarm.transport.tcp import TcpTransport
from swarm.transport.tcp_session import TcpInbound, TcpOutbound
from swarm.transport.two_sided import TwoSidedInbound, TwoSidedOutbound

from .check_store import KINDS_OF_SAMPLE
from .check_transport import CHECKS, Check, Pair, run_check, session, transfer
from .fake_gpu import FakeGpu, on_gpu
from .test_transports import _hang_up

Wire = queue.Queue[bytes]


class PutOff:
    """Does calls for GPU memory when it must, and host memory at once."""

    on_device = True

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._calls: list[tuple[str, View]] = []
        self.groups: list[int] = []  # how many calls were made at once

    def begin(self) -> None:
        assert not self._calls

    def send(self, view: View, *, timeout_s: float) -> None:
        self._post("send", view)

    def receive(self, view: View, *, timeout_s: float) -> None:
        self._post("receive", view)

    def end(self, *, timeout_s: float) -> two_sided.Done:
        self.flush()
        return two_sided.at_once

    def flush(self) -> None:
        if self._calls:
            self.groups.append(len(self._calls))
        for name, view in self._calls:
            if name == "send":
                self._wire.put(content(view))
                continue
            try:
                data = self._wire.get(timeout=2.0)
            except queue.Empty:
                raise TransportError("the other end did not call") from None
            assert len(data) == view.nbytes, "the ends do not call in the same order"
            if isinstance(view, DeviceView):
                ctypes.memmove(view.address, data, len(data))
            else:
                view[:] = data
        self._calls.clear()

    def scratch(self, size: int) -> View:
        return memoryview(bytearray(size))

    def close(self) -> None:
        self._calls.clear()

    def _post(self, name: str, view: View) -> None:
        self._calls.append((name, view))
        if not isinstance(view, DeviceView):
            self.flush()


def content(view: View) -> bytes:
    return ctypes.string_at(view.address, view.nbytes) if isinstance(view, DeviceView) else bytes(view)


class PutOffTransport(TcpTransport):
    scheme = "put_off"
    magic = b"SWRP"
    wires: ClassVar[collections.defaultdict[int, Wire]] = collections.defaultdict(queue.Queue)  # by the asker's port
    lanes: ClassVar[list[PutOff]] = []

    async def _ask(self, stream: Stream, *, peer: str) -> TcpInbound:
        assert isinstance(stream, PlainStream)
        return TwoSidedInbound(stream, self._lane(stream.getsockname()[1]), peer=peer, pool=self._askers)

    async def _hold(self, stream: Stream, *, peer: str) -> TcpOutbound:
        assert isinstance(stream, PlainStream)
        lane = self._lane(stream.getpeername()[1])
        return TwoSidedOutbound(stream, lane, peer=peer, pool=self._holders, pace=self._pace)

    def _lane(self, port: int) -> PutOff:
        self.lanes.append(PutOff(self.wires[port]))
        return self.lanes[-1]


@contextlib.asynccontextmanager
async def put_off_pair() -> AsyncIterator[Pair]:
    listeners = [await Listener.open("127.0.0.1", 0) for _ in range(2)]
    holder, asker = (PutOffTransport(*listener.address) for listener in listeners)
    for listener, transport in zip(listeners, (holder, asker), strict=True):
        listener.serve({PutOffTransport.magic: transport.adopt}, _hang_up)
    try:
        yield Pair(holder, asker)
    finally:
        for listener, transport in zip(listeners, (holder, asker), strict=True):
            await transport.close()
            await listener.close()


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    monkeypatch.setattr(cuda, "gpu", lambda index: gpu)
    monkeypatch.setattr(staging, "_idle", {})
    monkeypatch.setattr(tensors, "_bytes", lambda tensor: on_gpu(tensors._flat(tensor)))
    monkeypatch.setattr(hashing_cuda, "_kernels_usable", lambda: False)
    monkeypatch.setattr(PutOffTransport, "wires", collections.defaultdict(queue.Queue))
    monkeypatch.setattr(PutOffTransport, "lanes", [])
    return gpu


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_keeps_the_contract_for_host_memory(check: Check) -> None:
    run_check(check, put_off_pair)


@pytest.mark.parametrize("batch_bytes", [1, 30_000, 1 << 30])
def test_are_chunks_hashed_behind_the_calls_that_fill_them(monkeypatch: pytest.MonkeyPatch, batch_bytes: int) -> None:
    monkeypatch.setattr("swarm.landing.BATCH_BYTES", batch_bytes)
    from swarm import build

    given = {name: torch.rand(shape).to(dtype) for name, (dtype, shape) in KINDS_OF_SAMPLE.items()}
    source: TensorSource = build.tensors(given, chunk_bytes=4096, leaf_bytes=1024)
    manifest = source.manifest
    into = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    landed: list[Landed] = []

    async def check() -> None:
        landings = Landings(manifest, IntoStore(manifest, into), Bitfield(len(manifest.chunks)))
        agreed = transfer(1, manifest.size)
        views = landings.device_views(1, range(len(manifest.chunks)), landed.append)
        spans = (span for chunk in manifest.chunks for span in source.device_spans(chunk))
        async with session(put_off_pair) as (outbound, inbound, _):
            assert inbound.on_device
            assert outbound.on_device
            await asyncio.gather(inbound.receive(agreed, views), outbound.send(agreed, spans))

    asyncio.run(asyncio.wait_for(check(), 30))
    assert len(landed) == len(manifest.chunks)
    assert all(one.correct for one in landed)
    assert all(torch.equal(into[name], given[name]) for name in given)
    assert max(max(lane.groups) for lane in PutOffTransport.lanes) > 1  # the holder's, at least


def test_is_an_announcement_beyond_the_limits_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with session(put_off_pair) as (outbound, inbound, _):
            monkeypatch.setattr(two_sided, "HOST_PIECE_BYTES_MAX", 1 << 30)
            monkeypatch.setattr(two_sided, "DEVICE_PIECE_BYTES_MAX", 1 << 20)
            data = bytes(3 << 20)
            agreed = transfer(1, len(data), idle_timeout_s=1)
            sending = asyncio.create_task(outbound.send(agreed, iter([memoryview(data)])))
            with pytest.raises(TransportError, match="announced 1 pieces of up to 3145728"):
                await inbound.receive(agreed, iter([memoryview(bytearray(len(data)))]))
            assert not inbound.alive
            await asyncio.gather(sending, return_exceptions=True)

    asyncio.run(asyncio.wait_for(check(), 30))


def stream_pair() -> tuple[PlainStream, socket.socket]:
    ours, theirs = socket.socketpair()
    stream = PlainStream(ours)
    stream.block(0.05)
    return stream, theirs


@pytest.mark.parametrize("parts", [[b"abcd"], [b"a", b"bc", b"d"], [b"abcdef"]])
def test_is_what_the_other_end_says_read_to_the_byte(parts: list[bytes]) -> None:
    stream, theirs = stream_pair()
    with stream, theirs:
        for part in parts:
            theirs.sendall(part)
        assert two_sided.read_exactly(stream, 4) == b"abcd"


def test_are_ends_that_fall_silent_or_hang_up_told_apart_while_a_lane_is_made() -> None:
    stream, theirs = stream_pair()
    with stream, theirs:
        theirs.sendall(b"abc")
        with pytest.raises(TimeoutError, match="says nothing"):
            two_sided.read_exactly(stream, 4)
        with pytest.raises(TimeoutError, match="does not read"):
            two_sided.write_all(stream, bytes(64 << 20))
        theirs.sendall(b"abc")
        theirs.close()
        with pytest.raises((EOFError, ConnectionError)):
            two_sided.read_exactly(stream, 4)
