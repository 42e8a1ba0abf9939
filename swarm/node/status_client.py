"""Reads the status and the view of a running node over HTTP, for the command line.

Needs no event loop and none of the node's libraries, so that it starts at once. `local_nodes` finds the nodes of this
user; `--peer` names others.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from swarm.errors import PeerUnreachable
from swarm.settings import split_address

TIMEOUT_S = 3.0
REPORT_BYTES_MAX = 16 << 20
PATH = "/status"
VIEW_PATH = "/view"


def ask_any(addresses: Sequence[str], context: ssl.SSLContext | None = None) -> tuple[str, dict[str, Any]]:
    """Address and report of the last of these nodes that answers. Raises PeerUnreachable."""
    failure = PeerUnreachable("status", "no node of this user runs on this machine; name one with --peer HOST:PORT")
    for address in reversed(addresses):
        try:
            return address, ask(address, context)
        except PeerUnreachable as error:
            failure = error
    raise failure


def ask(address: str, context: ssl.SSLContext | None = None) -> dict[str, Any]:
    """The report of the node at HOST:PORT. Raises PeerUnreachable.

    `context` proves membership; without it a node answers programs of its own machine only.
    """
    answer, data = _get(address, context)
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


def view(address: str, context: ssl.SSLContext | None = None) -> dict[str, Any] | None:
    """The view of the node at HOST:PORT (docs/dashboard.md); None if there is none."""
    try:
        answer, data = _get(address, context, VIEW_PATH)
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


def _get(address: str, context: ssl.SSLContext | None, path: str = PATH) -> tuple[http.client.HTTPResponse, bytes]:
    host, port = split_address("peer", address)
    connection = (
        http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
        if context
        else http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    )
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
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
