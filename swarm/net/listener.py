"""The listener: a single TCP port for all services of a node, so that a firewall needs one hole.

It has a socket for each address where a host means several.

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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NoReturn, TypeAlias

from swarm.errors import LocalProtocolError, SettingsError

ROUTE_BYTES = 4
DECIDE_TIMEOUT_S = 5.0  # for a packet and two retransmissions of it
STRANGERS_MAX = 512  # more than a burst of newcomers; bounds the descriptors and tasks of a flood
BACKLOG = 1024  # for a burst of newcomers; the kernel caps it at somaxconn
CLOSE_TIMEOUT_S = 5.0

PORTS_TRIED = 16  # when the system chooses: free at the first address and taken at another
# Addresses of the machine that are gone meanwhile, and families that the kernel does not have.
_MISSING = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})

# Out of descriptors or memory: the connection stays in the backlog until some are free.
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
BACKOFF_SMALLEST_S, BACKOFF_LARGEST_S = 0.05, 1.0

Handler: TypeAlias = Callable[[socket.socket], Awaitable[None]]


class Listener:
    """Accepts connections and passes them to handlers. Made by `open`; all methods run on one loop."""

    def __init__(self, *socks: socket.socket) -> None:
        self._socks = socks
        self._address = _name(socks[0])
        self._accepting: list[asyncio.Task[None]] = []
        self._strangers: dict[asyncio.Task[None], None] = {}  # oldest first
        self._leaving: set[asyncio.Task[None]] = set()  # cancelled to make room

    @classmethod
    async def open(cls, host: str | Sequence[str], port: int) -> Listener:
        """Listens on an address, or on each of several that this machine has, all with one port; port 0 takes a free
        port. Raises SettingsError ('listen') when that fails."""
        hosts = [host] if isinstance(host, str) else list(host)
        for attempt in range(PORTS_TRIED):
            try:
                return cls(*await _bind_all(hosts, port))
            except OSError as error:
                if port or error.errno != errno.EADDRINUSE or attempt == PORTS_TRIED - 1:
                    _refuse(error, getattr(error, "host", hosts[0]), port)
        raise LocalProtocolError("unreachable: the last attempt raises")

    @property
    def address(self) -> tuple[str, int]:
        """The host and port of the first socket."""
        return self._address

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts of all sockets; that of a link-local address has its zone."""
        return tuple(_name(sock)[0] for sock in self._socks)

    def serve(self, routes: Mapping[bytes, Handler], default: Handler) -> None:
        """Accepts until `close`. `routes`: handlers by a prefix of the first four bytes.

        A handler owns its socket, also when it raises or is cancelled; its errors go to the loop's exception handler.
        """
        for sock in self._socks:
            accepting = self._accept(sock, dict(routes), default)
            self._accepting.append(asyncio.create_task(accepting, name="listener accepts"))

    async def close(self) -> None:
        """Stops listening, drops strangers and cancels running handlers, within CLOSE_TIMEOUT_S."""
        tasks = {*self._strangers, *self._leaving, *self._accepting}
        # Otherwise asyncio logs a traceback for a cancelled accept with a connection in the backlog.
        for sock in self._socks:
            asyncio.get_running_loop().remove_reader(sock)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
        for sock in self._socks:
            sock.close()

    async def _accept(self, listening: socket.socket, routes: Mapping[bytes, Handler], default: Handler) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = BACKOFF_SMALLEST_S
        while True:
            try:
                sock, _ = await loop.sock_accept(listening)
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
        except TimeoutError:  # silent, unless the loop stood still for so long
            first = _look(sock)
        except OSError:
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
    return _look(sock)


def _look(sock: socket.socket) -> bytes:
    """Up to ROUTE_BYTES that are there; they stay in the socket."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        return sock.recv(ROUTE_BYTES, socket.MSG_PEEK)
    return b""


async def _bind_all(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """A socket for each of the hosts, and for each address of a name, all with one port.

    An address that this machine does not have is left out where it has another. Raises OSError, with the `host` that
    failed.
    """
    loop = asyncio.get_running_loop()
    socks: list[socket.socket] = []
    missing: OSError | None = None
    host = hosts[0]
    try:
        for host in hosts:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, where in dict.fromkeys(found):
                wanted = (where[0], socks[0].getsockname()[1] if socks else port, *where[2:])
                try:
                    sock = socket.create_server(wanted, family=family, backlog=BACKLOG)
                except OSError as error:
                    if error.errno not in _MISSING:
                        raise
                    missing = error
                else:
                    sock.setblocking(False)
                    socks.append(sock)
        if missing and not socks:
            raise missing
    except OSError as error:
        for sock in socks:
            sock.close()
        error.host = host  # type: ignore[attr-defined]
        raise
    return socks


def _name(sock: socket.socket) -> tuple[str, int]:
    """Host and port of a socket, with the zone of a link-local address."""
    where = sock.getsockname()
    host = str(where[0])
    if sock.family == socket.AF_INET6 and len(where) > 3 and where[3] and "%" not in host:
        with contextlib.suppress(OSError):
            host = f"{host}%{socket.if_indextoname(where[3])}"
    return host, int(where[1])


def _refuse(error: OSError, host: str, port: int) -> NoReturn:
    if error.errno == errno.EADDRINUSE:
        why = f"port {port} on {host} is in use; choose another port, or 0 for any free port"
    elif error.errno == errno.EACCES:
        why = f"port {port} on {host} may not be opened by this user; ports from 1024 on may"
    elif error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        why = f"{host} is no address, card or name of this machine; `ip addr` lists them, and 0.0.0.0 means all"
    else:
        why = f"cannot listen on {host} port {port} ({error.strerror or error})"
    raise SettingsError("listen", why) from error
