"""Tensors of the caller as a source: `TensorSource`, and how tensors are read in place and watched.

    serve(state_dict)    read as a virtual safetensors file

CPU tensors are sent in place, without a copy, unless their layout forbids it. Transports that can use GPU memory send
GPU tensors in place; for others `staging` copies.

A write to a tensor makes its chunks differ from the manifest, so all tensors that the caller can write to are watched
through torch's version counter. The counter misses writes through `.data`, numpy or another process, inference tensors
have none, and views of a tensor share it, so a write to one view withdraws the others. Receivers verify every chunk
anyway; the watch only spares them wrong chunks.

Must not know: hash functions, peers, sockets. torch is optional, so functions import it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from swarm.content import safetensors_header
from swarm.content.safetensors_header import LENGTH_BYTES
from swarm.errors import SourceChanged
from swarm.store import DeviceView, View, cuda
from swarm.store.memory import MemorySource, Place, PlacedFile
from swarm.store.tensor_layout import Identity, identity, plain
from swarm.store.torch_types import header_entry

if TYPE_CHECKING:
    import torch

VIRTUAL_PATH = "model.safetensors"  # the file that a fetch of a state dict into a directory makes


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
        self.devices = finish_work(tensor for _, tensor in kept)  # of GPUs, by number

    def units(self) -> list[int]:
        """Sizes of header and tensors, for `manifest.cut`."""
        return self._units

    def read(self, offset: int, size: int) -> Iterator[memoryview]:
        """A range of the virtual file. Raises SourceChanged if a tensor in it was written to or moved."""
        return self._read(0, offset, size)

    def device_read(self, offset: int, size: int) -> Iterator[View]:
        """Like `read`, with GPU memory as DeviceViews."""
        return self._lent(0, offset, size)


class Watch:
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


def bytes_of(tensor: torch.Tensor) -> View:
    """The memory of a contiguous tensor, alive as long as the view; a CPU tensor cannot be resized meanwhile."""
    flat = flat_bytes(tensor)
    if flat.device.type == "cpu":
        return flat.numpy().data
    cuda.settle(flat.device.index)
    return DeviceView(flat.device.index, flat.data_ptr(), flat.numel(), flat)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, as a tensor; of a contiguous one without a copy."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8)


def finish_work(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    """Waits for the work enqueued on the GPUs of these tensors; returns the numbers of the GPUs."""
    import torch

    devices = frozenset(tensor.device.index for tensor in tensors if tensor.device.type != "cpu")
    for device in devices:
        torch.cuda.synchronize(device)
    return devices


def _untied(tensors: Mapping[str, torch.Tensor]) -> tuple[list[tuple[str, torch.Tensor]], dict[str, str]]:
    """The tensors to store, and alias -> stored name for the rest."""
    first: dict[Identity, str] = {}
    stored = {n: first.setdefault(identity(t), n) if t.numel() else n for n, t in sorted(tensors.items())}
    aliases = {name: kept for name, kept in stored.items() if name != kept}
    return [(name, tensor) for name, tensor in tensors.items() if name not in aliases], aliases


def _readable(name: str, tensor: torch.Tensor) -> Place:
    if tensor.is_contiguous():
        return Place(bytes_of(tensor), Watch(name, tensor).check)
    return Place(bytes_of(tensor.detach().contiguous()))
