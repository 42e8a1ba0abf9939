"""The holder's end of a TCP session: sends the queued transfers in order, from memory or files.

A payload in memory is written together with its header, since system calls dominate the cost of a small chunk. END is
sent after the spans' own check at their end.

Must not know: who asked for a transfer, and which chunks it carries.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from swarm.errors import SourceChanged, TransportError
from swarm.store import AnySpan, FileSpan, Span
from swarm.transport import Pace, Transfer
from swarm.transport.byte_stream import ByteStream
from swarm.transport.sink import Mailbox, Outcome, close_iterator, on_host, pieces, span_bytes
from swarm.transport.tcp_session import ABORT, DATA, END, FRAME_BYTES_MAX, HEADER, LINGER_S, POLL_S, Session

CANCEL_GRACE_S = 1.0  # for the rest of a frame of a cancelled transfer; then the session ends

_NOTHING = memoryview(b"")


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


class TcpOutbound(Session):
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
        """Waits for a transfer to send, for at most LINGER_S."""
        with self._lock:
            self._lock.wait_for(lambda: self._queue or self._lost, LINGER_S)

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
