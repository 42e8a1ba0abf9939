"""The HTTP server: which connections does it end?"""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from aiohttp import web

from swarm.net import http_server
from swarm.net.http_server import HttpServer


def test_is_a_request_answered_that_came_while_the_loop_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "REQUEST_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        server = HttpServer()

        async def answer(request: web.Request) -> web.Response:
            server.arrived(request)
            return web.Response(text="here")

        app = web.Application()
        app.router.add_get("/", answer)
        await server.open(app)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        adopting = asyncio.create_task(server.adopt(ours))
        while not server._visitors:  # noqa: ASYNC110 - it is adopted at once
            await asyncio.sleep(0)
        theirs.send(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        time.sleep(0.3)  # noqa: ASYNC251 - the loop stands still
        with theirs:
            assert (await asyncio.get_running_loop().sock_recv(theirs, 1000)).startswith(b"HTTP/1.1 200 ")
        await adopting
        await server.close()

    async def within_deadline() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(within_deadline())


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
@pytest.mark.parametrize(
    "body", [b"Content-Length: 9\r\n\r\nnonsense!", b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nx\r\n"]
)
def test_leaves_a_body_that_is_none_nothing_in_the_log(
    coding: str, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Strangers send it, as often as they like."""

    async def scenario() -> None:
        server = HttpServer()

        async def answer(request: web.Request) -> web.Response:
            server.arrived(request)
            return web.Response(text="here")

        app = web.Application(client_max_size=0)
        app.router.add_get("/", answer)
        await server.open(app)
        for method in (b"GET", b"POST"):
            ours, theirs = socket.socketpair()
            for sock in (ours, theirs):
                sock.setblocking(False)
            head = b" / HTTP/1.1\r\nHost: x\r\nContent-Encoding: " + coding.encode() + b"\r\n"
            theirs.send(method + head + body)
            with theirs:
                await asyncio.gather(server.adopt(ours), _closed(theirs))
        await server.close()

    async def _closed(sock: socket.socket) -> None:
        assert (await asyncio.get_running_loop().sock_recv(sock, 1000)).startswith(b"HTTP/1.")
        sock.close()

    async def within_deadline() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(within_deadline())
    assert caplog.text == ""
