"""Is GPU memory lent, read where it is, and given back? With a stand-in for the GPU; tests/gpu has a real one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator

import pytest
import torch

from swarm.errors import TransportError
from swarm.net.listener import Listener
from swarm.store import View
from swarm.testing.transport_pairs import Pair, outcome, session, transfer
from swarm.testing.transports import CHECKS, Check, run_check
from swarm.transport import cuda_ipc
from swarm.transport.cuda_ipc import CudaIpcOutbound, CudaIpcTransport
from swarm.transport.tcp_outbound import Sending

from .fake_gpu import FakeGpu
from .test_transports import _hang_up

DEADLINE_S = 30.0
SIZE = 3 << 20


@pytest.fixture(autouse=True)
def gpu() -> Iterator[FakeGpu]:
    gpu = FakeGpu()
    with gpu.in_place_of_cuda():
        yield gpu


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Handles of this process pass for those of another process."""
    monkeypatch.setattr(cuda_ipc, "_exported", Forgetful())


class Forgetful(dict[bytes, int]):
    def __setitem__(self, handle: bytes, start: int) -> None:
        """Forgets it."""


@contextlib.asynccontextmanager
async def ipc_pair() -> AsyncIterator[Pair]:
    listeners = [await Listener.open("127.0.0.1", 0) for _ in range(2)]
    holder, asker = (CudaIpcTransport(*listener.address) for listener in listeners)
    for listener, transport in zip(listeners, (holder, asker), strict=True):
        listener.serve({CudaIpcTransport.magic: transport.adopt}, _hang_up)
    try:
        yield Pair(holder, asker)
    finally:
        for listener, transport in zip(listeners, (holder, asker), strict=True):
            await transport.close()
            await listener.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_keeps_the_contract_for_host_memory(check: Check) -> None:
    run_check(check, ipc_pair)


def run(work: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(work, DEADLINE_S))


def random_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8)


def lent(views: list[View], gpu: FakeGpu) -> Iterator[View]:
    """Lends views, and waits for the copies as a hasher does."""
    yield from views
    gpu.current().synchronize()


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("source_on_gpu", [True, False])
@pytest.mark.parametrize("target_on_gpu", [True, False])
def test_do_bytes_arrive_wherever_the_two_ends_are(gpu: FakeGpu, source_on_gpu: bool, target_on_gpu: bool) -> None:
    source, target = random_bytes(SIZE), torch.zeros(SIZE, dtype=torch.uint8)
    span: View = gpu.own(source) if source_on_gpu else source.numpy().data
    room: View = gpu.own(target) if target_on_gpu else target.numpy().data

    async def check() -> None:
        async with session(ipc_pair) as (outbound, inbound, _):
            spans, views = [span[:5], span[5:]], [room[: 1 << 20], room[1 << 20 :]]
            agreed = transfer(1, SIZE)
            await asyncio.gather(
                inbound.receive(agreed, lent(views, gpu)),
                outbound.send(agreed, iter(spans)),
            )
            assert torch.equal(source, target)
            assert inbound.received_bytes >= SIZE
            assert len(gpu.opened) == source_on_gpu
        assert gpu.opened == []

    run(check())


@pytest.mark.usefixtures("foreign")
def test_is_memory_in_use_until_it_was_read(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = asyncio.Event(), asyncio.Event()
    source, target = random_bytes(SIZE), torch.zeros(SIZE, dtype=torch.uint8)

    async def check() -> None:
        loop = asyncio.get_running_loop()

        def slow() -> Iterator[View]:
            yield gpu.own(target)
            loop.call_soon_threadsafe(reading.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(DEADLINE_S)
            gpu.current().synchronize()

        async with session(ipc_pair) as (outbound, inbound, _):
            agreed = transfer(1, SIZE)
            receiving = asyncio.create_task(inbound.receive(agreed, slow()))
            sending = asyncio.create_task(outbound.send(agreed, iter([gpu.own(source)])))
            await reading.wait()
            done, _ = await asyncio.wait({sending}, timeout=0.05)
            assert not done
            go_on.set()
            await asyncio.gather(receiving, sending)
            assert torch.equal(source, target)

    run(check())


@pytest.mark.usefixtures("foreign")
def test_does_a_lease_end_when_the_asker_does_not(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ipc, "LEASE_S", 0.2)
    monkeypatch.setattr(cuda_ipc.CudaIpcInbound, "_over", lambda self, transfer_id: None)

    async def check() -> None:
        async with session(ipc_pair) as (outbound, inbound, _):
            agreed = transfer(1, SIZE)
            target = torch.zeros(SIZE, dtype=torch.uint8)
            receiving = asyncio.create_task(inbound.receive(agreed, lent([gpu.own(target)], gpu)))
            with pytest.raises(TransportError, match="did not confirm a lease within"):
                await outbound.send(agreed, iter([gpu.own(random_bytes(SIZE))]))
            await outcome(receiving)

    run(check())


@pytest.mark.usefixtures("foreign")
def test_is_the_holder_reached_otherwise_once_a_handle_was_refused(
    gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.refuses = True

    async def check() -> None:
        async with session(ipc_pair) as (outbound, inbound, pair):
            agreed = transfer(1, SIZE)
            target = torch.zeros(SIZE, dtype=torch.uint8)
            sending = asyncio.create_task(outbound.send(agreed, iter([gpu.own(random_bytes(SIZE))])))
            with pytest.raises(TransportError, match="INVALID_HANDLE"):
                await inbound.receive(agreed, lent([gpu.own(target)], gpu))
            assert isinstance(await outcome(sending), TransportError)
            assert not inbound.alive
            assert not pair.asker.reach(pair.holder.address)

    with caplog.at_level(logging.WARNING):
        run(check())
    assert len([record for record in caplog.records if "cannot be read directly" in record.message]) == 1


@pytest.mark.usefixtures("foreign")
def test_is_a_transfer_unread_whose_session_went_just_after_its_last_frame(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.refuses = True
    dropped = threading.Event()
    conclude, drop_transfers = CudaIpcOutbound._conclude, CudaIpcOutbound._drop_transfers

    def late(holder: CudaIpcOutbound, sending: Sending, error: Exception | None) -> None:
        assert dropped.wait(DEADLINE_S)
        conclude(holder, sending, error)

    def drop(holder: CudaIpcOutbound) -> None:
        drop_transfers(holder)
        dropped.set()

    monkeypatch.setattr(CudaIpcOutbound, "_conclude", late)
    monkeypatch.setattr(CudaIpcOutbound, "_drop_transfers", drop)

    async def check() -> None:
        async with session(ipc_pair) as (outbound, inbound, _):
            agreed = transfer(1, SIZE)
            target = torch.zeros(SIZE, dtype=torch.uint8)
            sending = asyncio.create_task(outbound.send(agreed, iter([gpu.own(random_bytes(SIZE))])))
            with pytest.raises(TransportError, match="INVALID_HANDLE"):
                await inbound.receive(agreed, lent([gpu.own(target)], gpu))
            assert isinstance(await outcome(sending), TransportError)

    run(check())


@pytest.mark.usefixtures("foreign")
def test_is_nothing_read_beyond_an_allocation(gpu: FakeGpu) -> None:
    source = random_bytes(SIZE)

    async def check() -> None:
        async with session(ipc_pair) as (outbound, inbound, _):
            agreed = transfer(1, SIZE)
            target = torch.zeros(SIZE, dtype=torch.uint8)
            liar = gpu.own(source[: SIZE // 2])
            beyond = type(liar)(0, liar.address, SIZE, source)
            sending = asyncio.create_task(outbound.send(agreed, iter([beyond])))
            with pytest.raises(TransportError, match="of an allocation of"):
                await inbound.receive(agreed, lent([gpu.own(target)], gpu))
            await outcome(sending)
            assert not target.any()

    run(check())


def test_is_another_machine_out_of_reach() -> None:
    transport = CudaIpcTransport("127.0.0.1", 1)
    assert transport.reach(transport.address)
    assert not transport.reach("0" * 36 + "/127.0.0.1:1")
    assert not transport.reach("127.0.0.1:1")
