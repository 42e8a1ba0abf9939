"""A stand-in for the Hugging Face hub and its store: one process, threads, real sockets; and what goes wrong with them.

    hub    /api/models/{id}/revision/{rev}, /api/models/{id}/tree/{rev}, /{id}/resolve/{rev}/{path}
    store  another port: addresses signed for one range and for some seconds

`requests` keeps what was asked for. `faults` decide, for each request, what the answer is like.

Also a program: `python tests/hub.py DIRECTORY --model org/model --total 100e6 --each 25e6` prints its endpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

SLICE_BYTES = 64 << 10
Fault = Literal[
    "", "429", "429 now", "500", "503", "403", "truncate", "stall", "wrong", "length", "reset", "whole", "nonsense",
    "other range", "loop",
]  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request: `where` is api, resolve or store; `first` and `size` of its range, -1 and 0 without one."""

    where: str
    path: str
    first: int
    size: int
    authorization: str | None
    fault: str
    host: str = ""
    at: float = field(default_factory=time.time)


@dataclass
class Model:
    """The files of a model, by path. Those of at least `lfs_bytes` are named by their sha256, others by git's sha1."""

    files: dict[str, bytes]
    lfs_bytes: int = 1024
    gated: Literal["", "files", "all"] = ""  # without the token; the hub lists them to all, since October 2024
    private: bool = False  # without the token, the hub says that there is no such model
    xet: bool = False  # names large files for xet too, and serves them by that name at /xet/NAME
    xet_names: dict[str, str] = field(default_factory=dict)  # of files in a real storage, by path
    names: dict[str, str] = field(default_factory=lambda: {"main": ""})

    @property
    def commit(self) -> str:
        state = hashlib.sha1(usedforsecurity=False)
        for path, data in sorted(self.files.items()):
            state.update(path.encode() + sha256(data).encode())
        return state.hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        found = {"path": path, "type": "file", "size": len(data), "oid": git_sha1(data)}
        if len(data) >= self.lfs_bytes:
            found["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            if self.xet:
                found["xetHash"] = self.xet_names.get(path) or xet_name(data)
        return found


_known: dict[tuple[str, int], tuple[bytes, str]] = {}  # by kind and identity, with the bytes, which keeps that unique
_hashing = threading.RLock()  # several requests that need a hash at the same time wait for a single one


def _once(kind: str, data: bytes, make: Callable[[bytes], str]) -> str:
    """A hash, made once for each object: a hub does not hash its models for each request."""
    key = kind, id(data)
    with _hashing:
        if key not in _known:
            _known[key] = data, make(data)
        return _known[key][1]


def sha256(data: bytes) -> str:
    """The name of a large file's content at the hub."""
    return _once("sha256", data, lambda given: hashlib.sha256(given).hexdigest())


def xet_name(data: bytes) -> str:
    """Stands for the name of a content in xet: another one than its sha256, of the same form."""
    return sha256(sha256(data).encode())


def git_sha1(data: bytes) -> str:
    """The name of a file's content in git."""
    return _once("git", data, _git_sha1)


def _git_sha1(data: bytes) -> str:
    state = hashlib.sha1(b"blob %d\0" % len(data), usedforsecurity=False)
    state.update(data)
    return state.hexdigest()


class Shaper:
    """Bytes of all connections at `total`, of each at `each`, in bytes per second; None for no limit."""

    def __init__(self, total: float | None, each: float | None) -> None:
        self.total, self.each = total, each
        self._free_at = 0.0
        self._lock = threading.Lock()

    def spend(self, size: int, own: list[float]) -> None:
        now = time.monotonic()
        wait_s = 0.0
        if self.total:
            with self._lock:
                self._free_at = max(self._free_at, now) + size / self.total
                wait_s = self._free_at - now
        if self.each:
            own[0] = max(own[0], now) + size / self.each
            wait_s = max(wait_s, own[0] - now)
        if wait_s > 0:
            time.sleep(wait_s)


class Hub:
    """`with Hub({"org/model": Model(files)}) as hub:` serves until the end of the block, at `hub.endpoint`."""

    def __init__(
        self,
        models: dict[str, Model],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        total: float | None = None,
        each: float | None = None,
        token: str | None = None,
        signed: bool = True,
        bare: bool = False,
        store_host: str | None = None,
    ) -> None:
        self.models = models
        self.token = token
        self.signed = signed
        self.xet_storage = ""  # that tokens of xet are for
        self.xet_tokens = ""  # their address, where it is not the usual one
        self.bare = bare  # `revision` tells no sizes, as older hubs do
        self.signed_s = 60.0
        self.requests: list[Asked] = []
        self.sent_bytes = 0
        self.fault: Callable[[Asked], Fault] = lambda _: ""
        self.retry_after: str | None = "1"
        self.shaper = Shaper(total, each)
        self._key = secrets.token_bytes(16)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._hub = _Server((host, port), self, "hub")
        store_host = store_host or host
        self._store = _Server((store_host, 0), self, "store")
        self.endpoint = f"http://{host}:{self._hub.server_address[1]}"
        self.store = f"http://{store_host}:{self._store.server_address[1]}"

    def __enter__(self) -> Hub:
        for server in (self._hub, self._store):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        for server in (self._hub, self._store):
            server.shutdown()
            server.server_close()

    def asked(self, where: str) -> list[Asked]:
        """The requests for a place."""
        return [asked for asked in list(self.requests) if asked.where == where]

    def copies(self, model_id: str = "org/model") -> float:
        """Bytes that went out, in sizes of the model."""
        return self.sent_bytes / sum(map(len, self.models[model_id].files.values()))

    def note(self, asked: Asked) -> None:
        with self._lock:
            self.requests.append(asked)

    def signature(self, model_id: str, path: str, ranged: str, until: str) -> str:
        text = f"{model_id}\n{path}\n{ranged}\n{until}".encode()
        return hmac.new(self._key, text, "sha256").hexdigest()

    def pause(self, seconds: float) -> None:
        self._closing.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], hub: Hub, kind: str) -> None:
        self.hub, self.kind = hub, kind
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self._own = [0.0]
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.server.kind == "store":
            self._serve_store()
        elif self.path.startswith("/api/models/"):
            self._serve_api()
        elif self.path == "/api/xet-token":
            self._serve_xet_token()
        elif self.path.startswith("/xet/"):
            self._serve_xet()
        else:
            self._serve_resolve()

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def _note(self, where: str, path: str) -> Asked:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, size = (int(match[1]), int(match[2]) - int(match[1]) + 1) if match else (-1, 0)
        asked = Asked(where, path, first, size, self.headers.get("Authorization"), "", self.headers.get("Host", ""))
        asked = Asked(*(*_fields(asked)[:5], self.hub.fault(asked), asked.host))
        self.hub.note(asked)
        return asked

    def _serve_api(self) -> None:
        match = re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/?]+)(?:\?.*)?", self.path)
        asked = self._note("api", self.path)
        if self._failed(asked):
            return
        model_id, kind, revision = (unquote(part) for part in match.groups()) if match else ("", "", "")
        model = self._model(model_id, revision, lists=True)
        if model is None:
            return
        entries = [model.entry(path) for path in sorted(model.files)]
        if kind == "tree":
            self._page(entries)
            return
        siblings = []
        for entry in entries:
            sibling: dict[str, Any] = {"rfilename": entry["path"]}
            if "blobs=true" in self.path.lower() and not self.hub.bare:
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}
            siblings.append(sibling)
        gated = "manual" if model.gated else False
        said = {"id": model_id, "modelId": model_id, "sha": model.commit, "gated": gated, "siblings": siblings}
        self._json(said)

    def _page(self, entries: list[dict[str, Any]], each: int = 50) -> None:
        query = parse_qs(urlsplit(self.path).query)
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + each < len(entries):
            base = urlsplit(self.path).path
            headers["Link"] = f'<{self.hub.endpoint}{base}?recursive=true&cursor={start + each}>; rel="next"'
        self._json(entries[start : start + each], headers)

    def _serve_resolve(self) -> None:
        match = re.fullmatch(r"/(.+?)/resolve/([^/]+)/([^?]+)(?:\?.*)?", self.path)
        model_id, revision, path = (unquote(part) for part in match.groups()) if match else ("", "", "")
        asked = self._note("resolve", path)
        if self._failed(asked):
            return
        model = self._model(model_id, revision)
        if model is None:
            return
        if path not in model.files:
            self._error(404, "EntryNotFound")
            return
        entry = model.entry(path)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"X-Repo-Commit": model.commit, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
        if "xetHash" in entry:
            headers |= {"X-Xet-Hash": entry["xetHash"], "X-Xet-Refresh-Route": self._xet_tokens()}
        if asked.fault == "loop":
            self._redirect(self.path, headers)
        elif "lfs" in entry:
            ranged = self.headers.get("Range", "") if self.hub.signed else ""
            until = f"{time.time() + self.hub.signed_s:.3f}"
            signed = self.hub.signature(model_id, path, ranged, until)
            where = f"{self.hub.store}/{quote(model_id)}/{quote(path)}?until={until}&signature={signed}"
            self._redirect(where, headers)
        else:
            self._body(asked, model.files[path], {**headers, "ETag": f'"{etag}"'})

    def _xet_tokens(self) -> str:
        return self.hub.xet_tokens or f"{self.hub.endpoint}/api/xet-token"

    def _serve_xet_token(self) -> None:
        asked = self._note("xet token", self.path)
        if not self._failed(asked):
            until = int(time.time()) + 3600
            self._json({"accessToken": "of-xet", "exp": until, "casUrl": self.hub.xet_storage})

    def _serve_xet(self) -> None:
        name = self.path.removeprefix("/xet/")
        asked = self._note("store", name)
        contents = {xet_name(data): data for model in self.hub.models.values() for data in model.files.values()}
        if name in contents:
            self._body(asked, contents[name], {})
        else:
            self._error(404, None)

    def _serve_store(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        model_id, path = _split(unquote(parts.path[1:]), self.hub)
        asked = self._note("store", path)
        if self._failed(asked):
            return
        ranged = self.headers.get("Range", "") if self.hub.signed else ""
        until = query.get("until", "0")
        right = self.hub.signature(model_id, path, ranged, until)
        if not hmac.compare_digest(right, query.get("signature", "")) or time.time() > float(until):
            self._error(403, None)
            return
        data = self.hub.models[model_id].files[path]
        self._body(asked, data, {"ETag": f'"{sha256(data)}"'})

    def _model(self, model_id: str, revision: str, *, lists: bool = False) -> Model | None:
        model = self.hub.models.get(model_id)
        allowed = self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if model is None or (model.private and not allowed):
            self._error(404 if allowed else 401, "RepoNotFound")
        elif not allowed and model.gated and not (lists and model.gated == "files"):
            self._error(401, "GatedRepo")
        elif revision not in (model.commit, *model.names):
            self._error(404, "RevisionNotFound")
        else:
            return model
        return None

    def _failed(self, asked: Asked) -> bool:
        fault = asked.fault
        if fault in ("429", "429 now", "500", "503"):
            headers = {"Retry-After": self.hub.retry_after} if fault == "429" and self.hub.retry_after else {}
            self._send(int(fault[:3]), b"later", headers)
        elif fault == "403":
            self._error(403, None)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True
            self.connection.close()
        elif fault == "nonsense":
            self.close_connection = True
            self.wfile.write(b"\0\1\2 this is not HTTP\r\n\r\n")
        else:
            return False
        return True

    def _body(self, asked: Asked, data: bytes, headers: dict[str, str]) -> None:
        total = len(data)
        first, size = (asked.first, asked.size) if asked.first >= 0 and asked.fault != "whole" else (0, total)
        if asked.fault == "other range" and first:
            first -= 1
        if first >= total > 0:
            self._send(416, b"", {"Content-Range": f"bytes */{total}"})
            return
        part = data[first : first + size]
        if asked.fault == "wrong" and part:
            part = bytes([part[0] ^ 1]) + part[1:]
        length = len(part) + (1 if asked.fault == "length" else 0)
        self.send_response(206 if asked.first >= 0 and asked.fault != "whole" else 200)
        if asked.first >= 0 and asked.fault != "whole":
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{total}")
        for name, value in {**headers, "Content-Length": str(length), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = len(part) // 2 if asked.fault in ("truncate", "stall") else len(part)
        self._pour(part[:stop])
        if asked.fault == "stall":
            self.hub.pause(120.0)
        if asked.fault in ("truncate", "stall", "length"):
            self.close_connection = True

    def _pour(self, part: bytes) -> None:
        view = memoryview(part)
        while view:
            piece, view = view[:SLICE_BYTES], view[SLICE_BYTES:]
            self.hub.shaper.spend(len(piece), self._own)
            self.wfile.write(piece)
            with self.hub._lock:
                self.hub.sent_bytes += len(piece)

    def _redirect(self, where: str, headers: dict[str, str]) -> None:
        self._send(302, b"", {**headers, "Location": where})

    def _error(self, status: int, code: str | None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code} if code else {})

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _fields(asked: Asked) -> list[Any]:
    return [asked.where, asked.path, asked.first, asked.size, asked.authorization, asked.fault, asked.host]


def _split(text: str, hub: Hub) -> tuple[str, str]:
    for model_id in hub.models:
        if text.startswith(f"{model_id}/"):
            return model_id, text[len(model_id) + 1 :]
    return "", text


def read_files(root: Path) -> dict[str, bytes]:
    """Every file below a directory, by path."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@contextlib.contextmanager
def hub_of(root: Path, model_id: str = "org/model", **options: Any) -> Iterator[Hub]:
    """A hub with one model."""
    with Hub({model_id: Model(read_files(root))}, **options) as hub:
        yield hub


def main() -> None:
    """Serves a directory until it is stopped; prints its endpoint, and at a line of input what was asked so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", default="org/model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--total", type=float, default=None, help="bytes per second of all connections together")
    parser.add_argument("--each", type=float, default=None, help="bytes per second of each connection")
    parser.add_argument("--unsigned", action="store_true", help="addresses of the store are good for any range")
    options = parser.parse_args()
    how = {name: getattr(options, name) for name in ("host", "port", "total", "each")}
    with hub_of(options.directory, options.model, signed=not options.unsigned, **how) as hub:
        for model in hub.models.values():  # hashed now, not while the first clients wait
            _ = model.commit, [model.entry(path) for path in model.files]
        print(hub.endpoint, flush=True)
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while True:
                input()
                counts = {where: len(hub.asked(where)) for where in ("api", "resolve", "store")}
                sent = {"sent_bytes": hub.sent_bytes, "copies": hub.copies(options.model)}
                reads = [[round(asked.at, 3), asked.path, asked.first, asked.size] for asked in hub.asked("resolve")]
                print(json.dumps({**counts, **sent, "reads": reads}), flush=True)
                hub.requests.clear()
                hub.sent_bytes = 0


if __name__ == "__main__":
    main()
