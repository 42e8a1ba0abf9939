"""Reads the status and the view of a running node over HTTP, for the command line.

Needs no event loop and none of the node's libraries, so that it starts at once. `local_nodes` finds the nodes of this
user; `--peer` names others.

A node may be stopped, or drip its answer: the whole of an answer has a deadline, which a timer of the socket is not. So
each question has a thread of its own, which is left alone when its time is over.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeAlias

from swarm.errors import PeerUnreachable
from swarm.settings import split_address

SILENCE_S = 3.0
ANSWER_TIMEOUT_S = 10.0  # for all bytes of all answers to one question: a look-up, a handshake and a large report
REPORT_BYTES_MAX = 16 << 20
PATH = "/status"
VIEW_PATH = "/view"


def ask_any(
    addresses: Sequence[str], context: ssl.SSLContext | None = None, *, within_s: float = ANSWER_TIMEOUT_S
) -> tuple[str, dict[str, Any]]:
    """Address and report of the last of these nodes that answers. Raises PeerUnreachable.

    Each gets half of the time that is left, so that a slow node leaves some to the others.
    """
    until = time.monotonic() + within_s
    failure = PeerUnreachable("status", "no node of this user runs on this machine; name one with --peer HOST:PORT")
    for address in reversed(addresses):
        try:
            return address, ask(address, context, within_s=(until - time.monotonic()) / min(2, len(addresses)))
        except PeerUnreachable as error:
            failure = error
    raise failure


def ask(address: str, context: ssl.SSLContext | None = None, *, within_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
    """The report of the node at HOST:PORT. Raises PeerUnreachable.

    `context` proves membership; without it a node answers programs of its own machine only.
    """
    answer, data = _get(address, context, within_s=within_s)
    if answer.status == http.HTTPStatus.FORBIDDEN:
        raise PeerUnreachable(address, "tells members and its own machine alone; name the key with --key-file")
    if answer.status != http.HTTPStatus.OK:
        raise PeerUnreachable(address, f"answers {answer.status} {answer.reason}; is it a swarm node?")
    try:
        report = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PeerUnreachable(address, f"{error}; is a node running there?") from error
    if not isinstance(report, dict) or not {"node", "members", "artifacts", "transfers"} <= report.keys():
        raise PeerUnreachable(address, "answers something that is no swarm status")
    return report


def view(
    address: str, context: ssl.SSLContext | None = None, *, within_s: float = ANSWER_TIMEOUT_S
) -> dict[str, Any] | None:
    """The view of the node at HOST:PORT (docs/dashboard.md); None if there is none."""
    try:
        answer, data = _get(address, context, VIEW_PATH, within_s=within_s)
        found = json.loads(data) if answer.status == http.HTTPStatus.OK else None
    except (PeerUnreachable, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and {"members", "links", "warnings", "asked"} <= found.keys() else None


def clock_ahead_s(address: str, context: ssl.SSLContext | None = None) -> float | None:
    """Seconds that the clock of the node at HOST:PORT is ahead of this clock, to a second; None without a Date header.

    Raises PeerUnreachable.
    """
    before = datetime.now(UTC)
    answer, _ = _get(address, context)
    after = datetime.now(UTC)
    try:
        theirs = parsedate_to_datetime(answer.headers["Date"])
    except (TypeError, ValueError):  # missing, or no date
        return None
    ahead_s = (theirs - before - (after - before) / 2).total_seconds() + 0.5  # Date has whole seconds
    return ahead_s if abs(ahead_s) > 1 else 0.0


Answer: TypeAlias = tuple[http.client.HTTPResponse, bytes]


def _get(
    address: str, context: ssl.SSLContext | None, path: str = PATH, *, within_s: float = ANSWER_TIMEOUT_S
) -> Answer:
    host, port = split_address("peer", address)
    connection = (
        http.client.HTTPSConnection(host, port, timeout=SILENCE_S, context=context)
        if context
        else http.client.HTTPConnection(host, port, timeout=SILENCE_S)
    )
    try:
        return _in_time(lambda: _read(connection, address, path), within_s)
    except TimeoutError as error:
        if connection.sock:
            with contextlib.suppress(OSError):  # the peer ended it meanwhile
                socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)  # its thread ends too
        why = f"its answer was not complete after {max(0.0, within_s):.2g} s"
        raise PeerUnreachable(address, why) from error


def _in_time(work: Callable[[], Answer], within_s: float) -> Answer:
    """What `work` returns or raises, on a thread of its own. Raises TimeoutError when that takes longer."""
    done: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put(work())
        except Exception as error:
            done.put(error)

    threading.Thread(target=run, name="swarm asks", daemon=True).start()
    try:
        found = done.get(timeout=max(0.0, within_s))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    return found


def _read(connection: http.client.HTTPConnection, address: str, path: str) -> Answer:
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        with contextlib.closing(answer):
            data = answer.read(REPORT_BYTES_MAX + 1)
        if len(data) > REPORT_BYTES_MAX:
            raise PeerUnreachable(address, f"answers more than {REPORT_BYTES_MAX >> 20} MiB; is it a swarm node?")
        return answer, data
    except ssl.SSLError as error:
        from swarm.security.certificates import Refusal, refusal

        why = refusal(error) or Refusal.BROKEN
        raise PeerUnreachable(address, f"it {why.value}") from error
    except (OSError, http.client.HTTPException) as error:
        raise PeerUnreachable(address, f"{error}; is a node running there?") from error
    finally:
        connection.close()
