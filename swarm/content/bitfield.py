"""Which chunks a node holds: a set of chunk indices with a compact form for the wire.

Pure. A stranger's bytes become a `Bitfield` only through `unpack`, which knows how many there must be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt


class Bitfield:
    """A mutable set of chunk indices below `length`. `mask` is its numpy view, one bool per chunk."""

    def __init__(self, length: int, held: Iterable[int] = ()) -> None:
        self.mask: npt.NDArray[np.bool_] = np.zeros(length, dtype=np.bool_)
        self._count = 0
        for index in held:
            self.add(index)

    @classmethod
    def full(cls, length: int) -> Bitfield:
        """All of `length` chunks."""
        field = cls(length)
        field.mask[:] = True
        field._count = length
        return field

    @classmethod
    def unpack(cls, data: bytes, length: int) -> Bitfield:
        """From `pack`'s bytes. Raises ValueError when they are not exactly those of `length` chunks."""
        if len(data) != (length + 7) // 8:
            raise ValueError(f"bitfield of {len(data)} bytes for {length} chunks")
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
        if bits[length:].any():
            raise ValueError("bitfield has bits after its end")
        field = cls(length)
        field.mask[:] = bits[:length]
        field._count = int(field.mask.sum())
        return field

    def pack(self) -> bytes:
        """Eight chunks a byte, chunk 0 in the highest bit of the first."""
        return np.packbits(self.mask).tobytes()

    def add(self, index: int) -> None:
        """Adds one chunk; adding it twice is the same as once."""
        if not self.mask[index]:
            self.mask[index] = True
            self._count += 1

    def discard(self, index: int) -> None:
        """Takes one chunk out, if it is in."""
        if self.mask[index]:
            self.mask[index] = False
            self._count -= 1

    def __contains__(self, index: int) -> bool:
        return bool(self.mask[index])

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return (int(index) for index in np.flatnonzero(self.mask))

    @property
    def length(self) -> int:
        """How many chunks there are, held or not."""
        return len(self.mask)

    @property
    def complete(self) -> bool:
        """Whether every chunk is held."""
        return self._count == len(self.mask)

    def __repr__(self) -> str:
        return f"<Bitfield {self._count}/{len(self.mask)}>"


def runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending indices as (first, count) pairs."""
    found: list[tuple[int, int]] = []
    for index in indices:
        if found and index == found[-1][0] + found[-1][1]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((index, 1))
    return found
