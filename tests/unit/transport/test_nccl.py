"""Frames and communicators of an NCCL lane, with a library that is none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from swarm.errors import TransportError
from swarm.store import DeviceView, cuda
from swarm.transport import nccl, paired
from swarm.transport.byte_stream import PlainStream


def test_is_a_frame_that_an_abort_cut_short_never_done(lane: nccl.NcclLane) -> None:
    lane.begin()
    lane.send(DeviceView(0, 4096, 8, None), timeout_s=1)
    frames = [lane.end(timeout_s=1) for _ in range(2)]
    assert frames[0]()
    with pytest.raises(TransportError, match="said no"):
        lane._fail("said no")
    for _ in range(2):
        with pytest.raises(TransportError, match="aborted"):
            frames[1]()


def test_is_a_frame_marked_once_its_kernels_are_enqueued(lane: nccl.NcclLane, gpu: Gpu, library: Nccl) -> None:
    lane.begin()
    lane.send(DeviceView(0, 4096, 8, None), timeout_s=1)
    assert lane.puts_off()
    library.in_progress = 3  # a thread of NCCL's is at it
    done = lane.end(timeout_s=1)
    assert not lane.puts_off()
    assert gpu.recorded == 0
    lane.begin()
    lane.send(DeviceView(0, 4096, 8, None), timeout_s=1)
    assert (library.in_progress, gpu.recorded) == (0, 1)
    assert done()


def test_does_a_frame_fail_whose_kernels_are_never_enqueued(lane: nccl.NcclLane, gpu: Gpu, library: Nccl) -> None:
    lane.begin()
    lane.send(DeviceView(0, 4096, 8, None), timeout_s=0.01)
    library.in_progress = 1 << 30
    done = lane.end(timeout_s=0.01)
    with pytest.raises(TransportError, match="did not call within"):
        paired.wait_for(done)
    assert gpu.recorded == 0
    assert library.called.count("ncclCommAbort") == 1


def test_is_a_frame_done_whatever_the_next_one_waits_for(lane: nccl.NcclLane, library: Nccl) -> None:
    frames = []
    for in_progress in (0, 1 << 30):
        lane.begin()
        lane.send(DeviceView(0, 4096, 8, None), timeout_s=1)
        library.in_progress = in_progress
        frames.append(lane.end(timeout_s=1))
        assert frames[0]()
    assert not frames[1]()


def test_is_the_group_of_a_thread_closed_before_its_communicator_is_aborted(lane: nccl.NcclLane, library: Nccl) -> None:
    view = DeviceView(0, 4096, 8, None)
    lane.begin()
    lane.receive(view, timeout_s=1)
    library.fails = "ncclRecv"
    with pytest.raises(TransportError, match="ncclRecv: an error"):
        lane.receive(view, timeout_s=1)
    lane.abandon()
    calls = [name for name in library.called if name != "ncclCommGetAsyncError"]
    assert calls == ["ncclGroupStart", "ncclRecv", "ncclRecv", "ncclGroupEnd", "ncclCommAbort"]
    with pytest.raises(TransportError, match="aborted"):
        lane.receive(view, timeout_s=1)


@pytest.mark.parametrize(
    ("asked", "ends"), [(0, "ncclCommDestroy"), (3, "ncclCommDestroy"), (1 << 30, "ncclCommAbort")]
)
def test_is_an_idle_communicator_destroyed_but_aborted_after_a_deadline(
    lane: nccl.NcclLane, library: Nccl, monkeypatch: pytest.MonkeyPatch, asked: int, ends: str
) -> None:
    monkeypatch.setattr(nccl, "END_LOOK_EVERY_S", 0.001)
    if asked > 3:
        monkeypatch.setattr(nccl, "END_TIMEOUT_S", 0.01)
    library.in_progress = asked
    lane.close()
    for thread in threading.enumerate():
        if thread.name == "swarm-nccl-end":
            thread.join(10)
    assert [name for name in library.called if name != "ncclCommGetAsyncError"] == ["ncclCommFinalize", ends]
    lane.close()
    assert library.called.count(ends) == 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(cuda, "gpu", lambda index: gpu)
    return gpu


@pytest.fixture
def library() -> Nccl:
    return Nccl()


@pytest.fixture
def lane(gpu: Gpu, library: Nccl, monkeypatch: pytest.MonkeyPatch) -> nccl.NcclLane:
    """One whose communicator has come about."""
    monkeypatch.setattr(nccl, "_library", lambda: library)
    ours, theirs = socket.socketpair()
    with theirs, PlainStream(ours) as stream:
        lane = nccl.NcclLane(stream, paired.HOLDER, device=0)
    library.called.clear()
    return lane


class Gpu:
    """Its events are done at once, as they are when a communicator is aborted."""

    cuda_stream = 1
    recorded = 0

    def enter(self) -> None: ...

    def current(self) -> Gpu:
        return self

    def event(self) -> Gpu:
        return self

    def record(self, stream: Gpu) -> None:
        self.recorded += 1

    def query(self) -> bool:
        return True


class Nccl:
    """The library, whose every call succeeds, but so many times it says first that something is in progress."""

    def __init__(self) -> None:
        self.in_progress = 0
        self.called: list[str] = []
        self.fails = ""
        self.ncclGetErrorString = lambda status: b"an error"

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            self.called.append(name)
            if name == self.fails:
                return 3
            if name == "ncclCommInitRankConfig":
                arguments[0]._obj.value = 1  # type: ignore[attr-defined]
            status = 7 if self.in_progress else 0
            if name == "ncclCommGetAsyncError":
                self.in_progress = max(0, self.in_progress - 1)
                arguments[1]._obj.value = status  # type: ignore[attr-defined]
                return 0
            return status if name == "ncclCommFinalize" else 0

        return call
