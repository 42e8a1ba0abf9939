"""Links: control connections between nodes, as WebSockets (RFC 6455) over aiohttp.

A link carries whole messages in order, both ways, of bounded size; messages sent together share frames. It decodes
frames (`messages.unpack`) and pings, so that a dead peer is noticed. It also reads pages of other nodes. Only this
module and `http_pages` import aiohttp.

With an identity links are inside TLS, and both ends prove membership before the first message. Plain HTTP from other
machines is answered with the demand for a key. A connection without a request within REQUEST_TIMEOUT_S is closed.
Connections that are neither links nor streams are visitors: beyond VISITORS_MAX the oldest is closed.

Must not know: the meaning of messages.
"""

from __future__ import annotations

import asyncio
import asyncio.trsock
import contextlib
import logging
import socket
import ssl
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol

import aiohttp
from aiohttp import web
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError

from swarm.errors import NotAdmitted, PeerTimeout, PeerUnreachable, RemoteProtocolError, VersionSkew
from swarm.net.http_pages import Page, Pages, ssl_of
from swarm.net.reclaim import Reclaimer
from swarm.protocol import messages
from swarm.protocol.messages import AnyMessage, Message
from swarm.security.certificates import Identity, Refusal, node_of, refusal
from swarm.security.rate_limit import LogOnce
from swarm.security.tls_handshake import part, shake
from swarm.settings import join_address

PATH = "/swarm/link"
HEARTBEAT_S = 5.0  # a peer that answers no ping for this long counts as gone
SEND_TIMEOUT_S = 10.0  # a peer that does not read its messages for this long counts as gone
CLOSE_TIMEOUT_S = 1.0
HANDSHAKE_TIMEOUT_S = 5.0  # two round trips, on a machine that is busy
HANDSHAKES_MAX = 64  # at once: asyncio takes 400 KB for each before the peer is known
REQUEST_TIMEOUT_S = 5.0  # from the handshake to the end of a request's header
VISITORS_MAX = 64  # connections that are no links: a page and its parts take six; each may take 1 MB
LINE_BYTES_MAX, HEADERS_MAX = 4096, 48  # of a request: browsers send about twenty headers

log = logging.getLogger("swarm")
_web_log = logging.getLogger("swarm.http")


class Link(Protocol):
    """A control connection. A single task receives; any task sends."""

    remote: str  # the other end's socket address, for logs
    member: str | None  # the node id that the peer has proven; None without a cluster key

    async def send(self, *several: Message) -> None:
        """Sends messages. Raises PeerUnreachable when the link is gone, PeerTimeout when the peer does not read."""

    async def receive(self) -> AnyMessage:
        """The next message. Raises PeerUnreachable at the end, RemoteProtocolError for an invalid frame."""

    async def close(self) -> None:
        """Ends the link; never raises."""


class WebSocketLink:
    """A link over an open WebSocket, of the client or the server side."""

    def __init__(
        self, socket: web.WebSocketResponse | aiohttp.ClientWebSocketResponse, remote: str, *, member: str | None = None
    ) -> None:
        self.remote = remote
        self.member = member
        self._socket = socket
        self._connection: asyncio.trsock.TransportSocket | None = None
        with contextlib.suppress(AttributeError):  # asyncio's TLS transport of a connection that is lost already
            self._connection = socket.get_extra_info("socket")
        self._heard: deque[AnyMessage] = deque()  # the rest of a frame

    async def send(self, *several: Message) -> None:
        """Messages of a call share frames."""
        for frame in messages.pack(several):
            await self._send(frame.decode())

    async def receive(self) -> AnyMessage:
        """Messages of a frame, in order."""
        if not self._heard:
            self._heard.extend(await self._receive())
        return self._heard.popleft()

    async def close(self) -> None:
        """Within CLOSE_TIMEOUT_S. What the peer has not read by then is dropped: it may never read it."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._socket.close()
        except (TimeoutError, ConnectionError, RuntimeError, aiohttp.ClientError):
            return  # it is gone either way
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
        finally:
            if self._connection is not None:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)

    async def _send(self, frame: str) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._socket.send_str(frame)
        except TimeoutError:
            raise PeerTimeout(self.remote, f"did not read its messages for {SEND_TIMEOUT_S:g} s") from None
        except (ConnectionError, RuntimeError, aiohttp.ClientError) as error:
            raise PeerUnreachable(self.remote, str(error) or "the link is closed") from error
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise PeerUnreachable(self.remote, "another message was not read") from None

    async def _receive(self) -> Sequence[AnyMessage]:
        frame = await self._socket.receive()
        if frame.type is aiohttp.WSMsgType.TEXT:
            try:
                return messages.unpack(frame.data.encode())
            except messages.OtherProtocol as other:
                raise VersionSkew(
                    self.remote, theirs=other.protocol, ours=messages.PROTOCOL, software=other.software
                ) from other
            except ValueError as error:
                raise RemoteProtocolError(self.remote, f"sent an invalid message: {error}") from error
        if frame.type is aiohttp.WSMsgType.BINARY:
            raise RemoteProtocolError(self.remote, "sent a binary frame; messages are text")
        if isinstance(frame.data, aiohttp.WebSocketError):
            raise RemoteProtocolError(self.remote, f"broke the WebSocket protocol: {frame.data}")
        if frame.type is aiohttp.WSMsgType.ERROR:
            raise PeerUnreachable(self.remote, str(self._socket.exception() or "the link broke"))
        raise PeerUnreachable(self.remote, "closed the link")


class HttpLinks:
    """Dials links, and accepts them on sockets from the listener; with an identity inside TLS."""

    def __init__(self, pages: Mapping[str, Page] | None = None) -> None:
        self._pages = Pages(pages or {})
        self._identity: Identity | None = None
        self._accept: Callable[[Link], Awaitable[None]] | None = None
        self._runner: web.AppRunner | None = None
        self._client: aiohttp.ClientSession | None = None
        self._asked: weakref.WeakKeyDictionary[asyncio.BaseTransport, asyncio.Event] = weakref.WeakKeyDictionary()
        self._encrypted: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self._visitors: dict[asyncio.BaseTransport, None] = {}  # oldest first
        self._reclaimer = Reclaimer()
        self._shaking: dict[asyncio.Task[Any], None] = {}  # oldest first
        self._refusals = LogOnce(log)

    async def open(self, accept: Callable[[Link], Awaitable[None]], *, identity: Identity | None = None) -> None:
        """Starts to serve. Awaits `accept` for each incoming link; the link is closed when it returns."""
        self._accept = accept
        self._identity = identity
        app = web.Application(client_max_size=0)
        app.router.add_get(PATH, self._incoming)
        self._pages.add_to(app, self._arrived, self._stays)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=_web_log,
            handle_signals=False,
            shutdown_timeout=CLOSE_TIMEOUT_S,
            keepalive_timeout=REQUEST_TIMEOUT_S,
            lingering_time=CLOSE_TIMEOUT_S,
            max_line_size=LINE_BYTES_MAX,
            max_field_size=LINE_BYTES_MAX,
            max_headers=HEADERS_MAX,
        )
        await self._runner.setup()
        connector = _Connector(self._identity, self._encrypted) if self._identity else aiohttp.TCPConnector(limit=0)
        self._client = aiohttp.ClientSession(connector=connector)

    async def adopt(self, sock: socket.socket) -> None:
        """Serves plain HTTP on an accepted socket."""
        server = self._runner.server if self._runner else None
        if server is None:
            sock.close()
            return
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(server, sock)
        await self._await_request(transport)

    async def adopt_tls(self, sock: socket.socket) -> None:
        """Serves HTTP inside TLS on an accepted socket; refuses the peer without an identity."""
        server = self._runner.server if self._runner else None
        if server is None:
            sock.close()
        elif self._identity is None:
            with sock:
                self._refuse(_name(sock), Refusal.HAS_KEY)
                await part(sock, b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")  # plaintext
        else:
            name = _name(sock)
            context = self._identity.server
            try:
                with self._shaking_hands():
                    transport, _ = await shake(server, sock, context, server_side=True, timeout_s=HANDSHAKE_TIMEOUT_S)
                self._encrypted.add(transport)
            except OSError as error:
                self._reclaimer.count()
                self._refuse(name, refusal(error) or Refusal.HUNG_UP)
            else:
                await self._await_request(transport)

    async def dial(self, address: str, *, timeout_s: float) -> Link:
        """A link to the node at HOST:PORT. Raises NotAdmitted, PeerUnreachable or PeerTimeout."""
        url, size_max = f"http://{address}{PATH}", messages.FRAME_BYTES_MAX
        try:
            async with self._request(address, timeout_s) as client:
                socket = await client.ws_connect(url, heartbeat=HEARTBEAT_S, max_msg_size=size_max, autoclose=True)
        except PeerUnreachable as error:
            if why := _why_refused(error.__cause__):
                raise NotAdmitted(address, self._said(why)) from error
            raise
        link = WebSocketLink(socket, address, member=_member(socket.get_extra_info("ssl_object")))
        if self._identity and link.member is None:
            await link.close()
            raise NotAdmitted(address, Refusal.NOT_A_NODE.value)
        return link

    async def read(self, address: str, path: str, *, timeout_s: float, bytes_max: int) -> bytes:
        """A page of the node at HOST:PORT. Raises PeerUnreachable, PeerTimeout, and RemoteProtocolError for another
        status than 200 or a page of more than `bytes_max`."""
        data = b""
        async with self._request(address, timeout_s) as client, client.get(f"http://{address}{path}") as answer:
            if answer.status != HTTPStatus.OK:
                raise RemoteProtocolError(address, f"answers {answer.status} {answer.reason}")
            while len(data) <= bytes_max and (part := await answer.content.readany()):
                data += part
        if len(data) > bytes_max:
            raise RemoteProtocolError(address, f"sent more than {bytes_max} bytes")
        return data

    @contextlib.asynccontextmanager
    async def _request(self, address: str, timeout_s: float) -> AsyncIterator[aiohttp.ClientSession]:
        """Maps the errors of a request to a node to PeerErrors."""
        if self._client is None or self._client.closed:
            raise PeerUnreachable(address, "this node is not open")
        try:
            async with asyncio.timeout(timeout_s):
                yield self._client
        except TimeoutError:
            raise PeerTimeout(address, f"no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            cause = getattr(error, "os_error", error)  # aiohttp's own text mentions TLS where there is none
            raise PeerUnreachable(address, getattr(cause, "strerror", None) or str(cause)) from error

    async def close(self) -> None:
        """Closes every link and stops serving."""
        self._pages.close()
        self._visitors.clear()
        self._reclaimer.close()
        if self._client:
            await self._client.close()
        if self._runner:
            await self._runner.cleanup()
        # TLS would wait for the peer's goodbye, perhaps beyond the life of the loop.
        for transport in list(self._encrypted):
            transport.abort()
        await asyncio.sleep(0)  # aborted transports close their sockets in the next turn

    @contextlib.contextmanager
    def _shaking_hands(self) -> Iterator[None]:
        """Counts the handshake of this task; cancels the oldest handshake beyond HANDSHAKES_MAX."""
        task = asyncio.current_task()
        if task is not None:
            self._shaking[task] = None
        if len(self._shaking) > HANDSHAKES_MAX:
            next(iter(self._shaking)).cancel()
        try:
            yield
        finally:
            if task is not None:
                self._shaking.pop(task, None)

    async def _await_request(self, transport: asyncio.BaseTransport) -> None:
        """Returns after the first request; aborts a connection without a request within REQUEST_TIMEOUT_S."""
        asked = self._asked.setdefault(transport, asyncio.Event())
        self._visit(transport)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await asked.wait()
        except BaseException as error:
            if isinstance(transport, asyncio.WriteTransport):
                transport.abort()
            if not isinstance(error, TimeoutError):
                raise

    def _visit(self, transport: asyncio.BaseTransport) -> None:
        self._visitors[transport] = None
        self._reclaimer.count()
        if len(self._visitors) > VISITORS_MAX:
            self._visitors = {visitor: None for visitor in self._visitors if not visitor.is_closing()}
        if len(self._visitors) > VISITORS_MAX:
            oldest = next(iter(self._visitors))
            del self._visitors[oldest]
            if isinstance(oldest, asyncio.WriteTransport):
                oldest.abort()

    def _stays(self, request: web.Request) -> None:
        """The connection of this request is a link or a stream from now on, which have limits of their own."""
        if request.transport:
            self._visitors.pop(request.transport, None)

    async def _incoming(self, request: web.Request) -> web.StreamResponse:
        self._arrived(request)
        if "Origin" in request.headers:  # only browsers send it, for web pages
            raise web.HTTPForbidden(text="links are for nodes, not for web pages")
        member = None
        if self._identity:
            connection = ssl_of(request)
            member = _member(connection)
            host = _remote(request).rpartition(":")[0].strip("[]")
            if connection is None:
                self._refuse(host, Refusal.PLAINTEXT)
                return web.Response(status=HTTPStatus.UPGRADE_REQUIRED, headers={"Upgrade": "TLS/1.3"})
            if member is None:
                self._refuse(host, Refusal.NOT_A_NODE)
                raise web.HTTPForbidden(text="the certificate names no node")
        # Compression would take 300 KB a link, and frames are small.
        socket = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S, max_msg_size=messages.FRAME_BYTES_MAX, compress=False, timeout=CLOSE_TIMEOUT_S
        )
        await socket.prepare(request)
        self._stays(request)
        if self._accept:
            await self._accept(WebSocketLink(socket, _remote(request), member=member))
        return socket

    def _arrived(self, request: web.Request) -> None:
        if request.transport:
            self._asked.setdefault(request.transport, asyncio.Event()).set()

    def _refuse(self, host: str, why: Refusal) -> None:
        level = logging.DEBUG if why is Refusal.HUNG_UP else logging.WARNING  # port scanners hang up too
        self._refusals.log(level, f"{host} {self._said(why)}")

    def _said(self, why: Refusal) -> str:
        return f"{why.value} (this node's key: {self._identity.keyring})" if self._identity else why.value


class _Connector(aiohttp.BaseConnector):
    """Connections inside TLS to members of the cluster; adds them to `made`."""

    def __init__(self, identity: Identity, made: weakref.WeakSet[asyncio.Transport]) -> None:
        super().__init__(limit=0)
        self._identity = identity
        self._made = made

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: list[aiohttp.tracing.Trace], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(req.url.host, req.url.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, where)
        except BaseException:
            sock.close()
            raise
        transport, handler = await shake(
            self._factory, sock, self._identity.client, server_side=False, timeout_s=HANDSHAKE_TIMEOUT_S
        )
        self._made.add(transport)
        return handler


def _is_cancelled() -> bool:
    """Whether this task was cancelled. All writers of an aiohttp socket wait for the same future: the timeout of a send
    cancels it, which raises CancelledError in other tasks too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _remote(request: web.Request) -> str:
    peer = request.transport.get_extra_info("peername") if request.transport else None
    return join_address(str(peer[0]), peer[1]) if peer else "unknown"


def _is_ours(record: logging.LogRecord) -> bool:
    """False for errors that strangers cause: invalid requests, and connections closed before the answer."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | ConnectionError))


_web_log.addFilter(_is_ours)


def _member(connection: ssl.SSLObject | None) -> str | None:
    return node_of(connection) if connection else None


def _name(sock: socket.socket) -> str:
    try:
        return str(sock.getpeername()[0])
    except OSError:
        return "unknown"


def _why_refused(error: BaseException | None) -> Refusal | None:
    """The reason that both ends are of different clusters, if the error says so."""
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return Refusal.WANTS_KEY if error.status == HTTPStatus.UPGRADE_REQUIRED else None
    return refusal(error.__cause__) if error and error.__cause__ else None
