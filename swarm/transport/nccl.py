"""NCCL as a transport between GPUs: a communicator of two for each session, aborted after a deadline.

The holder creates the communicator's id and sends it over the connection of the session; both ends join. There is no
global group, no port and no environment variable. The communicator is non-blocking: calls in progress are polled, and
aborted after their deadline, which the process survives. It is destroyed on a thread, since that takes 0.3 s.

The library that torch has loaded is called directly, by ctypes: eleven functions that are unchanged since NCCL 2.18.
torch.distributed's NCCL groups have a watchdog that ends the process when a peer dies, and nccl4py is a further
package for the same functions.

The device views of a frame are one NCCL group, so one kernel for many chunks, which waits once for running kernels.
Host memory goes through 4 MiB on the GPU. For clusters of trusted nodes: NCCL does not check its peer or its input.

Must not know: transfers, tensors, links.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.errors import SettingsError, TransportError
from swarm.store import DeviceView, View, cuda
from swarm.transport.byte_stream import ByteStream
from swarm.transport.paired import (
    ASKER,
    HOLDER,
    HOST_PIECE_BYTES_MAX,
    Done,
    PairedTransport,
    read_exactly,
    wait_for,
    write_all,
)
from swarm.transport.sink import LOOK_EVERY_S

if TYPE_CHECKING:
    import torch

SETUP_TIMEOUT_S = 4.5  # below a peer's timeout for a session; 0.1 s is usual
END_TIMEOUT_S = 5.0  # for finalizing; then it is aborted
END_LOOK_EVERY_S = 0.01
ID_BYTES = 128
_IN_PROGRESS = 7
_UINT8 = 1
_UNSET = -(1 << 31)


class NcclTransport(PairedTransport):
    """The transport of a process that uses a GPU. Communicators are on the GPU of the process's tensors."""

    scheme = "nccl"
    reason = "the settings name it and both processes use GPUs"
    usual_bytes_per_s = 100e9
    magic = b"SWRN"

    def reach(self, address: str) -> bool:
        """Whether this process uses a GPU; a peer that advertises this scheme does."""
        return cuda.in_use() and super().reach(address)

    def _make_lane(self, stream: ByteStream, rank: int) -> NcclLane:
        return NcclLane(stream, rank, device=cuda.home())


def demand() -> None:
    """Raises SettingsError with the missing part, where NCCL cannot be used."""
    if not cuda.in_use():
        raise SettingsError("transports", "nccl: this process uses no GPU; serve or fetch CUDA tensors, or use tcp")
    try:
        _library()
    except OSError as error:
        raise SettingsError("transports", f"nccl: its library cannot be loaded ({error}); use tcp") from error


class NcclLane:
    """A communicator of two. Raises TransportError when its setup fails."""

    on_device = True

    def __init__(self, stream: ByteStream, rank: int, *, device: int) -> None:
        self._other = ASKER if rank == HOLDER else HOLDER
        self._device = device
        self._nccl = _library()
        self._communicator = ctypes.c_void_p()
        self._open = 0  # calls of the open group, which begins with its first call
        # Ends of frames, recorded once a thread of NCCL has enqueued their kernels.
        self._unmarked: list[_Mark] = []
        self._timeout_s = SETUP_TIMEOUT_S  # of the last call, for enqueuing
        self._scratch: DeviceView | None = None
        stream.block(SETUP_TIMEOUT_S)
        try:
            unique = self._agree(stream, rank)
            cuda.gpu(device).enter()
            config = _Config()
            self._call(
                "ncclCommInitRankConfig", ctypes.byref(self._communicator), 2, unique, rank, ctypes.byref(config)
            )
            self._settle()
        except (OSError, EOFError) as error:
            raise TransportError(f"nccl: the setup of the pair failed ({error})") from error

    def begin(self) -> None:
        """Nothing: the group begins with its first call."""

    def send(self, view: View, *, timeout_s: float) -> None:
        """A view of another device or of the host blocks."""
        self._post("ncclSend", view, timeout_s)

    def receive(self, view: View, *, timeout_s: float) -> None:
        """A view of another device or of the host blocks."""
        self._post("ncclRecv", view, timeout_s)

    def end(self, *, timeout_s: float) -> Done:
        """Ends the group and records an event after its kernels."""
        self._end_group()
        mark = _Mark(cuda.gpu(self._device).event(), self._stream())
        self._unmarked.append(mark)
        deadline: float | None = None  # set at the first poll, when the frames before are done

        def done() -> bool:
            nonlocal deadline
            if not self._communicator:  # the event is done, but its kernels were aborted
                raise TransportError("nccl: the communicator was aborted")
            if not mark.recorded and not self._in_progress():
                self._mark()
            if mark.recorded and mark.event.query():
                return True
            self._in_progress()
            deadline = deadline or time.monotonic() + timeout_s
            self._expire(deadline, timeout_s)
            return False

        return done

    def flush(self) -> None:
        """Enqueues all postponed calls."""
        self._end_group()
        self._settle()

    def abandon(self) -> None:
        """Aborts the communicator."""
        communicator, self._communicator = self._communicator, ctypes.c_void_p()
        if communicator:
            if self._open:  # communicators of a thread share its group: left open, it would block them all
                self._open = 0
                self._nccl.ncclGroupEnd()
            _abort(self._nccl, communicator, self._device)

    def puts_off(self) -> bool:
        """Whether a group is open."""
        return self._open > 0

    def scratch(self, size: int) -> DeviceView:
        """Memory of the GPU."""
        if self._scratch is None or self._scratch.nbytes < size:
            self._scratch = _allocate(self._device, max(size, HOST_PIECE_BYTES_MAX), self._stream())
        return self._scratch[:size]

    def close(self) -> None:
        """Finalizes the communicator on a thread."""
        communicator, self._communicator = self._communicator, ctypes.c_void_p()
        if communicator:
            end = functools.partial(_end, self._nccl, communicator, self._device)
            threading.Thread(target=end, name="swarm-nccl-end", daemon=True).start()

    def _post(self, name: str, view: View, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        if isinstance(view, DeviceView) and view.device == self._device:
            self._enqueue(name, view)
            return
        wait_for(self.end(timeout_s=timeout_s))
        for start in range(0, view.nbytes, HOST_PIECE_BYTES_MAX):
            part = view[start : start + HOST_PIECE_BYTES_MAX]
            room = self.scratch(part.nbytes)
            if name == "ncclSend":
                cuda.copy_view(room, part)
            self._enqueue(name, room)
            wait_for(self.end(timeout_s=timeout_s))
            if name == "ncclRecv":
                cuda.copy_view(part, room)

    def _enqueue(self, name: str, view: DeviceView) -> None:
        if not self._open:
            self._settle()
            cuda.gpu(self._device).enter()
            self._call("ncclGroupStart")
        self._open += 1
        where = ctypes.c_void_p(self._stream().cuda_stream)
        address, size = ctypes.c_void_p(view.address), ctypes.c_size_t(view.nbytes)
        self._call(name, address, size, ctypes.c_int(_UINT8), ctypes.c_int(self._other), self._communicator, where)

    def _end_group(self) -> None:
        if self._open:
            self._open = 0
            self._call("ncclGroupEnd")

    def _mark(self) -> None:
        for mark in self._unmarked:
            mark.event.record(mark.stream)
            mark.recorded = True
        self._unmarked.clear()

    def _stream(self) -> cuda.CudaStream:
        return cuda.gpu(self._device).current()

    def _agree(self, stream: ByteStream, rank: int) -> _UniqueId:
        unique = _UniqueId()
        if rank == HOLDER:
            self._call("ncclGetUniqueId", ctypes.byref(unique))
            write_all(stream, bytes(unique.bytes))
            return unique
        return _UniqueId.from_buffer_copy(read_exactly(stream, ID_BYTES))

    def _settle(self) -> None:
        """Waits until no call is in progress: the kernels of the last group are enqueued then."""
        deadline = time.monotonic() + self._timeout_s
        while self._in_progress():
            self._expire(deadline, self._timeout_s)
            time.sleep(LOOK_EVERY_S)
        self._mark()

    def _in_progress(self) -> bool:
        """Whether a call is in progress. Raises TransportError when the communicator failed."""
        status = ctypes.c_int(_IN_PROGRESS)
        self._call("ncclCommGetAsyncError", self._communicator, ctypes.byref(status))
        if status.value not in (0, _IN_PROGRESS):
            self._fail(_text(self._nccl, status.value))
        return status.value == _IN_PROGRESS

    def _expire(self, deadline: float, timeout_s: float) -> None:
        if time.monotonic() > deadline:
            self._fail(f"the other end did not call within {timeout_s:g} s")

    def _fail(self, why: str) -> None:
        """Aborts, so that enqueued kernels end."""
        self.abandon()
        raise TransportError(f"nccl: {why}")

    def _call(self, name: str, *arguments: object) -> None:
        if name not in ("ncclGetUniqueId", "ncclCommInitRankConfig") and not self._communicator:
            raise TransportError("nccl: the communicator was aborted")
        status = getattr(self._nccl, name)(*arguments)
        if status not in (0, _IN_PROGRESS):
            self._fail(f"{name}: {_text(self._nccl, status)}")


@dataclass(eq=False)
class _Mark:
    """The end of a frame on the stream of its kernels."""

    event: cuda.CudaEvent
    stream: cuda.CudaStream
    recorded: bool = False


class _UniqueId(ctypes.Structure):
    """ncclUniqueId: passed by value."""

    _fields_ = [("bytes", ctypes.c_ubyte * ID_BYTES)]


class _Config(ctypes.Structure):
    """ncclConfig_t of NCCL 2.18, which later versions accept, for a non-blocking communicator."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_void_p),
        ("split_share", ctypes.c_int),
    ]

    def __init__(self) -> None:
        unset = (_UNSET, _UNSET, _UNSET)
        super().__init__(ctypes.sizeof(type(self)), 0xCAFEBEEF, 21800, 0, *unset, None, _UNSET)


@functools.cache
def _library() -> ctypes.CDLL:
    """Raises OSError. Calls release the GIL: the driver may wait for a kernel whose peer died, until another thread
    aborts it."""
    return ctypes.CDLL("libnccl.so.2")


def _text(nccl: ctypes.CDLL, status: int) -> str:
    nccl.ncclGetErrorString.restype = ctypes.c_char_p
    return bytes(nccl.ncclGetErrorString(status)).decode()


def _end(nccl: ctypes.CDLL, communicator: ctypes.c_void_p, device: int) -> None:
    """Destroys an idle communicator. `ncclCommAbort` would leak host memory: 3.5 MiB where NCCL used sockets."""
    cuda.gpu(device).enter()
    deadline, status = time.monotonic() + END_TIMEOUT_S, ctypes.c_int(nccl.ncclCommFinalize(communicator))
    while status.value == _IN_PROGRESS and time.monotonic() < deadline:
        time.sleep(END_LOOK_EVERY_S)
        nccl.ncclCommGetAsyncError(communicator, ctypes.byref(status))
    if status.value:
        _abort(nccl, communicator, device)
    else:
        nccl.ncclCommDestroy(communicator)


def _abort(nccl: ctypes.CDLL, communicator: ctypes.c_void_p, device: int) -> None:
    cuda.gpu(device).enter()
    nccl.ncclCommAbort(communicator)


def _allocate(device: int, size: int, stream: cuda.CudaStream) -> DeviceView:
    """Memory that no other stream uses."""
    import torch

    with cuda.torch_errors(f"{size} bytes of GPU {device}"), torch.cuda.stream(stream):  # type: ignore[arg-type]
        memory: torch.Tensor = torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")
    return DeviceView(device, memory.data_ptr(), size, memory)
