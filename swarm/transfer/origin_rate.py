"""How fast all nodes together read a promised artifact from its origin, as one node sees it.

The origin, or a link that all share, is the bottleneck of most cold starts. Streams that are left then get the rate of
those that have ended, and a further request gains nothing. `full` tells it: the reads are about as fast together as
they have ever been. Where the origin limits each connection, the sum falls with each stream that ends.

Must not know: ranges, nodes, clocks.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

WATCH_S = 4.0  # over which the rate is taken: chunks are announced a few at a time
FULL = 0.7  # of the highest rate


class OriginRate:
    """The rate of one artifact's reads. `sizes`: bytes of its chunks."""

    def __init__(self, sizes: npt.NDArray[np.int64]) -> None:
        self._sizes = sizes
        self._expected: Mask = np.zeros(len(sizes), dtype=np.bool_)  # chunks that were being read when last watched
        self._read_bytes = 0  # of such chunks
        self._watched: deque[tuple[float, int]] = deque()  # (time, that), over WATCH_S
        self._began_at = 0.0
        self._highest = 0.0

    def watch(self, now: float, *, wanted: Mask, busy: Mask) -> None:
        """A few times a second: `wanted` chunks are held by no node, `busy` ones are being read.

        What a node brings that has just come is not counted: it was not being read.
        """
        if not self._watched:
            self._began_at = now
        self._read_bytes += int(self._sizes @ (self._expected & ~wanted))
        self._expected = wanted & busy
        self._watched.append((now, self._read_bytes))
        while len(self._watched) > 1 and self._watched[1][0] <= now - WATCH_S:
            self._watched.popleft()
        self._highest = max(self._highest, self.bytes_per_s)

    @property
    def bytes_per_s(self) -> float:
        """The rate now; 0 while it is too new to tell."""
        if not self._watched:
            return 0.0
        (began, before), (now, read) = self._watched[0], self._watched[-1]
        return (read - before) / (now - began) if now - began >= WATCH_S else 0.0

    @property
    def full(self) -> bool:
        """Whether another stream would gain nothing."""
        return bool(self._highest) and self.bytes_per_s >= FULL * self._highest

    @property
    def lasts_s(self) -> float:
        """Seconds since the first look."""
        return self._watched[-1][0] - self._began_at if self._watched else 0.0

    def __repr__(self) -> str:
        return f"<OriginRate {self.bytes_per_s / 1e6:.1f} MB/s, at most {self._highest / 1e6:.1f} so far>"
