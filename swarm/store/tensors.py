"""Artifacts in tensors: `MemoryStore`, `IntoStore`, `GpuStore` and `TensorSource`.

    MemoryStore    fetch(model_id)           own buffers, lent as CPU tensors that share them
    GpuStore       fetch(device="cuda:0")    own tensors in the memory of a GPU
    IntoStore      fetch(into=state_dict)    the caller's tensors, filled in place: CPU, GPU, or both
    TensorSource   serve(state_dict)         the caller's tensors, read as a virtual safetensors file

CPU tensors are sent and received in place, without a copy, unless their layout forbids it (each class says when).
Transports that can use GPU memory send and receive GPU tensors in place; for others `staging` copies.

A write to a tensor makes its chunks differ from the manifest, so all tensors that the caller can write to are watched
through torch's version counter. The counter misses writes through `.data`, numpy or another process, inference tensors
have none, and views of a tensor share it, so a write to one view withdraws the others. Receivers verify every chunk
anyway; the watch only spares them wrong chunks.

Must not know: hash functions, peers, sockets. torch is optional, so functions import it.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from swarm.content import safetensors_header
from swarm.content.manifest import Chunk, Manifest
from swarm.content.safetensors_header import LENGTH_BYTES, Tensor
from swarm.content.selection import Part
from swarm.errors import LocalProtocolError, SourceChanged, StoreConflict, StoreFull
from swarm.store import DeviceView, IsRight, View, cuda
from swarm.store.casting import Caster, CastView, is_cast, kept_chunks
from swarm.store.memory import (
    MemoryLanding,
    MemorySource,
    Place,
    PlacedFile,
    TensorIndex,
    demand_room,
    range_buffer,
    ranges,
)
from swarm.store.targets import count_writes, demand_writable
from swarm.store.tensor_layout import Identity, identity, plain, refuse_overlaps
from swarm.store.torch_types import demand_representable, demand_types, header_entry, torch_type

if TYPE_CHECKING:
    import torch

VIRTUAL_PATH = "model.safetensors"  # the file that a fetch of a state dict into a directory makes

_NAMES_SHOWN = 3


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


class IntoStore(MemoryLanding):
    """Fills the given tensors in place. Their contents are undefined until `seal` has returned.

    Names, dtypes and shapes must match the manifest; else StoreConflict lists the differences before any byte is
    fetched. A name outside the manifest is allowed if it is tied: an alias in the manifest, or memory of a tensor in
    it. Headers and files other than safetensors are kept in memory of the store, so the node can serve every chunk.

    Not every tensor is filled in place. Tensors that are not contiguous are received in temporary memory, kept for
    serving, and copied by `seal`. Aliases with memory of their own are copied from their tensor by `seal`. Tensors that
    the caller has tied and the manifest has not are received separately, and `seal` compares them.

    Raises SettingsError for a value that is not a tensor, StoreConflict for a tensor outside plain memory of the CPU or
    a GPU and for overlapping tensors, and the errors of `MemoryStore`.
    """

    def __init__(
        self,
        manifest: Manifest,
        tensors: Mapping[str, torch.Tensor],
        part: Part | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        index = TensorIndex(manifest, part)
        demand_representable(index.owners.values())
        given = plain(tensors)
        holders = _match(index, given, dtype)
        refuse_overlaps(given)
        demand_writable(given)
        total = manifest.size if part is None else part.size
        demand_room(total - sum(entry.size for entry in index.owners.values()))
        self.manifest = manifest
        self.part = part
        self.devices = _finish_work(given.values())  # else kernels enqueued before would overwrite fetched bytes
        self._watches: list[_Watch] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (target, landed)
        self._twins: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # (name, landed, landed elsewhere)
        self._filled: dict[Identity, torch.Tensor] = {}  # the caller's memory -> the tensor that receives its contents
        landed = {name: self._place(holder, given[holder]) for name, holder in holders.items()}
        for name, entry in index.owners.items():
            if is_cast(entry, dtype) and entry.size:
                target = landed[name][0]
                landed[name] = target, Place(CastView(Caster(target, entry), 0, entry.size))
        for alias, name in index.aliases.items():
            if alias in given:
                self._settle(alias, given[alias], landed[name][0])

        def places(number: int) -> Iterator[tuple[int, Place]]:
            ends = ranges(manifest, part, number)
            offset = 0
            for entry in index.by_file[number]:
                if index.owners.get(entry.name) is entry:
                    yield from _between(ends, offset, entry.offset)
                    yield entry.offset, landed[entry.name][1]
                    offset = entry.offset + entry.size
            yield from _between(ends, offset, manifest.files[number].size)

        self._files = [PlacedFile(places(number)) for number in range(len(manifest.files))]
        self._count_writes()

    def seal(self, _: IsRight) -> None:
        """Copies and compares tensors that were not filled in place.

        Raises SourceChanged if a tensor was written to or moved during the fetch, StoreConflict if tied tensors differ.
        """
        import torch

        for watch in self._watches:
            watch.check()
        for name, landed, other in self._twins:
            if not torch.equal(_flat(landed), _flat(other)):
                raise StoreConflict(name, "is tied to a tensor that has other contents in this model; untie the two")
        for target, landed in self._copies:
            with torch.inference_mode(target.is_inference()):
                target.detach().copy_(landed)
        _finish_work(target for target, _ in self._copies)
        self._count_writes()

    def _count_writes(self) -> None:
        """For autograd, the bytes that transports put into the memory count as writes of torch."""
        count_writes(watch.tensor for watch in self._watches)
        for watch in self._watches:
            watch.renew()

    def close(self) -> None:
        """Releases the caller's tensors."""
        super().close()
        self._watches, self._copies, self._twins, self._filled = [], [], [], {}

    def _place(self, name: str, target: torch.Tensor) -> tuple[torch.Tensor, Place]:
        """The tensor that receives a tensor of the manifest, and its place."""
        if target.is_contiguous() and identity(target) not in self._filled:
            self._filled[identity(target)] = target
            self._watches.append(_Watch(name, target))
            return target, Place(_bytes(target), self._watches[-1].check)
        landed = _empty(tuple(target.shape), target.dtype, target.device)
        self._settle(name, target, landed)
        return landed, Place(_bytes(landed))

    def _settle(self, name: str, target: torch.Tensor, landed: torch.Tensor) -> None:
        """Has `seal` copy `landed` to `target`, or compare it if another tensor fills `target` already."""
        provided = self._filled.get(identity(target))
        if provided is None:
            self._filled[identity(target)] = landed
            self._copies.append((target, landed))
        elif provided is not landed:
            self._twins.append((name, provided, landed))


class OwnStore(IntoStore):
    """Own tensors on a device, each a separate torch allocation, so that the caller can free each.

    Raises StoreFull if the device lacks memory, and the errors of `IntoStore`.
    """

    def __init__(
        self, manifest: Manifest, device: str, part: Part | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        import torch

        index, where = TensorIndex(manifest, part), torch.device(device)
        demand_representable(index.owners.values())
        types = {name: torch_type(entry, dtype) for name, entry in index.owners.items()}
        need_bytes = sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in types.values())
        if where.type == "cpu":
            demand_room(need_bytes)
        else:
            cached_bytes = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
            free_bytes = torch.cuda.mem_get_info(where)[0] + cached_bytes
            if need_bytes > free_bytes:
                raise StoreFull(device, need_bytes=need_bytes, free_bytes=free_bytes)
        made = {name: _empty(*of_type, where) for name, of_type in types.items()}
        super().__init__(manifest, made, part, dtype=dtype)
        self._made = index.shown(made)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name; tied names share a tensor object. Call it after `seal`."""
        return dict(self._made)

    def close(self) -> None:
        """Releases the memory; lent tensors keep theirs."""
        super().close()
        self._made = {}


class GpuStore(OwnStore):
    """Own tensors on a GPU."""


class CastStore:
    """A store of tensors that are cast as they arrive (`casting`): `tensors` of the caller, or new ones on `device`.

    It is filled through host memory alone, also from a GPU. `kept`: the chunks that it can be read for. Raises the
    errors of `IntoStore`.
    """

    def __init__(
        self,
        manifest: Manifest,
        dtype: torch.dtype,
        *,
        device: str = "cpu",
        tensors: Mapping[str, torch.Tensor] | None = None,
        part: Part | None = None,
    ) -> None:
        self.manifest = manifest
        self.kept = kept_chunks(manifest, part, dtype)
        self._store = (
            OwnStore(manifest, device, part, dtype=dtype)
            if tensors is None
            else IntoStore(manifest, tensors, part, dtype=dtype)
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """As GpuStore; empty for tensors of the caller."""
        return self._store.tensors() if isinstance(self._store, OwnStore) else {}

    def files(self) -> dict[str, memoryview]:
        """As MemoryLanding."""
        return self._store.files()

    def present(self) -> Iterator[Chunk]:
        """See Store: nothing."""
        return self._store.present()

    def spans(self, chunk: Chunk) -> Iterator[memoryview]:
        """See Source: of kept chunks."""
        return self._store.spans(chunk)

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """See Store: of kept chunks."""
        return self._store.read(chunk)

    def landing(self, chunk: Chunk) -> Iterator[memoryview]:
        """See Store."""
        return self._store.landing(chunk)

    def seal(self, is_right: IsRight) -> None:
        """See Store."""
        self._store.seal(is_right)

    def close(self) -> None:
        """See Source."""
        self._store.close()


class TensorSource(MemorySource):
    """A state dict as a virtual safetensors file, `VIRTUAL_PATH`.

    Tensors are sorted by element size, largest first, then by name, so each is aligned. Tied tensors (same memory,
    dtype, shape and strides) are stored once, under the first of their names; the metadata lists the other names, as
    `safetensors.torch.save_model` does. Overlapping tensors are stored separately. A tensor that is not contiguous is
    copied here; all others are read in place. Work already enqueued on their GPUs is done when this returns.

    The builder of the manifest (from `cut(source.units(), ...)` and hashes of `read`) sets `manifest`. Raises
    SettingsError for a value that is no tensor or a dtype without a safetensors type, StoreConflict for a tensor
    outside plain memory of the CPU or a GPU.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        kept, aliases = _untied(plain(tensors))
        kept.sort(key=lambda pair: (-pair[1].element_size(), pair[0]))
        entries = [header_entry(name, tensor) for name, tensor in kept]
        # transformers and other readers require the format.
        metadata = {} if "pt" in tensors else {"format": "pt"}
        composed = safetensors_header.compose(entries, metadata | aliases)
        self.header = composed.decode()
        prefix = len(composed).to_bytes(LENGTH_BYTES, "little") + composed
        self._units = [len(prefix), *(size for *_, size in entries)]
        self.size = sum(self._units)
        self._files = [
            PlacedFile.whole([Place(memoryview(prefix)), *(_readable(name, tensor) for name, tensor in kept)])
        ]
        self.devices = _finish_work(tensor for _, tensor in kept)  # of GPUs, by number

    def units(self) -> list[int]:
        """Sizes of header and tensors, for `manifest.cut`."""
        return self._units

    def read(self, offset: int, size: int) -> Iterator[memoryview]:
        """A range of the virtual file. Raises SourceChanged if a tensor in it was written to or moved."""
        return self._read(0, offset, size)

    def device_read(self, offset: int, size: int) -> Iterator[View]:
        """Like `read`, with GPU memory as DeviceViews."""
        return self._lent(0, offset, size)


class _Watch:
    """Detects a write to a tensor, or its move to other memory, since it was created or renewed."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self._name = name
        self.tensor = tensor
        self._pointer = tensor.data_ptr()
        self.renew()

    def renew(self) -> None:
        """Accepts all writes so far. Views of a tensor share its counter."""
        self._version = None if self.tensor.is_inference() else self.tensor._version

    def check(self) -> None:
        """Raises SourceChanged if the tensor was written to or moved."""
        if self.tensor.data_ptr() != self._pointer:
            raise SourceChanged(self._name, "it was moved to other memory")
        if self._version is not None and self.tensor._version != self._version:
            raise SourceChanged(self._name, "it was written to")


def _between(ends: Iterable[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, Place]]:
    """Own memory for the bytes `[begin, end)` of a file that have a place."""
    for start, stop in ends:
        if max(start, begin) < min(stop, end):
            yield max(start, begin), Place(range_buffer(max(start, begin), min(stop, end)))


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


def _match(index: TensorIndex, given: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, str]:
    """For each tensor of the manifest, its given name: its own, or else an alias. Raises StoreConflict."""
    spellings = {name: [name] for name in index.owners}
    for alias, name in index.aliases.items():
        spellings[name].append(alias)
    found = {name: [spelling for spelling in names if spelling in given] for name, names in spellings.items()}
    holders = {name: names[0] for name, names in found.items() if names}
    tied = {identity(given[holder]) for holder in holders.values()}
    types = {spelling: torch_type(index.owners[name], dtype) for name, names in found.items() for spelling in names}
    complaints = {
        "missing": [repr(name) for name in found if name not in holders],
        "unexpected": [
            repr(name)
            for name, tensor in given.items()
            if name not in index.owners and name not in index.aliases and identity(tensor) not in tied
        ],
        "of another shape": [
            f"{spelling!r} is {list(given[spelling].shape)} and not {list(shape)}"
            for spelling, (shape, _) in types.items()
            if given[spelling].shape != shape
        ],
        "of another dtype": [
            f"{spelling!r} is {given[spelling].dtype} and not {dtype}"
            for spelling, (_, dtype) in types.items()
            if given[spelling].dtype != dtype
        ],
    }
    wrong = [f"{len(items)} {kind}: {', '.join(items[:_NAMES_SHOWN])}" for kind, items in complaints.items() if items]
    if wrong:
        raise StoreConflict("into", f"the tensors do not match the model's ({'; '.join(wrong)})")
    return holders


def _untied(tensors: Mapping[str, torch.Tensor]) -> tuple[list[tuple[str, torch.Tensor]], dict[str, str]]:
    """The tensors to store, and alias -> stored name for the rest."""
    first: dict[Identity, str] = {}
    stored = {n: first.setdefault(identity(t), n) if t.numel() else n for n, t in sorted(tensors.items())}
    aliases = {name: kept for name, kept in stored.items() if name != kept}
    return [(name, tensor) for name, tensor in tensors.items() if name not in aliases], aliases


def _readable(name: str, tensor: torch.Tensor) -> Place:
    if tensor.is_contiguous():
        return Place(_bytes(tensor), _Watch(name, tensor).check)
    return Place(_bytes(tensor.detach().contiguous()))


def _bytes(tensor: torch.Tensor) -> View:
    """The memory of a contiguous tensor, alive as long as the view; a CPU tensor cannot be resized meanwhile."""
    flat = _flat(tensor)
    if flat.device.type == "cpu":
        return flat.numpy().data
    cuda.settle(flat.device.index)
    return DeviceView(flat.device.index, flat.data_ptr(), flat.numel(), flat)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    import torch

    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        need_bytes = torch.Size(shape).numel() * dtype.itemsize
        raise StoreFull(str(device), need_bytes=need_bytes, free_bytes=torch.cuda.mem_get_info(device)[0]) from error


def _finish_work(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    """Waits for the work enqueued on the GPUs of these tensors; returns the numbers of the GPUs."""
    import torch

    devices = frozenset(tensor.device.index for tensor in tensors if tensor.device.type != "cpu")
    for device in devices:
        torch.cuda.synchronize(device)
    return devices
