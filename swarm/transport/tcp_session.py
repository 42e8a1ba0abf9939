"""A TCP connection that carries transfers from a holder to an asker, after its preamble.

    0            8         12     13      16
    | transfer   | payload | kind | zeros | payload ...     DATA: 1 to 2 MiB of payload; END, ABORT: none
    | u64        | u32     | u8   |       |                 numbers big-endian

A transfer is DATA frames with its bytes, then END; ABORT in place of any frame ends it early and keeps the session.
Transfers do not interleave. The asker sends nothing, since its requests travel on the link: readable bytes at the
holder mean that the asker is gone.

Sockets block, on pool threads: `recv_into` and `sendfile` release the GIL, while asyncio costs a quarter of the rate.
Timeouts (`poll`, SO_SNDTIMEO) make a blocked thread check for a stop every POLL_S. A session holds a thread while bytes
move and for POLL_S after that, because waking a thread is cheaper than starting a job; else the loop watches the
socket. The loop closes the socket when no thread uses it, since its number may be reused a moment later.

Views of a GPU may be filled after the END of their transfer. The asker receives the next frames meanwhile, and ends
that transfer between two frames.

System calls dominate the cost of a small chunk. So the end of a frame is read together with the next header, and a
payload in memory is written together with its header. END is sent after the spans' own check at their end.

Other transports build on these sessions with frames of kinds of their own (`_take_payload`, `_send_piece`).

Must not know: tokens, addresses, how connections are opened. `sink` decides when views may be touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from swarm.errors import LocalProtocolError, SourceChanged, TransportError
from swarm.store import AnySpan, FileSpan, Span, View
from swarm.transport import Pace, Transfer
from swarm.transport.byte_stream import ByteStream
from swarm.transport.sink import LOOK_EVERY_S, Landing, Mailbox, Outcome, close_iterator, on_host, pieces, span_bytes

HEADER = struct.Struct(">QIB3x")
DATA, END, ABORT = 1, 2, 3
FRAME_BYTES_MAX = 2 << 20  # a cancelled transfer stops within a frame, which costs a few turns of the GIL

POLL_S = 0.25  # within which a blocked thread notices a stop
HEADER_TIMEOUT_S = 5.0  # for the rest of a header after its first byte
UNPOSTED_WAIT_S = 5.0  # for a `receive` that is late since its loop is busy
CANCEL_GRACE_S = 1.0  # for the rest of a frame of a cancelled transfer; then the session ends
CLOSE_TIMEOUT_S = 5.0  # for threads to leave a socket that was shut down
ABANDONED_MAX = 4096  # cancelled before their first frame; beyond that, the oldest will not be sent

_NOTHING = memoryview(b"")
_scrap = memoryview(bytearray(256 << 10))  # for unwanted bytes: written by all threads, never read


class _Session:
    """A connected socket, at most a single job on a pool thread, and their end."""

    def __init__(
        self, sock: ByteStream, *, peer: str, pool: ThreadPoolExecutor, lock: threading.Condition | None = None
    ) -> None:
        sock.block(POLL_S)
        self.peer = peer
        self._sock = sock
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._mailbox = Mailbox()
        self._lock = lock or threading.Condition()
        self._lost: str | None = None
        self._job: asyncio.Future[None] | None = None
        self._watch()

    @property
    def alive(self) -> bool:
        """Whether the session can carry another transfer."""
        return self._lost is None

    async def close(self) -> None:
        """Ends the session; transfers in flight fail with TransportError. Takes at most CLOSE_TIMEOUT_S."""
        self._lose("the session was closed")
        if self._job is not None:
            await asyncio.wait({self._job}, timeout=CLOSE_TIMEOUT_S)
        self._retire()

    def _readable(self) -> None:
        raise NotImplementedError

    def _drop_transfers(self) -> None:
        """Fails all transfers. Called once, when the session is lost; any thread."""
        raise NotImplementedError

    def _watch(self) -> None:
        self._sock.idle()
        self._loop.add_reader(self._sock.fileno(), self._readable)

    def _unwatch(self) -> None:
        self._loop.remove_reader(self._sock.fileno())

    def _start(self, job: Callable[[], None]) -> None:
        self._job = self._loop.run_in_executor(self._pool, job)
        self._job.add_done_callback(self._finished)

    def _finished(self, job: asyncio.Future[None]) -> None:
        self._job = None
        if not job.cancelled() and (error := job.exception()) is not None:
            self._lose(f"a bug: {error!r}")
            self._loop.call_exception_handler({"message": f"{self!r} failed", "exception": error})
        self._retire()

    def _error(self) -> TransportError:
        return TransportError(f"tcp session with {self.peer}: {self._lost}")

    def _lose(self, why: str) -> None:
        """Ends the session. Any thread; the first reason counts."""
        with self._lock:
            if self._lost is not None:
                return
            self._lost = why
            self._lock.notify_all()
        with contextlib.suppress(OSError):  # the peer may have closed it
            self._sock.shutdown(socket.SHUT_RDWR)
        self._drop_transfers()
        self._mailbox.post(self._retire)

    def _retire(self) -> None:
        if self._lost is not None and self._job is None and self._sock.fileno() >= 0:
            self._unwatch()
            self._sock.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.peer} {self._lost or 'alive'}>"


class TcpInbound(_Session):
    """The asker's end: a pump, which runs while frames arrive, passes each to the landing of its transfer.

    `beside` is the first connection of the same session: they share all transfers, and the loss of a connection ends
    them all.
    """

    on_device = False
    streams = 1

    def __init__(
        self, sock: ByteStream, *, peer: str, pool: ThreadPoolExecutor, beside: TcpInbound | None = None
    ) -> None:
        self._landings: dict[int, Landing] = beside._landings if beside else {}  # until their END or ABORT
        self._abandoned: deque[int] = beside._abandoned if beside else deque()
        self._session: list[TcpInbound] = beside._session if beside else []
        self._session.append(self)
        self._current: Landing | None = None
        self._finishing: deque[Landing] = deque()  # all bytes are here, but their views wait for a GPU
        self._header = memoryview(bytearray(HEADER.size))
        self._header_filled = 0  # its bytes that were read with the frame before
        self._quiet_s = 0.0
        self.received_bytes = 0
        super().__init__(sock, peer=peer, pool=pool, lock=beside._lock if beside else None)
        if beside:
            for stream in self._session:
                stream._sock.fill_rooms()

    async def receive(self, transfer: Transfer, views: Iterator[View]) -> None:
        """As Inbound. Raises LocalProtocolError when the id is in use or the views are not `transfer.size` bytes."""
        landing = Landing(transfer, views, mailbox=self._mailbox)
        with self._lock:
            if transfer.id in self._landings:
                landing.stop(LocalProtocolError(f"transfer {transfer.id} was posted twice"))
            elif self._lost is not None:
                landing.stop(self._error())
            else:
                self._landings[transfer.id] = landing
                self._lock.notify_all()
        try:
            await landing.outcome()
        finally:
            self._abandon(landing)

    def _abandon(self, landing: Landing) -> None:
        """Remembers a landing without END: its frames may still come, or never."""
        with self._lock:
            if self._landings.get(landing.transfer.id) is landing:
                self._abandoned.append(landing.transfer.id)
                if len(self._abandoned) > ABANDONED_MAX:
                    self._landings.pop(self._abandoned.popleft(), None)

    def _drop_transfers(self) -> None:
        with self._lock:
            landings = list(self._landings.values())
            self._landings.clear()
        for landing in landings:
            landing.stop(self._error())
        for stream in self._session:
            stream._lose(f"a connection beside it was lost: {self._lost}")

    def _readable(self) -> None:
        self._unwatch()
        self._start(self._pump)

    def _finished(self, job: asyncio.Future[None]) -> None:
        super()._finished(job)
        if self._lost is None:
            self._watch()

    def _pump(self) -> None:
        self._quiet_s = 0.0
        try:
            while self._lost is None and self._await_header():
                self._take_frame()
                self._advance()
        except TransportError as error:
            self._lose(str(error))
        except OSError as error:
            self._lose(f"connection lost ({error})")
        finally:
            self._let_go()

    def _await_header(self) -> bool:
        """Reads a header; False when no byte comes within POLL_S and no work is left."""
        while self._unfinished() and not self._header_filled and not self._sock.readable():
            if not self._advance():
                time.sleep(LOOK_EVERY_S)
        return self._read_header()

    def _unfinished(self) -> bool:
        """Whether there is work to poll while no frame comes."""
        return bool(self._finishing)

    def _advance(self) -> bool:
        """Polls it, without waiting; returns whether a part ended."""
        before = len(self._finishing)
        while self._finishing and self._finishing[0].try_finish():
            self._over(self._finishing.popleft().transfer.id)
        return len(self._finishing) < before

    def _let_go(self) -> None:
        """Waits for it, at the end of the pump."""
        while self._finishing:
            landing = self._finishing.popleft()
            landing.finish()
            self._over(landing.transfer.id)

    def _read_header(self) -> bool:
        """False when no byte comes within POLL_S."""
        read, self._header_filled = self._header_filled, 0
        while read < HEADER.size:
            got = self._receive_into(self._header[read:])
            if not got and not read and self._current is None:
                return False
            read += got
        return True

    def _take_frame(self) -> None:
        transfer_id, length, kind = HEADER.unpack(self._header)
        if not self._is_frame(kind, length):
            raise TransportError(f"it sent a frame of kind {kind} with {length} bytes")
        landing = self._current or self._find(transfer_id)
        if landing.transfer.id != transfer_id:
            raise TransportError(f"it sent transfer {transfer_id} within transfer {landing.transfer.id}")
        if kind not in (END, ABORT):
            self._current = landing
            self._take_payload(landing, kind, length)
            return
        self._current = None
        with self._lock:
            self._landings.pop(transfer_id, None)
        if kind == ABORT:
            landing.stop(TransportError(f"{self.peer} aborted transfer {transfer_id}"))
        self._finishing.append(landing)

    def _over(self, transfer_id: int) -> None:
        """Called when a transfer has ended and its views are left alone."""

    def _is_frame(self, kind: int, length: int) -> bool:
        return 0 < length <= FRAME_BYTES_MAX if kind == DATA else kind in (END, ABORT) and length == 0

    def _take_payload(self, landing: Landing, kind: int, length: int) -> None:
        """Receives the payload of a frame."""
        self._fill(landing, length)

    def _find(self, transfer_id: int) -> Landing:
        with self._lock:
            self._lock.wait_for(lambda: self._lost or transfer_id in self._landings, UNPOSTED_WAIT_S)
            landing = self._landings.get(transfer_id)
        if landing is None:
            raise TransportError(f"it sent transfer {transfer_id}, which was not requested")
        return landing

    def _fill(self, landing: Landing, length: int) -> None:
        while length:
            room = landing.borrow(length)
            if room is None:
                length -= self._receive_into(_scrap[:length])
                continue
            got = 0
            try:
                got = self._receive_room(room, length)
            finally:
                landing.give_back(got)
            length -= got

    def _receive_room(self, room: View, length: int) -> int:
        """As `_receive_into`, into a borrowed view; the last read of a frame includes the next header."""
        view = on_host(room)
        got = self._receive_into(view, self._header) if view.nbytes == length else self._receive_into(view)
        if got > length:
            got, self._header_filled = length, got - length
        return got

    def _receive_into(self, *rooms: memoryview) -> int:
        """Returns the count; 0 when no byte came within POLL_S. Raises TransportError at the end and the timeout."""
        try:
            got = self._sock.recv_into(rooms[0]) if len(rooms) == 1 else self._sock.recvmsg_into(rooms)[0]
        except BlockingIOError:
            self._quiet_s += POLL_S
            timeout_s = self._current.transfer.idle_timeout_s if self._current else HEADER_TIMEOUT_S
            if self._quiet_s >= timeout_s:
                raise TransportError(f"it was silent for {self._quiet_s:g} s in a transfer") from None
            return 0
        if not got:
            raise TransportError("it closed the connection")
        self._quiet_s = 0.0
        self.received_bytes += got
        return got


class Sending:
    """A transfer that the holder sends. `stopped` ends all waits for it."""

    def __init__(
        self, transfer: Transfer, spans: Iterator[AnySpan], *, stop: Callable[[Sending], None], mailbox: Mailbox
    ) -> None:
        self.transfer = transfer
        self.spans = spans
        self.stopped = threading.Event()
        self.begun = False
        self.outcome = Outcome(stop=lambda: stop(self))
        self._mailbox = mailbox

    def end(self, error: Exception | None) -> None:
        """Closes the spans and settles the outcome. Any thread, the last to use the spans."""
        try:
            close_iterator(self.spans)
        except Exception as closing:  # raised by `send`
            error = error or closing
        self._mailbox.post(lambda: self.outcome.settle(error))


class Lost(TransportError):
    """The connection failed, as opposed to an error out of spans."""


class TcpOutbound(_Session):
    """The holder's end: a job sends the queued transfers in order."""

    on_device = False
    piece_bytes = FRAME_BYTES_MAX  # most bytes sent at once

    def __init__(self, sock: ByteStream, *, peer: str, pool: ThreadPoolExecutor, pace: Pace | None) -> None:
        self._pace = pace
        self._queue: deque[Sending] = deque()
        self._sending: Sending | None = None
        super().__init__(sock, peer=peer, pool=pool)

    @property
    def queued(self) -> int:
        """Transfers to send, including the transfer on the wire."""
        return len(self._queue) + (self._sending is not None)

    async def send(self, transfer: Transfer, spans: Iterator[AnySpan]) -> None:
        """As Outbound. Raises LocalProtocolError when the spans are not `transfer.size` bytes."""
        sending = Sending(transfer, spans, stop=self._cancel, mailbox=self._mailbox)
        with self._lock:
            if self._lost is not None:
                raise self._error()
            self._queue.append(sending)
            self._lock.notify()
        if self._job is None:
            self._start(self._send_queued)
        await sending.outcome.reached()

    def _cancel(self, sending: Sending) -> None:
        sending.stopped.set()
        with self._lock:
            begun = sending.begun
            sending.begun = True
        if not begun:  # it stays queued: its ABORT is sent in its turn
            sending.end(TransportError("cancelled"))

    def _drop_transfers(self) -> None:
        with self._lock:
            queued = list(self._queue)
            self._queue.clear()
            if self._sending is not None:
                self._sending.stopped.set()  # it may wait for the upload cap
        for sending in queued:
            sending.end(self._error())

    def _readable(self) -> None:
        try:
            data = self._sock.recv_now()
        except OSError as error:
            self._lose(f"connection lost ({error})")
            return
        if data is not None:
            self._lose("it broke the protocol" if data else "it closed the connection")

    def _finished(self, job: asyncio.Future[None]) -> None:
        super()._finished(job)
        if self._lost is None and self._queue:  # queued after the job's last look
            self._start(self._send_queued)

    def _send_queued(self) -> None:
        while True:
            self._await_queue()
            with self._lock:
                if not self._queue:
                    return
                sending = self._queue.popleft()
                begun, sending.begun = sending.begun, True
                self._sending = sending
            if begun:  # cancelled: its outcome is settled and its spans are closed
                self._abort(sending)
            else:
                self._send(sending)
            self._sending = None

    def _await_queue(self) -> None:
        """Waits for a transfer to send, for at most POLL_S."""
        with self._lock:
            self._lock.wait_for(lambda: self._queue or self._lost, POLL_S)

    def _send(self, sending: Sending) -> None:
        error: Exception | None = None
        slice_bytes = self._pace.slice_bytes if self._pace else None
        most = min(slice_bytes or self.piece_bytes, self.piece_bytes)
        try:
            for piece in pieces(sending.spans, size=sending.transfer.size, most=most):
                self._await_turn(sending, span_bytes(piece))
                self._send_piece(sending, piece)
            self._send_frame(sending, END)
        except Lost as lost:
            error = lost
            self._lose(str(lost))
        except Exception as broken:
            error = broken
            self._abort(sending)
        self._conclude(sending, error)

    def _conclude(self, sending: Sending, error: Exception | None) -> None:
        """Called after END or ABORT, or with the error that prevented it."""
        sending.end(error)

    def _send_piece(self, sending: Sending, piece: AnySpan) -> None:
        self._send_frame(sending, DATA, on_host(piece))

    def _await_turn(self, sending: Sending, size: int) -> None:
        wait_s = self._pace.take(size) if self._pace and not sending.stopped.is_set() else 0.0
        if sending.stopped.wait(wait_s) if wait_s else sending.stopped.is_set():
            raise TransportError("cancelled") if self._lost is None else Lost(str(self._error()))

    def _abort(self, sending: Sending) -> None:
        try:
            self._send_frame(sending, ABORT)
        except Lost as lost:
            self._lose(str(lost))

    def _send_frame(self, sending: Sending, kind: int, piece: Span | None = None) -> None:
        size = span_bytes(piece) if piece is not None else 0
        header = memoryview(HEADER.pack(sending.transfer.id, size, kind))
        if isinstance(piece, FileSpan):
            self._write(sending, len(header), lambda done: self._sock.send(header[done:], socket.MSG_MORE))
            self._send_file(sending, piece)
        else:
            self._send_memory(sending, header, piece or _NOTHING)

    def _send_memory(self, sending: Sending, header: memoryview, payload: memoryview) -> None:
        def write(done: int) -> int:
            if done < len(header):
                return self._sock.sendmsg((header[done:], payload))
            return self._sock.send(payload[done - len(header) :])

        self._write(sending, len(header) + payload.nbytes, write)

    def _send_file(self, sending: Sending, span: FileSpan) -> None:
        fd, offset, size = span.fd, span.offset, span.size
        sent = self._write(sending, size, lambda done: self._sock.send_file(fd, offset + done, size - done))
        if sent < size:  # an incomplete frame ends the session
            self._lose("the file it was sent became shorter")
            raise SourceChanged(os.readlink(f"/proc/self/fd/{fd}"), f"it ends before byte {offset + size}")

    def _write(self, sending: Sending, size: int, write: Callable[[int], int]) -> int:
        """Calls `write(done)` until `size` bytes are sent or it returns 0; returns the count. Raises Lost."""
        done, quiet_s = 0, 0.0
        while done < size:
            if self._lost is not None:
                raise Lost(str(self._error()))
            try:
                wrote = write(done)
            except BlockingIOError:
                quiet_s += POLL_S
                timeout_s = sending.transfer.idle_timeout_s
                if quiet_s >= (min(timeout_s, CANCEL_GRACE_S) if sending.stopped.is_set() else timeout_s):
                    raise Lost(f"it did not read for {quiet_s:g} s") from None
                continue
            except OSError as error:
                raise Lost(f"connection lost ({error})") from error
            if not wrote:
                break
            done, quiet_s = done + wrote, 0.0
        return done
