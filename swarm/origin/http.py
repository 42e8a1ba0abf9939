"""HTTP for origins: a request, its redirects, and a body that is read into the caller's memory.

One connection a request, with http.client on the caller's thread: a range of 64 MiB hides its cost, and `readinto`
fills the final memory without a copy. Proxies (`HTTPS_PROXY`, `NO_PROXY`) and certificates (`REQUESTS_CA_BUNDLE`,
`SSL_CERT_FILE`) are taken from the environment, as other clients of hubs do.

`Authorization` is sent to the host of the first request only. A redirect from https to http is refused, and so is one
from elsewhere to this machine or to the services of its cloud.

Must not know: which service it is, what is in the body.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import functools
import http.client
import ipaddress
import math
import os
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from swarm import __version__
from swarm.errors import (
    OriginBusy,
    OriginChanged,
    OriginDenied,
    OriginError,
    OriginNotFound,
    OriginUnreachable,
    OriginUnusable,
)

CONNECT_TIMEOUT_S = 10.0
SILENCE_S = 15.0
WHOLE_S = 60.0  # for an answer that is read as a whole: lists of files, tokens
REDIRECTS_MAX = 8
SKIP_BYTES = 1 << 20
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_CLOSED = (ValueError, AttributeError)  # raised by a read whose response another thread closes meanwhile
_BROKEN = (OSError, http.client.HTTPException, UnicodeError)
_OF_CLOUDS = ("fd00:ec2::254", "100.100.100.200", "168.63.129.16")  # of AWS, Alibaba, Azure; others are link-local
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class Response:
    """Status, headers and body of an answer. `url` is where the redirects led to; `hops` are the headers on the way."""

    def __init__(
        self, url: str, answer: http.client.HTTPResponse, sock: socket.socket | None, hops: list[Mapping[str, str]]
    ) -> None:
        self.url = url
        self.status = answer.status
        self.headers: Mapping[str, str] = answer.headers  # type: ignore[assignment] # a Mapping in all but name
        self.hops = hops
        self._answer = answer
        self._sock = sock
        self._host = urlsplit(url).netloc

    def readinto(self, view: memoryview, /) -> int:
        """Fills the start of a view; 0 at the end of the body. Raises OriginUnreachable."""
        try:
            return self._answer.readinto(view)
        except (OSError, http.client.HTTPException, *_CLOSED) as error:
            raise OriginUnreachable(self._host, _broken(error)) from error

    def read(self, most: int) -> bytes:
        """The whole body. Raises OriginUnusable for more than `most` bytes, OriginUnreachable after WHOLE_S."""
        data, until = bytearray(), time.monotonic() + WHOLE_S
        try:
            while len(data) <= most and (part := self._answer.read1(most + 1 - len(data))):
                data += part
                if time.monotonic() > until:  # SILENCE_S is for each part: bytes that drip never end
                    raise OriginUnreachable(self._host, f"has not ended its answer after {WHOLE_S:g} s")
        except (OSError, http.client.HTTPException, *_CLOSED) as error:
            raise OriginUnreachable(self._host, _broken(error)) from error
        if len(data) > most:
            raise OriginUnusable(self._host, f"answers with more than {most} bytes")
        if self._answer.length:
            raise OriginUnreachable(self._host, "ended its answer too early")
        return bytes(data)

    def close(self) -> None:
        """Closes the connection, also under a `readinto` of another thread."""
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._answer.close()
        if self._sock is not None:
            self._sock.close()


class RangeStream:
    """The bytes of a range: a response whose length is checked. The first `skip` bytes of the body are left out."""

    def __init__(self, response: Response, size: int, *, skip: int = 0) -> None:
        self._response = response
        self._left = size
        self._skip = skip

    def readinto(self, view: memoryview, /) -> int:
        """As `OriginStream`."""
        while self._skip:
            scratch = memoryview(bytearray(min(self._skip, SKIP_BYTES)))
            self._skip -= self._some(scratch, self._skip + self._left)
        if not self._left or not view:
            return 0
        count = self._some(view[: self._left], self._left)
        self._left -= count
        return count

    def close(self) -> None:
        """As `OriginStream`."""
        self._response.close()

    def _some(self, view: memoryview, left: int) -> int:
        if count := self._response.readinto(view):
            return count
        raise OriginUnreachable(urlsplit(self._response.url).netloc, f"ended its answer {left} bytes too early")


def request(
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    authorization: str | None = None,
    follow: bool = True,
) -> Response:
    """Sends a request and follows its redirects. Raises OriginUnreachable; any other status is the caller's."""
    origin, first = url, _host_of(urlsplit(url))
    sent = {"User-Agent": f"swarm/{__version__}", "Accept-Encoding": "identity", **(headers or {})}
    hops: list[Mapping[str, str]] = []
    inner = False  # whether the origin itself is so near
    for _ in range(REDIRECTS_MAX):
        parts = urlsplit(url)
        secret = {"Authorization": authorization} if authorization and _host_of(parts) == first else {}
        try:
            connection, target = _connected(parts)
        except _BROKEN as error:
            raise OriginUnreachable(parts.netloc, _broken(error)) from error
        except ValueError as error:  # a port that is no number
            raise OriginUnreachable(parts.netloc, str(error)) from error
        if not hops:
            inner = _is_inner(connection, parts)
        elif not inner and _is_inner(connection, parts):
            connection.close()
            why = f"redirects to {parts.netloc}, an address of this machine or its cloud"
            raise OriginUnusable(urlsplit(origin).netloc, why, lasting=True)
        response = _sent(connection, target, url, method, {**sent, **secret}, hops)
        where = response.headers.get("Location")
        if response.status not in _REDIRECTS or where is None or not follow:
            return response
        hops.append(response.headers)
        response.close()
        target = urljoin(url, where)
        if urlsplit(target).scheme not in ("http", "https"):
            raise OriginUnreachable(parts.netloc, "redirects to something that is not HTTP")
        if parts.scheme == "https" and urlsplit(target).scheme != "https":
            raise OriginUnreachable(parts.netloc, f"redirects to {urlsplit(target).netloc} without encryption")
        url = target
    raise OriginUnreachable(urlsplit(url).netloc, f"redirects more than {REDIRECTS_MAX} times")


def demand(response: Response, what: str) -> None:
    """Raises the error of a status that is no success, and closes the response."""
    if response.status < 300:
        return
    response.close()
    host = urlsplit(response.url).netloc
    why = f"{what}: {response.status} {http.client.responses.get(response.status, '')}".strip()
    if response.status in _BUSY:
        raise OriginBusy(host, why, retry_s=retry_after_s(response.headers))
    if response.status in (401, 403, 407):
        raise OriginDenied(host, why)
    if response.status in (404, 410, 451):
        raise OriginNotFound(host, why)
    if response.status in (412, 416):
        raise OriginChanged(host, f"{why}: it is not the file that was listed")
    raise (OriginUnusable if response.status < 500 else OriginBusy)(host, why)


def ranged(response: Response, what: str, *, offset: int, size: int, total: int) -> RangeStream:
    """The bytes `[offset, offset + size)` out of `total` of a successful response to a Range request.

    A server that ignores Range sends everything, of which the rest is skipped. Raises OriginChanged for other lengths.
    """
    host = urlsplit(response.url).netloc
    length = response.headers.get("Content-Length")
    try:
        if response.status == 206:
            match = _RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
            if match is None:
                raise OriginUnreachable(host, f"{what}: a part without its range")
            if match[3] not in ("*", str(total)):
                raise OriginChanged(host, f"{what}: has {match[3]} bytes now, and {total} were listed")
            if (int(match[1]), int(match[2])) != (offset, offset + size - 1):
                raise OriginUnreachable(host, f"{what}: another range than was asked for")
            if length not in (None, str(size)):
                raise OriginUnreachable(host, f"{what}: {length} bytes for a range of {size}")
            return RangeStream(response, size)
        if length not in (None, str(total)):
            raise OriginChanged(host, f"{what}: has {length} bytes now, and {total} were listed")
        return RangeStream(response, size, skip=offset)
    except OriginError:
        response.close()
        raise


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds of `Retry-After` (a number or a date) or of the reset of `RateLimit`; 0 without one."""
    text = (headers.get("Retry-After") or "").strip()
    if text:
        with contextlib.suppress(ValueError):
            seconds = float(text)
            return max(0.0, seconds) if math.isfinite(seconds) else 0.0
        with contextlib.suppress(ValueError, TypeError):
            at = email.utils.parsedate_to_datetime(text)
            return max(0.0, (at - datetime.now(UTC)).total_seconds())
    match = re.search(r"(?:^|;)\s*t=(\d{1,6})", headers.get("RateLimit") or "")
    return float(match[1]) if match else 0.0


def _connected(parts: SplitResult) -> tuple[http.client.HTTPConnection, str]:
    """An open connection, and the target of its request line."""
    connection, target = _connection(parts)
    try:
        connection.connect()
    except BaseException:
        connection.close()
        raise
    return connection, target


def _sent(
    connection: http.client.HTTPConnection,
    target: str,
    url: str,
    method: str,
    headers: Mapping[str, str],
    hops: list[Mapping[str, str]],
) -> Response:
    try:
        connection.request(method, target, headers=dict(headers))
        sock = connection.sock
        if sock is not None:
            sock.settimeout(SILENCE_S)
        return Response(url, connection.getresponse(), sock, hops)
    except _BROKEN as error:
        connection.close()
        raise OriginUnreachable(urlsplit(url).netloc, _broken(error)) from error


def _is_inner(connection: http.client.HTTPConnection, parts: SplitResult) -> bool:
    """Whether a connection leads to this machine, or to a service of its cloud; through a proxy, whether its URL says
    so: an origin elsewhere must not have their answers read, which this node would serve on."""
    host = parts.hostname or ""
    try:
        at = connection.sock.getpeername()[0] if connection.host == host else host
        address = ipaddress.ip_address(at.partition("%")[0])
    except (OSError, ValueError):
        return host == "localhost"
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_link_local or address.is_unspecified or str(address) in _OF_CLOUDS


def _connection(parts: SplitResult) -> tuple[http.client.HTTPConnection, str]:
    """A connection that is not open yet, and the target of its request line."""
    host, port = parts.hostname or "", parts.port
    target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
    proxies = {} if urllib.request.proxy_bypass(host) else urllib.request.getproxies()
    proxy = urlsplit(proxies[parts.scheme]) if proxies.get(parts.scheme) else None
    if proxy is None:
        if parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=CONNECT_TIMEOUT_S, context=_tls()), target
        return http.client.HTTPConnection(host, port, timeout=CONNECT_TIMEOUT_S), target
    secret = {}
    if proxy.username:
        pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
        secret = {"Proxy-Authorization": f"Basic {base64.b64encode(pair).decode()}"}
    place = proxy.hostname or "", proxy.port or 80
    if parts.scheme == "https":
        tunnel = http.client.HTTPSConnection(*place, timeout=CONNECT_TIMEOUT_S, context=_tls())
        tunnel.set_tunnel(host, port or 443, headers=secret)
        return tunnel, target
    return http.client.HTTPConnection(*place, timeout=CONNECT_TIMEOUT_S), parts._replace(fragment="").geturl()


@functools.cache
def _tls() -> ssl.SSLContext:
    given = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if given and os.path.isdir(given):
        return ssl.create_default_context(capath=given)
    return ssl.create_default_context(cafile=given or None)


def _host_of(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port


def _broken(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return f"its name cannot be resolved ({error.strerror})"
    if isinstance(error, TimeoutError):
        return f"sent nothing for {SILENCE_S:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message})"
    if isinstance(error, http.client.IncompleteRead):
        return "ended its answer too early"
    if isinstance(error, OSError):
        return f"the connection failed ({error.strerror or error})"
    return f"the connection failed ({type(error).__name__})"
