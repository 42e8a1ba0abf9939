"""HTTP of origins: what if an answer drips, is cut off, or is larger than any list of files?"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from swarm.errors import OriginUnreachable, OriginUnusable
from swarm.origin import http


@contextlib.contextmanager
def server(head: bytes, *parts: bytes, pause_s: float = 0.0, status: bytes = b"200 OK") -> Iterator[str]:
    """Answers one request with a head and then parts, with pauses between them."""
    ended = threading.Event()

    def serve(listening: socket.socket) -> None:
        try:
            connection, _ = listening.accept()
        except OSError:  # it is not asked
            return
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 " + status + b"\r\n" + head + b"\r\n\r\n")
            for part in parts:
                connection.sendall(part)
                if ended.wait(pause_s):
                    return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        ended.set()
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_does_an_answer_that_drips_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WHOLE_S", 0.1)
    with (
        server(b"Content-Length: 100000", *[b"x"] * 100_000, pause_s=0.01) as url,
        contextlib.closing(http.request(url)) as response,
        pytest.raises(OriginUnreachable, match=r"has not ended its answer after 0\.1 s"),
    ):
        response.read(100_000)


@pytest.mark.parametrize("head", [b"Content-Length: 20", b"Transfer-Encoding: chunked"])
def test_is_an_answer_that_is_cut_off_none(head: bytes) -> None:
    body = b"14\r\n0123456789" if b"chunked" in head else b"0123456789"
    with (
        server(head, body) as url,
        contextlib.closing(http.request(url)) as response,
        pytest.raises(OriginUnreachable, match="ended its answer too early"),
    ):
        response.read(100)


def test_is_an_answer_read_whole_and_not_beyond_its_bound() -> None:
    with server(b"Content-Length: 30", b"a" * 10, b"b" * 20) as url, contextlib.closing(http.request(url)) as response:
        assert response.read(30) == b"a" * 10 + b"b" * 20
    with (
        server(b"Connection: close", b"a" * 31) as url,
        contextlib.closing(http.request(url)) as response,
        pytest.raises(OriginUnusable, match="more than 30 bytes"),
    ):
        response.read(30)


@pytest.mark.parametrize(
    ("at", "inner"),
    [
        ("127.0.0.1", True),
        ("169.254.169.254", True),
        ("::ffff:169.254.169.254", True),
        ("fe80::1%eth0", True),
        ("::1", True),
        ("fd00:ec2::254", True),
        ("10.0.0.5", False),
        ("192.0.2.1", False),
        ("2001:db8::1", False),
    ],
)
@pytest.mark.parametrize("proxied", [False, True])
def test_what_is_of_this_machine_or_its_cloud(at: str, inner: bool, proxied: bool) -> None:
    name = "host.example" if not proxied else at
    sock = SimpleNamespace(getpeername=lambda: ("127.0.0.1" if proxied else at, 80))
    connection: Any = SimpleNamespace(host="proxy.example" if proxied else name, sock=sock)
    host = f"[{name}]" if ":" in name else name
    assert http._is_inner(connection, urlsplit(f"http://{host}/")) == inner


def test_does_a_redirect_lead_from_elsewhere_to_no_service_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def is_inner(connection: Any, parts: Any) -> bool:
        return bool(parts.path == "/secret")

    send = http._sent

    def sent(*of: Any) -> http.Response:
        asked.append(of[1])
        return send(*of)

    with server(b"Content-Length: 6", b"secret") as secret:
        moved = f"Location: {secret}secret\r\nContent-Length: 0".encode()
        with server(moved, status=b"302 Found") as url, contextlib.closing(http.request(url)) as response:
            assert response.read(10) == b"secret", "both are of this machine"
    with server(b"Content-Length: 6", b"secret") as secret:
        moved = f"Location: {secret}secret\r\nContent-Length: 0".encode()
        monkeypatch.setattr(http, "_is_inner", is_inner)
        monkeypatch.setattr(http, "_sent", sent)
        with (
            server(moved, status=b"302 Found") as url,
            pytest.raises(OriginUnusable, match="an address of this machine or its cloud") as raised,
        ):
            http.request(url)
        assert raised.value.lasting
        assert asked == ["/"], "it was not even asked"
