"""What a simulated swarm distributes: an artifact of a few random bytes, a store in memory, and a source that lies.

Must not know: nodes, networks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from swarm.content.manifest import Chunk, ChunkEntry, FileEntry, HashScheme, Manifest
from swarm.errors import SourceChanged
from swarm.hashing.cpu import chunk_digests
from swarm.store import FileSpan, IsRight, Source, Span


@dataclass(frozen=True)
class Content:
    """An artifact with its bytes."""

    manifest: Manifest
    files: tuple[bytes, ...]

    @classmethod
    def random(cls, seed: int, *, chunks: int, chunk_bytes: int) -> Content:
        """A short file of one chunk, and one with all others."""
        data = np.random.default_rng(seed).bytes(chunks * chunk_bytes)
        named = {"config.json": data[: chunk_bytes // 3], "model.bin": data[chunk_bytes:]}
        scheme = HashScheme(leaf_bytes=4096)

        def entry(part: bytes) -> ChunkEntry:
            return ChunkEntry(len(part), chunk_digests(scheme, [part]).xxh3.hex())

        files = []
        for path, whole in named.items():
            parts = tuple(entry(whole[at : at + chunk_bytes]) for at in range(0, len(whole), chunk_bytes))
            files.append(FileEntry(path, len(whole), "", parts))
        manifest = Manifest(1, "checkpoint", "", scheme, chunk_bytes, tuple(files))
        manifest.check()
        return cls(manifest, tuple(named.values()))


class BytesStore:
    """A store in memory; with `files`, a source of them."""

    def __init__(self, manifest: Manifest, files: Iterable[bytes] = ()) -> None:
        self.manifest = manifest
        self.files = [bytearray(data) for data in files] or [bytearray(file.size) for file in manifest.files]
        self.sealed = False

    def spans(self, chunk: Chunk) -> Iterator[memoryview]:
        """See Source."""
        yield memoryview(self.files[chunk.file])[chunk.offset : chunk.offset + chunk.size]

    def present(self) -> Iterator[Chunk]:
        """See Store: nothing."""
        return iter(())

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """See Store."""
        return self.spans(chunk)

    def landing(self, chunk: Chunk) -> Iterator[memoryview]:
        """See Store."""
        return self.spans(chunk)

    def seal(self, _: IsRight) -> None:
        """See Store."""
        self.sealed = True

    def close(self) -> None:
        """See Source. The bytes stay, to be compared."""


class Changed:
    """A source whose bytes from chunk `first` on another program has changed: reading them fails, as files do."""

    def __init__(self, source: Source, *, first: int) -> None:
        self.manifest = source.manifest
        self._source = source
        self._first = first

    def spans(self, chunk: Chunk) -> Iterator[Span]:
        """See Source."""
        if chunk.index >= self._first:
            raise SourceChanged("model.bin", "it was written to")
        yield from self._source.spans(chunk)

    def close(self) -> None:
        """See Source."""
        self._source.close()


class Liar:
    """A source whose every n-th chunk is wrong in its first byte."""

    def __init__(self, source: Source, *, every: int) -> None:
        self.manifest = source.manifest
        self._source = source
        self._every = every

    def spans(self, chunk: Chunk) -> Iterator[Span]:
        """See Source."""
        for number, span in enumerate(self._source.spans(chunk)):
            if number or chunk.index % self._every or isinstance(span, FileSpan):
                yield span
            else:
                wrong = bytearray(span)
                wrong[0] ^= 0xFF
                yield memoryview(wrong)

    def close(self) -> None:
        """See Source."""
        self._source.close()
