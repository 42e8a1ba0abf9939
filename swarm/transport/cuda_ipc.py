"""CUDA IPC: within a host the asker reads the holder's GPU memory; the holder neither copies nor computes.

A session is a TCP session (`tcp_session`) with a magic word of its own and two additions. GPU memory is not sent but
lent, in a frame of kind REGION, and the asker confirms that it has read a transfer:

    0         64       72     80
    | handle  | offset | size |       the driver's handle of the allocation that has `size` bytes at `offset`

    holder -> asker   REGION REGION ... END          asker -> holder   | transfer: u64 |

Until the confirmation the transfer counts as being sent, so that the owner keeps the memory. A lease expires after
LEASE_S: the session ends, and bytes that the asker reads later have a wrong digest if the memory was reused. Host
memory and files travel in DATA frames.

An asker that cannot open a handle (another container) logs it once and does not use this transport with that holder
again; the next usable transport takes over. Memory that the driver cannot share (expandable segments) travels in DATA
frames. The asker checks offsets against the allocation's size by the driver, so that a lying holder fails a transfer
and not the process.

Must not know: tokens, links, tensors.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from swarm.errors import TransportError
from swarm.store import AnySpan, DeviceView, View, cuda
from swarm.store.staging import outgoing
from swarm.transport import Inbound, Pace
from swarm.transport.byte_stream import ByteStream
from swarm.transport.sink import Landing, pieces, span_bytes
from swarm.transport.tcp import TcpTransport
from swarm.transport.tcp_inbound import TcpInbound
from swarm.transport.tcp_outbound import Sending, TcpOutbound
from swarm.transport.tcp_session import FRAME_BYTES_MAX, HEADER

REGION = 4
FRAME = struct.Struct(f">{cuda.HANDLE_BYTES}sQQ")
READ = struct.Struct(">Q")
REGION_BYTES_MAX = 64 << 20  # a whole chunk: smaller regions only cost frames
MACHINE_IDS = ("/proc/sys/kernel/random/boot_id", "/etc/machine-id")
LEASE_S = 10.0  # reading takes milliseconds; a stopped asker must not keep memory

log = logging.getLogger("swarm")

# GPU and address by handle, of this process's own allocations: CUDA does not open own handles.
_exported: dict[bytes, tuple[int, int]] = {}


class CudaIpcTransport(TcpTransport):
    """The transport of a node whose process uses a GPU."""

    scheme = "cuda_ipc"
    reason = "both processes use GPUs of this machine"
    usual_bytes_per_s = 100e9
    magic = b"SWRI"
    parallel = False

    def __init__(self, host: str, port: int, *, pace: Pace | None = None, congestion: str | None = None) -> None:
        super().__init__(host, port, pace=pace, congestion=congestion)
        self._unusable: set[str] = set()

    @property
    def address(self) -> str:
        """MACHINE/HOST:PORT, with `machine_id`."""
        return f"{machine_id()}/{super().address}"

    @property
    def told(self) -> str:
        """MACHINE/*."""
        return f"{machine_id()}/*"

    def reach(self, address: str) -> bool:
        """Whether the address is on this machine and none of its handles has failed."""
        where, _, rest = address.partition("/")
        return where == machine_id() and cuda.in_use() and address not in self._unusable and super().reach(rest)

    async def connect(self, address: str, token: str, *, timeout_s: float) -> Inbound:
        """As Transport."""
        session = await super().connect(address.partition("/")[2], token, timeout_s=timeout_s)
        if isinstance(session, CudaIpcInbound):
            session.refused = functools.partial(self._refused, address)
        return session

    async def _ask(self, stream: ByteStream, *, peer: str) -> TcpInbound:
        return CudaIpcInbound(stream, peer=peer, pool=self._askers)

    async def _hold(self, stream: ByteStream, *, peer: str) -> TcpOutbound:
        return CudaIpcOutbound(stream, peer=peer, pool=self._holders, pace=self._pace)

    def _refused(self, address: str, why: str) -> None:
        if address not in self._unusable:
            self._unusable.add(address)
            log.warning("GPU memory of %s cannot be read directly (%s): it is sent instead", address, why)


def machine_id() -> str:
    """The id of this machine's last boot, which containers share; empty where the system has none."""
    for path in MACHINE_IDS:
        with contextlib.suppress(OSError):
            return Path(path).read_text().strip()
    return ""


class CudaIpcInbound(TcpInbound):
    """The asker's end."""

    on_device = True

    def __init__(self, sock: ByteStream, *, peer: str, pool: ThreadPoolExecutor) -> None:
        self.refused: Callable[[str], None] = log.warning
        self._streams: dict[int, cuda.CudaStream] = {}
        self._opened: dict[tuple[int, bytes], _Region] = {}  # by device and handle
        self._frame = memoryview(bytearray(FRAME.size))
        self._pinned: cuda.Pinned | None = None
        super().__init__(sock, peer=peer, pool=pool)

    async def close(self) -> None:
        """As Inbound; closes handles on a thread, since the driver may block."""
        await super().close()
        if self._job is None:  # else the pump still reads
            opened, self._opened = self._opened, {}
            if opened:
                await self._loop.run_in_executor(None, _close_handles, opened)

    def _pump(self) -> None:
        with cuda.moving(self._streams):
            super()._pump()

    def _is_frame(self, kind: int, length: int) -> bool:
        return length == FRAME.size if kind == REGION else super()._is_frame(kind, length)

    def _take_payload(self, landing: Landing, kind: int, length: int) -> None:
        if kind != REGION:
            super()._take_payload(landing, kind, length)
            return
        read = self._receive_into(self._frame, self._header)  # together with the next header
        while read < length:
            read += self._receive_into(self._frame[read:])
        self._header_filled = read - length
        handle, offset, size = FRAME.unpack(self._frame)
        while size:
            room = landing.borrow(size)
            if room is None:
                return  # the landing has ended
            filled = 0
            try:
                device = room.device if isinstance(room, DeviceView) else cuda.home()
                self._read(room, device, self._find_region(device, handle, offset, room.nbytes))
                filled = room.nbytes
            except cuda.CudaError as error:
                raise TransportError(f"reading the peer's GPU memory failed: {error}") from error
            finally:
                landing.give_back(filled)
            offset, size = offset + filled, size - filled
            self.received_bytes += filled

    def _find_region(self, device: int, handle: bytes, offset: int, size: int) -> int:
        """The address of the peer's bytes in this process."""
        own = _exported.get(handle)
        region = _region(*own) if own is not None else self._opened.get((device, handle))
        if region is None:
            try:
                start = cuda.gpu(device).open(handle)
            except cuda.CudaError as error:
                self.refused(str(error))
                raise
            region = self._opened[device, handle] = _region(device, start)
        if offset + size > region.size:
            raise TransportError(f"it lent {size} bytes at {offset} of an allocation of {region.size}")
        return region.start + offset

    def _read(self, room: View, device: int, source: int) -> None:
        if isinstance(room, DeviceView):
            gpu = cuda.gpu(device)
            gpu.copy(room.address, source, room.nbytes, stream=gpu.current().cuda_stream)
        else:
            cuda.copy_view(room, DeviceView(device, source, room.nbytes, None))

    def _receive_room(self, room: View, length: int) -> int:
        """Bytes of the socket for GPU memory go through pinned memory."""
        if not isinstance(room, DeviceView):
            return super()._receive_room(room, length)
        if self._pinned is None:
            self._pinned = cuda.Pinned(FRAME_BYTES_MAX)
        got = self._receive_into(self._pinned.view[: room.nbytes])
        cuda.copy_view(room[:got], self._pinned.view[:got])
        return got

    def _over(self, transfer_id: int) -> None:
        frame, sent = memoryview(READ.pack(transfer_id)), 0
        while sent < len(frame) and self.alive:
            try:
                sent += self._sock.send(frame[sent:])
            except BlockingIOError:
                continue  # the holder is slow to read; the loop ends with the session


@dataclass(frozen=True, slots=True)
class _Region:
    """An allocation of another process: its address in this process and its size."""

    start: int
    size: int


def _region(device: int, start: int) -> _Region:
    begin, size, _ = cuda.gpu(device).allocation(start)
    return _Region(start, begin + size - start)


def _close_handles(opened: Mapping[tuple[int, bytes], _Region]) -> None:
    for (device, _), region in opened.items():
        try:
            cuda.gpu(device).close(region.start)
        except cuda.CudaError as error:
            log.debug("%s", error)


@dataclass
class _Lease:
    """A transfer whose memory the asker may read. `outcome`: a 1-tuple once END or ABORT is sent."""

    sending: Sending
    outcome: tuple[Exception | None] | None = None
    read: bool = False


class CudaIpcOutbound(TcpOutbound):
    """The holder's end."""

    on_device = True
    piece_bytes = REGION_BYTES_MAX

    def __init__(self, sock: ByteStream, *, peer: str, pool: ThreadPoolExecutor, pace: Pace | None) -> None:
        self._leases: dict[int, _Lease] = {}
        self._handles: dict[int, bytes | None] = {}  # by the allocation's number; None: the driver cannot share it
        self._partial = b""
        super().__init__(sock, peer=peer, pool=pool, pace=pace)

    def _send_piece(self, sending: Sending, piece: AnySpan) -> None:
        if not isinstance(piece, DeviceView):
            for part in pieces(iter([piece]), size=span_bytes(piece), most=FRAME_BYTES_MAX):
                super()._send_piece(sending, part)
            return
        lent = self._lent(piece)
        if lent is None:
            for part in outgoing(piece):
                super()._send_piece(sending, part)
            return
        with self._lock:
            self._leases.setdefault(sending.transfer.id, _Lease(sending))
        frame = memoryview(HEADER.pack(sending.transfer.id, len(lent), REGION) + lent)
        self._write(sending, len(frame), lambda done: self._sock.send(frame[done:]))

    def _lent(self, piece: DeviceView) -> bytes | None:
        """The REGION payload of a piece; None where the driver does not share its memory."""
        gpu = cuda.gpu(piece.device)
        start, _, number = gpu.allocation(piece.address)
        if number not in self._handles:
            try:
                handle = self._handles[number] = gpu.export(start)
                _exported[handle] = piece.device, start
            except cuda.CudaError as error:
                if not any(handle is None for handle in self._handles.values()):
                    log.warning(
                        "GPU memory is sent to %s through the host, as it cannot be shared: %s", self.peer, error
                    )
                self._handles[number] = None
        known = self._handles[number]
        return None if known is None else FRAME.pack(known, piece.address - start, piece.nbytes)

    def _conclude(self, sending: Sending, error: Exception | None) -> None:
        with self._lock:
            lease = self._leases.get(sending.transfer.id)
            if lease is not None and not lease.read and self.alive:
                lease.outcome = (error,)
                self._mailbox.post(lambda: self._loop.call_later(LEASE_S, self._expire, lease))
                return
            self._leases.pop(sending.transfer.id, None)
            if lease is not None and not lease.read and error is None:
                error = self._error()  # it will not be confirmed any more
        super()._conclude(sending, error)

    def _readable(self) -> None:
        try:
            data = self._sock.recv_now()
        except OSError as error:
            self._lose(f"connection lost ({error})")
            return
        if data is None:
            return
        if not data:
            self._lose("it closed the connection")
        whole = len(self._partial + data) // READ.size * READ.size
        for (number,) in READ.iter_unpack((self._partial + data)[:whole]):
            self._released(number)
        self._partial = (self._partial + data)[whole:]

    def _released(self, number: int) -> None:
        with self._lock:
            lease = self._leases.get(number)
            if lease is None:
                return
            lease.read = True
            if lease.outcome is None:
                return
            del self._leases[number]
        lease.sending.end(lease.outcome[0])

    def _expire(self, lease: _Lease) -> None:
        if self._leases.get(lease.sending.transfer.id) is lease:
            self._lose(f"it did not confirm a lease within {LEASE_S:g} s")

    def _drop_transfers(self) -> None:
        super()._drop_transfers()
        with self._lock:
            over = [lease for lease in self._leases.values() if lease.outcome is not None]
            for lease in over:  # the others are concluded later, as unread
                del self._leases[lease.sending.transfer.id]
        for lease in over:
            lease.sending.end(lease.outcome[0] if lease.outcome and lease.outcome[0] else self._error())
