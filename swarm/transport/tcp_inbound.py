"""The asker's end of a TCP session: frames arrive, and each fills the views of its transfer.

Views of a GPU may be filled after the END of their transfer. The asker receives the next frames meanwhile, and ends
that transfer between two frames. The end of a frame is read together with the next header, since system calls dominate
the cost of a small chunk.

Must not know: who opened the connection, and when views may be touched: `sink` decides that.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from swarm.errors import LocalProtocolError, TransportError
from swarm.store import View
from swarm.transport import Transfer
from swarm.transport.byte_stream import ByteStream
from swarm.transport.sink import LOOK_EVERY_S, Landing, on_host
from swarm.transport.tcp_session import ABORT, DATA, END, FRAME_BYTES_MAX, HEADER, LINGER_S, POLL_S, Session

HEADER_TIMEOUT_S = 5.0  # for the rest of a header after its first byte
UNPOSTED_WAIT_S = 5.0  # for a `receive` that is late since its loop is busy
ABANDONED_MAX = 4096  # cancelled before their first frame; beyond that, the oldest will not be sent

_scrap = memoryview(bytearray(256 << 10))  # for unwanted bytes: written by all threads, never read


class TcpInbound(Session):
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
            while self._lost is None and self._quiet_s < LINGER_S:
                if self._await_header():
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
