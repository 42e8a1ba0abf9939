"""The parts of stores in memory: files as consecutive places, sources and stores over them, the index of tensors.

A place is a contiguous range of a file's bytes: a buffer, a header, a tensor. Chunks may straddle places. If the user
can write to a place, its `check` detects that. Places in GPU memory are copied through `staging`, or lent as they are.

Buffers are never unmapped explicitly: a buffer lives until the last view over it is gone, so lent memory outlives the
store. Must not know: torch, hash functions, peers.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from swarm.content.manifest import Chunk, FileEntry, Manifest
from swarm.content.safetensors_header import Tensor
from swarm.content.selection import Part
from swarm.errors import LocalProtocolError, ManifestInvalid, SourceChanged, StoreFull
from swarm.store import AnySpan, DeviceSource, DeviceView, Source, Span, View
from swarm.store.casting import CastView
from swarm.store.staging import LANDING_BYTES, incoming, outgoing

# A smaller mapping gains no huge page, and a process may have about 65,000 mappings.
_MAPPED_BYTES_MIN = 2 << 20
ALIGNED_BYTES = 64  # of memory for a range of a file: tensors in it are aligned as in the file

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """A contiguous range of a file's bytes. `check` raises SourceChanged if the user has written to it."""

    view: View | CastView
    check: Callable[[], None] | None = None


class PlacedFile:
    """A file as places, or the parts of it that have one: each at its offset, in order."""

    def __init__(self, places: Iterable[tuple[int, Place]]) -> None:
        found = [(start, place) for start, place in places if place.view.nbytes]
        self._starts = [start for start, _ in found]
        self._places = [place for _, place in found]

    @classmethod
    def whole(cls, places: Iterable[Place]) -> PlacedFile:
        """A file of places without gaps."""
        found = list(places)
        starts = itertools.accumulate((place.view.nbytes for place in found), initial=0)
        return cls(zip(starts, found, strict=False))

    def place(self, offset: int) -> tuple[int, Place] | None:
        """The place at or before an offset, with its own."""
        number = bisect_right(self._starts, offset) - 1
        return (self._starts[number], self._places[number]) if number >= 0 else None

    def cut(self, offset: int, size: int) -> Iterator[Place]:
        """The bytes `[offset, offset + size)`, split at the places. Raises LocalProtocolError at a gap."""
        number = bisect_right(self._starts, offset) - 1
        while size > 0:
            place = self._places[number] if 0 <= number < len(self._places) else None
            view = None if place is None else place.view[(within := offset - self._starts[number]) : within + size]
            if place is None or view is None or not view.nbytes:
                raise LocalProtocolError(f"byte {offset} of the file belongs to no chunk of this fetch")
            yield Place(view, place.check)
            offset, size, number = offset + view.nbytes, size - view.nbytes, number + 1


class MemorySource:
    """A `Source` over placed files. After `close` it raises SourceChanged."""

    manifest: Manifest
    _files: list[PlacedFile] | None = None  # None once closed

    def spans(self, chunk: Chunk) -> Iterator[memoryview]:
        """The chunk's bytes, read-only. Raises SourceChanged, before or after their use, if a tensor changed."""
        return self._read(chunk.file, chunk.offset, chunk.size)

    def device_spans(self, chunk: Chunk) -> Iterator[AnySpan]:
        """Like `spans`, with GPU memory as DeviceViews."""
        return self._lent(chunk.file, chunk.offset, chunk.size)

    def close(self) -> None:
        """Releases the memory; lent views keep theirs."""
        self._files = None

    def _read(self, file: int, offset: int, size: int) -> Iterator[memoryview]:
        for view in self._lent(file, offset, size):
            if isinstance(view, DeviceView):
                yield from outgoing(view)
            else:
                yield view

    def _lent(self, file: int, offset: int, size: int) -> Iterator[View]:
        for place in self._file(file).cut(offset, size):
            if isinstance(place.view, CastView):
                raise LocalProtocolError(f"{self.manifest.files[file].path}: its tensors were cast as they arrived")
            if place.check:
                place.check()
            yield place.view.toreadonly()
            if place.check:  # for a write while the view was in use
                place.check()

    def _file(self, number: int) -> PlacedFile:
        if self._files is None:
            raise SourceChanged("memory", "it was closed")
        return self._files[number]


class MemoryLanding(MemorySource):
    """A `Store` over placed files, except for `seal`."""

    devices: frozenset[int] = frozenset()
    part: Part | None = None  # that has places; None: everything
    described: Manifest | None = None  # that a promise has become

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """Same as `spans`."""
        return self.spans(chunk)

    def present(self) -> Iterator[Chunk]:
        """No chunk: memory keeps nothing of an earlier fetch."""
        return iter(())

    def files(self) -> dict[str, memoryview]:
        """Contents of files other than safetensors (configuration, tokenizer), by path, read-only."""
        numbers = range(len(self.manifest.files)) if self.part is None else self.part.files
        described = self.described or self.manifest
        plain = ((number, f) for number in numbers if not (f := described.files[number]).header)
        return {f.path: next(self._read(number, 0, f.size), memoryview(b"")) for number, f in plain}

    def landing(self, chunk: Chunk) -> Iterator[memoryview]:
        """The final host memory, or pinned memory that is copied to the GPU; at most LANDING_BYTES a view."""
        for place in self._file(chunk.file).cut(chunk.offset, chunk.size):
            if isinstance(place.view, CastView):
                yield from place.view.incoming()
                continue
            for view in _lent_parts(place.view):
                if isinstance(view, DeviceView):
                    yield from incoming(view)
                else:
                    yield view

    def device_landing(self, chunk: Chunk) -> Iterator[View]:
        """The final memory; at most LANDING_BYTES a view of host memory."""
        for place in self._file(chunk.file).cut(chunk.offset, chunk.size):
            if isinstance(place.view, CastView):
                raise LocalProtocolError(f"{self!r}: what is cast lands in host memory")
            yield from _lent_parts(place.view)


def _lent_parts(view: View) -> Iterator[View]:
    if isinstance(view, DeviceView):
        yield view
        return
    for start in range(0, view.nbytes, LANDING_BYTES):
        yield view[start : start + LANDING_BYTES]


class PromisedSource:
    """A store of the manifest that a promise has become, as a source of the promise: its chunks are the same."""

    def __init__(self, manifest: Manifest, store: Source) -> None:
        self.manifest = manifest
        self._store = store

    def spans(self, chunk: Chunk) -> Iterator[Span]:
        """As the store's."""
        return self._store.spans(chunk)

    def device_spans(self, chunk: Chunk) -> Iterator[AnySpan]:
        """As the store's, in host memory if it has no GPU."""
        return self._store.device_spans(chunk) if isinstance(self._store, DeviceSource) else self.spans(chunk)

    def close(self) -> None:
        """Closes the store."""
        self._store.close()


class TensorIndex:
    """The tensors of a manifest, or of a part: `by_file` in order of offset, `owners` and `aliases` by name.

    Unused tensors, and those that the part does not want, are in `by_file` and have no owner. Raises ManifestInvalid
    for two used tensors of a name, which no state dict can hold.
    """

    def __init__(self, manifest: Manifest, part: Part | None = None) -> None:
        self.by_file = [file.tensors() for file in manifest.files]
        self._part = part
        self.owners: dict[str, Tensor] = {}
        for file, entries in zip(manifest.files, self.by_file, strict=True):
            unused = set(file.unused)
            for entry in entries:
                if entry.name not in unused and self.owners.setdefault(entry.name, entry) is not entry:
                    _twice(file, entry.name)
        self.aliases: dict[str, str] = {}
        for file in manifest.files:
            for alias, name in file.aliases().items():
                # A tensor's own name takes precedence over the metadata of another file.
                if alias not in self.owners and self.aliases.setdefault(alias, name) != name:
                    _twice(file, alias)
        if part is not None:
            self._narrow(part)

    def shown(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """The tensors by each of their names that is wanted."""
        named = {**tensors, **{alias: tensors[name] for alias, name in self.aliases.items()}}
        return {name: tensor for name, tensor in named.items() if self._part is None or self._part.wants(name)}

    def _narrow(self, part: Part) -> None:
        files = set(part.files)
        there = {id(entry) for number in files for entry in self.by_file[number]}
        aliases = {a: n for a, n in self.aliases.items() if part.wants(a) and id(self.owners.get(n)) in there}
        needed = set(aliases.values())
        self.owners = {
            name: entry
            for name, entry in self.owners.items()
            if id(entry) in there and (part.wants(name) or name in needed)
        }
        self.aliases = aliases


def _twice(file: FileEntry, name: str) -> NoReturn:
    raise ManifestInvalid(file.path, f"another file has a tensor {name!r} too; fetch into a directory instead")


def buffer(size: int) -> memoryview:
    """`size` zeroed bytes, in huge pages from 2 MiB up. Raises StoreFull."""
    if size < _MAPPED_BYTES_MIN:
        return memoryview(bytearray(size))
    try:
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise StoreFull("memory", need_bytes=size, free_bytes=0) from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)


def range_buffer(start: int, end: int) -> memoryview:
    """Zeroed bytes for a range of a file. Raises StoreFull."""
    shift = start % ALIGNED_BYTES
    return buffer(end - start + shift)[shift:]


def ranges(manifest: Manifest, part: Part | None, number: int) -> list[tuple[int, int]]:
    """The ranges of a file's bytes, start and end, that have a place: those of the part's chunks."""
    size = manifest.files[number].size
    return part.covered(number) if part is not None else [(0, size)] if size else []


def demand_room(need_bytes: int) -> None:
    """Raises StoreFull for more than is available: overcommit would grant it, and kill this process later."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free_bytes = sum(int(line[1]) << 10 for line in lines if line[0] in ("MemAvailable:", "SwapFree:"))
    if need_bytes > free_bytes:
        raise StoreFull("memory", need_bytes=need_bytes, free_bytes=free_bytes)
