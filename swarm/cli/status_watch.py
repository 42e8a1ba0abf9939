"""`swarm status --watch`: asks a node every second, redraws the screen on a terminal, prints a line elsewhere.

If the asked node dies, a member that it had reported is asked instead.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from ssl import SSLContext
from typing import Any, TypeAlias

from rich.console import Console
from rich.live import Live
from rich.text import Text

from swarm.cli import status_table, stdio
from swarm.cli.status_json import healthy, swarm_status
from swarm.errors import PeerUnreachable
from swarm.node import status_client

EVERY_S = 1.0
FALLBACKS_MAX = 8  # members asked if the given nodes do not answer; each may take until its timeout
GIVE_UP_AFTER_S = 30.0

Ask: TypeAlias = Callable[[], dict[str, Any]]


class Asker:
    """Asks the first of `addresses` that answers, else a member of the last answer.

    `context` proves membership to nodes of other machines; `addresses` get it only if `proven`.
    """

    def __init__(self, addresses: Sequence[str], context: SSLContext | None, *, proven: bool) -> None:
        self._addresses = list(addresses)
        self._context = context
        self._proven = proven
        self._others: list[str] = []

    def __call__(self) -> dict[str, Any]:
        """The JSON of `swarm status --json`. Raises PeerUnreachable."""
        context = self._context if self._proven else None
        until = time.monotonic() + status_client.ANSWER_TIMEOUT_S  # for all of it
        try:
            within_s = status_client.ANSWER_TIMEOUT_S / 2
            address, report = status_client.ask_any(self._addresses, context, within_s=within_s)
        except PeerUnreachable as error:
            address, report = self._ask_others(error, within_s=(until - time.monotonic()) / 2)
            context = self._context
        swarm = swarm_status(report, status_client.view(address, context, within_s=until - time.monotonic()))
        others = [m["address"] for m in swarm["members"] if m["state"] == "alive" and m["address"] != address]
        self._others = others[:FALLBACKS_MAX] or self._others
        return swarm

    def _ask_others(self, error: PeerUnreachable, *, within_s: float) -> tuple[str, dict[str, Any]]:
        try:
            return status_client.ask_any(self._others, self._context, within_s=within_s)
        except PeerUnreachable:
            raise error from None


def watch(ask: Ask) -> int:
    """Shows the swarm every second until it is interrupted. Returns 1 if the last answer had a bad warning, else 0.

    Raises PeerUnreachable if no node answers at first, or for `GIVE_UP_AFTER_S`.
    """
    swarm = ask()
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        return _lines(ask, swarm)
    try:
        with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            for drawn in _again(ask, swarm):
                live.update(
                    drawn if isinstance(drawn, Text) else status_table.screen(swarm := drawn, in_place=True),
                    refresh=True,
                )
    except KeyboardInterrupt:
        console.print(status_table.screen(swarm))  # remains after the alternate screen
    return 0 if healthy(swarm) else 1


def _lines(ask: Ask, swarm: Mapping[str, Any]) -> int:
    try:
        for answer in _again(ask, swarm):
            text = answer.plain if isinstance(answer, Text) else status_table.line(swarm := answer)
            sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    return 0 if healthy(swarm) else 1


def _again(ask: Ask, swarm: Mapping[str, Any]) -> Any:
    """`swarm`, then an answer of `ask` every second; a text if no node answers."""
    yield swarm
    answered_at_s = time.monotonic()
    while not stdio.ended():
        time.sleep(EVERY_S)
        try:
            swarm = ask()
        except PeerUnreachable as error:
            if time.monotonic() - answered_at_s > GIVE_UP_AFTER_S:
                raise
            yield Text(f"no node answers ({error}); asking again")
            continue
        answered_at_s = time.monotonic()
        yield swarm
