"""Bounds on the load that a sender can cause: a token bucket per sender, and a bounded log.

    tokens(t) = min(burst, tokens + rate_per_s x seconds), minus 1 for each message

A sender without a token is muted for MUTE_S: its messages are ignored, and do not prolong the mute. Pure: told the
time. Must not know: messages, links, datagrams. `connections_driver` limits nodes, `swim_driver` limits addresses.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

SENDERS_MAX = 4096  # remembered; beyond that, the sender that was silent for longest is forgotten
MUTE_S = 30.0
LOGGED_MAX = 1000  # different lines of a LogOnce; strangers cannot make this node remember more


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float
    muted_until_s: float = 0.0


class RateLimiter:
    """A token bucket per sender. `rate_per_s`: messages that each may send for ever, `burst`: messages at once."""

    def __init__(self, *, rate_per_s: float, burst: float) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._buckets: dict[str, _Bucket] = {}  # the latest sender is last

    def is_muted(self, sender: str, now: float) -> bool:
        """Whether messages of this sender are ignored at this time."""
        bucket = self._buckets.get(sender)
        return bucket is not None and now < bucket.muted_until_s <= now + MUTE_S  # later: the clock was set back

    def charge(self, sender: str, now: float) -> bool:
        """Takes a token for one message; returns whether this begins a mute, once for each mute."""
        bucket = self._buckets.pop(sender, None) or _Bucket(self._burst, now)
        self._buckets[sender] = bucket
        if len(self._buckets) > SENDERS_MAX:
            del self._buckets[next(iter(self._buckets))]
        passed_s = max(0.0, now - bucket.at_s)  # negative when the clock was set back
        bucket.tokens = min(self._burst, bucket.tokens + passed_s * self._rate_per_s)
        bucket.at_s = now
        if bucket.tokens < 1.0 and not self.is_muted(sender, now):
            bucket.muted_until_s = now + MUTE_S
            return True
        bucket.tokens = max(0.0, bucket.tokens - 1.0)
        return False

    def __repr__(self) -> str:
        return f"<RateLimiter {len(self._buckets)} senders, {self._rate_per_s:g} a second each>"


class LogOnce:
    """Logs each line once, and at most LOGGED_MAX lines."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._logged: set[str] = set()

    def log(self, level: int, line: str) -> None:
        """Logs the line unless it was logged before."""
        if line not in self._logged and len(self._logged) < LOGGED_MAX:
            self._logged.add(line)
            self._log.log(level, "%s", line)
