"""The node's few HTTP pages, over aiohttp: who may read them, and how they go out.

Pages are for members of the cluster, and for programs of this machine. There are three kinds: what JSON can say, assets
(bytes that were there before anybody asked) and streams (server-sent events). What a path may contain is fixed by its
pattern; nothing here reads a file, and a page of the web can neither read one nor frame it.

Must not know: what is on the pages, links, TLS.
"""

from __future__ import annotations

import asyncio
import inspect
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from aiohttp import web

from swarm.settings import is_literal, is_loopback, join_address

WATCHERS_MAX = 16  # streams at once: each is a socket, and its reader a person
WRITE_TIMEOUT_S = 10.0  # a browser that reads nothing for so long is gone; it comes back by itself
JSON_SECURITY = {"Content-Security-Policy": "default-src 'none'", "X-Content-Type-Options": "nosniff"}
PAGE_SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Asset:
    """A fixed part of a page; `body` is called when somebody asks for it."""

    content_type: str
    body: Callable[[], bytes]


@dataclass(frozen=True)
class EventPage:
    """Server-sent events: chunks of bytes, each one event or several, for one reader. `events` gets what the pattern of
    the path names, by keyword."""

    events: Callable[..., AsyncGenerator[bytes]]


# What a path shows. A function gets what the pattern of its path names, by keyword, and returns what JSON can say, or
# an awaitable of that; None is 404.
Page: TypeAlias = Asset | EventPage | Callable[..., Any]


class Pages:
    """`pages` by the pattern of their paths, as aiohttp writes them."""

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self._pages = dict(pages)
        self._watching: set[asyncio.Task[Any]] = set()

    def add_to(self, app: web.Application, arrived: Callable[[web.Request], None]) -> None:
        """Adds a route for each; `arrived` is called with every request."""

        def route(path: str, page: Page) -> None:
            async def answer(request: web.Request) -> web.StreamResponse:
                arrived(request)
                if request.transport is None or (ssl_of(request) is None and not _is_local(request)):
                    raise web.HTTPForbidden(text=_refusal(request))
                return await self._answer(request, page)

            app.router.add_get(path, answer)

        for path, page in self._pages.items():
            route(path, page)

    def close(self) -> None:
        """Ends all streams."""
        for task in self._watching:
            task.cancel()

    async def _answer(self, request: web.Request, page: Page) -> web.StreamResponse:
        match page:
            case Asset(content_type, body):
                headers = {**PAGE_SECURITY, "Cache-Control": "no-cache"}
                return web.Response(body=body(), content_type=content_type, charset="utf-8", headers=headers)
            case EventPage(events):
                return await self._stream(request, events(**request.match_info))
            case _:
                said = page(**request.match_info)
                if inspect.isawaitable(said):
                    said = await said
                status = 404 if said is None else 200
                return web.json_response(said, status=status, headers={**JSON_SECURITY, "Cache-Control": "no-store"})

    async def _stream(self, request: web.Request, events: AsyncGenerator[bytes]) -> web.StreamResponse:
        if len(self._watching) >= WATCHERS_MAX:
            raise web.HTTPServiceUnavailable(text=f"{WATCHERS_MAX} watch already", headers={"Retry-After": "10"})
        response = web.StreamResponse(headers={**JSON_SECURITY, "Cache-Control": "no-store"})
        response.content_type = "text/event-stream"
        task = asyncio.current_task()
        assert task is not None
        self._watching.add(task)
        try:
            await response.prepare(request)
            async for event in events:
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await response.write(event)
        except (ConnectionError, TimeoutError):
            if request.transport:
                request.transport.abort()
        finally:
            self._watching.discard(task)
            await events.aclose()
        return response


def ssl_of(request: web.Request) -> ssl.SSLObject | None:
    """The TLS of a request; None where it came in the open."""
    return request.transport.get_extra_info("ssl_object") if request.transport else None


def _refusal(request: web.Request) -> str:
    """What somebody reads who is neither a member nor on this machine."""
    own = request.transport.get_extra_info("sockname") if request.transport else None
    host, port = own[:2] if own else ("HOST", 0)
    address = join_address(host, port)
    return (
        "This page is for members of the cluster, and for browsers and programs of this node's own machine.\n\n"
        f"In a browser elsewhere, forward the port and open http://127.0.0.1:{port}/\n"
        f"    ssh -L {port}:{address} {host}\n\n"
        "In a terminal, with the cluster's key:\n"
        f"    swarm status --watch --peer {address} --key-file KEY\n"
    )


def _is_local(request: web.Request) -> bool:
    """Whether a program of this machine asks, and not a web page whose name was made to lead here."""
    if request.transport is None:
        return False
    own, remote = (str(request.transport.get_extra_info(end)[0]) for end in ("sockname", "peername"))
    try:
        asked = request.url.host or ""
    except ValueError:
        return False
    return (is_loopback(remote) or remote == own) and (is_literal(asked) or is_loopback(asked))
