"""HTTP pages of a node, over aiohttp: access and delivery.

Pages are for members of the cluster and for programs of this machine; `PROBES` also for programs elsewhere that have
the bearer token. A page is JSON, an asset (bytes known in advance) or a stream of server-sent events. No page reads a
file named by its path, and web pages of other origins can neither ask for them nor read or frame them.

Must not know: the contents of pages, links, TLS.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import inspect
import json
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from aiohttp import web

from swarm.errors import LocalProtocolError, SettingsError
from swarm.security import cluster_key
from swarm.settings import is_literal, is_loopback, join_address

PROBES = HEALTH, READY, METRICS = "/healthz", "/readyz", "/metrics"
TOKEN_CHARS_MIN = 16  # of the bearer token: 64 bits in hexadecimal
WATCHERS_MAX = 16  # streams at once; each takes a socket
ANSWERS_MAX = 8  # pages being made or written at once; the status of thousands of members takes megabytes
WRITE_TIMEOUT_S = 10.0  # for a browser that does not read; it reconnects by itself
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


class Bearer:
    """The token of programs that read `PROBES` from elsewhere (RFC 6750); without one none is accepted."""

    def __init__(self, token: str = "") -> None:
        self._token = token

    def take(self, token: str) -> bool:
        """Replaces the token; returns whether it is another one."""
        changed, self._token = token != self._token, token
        return changed

    @property
    def known(self) -> bool:
        """Whether there is a token."""
        return bool(self._token)

    def accepts(self, request: web.Request) -> bool:
        """Whether the request carries the token. The comparison takes the same time for every wrong one."""
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token.encode())
        return self.known and right and kind.lower() == "bearer"


def read_token(path: Path | None) -> str:
    """The token of `metrics_token_file`; empty without a path. Raises SettingsError."""
    if path is None:
        return ""
    data = cluster_key.read_private(path, setting="metrics_token_file", make=f"openssl rand -hex 32 > {path}")
    token = data.decode("ascii", "replace").strip()
    if not (token.isascii() and token.isprintable() and " " not in token and len(token) >= TOKEN_CHARS_MIN):
        raise SettingsError(
            "metrics_token_file", f"{path} holds no token: one line of {TOKEN_CHARS_MIN} or more ASCII characters"
        )
    return token


@dataclass(frozen=True)
class Asset:
    """A fixed part of a page. `body` is called for each request."""

    content_type: str
    body: Callable[[], bytes]


@dataclass(frozen=True)
class EventPage:
    """Server-sent events: each item of `events` is one or more events in bytes. `events` gets the named parts of the
    path as keywords."""

    events: Callable[..., AsyncGenerator[bytes]]


@dataclass(frozen=True)
class HealthPage:
    """Status 200 as long as there are no `problems`, else 503, for probes that read the status alone."""

    problems: Callable[[], list[str]]


# A function gets the named parts of the path as keywords and returns a JSON value or an awaitable of it; None is 404.
Page: TypeAlias = Asset | EventPage | HealthPage | Callable[..., Any]


class Pages:
    """Pages by their paths, in aiohttp's patterns.

    `open_to_all`: they are for each program that reaches them; with a token in `bearer`, METRICS for its holders alone.
    """

    def __init__(self, pages: Mapping[str, Page], *, bearer: Bearer | None = None, open_to_all: bool = False) -> None:
        self._pages = dict(pages)
        self._bearer = bearer or Bearer()
        self._open_to_all = open_to_all
        self._watching: set[asyncio.Task[Any]] = set()
        self._answering = asyncio.Semaphore(ANSWERS_MAX)
        self._stays: Callable[[web.Request], None] = lambda _: None

    def add_to(
        self, app: web.Application, arrived: Callable[[web.Request], None], stays: Callable[[web.Request], None]
    ) -> None:
        """Adds a route for each page; calls `arrived` with every request, `stays` with those that become streams."""
        self._stays = stays

        async def answer(path: str, page: Page, request: web.Request) -> web.StreamResponse:
            arrived(request)
            self._demand_access(path, request)
            if not self._open_to_all and of_web_page(request) and not (isinstance(page, Asset) and _opens(request)):
                raise web.HTTPForbidden(text="not for web pages of others\n")
            if isinstance(page, EventPage):
                return await self._stream(request, page.events(**request.match_info))
            if isinstance(page, HealthPage):  # probes do not wait
                return await self._answer(request, page)
            async with self._answering:  # until it is written: a peer that does not read must not collect answers
                return await _written(request, await self._answer(request, page))

        for path, page in self._pages.items():
            app.router.add_get(path, functools.partial(answer, path, page))

    def _demand_access(self, path: str, request: web.Request) -> None:
        """Raises HTTPForbidden, or HTTPUnauthorized where a token is asked for."""
        if self._open_to_all:
            if path != METRICS or not self._bearer.known or self._bearer.accepts(request):
                return
        elif request.transport and (ssl_of(request) or _is_local(request)):
            return
        elif path not in PROBES or not self._bearer.known:
            raise web.HTTPForbidden(text=_refusal(request))
        elif self._bearer.accepts(request):
            return
        raise web.HTTPUnauthorized(text="needs the token\n", headers={"WWW-Authenticate": 'Bearer realm="swarm"'})

    def close(self) -> None:
        """Ends all streams."""
        for task in self._watching:
            task.cancel()

    async def _answer(self, request: web.Request, page: Page) -> web.Response:
        match page:
            case Asset(content_type, body):
                headers = {**PAGE_SECURITY, "Cache-Control": "no-cache"}
                return web.Response(body=body(), content_type=content_type, charset="utf-8", headers=headers)
            case HealthPage(problems):
                found = problems()
                headers = {**JSON_SECURITY, "Cache-Control": "no-store"}
                return web.json_response({"problems": found}, status=503 if found else 200, headers=headers)
            case EventPage():
                raise LocalProtocolError("a stream is no page of one answer")
            case _:
                said = page(**request.match_info)
                if inspect.isawaitable(said):
                    said = await said
                status = 404 if said is None else 200
                # In UTF-8: escaped, a name takes up to three times the bytes.
                text = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
                headers = {**JSON_SECURITY, "Cache-Control": "no-store"}
                return web.Response(
                    body=text, status=status, content_type="application/json", charset="utf-8", headers=headers
                )

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
            self._stays(request)
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


async def _written(request: web.Request, response: web.Response) -> web.Response:
    """The response, sent. The connection of a peer that does not read it within WRITE_TIMEOUT_S ends."""
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.prepare(request)
            await response.write_eof()
    except (ConnectionError, TimeoutError):
        if request.transport:
            request.transport.abort()
    return response


def ssl_of(request: web.Request) -> ssl.SSLObject | None:
    """The TLS connection of a request; None for plain HTTP."""
    return request.transport.get_extra_info("ssl_object") if request.transport else None


def of_web_page(request: web.Request) -> bool:
    """Whether a browser sends the request for a web page of another origin. Its script could not read the answer, but
    hold streams open, and have this node ask others."""
    if "Sec-Fetch-Site" in request.headers:
        return request.headers["Sec-Fetch-Site"] not in ("none", "same-origin")
    return request.headers.get("Origin", f"http://{request.host}") != f"http://{request.host}"


def _opens(request: web.Request) -> bool:
    """Whether a user follows a link to a page."""
    headers = request.headers
    return (headers.get("Sec-Fetch-Mode"), headers.get("Sec-Fetch-Dest")) == ("navigate", "document")


def _refusal(request: web.Request) -> str:
    """The answer to programs of other machines that are not members."""
    own = request.transport.get_extra_info("sockname") if request.transport else None
    host, port = own[:2] if own else ("HOST", 0)
    address = join_address(host, port)
    return (
        "This page is for members of the cluster, and for browsers and programs of this node's own machine.\n\n"
        f"In a browser elsewhere, forward the port and open http://127.0.0.1:{port}/\n"
        f"    ssh -L {port}:{address} {host}\n\n"
        "In a terminal, with the cluster's key:\n"
        f"    swarm status --watch --peer {address} --key-file KEY\n\n"
        f"Probes and Prometheus read {', '.join(PROBES)} on an address of their own (--metrics-listen),\n"
        "or here with a token (metrics_token_file).\n"
    )


def _is_local(request: web.Request) -> bool:
    """Whether the request is from this machine, and not from a web page by DNS rebinding: its host is literal."""
    if request.transport is None:
        return False
    own, remote = (str(request.transport.get_extra_info(end)[0]) for end in ("sockname", "peername"))
    try:
        asked = request.url.host or ""
    except ValueError:
        return False
    return (is_loopback(remote) or remote == own) and (is_literal(asked) or is_loopback(asked))
