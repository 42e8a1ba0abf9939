"""What stores in memory are made of: files as consecutive places of memory, and buffers to land in.

A place is some bytes of a file that lie together: a whole buffer, a header, one tensor. Chunks know nothing of places
and may straddle them at will. Where somebody else can write to a place, its `check` tells whether that has happened.
A place may be in the memory of a GPU; `staging` then carries its bytes, unless they are asked for as they are.

Nothing is ever unmapped by hand: a buffer lives until the last view over it is gone, so what was handed out outlives
the store. Must not know: torch, hash functions, peers.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from swarm.content.manifest import Chunk, FileEntry, Manifest
from swarm.content.safetensors_header import Tensor
from swarm.errors import ManifestInvalid, SourceChanged, StoreFull
from swarm.store import AnySpan, DeviceView, View
from swarm.store.staging import LANDING_BYTES, incoming, outgoing

# Below one huge page a mapping of its own gains nothing, and a process may only have about 65,000 of them.
_MAPPED_BYTES_MIN = 2 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Consecutive bytes of a file. `check` raises SourceChanged when somebody else has written to them."""

    view: View
    check: Callable[[], None] | None = None


class PlacedFile:
    """One file as places that follow one another without holes."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._places = [place for place in places if place.view.nbytes]
        self._starts = list(itertools.accumulate((place.view.nbytes for place in self._places), initial=0))

    def cut(self, offset: int, size: int) -> Iterator[Place]:
        """The bytes `[offset, offset + size)`, place after place."""
        number = bisect_right(self._starts, offset) - 1
        while size > 0:
            place, within = self._places[number], offset - self._starts[number]
            view = place.view[within : within + size]
            yield Place(view, place.check)
            offset, size, number = offset + view.nbytes, size - view.nbytes, number + 1


class MemorySource:
    """A `Source` over placed files. Once closed, it raises SourceChanged."""

    manifest: Manifest
    _files: list[PlacedFile] | None = None  # None once closed

    def spans(self, chunk: Chunk) -> Iterator[memoryview]:
        """The chunk's bytes, read-only.

        Raises SourceChanged, before or after they were used, once a tensor in them was written to or moved.
        """
        return self._read(chunk.file, chunk.offset, chunk.size)

    def device_spans(self, chunk: Chunk) -> Iterator[AnySpan]:
        """As `spans`, but GPU memory as it is."""
        return self._lent(chunk.file, chunk.offset, chunk.size)

    def close(self) -> None:
        """Lets go of the memory; what was handed out keeps its own."""
        self._files = None

    def _read(self, file: int, offset: int, size: int) -> Iterator[memoryview]:
        for view in self._lent(file, offset, size):
            if isinstance(view, DeviceView):
                yield from outgoing(view)
            else:
                yield view

    def _lent(self, file: int, offset: int, size: int) -> Iterator[View]:
        for place in self._file(file).cut(offset, size):
            if place.check:
                place.check()
            yield place.view.toreadonly()
            if place.check:  # it may have been written to while it was sent
                place.check()

    def _file(self, number: int) -> PlacedFile:
        if self._files is None:
            raise SourceChanged("memory", "it was closed")
        return self._files[number]


class MemoryLanding(MemorySource):
    """A `Store` over placed files, except for `seal`."""

    devices: frozenset[int] = frozenset()

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """The same as `spans`."""
        return self.spans(chunk)

    def present(self) -> Iterator[Chunk]:
        """Nothing: memory remembers no earlier attempt."""
        return iter(())

    def files(self) -> dict[str, memoryview]:
        """Contents of the files that are not safetensors (configuration, tokenizer), by path, read-only."""
        numbered = enumerate(self.manifest.files)
        return {f.path: next(self._read(n, 0, f.size), memoryview(b"")) for n, f in numbered if not f.header}

    def landing(self, chunk: Chunk) -> Iterator[memoryview]:
        """The final memory itself, or pinned memory on its way there, at most LANDING_BYTES at a time."""
        for view in self.device_landing(chunk):
            if isinstance(view, DeviceView):
                yield from incoming(view)
            else:
                yield view

    def device_landing(self, chunk: Chunk) -> Iterator[View]:
        """The final memory itself; at most LANDING_BYTES at a time where it is the host's."""
        for place in self._file(chunk.file).cut(chunk.offset, chunk.size):
            if isinstance(place.view, DeviceView):
                yield place.view
                continue
            for start in range(0, place.view.nbytes, LANDING_BYTES):
                yield place.view[start : start + LANDING_BYTES]


class TensorIndex:
    """The tensors of a manifest: `by_file`, in order of their offsets; `owners` and `aliases`, by name.

    `heads` says how many bytes of each file come before its tensors: its header, or all of a file that has none.

    Raises ManifestInvalid when a name stands for two tensors: a directory has room for both, one mapping has not.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.by_file = [file.tensors() for file in manifest.files]
        self.heads = [
            entries[0].offset if entries else file.size
            for file, entries in zip(manifest.files, self.by_file, strict=True)
        ]
        self.owners: dict[str, Tensor] = {}
        for file, entries in zip(manifest.files, self.by_file, strict=True):
            for entry in entries:
                if self.owners.setdefault(entry.name, entry) is not entry:
                    _twice(file, entry.name)
        self.aliases: dict[str, str] = {}
        for file in manifest.files:
            for alias, name in file.aliases().items():
                # A tensor's own name counts more than what another file's metadata says.
                if alias not in self.owners and self.aliases.setdefault(alias, name) != name:
                    _twice(file, alias)


def _twice(file: FileEntry, name: str) -> NoReturn:
    raise ManifestInvalid(file.path, f"another file has a tensor {name!r} too; fetch into a directory instead")


def buffer(size: int) -> memoryview:
    """`size` zeroed bytes in huge pages, if that is worth it. Raises StoreFull."""
    if size < _MAPPED_BYTES_MIN:
        return memoryview(bytearray(size))
    try:
        mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise StoreFull("memory", need_bytes=size, free_bytes=0) from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)


def demand_room(need_bytes: int) -> None:
    """Raises StoreFull for what the kernel would promise now, and kill this process for later."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free_bytes = sum(int(line[1]) << 10 for line in lines if line[0] in ("MemAvailable:", "SwapFree:"))
    if need_bytes > free_bytes:
        raise StoreFull("memory", need_bytes=need_bytes, free_bytes=free_bytes)
