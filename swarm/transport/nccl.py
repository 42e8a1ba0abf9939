"""NCCL as a data plane between GPUs: a communicator of two for each session, made on demand, aborted with a deadline.

The holder draws the communicator's id and says it over the session's connection; both join. No global group, no ports,
no environment. The communicator is a non-blocking one: every call that would wait is asked about until it is done or
its time is over, and then aborted, after which the process lives on. It goes with its session, on a thread of its own,
since that takes a third of a second.

The library is called directly, by ctypes: the one that torch has loaded, through eleven functions that have not changed
since NCCL 2.18. torch.distributed's NCCL groups bring a watchdog that ends the process when a peer dies, and nccl4py is
one more package to install for the same functions.

Device views of one frame go into one NCCL group, so that there is one kernel for many chunks: at a busy source each
kernel waits for those that run. Host memory goes through 4 MiB on the GPU. For clusters whose nodes trust each other:
NCCL does not check who connects to it, or what it receives.
Must not know: transfers, tensors, links.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.errors import SettingsError, TransportError
from swarm.store import DeviceView, View, cuda
from swarm.transport.byte_stream import ByteStream
from swarm.transport.paired import (
    HOST_PIECE_BYTES_MAX,
    Done,
    PairedInbound,
    PairedOutbound,
    make_lane,
    read_exactly,
    wait_for,
    write_all,
)
from swarm.transport.sink import LOOK_EVERY_S
from swarm.transport.tcp import TcpTransport
from swarm.transport.tcp_session import TcpInbound, TcpOutbound

if TYPE_CHECKING:
    import torch

SETUP_TIMEOUT_S = 4.5  # less than a peer waits for a session; 0.1 s is usual
END_TIMEOUT_S = 5.0  # then it is aborted
END_LOOK_EVERY_S = 0.01
HOLDER, ASKER = 0, 1
ID_BYTES = 128
_IN_PROGRESS = 7
_UINT8 = 1
_UNSET = -(1 << 31)


class NcclTransport(TcpTransport):
    """The plane of a node whose process uses a GPU; its communicators are where the process's tensors are."""

    scheme = "nccl"
    reason = "the settings name it and both processes use GPUs"
    usual_bytes_per_s = 100e9
    magic = b"SWRN"
    parallel = False

    def reach(self, address: str) -> bool:
        """Whether both may have a GPU: who offers this has one."""
        return cuda.in_use() and super().reach(address)

    async def _ask(self, stream: ByteStream, *, peer: str) -> TcpInbound:
        lane = await self._pair(stream, ASKER, pool=self._askers)
        return PairedInbound(stream, lane, peer=peer, pool=self._askers)

    async def _hold(self, stream: ByteStream, *, peer: str) -> TcpOutbound:
        lane = await self._pair(stream, HOLDER, pool=self._holders)
        return PairedOutbound(stream, lane, peer=peer, pool=self._holders, pace=self._pace)

    async def _pair(self, stream: ByteStream, rank: int, *, pool: ThreadPoolExecutor) -> NcclLane:
        return await make_lane(stream, functools.partial(NcclLane, stream, rank, device=cuda.home()), pool=pool)


def demand() -> None:
    """Raises SettingsError, which says what is missing, where NCCL cannot be used."""
    if not cuda.in_use():
        raise SettingsError("transports", "nccl: this process uses no GPU; serve or fetch CUDA tensors, or use tcp")
    try:
        _library()
    except OSError as error:
        raise SettingsError("transports", f"nccl: its library cannot be loaded ({error}); use tcp") from error


class NcclLane:
    """A communicator of two. Raises TransportError when it does not come about."""

    on_device = True

    def __init__(self, stream: ByteStream, rank: int, *, device: int) -> None:
        self._other = ASKER if rank == HOLDER else HOLDER
        self._device = device
        self._nccl = _library()
        self._communicator = ctypes.c_void_p()
        self._open = 0  # calls of the open group, which is not begun before its first
        # Ends of frames, to be recorded once their kernels are enqueued, by a thread of NCCL's.
        self._unmarked: list[_Mark] = []
        self._timeout_s = SETUP_TIMEOUT_S  # for that, as was said with the last call
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
            raise TransportError(f"nccl: no pair came about ({error})") from error

    def begin(self) -> None:
        """See `Lane`. The group begins with its first call."""

    def send(self, view: View, *, timeout_s: float) -> None:
        """See `Lane`."""
        self._post("ncclSend", view, timeout_s)

    def receive(self, view: View, *, timeout_s: float) -> None:
        """See `Lane`."""
        self._post("ncclRecv", view, timeout_s)

    def end(self, *, timeout_s: float) -> Done:
        """See `Lane`."""
        self._end_group()
        mark = _Mark(cuda.gpu(self._device).event(), self._stream())
        self._unmarked.append(mark)
        deadline: float | None = None  # its time begins when those before it are done, and somebody asks

        def done() -> bool:
            nonlocal deadline
            if not self._communicator:  # the event is done then, but what it marked was cut short
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
        """See `Lane`."""
        self._end_group()
        self._settle()

    def abandon(self) -> None:
        """See `Lane`."""
        communicator, self._communicator = self._communicator, ctypes.c_void_p()
        if communicator:
            if self._open:  # all communicators of a thread share its group: left open, nobody's kernels would start
                self._open = 0
                self._nccl.ncclGroupEnd()
            _abort(self._nccl, communicator, self._device)

    def puts_off(self) -> bool:
        """See `Lane`."""
        return self._open > 0

    def scratch(self, size: int) -> DeviceView:
        """See `Lane`."""
        if self._scratch is None or self._scratch.nbytes < size:
            self._scratch = _allocate(self._device, max(size, HOST_PIECE_BYTES_MAX), self._stream())
        return self._scratch[:size]

    def close(self) -> None:
        """See `Lane`."""
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
        """Waits until the communicator has nothing in progress: the last group's kernels are enqueued then."""
        deadline = time.monotonic() + self._timeout_s
        while self._in_progress():
            self._expire(deadline, self._timeout_s)
            time.sleep(LOOK_EVERY_S)
        self._mark()

    def _in_progress(self) -> bool:
        """Whether it has. Raises TransportError when it has failed."""
        status = ctypes.c_int(_IN_PROGRESS)
        self._call("ncclCommGetAsyncError", self._communicator, ctypes.byref(status))
        if status.value not in (0, _IN_PROGRESS):
            self._fail(_text(self._nccl, status.value))
        return status.value == _IN_PROGRESS

    def _expire(self, deadline: float, timeout_s: float) -> None:
        if time.monotonic() > deadline:
            self._fail(f"the other end did not call within {timeout_s:g} s")

    def _fail(self, why: str) -> None:
        """Aborts, so that nothing that was enqueued waits any more."""
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
    """The end of a frame on the stream that its kernels are on."""

    event: cuda.CudaEvent
    stream: cuda.CudaStream
    recorded: bool = False


class _UniqueId(ctypes.Structure):
    """ncclUniqueId: passed by value."""

    _fields_ = [("bytes", ctypes.c_ubyte * ID_BYTES)]


class _Config(ctypes.Structure):
    """ncclConfig_t of NCCL 2.18, which later ones accept: a communicator whose calls do not block."""

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
    """Raises OSError. Its calls let go of the interpreter: any may wait for the driver, and that for a kernel whose
    peer died, until another thread aborts it."""
    return ctypes.CDLL("libnccl.so.2")


def _text(nccl: ctypes.CDLL, status: int) -> str:
    nccl.ncclGetErrorString.restype = ctypes.c_char_p
    return bytes(nccl.ncclGetErrorString(status)).decode()


def _end(nccl: ctypes.CDLL, communicator: ctypes.c_void_p, device: int) -> None:
    """Ends a communicator that has nothing under way. What `ncclCommAbort` leaves of the host's memory (3.5 MiB where
    the bytes went through sockets), this does not."""
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
    """Memory that no other stream has used, or may still be using."""
    import torch

    with cuda.torch_errors(f"{size} bytes of GPU {device}"), torch.cuda.stream(stream):  # type: ignore[arg-type]
        memory: torch.Tensor = torch.empty(size, dtype=torch.uint8, device=f"cuda:{device}")
    return DeviceView(device, memory.data_ptr(), size, memory)
