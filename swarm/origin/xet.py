"""Ranges of the hub's large files out of its xet storage, where the package hf_xet is installed.

    HEAD {endpoint}/{model}/resolve/{commit}/{path}   once a file: its name in xet, and the address of its tokens
    GET  that address, at the endpoint                until it expires: a token, and the address of the storage
    hf_xet                                            the bytes of a range, in order, from the storage

These ranges are no requests to the hub, which counts and limits them. hf_xet opens connections, retries and adapts to
the link by itself; it gets a token of xet, never the user's. It hands over what it has of a range at once, so that a
range is read in pieces that take about a second. After its first failure all is read over HTTP.

What its API cannot do shapes the rest: a stream that is read cannot be cancelled from another thread, but its group
can; and a broken stream may end without an error, so that bytes are counted.

Must not know: how the hub lists models, who holds the user's token.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

from swarm.content.promise import SHA256, ListedFile, Listing
from swarm.errors import OriginUnreachable
from swarm.origin import http

HUB = "https://huggingface.co"  # in addresses that a mirror of the hub passes on
RANGE_BYTES_MIN = 1 << 20  # less is not worth two requests
PIECE_FIRST_BYTES, PIECE_MOST_BYTES, PIECE_S = 4 << 20, 64 << 20, 1.0
TOKEN_LEFT_S = 60.0
TOKEN_BYTES_MAX = 64 << 10
CONFIG = {"client.connect_timeout": "10s", "client.read_timeout": "15s", "client.retry_max_attempts": 1}
_NAME = re.compile("[0-9a-f]{64}")

Ask = Callable[..., http.Response]  # `http.request` with the user's token

log = logging.getLogger("swarm")


def usable(environment: Mapping[str, str]) -> bool:
    """Whether hf_xet is here, and not turned off as for huggingface_hub."""
    off = environment.get("HF_HUB_DISABLE_XET", "").upper() in ("1", "ON", "YES", "TRUE")
    return not off and importlib.util.find_spec("hf_xet") is not None


@dataclass(frozen=True)
class _Token:
    storage: str
    secret: str
    expires_s: int


class XetStorage:
    """The xet storage behind a hub at `address`. `clock`: the time of day, which tokens carry."""

    def __init__(self, address: str, ask: Ask, *, clock: Callable[[], float] = time.time) -> None:
        self._address = address
        self._ask = ask
        self._clock = clock
        self._lock = threading.Lock()
        self._files: dict[tuple[str, str, str], tuple[str, str] | None] = {}  # name and address of tokens, by file
        self._tokens: dict[str, _Token] = {}
        self._session: Any = None
        self._broken = False

    def open(self, listing: Listing, file: ListedFile, offset: int, size: int) -> XetStream | None:
        """A stream of a range; None if the file is not in xet, or xet has failed before. Raises OriginError."""
        if self._broken or size < RANGE_BYTES_MIN or not file.content.startswith(SHA256):
            return None
        with self._lock:  # other streams of the file wait for the same answers
            named = self._named(listing, file)
            token = self._token(named[1]) if named else None
            if named is None or token is None:
                return None
            try:
                group, info = self._group(token, named[0], file.size)
            except Exception as error:
                self.broke(error)
                return None
        return XetStream(self, group, info, f"{urlsplit(self._address).netloc}: {file.path}", offset, size)

    def broke(self, why: object) -> None:
        """hf_xet has failed."""
        if not self._broken:
            log.info("hf_xet cannot read from the storage of %s (%s); the rest is read over HTTP", self._address, why)
        self._broken = True

    def _named(self, listing: Listing, file: ListedFile) -> tuple[str, str] | None:
        key = listing.source, listing.commit, file.path
        if key not in self._files:
            url = f"{listing.source}/resolve/{listing.commit}/{quote(file.path)}"
            response = self._ask(url, method="HEAD", follow=False)
            response.close()
            if response.status >= 400:  # the request for the bytes says why
                return None
            name = (response.headers.get("X-Xet-Hash") or "").lower()
            linked = re.search(r'<([^>]+)>;\s*rel="xet-auth"', response.headers.get("Link") or "")
            tokens = linked[1] if linked else response.headers.get("X-Xet-Refresh-Route") or ""
            if tokens.startswith(f"{HUB}/"):
                tokens = self._address + tokens.removeprefix(HUB)
            # The user's token goes to the endpoint only.
            there = urlsplit(tokens)[:2] == urlsplit(self._address)[:2]
            self._files[key] = (name, tokens) if there and _NAME.fullmatch(name) else None
        return self._files[key]

    def _token(self, address: str) -> _Token | None:
        known = self._tokens.get(address)
        if known and known.expires_s > self._clock() + TOKEN_LEFT_S:
            return known
        response = self._ask(address)
        try:
            if response.status != 200:
                self.broke(f"{response.status} for a token")
                return None
            said = json.loads(response.read(TOKEN_BYTES_MAX))
            token = _Token(str(said["casUrl"]), str(said["accessToken"]), int(said["exp"]))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            self.broke(f"no token: {error!r}")
            return None
        finally:
            response.close()
        self._tokens[address] = token
        return token

    def _group(self, token: _Token, name: str, size: int) -> tuple[Any, Any]:
        import hf_xet

        if self._session is None:
            self._session = hf_xet.XetSession(hf_xet.XetConfig().with_config(CONFIG))
        group = self._session.new_download_stream_group(
            endpoint=token.storage, token=token.secret, token_expiry_unix_secs=token.expires_s
        )
        return group, hf_xet.XetFileInfo(name, size)


class XetStream:
    """The bytes of a range, in pieces that double while they take less than `PIECE_S`."""

    def __init__(self, storage: XetStorage, group: Any, info: Any, where: str, offset: int, size: int) -> None:
        self._storage = storage
        self._group = group
        self._info = info
        self._where = where
        self._at, self._end = offset, offset + size  # of what is not handed over yet
        self._piece: Any = None
        self._piece_end, self._piece_bytes = offset, PIECE_FIRST_BYTES
        self._began_s = 0.0
        self._rest = memoryview(b"")
        self._closed = False

    def readinto(self, view: memoryview, /) -> int:
        """As `OriginStream`."""
        if self._at == self._end:
            return 0
        if not self._rest:
            self._rest = self._next()
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest, self._at = self._rest[count:], self._at + count
        return count

    def close(self) -> None:
        """As `OriginStream`."""
        self._closed = True
        with contextlib.suppress(Exception):
            self._group.abort()

    def _next(self) -> memoryview:
        if self._closed:
            raise OriginUnreachable(self._where, "was closed")
        try:
            if self._at == self._piece_end:
                now_s = time.monotonic()
                if self._piece and now_s - self._began_s < PIECE_S:
                    self._piece_bytes = min(2 * self._piece_bytes, PIECE_MOST_BYTES)
                self._began_s, self._piece_end = now_s, min(self._at + self._piece_bytes, self._end)
                self._piece = self._group.download_stream(self._info, start=self._at, end=self._piece_end)
            found = memoryview(next(self._piece, b"")).cast("B")
        except BaseException as error:  # also the panics of the library, which are no Exceptions
            self._fail(error)
        if not 0 < len(found) <= self._piece_end - self._at:
            self._fail(f"{len(found)} bytes where {self._piece_end - self._at} are left")
        return found

    def _fail(self, why: object) -> NoReturn:
        if not self._closed:
            self._storage.broke(why)
        raise OriginUnreachable(self._where, f"hf_xet: {str(why)[:200]}")
