"""The listener: one listening TCP socket for everything a node offers, so that a firewall needs one hole.

A connection says by its first four bytes what it wants. They are looked at, not consumed, and the connected
socket (still non-blocking) is handed to the route whose prefix they begin with, or to the default one; from then on it
belongs to the handler, which returns when it knows who is there.

Until then it is a stranger's. One has DECIDE_TIMEOUT_S to speak, handlers have deadlines of their own, and at most
STRANGERS_MAX are known at once; above that the oldest goes. Knows nothing of protocols, peers or nodes.
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
DECIDE_TIMEOUT_S = 5.0  # one packet after the handshake; a slow network retransmits it twice in that time
STRANGERS_MAX = 512  # a burst of newcomers fits; a flood costs so many file descriptors and tasks, and no more
BACKLOG = 1024  # a burst of newcomers dials in one moment; the kernel caps this at its somaxconn
CLOSE_TIMEOUT_S = 5.0

# Out of file descriptors or memory: the connection stays in the backlog until some are free again.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
BACKOFF_SMALLEST_S, BACKOFF_LARGEST_S = 0.05, 1.0

Handler: TypeAlias = Callable[[socket.socket], Awaitable[None]]


class Listener:
    """Accepts connections and hands them to handlers. Made by `open`; all methods belong to one loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        host, port = sock.getsockname()[:2]
        self._address = (str(host), int(port))
        self._accepting: asyncio.Task[None] | None = None
        self._strangers: dict[asyncio.Task[None], None] = {}  # oldest first
        self._leaving: set[asyncio.Task[None]] = set()  # cancelled to make room

    @classmethod
    async def open(cls, host: str, port: int) -> Listener:
        """Listens on one address; port 0 takes a free one. Raises SettingsError ('listen') when that cannot be had."""
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
        """Host and port that are listened on."""
        return self._address

    def serve(self, routes: Mapping[bytes, Handler], default: Handler) -> None:
        """Starts to accept, until `close`. `routes` maps what the first four bytes begin with to handlers.

        A handler owns its socket, also when it raises or is cancelled; what it raises goes to the loop's exception
        handler.
        """
        accepting = self._accept(dict(routes), default)
        self._accepting = asyncio.create_task(accepting, name="listener accepts")

    async def close(self) -> None:
        """Stops listening, drops strangers, and cancels handlers that still run. Within CLOSE_TIMEOUT_S."""
        tasks = {*self._strangers, *self._leaving, *filter(None, [self._accepting])}
        # Or asyncio would answer, with a traceback, an accept that was cancelled while a connection waited for it.
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
                continue  # anything else is the fault of that one connection, which is gone already
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
            await asyncio.sleep(0)  # a task that is cancelled before it has begun would not close its socket

    async def _decide(self, sock: socket.socket, routes: Mapping[bytes, Handler], default: Handler) -> None:
        try:
            async with asyncio.timeout(DECIDE_TIMEOUT_S):
                first = await _peek(sock)
        except OSError:  # TimeoutError is one: silent, or gone
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
    """The first ROUTE_BYTES, fewer when the stranger hung up; they stay in the socket."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def look() -> None:
        if not ready.done():
            ready.set_result(None)

    # Readable means 'all four bytes, or hung up' while this is set: a lone first byte does not wake us up in a circle.
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
        why = f"port {port} on {host} is in use; choose another one, or 0 for any free port"
    elif error.errno == errno.EACCES:
        why = f"port {port} on {host} may not be opened by this user; ports from 1024 on may"
    else:
        why = f"cannot listen on {host} port {port} ({error.strerror or error})"
    raise SettingsError("listen", why) from error
