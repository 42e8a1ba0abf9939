"""Stores: where the bytes of an artifact lie, and where missing ones go.

A store lends memory and files; it never decides what is verified. Whoever writes through `landing` hashes the bytes and
then says `verified`, or lets the chunk stay missing. Stores know nothing of peers, transports or hash functions.

A chunk's way in, on a worker thread, one writable view at a time:

    for view in store.landing(chunk):    # each view must be filled before the next one is asked for
        receive_into(view)

A generator is enough for both kinds of store: memory stores yield the final memory itself, the directory store yields a
scratch buffer and writes it to its place when it is asked for the next view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from swarm.manifest import Chunk, Manifest


@dataclass(frozen=True, slots=True)
class FileSpan:
    """`size` bytes at `offset` of an open file; can be sent from the page cache without a copy."""

    fd: int
    offset: int
    size: int


Span: TypeAlias = FileSpan | memoryview


class Source(Protocol):
    """Somewhere that chunks can be read from, on any thread."""

    manifest: Manifest

    def spans(self, chunk: Chunk) -> Iterator[Span]:
        """The chunk's bytes, in order. Raises SourceChanged when they can no longer be the manifest's."""

    def close(self) -> None:
        """Gives files and memory back. Spans lent before must not be used any more."""


class Store(Source, Protocol):
    """A source that is still being filled."""

    def present(self) -> Iterator[Chunk]:
        """Chunks that may be here already, from an earlier attempt; whoever asks must hash them."""

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """The bytes of a chunk that may be present, in order; a view is valid until the next one is asked for."""

    def landing(self, chunk: Chunk) -> Iterator[memoryview]:
        """Writable views that together are the chunk's place. Raises StoreError when a write fails."""

    def seal(self) -> None:
        """Everything is verified: gives the artifact its final form. Blocks; raises StoreError."""
