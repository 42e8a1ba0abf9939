"""Opens links, WebSockets (RFC 6455) over aiohttp: dials them, and accepts them on sockets of the listener.

A link pings, so that a dead peer is noticed. This module also reads pages of other nodes. Only `link`, `http_pages` and
this module import aiohttp.

With an identity links are inside TLS, and both ends prove membership before the first message. Plain HTTP from other
machines is answered with the demand for a key. `http_server` bounds connections that are neither links nor streams.

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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.client_proto import ResponseHandler

from swarm.errors import (
    NotAdmitted,
    NotSwarm,
    PeerError,
    PeerTimeout,
    PeerUnreachable,
    RemoteProtocolError,
    SettingsError,
)
from swarm.net import dialling, no_answer
from swarm.net.http_pages import Bearer, Page, Pages, ssl_of
from swarm.net.http_server import HttpServer
from swarm.net.link import CLOSE_TIMEOUT_S, Link, WebSocketLink
from swarm.net.no_answer import Fault
from swarm.net.udp import zoned
from swarm.protocol import messages
from swarm.security.certificates import Identity, Refusal, node_of, refusal
from swarm.security.rate_limit import LogOnce
from swarm.security.tls_handshake import part, shake
from swarm.settings import join_address, split_address

PATH = "/swarm/link"
HEARTBEAT_S = 5.0  # a peer that answers no ping for this long counts as gone
HANDSHAKE_TIMEOUT_S = 5.0  # two round trips, on a machine that is busy
HANDSHAKES_MAX = 64  # at once: asyncio takes 400 KB for each before the peer is known
PLAIN_ANSWER = b"WebSocket"  # what aiohttp writes to a plain GET of PATH

log = logging.getLogger("swarm")


class HttpLinks:
    """Dials links, and accepts them on sockets from the listener; with an identity inside TLS."""

    def __init__(self, pages: Mapping[str, Page] | None = None, *, bearer: Bearer | None = None) -> None:
        self._pages = Pages(pages or {}, bearer=bearer)
        self._server = HttpServer()
        self._identity: Identity | None = None
        self._accept: Callable[[Link], Awaitable[None]] | None = None
        self._client: aiohttp.ClientSession | None = None
        self._encrypted: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self._shaking: dict[asyncio.Task[Any], None] = {}  # oldest first
        self._refusals = LogOnce(log)

    async def open(self, accept: Callable[[Link], Awaitable[None]], *, identity: Identity | None = None) -> None:
        """Starts to serve. Awaits `accept` for each incoming link; the link is closed when it returns."""
        self._accept = accept
        self._identity = identity
        app = web.Application(client_max_size=0)
        app.router.add_get(PATH, self._incoming)
        self._pages.add_to(app, self._server.arrived, self._server.stays)
        await self._server.open(app)
        self._client = aiohttp.ClientSession(connector=_Connector(self._identity, self._encrypted))

    async def adopt(self, sock: socket.socket) -> None:
        """Serves plain HTTP on an accepted socket."""
        await self._server.adopt(sock)

    async def adopt_tls(self, sock: socket.socket) -> None:
        """Serves HTTP inside TLS on an accepted socket; refuses the peer without an identity."""
        server = self._server.protocol
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
                self._server.reclaimer.count()
                self._refuse(name, refusal(error) or Refusal.HUNG_UP)
            else:
                await self._server.await_request(transport)

    async def dial(self, address: str, *, timeout_s: float) -> Link:
        """A link to the node at HOST:PORT. Raises NotAdmitted, NotSwarm, PeerUnreachable or PeerTimeout."""
        size_max = messages.FRAME_BYTES_MAX
        try:
            async with self._request(address, PATH, timeout_s) as (client, url):
                socket = await client.ws_connect(url, heartbeat=HEARTBEAT_S, max_msg_size=size_max, autoclose=True)
        except PeerUnreachable as error:
            raise await self._explained(address, error) from error
        local = _end_of(socket.get_extra_info("sockname"))
        link = WebSocketLink(socket, address, local=local, member=_member(socket.get_extra_info("ssl_object")))
        if self._identity and link.member is None:
            await link.close()
            raise NotAdmitted(address, Refusal.NOT_A_NODE.value)
        return link

    async def read(self, address: str, path: str, *, timeout_s: float, bytes_max: int) -> bytes:
        """A page of the node at HOST:PORT. Raises PeerUnreachable, PeerTimeout, and RemoteProtocolError for another
        status than 200 or a page of more than `bytes_max`."""
        data = b""
        async with (
            self._request(address, path, timeout_s) as (client, url),
            client.get(url, allow_redirects=False) as answer,
        ):
            if answer.status != HTTPStatus.OK:
                raise RemoteProtocolError(address, f"answers {answer.status} {answer.reason}")
            while len(data) <= bytes_max and (part := await answer.content.readany()):
                data += part
        if len(data) > bytes_max:
            raise RemoteProtocolError(address, f"sent more than {bytes_max} bytes")
        return data

    @contextlib.asynccontextmanager
    async def _request(
        self, address: str, path: str, timeout_s: float
    ) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
        """The client for one request, and its URL. Maps errors to PeerErrors."""
        if self._client is None or self._client.closed:
            raise PeerUnreachable(address, "this node is not open")
        try:
            host, port = split_address("peer", address)
        except SettingsError as error:
            raise PeerUnreachable(address, error.why) from error
        target = _Target(address, host.partition("%")[0], port)
        token = _target.set(target)
        try:
            async with asyncio.timeout(timeout_s):
                yield self._client, f"http://{join_address(target.host, port)}{path}"
        except TimeoutError:
            fault = Fault.BUSY if target.connected else Fault.SILENT
            why = no_answer.line(fault, address, detail=f" within {timeout_s:g} s")
            raise PeerTimeout(address, why) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            cause = getattr(error, "os_error", error)  # aiohttp's own text mentions TLS where there is none
            raise PeerUnreachable(address, getattr(cause, "strerror", None) or str(cause)) from error
        finally:
            _target.reset(token)

    async def _explained(self, address: str, error: PeerUnreachable) -> PeerError:
        """The error of a dial, by its cause: another cluster, another program, or the error itself."""
        cause = error.__cause__
        if why := _why_refused(cause):
            if why is Refusal.PLAINTEXT and not await dialling.speaks(address, PATH, PLAIN_ANSWER):
                detail = "it does not speak TLS, nor HTTP as a node does"
                return NotSwarm(address, no_answer.line(Fault.NOT_SWARM, address, detail=detail))
            return NotAdmitted(address, self._said(why))
        if self._identity:  # TLS has shown that it is a member
            return error
        if isinstance(cause, aiohttp.ClientResponseError | aiohttp.ServerDisconnectedError):
            answer = cause.status if isinstance(cause, aiohttp.WSServerHandshakeError) else None
            detail = f"HTTP status {answer}" if answer else "it does not speak HTTP"
            return NotSwarm(address, no_answer.line(Fault.NOT_SWARM, address, detail=detail))
        return error

    async def close(self) -> None:
        """Closes every link and stops serving."""
        self._pages.close()
        if self._client:
            await self._client.close()
        await self._server.close()
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

    async def _incoming(self, request: web.Request) -> web.StreamResponse:
        self._server.arrived(request)
        if "Origin" in request.headers:  # only browsers send it, for web pages
            raise web.HTTPForbidden(text="links are for nodes, not for web pages")
        member = None
        if self._identity:
            connection = ssl_of(request)
            member = _member(connection)
            host = str(_end(request, "peername").rpartition(":")[0].strip("[]"))
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
        self._server.stays(request)
        if self._accept:
            remote, local = _end(request, "peername"), _end(request, "sockname")
            await self._accept(WebSocketLink(socket, remote, local=local, member=member))
        return socket

    def _refuse(self, host: str, why: Refusal) -> None:
        level = logging.DEBUG if why is Refusal.HUNG_UP else logging.WARNING  # port scanners hang up too
        self._refusals.log(level, f"{host} {self._said(why)}")

    def _said(self, why: Refusal) -> str:
        return f"{why.value} (this node's key: {self._identity.keyring})" if self._identity else why.value


@dataclass
class _Target:
    """The node that a request is for. `host` is without a zone."""

    address: str
    host: str
    port: int
    connected: bool = False


_target: ContextVar[_Target] = ContextVar("target")


class _Connector(aiohttp.BaseConnector):
    """Connections to the target of a request; with an identity inside TLS, then it adds them to `made`.

    It connects nowhere else: the answer of a program that is no node must not lead this one elsewhere.
    """

    def __init__(self, identity: Identity | None, made: weakref.WeakSet[asyncio.Transport]) -> None:
        super().__init__(limit=0)
        self._identity = identity
        self._made = made

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: list[aiohttp.tracing.Trace], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        target = _target.get()
        if (req.url.host, req.url.port) != (target.host, target.port):
            raise NotSwarm(
                target.address, no_answer.line(Fault.NOT_SWARM, target.address, detail="it redirects elsewhere")
            )
        sock = await dialling.connect(target.address)
        target.connected = True
        if self._identity is None:
            _, plain = await asyncio.get_running_loop().create_connection(self._factory, sock=sock)
            return plain
        transport, handler = await shake(
            self._factory, sock, self._identity.client, server_side=False, timeout_s=HANDSHAKE_TIMEOUT_S
        )
        self._made.add(transport)
        return handler


def _end(request: web.Request, name: str) -> str:
    """The socket address of an end of a request's connection: `peername` or `sockname`."""
    return _end_of(request.transport.get_extra_info(name) if request.transport else None)


def _end_of(where: tuple[Any, ...] | None) -> str:
    return join_address(zoned(where), where[1]) if where else "unknown"


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
