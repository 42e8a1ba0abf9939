"""Limits by the time of day: which upload limit holds now, and for how long.

    08:00-18:00=100MB/s    Mon-Fri 08:00-18:00=100MB/s    Sat+Sun 00:00-24:00=1GB/s    22:00-06:00=none

The first entry that holds counts; without one the plain limit. A time after its end wraps around midnight, and belongs
to the day on which it began. Times are those of the machine's time zone.

Pure: the caller says what time it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from swarm.errors import SettingsError
from swarm.settings import parse_rate

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
ENTRIES_MAX = 64
_ENTRY = re.compile(
    r"(?:([A-Za-z+-]{3,64}) +)?([0-9]{1,2}):([0-9]{2})-([0-9]{1,2}):([0-9]{2}) *= *(none|[0-9.]+ *[A-Za-z/]+)", re.ASCII
)


@dataclass(frozen=True)
class LimitHours:
    """From `start` to `end`, minutes of the day, on `days` (0: Monday). `rate`: bytes per second, None for no limit."""

    days: frozenset[int]
    start: int
    end: int
    rate: float | None

    def holds(self, day: int, minute: int) -> bool:
        """Whether it holds at a minute of a day of the week."""
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        return (day in self.days and minute >= self.start) or ((day - 1) % 7 in self.days and minute < self.end)


def read(texts: Sequence[str]) -> tuple[LimitHours, ...]:
    """The entries of a setting. Raises SettingsError."""
    if len(texts) > ENTRIES_MAX:
        raise SettingsError("upload_hours", f"has {len(texts)} entries; at most {ENTRIES_MAX} are allowed")
    return tuple(map(_entry, texts))


def limit(entries: Sequence[LimitHours], plain: float | None, at: datetime) -> float | None:
    """The limit at a time, in bytes per second; None for no limit."""
    minute = at.hour * 60 + at.minute
    return next((entry.rate for entry in entries if entry.holds(at.weekday(), minute)), plain)


def _entry(text: str) -> LimitHours:
    match = _ENTRY.fullmatch(text.strip())
    if match is None:
        raise SettingsError("upload_hours", f"{text!r} is not as in 08:00-18:00=100MB/s or Mon-Fri 08:00-18:00=none")
    start, end = (int(match[n]) * 60 + int(match[n + 1]) for n in (2, 4))
    if max(int(match[3]), int(match[5])) > 59 or not (start < DAY_MINUTES and end <= DAY_MINUTES) or start == end:
        raise SettingsError("upload_hours", f"{text!r}: hours are from 00:00 to 24:00, and the end is not the start")
    days = frozenset(range(7)) if match[1] is None else _days(match[1], text)
    return LimitHours(days, start, end, None if match[6] == "none" else parse_rate("upload_hours", match[6]))


def _days(text: str, entry: str) -> frozenset[int]:
    found = set[int]()
    for part in text.lower().split("+"):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise SettingsError("upload_hours", f"{entry!r}: {part!r} is not a day, as in Mon, Mon-Fri or Sat+Sun")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found.update((begin + n) % 7 for n in range((end - begin) % 7 + 1))
    return frozenset(found)
