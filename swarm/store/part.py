"""Some files of an artifact as a source: it reads the chunks of these files only.

Must not know: peers, hash functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import msgspec

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Chunk, Manifest
from swarm.errors import StoreError
from swarm.store import IsRight, Span, WatchedSource


def narrowed(manifest: Manifest, paths: set[str]) -> Manifest:
    """The manifest of these files alone, with their chunks."""
    return msgspec.structs.replace(manifest, files=tuple(file for file in manifest.files if file.path in paths))


class PartSource:
    """The chunks of `manifest` in the files of `source`, whose manifest is the narrowed one. It owns `source`."""

    def __init__(self, manifest: Manifest, source: WatchedSource) -> None:
        self.manifest = manifest
        self._source = source
        numbers = {file.path: number for number, file in enumerate(source.manifest.files)}
        self._numbers = {n: numbers[file.path] for n, file in enumerate(manifest.files) if file.path in numbers}

    @property
    def held(self) -> Bitfield:
        """The chunks that it reads."""
        chunks = self.manifest.chunks
        return Bitfield(len(chunks), (chunk.index for chunk in chunks if chunk.file in self._numbers))

    def spans(self, chunk: Chunk) -> Iterator[Span]:
        """See Source."""
        return self._source.spans(self._of_source(chunk))

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """See WatchedSource."""
        return self._source.read(self._of_source(chunk))

    def demand_unchanged(self, is_right: IsRight) -> None:
        """See WatchedSource."""
        wholes = {number: whole for whole, number in self._numbers.items()}
        self._source.demand_unchanged(lambda chunk: is_right(dataclasses.replace(chunk, file=wholes[chunk.file])))

    def close(self) -> None:
        """Closes the source."""
        self._source.close()

    def _of_source(self, chunk: Chunk) -> Chunk:
        number = self._numbers.get(chunk.file)
        if number is None:
            raise StoreError(f"{self.manifest.files[chunk.file].path} is not in the part that is here")
        return dataclasses.replace(chunk, file=number)

    def __repr__(self) -> str:
        return f"<PartSource {len(self._numbers)} of {len(self.manifest.files)} files of {self._source!r}>"
