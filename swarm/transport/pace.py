"""Upload caps: a `Pace` is shared by all uploads of a node.

A token bucket in the form of GCRA (ITU-T I.371): instead of a fill level it keeps the time at which all booked bytes
are earned. A slice is sent once it is earned in full, and at most BURST_S of unused rate is saved, so within T seconds
at most `rate * (T + BURST_S)` bytes are sent: 5 % above the cap within any second. The caller of `take` waits.

Must not know: sockets, sessions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from swarm.errors import SettingsError

BURST_S = 0.05  # bounds the overshoot of any one second to 5 %
SLICE_S = 0.02  # short enough to share the cap among sessions; 50 wake-ups a second
SLICE_BYTES_MIN = 4 << 10  # below, headers and wake-ups dominate


class TokenBucket:
    """At most `rate_bytes_per_s`, over all threads that `take` from it; None: no cap, until `change`.

    Raises SettingsError unless the rate is above 0.
    """

    def __init__(self, rate_bytes_per_s: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.change(rate_bytes_per_s)
        self._clock = clock
        self._lock = threading.Lock()
        self._earned_at_s = clock()

    def take(self, size: int) -> float:
        """Books `size` bytes; returns the seconds to wait before sending them."""
        rate = self._rate
        if rate is None:
            return 0.0
        with self._lock:
            now_s = self._clock()
            self._earned_at_s = max(self._earned_at_s, now_s - BURST_S) + size / rate
            return max(0.0, self._earned_at_s - now_s)

    def change(self, rate_bytes_per_s: float | None) -> None:
        """Sets another cap, for what is sent from now on. Raises SettingsError."""
        if rate_bytes_per_s is not None and not rate_bytes_per_s > 0:
            raise SettingsError("upload_limit", f"{rate_bytes_per_s:g} bytes/s; a rate above 0 is needed")
        self._rate = rate_bytes_per_s

    @property
    def slice_bytes(self) -> int | None:
        """The bytes of SLICE_S, at least SLICE_BYTES_MIN; None without a cap."""
        return None if self._rate is None else int(max(self._rate * SLICE_S, SLICE_BYTES_MIN))

    def __repr__(self) -> str:
        return f"<TokenBucket {'no cap' if self._rate is None else f'{self._rate / 1e6:g} MB/s'}>"


class Unlimited:
    """No cap."""

    def take(self, size: int) -> float:
        """Always 0 seconds."""
        return 0.0

    @property
    def slice_bytes(self) -> int | None:
        """None: slices need no booking."""
        return None

    def __repr__(self) -> str:
        return "<Unlimited>"
