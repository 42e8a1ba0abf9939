"""Do sessions keep the contract over a lane that puts calls off, as those of GPUs do?"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import functools
import itertools
import queue
import socket
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import ClassVar

import pytest
import torch

from swarm.content.bitfield import Bitfield
from swarm.errors import StoreError, TransportError
from swarm.hashing import cuda as hashing_cuda
from swarm.net.listener import Listener
from swarm.store import DeviceView, View, cuda, staging, tensor_source, tensors
from swarm.store.tensor_source import TensorSource, flat_bytes
from swarm.store.tensors import IntoStore
from swarm.testing.transport_pairs import MakePair, Pair, session, transfer
from swarm.testing.transports import CHECKS, Check, run_check
from swarm.transfer.verify import LandedChunk, Verifier
from swarm.transport import Inbound, Outbound, paired
from swarm.transport.byte_stream import ByteStream, PlainStream
from swarm.transport.paired import PairedInbound, PairedOutbound
from swarm.transport.tcp import TcpTransport
from swarm.transport.tcp_inbound import TcpInbound
from swarm.transport.tcp_outbound import TcpOutbound

from .fake_gpu import FakeGpu, on_gpu
from .sample_tensors import KINDS_OF_SAMPLE
from .test_transports import pair_of

Wire = queue.Queue[bytes]
ASKER, HOLDER = "asker", "holder"
AGREED_BYTES = 128


class PutOff:
    """Does calls for GPU memory when it must, and host memory at once."""

    on_device = True

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._calls: list[tuple[str, View]] = []
        self.groups: list[int] = []  # how many calls were made at once
        self.sends = False
        self.closed = self.abandoned = 0

    def begin(self) -> None:
        assert not self._calls

    def send(self, view: View, *, timeout_s: float) -> None:
        self._post("send", view)

    def receive(self, view: View, *, timeout_s: float) -> None:
        self._post("receive", view)

    def end(self, *, timeout_s: float) -> paired.Done:
        self.flush()
        return paired.at_once

    def flush(self) -> None:
        calls, self._calls = self._calls, []
        if calls:
            self.sends = calls[0][0] == "send"
            self.groups.append(len(calls))
        for name, view in calls:
            self._call(name, view)

    def puts_off(self) -> bool:
        return bool(self._calls)

    def abandon(self) -> None:
        self._calls.clear()
        self.abandoned += 1

    def scratch(self, size: int) -> View:
        return memoryview(bytearray(size))

    def close(self) -> None:
        self._calls.clear()
        self.closed += 1

    def _post(self, name: str, view: View) -> None:
        self._calls.append((name, view))
        if not isinstance(view, DeviceView):
            self.flush()

    def _call(self, name: str, view: View) -> None:
        if name == "send":
            self._wire.put(content(view))
            return
        try:
            data = self._wire.get(timeout=2.0)
        except queue.Empty:
            raise TransportError("the other end did not call") from None
        assert len(data) == view.nbytes, "the ends do not call in the same order"
        if isinstance(view, DeviceView):
            ctypes.memmove(view.address, data, len(data))
        else:
            view[:] = data


class DoneLater(PutOff):
    """As a GPU: calls are only enqueued, and frames are done later, in order. A call that fails is the end."""

    goes_on = threading.Event()  # while it is not set, a GPU that sends does nothing

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire)
        self.failed: TransportError | None = None

    def end(self, *, timeout_s: float) -> paired.Done:
        self.flush()
        event, asked = cuda.gpu(0).event(), itertools.count(1)
        event.record(cuda.gpu(0).current())

        def done() -> bool:
            if self.failed is None:
                later = next(asked) < 3 or (self.sends and not self.goes_on.is_set())
                if later or not event.query():
                    return False
            if self.failed is not None:
                raise self.failed
            return True

        return done

    def _call(self, name: str, view: View) -> None:
        if isinstance(view, DeviceView):
            cuda.gpu(0).current().work.append(functools.partial(self._do, name, view))  # type: ignore[attr-defined]
            return
        cuda.gpu(0).current().synchronize()
        super()._call(name, view)

    def _do(self, name: str, view: View) -> None:
        if self.failed is None:
            try:
                super()._call(name, view)
            except TransportError as error:
                self.failed = error


def content(view: View) -> bytes:
    return ctypes.string_at(view.address, view.nbytes) if isinstance(view, DeviceView) else bytes(view)


class PutOffTransport(TcpTransport):
    scheme = "put_off"
    magic = b"SWRP"
    parallel = False
    wires: ClassVar[collections.defaultdict[int, Wire]] = collections.defaultdict(queue.Queue)  # by the asker's port
    lanes: ClassVar[list[PutOff]] = []
    make_lane: ClassVar[type[PutOff]] = PutOff

    async def _ask(self, stream: ByteStream, *, peer: str) -> TcpInbound:
        return PairedInbound(stream, await self._lane(stream, ASKER), peer=peer, pool=self._askers)

    async def _hold(self, stream: ByteStream, *, peer: str) -> TcpOutbound:
        lane = await self._lane(stream, HOLDER)
        return PairedOutbound(stream, lane, peer=peer, pool=self._holders, pace=self._pace)

    async def _lane(self, stream: ByteStream, end: str) -> PutOff:
        pool = self._askers if end == ASKER else self._holders
        self.lanes.append(await paired.make_lane(stream, functools.partial(self._agree, stream, end), pool=pool))
        return self.lanes[-1]

    def _agree(self, stream: ByteStream, end: str) -> PutOff:
        """As those of GPUs do: the holder says more bytes than the first frame will have."""
        assert isinstance(stream, PlainStream)
        stream.block(5.0)
        if end == ASKER:
            said = paired.read_exactly(stream, AGREED_BYTES)
            assert said == bytes(AGREED_BYTES)
            return self.make_lane(self.wires[stream.getsockname()[1]])
        lane = self.make_lane(self.wires[stream.getpeername()[1]])  # before the asker looks for the same wire
        paired.write_all(stream, bytes(AGREED_BYTES))
        return lane


class DoneLaterTransport(PutOffTransport):
    make_lane = DoneLater


@contextlib.asynccontextmanager
async def put_off_pair(kind: type[PutOffTransport] = PutOffTransport) -> AsyncIterator[Pair]:
    listeners = [await Listener.open("127.0.0.1", 0) for _ in range(2)]
    holder, asker = (kind(*listener.address) for listener in listeners)
    async with pair_of(listeners, holder, asker) as pair:
        yield pair


def done_later_pair() -> contextlib.AbstractAsyncContextManager[Pair]:
    return put_off_pair(DoneLaterTransport)


both = pytest.mark.parametrize("make_pair", [put_off_pair, done_later_pair])


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    monkeypatch.setattr(cuda, "gpu", lambda index: gpu)
    monkeypatch.setattr(staging, "_idle", {})
    for module in (tensors, tensor_source):
        monkeypatch.setattr(module, "bytes_of", lambda tensor: on_gpu(flat_bytes(tensor)))
    monkeypatch.setattr(hashing_cuda, "_kernels", lambda device: None)
    monkeypatch.setattr(PutOffTransport, "wires", collections.defaultdict(queue.Queue))
    monkeypatch.setattr(PutOffTransport, "lanes", [])
    DoneLater.goes_on.set()
    return gpu


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@both
def test_keeps_the_contract_for_host_memory(make_pair: MakePair, check: Check) -> None:
    run_check(check, make_pair)


@both
@pytest.mark.parametrize("batch_bytes", [1, 30_000, 1 << 30])
def test_are_chunks_hashed_behind_the_calls_that_fill_them(
    monkeypatch: pytest.MonkeyPatch, make_pair: MakePair, batch_bytes: int
) -> None:
    monkeypatch.setattr("swarm.transfer.verify.BATCH_BYTES", batch_bytes)
    from swarm.checkpoint import manifest_builder

    given = {name: torch.rand(shape).to(dtype) for name, (dtype, shape) in KINDS_OF_SAMPLE.items()}
    source: TensorSource = manifest_builder.tensors(given, chunk_bytes=4096, leaf_bytes=1024)
    manifest = source.manifest
    into = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    landed: list[LandedChunk] = []

    async def check() -> None:
        verifier = Verifier(manifest, IntoStore(manifest, into), Bitfield(len(manifest.chunks)))
        agreed = transfer(1, manifest.size)
        views = verifier.device_views(1, range(len(manifest.chunks)), landed.extend)
        spans = (span for chunk in manifest.chunks for span in source.device_spans(chunk))
        async with session(make_pair) as (outbound, inbound, _):
            assert inbound.on_device
            assert outbound.on_device
            await asyncio.gather(inbound.receive(agreed, views), outbound.send(agreed, spans))

    asyncio.run(asyncio.wait_for(check(), 30))
    assert len(landed) == len(manifest.chunks)
    assert all(one.correct for one in landed)
    assert all(torch.equal(into[name], given[name]) for name in given)
    assert max(max(lane.groups) for lane in PutOffTransport.lanes) > 1  # the holder's, at least


def lent(view: View) -> Iterator[View]:
    """Lends a view, and waits for its bytes as a hasher does."""
    yield view
    cuda.gpu(0).current().synchronize()


class Queue:
    """Transfers of GPU memory, all sent over a session whose GPU is idle until `DoneLater.goes_on` is set."""

    def __init__(self, outbound: Outbound, inbound: Inbound, count: int) -> None:
        DoneLater.goes_on.clear()
        self.given = [torch.full((1000,), number, dtype=torch.uint8) for number in range(count)]
        self.into = [torch.zeros_like(given) for given in self.given]
        self.told: list[int] = []
        self.sends, self.receives = list[asyncio.Task[None]](), list[asyncio.Task[None]]()
        for number, (given, into) in enumerate(zip(self.given, self.into, strict=True)):
            agreed = transfer(number, given.numel())
            self.receives.append(asyncio.create_task(inbound.receive(agreed, lent(on_gpu(into)))))
            self.sends.append(asyncio.create_task(outbound.send(agreed, iter([on_gpu(given)]))))
            self.sends[-1].add_done_callback(lambda _, number=number: self.told.append(number))  # type: ignore[misc]

    async def enqueued(self, frames: int) -> None:
        """Returns when the holder has enqueued so many frames, and no other can follow before a frame is done."""
        while sum(len(lane.groups) for lane in PutOffTransport.lanes if lane.sends) < frames:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    def arrived(self, number: int) -> bool:
        return torch.equal(self.given[number], self.into[number])


def run(work: Coroutine[None, None, None]) -> None:
    async def within_deadline() -> None:
        try:
            await asyncio.wait_for(work, 30)
        finally:
            DoneLater.goes_on.set()  # a thread may still wait for it

    asyncio.run(within_deadline())


def test_are_frames_of_the_next_transfers_enqueued_while_the_last_one_is_under_way() -> None:
    async def check() -> None:
        async with session(done_later_pair) as (outbound, inbound, _):
            queue = Queue(outbound, inbound, paired.FRAMES_MAX + 2)
            await queue.enqueued(paired.FRAMES_MAX)
            assert queue.told == []
            DoneLater.goes_on.set()
            await asyncio.gather(*queue.sends, *queue.receives)
            assert queue.told == list(range(paired.FRAMES_MAX + 2))
            assert all(queue.arrived(number) for number in queue.told)

    run(check())


def test_does_cancelling_one_of_several_that_are_under_way_leave_the_others_alone() -> None:
    async def check() -> None:
        async with session(done_later_pair) as (outbound, inbound, _):
            queue = Queue(outbound, inbound, paired.FRAMES_MAX + 1)
            await queue.enqueued(paired.FRAMES_MAX)
            queue.sends[1].cancel()
            await asyncio.sleep(0)
            assert not queue.sends[1].done()  # its memory is being read
            DoneLater.goes_on.set()
            ends = await asyncio.gather(*queue.sends, return_exceptions=True)
            assert isinstance(ends.pop(1), asyncio.CancelledError)
            assert ends == [None] * paired.FRAMES_MAX
            await asyncio.gather(*queue.receives)
            assert inbound.alive

    run(check())


@pytest.mark.parametrize("fails", [False, True])
def test_is_everything_under_way_told_of_once_its_session_is_gone(fails: bool) -> None:
    async def check() -> None:
        async with session(done_later_pair) as (outbound, inbound, _):
            queue = Queue(outbound, inbound, paired.FRAMES_MAX)
            await queue.enqueued(paired.FRAMES_MAX)
            (lane,) = (lane for lane in PutOffTransport.lanes if lane.sends)
            await inbound.close()
            while outbound.alive:  # type: ignore[attr-defined] # noqa: ASYNC110
                await asyncio.sleep(0.005)
            assert queue.told == []  # the memory is being read
            assert not lane.closed
            if fails:
                assert isinstance(lane, DoneLater)
                lane.failed = TransportError("the other end did not call")
            DoneLater.goes_on.set()
            ends = await asyncio.gather(*queue.sends, return_exceptions=True)
            # The END of the last transfer was never written.
            assert [isinstance(end, TransportError) for end in ends] == [fails] * (paired.FRAMES_MAX - 1) + [True]
            await asyncio.gather(*queue.receives, return_exceptions=True)
            while not lane.closed:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    run(check())


@pytest.mark.parametrize("end", [HOLDER, ASKER])
def test_does_whatever_fails_within_a_frame_end_the_session(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    def fail(lane: PutOff, view: View, *, timeout_s: float) -> None:
        raise StoreError("no memory left")

    async def check() -> None:
        async with session(put_off_pair) as (outbound, inbound, _):
            monkeypatch.setattr(PutOff, "send" if end == HOLDER else "receive", fail)
            agreed = transfer(1, 1000, idle_timeout_s=1)
            views, room = iter([on_gpu(torch.zeros(1000, dtype=torch.uint8))]), torch.zeros(1000, dtype=torch.uint8)
            sending = asyncio.create_task(outbound.send(agreed, views))
            receiving = asyncio.create_task(inbound.receive(agreed, iter([on_gpu(room)])))
            ends = await asyncio.gather(sending, receiving, return_exceptions=True)
            assert isinstance(ends[end == ASKER], TransportError)
            assert "no memory left" in str(ends[end == ASKER])
            for one in (outbound, inbound):
                while one.alive:  # type: ignore[union-attr] # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            assert any(lane.abandoned for lane in PutOffTransport.lanes)

    asyncio.run(asyncio.wait_for(check(), 30))


def test_is_an_announcement_beyond_the_limits_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with session(put_off_pair) as (outbound, inbound, _):
            monkeypatch.setattr(paired, "HOST_PIECE_BYTES_MAX", 1 << 30)
            monkeypatch.setattr(paired, "DEVICE_PIECE_BYTES_MAX", 1 << 20)
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
        assert paired.read_exactly(stream, 4) == b"abcd"


def test_are_ends_that_fall_silent_or_hang_up_told_apart_while_a_lane_is_made() -> None:
    stream, theirs = stream_pair()
    with stream, theirs:
        theirs.sendall(b"abc")
        with pytest.raises(TimeoutError, match="is silent"):
            paired.read_exactly(stream, 4)
        with pytest.raises(TimeoutError, match="does not read"):
            paired.write_all(stream, bytes(64 << 20))
        theirs.sendall(b"abc")
        theirs.close()
        with pytest.raises((EOFError, ConnectionError)):
            paired.read_exactly(stream, 4)


def test_is_the_loop_told_of_one_byte_after_a_thread_has_waited_for_many() -> None:
    async def check() -> None:
        stream, theirs = stream_pair()
        with stream, theirs:
            reading = asyncio.create_task(asyncio.to_thread(paired.read_exactly, stream, AGREED_BYTES))
            while stream.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1:  # until it waits
                assert not reading.done()
                await asyncio.sleep(0.001)
            theirs.sendall(bytes(AGREED_BYTES))
            await reading
            stream.idle()
            heard = asyncio.Event()
            asyncio.get_running_loop().add_reader(stream, heard.set)
            theirs.sendall(b"a")
            await heard.wait()
            asyncio.get_running_loop().remove_reader(stream)

    asyncio.run(asyncio.wait_for(check(), 30))
