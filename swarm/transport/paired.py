"""Sessions over two-sided libraries: both ends must call, `send` and `receive`, in the same order.

A session is a TCP session (`tcp_session`), which carries the order of calls, and a lane, which carries the bytes. A
frame of kind PIECES has the sizes of the next pieces on the lane. So the TCP session does all that a lane cannot:
order, cancelling, aborting, noticing a dead peer between two frames.

    holder -> asker    | PIECES: 4 MiB |               over the connection
    holder => asker      4 MiB                         over the lane, once both have called

Lanes of GPUs learn the begin and the end of a frame, and may postpone its calls to make them at once: a kernel that
sends waits for running kernels, so a kernel for many pieces waits once. While a frame is in flight, both ends make the
calls of the next frames, also of other transfers, so that GPUs never wait for their processes. A transfer ends when its
last frame is done. Pieces of host memory have frames of their own. A frame that is not done within the transfer's idle
timeout ends the session.

Must not know: how a lane moves bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from swarm.errors import TransportError
from swarm.store import AnySpan, DeviceView, FileSpan, View, cuda
from swarm.transport import Pace
from swarm.transport.byte_stream import ByteStream
from swarm.transport.sink import LOOK_EVERY_S, Landing, read_file
from swarm.transport.tcp import TcpTransport
from swarm.transport.tcp_inbound import TcpInbound
from swarm.transport.tcp_outbound import Lost, Sending, TcpOutbound
from swarm.transport.tcp_session import END, HEADER

HOLDER, ASKER = 0, 1
PIECES = 5
PIECES_MAX = 64
HOST_PIECE_BYTES_MAX = 4 << 20  # moved after a cancellation at most; also the scratch memory
DEVICE_PIECE_BYTES_MAX = 64 << 20  # a whole chunk
FRAME_BYTES_MAX = 512 << 20  # of pieces: hides the start of a kernel
FRAMES_MAX = 6  # in flight: 9 ms between two GPUs; the GIL may keep a thread waiting for 5 ms


class Lane(cuda.Mover, Protocol):
    """Moves bytes between two processes; a single thread at a time calls it. Calls raise TransportError.

    `on_device`: takes DeviceViews. Their calls may return before they are done; calls for host memory may not.
    """

    on_device: bool

    def begin(self) -> None:
        """Begins a frame."""

    def send(self, view: View, *, timeout_s: float) -> None:
        """Sends the view."""

    def receive(self, view: View, *, timeout_s: float) -> None:
        """Fills the view with the bytes of the peer's `send`."""

    def end(self, *, timeout_s: float) -> Done:
        """Ends the frame, all of whose calls are made; they have `timeout_s` after the frames before are done."""

    def abandon(self) -> None:
        """Gives up a frame, on the thread that began it. The lane is unusable from then on."""

    def scratch(self, size: int) -> View:
        """Memory for a piece that does not fit a view."""

    def close(self) -> None:
        """Releases all resources. Any thread, without a call in flight. Does not block."""


Done: TypeAlias = Callable[[], bool]
"""Whether all calls of a frame are done. Raises TransportError when they failed or timed out; they have ended then."""

L = TypeVar("L", bound=Lane)


def at_once() -> bool:
    """The Done of lanes whose calls block."""
    return True


def wait_for(done: Done) -> None:
    """Waits for a frame. Raises TransportError."""
    while not done():
        time.sleep(LOOK_EVERY_S)


async def make_lane(stream: ByteStream, make: Callable[[], L], *, pool: ThreadPoolExecutor) -> L:
    """A lane, made on a pool thread, which may use the stream. On an error of `make`, and when cancelled, shuts the
    stream down, waits for the thread, and closes the stream."""
    job = asyncio.get_running_loop().run_in_executor(pool, make)
    try:
        return await asyncio.shield(job)
    except BaseException:
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_RDWR)
        await asyncio.wait({job})
        if not job.exception():
            job.result().close()
        stream.close()
        raise


def read_exactly(stream: ByteStream, size: int) -> bytes:
    """Receives `size` bytes while a lane is made. Raises OSError and EOFError."""
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        try:
            got = stream.recv_into(rest)
        except BlockingIOError:
            raise TimeoutError("the peer is silent") from None
        if not got:
            raise EOFError("the peer hung up")
        rest = rest[got:]
    return bytes(data)


def write_all(stream: ByteStream, data: bytes) -> None:
    """Sends all of `data` while a lane is made. Raises OSError."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[stream.send(rest) :]
        except BlockingIOError:
            raise TimeoutError("the peer does not read") from None


class PairedTransport(TcpTransport):
    """A transport whose sessions have a lane, which a subclass makes. The two ends have the ranks HOLDER and ASKER."""

    parallel = False

    def _make_lane(self, stream: ByteStream, rank: int) -> Lane:
        """A new lane, on a pool thread, which may use the stream. Raises TransportError."""
        raise NotImplementedError

    async def _ask(self, stream: ByteStream, *, peer: str) -> TcpInbound:
        lane = await make_lane(stream, functools.partial(self._make_lane, stream, ASKER), pool=self._askers)
        return PairedInbound(stream, lane, peer=peer, pool=self._askers)

    async def _hold(self, stream: ByteStream, *, peer: str) -> TcpOutbound:
        lane = await make_lane(stream, functools.partial(self._make_lane, stream, HOLDER), pool=self._holders)
        return PairedOutbound(stream, lane, peer=peer, pool=self._holders, pace=self._pace)


class PairedInbound(TcpInbound):
    """The asker's end."""

    def __init__(self, sock: ByteStream, lane: Lane, *, peer: str, pool: ThreadPoolExecutor) -> None:
        self.on_device = lane.on_device
        self._lane = lane
        self._streams: dict[int, cuda.CudaStream] = {}
        self._frame = memoryview(bytearray(4 * PIECES_MAX))
        self._in_flight: deque[tuple[Landing, int, Done]] = deque()  # frames, with their sizes
        super().__init__(sock, peer=peer, pool=pool)

    def _pump(self) -> None:
        # Receives have priority over hashes: the holder's GPU waits for them.
        with cuda.moving(self._streams, self._lane, priority=cuda.FIRST):
            super()._pump()

    def _unfinished(self) -> bool:
        return bool(self._in_flight) or super()._unfinished()

    def _advance(self) -> bool:
        before = len(self._in_flight)
        while self._in_flight and self._in_flight[0][2]():
            landing, size, _ = self._in_flight.popleft()
            self.received_bytes += size
            landing.unpin()
        return super()._advance() or len(self._in_flight) < before

    def _let_go(self) -> None:
        while self._in_flight:
            landing, _, done = self._in_flight.popleft()
            try:
                wait_for(done)
            except TransportError as error:
                landing.stop(error)
            landing.unpin()
        super()._let_go()

    def _is_frame(self, kind: int, length: int) -> bool:
        return 0 < length <= 4 * PIECES_MAX and length % 4 == 0 if kind == PIECES else super()._is_frame(kind, length)

    def _take_payload(self, landing: Landing, kind: int, length: int) -> None:
        if kind != PIECES:
            super()._take_payload(landing, kind, length)
            return
        read = 0
        while read < length:
            read += self._receive_into(self._frame[read:length])
        sizes = struct.unpack_from(f">{length // 4}I", self._frame)
        most = DEVICE_PIECE_BYTES_MAX if self.on_device else HOST_PIECE_BYTES_MAX
        if max(sizes) > most or not min(sizes) or sum(sizes) > max(FRAME_BYTES_MAX, most):
            raise TransportError(f"it announced {len(sizes)} pieces of up to {max(sizes)} bytes")
        while len(self._in_flight) >= FRAMES_MAX:
            if not self._advance():
                time.sleep(LOOK_EVERY_S)
        timeout_s = landing.transfer.idle_timeout_s
        landing.pin()
        try:
            self._lane.begin()
            for size in sizes:
                self._take_piece(landing, size, timeout_s=timeout_s)
            done = self._lane.end(timeout_s=timeout_s)
        except Exception as error:  # the peer has called the lane, or will
            self._lane.abandon()
            landing.unpin()
            raise TransportError(str(error)) from error
        self._in_flight.append((landing, sum(sizes), done))

    def _take_piece(self, landing: Landing, size: int, *, timeout_s: float) -> None:
        room = landing.borrow(size)
        if room is not None:
            filled = 0
            try:
                if room.nbytes == size:
                    self._lane.receive(room, timeout_s=timeout_s)
                    filled = size
            finally:
                landing.give_back(filled)
            if filled:
                return
        rest = self._lane.scratch(size)
        self._lane.receive(rest, timeout_s=timeout_s)
        wait_for(self._lane.end(timeout_s=timeout_s))
        while rest.nbytes and (room := landing.borrow(rest.nbytes)) is not None:
            step = room.nbytes
            cuda.copy_view(room, rest[:step])
            landing.give_back(step)
            rest = rest[step:]
        self._lane.begin()

    def _retire(self) -> None:
        super()._retire()
        if not self.alive and self._job is None:
            self._lane.close()


@dataclass
class _Frame:
    """A frame in flight; `views` keeps its memory. `outcome`: a 1-tuple when it is the last frame of its transfer."""

    sending: Sending
    views: object
    done: Done
    outcome: tuple[Exception | None] | None = None


class PairedOutbound(TcpOutbound):
    """The holder's end. Its job ends when no frame is in flight."""

    def __init__(self, sock: ByteStream, lane: Lane, *, peer: str, pool: ThreadPoolExecutor, pace: Pace | None) -> None:
        self.on_device = lane.on_device
        self.piece_bytes = DEVICE_PIECE_BYTES_MAX if lane.on_device else HOST_PIECE_BYTES_MAX
        self._lane = lane
        self._streams: dict[int, cuda.CudaStream] = {}
        self._scratch = memoryview(b"")
        self._held_back: list[DeviceView] = []  # not announced yet
        self._in_flight: deque[_Frame] = deque()
        slice_bytes = pace.slice_bytes if pace else None
        self._frame_bytes = min(slice_bytes or FRAME_BYTES_MAX, FRAME_BYTES_MAX)
        super().__init__(sock, peer=peer, pool=pool, pace=pace)

    def _send_queued(self) -> None:
        with cuda.moving(self._streams, self._lane):
            try:
                super()._send_queued()
            finally:
                self._await_frames(0)

    def _await_queue(self) -> None:
        while self._in_flight and not self._queue and self.alive:
            if not self._advance():
                time.sleep(LOOK_EVERY_S)
        super()._await_queue()

    def _send_piece(self, sending: Sending, piece: AnySpan) -> None:
        if isinstance(piece, DeviceView):
            self._held_back.append(piece)
            room = self._frame_bytes - sum(view.nbytes for view in self._held_back)
            if room < min(self.piece_bytes, self._frame_bytes) or len(self._held_back) == PIECES_MAX:
                self._send_held_back(sending)
            return
        self._send_held_back(sending)
        size = piece.size if isinstance(piece, FileSpan) else piece.nbytes
        for start in range(0, size, HOST_PIECE_BYTES_MAX):
            step = min(HOST_PIECE_BYTES_MAX, size - start)
            if isinstance(piece, FileSpan):
                self._send_views(sending, [self._read(FileSpan(piece.fd, piece.offset + start, step))])
            else:
                self._send_views(sending, [piece[start : start + step]])

    def _send_frame(self, sending: Sending, kind: int, piece: FileSpan | memoryview | None = None) -> None:
        if kind == END:
            self._send_held_back(sending)
        self._held_back.clear()  # of an aborted transfer
        super()._send_frame(sending, kind, piece)

    def _send_held_back(self, sending: Sending) -> None:
        if self._held_back:
            views, self._held_back = self._held_back, []
            self._send_views(sending, views)

    def _send_views(self, sending: Sending, views: list[memoryview] | list[DeviceView]) -> None:
        sizes = struct.pack(f">{len(views)}I", *(view.nbytes for view in views))
        frame = memoryview(HEADER.pack(sending.transfer.id, len(sizes), PIECES) + sizes)
        self._write(sending, len(frame), lambda done: self._sock.send(frame[done:]))
        timeout_s = sending.transfer.idle_timeout_s
        try:
            self._lane.begin()
            for view in views:
                self._lane.send(view, timeout_s=timeout_s)
            done = self._lane.end(timeout_s=timeout_s)
        except Exception as error:  # the peer waits for the announced pieces
            self._lane.abandon()
            raise Lost(str(error)) from error
        self._in_flight.append(_Frame(sending, views, done))
        self._advance()
        self._await_frames(FRAMES_MAX - 1)

    def _await_frames(self, most: int) -> None:
        """Waits until at most `most` frames are in flight."""
        while len(self._in_flight) > most:
            if not self._advance():
                time.sleep(LOOK_EVERY_S)

    def _advance(self) -> bool:
        """Polls the frames in flight; returns whether a frame ended. A failed frame ends the session."""
        before = len(self._in_flight)
        try:
            while self._in_flight and self._in_flight[0].done():
                self._let_go(None)
        except TransportError as lost:
            self._lose(str(lost))
            while self._in_flight:
                self._let_go(lost)
        return len(self._in_flight) < before

    def _let_go(self, lost: TransportError | None) -> None:
        frame = self._in_flight.popleft()
        if frame.outcome:
            super()._conclude(frame.sending, frame.outcome[0] or lost)

    def _conclude(self, sending: Sending, error: Exception | None) -> None:
        if self._in_flight and self._in_flight[-1].sending is sending:
            self._in_flight[-1].outcome = (error,)
        else:
            super()._conclude(sending, error)

    def _read(self, span: FileSpan) -> memoryview:
        if not self._scratch.nbytes:
            self._scratch = memoryview(bytearray(HOST_PIECE_BYTES_MAX))
        done = 0
        while done < span.size:
            done += read_file(span, done, self._scratch[done : span.size])
        return self._scratch[: span.size]

    def _retire(self) -> None:
        super()._retire()
        if not self.alive and self._job is None:
            self._lane.close()
