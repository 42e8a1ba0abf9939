"""A seed as a daemon: SIGTERM drains it, SIGHUP reads its settings again.

    SIGTERM   running uploads end, chunks that only this node has are still sent, for `drain_timeout_s`; then it ends
    SIGHUP    upload limit and key file are read again; if its terminal is gone, it ends, as every program of a terminal
    SIGINT, and each further signal: it ends at once

Must not know: how uploads drain, which settings can change.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from swarm.errors import SwarmError
from swarm.settings import Settings

if TYPE_CHECKING:
    from swarm.node.node import Node

TERMINAL = "/dev/tty"

log = logging.getLogger("swarm")


class Daemon:
    """A process that gets signals; `node` is set as soon as it serves. `read` reads its settings anew.

    `seeds`: it is there to serve, so a hangup does not end it.
    """

    def __init__(self, read: Callable[[], Settings], *, drain_timeout_s: float, seeds: bool) -> None:
        self.node: Node | None = None
        self.also: Callable[[Settings], list[str]] = lambda _: []  # what else changes with the settings, and how
        self._read = read
        self._drain_timeout_s = drain_timeout_s
        self._seeds = seeds
        self._draining: asyncio.Task[None] | None = None
        self._had_terminal = _has_terminal()

    def serves(self, node: Node) -> None:
        """This node serves from now on."""
        self.node, self._seeds = node, True

    def heeds(self, number: int, end: Callable[[], None], *, within: Callable[[float], None]) -> bool:
        """Whether this signal does not end the process at once. Calls `end` after a drain.

        `within(after_s)`: the process ends after so long, even if `end` was not called.
        """
        if number == signal.SIGTERM and self._draining is None and self.node is not None:
            within(self._drain_timeout_s)
            self._draining = asyncio.get_running_loop().create_task(self._drain(self.node, end))
            return True
        if number == signal.SIGHUP and self._seeds and (_has_terminal() or not self._had_terminal):
            self._reload()
            return True
        return False

    async def _drain(self, node: Node, end: Callable[[], None]) -> None:
        try:
            await node.drain(self._drain_timeout_s)
        finally:
            end()

    def _reload(self) -> None:
        from swarm.runtime import reload

        try:
            settings = self._read()
            changed = [*(reload(self.node, settings) if self.node else []), *self.also(settings)]
        except SwarmError as error:
            log.error("%s; the settings of before stay", error)
        else:
            log.info("settings are read again: %s", ", ".join(changed) or "nothing has changed")


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal that is not gone."""
    try:
        os.close(os.open(TERMINAL, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
