"""The rate of bytes that arrive or leave, over a window that all surfaces share."""

from __future__ import annotations

from collections import deque

RATE_WINDOW_S = 5.0  # chunks arrive in bursts: over a shorter window a slow member looks fast now and then
RATE_LEAST_S = 0.2


class Rate:
    """Bytes per second over the last `RATE_WINDOW_S`, or since `since_s` if that is less.

    A fetch and its links use the same window, so that the rates of the links add up to the rate of the fetch.
    """

    def __init__(self, since_s: float = float("-inf")) -> None:
        self._since_s = since_s
        self._window: deque[tuple[float, int]] = deque()
        self._bytes = 0

    def add(self, at_s: float, size: int) -> None:
        """Counts bytes that arrived or left at a time."""
        self._window.append((at_s, size))
        self._bytes += size
        self._forget(at_s)

    def at(self, now: float) -> float:
        """The rate now."""
        self._forget(now)
        if not self._window:
            return 0.0
        return self._bytes / min(RATE_WINDOW_S, max(RATE_LEAST_S, now - self._since_s))

    def _forget(self, now: float) -> None:
        while self._window and self._window[0][0] < now - RATE_WINDOW_S:
            self._bytes -= self._window.popleft()[1]
