"""Gives the memory of closed connections back to the system, some seconds after many have closed.

A closed connection leaves objects in circles, which wait for a full collection, and buffers between others in the heap
of the C library, which keeps the pages for itself: 50 to 100 MB after a flood. Collecting and trimming take tens of
milliseconds, so they wait for CLOSED_LEAST connections and run at most every REST_S, on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc

CLOSED_LEAST = 64  # fewer leave less than 20 MB
REST_S = 10.0


class Reclaimer:
    """Counts connections; all methods run on one loop."""

    def __init__(self) -> None:
        self._count = 0
        self._again = False
        self._timer: asyncio.TimerHandle | None = None

    def count(self) -> None:
        """A connection came that will close."""
        self._count += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(REST_S, self._look)

    def close(self) -> None:
        """Stops the timer."""
        if self._timer:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._count < CLOSED_LEAST and not self._again:
            self._count = 0
            return
        # Connections that are open now close later, so there is one look more after the last of many.
        self._again = self._count >= CLOSED_LEAST
        self._count = 0
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, reclaim)
        self._timer = loop.call_later(REST_S, self._look)


def reclaim() -> None:
    """Collects garbage, and returns free pages of the heap to the system where the C library is glibc."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
