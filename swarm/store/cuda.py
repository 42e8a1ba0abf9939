"""CUDA below torch: copies between addresses, pinned memory, memory shared between processes (CUDA IPC).

One `Gpu` a device, made by `gpu(index)`. Streams and pinned buffers are torch's, so that torch accounts for them.
Copies and shared memory call the driver (libcuda, whose functions are stable): a chunk is rarely a whole tensor.

    address -> export -> handle, offset     another process: open(handle) + offset -> the same bytes

The current stream of a thread is torch's, except inside `moving`: transports have streams of their own.
The package's threads work beside captures of CUDA graphs in other threads (`beside_captures`).
The import has no effect: the first `Gpu` imports torch and loads the driver.
Must not know: chunks, tensors, transports.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np

from swarm.errors import StoreError

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_LAZY_ENABLE_PEER_ACCESS = 1
_BUFFER_ID = 7  # CU_POINTER_ATTRIBUTE_BUFFER_ID
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

FIRST = -1  # stream priority; the default is 0

_home: int | None = None


class CudaError(StoreError):
    """The driver refused a call, or an earlier kernel failed."""


@contextlib.contextmanager
def beside_captures() -> Iterator[None]:
    """Lets this thread allocate, query and close while another thread captures a CUDA graph.

    Otherwise such a call fails, and spoils the capture: torch captures in the mode that covers all threads. An engine
    captures graphs while its node closes the memory of a source that left.
    """
    exchange = _exchange_mode()
    mode = ctypes.c_int(_RELAXED)
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))


@contextlib.contextmanager
def torch_errors(subject: str) -> Iterator[None]:
    """Raises CudaError for a RuntimeError of torch: out of memory, or a failed kernel. The block is beside captures."""
    try:
        with beside_captures():
            yield
    except RuntimeError as error:
        raise CudaError(f"{subject}: {error}") from error


def in_use() -> bool:
    """Whether this process uses a GPU; the call itself initialises nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


def settle(index: int) -> None:
    """Sets the GPU that `home` returns: the last with tensors of this process."""
    global _home
    _home = index


def home() -> int:
    """The GPU for bytes that belong to no tensor: the last of `settle`, else torch's current device."""
    if _home is not None:
        return _home
    import torch

    return torch.cuda.current_device()


class CudaStream(Protocol):
    """The part of `torch.cuda.Stream` in use."""

    cuda_stream: int

    def wait_stream(self, other: Any) -> None:
        """Makes later work on this stream wait for the work already enqueued on `other`."""

    def query(self) -> bool:
        """Whether all enqueued work is done."""

    def synchronize(self) -> None:
        """Blocks until all enqueued work is done."""


class CudaEvent(Protocol):
    """The part of `torch.cuda.Event` in use."""

    def record(self, stream: CudaStream) -> None:
        """Marks the work enqueued on the stream."""

    def query(self) -> bool:
        """Whether the marked work is done."""

    def synchronize(self) -> None:
        """Blocks until the marked work is done."""


class Handle(ctypes.Structure):
    """CUipcMemHandle: passed by value."""

    _fields_ = [("bytes", ctypes.c_ubyte * HANDLE_BYTES)]


class Pinned:
    """Page-locked host memory, which a GPU accesses directly."""

    def __init__(self, size: int) -> None:
        import torch

        with beside_captures():
            self._tensor = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self.view = self._tensor.numpy().data
        self.address = self._tensor.data_ptr()


class Gpu:
    """A device. Thread-safe."""

    def __init__(self, index: int) -> None:
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]
        self.index = index
        self.side = new_stream(index)  # for copies that must not wait for the tensors' owner
        self._driver, self._prompt = _driver(ctypes.CDLL), _driver(ctypes.PyDLL)
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._check("cuDeviceGet", self._driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)))
        retained = self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), device)
        self._check("cuDevicePrimaryCtxRetain", retained)

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
        """A new event."""
        import torch

        return cast(CudaEvent, torch.cuda.Event())  # type: ignore[no-untyped-call]

    def copy(self, target: int, source: int, size: int, *, stream: int) -> None:
        """Enqueues a copy between addresses of GPUs or the host; `stream` is a `cuda_stream` number."""
        where = ctypes.c_void_p(stream)
        parts = ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size)
        self._call("cuMemcpyAsync", *parts, where, prompt=True)

    def allocation(self, address: int) -> tuple[int, int, int]:
        """Start, size and process-wide unique number of the allocation that contains an address.

        Raises CudaError for memory of another process.
        """
        start, size, number = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_uint64()
        where = ctypes.c_uint64(address)
        self._call("cuMemGetAddressRange_v2", ctypes.byref(start), ctypes.byref(size), where, prompt=True)
        self._call("cuPointerGetAttribute", ctypes.byref(number), ctypes.c_int(_BUFFER_ID), where, prompt=True)
        return start.value, size.value, number.value

    def export(self, start: int) -> bytes:
        """The IPC handle of an allocation. Raises CudaError for expandable segments and managed memory."""
        handle = Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(start))
        return bytes(handle.bytes)

    def open(self, handle: bytes) -> int:
        """Maps another process's allocation and returns its address; needs a `close`. Raises CudaError."""
        start = ctypes.c_uint64()
        raw = Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(start), raw, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
        return start.value

    def close(self, start: int) -> None:
        """Undoes an `open`."""
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(start))

    def load(self, image: bytes) -> int:
        """Loads a module (cubin, fatbin or PTX) for the life of the process. May wait until the GPU is idle."""
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        return module.value or 0

    def function(self, module: int, name: str) -> int:
        """A kernel of a loaded module."""
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), ctypes.c_void_p(module), name.encode())
        return function.value or 0

    def launch(self, function: int, blocks: int, threads: int, arguments: Sequence[Any], *, stream: int) -> None:
        """Enqueues a kernel; `arguments` are ctypes objects, `stream` is a `cuda_stream` number."""
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        grid = [ctypes.c_uint(size) for size in (blocks, 1, 1, threads, 1, 1, 0)]  # the last: shared memory, in bytes
        where = ctypes.c_void_p(function), ctypes.c_void_p(stream)
        self._call("cuLaunchKernel", where[0], *grid, where[1], addresses, None, prompt=True)

    def enter(self) -> None:
        """Makes the device's context current in this thread for good; torch does so only in threads that run kernels.

        It also changes torch's current device, so it is for threads of this package only.
        """
        self._check("cuCtxSetCurrent", self._prompt.cuCtxSetCurrent(self._context))

    def _call(self, name: str, *arguments: object, prompt: bool = False) -> None:
        """Calls a driver function in the device's context, beside captures. Raises CudaError.

        `prompt` keeps the GIL: to release it costs more than a call of a few microseconds.
        """
        mode = ctypes.c_int(_RELAXED)
        self._check("cuCtxPushCurrent_v2", self._prompt.cuCtxPushCurrent_v2(self._context))
        self._prompt.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            self._check(name, getattr(self._prompt if prompt else self._driver, name)(*arguments))
        finally:
            self._prompt.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
            self._check("cuCtxPopCurrent_v2", self._prompt.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())))

    def _check(self, name: str, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(status, ctypes.byref(text))
            raise CudaError(f"GPU {self.index}: {name} says {(text.value or b'error').decode()} ({status})")

    def __repr__(self) -> str:
        return f"<Gpu {self.index}>"


def copy_view(target: Any, source: Any) -> None:
    """Copies between views of one size, of GPUs or the host. Blocks."""
    devices = [view.device for view in (target, source) if not isinstance(view, memoryview)]
    if not devices:
        target[:] = source
        return
    device = gpu(devices[0])
    stream = device.current()
    kept = [_address(view) for view in (target, source)]
    device.copy(kept[0][0], kept[1][0], target.nbytes, stream=stream.cuda_stream)
    with beside_captures():
        stream.synchronize()


def _address(view: Any) -> tuple[int, object]:
    """Address of a view, and the object that keeps it alive."""
    if not isinstance(view, memoryview):
        return view.address, view
    array = np.frombuffer(view, np.uint8)
    return array.ctypes.data, array


class Mover(Protocol):
    """Batches operations before it enqueues them."""

    def flush(self) -> None:
        """Enqueues all operations requested so far."""

    def puts_off(self) -> bool:
        """Whether `flush` now would split a batch."""


_mover = threading.local()


@contextlib.contextmanager
def moving(streams: dict[int, CudaStream], mover: Mover | None = None, *, priority: int = 0) -> Iterator[None]:
    """Sets this thread's current streams by device while the block runs; missing streams are made on demand.

    Kernels of streams with a lower `priority` number start first: those of FIRST before hashes. `flush` and `puts_off`
    call `mover`, which may hold back operations.
    """
    _mover.streams, _mover.mover, _mover.priority = streams, mover, priority
    try:
        with beside_captures():
            yield
    finally:
        _mover.streams = _mover.mover = None


def flush() -> None:
    """Enqueues all operations that this thread's mover holds back."""
    if (mover := getattr(_mover, "mover", None)) is not None:
        mover.flush()


def puts_off() -> bool:
    """Whether a `flush` now would split a batch of this thread's mover."""
    mover = getattr(_mover, "mover", None)
    return mover is not None and mover.puts_off()


@functools.cache
def _driver(kind: type[ctypes.CDLL]) -> ctypes.CDLL:
    try:
        return kind("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"the NVIDIA driver cannot be loaded: {error}") from error


@functools.cache
def _exchange_mode() -> Callable[..., object]:
    """The driver's function that swaps this thread's capture mode; one that does nothing where there is no driver."""
    try:
        return cast("Callable[..., object]", _driver(ctypes.PyDLL).cuThreadExchangeStreamCaptureMode)
    except CudaError:
        return lambda mode: None


def new_stream(device: int, *, priority: int = 0) -> CudaStream:
    """A new stream on a device."""
    import torch

    return cast(CudaStream, torch.cuda.Stream(device, priority=priority))  # type: ignore[no-untyped-call]


@functools.cache
def gpu(index: int) -> Gpu:
    """The device with this number."""
    return Gpu(index)
