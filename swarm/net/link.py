"""A link: a control connection between two nodes, over an open WebSocket.

It carries whole messages in order, both ways, of bounded size; messages sent together share frames. `websocket` opens
links. Must not know: the meaning of messages, how links are opened.
"""

from __future__ import annotations

import asyncio
import contextlib
from asyncio.trsock import TransportSocket
from collections import deque
from collections.abc import Sequence
from socket import SHUT_RDWR
from typing import Protocol

import aiohttp
from aiohttp import web

from swarm.errors import PeerTimeout, PeerUnreachable, RemoteProtocolError, VersionSkew
from swarm.protocol import messages
from swarm.protocol.messages import AnyMessage, Message

SEND_TIMEOUT_S = 10.0  # a peer that does not read its messages for this long counts as gone
CLOSE_TIMEOUT_S = 1.0


class Link(Protocol):
    """A control connection. A single task receives; any task sends."""

    remote: str  # the other end's socket address; of a dialled link the address that was dialled
    local: str  # this end's socket address
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
        self,
        socket: web.WebSocketResponse | aiohttp.ClientWebSocketResponse,
        remote: str,
        *,
        local: str = "unknown",
        member: str | None = None,
    ) -> None:
        self.remote = remote
        self.local = local
        self.member = member
        self._socket = socket
        self._connection: TransportSocket | None = None
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
                    self._connection.shutdown(SHUT_RDWR)

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


def _is_cancelled() -> bool:
    """Whether this task was cancelled. All writers of an aiohttp socket wait for the same future: the timeout of a send
    cancels it, which raises CancelledError in other tasks too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
