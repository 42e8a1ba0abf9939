"""Sets of chunk indices, with the bitfield of BitTorrent (BEP 3) as wire format.

Pure. Bytes from a peer become a `Bitfield` only through `unpack`, which checks them against the number of chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt


class Bitfield:
    """A mutable set of chunk indices below `length`. `mask` is a numpy view of it, a bool per chunk."""

    def __init__(self, length: int, held: Iterable[int] = ()) -> None:
        self.mask: npt.NDArray[np.bool_] = np.zeros(length, dtype=np.bool_)
        self._count = 0
        for index in held:
            self.add(index)

    @classmethod
    def full(cls, length: int) -> Bitfield:
        """The set of all `length` chunks."""
        field = cls(length)
        field.mask[:] = True
        field._count = length
        return field

    @classmethod
    def unpack(cls, data: bytes, length: int) -> Bitfield:
        """The inverse of `pack`. Raises ValueError for a wrong size of `data` or bits beyond `length`."""
        if len(data) != (length + 7) // 8:
            raise ValueError(f"bitfield of {len(data)} bytes for {length} chunks")
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
        if bits[length:].any():
            raise ValueError("bitfield has bits after its end")
        return cls._masked(bits[:length].astype(np.bool_))

    def pack(self) -> bytes:
        """The wire format: eight chunks per byte, chunk 0 in the highest bit of the first byte."""
        return np.packbits(self.mask).tobytes()

    def add(self, index: int) -> None:
        """Adds a chunk; idempotent."""
        if not self.mask[index]:
            self.mask[index] = True
            self._count += 1

    def discard(self, index: int) -> None:
        """Removes a chunk if it is in the set."""
        if self.mask[index]:
            self.mask[index] = False
            self._count -= 1

    def covers(self, other: Bitfield) -> bool:
        """Whether every chunk of the other set is in this one."""
        return not bool((other.mask & ~self.mask).any())

    def union(self, other: Bitfield) -> Bitfield:
        """A new set of the chunks of both."""
        return self._masked(self.mask | other.mask)

    def minus(self, other: Bitfield) -> Bitfield:
        """A new set of the chunks that the other set lacks."""
        return self._masked(self.mask & ~other.mask)

    def common(self, other: Bitfield) -> int:
        """The number of chunks in both sets."""
        return int((self.mask & other.mask).sum())

    @classmethod
    def _masked(cls, mask: npt.NDArray[np.bool_]) -> Bitfield:
        field = cls(len(mask))
        field.mask[:] = mask
        field._count = int(mask.sum())
        return field

    def __contains__(self, index: int) -> bool:
        return bool(self.mask[index])

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return (int(index) for index in np.flatnonzero(self.mask))

    @property
    def length(self) -> int:
        """Number of chunks of the artifact."""
        return len(self.mask)

    @property
    def complete(self) -> bool:
        """Whether the set contains all chunks."""
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
