"""Asking a running node what it sees, whatever answers."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from swarm.errors import PeerUnreachable, SettingsError
from swarm.node import status_client

REPORT: dict[str, Any] = {
    "node": {"id": "n0", "name": "me", "address": "127.0.0.1:1"},
    "members": [
        {"id": "n0", "name": "me", "address": "127.0.0.1:1", "state": "alive", "transport": "self"},
        {"id": "n1", "name": "peer", "address": "127.0.0.1:2", "state": "alive", "transport": "tcp"},
        {"id": "n2", "name": "gone", "address": "127.0.0.1:3", "state": "left", "transport": "tcp"},
    ],
    "artifacts": [
        {"model_id": "org/model", "digest": "ab" * 32, "tier": "checkpoint", "bytes": 9, "members": {"me": 0.5}}
    ],
    "transfers": [
        {"digest": "ab" * 32, "direction": "down", "peer": "peer", "bytes": 2_000_000, "rate_bytes_per_s": 1_500_000},
        {"digest": "cd" * 32, "direction": "up", "peer": "peer", "bytes": 1, "rate_bytes_per_s": 1},
        {"digest": "ab" * 32, "direction": "up", "peer": "gone", "bytes": 1, "rate_bytes_per_s": 1},
    ],
}


class Answering(HTTPServer):
    """Answers every request with the same bytes."""

    status = 200
    body = b""
    ahead: timedelta | None = timedelta()  # of its clock; None: it has none

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Answering

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.body if self.path == status_client.PATH else b"")

    def date_time_string(self, timestamp: float | None = None) -> str:
        return "no date" if self.server.ahead is None else format_datetime(datetime.now(UTC) + self.server.ahead, True)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Answering]:
    with Answering(("127.0.0.1", 0), _Handler) as serving:
        serving.body = json.dumps(REPORT).encode()
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture
def silent() -> str:
    with HTTPServer(("127.0.0.1", 0), _Handler) as closed:
        return f"127.0.0.1:{closed.server_port}"


def test_does_a_node_answer(server: Answering) -> None:
    assert status_client.ask(server.address) == REPORT


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "is a node running there"),
        (b"<html>", "is a node running there"),
        (b"\xff", "is a node running there"),
        (b"[" * 100_000, "is a node running there"),
        (b"[]", "no swarm status"),
        (b'{"node": 1}', "no swarm status"),
    ],
)
def test_is_another_answer_no_report(server: Answering, body: bytes, says: str) -> None:
    server.body = body
    with pytest.raises(PeerUnreachable, match=says):
        status_client.ask(server.address)


def test_is_another_server_told(server: Answering) -> None:
    server.status = 404
    with pytest.raises(PeerUnreachable, match="answers 404"):
        status_client.ask(server.address)


def test_is_an_endless_answer_cut(server: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_client, "REPORT_BYTES_MAX", 10)
    with pytest.raises(PeerUnreachable):
        status_client.ask(server.address)


class _Dripping(socketserver.BaseRequestHandler):
    """A header without end, a byte at a time: each byte is in time."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            self.request.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while True:
                self.request.sendall(b"x")
                time.sleep(0.01)


class Dripping(socketserver.ThreadingTCPServer):
    daemon_threads = True


@pytest.fixture
def dripping() -> Iterator[str]:
    with Dripping(("127.0.0.1", 0), _Dripping) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()
        thread.join()


def test_an_answer_that_drips_has_a_deadline(server: Answering, dripping: str) -> None:
    with pytest.raises(PeerUnreachable, match="not complete after"):
        status_client.ask(dripping, within_s=0.2)
    assert status_client.view(dripping, within_s=0.2) is None
    assert status_client.ask_any([server.address, dripping], within_s=2.0) == (server.address, REPORT)
    asking = [thread for thread in threading.enumerate() if thread.name == "swarm asks"]
    for thread in asking:
        thread.join(10.0)
    assert not any(thread.is_alive() for thread in asking)


def test_does_no_node_answer(silent: str) -> None:
    with pytest.raises(PeerUnreachable, match="is a node running there"):
        status_client.ask(silent)
    with pytest.raises(SettingsError):
        status_client.ask("nonsense")


def test_is_the_youngest_that_answers_asked(server: Answering, silent: str) -> None:
    assert status_client.ask_any([server.address, silent]) == (server.address, REPORT)
    with pytest.raises(PeerUnreachable, match="name one with --peer"):
        status_client.ask_any([])
    with pytest.raises(PeerUnreachable, match=silent):
        status_client.ask_any([silent])


@pytest.mark.parametrize(
    ("told", "expected_s"),
    [(timedelta(), 0), (timedelta(minutes=10), 600), (timedelta(hours=-2), -7200)],
)
def test_how_far_is_a_clock_ahead(server: Answering, told: timedelta, expected_s: float) -> None:
    server.ahead = told
    found = status_client.clock_ahead_s(server.address)
    assert found is not None
    assert abs(found - expected_s) <= 2


def test_tells_a_clock_that_says_nothing_nothing(server: Answering) -> None:
    server.ahead = None
    assert status_client.clock_ahead_s(server.address) is None
    server.server_close()
    with pytest.raises(PeerUnreachable):
        status_client.clock_ahead_s("127.0.0.1:1")
