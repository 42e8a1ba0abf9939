"""The agent as the Hugging Face hub: `HF_ENDPOINT=http://127.0.0.1:7080` for unmodified programs.

Only whole files leave, whose content was verified: hashed as it came, or compared with the name that the hub lists. The
file must have the stamp of then before and after each piece that is sent, and the last byte is held back until the rest
is proven so. Until then, and until the hub has answered, a program gets `100 Continue` every KEEP_S, which HTTP clients
skip: they would take silence for a dead server after 10 s.

No byte of a file leaves while the rest is on its way. Only the whole file can be compared with its name at the hub, and
a client that has got wrong bytes goes on behind them, by a Range, after its connection was cut.

Loopback by default. A request needs a Host that is an address, localhost or the configured name, so that no web page
reaches the face by DNS rebinding; one that a browser sends for a web page is refused. `hub_api` has the paths.

Must not know: how files come.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import parse_qs

import msgspec
from aiohttp import web

from swarm.agent.agent import Agent
from swarm.agent.artifact import VerifiedFile
from swarm.agent.cache import key_of
from swarm.agent.hub_api import (
    HubRequest,
    byte_range,
    file_headers,
    gguf,
    model_info,
    parse,
    paths_info,
    refs,
    tree,
)
from swarm.agent.hub_files import HubFiles
from swarm.agent.revisions import HubFile, Revision
from swarm.content.manifest import ModelId
from swarm.errors import (
    LINE_CHARS_MAX,
    AgentError,
    ManifestNotFound,
    OriginDenied,
    OriginNotFound,
    RevisionNotFound,
    SettingsError,
    SourceChanged,
    StoreFull,
    SwarmError,
    clean,
)
from swarm.net.http_pages import of_web_page
from swarm.net.http_server import REQUEST_TIMEOUT_S, HttpServer
from swarm.net.listener import Listener
from swarm.observe.prometheus import Figure
from swarm.settings import is_literal, is_loopback, join_address, split_address
from swarm.store.own_files import open_regular

CONNECTIONS_MAX = 1024
STREAMS_MAX = 512  # files that are being sent or waited for
KEEP_S = 3.0
IDLE_S = 60.0  # clients keep their connections for further files
ATTEMPTS = 3
PIECE_BYTES = 8 << 20
PIECE_TIMEOUT_S = 120.0  # a client that takes less than 70 kB/s is let go
PATHS_BYTES_MAX = 1 << 20
FIELDS_MAX = 10_000  # of a form: its paths, and few others
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

T = TypeVar("T")

log = logging.getLogger("swarm")
_strings = msgspec.json.Decoder(dict[str, Any])


class Face:
    """Listens from `open` to `close`. `answered` counts answers by status, `sent_bytes` those of files."""

    def __init__(self, agent: Agent) -> None:
        self.answered: Counter[int] = Counter()
        self.sent_bytes = 0
        self.address = ""
        self._agent = agent
        self._name, _ = split_address("hub_listen", agent.settings.hub_listen, least_port=0)
        self._files = HubFiles(agent)
        self._server = HttpServer(visitors_max=CONNECTIONS_MAX, keep_s=IDLE_S)
        self._listener: Listener | None = None
        self._streams = 0

    async def open(self) -> None:
        """Listens at `hub_listen`. Raises SettingsError."""
        host, port = split_address("hub_listen", self._agent.settings.hub_listen, least_port=0)
        try:
            self._listener = await Listener.open(host, port)
        except SettingsError as error:
            raise SettingsError("hub_listen", error.why) from error
        self.address = self._agent.revisions.own_address = join_address(*self._listener.address)
        if not is_loopback(host):
            log.warning("the hub at %s is open to all machines that reach it: they can read every model", self.address)
        app = web.Application(client_max_size=PATHS_BYTES_MAX)
        app.router.add_route("*", "/{path:.*}", self._answer)
        await self._server.open(app)
        self._listener.serve({}, self._server.adopt)

    async def close(self) -> None:
        """Also before `open`, and twice."""
        listener, self._listener = self._listener, None
        if listener:
            await listener.close()
        await self._server.close()

    def figures(self) -> Iterable[Figure]:
        """The metrics of the face."""
        statuses = {str(status): float(count) for status, count in sorted(self.answered.items())}
        yield Figure("counter", "swarm_hub_answers", "Answers of the face, by status", statuses, "status")
        yield Figure("counter", "swarm_hub_sent_bytes", "Bytes of files that left by the face", {"": self.sent_bytes})
        yield Figure("gauge", "swarm_hub_streams", "Files that are sent or waited for", {"": self._streams})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self._server.arrived(request)
        try:
            self._demand_local_name(request)
            asked = parse(request.rel_url.raw_path)
            allowed = ("POST",) if asked and asked.kind == "paths" else ("GET", "HEAD")
            if asked is None:
                raise web.HTTPNotFound(text="the agent answers for models of the hub alone\n")
            if request.method not in allowed:
                raise web.HTTPMethodNotAllowed(request.method, allowed)
            finding = self._agent.revisions.get(ModelId(asked.model_id), asked.revision, _token(request))
            revision = await _waited(request, finding)
            response = await self._answer_of(request, asked, revision)
        except web.HTTPException as error:
            self._count(request, error)
            raise
        except SwarmError as error:
            response = _failure(error)
        self._count(request, response)
        return response

    def _count(self, request: web.Request, response: web.StreamResponse) -> None:
        """Counts an answer; a refusal leaves a line in the log. Programs try many names: 404 is no warning."""
        self.answered[response.status] += 1
        if response.status >= 400:
            said = response.headers.get("X-Error-Message") or getattr(response, "text", None) or response.reason
            why = clean(said.strip(), chars_max=LINE_CHARS_MAX)
            level = logging.WARNING if response.status >= 500 else logging.INFO
            asked = clean(request.rel_url.raw_path)
            log.log(level, "%s %s: answered %d, %s", request.method, asked, response.status, why)

    async def _answer_of(self, request: web.Request, asked: HubRequest, revision: Revision) -> web.StreamResponse:
        match asked.kind:
            case "file":
                file = revision.files.get(asked.path)
                if file is None:
                    return _error(404, "EntryNotFound", f"{asked.model_id} has no {asked.path} at {revision.commit}")
                return await self._file(request, revision, file)
            case "model":
                return _json(model_info(revision, blobs=_is_true(request.query.get("blobs"))))
            case "refs":
                return _json(refs(revision))
            case "tree":
                return self._tree(request, asked, revision)
            case "paths":
                return _json(paths_info(revision, await _paths(request)))
            case "gguf":
                found = gguf(revision, asked.tag)
                return _json(found) if found else _error(404, "EntryNotFound", f"no GGUF file is of {asked.tag}")

    def _tree(self, request: web.Request, asked: HubRequest, revision: Revision) -> web.Response:
        cursor = request.query.get("cursor", "0")
        start = int(cursor) if cursor.isdecimal() and len(cursor) < 10 else 0
        recursive = _is_true(request.query.get("recursive"))
        entries, following = tree(revision, asked.path, recursive=recursive, start=start)
        if asked.path and not entries:
            return _error(404, "EntryNotFound", f"{asked.model_id} has no directory {asked.path}")
        response = _json(entries)
        if following is not None:
            more = request.url.with_host(request.url.host or "localhost").update_query(cursor=str(following))
            response.headers["Link"] = f'<{more}>; rel="next"'
        return response

    async def _file(self, request: web.Request, revision: Revision, file: HubFile) -> web.StreamResponse:
        headers = file_headers(revision, file)
        await _waited(request, self._agent.revisions.demand_access(revision))
        span = byte_range(request.headers.get("Range"), file.size)
        if span is None:
            return web.Response(status=416, headers={**headers, "Content-Range": f"bytes */{file.size}"})
        first, end = span
        partial = end - first < file.size
        if partial:
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{file.size}"
        response = web.StreamResponse(status=206 if partial else 200, headers=headers)
        response.content_length = end - first
        if request.method == "HEAD":
            await response.prepare(request)
            return response
        if self._streams >= STREAMS_MAX:
            response = _error(503, None, f"{STREAMS_MAX} files are being sent or waited for; try again")
            response.headers["Retry-After"] = "2"
            return response
        self._streams += 1
        try:
            with self._server.busy(request):
                await self._sent(request, response, revision, file, first, end)
        finally:
            self._streams -= 1
        return response

    async def _sent(
        self, request: web.Request, response: web.StreamResponse, revision: Revision, file: HubFile, *span: int
    ) -> None:
        for attempt in range(ATTEMPTS):
            try:
                found = await _waited(request, self._files.get(revision, file))
                with self._agent.cache.in_use(key_of(revision.model_id, revision.commit)):
                    await self._send(request, response, found, *span)
            except SourceChanged:  # evicted, or changed, before it was opened: it comes again
                if response.prepared or attempt == ATTEMPTS - 1:
                    raise
            else:
                return

    async def _send(
        self, request: web.Request, response: web.StreamResponse, found: VerifiedFile, first: int, end: int
    ) -> None:
        """Sends bytes of a file; ends the connection before the last one if it is not the verified one any more."""
        with _opened(found) as fd:
            await response.prepare(request)
            transport = request.transport
            if transport is None or not isinstance(transport, asyncio.WriteTransport):
                raise ConnectionResetError
            try:
                for start in range(first, end - 1, PIECE_BYTES):
                    await self._piece(transport, fd, start, min(start + PIECE_BYTES, end - 1))
                    found.stamp.check_open(found.place, fd.fileno())
                if end > first:
                    await self._piece(transport, fd, end - 1, end)
            except (SourceChanged, TimeoutError, EOFError) as error:
                log.warning("%s: sending it ends: %s", found.place, error or "its client does not read")
                transport.abort()
                raise ConnectionResetError from error
            await response.write_eof()

    async def _piece(self, transport: asyncio.WriteTransport, file: Any, start: int, end: int) -> None:
        if transport.is_closing():  # sendfile would call it a RuntimeError
            raise ConnectionResetError
        async with asyncio.timeout(PIECE_TIMEOUT_S):
            sent = await asyncio.get_running_loop().sendfile(transport, file, start, end - start)
        self.sent_bytes += sent
        if sent != end - start:
            raise EOFError("it became shorter")  # else the next answer would fill the gap

    def _demand_local_name(self, request: web.Request) -> None:
        """Raises HTTPForbidden for a name that may be one of DNS rebinding, or a request that a web page made."""
        try:
            asked = request.url.host or ""
        except ValueError:
            asked = ""
        if not (is_literal(asked) or is_loopback(asked) or asked == self._name):
            raise web.HTTPForbidden(text="name the agent by its address, as in http://127.0.0.1:7080\n")
        if "Origin" in request.headers or of_web_page(request):
            raise web.HTTPForbidden(text="not for web pages\n")


async def _waited(request: web.Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns; the client is kept waiting as HTTP does."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=KEEP_S))[0]:
            transport = request.transport
            if transport is None or transport.is_closing():
                raise ConnectionResetError
            if request.version >= (1, 1) and isinstance(transport, asyncio.WriteTransport):
                transport.write(CONTINUE)
        return await task
    finally:
        task.cancel()


@contextlib.contextmanager
def _opened(found: VerifiedFile) -> Iterator[Any]:
    """The verified file, open. Raises SourceChanged if another one has its place."""
    try:
        file = open_regular(found.place, buffering=0)
    except OSError as error:
        raise SourceChanged(found.place, error.strerror or "it cannot be opened") from error
    with file:
        found.stamp.check_open(found.place, file.fileno())
        yield file


async def _paths(request: web.Request) -> list[str]:
    """The paths of `paths-info`, from a form or from JSON."""
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            data = await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="the body did not arrive\n") from None
    try:
        if request.content_type == "application/json":
            said = _strings.decode(data).get("paths", [])
        else:
            said = parse_qs(data.decode(), max_num_fields=FIELDS_MAX).get("paths", [])
    except (ValueError, RecursionError):
        raise web.HTTPBadRequest(text="paths-info takes a form, or a JSON object\n") from None
    listed = said if isinstance(said, list) else [said]
    return [path for path in listed if isinstance(path, str)]


def _token(request: web.Request) -> str | None:
    """The token of a program, for the origin alone."""
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    token = token.strip()
    return token if kind.lower() == "bearer" and token and token.isascii() and token.isprintable() else None


def _json(value: Any) -> web.Response:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return web.Response(body=text, content_type="application/json", charset="utf-8")


def _failure(error: SwarmError) -> web.Response:
    """What the hub's clients make the right exception of."""
    match error:
        case RevisionNotFound():
            return _error(404, "RevisionNotFound", str(error))
        case OriginDenied():
            return _error(401, "GatedRepo", str(error))
        case OriginNotFound() if "revision" in error.why:
            return _error(404, "RevisionNotFound", str(error))
        case ManifestNotFound() | OriginNotFound():
            return _error(404, "RepoNotFound", str(error))
        case AgentError():
            response = _error(HTTPStatus.SERVICE_UNAVAILABLE, None, str(error))
            response.headers["Retry-After"] = "2"
            return response
        case StoreFull():
            return _error(HTTPStatus.INSUFFICIENT_STORAGE, None, str(error))
        case _:
            return _error(HTTPStatus.BAD_GATEWAY, None, str(error))


def _error(status: int, code: str | None, why: str) -> web.Response:
    # One short line: a header holds no line break, and clients refuse long ones.
    said = clean(why, chars_max=LINE_CHARS_MAX).encode("ascii", "replace").decode()
    headers = {"X-Error-Message": said, **({"X-Error-Code": code} if code else {})}
    return web.json_response({"error": why}, status=status, headers=headers)


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "on")
