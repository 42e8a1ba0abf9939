"""Upload caps: one `Pace` is shared by everything a node sends.

A token bucket in its GCRA form: instead of a fill level, it keeps the time at which everything booked so far
has been earned. A slice may leave once it is earned in full, and at most `BURST_S` of unused rate is saved
up, so that within any stretch of T seconds at most `rate * (T + BURST_S)` bytes leave: the cap holds within 5
% over every second.

Knows nothing of sockets or sessions; whoever books a slice does the waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from swarm.errors import SettingsError

BURST_S = 0.05  # bounds the overshoot of any one second to 5 %
SLICE_S = 0.02  # short enough to share the cap among sessions, long enough that 50 wake-ups a second do
SLICE_BYTES_MIN = 4 << 10  # below, headers and wake-ups dominate


class TokenBucket:
    """At most `rate_bytes_per_s`, over all threads that `take` from it. Raises SettingsError unless it is above 0."""

    def __init__(self, rate_bytes_per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        if not rate_bytes_per_s > 0:
            raise SettingsError("upload_limit", f"{rate_bytes_per_s:g} bytes/s; a rate above 0 is needed")
        self._rate = rate_bytes_per_s
        self._clock = clock
        self._lock = threading.Lock()
        self._earned_at_s = clock()

    def take(self, size: int) -> float:
        """Books `size` bytes; returns for how many seconds the caller must wait before it sends them."""
        with self._lock:
            now_s = self._clock()
            self._earned_at_s = max(self._earned_at_s, now_s - BURST_S) + size / self._rate
            return max(0.0, self._earned_at_s - now_s)

    @property
    def slice_bytes(self) -> int | None:
        """Most bytes worth booking at once."""
        return int(max(self._rate * SLICE_S, SLICE_BYTES_MIN))

    def __repr__(self) -> str:
        return f"<TokenBucket {self._rate / 1e6:g} MB/s>"


class Unlimited:
    """No cap: nothing ever waits."""

    def take(self, size: int) -> float:
        """Always 0 seconds."""
        return 0.0

    @property
    def slice_bytes(self) -> int | None:
        """None: there is nothing to book."""
        return None

    def __repr__(self) -> str:
        return "<Unlimited>"
