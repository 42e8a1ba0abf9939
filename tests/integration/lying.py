"""A peer for tests that speaks the protocol well, but for the one thing that a subclass overrides.

It lives on an event loop in a thread of the test, listens on loopback like a node (links and bulk data on one port),
and announces one artifact in full.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Self

import aiohttp
from aiohttp import web

from swarm import build, link, messages
from swarm.bitfield import Bitfield
from swarm.errors import TransportError
from swarm.listener import Listener
from swarm.manifest import Chunk, Manifest
from swarm.messages import Message
from swarm.store import Source, Span
from swarm.transport import Outbound, Transfer
from swarm.transport.tcp import MAGIC, TcpTransport

from .processes import DEADLINE_S, MODEL

TOKEN = "0123456789abcdef" * 2


class LyingPeer:
    """`with LyingPeer(manifest, source) as liar:` serves at `liar.address`."""

    def __init__(self, manifest: Manifest, source: Source | None = None) -> None:
        self.manifest = manifest
        self.digest = manifest.digest
        self.encoded = manifest.encoded
        self.source = source
        self.asked: list[messages.Request] = []
        self.address = ""
        self._opened: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="liar", daemon=True)

    @classmethod
    def of(cls, path: Path) -> Self:
        """One that has this model directory."""
        manifest, source, _ = build.checkpoint(path, cache_dir=path.parent / "liar-cache")
        return cls(manifest, source)

    def __enter__(self) -> Self:
        self._thread.start()
        self.address = self._opened.result(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(DEADLINE_S)
        if self.source:
            self.source.close()

    # What subclasses override

    def hello(self) -> messages.Hello:
        chunks = len(self.manifest.chunks)
        announced = messages.Announcement(MODEL, self.digest, "checkpoint", self.manifest.size, chunks, chunks)
        offers = (messages.Offer("tcp", self.address),)
        node = hashlib.sha256(self.address.encode()).hexdigest()[:16]
        name = type(self).__name__
        return messages.Hello(messages.PROTOCOL, "9.9", node, name, self.address, TOKEN, offers, (announced,))

    async def greeted(self, socket: web.WebSocketResponse) -> None:
        """Called when both have said hello."""

    def manifest_parts(self) -> Iterator[messages.ManifestPart]:
        yield messages.ManifestPart(self.digest, len(self.encoded), 0, self.encoded)

    def holdings(self) -> Message:
        return messages.Holdings(self.digest, Bitfield.full(len(self.manifest.chunks)).pack())

    async def carry(self, transfer: Transfer, chunks: list[Chunk], outbound: Outbound) -> None:
        """Sends a granted transfer."""
        await outbound.send(transfer, self.spans(chunks))

    def spans(self, chunks: list[Chunk]) -> Iterator[Span]:
        assert self.source is not None
        for chunk in chunks:
            yield from self.source.spans(chunk)

    # Life

    async def _live(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self._sending: set[asyncio.Task[None]] = set()
        listener = await Listener.open("127.0.0.1", 0)
        self.address = "{}:{}".format(*listener.address)
        self._tcp = TcpTransport(*listener.address)
        self._tcp.admit(TOKEN)
        app = web.Application()
        app.router.add_get(link.PATH, self._talk)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
        await runner.setup()

        async def adopt(sock: socket.socket) -> None:
            assert runner.server is not None
            await self._loop.connect_accepted_socket(runner.server, sock)

        listener.serve({MAGIC: self._tcp.adopt}, adopt)
        self._opened.set_result(self.address)
        await self._stopped.wait()
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        await listener.close()
        await runner.cleanup()
        await self._tcp.close()

    async def _talk(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=messages.FRAME_BYTES_MAX)
        await socket.prepare(request)
        with contextlib.suppress(ConnectionError, RuntimeError):  # whoever is lied to hangs up
            await self.say(socket, self.hello())
            async for frame in socket:
                if frame.type is aiohttp.WSMsgType.TEXT:
                    await self._hear(socket, messages.decode(frame.data.encode()))
        return socket

    async def say(self, socket: web.WebSocketResponse, message: Message) -> None:
        await socket.send_str(messages.encode(message).decode())

    async def _hear(self, socket: web.WebSocketResponse, message: messages.AnyMessage) -> None:
        match message:
            case messages.Hello():
                await self.greeted(socket)
            case messages.ManifestRequest():
                for part in self.manifest_parts():
                    await self.say(socket, part)
            case messages.OriginRequest(digest):
                await self.say(socket, messages.OriginReply(digest, None))
            case messages.Interest():
                await self.say(socket, self.holdings())
            case messages.Request():
                await self.say(socket, messages.Grant(message.transfer, len(self.asked)))
                self.asked.append(message)
                task = asyncio.create_task(self._send(message))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)

    async def _send(self, request: messages.Request) -> None:
        chunks = [self.manifest.chunks[index] for index in request.chunks]
        with contextlib.suppress(TransportError):
            outbound = await self._tcp.accept(TOKEN, timeout_s=DEADLINE_S)
            transfer = Transfer(request.transfer, sum(chunk.size for chunk in chunks), DEADLINE_S)
            await self.carry(transfer, chunks, outbound)
