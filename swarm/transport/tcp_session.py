"""A TCP connection that carries transfers from a holder to an asker, after its preamble.

    0            8         12     13      16
    | transfer   | payload | kind | zeros | payload ...     DATA: 1 to 2 MiB of payload; END, ABORT: none
    | u64        | u32     | u8   |       |                 numbers big-endian

A transfer is DATA frames with its bytes, then END; ABORT in place of any frame ends it early and keeps the session.
Transfers do not interleave. The asker sends nothing, since its requests travel on the link: readable bytes at the
holder mean that the asker is gone.

Sockets block, on pool threads: `recv_into` and `sendfile` release the GIL, while asyncio costs a quarter of the rate.
Timeouts (`poll`, SO_SNDTIMEO) make a blocked thread check for a stop every POLL_S. A session holds a thread while bytes
move and for LINGER_S after that, because waking a thread is cheaper than starting a job; else the loop watches the
socket. The loop closes the socket when no thread uses it, since its number may be reused a moment later.

Other transports build on these sessions with frames of kinds of their own (`_take_payload`, `_send_piece`).

Owns the frames, and what both ends share: a socket, at most a single job on a pool thread, and the end of both.
`tcp_inbound` is the asker's end, `tcp_outbound` the holder's. Must not know: tokens, addresses, how connections are
opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from swarm.errors import TransportError
from swarm.transport.byte_stream import ByteStream
from swarm.transport.sink import Mailbox

HEADER = struct.Struct(">QIB3x")
DATA, END, ABORT = 1, 2, 3
FRAME_BYTES_MAX = 2 << 20  # a cancelled transfer stops within a frame, which costs a few turns of the GIL

POLL_S = 0.25  # within which a blocked thread notices a stop
LINGER_S = 1.0  # a peer on a slow link sends a chunk, or asks for one, every few tenths of a second
CLOSE_TIMEOUT_S = 5.0  # for threads to leave a socket that was shut down


class Session:
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
