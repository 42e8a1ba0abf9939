"""Upload limits by the hour: which of them holds, over midnight and weekends too?"""

from __future__ import annotations

from datetime import datetime

import pytest

from swarm.errors import SettingsError
from swarm.net.timetable import limit, read
from swarm.settings import Settings

WORK = ("Mon-Fri 08:00-18:00=100MB/s", "22:00-06:00=none", "Sat+Sun 00:00-24:00 = 1 GB/s")
# 2026-11-30 is a Monday.


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("2026-11-30T08:00", 100e6), ("2026-11-30T17:59", 100e6), ("2026-11-30T18:00", 5.0),
        ("2026-11-30T22:00", None), ("2026-12-01T05:59", None), ("2026-12-01T06:00", 5.0),
        ("2026-12-05T12:00", 1e9), ("2026-12-05T23:00", None),
    ],
)  # fmt: skip
def test_which_limit_holds(at: str, expected: float | None) -> None:
    assert limit(read(WORK), 5.0, datetime.fromisoformat(at)) == expected


def test_does_a_time_over_midnight_belong_to_the_day_on_which_it_began() -> None:
    entries = read(["Fri-Sun 22:00-06:00=1MB/s"])
    at = {day: limit(entries, None, datetime.fromisoformat(f"2026-12-{day}T03:00")) for day in ("04", "05", "07", "08")}
    assert at == {"04": None, "05": 1e6, "07": 1e6, "08": None}


def test_do_days_wrap_around_the_week() -> None:
    (entry,) = read(["sat-mon 10:00-11:00=1MB/s"])
    assert entry.days == {5, 6, 0}


@pytest.mark.parametrize("text", ["", "8-18=1MB/s", "08:00-25:00=1MB/s", "08:61-09:00=1MB/s", "08:00-08:00=none",
                                  "Mo 08:00-09:00=1MB/s", "Mon 08:00-09:00=fast", "24:00-08:00=none"])  # fmt: skip
def test_is_a_wrong_entry_an_error_that_names_it(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^upload_hours: "):
        read([text])


def test_reads_a_setting_several_entries() -> None:
    assert Settings(upload_hours=",".join(WORK)).upload_hours == WORK  # type: ignore[arg-type]
