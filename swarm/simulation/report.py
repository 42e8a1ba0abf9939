"""The result of a simulated burst, compared with the lower bound and with a star.

Must not know: how a burst is simulated.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from swarm.simulation.setup import SLOWER, Burst


@dataclass(frozen=True)
class BurstReport:
    """A run. `times_s` count from each newcomer's own request, by name; None for a newcomer that did not finish."""

    burst: Burst
    asked_at_s: Mapping[str, float]
    times_s: Mapping[str, float | None]
    killed: frozenset[str]
    slow: frozenset[str]
    liars: frozenset[str]
    believed_lies: int  # honest newcomers that ended with a chunk that is not the origin's
    lost_chunks: int  # without a living holder at the end
    seed_bytes: float
    origin_bytes: float
    origin_requests: int
    control_bytes: Mapping[str, int]  # by member
    rejected_chunks: int
    banned: Mapping[str, tuple[str, ...]]  # by newcomer, the members that it banned
    crossed_bytes: float  # out of racks
    entered_bytes: float  # into machines with several newcomers

    @property
    def unfinished(self) -> list[str]:
        """Living newcomers that did not finish."""
        return [name for name, time_s in self.times_s.items() if time_s is None and name not in self.killed]

    @property
    def lived_s(self) -> list[float]:
        """Times of all newcomers that were not killed, ascending; infinite for a newcomer that did not finish."""
        return sorted(self._time_s(name) for name in self.times_s if name not in self.killed)

    @property
    def star_s(self) -> list[float]:
        """Times of the same newcomers, ascending, if seeds sent each of them the whole model in sequence.

        Without seeds the origin does.
        """
        free_at_s = [0.0] * max(1, self.burst.seeds)
        times_s = []
        for name, asked_at_s in sorted(self.asked_at_s.items(), key=lambda item: item[1]):
            if name not in self.killed:
                done_at_s = max(free_at_s[0], asked_at_s) + max(self._copy_s(name), self._origin_s)
                heapq.heapreplace(free_at_s, done_at_s)
                times_s.append(done_at_s - asked_at_s)
        return sorted(times_s)

    def ratio_of(self, name: str) -> float:
        """A newcomer's time over its own lower bound; infinite when it did not finish."""
        return self._time_s(name) / max(self.burst.bound_s, self._copy_s(name))

    @property
    def ratios(self) -> list[float]:
        """Ratios of all newcomers that were not killed, ascending."""
        return sorted(self.ratio_of(name) for name in self.times_s if name not in self.killed)

    @property
    def last_ratio(self) -> float:
        """The worst ratio; infinite when a newcomer did not finish, NaN without living newcomers."""
        return max(self.ratios, default=math.nan)

    @property
    def mean_ratio(self) -> float:
        """The mean ratio; NaN without living newcomers."""
        return sum(self.ratios) / len(self.ratios) if self.ratios else math.nan

    @property
    def seed_models(self) -> float:
        """Bytes that all seeds sent together, in copies of the model."""
        return self.seed_bytes / self.burst.copy_bytes

    @property
    def origin_models(self) -> float:
        """Bytes that the origin sent, in copies of the model."""
        return self.origin_bytes / self.burst.copy_bytes

    @property
    def crossed_models(self) -> float:
        """Bytes that left racks, in copies of the model per rack."""
        return self.crossed_bytes / self.burst.copy_bytes / self.burst.racks

    @property
    def entered_models(self) -> float:
        """Bytes that entered machines with several newcomers, in copies of the model per machine."""
        return self.entered_bytes / self.burst.copy_bytes / (self.burst.machines - self.burst.seeds)

    @property
    def control_part(self) -> float:
        """Bytes of the messages that a member sent over those of the model; the mean of all members."""
        return sum(self.control_bytes.values()) / len(self.control_bytes) / self.burst.copy_bytes

    @property
    def banned_by(self) -> Counter[str]:
        """By member, the number of newcomers that banned it."""
        return Counter(name for names in self.banned.values() for name in names)

    def _time_s(self, name: str) -> float:
        time_s = self.times_s[name]
        return math.inf if time_s is None else time_s

    @property
    def _origin_s(self) -> float:
        rate = None if self.burst.seeds else self.burst.origin_bytes_per_s
        return self.burst.copy_bytes / rate if rate else 0.0

    def _copy_s(self, name: str) -> float:
        return self.burst.copy_s * (SLOWER if name in self.slow else 1)


def quantile(ascending: list[float], part: float) -> float:
    """The value that this part of all values does not exceed; NaN without values."""
    return ascending[math.ceil(part * len(ascending)) - 1] if ascending else math.nan
