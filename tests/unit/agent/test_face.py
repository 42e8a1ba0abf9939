"""The face: how does a file leave it, and what if it changes, does not come, or too many ask?"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from swarm.agent import face as module
from swarm.agent.artifact import VerifiedFile
from swarm.agent.face import Face
from swarm.agent.revisions import HubFile, Revision
from swarm.content.manifest import ModelId
from swarm.errors import (
    AgentError,
    ManifestNotFound,
    OriginDenied,
    OriginNotFound,
    OriginUnreachable,
    SourceChanged,
    StoreFull,
)
from swarm.settings import Settings
from swarm.store.stamp import Stamp

DATA = bytes(range(256)) * 4096
COMMIT = "c" * 40


class FakeAgent:
    """What the face asks of an agent: revisions, and a count of leases."""

    def __init__(self) -> None:
        self.settings = Settings(hub_listen="127.0.0.1:0")
        self.revisions = self
        self.cache = self
        self.node = SimpleNamespace(now=lambda: 0.0)
        self.own_address = ""
        self.tokens: list[str | None] = []
        self.failure: Exception | None = None
        self.denied: Exception | None = None
        self.leases = 0

    async def get(self, model_id: ModelId, asked: str, token: str | None) -> Revision:
        self.tokens.append(token)
        if self.failure:
            raise self.failure
        listed = (("a.bin", len(DATA), "a" * 64), ("empty", 0, "b" * 40), ("own", 1, f"swarm-{'c' * 40}"))
        return Revision(model_id, COMMIT, asked, {path: HubFile(path, size, name) for path, size, name in listed})

    async def demand_access(self, revision: Revision) -> None:
        if self.denied:
            raise self.denied

    @contextlib.contextmanager
    def in_use(self, key: str) -> Iterator[None]:
        assert key == f"org/m@{COMMIT}"
        self.leases += 1
        try:
            yield
        finally:
            self.leases -= 1


class FakeFiles:
    """Files at once, or as a test says."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, data in (("a.bin", DATA), ("empty", b"")):
            (root / name).write_bytes(data)
        self.get: Callable[[Revision, HubFile], Awaitable[VerifiedFile]] = self.at_once

    async def at_once(self, revision: Revision, file: HubFile) -> VerifiedFile:
        return VerifiedFile(self.root / file.path, Stamp.at(self.root / file.path))


@contextlib.asynccontextmanager
async def opened(root: Path) -> AsyncIterator[tuple[Face, FakeAgent, FakeFiles]]:
    agent, files = FakeAgent(), FakeFiles(root)
    made: Any = Face(agent)  # type: ignore[arg-type]
    made._files = files
    await made.open()
    try:
        yield made, agent, files
    finally:
        await made.close()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(within_deadline())


async def ask(face: Face, path: str, *, method: str = "GET", **headers: str) -> tuple[int, bytes, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"http://{face.address}{path}", headers=headers) as answer,
    ):
        return answer.status, await answer.read(), answer.headers


FILE = "/org/m/resolve/main/a.bin"


def test_how_does_a_file_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 100_000)

    async def scenario() -> None:
        async with opened(tmp_path) as (face, agent, _):
            status, body, headers = await ask(face, FILE, Authorization="Bearer hf_x")
            assert (status, body) == (200, DATA)
            assert (headers["ETag"], headers["X-Repo-Commit"]) == (f'"{"a" * 64}"', COMMIT)
            status, body, headers = await ask(face, FILE, Range="bytes=1000-200000")
            assert (status, body) == (206, DATA[1000:200001])
            assert headers["Content-Range"] == f"bytes 1000-200000/{len(DATA)}"
            assert (await ask(face, FILE, Range=f"bytes={len(DATA)}-"))[0] == 416
            status, body, headers = await ask(face, FILE, method="HEAD")
            assert (status, body, headers["Content-Length"]) == (200, b"", str(len(DATA)))
            assert (await ask(face, "/org/m/resolve/main/empty"))[:2] == (200, b"")
            assert (await ask(face, "/org/m/resolve/main/nothing"))[0] == 404
            assert (await ask(face, "/datasets/org/d/resolve/main/x"))[0] == 404
            assert (await ask(face, FILE, method="POST"))[0] == 405
            assert agent.tokens[0] == "hf_x"
            assert set(agent.tokens[1:]) == {None}
            assert agent.leases == 0
            assert face.sent_bytes == len(DATA) + 199001

    run(scenario)


def test_does_llama_cpp_get_what_it_asks(tmp_path: Path) -> None:
    """The requests of `llama-cli -hf org/m:Q8_0`, in their order, as the build of 2026-11 made them."""
    said = {"User-Agent": "llama-cpp/b1", "Accept": "application/json"}

    async def scenario() -> None:
        async with opened(tmp_path) as (face, _, _):
            status, body, _ = await ask(face, "/api/models/org/m/refs", **said)
            assert (status, json.loads(body)["branches"]) == (
                200,
                [{"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}],
            )
            status, body, _ = await ask(face, f"/api/models/org/m/tree/{COMMIT}?recursive=true", **said)
            listed = {each["path"]: each for each in json.loads(body) if each["type"] == "file"}
            assert (listed["a.bin"]["lfs"]["oid"], listed["empty"]["oid"]) == ("a" * 64, "b" * 40)
            assert listed["own"]["oid"] == "", "a name that is no hash makes it leave the file out"
            file = f"/org/m/resolve/{COMMIT}/a.bin"
            status, _, headers = await ask(face, file, method="HEAD", **said)
            assert (status, headers["Content-Length"], headers["Accept-Ranges"]) == (200, str(len(DATA)), "bytes")
            assert (await ask(face, file, **said))[:2] == (200, DATA)
            assert (await ask(face, file, Range="bytes=1000-", **said))[:2] == (206, DATA[1000:])

    run(scenario)


@pytest.mark.parametrize("at", ["the first piece", "the last piece"])
def test_does_a_file_that_changes_meanwhile_never_leave_whole(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 100_000)
    pieces: list[int] = []
    send = Face._piece

    async def piece(face: Face, transport: Any, file: Any, start: int, end: int) -> None:
        await send(face, transport, file, start, end)
        pieces.append(start)
        if len(pieces) == (1 if at == "the first piece" else -(-(len(DATA) - 1) // 100_000)):
            os.utime(tmp_path / "a.bin", ns=(1, 1))  # as a program that writes to it does

    monkeypatch.setattr(Face, "_piece", piece)

    async def scenario() -> None:
        async with opened(tmp_path) as (face, _, _):
            with pytest.raises(aiohttp.ClientError):
                await ask(face, FILE)

    run(scenario)


def test_is_a_program_kept_waiting_as_http_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_S", 0.02)
    ready = asyncio.Event()

    async def scenario() -> None:
        async with opened(tmp_path) as (face, _, files):

            async def later(revision: Revision, file: HubFile) -> VerifiedFile:
                await ready.wait()
                return await files.at_once(revision, file)

            files.get = later
            reader, writer = await asyncio.open_connection(*face.address.split(":"))
            writer.write(f"GET {FILE} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            for _ in range(3):
                assert await reader.readuntil(b"\r\n\r\n") == module.CONTINUE
            ready.set()
            assert (await reader.read()).endswith(DATA)
            writer.close()

    run(scenario)


def test_is_a_program_kept_waiting_for_a_slow_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_S", 0.02)
    ready = asyncio.Event()

    async def scenario() -> None:
        async with opened(tmp_path) as (face, agent, _):
            get = agent.get

            async def later(*asked: Any) -> Revision:
                await ready.wait()
                return await get(*asked)

            monkeypatch.setattr(agent, "get", later)
            reader, writer = await asyncio.open_connection(*face.address.split(":"))
            writer.write(b"GET /api/models/org/m HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            for _ in range(3):
                assert await reader.readuntil(b"\r\n\r\n") == module.CONTINUE
            ready.set()
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()

    run(scenario)


def test_comes_a_file_again_that_was_evicted_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as (face, agent, files):
            calls = 0

            async def evicted(revision: Revision, file: HubFile) -> VerifiedFile:
                nonlocal calls
                calls += 1
                if calls == 1:
                    raise SourceChanged(file.path, "it was evicted at once")
                found = await files.at_once(revision, file)
                return found if calls > 2 else VerifiedFile(tmp_path / "gone", found.stamp)

            files.get = evicted
            assert (await ask(face, FILE))[:2] == (200, DATA)
            files.get = lambda *_: evicted_for_ever()
            assert (await ask(face, FILE))[0] == 502
            assert agent.leases == 0

    async def evicted_for_ever() -> VerifiedFile:
        raise SourceChanged("a.bin", "it was evicted at once")

    run(scenario)


def test_are_files_at_once_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAMS_MAX", 0)

    async def scenario() -> None:
        async with opened(tmp_path) as (face, _, _):
            status, _, headers = await ask(face, FILE)
            assert (status, headers["Retry-After"]) == (503, "2")
            assert (await ask(face, FILE, method="HEAD"))[0] == 200

    run(scenario)


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (OriginDenied("hub", "org/m is gated"), 401, "GatedRepo"),
        (OriginNotFound("hub", "org/m has no revision 'v9'"), 404, "RevisionNotFound"),
        (OriginNotFound("hub", "there is no model org/m"), 404, "RepoNotFound"),
        (ManifestNotFound("org/m", tried=[], waited_s=1.0), 404, "RepoNotFound"),
        (OriginUnreachable("hub", "does not answer"), 502, None),
        (StoreFull("cache", need_bytes=2, free_bytes=1), 507, None),
    ],
)
def test_which_error_does_the_client_get(failure: Exception, status: int, code: str | None, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as (face, agent, _):
            agent.failure = failure
            answered, _, headers = await ask(face, FILE)
            assert (answered, headers.get("X-Error-Code")) == (status, code)
            assert headers["X-Error-Message"]
            assert face.answered == {status: 1}

    run(scenario)


def test_is_a_file_denied_that_the_hub_lists_to_all(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as (face, agent, _):
            agent.denied = OriginDenied("hub", "org/m is gated")
            for method in ("GET", "HEAD"):
                status, body, headers = await ask(face, FILE, method=method)
                assert (status, headers["X-Error-Code"]) == (401, "GatedRepo")
                assert DATA not in body
            assert (await ask(face, "/api/models/org/m/tree/main"))[0] == 200
            agent.denied = AgentError("too much is asked")
            status, _, headers = await ask(face, FILE)
            assert (status, headers["Retry-After"]) == (503, "2")

    run(scenario)


def test_are_connections_bounded_that_have_got_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection counts again once its file is sent."""
    monkeypatch.setattr(module, "CONNECTIONS_MAX", 4)
    request = f"GET {FILE} HTTP/1.1\r\nHost: 127.0.0.1\r\nRange: bytes=0-9\r\n\r\n".encode()

    async def scenario() -> None:
        async with opened(tmp_path) as (face, _, _), contextlib.AsyncExitStack() as open_:
            host, _, port = face.address.rpartition(":")
            readers = []
            for _ in range(12):
                reader, writer = await asyncio.open_connection(host, int(port))
                open_.callback(writer.close)
                writer.write(request)
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 206")
                assert await reader.readexactly(10) == DATA[:10]
                readers.append(reader)
            for reader in readers[:8]:
                assert await _end(reader) == b""

    async def _end(reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.read()
        except ConnectionError:
            return b""

    run(scenario)


BODIES = [
    ("application/json", b'{"paths": ["a.bin", 1]}', 200),
    ("application/x-www-form-urlencoded", b"paths=a.bin&expand=true", 200),
    ("application/x-www-form-urlencoded; charset=nonsense", b"paths=a.bin", 200),
    ("application/json", b"[]", 400),
    ("application/json", b"[" * 100_000, 400),
    ("application/json", b'{"paths": ["\\ud800"]}', 400),
    ("application/x-www-form-urlencoded", b"paths=\xff\xfe", 400),
    ("application/x-www-form-urlencoded", b"a&" * 20_000, 400),
    ("application/x-www-form-urlencoded", b"a=1&" * 20_000, 400),
    ("multipart/form-data", b"abc", 200),
    ("multipart/form-data; boundary=x", b"abc", 200),
]


@pytest.mark.parametrize(("kind", "body", "status"), BODIES)
def test_is_each_body_answered(
    kind: str, body: bytes, status: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as (face, _, _), aiohttp.ClientSession() as session:
            url = f"http://{face.address}/api/models/org/m/paths-info/main"
            async with session.post(url, data=body, headers={"Content-Type": kind}) as answer:
                assert answer.status == status
                if b"a.bin" in body and "multipart" not in kind:
                    assert [entry["path"] for entry in await answer.json()] == ["a.bin"]

    run(scenario)
    assert "Traceback" not in caplog.text


def test_is_a_body_that_does_not_arrive_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", 0.1)
    head = b"POST /api/models/org/m/paths-info/main HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 30\r\n\r\n{"

    async def scenario() -> None:
        async with opened(tmp_path) as (face, _, _):
            host, _, port = face.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head)
            assert (await reader.readline()).startswith(b"HTTP/1.1 408")
            writer.close()

    run(scenario)
