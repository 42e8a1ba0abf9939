"""Chunk digests on the CPU, from views of host memory as they arrive.

    stream | leaf 0 | leaf 1 | ... | last leaf, maybe shorter |       chunk digest = XXH3-128(d0 d1 ... dn)
           |<------------------ BLAKE3 ------------------->|

The chunk digest is always the hash of leaf digests, also for a chunk of a single leaf: a GPU hashes leaves and a CPU
combines them, and both agree without a special case.

A leaf within a view takes one call, which reads it in place and, above 65,536 bytes, releases the GIL. A leaf that
straddles two views goes through a streaming hasher. BLAKE3 takes a view at a time and releases the GIL too.

Must not know: the content of the bytes, their origin, their expected digest.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash
from blake3 import blake3 as _blake3

from swarm.content.manifest import Digests, HashScheme


class ChunkHasher:
    """Hashes the bytes of one chunk. Not for several threads at once."""

    def __init__(self, scheme: HashScheme, *, blake3: bool = False) -> None:
        self._leaf_bytes = scheme.leaf_bytes
        self._leaf_digests = xxhash.xxh3_128()
        self._open_leaf = xxhash.xxh3_128()
        self._open_bytes = 0
        self._strong = _blake3() if blake3 else None

    def update(self, view: memoryview | bytes) -> None:
        """Takes the chunk's next bytes, out of a contiguous view that the call does not keep."""
        data = memoryview(view)
        if not data.nbytes:
            return  # an empty view of wider elements cannot be cast
        data = data.cast("B")
        if self._strong is not None:
            self._strong.update(data)
        position = 0
        while position < len(data):
            end = min(position + self._leaf_bytes - self._open_bytes, len(data))
            if end - position == self._leaf_bytes:
                self._leaf_digests.update(xxhash.xxh3_128_digest(data[position:end]))
            else:
                self._continue_leaf(data[position:end])
            position = end

    def digests(self) -> Digests:
        """The digests of everything taken so far. More may be taken afterwards."""
        leaves = self._leaf_digests
        if self._open_bytes:
            leaves = leaves.copy()
            leaves.update(self._open_leaf.digest())
        return Digests(leaves.digest(), self._strong.digest() if self._strong is not None else b"")

    def _continue_leaf(self, data: memoryview) -> None:
        self._open_leaf.update(data)
        self._open_bytes += len(data)
        if self._open_bytes == self._leaf_bytes:
            self._leaf_digests.update(self._open_leaf.digest())
            self._open_leaf = xxhash.xxh3_128()
            self._open_bytes = 0


def chunk_digests(scheme: HashScheme, views: Iterable[memoryview | bytes], *, blake3: bool = False) -> Digests:
    """The digests of the chunk that these views are in order."""
    hasher = ChunkHasher(scheme, blake3=blake3)
    for view in views:
        hasher.update(view)
    return hasher.digests()
