"""A stand-in for a GPU: copies within host memory, done when a caller waits."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from swarm.store import DeviceView, cuda
from swarm.store.cuda import CudaError

_numbers = itertools.count(1)


class Lazy:
    """A stream whose work is done when a caller waits for it; each query of an event does a piece."""

    def __init__(self) -> None:
        self.cuda_stream = next(_numbers)
        self.work: list[Callable[[], object]] = []
        self.done = 0  # pieces
        self._busy = threading.Lock()

    def synchronize(self) -> None:
        with self._busy:
            while self.work:
                self._work()

    def query(self) -> bool:
        return self.work_until(self.done + len(self.work))

    def work_until(self, done: int) -> bool:
        """Whether so much is done. If not, some of it is done next."""
        with self._busy:
            if self.done >= done:
                return True
            self._work()
            return False

    def _work(self) -> None:
        self.work.pop(0)()
        self.done += 1

    def wait_stream(self, other: object) -> None:
        raise NotImplementedError


class LazyEvent:
    def __init__(self) -> None:
        self.stream: Lazy | None = None
        self.marked = 0

    def record(self, stream: Lazy) -> None:
        self.stream = stream
        self.marked = stream.done + len(stream.work)

    def query(self) -> bool:
        return self.stream is None or self.stream.work_until(self.marked)

    def synchronize(self) -> None:
        if self.stream:
            self.stream.synchronize()


class HostMemory:
    """Pinned memory, but for the pinning."""

    def __init__(self, size: int) -> None:
        self._tensor = torch.zeros(size, dtype=torch.uint8)
        self.view = self._tensor.numpy().data
        self.address = self._tensor.data_ptr()


class FakeGpu:
    """`foreign`: handles count as another process's, which `open` opens. `refuses`: it does not."""

    def __init__(self) -> None:
        self.index = 0
        self.side = Lazy()
        self.opened: list[int] = []
        self.refuses = False
        self._streams: dict[int, Lazy] = {self.side.cuda_stream: self.side}
        self._allocations: list[torch.Tensor] = []

    def own(self, tensor: torch.Tensor) -> DeviceView:
        """Makes CPU memory an allocation of this GPU."""
        self._allocations.append(tensor)
        return on_gpu(tensor)

    @contextlib.contextmanager
    def in_place_of_cuda(self) -> Iterator[None]:
        """Meanwhile this process uses this GPU."""
        with mock.patch.multiple(cuda, gpu=lambda index: self, in_use=lambda: True, home=lambda: 0, Pinned=HostMemory):
            yield

    def event(self) -> LazyEvent:
        return LazyEvent()

    def current(self) -> Lazy:
        streams = getattr(cuda._mover, "streams", None)
        if streams is None:
            return self.side
        stream: Lazy = streams.setdefault(self.index, Lazy())
        self._streams[stream.cuda_stream] = stream
        return stream

    def copy(self, target: int, source: int, size: int, *, stream: int) -> None:
        self._streams[stream].work.append(lambda: ctypes.memmove(target, source, size))

    def allocation(self, address: int) -> tuple[int, int, int]:
        for number, tensor in enumerate(self._allocations):
            if 0 <= address - tensor.data_ptr() < tensor.numel():
                return tensor.data_ptr(), tensor.numel(), number
        raise CudaError("no such memory")

    def export(self, start: int) -> bytes:
        return start.to_bytes(cuda.HANDLE_BYTES, "big")

    def open(self, handle: bytes) -> int:
        if self.refuses:
            raise CudaError("GPU 0: cuIpcOpenMemHandle_v2 says CUDA_ERROR_INVALID_HANDLE (400)")
        self.opened.append(int.from_bytes(handle, "big"))
        return self.opened[-1]

    def close(self, start: int) -> None:
        self.opened.remove(start)


def on_gpu(tensor: torch.Tensor) -> DeviceView:
    """CPU bytes as if they were a GPU's."""
    return DeviceView(0, tensor.data_ptr(), tensor.numel(), tensor)
