"""Stores: where the bytes of an artifact lie, and where missing ones go.

A store lends memory and files; it never decides what is verified. Whoever writes through `landing` hashes the bytes and
then says `verified`, or lets the chunk stay missing. Stores know nothing of peers, transports or hash functions.

A chunk's way in, on a worker thread, one writable view at a time:

    for view in store.landing(chunk):    # each view must be filled before the next one is asked for
        receive_into(view)

A generator is enough for both kinds of store: memory stores yield the final memory itself, the directory store yields a
scratch buffer and writes it to its place when it is asked for the next view. Memory of a GPU is lent in the same way,
through pinned buffers; who can move GPU memory as it is asks a `DeviceSource` or `DeviceStore` for that instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from swarm.content.manifest import Chunk, Manifest


@dataclass(frozen=True, slots=True)
class FileSpan:
    """`size` bytes at `offset` of an open file; can be sent from the page cache without a copy."""

    fd: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class DeviceView:
    """`nbytes` bytes of GPU number `device` at `address`; `owner` keeps them alive. Sliced and counted as memoryviews.

    Lent to be filled, it counts as filled once everything is done that was enqueued so far on the current stream
    (`cuda.Gpu.current`) of the thread that asks for the next one.
    """

    device: int
    address: int
    nbytes: int
    owner: object

    def __getitem__(self, part: slice) -> DeviceView:
        start, stop, _ = part.indices(self.nbytes)
        return DeviceView(self.device, self.address + start, max(0, stop - start), self.owner)

    def __len__(self) -> int:
        return self.nbytes

    def cast(self, _: str) -> DeviceView:
        """Itself: it is bytes already."""
        return self

    def toreadonly(self) -> DeviceView:
        """Itself: nothing protects the memory of a GPU."""
        return self

    def release(self) -> None:
        """Nothing: `owner` may free its memory whenever it likes."""


View: TypeAlias = memoryview | DeviceView
Span: TypeAlias = FileSpan | memoryview
AnySpan: TypeAlias = Span | DeviceView


class Source(Protocol):
    """Somewhere that chunks can be read from, on any thread."""

    manifest: Manifest

    def spans(self, chunk: Chunk) -> Iterator[Span]:
        """The chunk's bytes, in order, each span valid until the next one is asked for.

        Raises SourceChanged when they can no longer be the manifest's.
        """

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


@runtime_checkable
class DeviceSource(Source, Protocol):
    """A source that may lie in the memory of GPUs."""

    def device_spans(self, chunk: Chunk) -> Iterator[AnySpan]:
        """As `spans`, but GPU memory as it is. Device views stay valid as long as the source is open."""


@runtime_checkable
class DeviceStore(DeviceSource, Store, Protocol):
    """A store that may lie in the memory of GPUs: of `devices`, by number."""

    devices: frozenset[int]

    def device_landing(self, chunk: Chunk) -> Iterator[View]:
        """As `landing`, but GPU memory as it is."""
