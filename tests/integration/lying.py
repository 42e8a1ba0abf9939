"""A peer for tests that speaks the protocol well, but for the one thing that a subclass overrides; and bad questions.

The peer lives on an event loop in a thread of the test, listens on loopback like a node (links and bulk data on one
port), and is a seed of one artifact that chooses what it gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Self, TypeAlias

import aiohttp
from aiohttp import web

from swarm.checkpoint import manifest_builder
from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Chunk, Manifest, ModelId
from swarm.errors import TransportError
from swarm.net import websocket
from swarm.net.listener import Listener
from swarm.protocol import messages
from swarm.protocol.messages import Address, Message, NodeId
from swarm.store import Source, Span
from swarm.transport import Outbound, Transfer
from swarm.transport.tcp import MAGIC, TcpTransport

from .processes import DEADLINE_S, MODEL

Question: TypeAlias = Callable[[messages.Announcement], Message]

TOKEN = "0123456789abcdef" * 2


class LyingPeer:
    """`with LyingPeer(manifest, source) as liar:` serves at `liar.address`."""

    superseeds = True

    def __init__(self, manifest: Manifest, source: Source | None = None) -> None:
        self.manifest = manifest
        self.digest = manifest.digest
        self.encoded = manifest.encoded
        self.source = source
        self.asked: list[messages.Request] = []
        self.address = ""
        self._gifts = itertools.cycle(range(len(manifest.chunks)))
        self._opened: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="liar", daemon=True)

    @classmethod
    def of(cls, path: Path) -> Self:
        """One that has this model directory."""
        manifest, source, _ = manifest_builder.checkpoint(path, cache_dir=path.parent / "liar-cache")
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
        announced = messages.Announcement(
            ModelId(MODEL), self.digest, "checkpoint", self.manifest.size, chunks, chunks, self.superseeds
        )
        offers = (messages.Endpoint("tcp", messages.AT_NODE),)
        node = hashlib.sha256(self.address.encode()).hexdigest()[:16]
        name = type(self).__name__
        return messages.Hello(
            messages.PROTOCOL, "9.9", NodeId(node), name, 0, (Address(self.address),), TOKEN, offers, (announced,)
        )

    async def greeted(self, socket: web.WebSocketResponse) -> None:
        """Called when both have said hello."""

    def manifest_parts(self) -> Iterator[messages.ManifestPart]:
        yield messages.ManifestPart(self.digest, len(self.encoded), 0, self.encoded)

    def holdings(self) -> Message:
        return messages.Holdings(self.digest, Bitfield.full(len(self.manifest.chunks)).pack())

    def granted(self, request: messages.Request) -> tuple[int, ...]:
        """The chunks that it says it will send, and sends."""
        count = min(request.count, len(self.manifest.chunks))
        return request.chunks or tuple(sorted(itertools.islice(self._gifts, count)))

    async def answer(self, socket: web.WebSocketResponse, request: messages.Request) -> None:
        """What becomes of a request."""
        chunks = self.granted(request)
        await self.say(socket, messages.Grant(request.transfer, len(self.asked), chunks))
        self.asked.append(request)
        task = asyncio.create_task(self._send(request, chunks))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

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
        app.router.add_get(websocket.PATH, self._talk)
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
                    for message in messages.unpack(frame.data.encode()):
                        await self._hear(socket, message)
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
                await self.answer(socket, message)

    async def _send(self, request: messages.Request, indices: tuple[int, ...]) -> None:
        known = self.manifest.chunks
        chunks = [known[index] for index in indices if index < len(known)]
        with contextlib.suppress(TransportError):
            outbound = await self._tcp.accept(TOKEN, timeout_s=DEADLINE_S)
            transfer = Transfer(request.transfer, sum(chunk.size for chunk in chunks), DEADLINE_S)
            await self.carry(transfer, chunks, outbound)


async def heard(address: str, *questions: Question, last: type[Message] = messages.Bye) -> list[Message]:
    """What a node says to a stranger that asks these questions about its first artifact, until it says a message of
    type `last` or hangs up."""
    found: list[Message] = []
    async with (
        asyncio.timeout(DEADLINE_S),
        aiohttp.ClientSession() as client,
        client.ws_connect(f"http://{address}{websocket.PATH}") as socket,
    ):
        hello = messages.decode((await socket.receive_str()).encode())
        assert isinstance(hello, messages.Hello)
        greeting = messages.Hello(
            messages.PROTOCOL, "9.9", NodeId("f" * 16), "stranger", 0, (Address("127.0.0.1:1"),), TOKEN, (), ()
        )
        for said in (greeting, *(question(hello.artifacts[0]) for question in questions)):
            await socket.send_str(messages.encode(said).decode())
        while (frame := await socket.receive()).type is aiohttp.WSMsgType.TEXT:
            found += messages.unpack(frame.data.encode())
            if any(isinstance(message, last) for message in found):
                break
    return found
