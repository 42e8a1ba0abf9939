"""Artifacts whose bytes lie in tensors: `MemoryStore`, `IntoStore`, `GpuStore` and `TensorSource`.

    MemoryStore    fetch(model_id)           buffers of its own, handed out as CPU tensors that share them
    GpuStore    fetch(device="cuda:0")    tensors of its own in the memory of a GPU
    IntoStore      fetch(into=state_dict)    the caller's tensors, filled where they are: CPU, GPU, or both
    TensorSource   serve(state_dict)         the caller's tensors, read as one virtual safetensors file

Nothing is copied between a socket and a CPU tensor, except where a tensor's own layout forbids it; each class says
where. Tensors of a GPU are read and filled in their own memory too, by transports that can; for others, `staging`
carries it.

Whoever holds a tensor may write to it, and then its chunks no longer match the manifest. Every tensor that somebody
else can write to is watched through torch's version counter. The counter does not see writes through `.data`, numpy or
another process, an inference-mode tensor has none, and views of one tensor share it, so that a write to one withdraws
its siblings: it is a courtesy to receivers, who verify every chunk anyway.

Must not know: hash functions, peers, sockets. Imports torch where it is needed, because `swarm` works without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from swarm.content import safetensors_header
from swarm.content.manifest import Manifest, units
from swarm.content.safetensors_header import LENGTH_BYTES, Tensor
from swarm.errors import LocalProtocolError, SettingsError, SourceChanged, StoreConflict, StoreFull
from swarm.store import DeviceView, View, cuda
from swarm.store.memory import MemoryLanding, MemorySource, Place, PlacedFile, TensorIndex, buffer, demand_room

if TYPE_CHECKING:
    import torch

VIRTUAL_PATH = "model.safetensors"  # what a newcomer that fetches a state dict into a directory finds there

# torch lacks the 6-bit types, and holds F4 as two elements a byte, so that the last dimension halves.
_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F4": "float4_e2m1fn_x2", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_SAFETENSORS_NAMES = {f"torch.{theirs}": ours for ours, theirs in _TORCH_NAMES.items()}
_FOUR_BIT = "F4"

_OVERLAP_WORK_MAX = 10_000  # steps that the exact test of two strided layouts may take before they count as overlapping
_NAMES_SHOWN = 3

# What two names must have in common to be one tensor: data pointer, dtype, shape, strides.
_Identity: TypeAlias = "tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]"


class MemoryStore(MemoryLanding):
    """One buffer a file, of exactly its size; after `seal` the tensors of all safetensors files, sharing these buffers.

    Raises StoreFull when memory is short, ManifestInvalid when two files hold tensors of one name, and StoreConflict
    for tensors that torch cannot hold (6 bits an element): all before any byte is fetched. Does not need torch until
    `tensors` is called.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._index = TensorIndex(manifest)
        _demand_representable(self._index.owners.values())
        demand_room(manifest.size)
        self.manifest = manifest
        self._buffers = [buffer(file.size) for file in manifest.files]
        self._files = [PlacedFile([Place(memory)]) for memory in self._buffers]
        self._sealed = False
        self._tensors: dict[str, torch.Tensor] | None = None

    def seal(self) -> None:
        """Everything is verified: `tensors` and `files` may be used from now on."""
        self._sealed = True

    def files(self) -> dict[str, memoryview]:
        """The same once it is sealed."""
        self._demand_sealed()
        return super().files()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, writable, sharing the store's memory; tied names share one tensor object.

        The same objects every time. A tensor that does not lie at a multiple of its element size is copied, because
        torch wants it aligned: the safetensors library writes no such files. Writing to a tensor withdraws the artifact
        from serving.
        Raises SettingsError without torch, StoreConflict for a type that this torch lacks.
        """
        self._demand_sealed()
        self._tensors = self._tensors or self._make_tensors()
        return dict(self._tensors)

    def close(self) -> None:
        """Lets go of the memory; tensors and files that were handed out keep theirs."""
        super().close()
        self._buffers, self._tensors = [], None

    def _demand_sealed(self) -> None:
        if not self._sealed or self._files is None:
            raise LocalProtocolError("a memory store hands out its contents after seal() and before close()")

    def _make_tensors(self) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        files = []
        for memory, head, entries in zip(self._buffers, self._index.heads, self._index.by_file, strict=True):
            places = [Place(memory[:head])]
            for entry in entries:
                view = memory[entry.offset : entry.offset + entry.size]
                tensor = made[entry.name] = _sharing(view, entry)
                # Watched through an alias: `tensor.data = other` is no change, the bytes here stay what they were.
                places.append(Place(view, _Watch(entry.name, tensor.detach()).check))
            files.append(PlacedFile(places))
        self._files = files
        return made | {alias: made[name] for alias, name in self._index.aliases.items()}


class IntoStore(MemoryLanding):
    """Lands straight in the given tensors' own memory. Their contents are undefined until `seal` has returned.

    The tensors must match the manifest exactly, in name, dtype and shape; else StoreConflict says what differs, before
    any byte is fetched. A name that the manifest lacks is fine when it is tied: an alias of the manifest, or the same
    memory as a tensor of it. Headers and files that are no safetensors land in memory of the store, so that the node
    can serve every chunk on.

    `seal` copies or compares what cannot land in its place: tensors that are not contiguous land in temporary memory,
    which stays for serving; aliases with memory of their own are filled from the tensor that they stand for; tensors
    that the caller has tied and the manifest has not land separately and must turn out equal.

    Raises SettingsError for a value that is not a tensor, StoreConflict for a tensor that is not in plain memory of the
    CPU or a GPU or that overlaps another one, and what `MemoryStore` raises.
    """

    def __init__(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
        index = TensorIndex(manifest)
        _demand_representable(index.owners.values())
        given = _plain(tensors)
        holders = _match(index, given)
        _refuse_overlaps(given)
        demand_room(manifest.size - sum(entry.size for entry in index.owners.values()))
        self.manifest = manifest
        self.devices = _finish_work(given.values())  # or what was enqueued before would land on what is fetched
        self._watches: list[_Watch] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (target, landed)
        self._twins: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # (name, landed, landed in another place)
        self._filled: dict[_Identity, torch.Tensor] = {}  # the caller's memory -> the tensor that its contents land in
        landed = {name: self._place(holder, given[holder]) for name, holder in holders.items()}
        for alias, name in index.aliases.items():
            if alias in given:
                self._settle(alias, given[alias], landed[name][0])
        self._files = [
            PlacedFile([Place(buffer(head)), *(landed[entry.name][1] for entry in entries)])
            for head, entries in zip(index.heads, index.by_file, strict=True)
        ]

    def seal(self) -> None:
        """Copies and compares what landed elsewhere. Before it has returned, the tensors' contents are undefined.

        Raises SourceChanged when a tensor was written to or moved meanwhile, StoreConflict when tied tensors differ.
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
        for watch in self._watches:
            watch.renew()

    def close(self) -> None:
        """Lets go of the tensors, which are the caller's and stay as they are."""
        super().close()
        self._watches, self._copies, self._twins, self._filled = [], [], [], {}

    def _place(self, name: str, target: torch.Tensor) -> tuple[torch.Tensor, Place]:
        """The tensor that a tensor of the manifest lands in, and its place."""
        if target.is_contiguous() and _identity(target) not in self._filled:
            self._filled[_identity(target)] = target
            self._watches.append(_Watch(name, target))
            return target, Place(_bytes(target), self._watches[-1].check)
        landed = _empty(tuple(target.shape), target.dtype, target.device)
        self._settle(name, target, landed)
        return landed, Place(_bytes(landed))

    def _settle(self, name: str, target: torch.Tensor, landed: torch.Tensor) -> None:
        """Has `seal` bring `target` what landed elsewhere, or compare it if `target` has been provided for."""
        provided = self._filled.get(_identity(target))
        if provided is None:
            self._filled[_identity(target)] = landed
            self._copies.append((target, landed))
        elif provided is not landed:
            self._twins.append((name, provided, landed))


class GpuStore(IntoStore):
    """Tensors of its own on one device, each allocated by torch by itself, so that it can be freed by itself.

    Raises StoreFull when the device lacks room, and what `IntoStore` raises.
    """

    def __init__(self, manifest: Manifest, device: str) -> None:
        import torch

        index, where = TensorIndex(manifest), torch.device(device)
        _demand_representable(index.owners.values())
        need_bytes = sum(entry.size for entry in index.owners.values())
        free_bytes = torch.cuda.mem_get_info(where)[0] + _cached_bytes(where)
        if need_bytes > free_bytes:
            raise StoreFull(device, need_bytes=need_bytes, free_bytes=free_bytes)
        made: dict[str, torch.Tensor] = {}
        for name, entry in index.owners.items():
            dtype, shape = _torch_type(entry)
            made[name] = _empty(shape, dtype, where)
        super().__init__(manifest, made)
        self._made = made | {alias: made[name] for alias, name in index.aliases.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name; tied names share one tensor object. To be used once sealed."""
        return dict(self._made)

    def close(self) -> None:
        """Lets go of the memory; tensors that were handed out keep theirs."""
        super().close()
        self._made = {}


class TensorSource(MemorySource):
    """A state dict as one virtual file, `VIRTUAL_PATH`: valid safetensors, whoever fetches it.

    Tensors of wide elements come first, then by name, so that each is aligned. Tied tensors (same memory, dtype, shape
    and strides) are stored once, under the first of their names; the others go into the metadata, as
    `safetensors.torch.save_model` does it. Tensors that merely overlap are stored one by one. A tensor that is not
    contiguous is copied once, here; all others are read where they are. What was enqueued so far for tensors of a GPU
    is done when this returns.

    Whoever builds the manifest (of `cut(source.units(), ...)`, hashing `read`) sets `manifest`. Raises SettingsError
    for a value that is no tensor or has no safetensors type, StoreConflict for one that is not in plain memory of the
    CPU or a GPU.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        kept, aliases = _untied(_plain(tensors))
        kept.sort(key=lambda pair: (-pair[1].element_size(), pair[0]))
        entries = [_entry(name, tensor) for name, tensor in kept]
        # Some readers, transformers among them, want to be told whose tensors these are.
        metadata = {} if "pt" in tensors else {"format": "pt"}
        composed = safetensors_header.compose(entries, metadata | aliases)
        self.header = composed.decode()
        prefix = len(composed).to_bytes(LENGTH_BYTES, "little") + composed
        self.size = len(prefix) + sum(size for *_, size in entries)
        self._files = [PlacedFile([Place(memoryview(prefix)), *(_readable(name, tensor) for name, tensor in kept)])]
        self.devices = _finish_work(tensor for _, tensor in kept)  # of GPUs, by number

    def units(self) -> list[int]:
        """Bytes of the header and of each tensor: what `manifest.cut` wants to know."""
        tensors, _ = safetensors_header.parse(self.header.encode(), subject=VIRTUAL_PATH, file_bytes=self.size)
        return units(self.size, tensors)

    def read(self, offset: int, size: int) -> Iterator[memoryview]:
        """These bytes of the virtual file. Raises SourceChanged once a tensor in them was written to or moved."""
        return self._read(0, offset, size)

    def device_read(self, offset: int, size: int) -> Iterator[View]:
        """As `read`, but GPU memory as it is."""
        return self._lent(0, offset, size)


class _Watch:
    """Notices that a tensor was written to, or moved to other memory, since this was made or renewed."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self._name = name
        self._tensor = tensor
        self._pointer = tensor.data_ptr()
        self.renew()

    def renew(self) -> None:
        """From now on: what was written up to here is fine. Views of one tensor share its counter."""
        self._version = None if self._tensor.is_inference() else self._tensor._version

    def check(self) -> None:
        """Raises SourceChanged."""
        if self._tensor.data_ptr() != self._pointer:
            raise SourceChanged(self._name, "it was moved to other memory")
        if self._version is not None and self._tensor._version != self._version:
            raise SourceChanged(self._name, "it was written to")


def _demand_representable(entries: Iterable[Tensor]) -> None:
    for entry in entries:
        whole = entry.dtype != _FOUR_BIT or (entry.shape and entry.shape[-1] % 2 == 0)
        if entry.dtype not in _TORCH_NAMES or not whole:
            raise StoreConflict(entry.name, f"torch cannot hold {entry.dtype} {entry.shape}; fetch into a directory")


def _sharing(view: memoryview, entry: Tensor) -> torch.Tensor:
    """A tensor over this memory, or over an aligned copy of it."""
    try:
        import torch
    except ImportError as error:
        raise SettingsError("torch", "is not installed; install it, or fetch into a directory") from error
    dtype, shape = _torch_type(entry)
    if not entry.size:  # frombuffer refuses empty memory
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(view, dtype=torch.uint8)
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).reshape(shape)


def _torch_type(entry: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    import torch

    dtype = getattr(torch, _TORCH_NAMES[entry.dtype], None)
    if dtype is None:
        raise StoreConflict(entry.name, f"torch {torch.__version__} has no type for {entry.dtype}; install a newer one")
    *outer, last = entry.shape or (0,)
    return dtype, (*outer, last // 2) if entry.dtype == _FOUR_BIT else entry.shape


def _entry(name: str, tensor: torch.Tensor) -> tuple[str, str, tuple[int, ...], int]:
    """What a safetensors header says of a tensor."""
    dtype, shape = _SAFETENSORS_NAMES.get(str(tensor.dtype)), tuple(tensor.shape)
    if dtype is None or (dtype == _FOUR_BIT and not shape):
        raise SettingsError(name, f"{tensor.dtype} {shape} has no safetensors type; convert it or leave it out")
    if dtype == _FOUR_BIT:
        shape = (*shape[:-1], 2 * shape[-1])
    return name, dtype, shape, tensor.numel() * tensor.element_size()


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mapping, once every value has turned out to be a tensor in memory that holds its own bytes."""
    import torch

    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise SettingsError(repr(name), "cannot be the name of a tensor in a safetensors file")
        if not isinstance(tensor, torch.Tensor):
            raise SettingsError(name, f"is a {type(tensor).__name__}, not a tensor; leave it out")
        if tensor.device.type not in ("cpu", "cuda"):
            raise StoreConflict(name, f"is on {tensor.device}; only tensors of the CPU and of CUDA GPUs are supported")
        wraps = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        if wraps or tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            raise StoreConflict(name, "does not hold plain bytes of its own (sparse, quantised, lazy or a wrapper)")
    return dict(tensors)


def _match(index: TensorIndex, given: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For each tensor of the manifest, the given name that stands for it: its own, or else that of an alias."""
    spellings = {name: [name] for name in index.owners}
    for alias, name in index.aliases.items():
        spellings[name].append(alias)
    found = {name: [spelling for spelling in names if spelling in given] for name, names in spellings.items()}
    holders = {name: names[0] for name, names in found.items() if names}
    tied = {_identity(given[holder]) for holder in holders.values()}
    complaints = {
        "missing": [repr(name) for name in found if name not in holders],
        "unexpected": [
            repr(name)
            for name, tensor in given.items()
            if name not in index.owners and name not in index.aliases and _identity(tensor) not in tied
        ],
        "different": [
            f"{spelling!r} is {given[spelling].dtype} {list(given[spelling].shape)} and not {index.owners[name].dtype} "
            f"{list(index.owners[name].shape)}"
            for name, names in found.items()
            for spelling in names
            if (given[spelling].dtype, given[spelling].shape) != _torch_type(index.owners[name])
        ],
    }
    wrong = [f"{len(items)} {kind}: {', '.join(items[:_NAMES_SHOWN])}" for kind, items in complaints.items() if items]
    if wrong:
        raise StoreConflict("into", f"the tensors do not match the model's ({'; '.join(wrong)})")
    return holders


def _identity(tensor: torch.Tensor) -> _Identity:
    # The stride of a dimension of one element says nothing, and torch is free to choose it.
    strides = (stride if n > 1 else 0 for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(strides)


def _refuse_overlaps(given: Mapping[str, torch.Tensor]) -> None:
    """Raises StoreConflict when landing in one tensor would change another one, or another part of itself."""
    distinct = {_identity(tensor): (name, tensor) for name, tensor in given.items() if tensor.numel()}
    reaching: list[tuple[str, torch.Tensor]] = []
    for name, tensor in sorted(distinct.values(), key=lambda pair: pair[1].data_ptr()):
        if any(stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise StoreConflict(name, "is expanded: several of its elements are one in memory")
        reaching = [(other, earlier) for other, earlier in reaching if _end(earlier) > tensor.data_ptr()]
        for other, earlier in reaching:
            if _shares(earlier, tensor):
                raise StoreConflict(name, f"overlaps {other!r} in memory without being the same tensor")
        reaching.append((name, tensor))


def _end(tensor: torch.Tensor) -> int:
    steps = sum(stride * (n - 1) for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr() + (steps + 1) * tensor.element_size()


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors whose extents overlap have a byte in common: columns of one matrix have none."""
    try:
        return np.shares_memory(_Extent(one), _Extent(other), max_work=_OVERLAP_WORK_MAX)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Extent:
    """A tensor's layout as numpy describes one, for comparing: the memory itself may be a GPU's and is not read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }


def _untied(tensors: Mapping[str, torch.Tensor]) -> tuple[list[tuple[str, torch.Tensor]], dict[str, str]]:
    """The tensors to store, and alias -> stored name for the rest."""
    first: dict[_Identity, str] = {}
    stored = {n: first.setdefault(_identity(t), n) if t.numel() else n for n, t in sorted(tensors.items())}
    aliases = {name: kept for name, kept in stored.items() if name != kept}
    return [(name, tensor) for name, tensor in tensors.items() if name not in aliases], aliases


def _readable(name: str, tensor: torch.Tensor) -> Place:
    if tensor.is_contiguous():
        return Place(_bytes(tensor), _Watch(name, tensor).check)
    return Place(_bytes(tensor.detach().contiguous()))


def _bytes(tensor: torch.Tensor) -> View:
    """The memory of a contiguous tensor, which stays alive as long as the view. A CPU's cannot be resized meanwhile."""
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


def _cached_bytes(device: torch.device) -> int:
    """What torch keeps of a device's memory without using it."""
    import torch

    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _devices(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    """The GPUs that these tensors are on, by number."""
    return frozenset(tensor.device.index for tensor in tensors if tensor.device.type != "cpu")


def _finish_work(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    """Waits for everything that was enqueued on the GPUs of these tensors; returns their numbers."""
    import torch

    devices = _devices(tensors)
    for device in devices:
        torch.cuda.synchronize(device)
    return devices
