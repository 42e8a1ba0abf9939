"""Links: the control connections between nodes, as WebSockets over aiohttp; and the node's few HTTP pages.

A link carries whole messages, in order, both ways, with a bound on their size. It decodes what arrives
(`messages.decode`), pings so that a dead peer is noticed, and knows nothing about what the messages mean. This is the
one place that imports aiohttp.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import aiohttp
from aiohttp import web

from swarm import messages
from swarm.errors import PeerTimeout, PeerUnreachable, RemoteProtocolError, VersionSkew
from swarm.messages import AnyMessage, Message

PATH = "/swarm/link"
HEARTBEAT_S = 5.0  # a peer that answers no ping for this long is gone
SEND_TIMEOUT_S = 10.0  # a peer that does not read its control messages for this long is gone
CLOSE_TIMEOUT_S = 1.0
CONTENT_SECURITY = {"Content-Security-Policy": "default-src 'none'", "X-Content-Type-Options": "nosniff"}

Page = Callable[[], Any]  # what a path shows, as something that JSON can say


class Link(Protocol):
    """One control connection. One task receives; any task sends."""

    remote: str  # the other end's socket address, for logs

    async def send(self, message: Message) -> None:
        """Raises PeerUnreachable when the link is gone, PeerTimeout when the peer does not read."""

    async def receive(self) -> AnyMessage:
        """The next message. Raises PeerUnreachable at the end, RemoteProtocolError for anything that is not a
        message."""

    async def close(self) -> None:
        """Ends the link; never raises."""


class WebSocketLink:
    """A link over an open WebSocket of either side."""

    def __init__(self, socket: web.WebSocketResponse | aiohttp.ClientWebSocketResponse, remote: str) -> None:
        self.remote = remote
        self._socket = socket

    async def send(self, message: Message) -> None:
        """See Link."""
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._socket.send_str(messages.encode(message).decode())
        except TimeoutError:
            raise PeerTimeout(self.remote, f"did not read its messages for {SEND_TIMEOUT_S:g} s") from None
        except (ConnectionError, RuntimeError, aiohttp.ClientError) as error:
            raise PeerUnreachable(self.remote, str(error) or "the link is closed") from error
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise PeerUnreachable(self.remote, "another message was not read") from None

    async def receive(self) -> AnyMessage:
        """See Link."""
        frame = await self._socket.receive()
        if frame.type is aiohttp.WSMsgType.TEXT:
            try:
                return messages.decode(frame.data.encode())
            except messages.OtherProtocol as other:
                raise VersionSkew(
                    self.remote, theirs=other.protocol, ours=messages.PROTOCOL, software=other.software
                ) from other
            except ValueError as error:
                raise RemoteProtocolError(self.remote, f"sent what is no message: {error}") from error
        if frame.type is aiohttp.WSMsgType.BINARY:
            raise RemoteProtocolError(self.remote, "sent a binary frame; messages are text")
        if isinstance(frame.data, aiohttp.WebSocketError):
            raise RemoteProtocolError(self.remote, f"broke the WebSocket protocol: {frame.data}")
        if frame.type is aiohttp.WSMsgType.ERROR:
            raise PeerUnreachable(self.remote, str(self._socket.exception() or "the link broke"))
        raise PeerUnreachable(self.remote, "closed the link")

    async def close(self) -> None:
        """See Link."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._socket.close()
        except (TimeoutError, ConnectionError, RuntimeError, aiohttp.ClientError):
            return  # it is gone either way
        except asyncio.CancelledError:
            if _is_cancelled():
                raise


class HttpLinks:
    """Dials links and accepts them on sockets that a listener hands over."""

    def __init__(self, pages: Mapping[str, Page] | None = None) -> None:
        self._pages = dict(pages or {})
        self._accept: Callable[[Link], Awaitable[None]] | None = None
        self._runner: web.AppRunner | None = None
        self._client: aiohttp.ClientSession | None = None

    async def open(self, accept: Callable[[Link], Awaitable[None]]) -> None:
        """Starts to serve. `accept` is awaited for every incoming link, and the link lives as long as that takes."""
        self._accept = accept
        app = web.Application(client_max_size=0)
        app.router.add_get(PATH, self._incoming)
        for path in self._pages:
            app.router.add_get(path, self._page)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=CLOSE_TIMEOUT_S)
        await self._runner.setup()
        self._client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def adopt(self, sock: socket.socket) -> None:
        """Speaks HTTP on an accepted socket."""
        server = self._runner.server if self._runner else None
        if server is None:
            sock.close()
            return
        await asyncio.get_running_loop().connect_accepted_socket(server, sock)

    async def dial(self, address: str, *, timeout_s: float) -> Link:
        """A link to the node that listens at HOST:PORT. Raises PeerUnreachable or PeerTimeout."""
        if self._client is None or self._client.closed:
            raise PeerUnreachable(address, "this node is not open")
        try:
            async with asyncio.timeout(timeout_s):
                socket = await self._client.ws_connect(
                    f"http://{address}{PATH}",
                    heartbeat=HEARTBEAT_S,
                    max_msg_size=messages.FRAME_BYTES_MAX,
                    autoclose=True,
                )
        except TimeoutError:
            raise PeerTimeout(address, f"no answer within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            cause = getattr(error, "os_error", error)  # aiohttp's own words speak of TLS where there is none
            raise PeerUnreachable(address, getattr(cause, "strerror", None) or str(cause)) from error
        return WebSocketLink(socket, address)

    async def close(self) -> None:
        """Closes every link and stops serving."""
        if self._client:
            await self._client.close()
        if self._runner:
            await self._runner.cleanup()

    async def _incoming(self, request: web.Request) -> web.StreamResponse:
        if "Origin" in request.headers:  # only browsers send it, on behalf of pages that have no business here
            raise web.HTTPForbidden(text="links are for nodes, not for web pages")
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=messages.FRAME_BYTES_MAX)
        await socket.prepare(request)
        if self._accept:
            await self._accept(WebSocketLink(socket, _remote(request)))
        return socket

    async def _page(self, request: web.Request) -> web.Response:
        return web.json_response(self._pages[request.path](), headers=CONTENT_SECURITY)


def _is_cancelled() -> bool:
    """Whether this task was cancelled. All writers of an aiohttp socket wait for one future, so that giving up one
    send cancels it, and raises CancelledError in tasks that nobody has cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _remote(request: web.Request) -> str:
    peer = request.transport.get_extra_info("peername") if request.transport else None
    return f"{peer[0]}:{peer[1]}" if peer else "unknown"
