"""Between GPU memory and whoever knows host memory only: two pinned buffers, one copied while the other is used.

    GPU | part 0 | part 1 | part 2 | ...        outgoing: part n + 1 is copied while part n is sent
         buffer 0 buffer 1 buffer 0              incoming: part n is copied while part n + 1 is received

Copies go over the GPU's side stream, so that they do not wait for what the tensors' owner computes; nobody sees a part
before its copy is done. Pairs of buffers are kept for the next transfer: there are never more than were used at once.
Must not know: tensors, chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from swarm.store import DeviceView, cuda

# A view is hashed as soon as it is full: 1 MiB is still in the core's own cache then, and large enough for a
# system call.
LANDING_BYTES = 1 << 20

_idle: dict[int, deque[_Pair]] = {}  # by device; deques may be used by several threads


class _Buffer:
    def __init__(self, gpu: cuda.Gpu) -> None:
        self.pinned = cuda.Pinned(LANDING_BYTES)
        self._gpu = gpu
        self._done = gpu.event()

    def copy(self, target: int, source: int, size: int) -> None:
        self._gpu.copy(target, source, size, stream=self._gpu.side.cuda_stream)
        self._done.record(self._gpu.side)

    def wait(self) -> None:
        self._done.synchronize()


class _Pair:
    def __init__(self, device: int) -> None:
        gpu = cuda.gpu(device)
        self.buffers = (_Buffer(gpu), _Buffer(gpu))

    def wait(self) -> None:
        for buffer in self.buffers:
            buffer.wait()


def outgoing(view: DeviceView) -> Iterator[memoryview]:
    """The bytes of a view, read-only, at most LANDING_BYTES at a time. Raises CudaError."""
    parts = [view[start : start + LANDING_BYTES] for start in range(0, view.nbytes, LANDING_BYTES)]
    pair = _borrow(view.device)
    try:
        for number, part in enumerate(parts):
            if number == 0:
                _fetch(pair.buffers[0], part)
            if number + 1 < len(parts):
                _fetch(pair.buffers[(number + 1) % 2], parts[number + 1])
            buffer = pair.buffers[number % 2]
            buffer.wait()
            yield buffer.pinned.view[: part.nbytes].toreadonly()
    finally:
        _give_back(view.device, pair)


def incoming(view: DeviceView) -> Iterator[memoryview]:
    """Room for the bytes of a view. They are there once the iterator is exhausted. Raises CudaError."""
    pair = _borrow(view.device)
    try:
        for number, start in enumerate(range(0, view.nbytes, LANDING_BYTES)):
            part, buffer = view[start : start + LANDING_BYTES], pair.buffers[number % 2]
            buffer.wait()
            yield buffer.pinned.view[: part.nbytes]
            buffer.copy(part.address, buffer.pinned.address, part.nbytes)
        pair.wait()
    finally:
        _give_back(view.device, pair)


def _fetch(buffer: _Buffer, part: DeviceView) -> None:
    buffer.copy(buffer.pinned.address, part.address, part.nbytes)


def _borrow(device: int) -> _Pair:
    try:
        return _idle.setdefault(device, deque()).pop()
    except IndexError:
        return _Pair(device)


def _give_back(device: int, pair: _Pair) -> None:
    pair.wait()  # whoever is next must not find a copy on its way
    _idle[device].append(pair)
