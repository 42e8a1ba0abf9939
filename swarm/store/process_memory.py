"""The memory map of this process: which of its addresses may be written to.

A tensor can lie in memory that its owner mapped for reading (`numpy.memmap(mode="r")`, a file of safetensors that is
mapped): a write there ends the process. A numpy array that only numpy counts as read-only looks like any other memory.

Must not know: tensors.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import Self

MAPS = Path("/proc/self/maps")


class WritableMemory:
    """The writable ranges of addresses at the time of `read`, in order and apart."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self._starts = [start for start, _ in ranges]
        self._ends = [end for _, end in ranges]

    @classmethod
    def read(cls) -> Self | None:
        """The ranges of this process; None if the system does not tell."""
        try:
            lines = MAPS.read_text().splitlines()
        except OSError:
            return None
        ranges: list[tuple[int, int]] = []
        for line in lines:
            span, rights, *_ = line.split(maxsplit=2)
            start, end = (int(address, 16) for address in span.split("-"))
            if "w" not in rights:
                continue
            if ranges and ranges[-1][1] == start:
                ranges[-1] = ranges[-1][0], end
            else:
                ranges.append((start, end))
        return cls(ranges)

    def __contains__(self, span: tuple[int, int]) -> bool:
        """Whether all addresses from the first up to the second may be written to."""
        number = bisect_right(self._starts, span[0]) - 1
        return number >= 0 and span[1] <= self._ends[number]
