"""Fetches into tensors: `IntoStore`, `GpuStore` and `CastStore`.

    IntoStore    fetch(into=state_dict)    the caller's tensors, filled in place: CPU, GPU, or both
    GpuStore     fetch(device="cuda:0")    own tensors in the memory of a GPU
    CastStore    fetch(dtype=...)          tensors of another dtype than the model's

CPU tensors are received in place, without a copy, unless their layout forbids it (each class says when). Transports
that can use GPU memory receive into GPU tensors in place; for others `staging` copies. A tensor that the caller can
write to is watched, as one that is served (`tensor_source`).

Must not know: hash functions, peers, sockets. torch is optional, so functions import it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from swarm.content.manifest import Chunk, Manifest
from swarm.content.selection import Part
from swarm.errors import StoreConflict, StoreFull
from swarm.store import IsRight
from swarm.store.casting import Caster, CastView, is_cast, kept_chunks
from swarm.store.memory import MemoryLanding, Place, PlacedFile, TensorIndex, demand_room, range_buffer, ranges
from swarm.store.targets import count_writes, demand_writable
from swarm.store.tensor_layout import Identity, identity, plain, refuse_overlaps
from swarm.store.tensor_source import Watch, bytes_of, finish_work, flat_bytes
from swarm.store.torch_types import demand_representable, torch_type

if TYPE_CHECKING:
    import torch

_NAMES_SHOWN = 3


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
        self.devices = finish_work(given.values())  # else kernels enqueued before would overwrite fetched bytes
        self._watches: list[Watch] = []
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
            if not torch.equal(flat_bytes(landed), flat_bytes(other)):
                raise StoreConflict(name, "is tied to a tensor that has other contents in this model; untie the two")
        for target, landed in self._copies:
            with torch.inference_mode(target.is_inference()):
                target.detach().copy_(landed)
        finish_work(target for target, _ in self._copies)
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
            self._watches.append(Watch(name, target))
            return target, Place(bytes_of(target), self._watches[-1].check)
        landed = _empty(tuple(target.shape), target.dtype, target.device)
        self._settle(name, target, landed)
        return landed, Place(bytes_of(landed))

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


def _between(ends: Iterable[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, Place]]:
    """Own memory for the bytes `[begin, end)` of a file that have a place."""
    for start, stop in ends:
        if max(start, begin) < min(stop, end):
            yield max(start, begin), Place(range_buffer(max(start, begin), min(stop, end)))


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


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    import torch

    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        need_bytes = torch.Size(shape).numel() * dtype.itemsize
        raise StoreFull(str(device), need_bytes=need_bytes, free_bytes=torch.cuda.mem_get_info(device)[0]) from error
