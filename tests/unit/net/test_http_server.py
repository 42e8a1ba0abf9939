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
