"""What is asked of CUDA below torch: copies between addresses, pinned memory, and memory shared between processes.

One `Gpu` a device, made by `gpu(index)`. Streams and pinned buffers are torch's, so that they count in its books;
copies and shared memory go to the driver itself (libcuda, whose functions do not change), because they are about
addresses and not tensors: a chunk is rarely a tensor.

    address -> export -> handle, offset     another process: open(handle) + offset -> the same bytes

What was enqueued on the current stream of a thread is what 'so far' means here: torch's notion, except while a thread
moves bytes for a transport (`moving`), which has streams of its own.
Nothing happens on import: torch is imported, and the driver loaded, when the first `Gpu` is made.
Must not know: chunks, tensors, transports.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np

from swarm.errors import StoreError

HANDLE_BYTES = 64  # the driver's own
_LAZY_ENABLE_PEER_ACCESS = 1
_BUFFER_ID = 7  # CU_POINTER_ATTRIBUTE_BUFFER_ID

FIRST = -1  # a stream's priority; usual is 0

_home: int | None = None


class CudaError(StoreError):
    """The driver refused something, or a kernel that ran before failed."""


@contextlib.contextmanager
def torch_errors(what: str) -> Iterator[None]:
    """What torch raises meanwhile, for want of memory or when a kernel has failed, becomes a CudaError."""
    try:
        yield
    except RuntimeError as error:
        raise CudaError(f"{what}: {error}") from error


def in_use() -> bool:
    """Whether this process uses a GPU already; asking does not make it use one."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


def settle(index: int) -> None:
    """Tells that this process has tensors on a GPU: what belongs to no tensor goes there as well."""
    global _home
    _home = index


def home() -> int:
    """The GPU that this process's tensors are on; the one told last, where there are several."""
    if _home is not None:
        return _home
    import torch

    return torch.cuda.current_device()


class CudaStream(Protocol):
    """What others need of a stream of torch."""

    cuda_stream: int

    def wait_stream(self, other: Any) -> None:
        """What is enqueued from now on waits for what the other stream has enqueued so far."""

    def query(self) -> bool:
        """Whether everything enqueued so far is done."""

    def synchronize(self) -> None:
        """Waits for everything enqueued so far."""


class CudaEvent(Protocol):
    """What others need of an event of torch."""

    def record(self, stream: CudaStream) -> None:
        """Marks what was enqueued on the stream so far."""

    def query(self) -> bool:
        """Whether what was marked is done."""

    def synchronize(self) -> None:
        """Waits for what was marked."""


class Handle(ctypes.Structure):
    """CUipcMemHandle: passed by value."""

    _fields_ = [("bytes", ctypes.c_ubyte * HANDLE_BYTES)]


class Pinned:
    """Host memory that a GPU copies from and to without a detour."""

    def __init__(self, size: int) -> None:
        import torch

        self._tensor = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self.view = self._tensor.numpy().data
        self.address = self._tensor.data_ptr()


class Gpu:
    """One device. Any thread."""

    def __init__(self, index: int) -> None:
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]
        self.index = index
        self.side = new_stream(index)  # for what must not wait for the work of whoever owns the tensors
        self._driver, self._prompt = _driver(ctypes.CDLL), _driver(ctypes.PyDLL)
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._ask("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        self._ask("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def current(self) -> CudaStream:
        """The thread's current stream on this device."""
        import torch

        streams: dict[int, CudaStream] | None = getattr(_mover, "streams", None)
        if streams is not None:
            if self.index not in streams:
                streams[self.index] = new_stream(self.index, priority=_mover.priority)
            return streams[self.index]
        return cast(CudaStream, torch.cuda.current_stream(self.index))

    def event(self) -> CudaEvent:
        """One that no kernel waits for, only the host."""
        import torch

        return cast(CudaEvent, torch.cuda.Event())  # type: ignore[no-untyped-call]

    def copy(self, target: int, source: int, size: int, *, stream: int) -> None:
        """Enqueues a copy between two addresses, of GPUs or the host, on a stream (its number)."""
        where = ctypes.c_void_p(stream)
        parts = ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size)
        with self._inside():
            self._ask("cuMemcpyAsync", *parts, where, prompt=True)

    def allocation(self, address: int) -> tuple[int, int, int]:
        """Start and size of the allocation that an address lies in, and a number that no other one of this process
        has had. Raises CudaError for memory that is not this process's."""
        start, size, number = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_uint64()
        where = ctypes.c_uint64(address)
        with self._inside():
            self._ask("cuMemGetAddressRange_v2", ctypes.byref(start), ctypes.byref(size), where, prompt=True)
            self._ask("cuPointerGetAttribute", ctypes.byref(number), ctypes.c_int(_BUFFER_ID), where, prompt=True)
        return start.value, size.value, number.value

    def export(self, start: int) -> bytes:
        """The handle of an allocation. Raises CudaError where it cannot be shared (expandable segments, managed)."""
        handle = Handle()
        with self._inside():
            self._ask("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(start))
        return bytes(handle.bytes)

    def open(self, handle: bytes) -> int:
        """Where another process's allocation begins here. Raises CudaError; each `open` needs a `close`."""
        start = ctypes.c_uint64()
        raw = Handle.from_buffer_copy(handle)
        with self._inside():
            self._ask("cuIpcOpenMemHandle_v2", ctypes.byref(start), raw, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
        return start.value

    def close(self, start: int) -> None:
        """Undoes one `open`."""
        with self._inside():
            self._ask("cuIpcCloseMemHandle", ctypes.c_uint64(start))

    def load(self, image: bytes) -> int:
        """Loads compiled kernels (a cubin, fatbin or PTX), for good. May wait until the GPU is idle."""
        module = ctypes.c_void_p()
        with self._inside():
            self._ask("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        return module.value or 0

    def function(self, module: int, name: str) -> int:
        """A kernel of a loaded module."""
        function = ctypes.c_void_p()
        with self._inside():
            self._ask("cuModuleGetFunction", ctypes.byref(function), ctypes.c_void_p(module), name.encode())
        return function.value or 0

    def launch(self, function: int, blocks: int, threads: int, arguments: Sequence[Any], *, stream: int) -> None:
        """Enqueues a kernel on a stream (its number); `arguments` are ctypes objects."""
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
        grid = [ctypes.c_uint(size) for size in (blocks, 1, 1, threads, 1, 1, 0)]  # the last: shared memory, in bytes
        with self._inside():
            where = ctypes.c_void_p(function), ctypes.c_void_p(stream)
            self._ask("cuLaunchKernel", where[0], *grid, where[1], addresses, None, prompt=True)

    def enter(self) -> None:
        """Makes the device's context this thread's, for good: torch does so only for threads that run kernels. It makes
        the device torch's current one as well: not for a thread of anybody else's."""
        self._ask("cuCtxSetCurrent", self._context, prompt=True)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Meanwhile the device's context is this thread's, whoever's thread it is."""
        self._ask("cuCtxPushCurrent_v2", self._context, prompt=True)
        try:
            yield
        finally:
            self._ask("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()), prompt=True)

    def _ask(self, name: str, *arguments: object, prompt: bool = False) -> None:
        """`prompt`: it takes a few microseconds, during which no other thread needs to run. To give them the
        interpreter, and to wait until they give it back, would take longer."""
        if status := getattr(self._prompt if prompt else self._driver, name)(*arguments):
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(text))
            raise CudaError(f"GPU {self.index}: {name} says {(text.value or b'error').decode()} ({status})")

    def __repr__(self) -> str:
        return f"<Gpu {self.index}>"


def copy_view(target: Any, source: Any) -> None:
    """Copies bytes between views, of GPUs or the host, of one size; done when it returns."""
    devices = [view.device for view in (target, source) if not isinstance(view, memoryview)]
    if not devices:
        target[:] = source
        return
    device = gpu(devices[0])
    stream = device.current()
    kept = [_address(view) for view in (target, source)]
    device.copy(kept[0][0], kept[1][0], target.nbytes, stream=stream.cuda_stream)
    stream.synchronize()


def _address(view: Any) -> tuple[int, object]:
    """Where a view's bytes are, and what keeps them there."""
    if not isinstance(view, memoryview):
        return view.address, view
    array = np.frombuffer(view, np.uint8)
    return array.ctypes.data, array


class Mover(Protocol):
    """Puts off some of what it has to enqueue, to enqueue it all at once."""

    def flush(self) -> None:
        """What was put off is enqueued when this returns, and so is all that was called for before."""

    def puts_off(self) -> bool:
        """Whether `flush` would part what belongs together."""


_mover = threading.local()


@contextlib.contextmanager
def moving(streams: dict[int, CudaStream], mover: Mover | None = None, *, priority: int = 0) -> Iterator[None]:
    """Meanwhile this thread's current streams are these, by device; they are made when they are first needed.

    `priority`: theirs. Kernels of a lower one go before others that are not running yet, those of FIRST before hashes.
    `mover` is asked by whoever wants to enqueue something behind what it has put off.
    """
    _mover.streams, _mover.mover, _mover.priority = streams, mover, priority
    try:
        yield
    finally:
        _mover.streams = _mover.mover = None


def flush() -> None:
    """Everything that this thread's mover was lent so far is enqueued when this returns."""
    if (mover := getattr(_mover, "mover", None)) is not None:
        mover.flush()


def puts_off() -> bool:
    """Whether `flush` is better called a little later."""
    mover = getattr(_mover, "mover", None)
    return mover is not None and mover.puts_off()


@functools.cache
def _driver(kind: type[ctypes.CDLL]) -> ctypes.CDLL:
    try:
        return kind("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"the NVIDIA driver cannot be loaded: {error}") from error


def new_stream(device: int, *, priority: int = 0) -> CudaStream:
    """A stream of its own on a device."""
    import torch

    return cast(CudaStream, torch.cuda.Stream(device, priority=priority))  # type: ignore[no-untyped-call]


@functools.cache
def gpu(index: int) -> Gpu:
    """The device of this number."""
    return Gpu(index)
