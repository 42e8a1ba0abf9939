"""`swarm status` again and again: asks some node that answers, draws what it says in place, and says it plainly into
a pipe.

The node that was asked may die; then another one is asked that it told of.
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

from swarm.cli import status_table
from swarm.cli.status_json import healthy, seen
from swarm.errors import PeerUnreachable
from swarm.node import status_client

EVERY_S = 1.0
FALLBACKS_MAX = 8  # members asked when nobody else answers: each may take its time
GIVE_UP_AFTER_S = 30.0

Ask: TypeAlias = Callable[[], dict[str, Any]]


class Asker:
    """Asks `addresses`, and when none of them answers, members that the last answer named. `context` is the proof for
    nodes of other machines; those in `addresses` are asked with it where `proven`."""

    def __init__(self, addresses: Sequence[str], context: SSLContext | None, *, proven: bool) -> None:
        self._addresses = list(addresses)
        self._context = context
        self._proven = proven
        self._others: list[str] = []

    def __call__(self) -> dict[str, Any]:
        """The swarm as some node sees it (see `seen`). Raises PeerUnreachable."""
        try:
            address, report = status_client.ask_any(self._addresses, self._context if self._proven else None)
            context = self._context if self._proven else None
        except PeerUnreachable as error:
            address, report = self._ask_others(error)
            context = self._context
        swarm = seen(report, status_client.view(address, context))
        others = [m["address"] for m in swarm["members"] if m["state"] == "alive" and m["address"] != address]
        self._others = others[:FALLBACKS_MAX] or self._others
        return swarm

    def _ask_others(self, error: PeerUnreachable) -> tuple[str, dict[str, Any]]:
        for address in self._others:
            try:
                return address, status_client.ask(address, self._context)
            except PeerUnreachable:
                continue
        raise error


def watch(ask: Ask) -> int:
    """Shows it every second until it is interrupted; the exit code says whether all was well at last.

    Raises PeerUnreachable when nobody answers at first, or for a long time.
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
        console.print(status_table.screen(swarm))  # the last one stays when the screen is given back
    return 0 if healthy(swarm) else 1


def _lines(ask: Ask, swarm: Mapping[str, Any]) -> int:
    try:
        for said in _again(ask, swarm):
            text = said.plain if isinstance(said, Text) else status_table.line(swarm := said)
            sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # whoever read has seen enough
        sys.stdout = None  # or Python would try to flush into it, and complain
    return 0 if healthy(swarm) else 1


def _again(ask: Ask, swarm: Mapping[str, Any]) -> Any:
    """What `ask` says, now and every second; a text where nobody answers."""
    yield swarm
    answered_at_s = time.monotonic()
    while True:
        time.sleep(EVERY_S)
        try:
            swarm = ask()
        except PeerUnreachable as error:
            if time.monotonic() - answered_at_s > GIVE_UP_AFTER_S:
                raise
            yield Text(f"nobody answers ({error}); asking again")
            continue
        answered_at_s = time.monotonic()
        yield swarm
