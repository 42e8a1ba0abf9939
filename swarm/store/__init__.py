"""Stores hold the chunks of an artifact: files, host memory, GPU memory. Here: their interfaces.

A store lends memory and files. It does not decide which chunks are verified: the caller fills the views of `landing`,
hashes them, and keeps or discards the chunk. A worker thread receives a chunk view by view:

    for view in store.landing(chunk):    # fill each view before the next is requested
        receive_into(view)

Memory stores yield the final memory. The directory store yields a scratch buffer and writes it to the file when the
next view is requested. GPU memory goes through pinned buffers; a transport that can use GPU memory itself calls
`device_spans` and `device_landing` instead.

Must not know: peers, transports, hash functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:  # `swarm status` reads files by `store.own_files`, and starts without numpy
    from swarm.content.bitfield import Bitfield
    from swarm.content.manifest import Chunk, Manifest


@dataclass(frozen=True, slots=True)
class FileSpan:
    """`size` bytes at `offset` of an open file; `sendfile` sends them from the page cache without a copy."""

    fd: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class DeviceView:
    """`nbytes` bytes at `address` of GPU `device`, kept alive by `owner`; has the methods of a memoryview.

    A lent view counts as filled when all work is done that was enqueued on the current stream (`cuda.Gpu.current`) of
    the thread that requests the next view.
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
        """Returns itself: its unit is the byte."""
        return self

    def toreadonly(self) -> DeviceView:
        """Returns itself: GPU memory has no read-only views."""
        return self

    def release(self) -> None:
        """Does nothing."""


View: TypeAlias = memoryview | DeviceView
Span: TypeAlias = FileSpan | memoryview
AnySpan: TypeAlias = Span | DeviceView
IsRight: TypeAlias = Callable[["Chunk"], bool]  # reads a chunk from the store and hashes it, on any thread


class Source(Protocol):
    """Chunks that can be read, on any thread."""

    manifest: Manifest

    def spans(self, chunk: Chunk) -> Iterator[Span]:
        """The chunk's bytes in order; a span is valid until the next. Raises SourceChanged if they changed."""

    def close(self) -> None:
        """Releases files and memory, and so ends all spans."""


class Store(Source, Protocol):
    """A source that is being filled."""

    def present(self) -> Iterator[Chunk]:
        """Chunks of an earlier fetch that may be complete; the caller must hash them."""

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """The bytes of a chunk that may be present, in order; a view is valid until the next."""

    def landing(self, chunk: Chunk) -> Iterator[memoryview]:
        """Writable views that together are the chunk. Raises StoreError if a write fails."""

    def seal(self, is_right: IsRight, /) -> None:
        """Completes the artifact after the last verified chunk. Blocks; raises StoreError.

        A store whose bytes other programs can have changed since they were verified asks `is_right` again.
        """


@runtime_checkable
class WatchedSource(Source, Protocol):
    """A source whose bytes other programs can change while it is served: files."""

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """As in Store."""

    def demand_unchanged(self, is_right: IsRight, /) -> None:
        """Raises SourceChanged if the bytes changed, StoreError if they cannot be read. Blocks.

        Asks `is_right` where the bytes may have changed, or only a name or the mode of their file.
        """


@runtime_checkable
class RecordingStore(Store, Protocol):
    """A store that remembers the digests of a promise's chunks, which its manifest does not have."""

    def record(self, chunk: int, digest: bytes, reader: str) -> None:
        """Remembers the digest of a chunk that was written, for the next fetch. Raises StoreError."""

    def final(self, file: int) -> bool:
        """Whether a file, by number, had its final name before this fetch."""

    def recorded(self) -> dict[int, tuple[bytes, str]]:
        """Digest and reader by chunk, as earlier fetches recorded them."""


@runtime_checkable
class LossyStore(Store, Protocol):
    """A store that does not keep the bytes of all chunks: only those of `kept` can be read, and are served."""

    kept: Bitfield


@runtime_checkable
class DeviceSource(Source, Protocol):
    """A source that may lie in GPU memory."""

    def device_spans(self, chunk: Chunk) -> Iterator[AnySpan]:
        """Like `spans`, with GPU memory as DeviceViews, which stay valid until the source is closed."""


@runtime_checkable
class DeviceStore(DeviceSource, Store, Protocol):
    """A store that may lie in the memory of the GPUs `devices`, by number."""

    devices: frozenset[int]

    def device_landing(self, chunk: Chunk) -> Iterator[View]:
        """Like `landing`, with GPU memory as DeviceViews."""
