"""What of CUDA can be asked without one."""

from __future__ import annotations

import ctypes

import pytest

from swarm import cuda
from swarm.errors import TransportError
from swarm.store import DeviceView
from swarm.transport import nccl


def test_do_streams_of_a_mover_have_its_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []

    def new_stream(device: int, *, priority: int) -> object:
        made.append((device, priority))
        return object()

    monkeypatch.setattr(cuda, "new_stream", new_stream)
    gpu = cuda.Gpu.__new__(cuda.Gpu)
    gpu.index = 3
    for priority in (0, cuda.FIRST):
        with cuda.moving({}, priority=priority):
            assert gpu.current() is gpu.current()
    assert made == [(3, 0), (3, cuda.FIRST)]
    assert cuda.FIRST < 0


class Gpu:
    """Its events are done at once, as they are when a communicator is aborted."""

    cuda_stream = 1

    def enter(self) -> None: ...

    def current(self) -> Gpu:
        return self

    def event(self) -> Gpu:
        return self

    def record(self, stream: Gpu) -> None: ...

    def query(self) -> bool:
        return True


def test_is_a_frame_that_an_abort_cut_short_never_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "gpu", lambda index: Gpu())
    lane = nccl.NcclLane.__new__(nccl.NcclLane)
    lane._nccl, lane._device, lane._other, lane._open = Nccl(), 0, 1, 0  # type: ignore[assignment]
    lane._communicator = ctypes.c_void_p(1)
    lane.begin()
    lane.send(DeviceView(0, 4096, 8, None), timeout_s=1)
    frames = [lane.end(timeout_s=1) for _ in range(2)]
    assert frames[0]()
    with pytest.raises(TransportError, match="said no"):
        lane._fail("said no")
    for _ in range(2):
        with pytest.raises(TransportError, match="aborted"):
            frames[1]()


class Nccl:
    """The library, whose every call succeeds."""

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object) -> int:
            if name == "ncclCommGetAsyncError":
                arguments[1]._obj.value = 0  # type: ignore[attr-defined]
            return 0

        return call
