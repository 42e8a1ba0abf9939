"""Copies between GPU memory and host memory through two pinned buffers: one is copied while the other is in use.

    GPU | part 0 | part 1 | part 2 | ...        outgoing: part n + 1 is copied while part n is sent
         buffer 0 buffer 1 buffer 0              incoming: part n is copied while part n + 1 is received

Copies run on the GPU's side stream, so they do not wait for kernels of the tensors' owner. A part is lent only after
its copy is done. A copy costs a few calls of the driver, so a part is larger than what a receiver fills at once. Pairs
of buffers are reused; there are never more than were in use at once.
Must not know: tensors, chunks.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

from swarm.store import DeviceView, cuda

# A full view is hashed at once: 2 MiB are still in a core's own cache, and worth a few turns of the GIL.
LANDING_BYTES = 2 << 20
PART_BYTES = 2 * LANDING_BYTES


class _Buffer:
    def __init__(self, gpu: cuda.Gpu) -> None:
        self.pinned = cuda.Pinned(PART_BYTES)
        self._gpu = gpu
        self._done = gpu.event()

    def copy(self, target: int, source: int, size: int) -> None:
        self._gpu.copy(target, source, size, stream=self._gpu.side.cuda_stream)
        with cuda.beside_captures():
            self._done.record(self._gpu.side)

    def wait(self) -> None:
        with cuda.beside_captures():
            self._done.synchronize()

    def lend(self, size: int) -> memoryview:
        self.wait()
        return self.pinned.view[:size].toreadonly()


_Pair: TypeAlias = tuple[_Buffer, _Buffer]
_idle: dict[int, deque[_Pair]] = {}  # by device; deques are thread-safe


def outgoing(view: DeviceView) -> Iterator[memoryview]:
    """The bytes of a view, read-only, at most PART_BYTES at a time. Raises CudaError."""
    with _borrowed(view.device) as pair:
        copied: tuple[_Buffer, int] | None = None
        for number, start in enumerate(range(0, view.nbytes, PART_BYTES)):
            part, buffer = view[start : start + PART_BYTES], pair[number % 2]
            buffer.copy(buffer.pinned.address, part.address, part.nbytes)
            if copied:
                yield _Buffer.lend(*copied)
            copied = buffer, part.nbytes
        if copied:
            yield _Buffer.lend(*copied)


def incoming(view: DeviceView) -> Iterator[memoryview]:
    """Writable views of at most LANDING_BYTES for the bytes of a view, which are there when the iterator is exhausted.

    Raises CudaError.
    """
    with _borrowed(view.device) as pair:
        for number, start in enumerate(range(0, view.nbytes, PART_BYTES)):
            part, buffer = view[start : start + PART_BYTES], pair[number % 2]
            buffer.wait()
            for position in range(0, part.nbytes, LANDING_BYTES):
                yield buffer.pinned.view[position : min(position + LANDING_BYTES, part.nbytes)]
            buffer.copy(part.address, buffer.pinned.address, part.nbytes)


@contextlib.contextmanager
def _borrowed(device: int) -> Iterator[_Pair]:
    idle = _idle.setdefault(device, deque())
    try:
        pair = idle.pop()
    except IndexError:
        gpu = cuda.gpu(device)
        pair = _Buffer(gpu), _Buffer(gpu)
    try:
        yield pair
    finally:
        for buffer in pair:
            buffer.wait()  # also completes the last copies of `incoming`
        idle.append(pair)
