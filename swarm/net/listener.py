"""The listener: a single TCP socket for all services of a node, so that a firewall needs one hole.

The first four bytes of a connection select its handler: they are peeked, and the socket (still non-blocking) goes to
the route with a matching prefix, or to the default. The handler owns it then, and returns when the peer is known.

Until then the connection is a stranger's: the first bytes must come within DECIDE_TIMEOUT_S, handlers have deadlines of
their own, and beyond STRANGERS_MAX strangers the oldest is closed. Must not know: protocols, peers, nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn, TypeAlias

from swarm.errors import SettingsError

ROUTE_BYTES = 4
DECIDE_TIMEOUT_S = 5.0  # for a packet and two retransmissions of it
STRANGERS_MAX = 512  # more than a burst of newcomers; bounds the descriptors and tasks of a flood
BACKLOG = 1024  # for a burst of newcomers; the kernel caps it at somaxconn
CLOSE_TIMEOUT_S = 5.0

# Out of descriptors or memory: the connection stays in the backlog until some are free.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
BACKOFF_SMALLEST_S, BACKOFF_LARGEST_S = 0.05, 1.0

Handler: TypeAlias = Callable[[socket.socket], Awaitable[None]]


class Listener:
    """Accepts connections and passes them to handlers. Made by `open`; all methods run on one loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        host, port = sock.getsockname()[:2]
        self._address = (str(host), int(port))
        self._accepting: asyncio.Task[None] | None = None
        self._strangers: dict[asyncio.Task[None], None] = {}  # oldest first
        self._leaving: set[asyncio.Task[None]] = set()  # cancelled to make room

    @classmethod
    async def open(cls, host: str, port: int) -> Listener:
        """Listens on an address; port 0 takes a free port. Raises SettingsError ('listen') when that fails."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, where = found[0]
            sock = socket.create_server(where[:2], family=family, backlog=BACKLOG)
        except OSError as error:
            _refuse(error, host, port)
        sock.setblocking(False)
        return cls(sock)

    @property
    def address(self) -> tuple[str, int]:
        """The host and port of the socket."""
        return self._address

    def serve(self, routes: Mapping[bytes, Handler], default: Handler) -> None:
        """Accepts until `close`. `routes`: handlers by a prefix of the first four bytes.

        A handler owns its socket, also when it raises or is cancelled; its errors go to the loop's exception handler.
        """
        accepting = self._accept(dict(routes), default)
        self._accepting = asyncio.create_task(accepting, name="listener accepts")

    async def close(self) -> None:
        """Stops listening, drops strangers and cancels running handlers, within CLOSE_TIMEOUT_S."""
        tasks = {*self._strangers, *self._leaving, *filter(None, [self._accepting])}
        # Otherwise asyncio logs a traceback for a cancelled accept with a connection in the backlog.
        asyncio.get_running_loop().remove_reader(self._sock)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
        self._sock.close()

    async def _accept(self, routes: Mapping[bytes, Handler], default: Handler) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = BACKOFF_SMALLEST_S
        while True:
            try:
                sock, _ = await loop.sock_accept(self._sock)
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    await asyncio.sleep(backoff_s)
                    backoff_s = min(2 * backoff_s, BACKOFF_LARGEST_S)
                continue  # other errors concern that connection alone, which is gone
            backoff_s = BACKOFF_SMALLEST_S
            sock.setblocking(False)
            task = asyncio.create_task(self._decide(sock, routes, default), name="listener decides")
            self._strangers[task] = None
            task.add_done_callback(self._forget)
            if len(self._strangers) > STRANGERS_MAX:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                self._leaving.add(oldest)
                oldest.cancel()
            await asyncio.sleep(0)  # a task cancelled before it began would not close its socket

    async def _decide(self, sock: socket.socket, routes: Mapping[bytes, Handler], default: Handler) -> None:
        try:
            async with asyncio.timeout(DECIDE_TIMEOUT_S):
                first = await _peek(sock)
        except OSError:  # TimeoutError included: silent, or gone
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        if len(first) < ROUTE_BYTES:
            sock.close()
            return
        await next((handler for prefix, handler in routes.items() if first.startswith(prefix)), default)(sock)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._strangers.pop(task, None)
        self._leaving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            context = {"message": "a connection's handler failed", "exception": error, "task": task}
            task.get_loop().call_exception_handler(context)

    def __repr__(self) -> str:
        host, port = self._address
        return f"<Listener {host}:{port} {len(self._strangers)} strangers>"


async def _peek(sock: socket.socket) -> bytes:
    """The first ROUTE_BYTES, fewer when the stranger hung up. They stay in the socket."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def look() -> None:
        if not ready.done():
            ready.set_result(None)

    # With SO_RCVLOWAT, readable means four bytes or hung up: a single byte does not wake the loop again and again.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, ROUTE_BYTES)
    loop.add_reader(sock.fileno(), look)
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    with contextlib.suppress(BlockingIOError):
        return sock.recv(ROUTE_BYTES, socket.MSG_PEEK)
    return b""


def _refuse(error: OSError, host: str, port: int) -> NoReturn:
    if error.errno == errno.EADDRINUSE:
        why = f"port {port} on {host} is in use; choose another port, or 0 for any free port"
    elif error.errno == errno.EACCES:
        why = f"port {port} on {host} may not be opened by this user; ports from 1024 on may"
    else:
        why = f"cannot listen on {host} port {port} ({error.strerror or error})"
    raise SettingsError("listen", why) from error
