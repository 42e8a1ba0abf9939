"""Fetches into host memory: `MemoryStore`, and the tensors that share its buffers.

    fetch(model_id)    a buffer for each file, lent as CPU tensors that share it

A tensor that was lent can be written to, so it is watched through torch's version counter (`tensor_source`).

Must not know: hash functions, peers, sockets, tensors of the caller. torch is optional, so functions import it.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from swarm.content.manifest import Manifest
from swarm.content.safetensors_header import Tensor
from swarm.content.selection import Part
from swarm.errors import LocalProtocolError, SourceChanged
from swarm.store import IsRight
from swarm.store.memory import MemoryLanding, Place, PlacedFile, TensorIndex, demand_room, range_buffer, ranges
from swarm.store.torch_types import demand_representable, demand_types, torch_type

if TYPE_CHECKING:
    import torch


class MemoryStore(MemoryLanding):
    """A buffer for each file, or for each range of it that a part wants; after `seal`, tensors that share them.

    Before any byte is fetched, raises StoreFull, ManifestInvalid for two tensors of one name, and StoreConflict for
    tensors that torch cannot hold (6 bits an element). Only `tensors` needs torch.
    """

    def __init__(self, manifest: Manifest, part: Part | None = None) -> None:
        self._index = TensorIndex(manifest, part)
        demand_representable(self._index.owners.values())
        spans = [ranges(manifest, part, number) for number in range(len(manifest.files))]
        demand_room(sum(end - start for of_file in spans for start, end in of_file))
        self.manifest = manifest
        self.part = part
        self._shared = [SharedFile([(start, range_buffer(start, end)) for start, end in of_file]) for of_file in spans]
        self._files = list(self._shared)
        self._sealed = False
        self._tensors: SharedTensors | None = None

    def describe(self, manifest: Manifest, part: Part | None) -> None:
        """The manifest that a promise has become, with its tensors; `part` of it. Raises as the constructor does."""
        self._index = TensorIndex(manifest, part)
        demand_representable(self._index.owners.values())
        self.described = manifest

    def seal(self, _: IsRight) -> None:
        """Makes `tensors` and `files` available."""
        self._sealed = True

    def files(self) -> dict[str, memoryview]:
        """As in MemoryLanding; requires `seal`."""
        self._demand_sealed()
        return super().files()

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Every wanted tensor by name, writable, sharing the store's memory; tied names share a tensor object.

        A tensor is made when it is asked for: a model may have 100,000. Each call returns the same objects. A tensor
        that is not aligned to its element size is copied, as torch requires; the safetensors library writes no such
        files. A write to a tensor withdraws its chunks from serving. Raises SettingsError without torch, StoreConflict
        for a dtype that this torch lacks.
        """
        self._demand_sealed()
        self._tensors = self._tensors or SharedTensors(self._index, self._shared)
        return self._tensors

    def close(self) -> None:
        """Releases the memory; lent tensors and files keep theirs."""
        super().close()
        self._shared, self._tensors = [], None

    def _demand_sealed(self) -> None:
        if not self._sealed or self._files is None:
            raise LocalProtocolError("a memory store hands out its contents after seal() and before close()")


class SharedFile(PlacedFile):
    """Buffers of a file, by the offset of each. The tensors that share them are watched."""

    def __init__(self, buffers: Sequence[tuple[int, memoryview]]) -> None:
        super().__init__((start, Place(memory)) for start, memory in buffers)
        self._lent: dict[int, tuple[str, torch.Tensor]] = {}  # name and flat tensor, by the offset of the tensor
        self._offsets: list[int] = []  # of tensors that may be lent, in order

    def lends(self, offsets: Iterable[int]) -> None:
        """The offsets of the tensors that `tensor` may be called with, in order."""
        self._offsets = list(offsets)

    def tensor(self, entry: Tensor) -> torch.Tensor:
        """A new tensor on the memory of an entry."""
        place = self.place(entry.offset)
        memory = place[1].view if entry.size and place else memoryview(b"")
        if not isinstance(memory, memoryview):
            raise LocalProtocolError(f"{entry.name} lies in no host memory")
        raw, tensor = _sharing(memory, entry.offset - (place[0] if place else 0), entry)
        # `raw` shares the tensor's counter and keeps its memory: `tensor.data = other` leaves the bytes here unchanged.
        if entry.size:
            self._lent[entry.offset] = entry.name, raw
        return tensor

    def cut(self, offset: int, size: int) -> Iterator[Place]:
        """As PlacedFile, checked by the watches of the tensors in the range."""
        for place in super().cut(offset, size):
            begin, end = offset, offset + place.view.nbytes
            yield Place(place.view, partial(self._check, begin, end))
            offset = end

    def _check(self, begin: int, end: int) -> None:
        if self._lent:
            first = max(0, bisect_right(self._offsets, begin) - 1)
            for start in itertools.islice(self._offsets, first, bisect_left(self._offsets, end)):
                name, raw = self._lent.get(start, ("", None))
                if raw is not None and raw._version:
                    raise SourceChanged(name, "it was written to")


class SharedTensors(Mapping[str, "torch.Tensor"]):
    """The tensors of a memory store by name, each made when it is first asked for. Thread-safe."""

    def __init__(self, index: TensorIndex, files: Sequence[SharedFile]) -> None:
        self._entries: dict[str, tuple[SharedFile, Tensor]] = {}
        for file, entries in zip(files, index.by_file, strict=True):
            owned = [entry for entry in entries if index.owners.get(entry.name) is entry]
            file.lends(entry.offset for entry in owned if entry.size)
            self._entries |= {entry.name: (file, entry) for entry in owned}
        demand_types({entry.dtype: entry for _, entry in self._entries.values()}.values())
        self._names = index.shown({name: name for name in self._entries})  # name -> that of the stored tensor
        self._made: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._names[name]
        if (tensor := self._made.get(stored)) is None:
            with self._lock:
                if (tensor := self._made.get(stored)) is None:
                    file, entry = self._entries[stored]
                    tensor = self._made[stored] = file.tensor(entry)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def _sharing(memory: memoryview, offset: int, entry: Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor on this memory, or on an aligned copy of it, and the flat tensor that it is a view of."""
    import torch

    shape, dtype = torch_type(entry)
    if not entry.size:  # frombuffer refuses empty memory
        return (tensor := torch.empty(shape, dtype=dtype)), tensor
    raw = torch.frombuffer(memory, dtype=dtype, count=entry.size // dtype.itemsize, offset=offset)
    if raw.data_ptr() % dtype.itemsize:
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=entry.size, offset=offset).clone().view(dtype)
    return raw, raw.view(shape)
