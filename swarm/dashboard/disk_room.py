"""Room on the disk where fetches land, measured aside: a file system that hangs must not hold up the event loop.

Must not know: what lies there.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

EVERY_S = 5.0


class DiskRoom:
    """Call it for the last (free, total) bytes; None until they are measured, and where that fails."""

    def __init__(self, path: Callable[[], Path], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._found: tuple[int, int] | None = None
        self._asked_at_s = float("-inf")
        self._measuring: threading.Thread | None = None

    def __call__(self) -> tuple[int, int] | None:
        """(free, total) bytes as measured last."""
        busy = self._measuring is not None and self._measuring.is_alive()
        if not busy and self._clock() - self._asked_at_s >= EVERY_S:
            self._asked_at_s = self._clock()
            self._measuring = threading.Thread(target=self._measure, name="disk-room", daemon=True)
            self._measuring.start()
        return self._found

    def _measure(self) -> None:
        try:
            wanted = self._path().absolute()
            there = next(place for place in (wanted, *wanted.parents) if place.exists())
            usage = shutil.disk_usage(there)
            self._found = usage.free, usage.total
        except (OSError, StopIteration):
            self._found = None
