"""CUDA streams and driver calls, without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import pytest

from swarm.store import DeviceView, cuda


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


class Driver:
    """Records the functions that are called; `fails` by name."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.fails: dict[str, int] = {}

    def __getattr__(self, name: str) -> object:
        def call(*_: object) -> int:
            self.called.append(name)
            return self.fails.get(name, 0)

        return call


def test_is_the_context_current_during_a_call_and_restored_after_a_failure() -> None:
    gpu = cuda.Gpu.__new__(cuda.Gpu)
    driver = gpu._driver = gpu._prompt = Driver()  # type: ignore[assignment]
    gpu.index, gpu._context = 3, ctypes.c_void_p()
    gpu.close(4096)
    around = "cuThreadExchangeStreamCaptureMode"
    assert driver.called == ["cuCtxPushCurrent_v2", around, "cuIpcCloseMemHandle", around, "cuCtxPopCurrent_v2"]
    driver.fails["cuMemcpyAsync"] = 700
    with pytest.raises(cuda.CudaError, match=r"GPU 3: cuMemcpyAsync says error \(700\)"):
        gpu.copy(0, 0, 8, stream=0)
    assert driver.called[-2:] == [around, "cuCtxPopCurrent_v2"]


def test_is_a_thread_beside_captures_in_a_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = 0  # of the thread: captures of other threads count

    def exchange(address: Any) -> None:
        nonlocal mode
        address._obj.value, mode = mode, address._obj.value

    monkeypatch.setattr(cuda, "_exchange_mode", lambda: exchange)
    for block in (cuda.beside_captures, lambda: cuda.torch_errors("a test"), lambda: cuda.moving({})):
        with contextlib.suppress(cuda.CudaError), block():
            assert mode == 2
            with cuda.beside_captures():
                assert mode == 2
            assert mode == 2
            raise cuda.CudaError("a test")
        assert mode == 0


def test_is_a_device_view_cut_like_a_memoryview() -> None:
    view, owner = DeviceView(1, 4096, 100, object()), memoryview(bytes(100))
    for part in (slice(0, 10), slice(90, 200), slice(50, 20), slice(-5, None), slice(None)):
        cut = view[part]
        assert (len(cut), cut.nbytes) == (len(owner[part]), len(owner[part]))
        assert cut.address == 4096 + part.indices(100)[0]
        assert (cut.device, cut.owner) == (1, view.owner)


def test_is_host_memory_copied_without_a_gpu() -> None:
    target = bytearray(3)
    cuda.copy_view(memoryview(target), memoryview(b"abc"))
    assert target == b"abc"
