"""An HTTP server over aiohttp, on sockets that a listener accepted.

A connection without a request within REQUEST_TIMEOUT_S is closed. Beyond `visitors_max` connections the oldest is
closed, except those that `stays` and `busy` have taken out of the count. `lines` bounds the header of a request.

Must not know: TLS handshakes, pages, links.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import weakref
from collections.abc import Callable, Iterator

from aiohttp import web
from aiohttp.http import HttpProcessingError

from swarm.net.link import CLOSE_TIMEOUT_S
from swarm.net.reclaim import Reclaimer

GRACE_S = 0.5  # for a request that came while the loop stood still
REQUEST_TIMEOUT_S = 5.0  # from the handshake to the end of a request's header
VISITORS_MAX = 64  # connections that are no links: a page and its parts take six; each may take 1 MB
LINE_BYTES_MAX, HEADERS_MAX = 4096, 48  # of a request: browsers send about twenty headers

_web_log = logging.getLogger("swarm.http")


class HttpServer:
    """Serves an application from `open` to `close`.

    `visitors_max`: connections at once; None for VISITORS_MAX. `keep_s`: how long an idle one is kept.
    """

    def __init__(self, *, visitors_max: int | None = None, keep_s: float = REQUEST_TIMEOUT_S) -> None:
        self._visitors_max = visitors_max
        self._keep_s = keep_s
        self._runner: web.AppRunner | None = None
        self._asked: weakref.WeakKeyDictionary[asyncio.BaseTransport, asyncio.Event] = weakref.WeakKeyDictionary()
        self._visitors: dict[asyncio.BaseTransport, None] = {}  # oldest first
        self.reclaimer = Reclaimer()

    async def open(self, app: web.Application) -> None:
        """Starts to serve."""
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=_web_log,
            handle_signals=False,
            shutdown_timeout=CLOSE_TIMEOUT_S,
            keepalive_timeout=self._keep_s,
            lingering_time=CLOSE_TIMEOUT_S,
            max_line_size=LINE_BYTES_MAX,
            max_field_size=LINE_BYTES_MAX,
            max_headers=HEADERS_MAX,
            auto_decompress=False,  # a body that nothing reads would be unpacked to be skipped
        )
        await self._runner.setup()

    @property
    def protocol(self) -> Callable[[], asyncio.Protocol] | None:
        """Makes the protocol of a connection; None while it does not serve."""
        return self._runner.server if self._runner else None

    async def adopt(self, sock: socket.socket) -> None:
        """Serves plain HTTP on an accepted socket."""
        protocol = self.protocol
        if protocol is None:
            sock.close()
            return
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(protocol, sock)
        await self.await_request(transport)

    async def await_request(self, transport: asyncio.BaseTransport) -> None:
        """Returns after the first request; aborts a connection without a request within REQUEST_TIMEOUT_S."""
        asked = self._asked.setdefault(transport, asyncio.Event())
        self._visit(transport)
        try:
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await asked.wait()
            except TimeoutError:
                async with asyncio.timeout(GRACE_S):
                    await asked.wait()
        except BaseException as error:
            if isinstance(transport, asyncio.WriteTransport):
                transport.abort()
            if not isinstance(error, TimeoutError):
                raise

    def arrived(self, request: web.Request) -> None:
        """A handler has this request: its connection is no stranger's any more."""
        if request.transport:
            self._asked.setdefault(request.transport, asyncio.Event()).set()

    def stays(self, request: web.Request) -> None:
        """The connection of this request is a link or a stream from now on, which have limits of their own."""
        if request.transport:
            self._visitors.pop(request.transport, None)

    @contextlib.contextmanager
    def busy(self, request: web.Request) -> Iterator[None]:
        """In the block, the connection of this request is not counted; afterwards it is a visitor again."""
        self.stays(request)
        try:
            yield
        finally:
            if request.transport and not request.transport.is_closing():
                self._visit(request.transport)

    async def close(self) -> None:
        """Stops serving."""
        self._visitors.clear()
        self.reclaimer.close()
        if self._runner:
            await self._runner.cleanup()

    def _visit(self, transport: asyncio.BaseTransport) -> None:
        most = VISITORS_MAX if self._visitors_max is None else self._visitors_max
        self._visitors[transport] = None
        self.reclaimer.count()
        if len(self._visitors) > most:
            self._visitors = {visitor: None for visitor in self._visitors if not visitor.is_closing()}
        if len(self._visitors) > most:
            oldest = next(iter(self._visitors))
            del self._visitors[oldest]
            if isinstance(oldest, asyncio.WriteTransport):
                oldest.abort()


def _is_ours(record: logging.LogRecord) -> bool:
    """False for errors that strangers cause: invalid requests and bodies, and connections closed before the answer."""
    theirs = HttpProcessingError | ConnectionError | web.RequestPayloadError
    return not (record.exc_info and isinstance(record.exc_info[1], theirs))


_web_log.addFilter(_is_ours)
