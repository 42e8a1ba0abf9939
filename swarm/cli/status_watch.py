"""`swarm status --watch`: asks a node every second, redraws the screen on a terminal, prints a line elsewhere.

`q` ends it as Ctrl-C does. Keys are read only where this process owns the terminal of standard input.

If the asked node dies, a member that it had reported is asked instead.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
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
        with _keys() as keys, Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
            for drawn in _again(ask, swarm, keys):
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


@contextlib.contextmanager
def _keys() -> Iterator[int | None]:
    """The descriptor of a terminal that hands over each key as it is typed, unseen; None without such a terminal."""
    try:
        keys = sys.stdin.fileno()
        before = termios.tcgetattr(keys)
        if os.tcgetpgrp(keys) != os.getpgrp():  # in the background: setting the terminal would stop this process
            raise OSError
    except (AttributeError, OSError, ValueError, termios.error):
        yield None
        return
    try:
        tty.setcbreak(keys, termios.TCSANOW)
        yield keys
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(keys, termios.TCSANOW, before)


def _wait(keys: int | None) -> None:
    """Returns after EVERY_S. Raises KeyboardInterrupt once `q` is typed."""
    until_s = time.monotonic() + EVERY_S
    while (left_s := until_s - time.monotonic()) > 0:
        if keys is None:
            time.sleep(left_s)
        elif select.select([keys], [], [], left_s)[0]:
            typed = os.read(keys, 64)
            if b"q" in typed:
                raise KeyboardInterrupt
            keys = keys if typed else None  # the terminal is gone


def _again(ask: Ask, swarm: Mapping[str, Any], keys: int | None = None) -> Any:
    """`swarm`, then an answer of `ask` every second; a text if no node answers."""
    yield swarm
    answered_at_s = time.monotonic()
    while not stdio.ended():
        _wait(keys)
        try:
            swarm = ask()
        except PeerUnreachable as error:
            if time.monotonic() - answered_at_s > GIVE_UP_AFTER_S:
                raise
            yield Text(f"no node answers ({error}); asking again")
            continue
        answered_at_s = time.monotonic()
        yield swarm
