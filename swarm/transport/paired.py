"""Sessions whose bytes move by calls that both ends must make: `send` here and `receive` there, in agreed order.

A session is one of TCP's (`tcp_session`), which carries the order, and a lane, which carries the bytes. A frame of
kind PIECES has the sizes of what comes over the lane next. So everything that a lane lacks (who comes next, cancelling,
aborting, noticing the dead between two frames) is TCP's own.

    holder -> asker    | PIECES: 4 MiB |               over the connection
    holder => asker      4 MiB                         over the lane, once both have called

Lanes of GPUs are told when a frame begins and ends, and may put off the calls in between to make them all at once: a
kernel that sends waits for the kernels of whoever uses the GPU, so that one for many pieces waits only once. And while
one frame is under way, both ends make the calls of the next, be it of the next transfer: so the GPUs never wait for
their processes. A transfer has ended when its last frame is done. Host memory is announced piece by piece.

A frame that is not done within the transfer's idle timeout ends the session.
Must not know: what a lane is made of.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from swarm.transport.tcp_session import END, HEADER, Lost, Sending, TcpInbound, TcpOutbound

PIECES = 5
PIECES_MAX = 64
HOST_PIECE_BYTES_MAX = (
    4 << 20
)  # bounds what a cancelled transfer still moves, and the memory of pieces that fit no view
DEVICE_PIECE_BYTES_MAX = 64 << 20  # a whole chunk
FRAME_BYTES_MAX = 512 << 20  # of pieces: enough to hide the start of a kernel
FRAMES_MAX = 6  # under way at once: 9 ms between two GPUs, as an interpreter may keep a thread waiting for 5


class Lane(cuda.Mover, Protocol):
    """Moves bytes between two processes, on one thread at a time. Calls raise TransportError.

    `on_device`: it takes memory of GPUs. Calls need not be done when they return, but those for host memory are.
    """

    on_device: bool

    def begin(self) -> None:
        """A frame begins."""

    def send(self, view: View, *, timeout_s: float) -> None:
        """Sends the view."""

    def receive(self, view: View, *, timeout_s: float) -> None:
        """Fills the view with exactly what the other end sends."""

    def end(self, *, timeout_s: float) -> Done:
        """The frame ends, all its calls are made, and there are `timeout_s` for them once those before are done."""

    def abandon(self) -> None:
        """A frame that was begun will not be completed: nothing can come over the lane any more. Where it was begun."""

    def scratch(self, size: int) -> View:
        """Memory for a piece that fits no view."""

    def close(self) -> None:
        """Lets go of everything; any thread, when no call is under way. Does not block."""


# Whether all calls of a frame are done; raises TransportError, once and for all, when they failed or took too long.
# Nothing is under way any more then.
Done: TypeAlias = Callable[[], bool]

L = TypeVar("L", bound=Lane)


def at_once() -> bool:
    """What `end` returns where every call is done when it returns."""
    return True


def wait_for(done: Done) -> None:
    """Returns when a frame is done. Raises TransportError."""
    while not done():
        time.sleep(LOOK_EVERY_S)


async def make_lane(stream: ByteStream, make: Callable[[], L], *, pool: ThreadPoolExecutor) -> L:
    """A lane, made on a thread that may use the stream meanwhile. Raises what `make` raises; the stream is closed then.

    Cancelled, it hangs up and returns when the thread has let go of it.
    """
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
    """What the other end says while a lane is made, on its thread. Raises OSError and EOFError."""
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        try:
            got = stream.recv_into(rest)
        except BlockingIOError:
            raise TimeoutError("the peer says nothing") from None
        if not got:
            raise EOFError("the peer hung up")
        rest = rest[got:]
    return bytes(data)


def write_all(stream: ByteStream, data: bytes) -> None:
    """The counterpart of `read_exactly`."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[stream.send(rest) :]
        except BlockingIOError:
            raise TimeoutError("the peer does not read") from None


class PairedInbound(TcpInbound):
    """The asker's end."""

    def __init__(self, sock: ByteStream, lane: Lane, *, peer: str, pool: ThreadPoolExecutor) -> None:
        self.on_device = lane.on_device
        self._lane = lane
        self._streams: dict[int, cuda.CudaStream] = {}
        self._frame = memoryview(bytearray(4 * PIECES_MAX))
        self._under_way: deque[tuple[Landing, int, Done]] = deque()  # frames, with their bytes
        super().__init__(sock, peer=peer, pool=pool)

    def _pump(self) -> None:
        # What waits for the hash of the last frames is no hurry; the next frame is, and the holder's GPU waits with it.
        with cuda.moving(self._streams, self._lane, priority=cuda.FIRST):
            super()._pump()

    def _unfinished(self) -> bool:
        return bool(self._under_way) or super()._unfinished()

    def _advance(self) -> bool:
        before = len(self._under_way)
        while self._under_way and self._under_way[0][2]():
            landing, size, _ = self._under_way.popleft()
            self.received_bytes += size
            landing.unpin()
        return super()._advance() or len(self._under_way) < before

    def _let_go(self) -> None:
        while self._under_way:
            landing, _, done = self._under_way.popleft()
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
        while len(self._under_way) >= FRAMES_MAX:
            if not self._advance():
                time.sleep(LOOK_EVERY_S)
        timeout_s = landing.transfer.idle_timeout_s
        landing.pin()
        try:
            self._lane.begin()
            for size in sizes:
                self._take_piece(landing, size, timeout_s=timeout_s)
            done = self._lane.end(timeout_s=timeout_s)
        except Exception as error:  # whatever it is, the other end has called, or will
            self._lane.abandon()
            landing.unpin()
            raise TransportError(str(error)) from error
        self._under_way.append((landing, sum(sizes), done))

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
    """Being sent. `views` are read until it is done. `outcome`: a 1-tuple when this end has said everything of the
    transfer, whose last frame it is."""

    sending: Sending
    views: object
    done: Done
    outcome: tuple[Exception | None] | None = None


class PairedOutbound(TcpOutbound):
    """The holder's end. Its job goes on until nothing is under way."""

    def __init__(self, sock: ByteStream, lane: Lane, *, peer: str, pool: ThreadPoolExecutor, pace: Pace | None) -> None:
        self.on_device = lane.on_device
        self.piece_bytes = DEVICE_PIECE_BYTES_MAX if lane.on_device else HOST_PIECE_BYTES_MAX
        self._lane = lane
        self._streams: dict[int, cuda.CudaStream] = {}
        self._scratch = memoryview(b"")
        self._held_back: list[DeviceView] = []  # not announced yet
        self._under_way: deque[_Frame] = deque()
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
        while self._under_way and not self._queue and self.alive:
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
        self._held_back.clear()  # of a transfer that is aborted
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
        except Exception as error:  # whatever it is, the other end waits for what was announced
            self._lane.abandon()
            raise Lost(str(error)) from error
        self._under_way.append(_Frame(sending, views, done))
        self._advance()
        self._await_frames(FRAMES_MAX - 1)

    def _await_frames(self, most: int) -> None:
        """Returns when at most so many are under way."""
        while len(self._under_way) > most:
            if not self._advance():
                time.sleep(LOOK_EVERY_S)

    def _advance(self) -> bool:
        """Looks after what is under way, without waiting; whether something was done. Where a frame fails, no other one
        goes on, and the session is lost."""
        before = len(self._under_way)
        try:
            while self._under_way and self._under_way[0].done():
                self._let_go(None)
        except TransportError as lost:
            self._lose(str(lost))
            while self._under_way:
                self._let_go(lost)
        return len(self._under_way) < before

    def _let_go(self, lost: TransportError | None) -> None:
        frame = self._under_way.popleft()
        if frame.outcome:
            super()._conclude(frame.sending, frame.outcome[0] or lost)

    def _conclude(self, sending: Sending, error: Exception | None) -> None:
        if self._under_way and self._under_way[-1].sending is sending:
            self._under_way[-1].outcome = (error,)
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
