"""Proof of files: hashes each file as its beginning grows, and compares it with the content that an origin lists.

A file is hashed in order, from the store. The state after every chunk is kept, so a chunk that is read again costs the
hashing of what follows it, not of the whole file.

Blocks; a file is advanced by one thread at a time. Must not know: peers, claims, origins.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from swarm.content.manifest import Chunk, Manifest
from swarm.content.promise import GIT_SHA1, SHA256

BATCH_BYTES = 64 << 20  # hashed by one call, which cannot be cancelled


class ReadableChunks(Protocol):
    """Where the files lie."""

    manifest: Manifest

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """As in Store."""


@dataclass
class _Progress:
    states: list[Any] = field(default_factory=list)  # of the hash before chunk n of the file


class FileProver:
    """The files in `store`. `ready(chunk)`: whether a chunk lies there and is not to be read again.

    `contents`: what is listed, by file, as in `FileEntry`.
    """

    def __init__(self, store: ReadableChunks, ready: Callable[[int], bool], contents: Sequence[str]) -> None:
        self._store = store
        self._manifest = store.manifest
        self._ready = ready
        self._contents = contents
        sizes = (file.size for file in self._manifest.files)
        self._files = [_Progress([_hasher(content, size)]) for content, size in zip(contents, sizes, strict=True)]

    def advances(self, file: int) -> bool:
        """Whether the next chunk of a file can be hashed."""
        first, end = self._manifest.first_chunks[file : file + 2]
        place = first + len(self._files[file].states) - 1
        return place < end and self._ready(place)

    def advance(self, file: int) -> None:
        """Hashes the next chunks of a file, about BATCH_BYTES. Raises StoreError."""
        states, done = self._files[file].states, 0
        first = self._manifest.first_chunks[file]
        while done < BATCH_BYTES and self.advances(file):
            chunk = self._manifest.chunks[first + len(states) - 1]
            state = states[-1].copy()
            for view in self._store.read(chunk):
                state.update(view)
            states.append(state)
            done += chunk.size

    def complete(self, file: int) -> bool:
        """Whether all chunks of a file are hashed."""
        first, end = self._manifest.first_chunks[file : file + 2]
        return len(self._files[file].states) == end - first + 1

    def right(self, file: int) -> bool:
        """Whether a complete file has the listed content; not for files that are listed by ETag."""
        found: str = self._files[file].states[-1].hexdigest()
        return found == self._contents[file].partition(":")[2]

    def again(self, chunk: int) -> None:
        """A chunk is replaced: its file is hashed again from there on."""
        file = self._manifest.chunks[chunk].file
        del self._files[file].states[chunk - self._manifest.first_chunks[file] + 1 :]


class _Unhashed:
    """In place of a hash, for files without a listed one."""

    def copy(self) -> _Unhashed:
        return self

    def update(self, view: memoryview) -> None:
        """Ignores the bytes."""

    def hexdigest(self) -> str:
        return ""


def _hasher(content: str, size: int) -> Any:
    if content.startswith(SHA256):
        return hashlib.sha256()
    if content.startswith(GIT_SHA1):
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return _Unhashed()
