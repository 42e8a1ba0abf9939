"""HTTP of origins: what if an answer drips, is cut off, or is larger than any list of files?"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from swarm.errors import OriginUnreachable, OriginUnusable
from swarm.origin import http


@contextlib.contextmanager
def server(head: bytes, *parts: bytes, pause_s: float = 0.0) -> Iterator[str]:
    """Answers one request with a head and then parts, with pauses between them."""
    ended = threading.Event()

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
            for part in parts:
                connection.sendall(part)
                if ended.wait(pause_s):
                    return

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        ended.set()
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
