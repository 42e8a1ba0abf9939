"""The event loop of a node: its clock leaves out the time in which the process stood still.

A process stands still when it is stopped (SIGSTOP, Ctrl-Z), its container frozen, its machine suspended or migrated,
or when a long call keeps the loop's thread. By the clock of the system all deadlines have passed afterwards, though
no peer was late. So a step of the system's clock that the loop did not ask for does not count:

    loop asks for   0.25 s   0.25 s                             0.25 s
    system          |--------|------------- 40 s ---------------|--------|
    this clock      |--------|--------|                         |--------|     paused_s = 39.75

All timers of the loop, its timeouts and what runs on it (links, heartbeats, gossip, fetches) keep the rest of their
time. `paused_s` tells the node that it stood still: peers may have given it up.

Must not know: nodes.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
import time

PAUSE_S = 1.0  # a shorter step is a busy machine


class PausingLoop(asyncio.SelectorEventLoop):
    """`asyncio.SelectorEventLoop` with such a clock."""

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._seen_at = time.monotonic()
        self._asked_s = 0.0  # the wait that the loop has asked for
        self._stood_still_s = 0.0
        self._suspended_s = _suspended_s()
        super().__init__(_Selector(self))

    @property
    def paused_s(self) -> float:
        """Seconds that the process stood still since the loop was made; some of them only the machine's boot counts."""
        return self._stood_still_s + max(0.0, _suspended_s() - self._suspended_s)

    def time(self) -> float:
        """Seconds on the system's monotonic clock, without those that the process stood still."""
        now = time.monotonic()
        if threading.get_ident() == self._owner:  # or a thread would hide that the loop's own thread stood still
            step, self._seen_at = now - self._seen_at, now
            if step > self._asked_s + PAUSE_S:
                self._stood_still_s += step - self._asked_s
        return now - self._stood_still_s

    def run_forever(self) -> None:
        """On the calling thread; the time between two runs counts as asked for."""
        self._owner, self._seen_at = threading.get_ident(), time.monotonic()
        super().run_forever()

    def wait(self, seconds: float | None) -> None:
        """The loop is about to wait for input for so long; None: for ever."""
        self.time()
        self._asked_s = float("inf") if seconds is None else max(0.0, seconds)

    def waited(self) -> None:
        """The wait is over."""
        self.time()
        self._asked_s = 0.0


class _Selector(selectors.DefaultSelector):
    """Tells the loop about its waits."""

    def __init__(self, loop: PausingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._loop.wait(timeout)
        try:
            return super().select(timeout)
        finally:
            self._loop.waited()


def _suspended_s() -> float:
    """Seconds that this machine was suspended since its boot, which its monotonic clock leaves out."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
