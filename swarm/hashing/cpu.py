"""Chunk digests on the CPU, from views of host memory as they arrive.

    stream | leaf 0 | leaf 1 | ... | last leaf, maybe shorter |       chunk digest = hash(d0 d1 ... dn)

The chunk digest is always the hash of leaf digests, also for a chunk of a single leaf: a GPU hashes leaves and a CPU
combines them, and both agree without a special case.

A leaf within a view takes one call, which reads it in place and, above 65,536 bytes, releases the GIL. A leaf that
straddles two views goes through a streaming hasher.

Must not know: the content of the bytes, their origin, their expected digest.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import xxhash

from swarm.content.manifest import HashScheme
from swarm.errors import SettingsError


def demand(scheme: HashScheme) -> None:
    """Raises SettingsError where chunks of this scheme cannot be hashed."""
    if scheme.name == "blake3" and importlib.util.find_spec("blake3") is None:
        raise SettingsError(
            "chunk_hash", "chunks are hashed with BLAKE3, which is not installed: pip install 'swarm-weights[blake3]'"
        )


@functools.cache
def _hashes(name: str) -> tuple[Callable[[], Any], Callable[[Any], bytes]]:
    """A streaming hasher, and the digest of one buffer."""
    if name == "blake3":
        from blake3 import blake3

        return blake3, lambda data: blake3(data).digest()
    return xxhash.xxh3_128, xxhash.xxh3_128_digest


class LeafHasher:
    """Hashes the bytes of one chunk. Not for several threads at once."""

    def __init__(self, scheme: HashScheme) -> None:
        self._leaf_bytes = scheme.leaf_bytes
        self._hasher, self._hash = _hashes(scheme.name)
        self._leaf_digests = self._hasher()
        self._open_leaf = self._hasher()
        self._open_bytes = 0

    def update(self, view: memoryview | bytes) -> None:
        """Takes the chunk's next bytes, out of a contiguous view that the call does not keep."""
        data = memoryview(view)
        if not data.nbytes:
            return  # an empty view of wider elements cannot be cast
        data = data.cast("B")
        position = 0
        while position < len(data):
            end = min(position + self._leaf_bytes - self._open_bytes, len(data))
            if end - position == self._leaf_bytes:
                self._leaf_digests.update(self._hash(data[position:end]))
            else:
                self._continue_leaf(data[position:end])
            position = end

    def digest(self) -> bytes:
        """The chunk digest of everything taken so far. More may be taken afterwards."""
        digests = self._leaf_digests
        if self._open_bytes:
            digests = digests.copy()
            digests.update(self._open_leaf.digest())
        return bytes(digests.digest())

    def _continue_leaf(self, data: memoryview) -> None:
        self._open_leaf.update(data)
        self._open_bytes += len(data)
        if self._open_bytes == self._leaf_bytes:
            self._leaf_digests.update(self._open_leaf.digest())
            self._open_leaf = self._hasher()
            self._open_bytes = 0


def chunk_digest(scheme: HashScheme, views: Iterable[memoryview | bytes]) -> bytes:
    """The digest of the chunk that these views are in order."""
    hasher = LeafHasher(scheme)
    for view in views:
        hasher.update(view)
    return hasher.digest()
