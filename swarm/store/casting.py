"""Tensors that are cast as they arrive: a fetch with `dtype=`, as `from_pretrained(dtype=)` of transformers.

    bytes of a chunk -> scratch, 1 MiB, hashed there -> cast, on the GPU if the tensor is there -> the tensor

Floating tensors of 16 to 64 bits are cast, others stay as they are: 8-bit and 4-bit floats mean something only with
their scales. Memory beside the tensors is the scratch of each transfer. What was cast cannot be read as the model's
bytes again, so its chunks are not served on; `kept` are those that are.

Must not know: hash functions, peers. torch is optional, so functions import it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Manifest
from swarm.content.safetensors_header import Tensor
from swarm.content.selection import Part, chunks_of
from swarm.errors import SettingsError
from swarm.store import cuda
from swarm.store.staging import LANDING_BYTES

if TYPE_CHECKING:
    import torch

# Bytes of an element, of the types that are cast.
CAST_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def cast_dtype(dtype: Any) -> torch.dtype:
    """The dtype of a user's argument, such as torch.bfloat16 or "bfloat16". Raises SettingsError."""
    import torch

    found = {f"torch.{name}": getattr(torch, name) for name in _TORCH_NAMES.values()}
    name = str(dtype) if str(dtype).startswith("torch.") else f"torch.{dtype}"
    if name not in found:
        raise SettingsError("dtype", f"{dtype!r} is not {', '.join(_TORCH_NAMES.values())}")
    made: torch.dtype = found[name]
    return made


def is_cast(entry: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether a tensor of the model arrives as another dtype."""
    return dtype is not None and entry.dtype in CAST_BYTES and str(dtype) != f"torch.{_TORCH_NAMES[entry.dtype]}"


class Caster:
    """Casts the bytes of one tensor of the model into `target`, in any order. Thread-safe."""

    def __init__(self, target: torch.Tensor, entry: Tensor) -> None:
        import torch

        self._flat = target.data.reshape(-1)  # `data` has a counter of its own: the store counts the writes
        self._dtype: torch.dtype = getattr(torch, _TORCH_NAMES[entry.dtype])
        self._size = CAST_BYTES[entry.dtype]
        self._lock = threading.Lock()
        self._edges: dict[int, tuple[bytearray, set[int]]] = {}  # elements that two chunks share: bytes, and which came

    def put(self, offset: int, data: memoryview) -> None:
        """Casts bytes that begin at `offset` of the tensor."""
        head = min(-offset % self._size, len(data))
        if head:
            self._put_edge(offset, data[:head])
        offset, data = offset + head, data[head:]
        if tail := len(data) % self._size:
            self._put_edge(offset + len(data) - tail, data[len(data) - tail :])
        self._cast(offset // self._size, data[: len(data) - tail])

    def _put_edge(self, offset: int, data: memoryview) -> None:
        element, within = divmod(offset, self._size)
        with self._lock:
            whole, came = self._edges.setdefault(element, (bytearray(self._size), set()))
            whole[within : within + len(data)] = data
            came.update(range(within, within + len(data)))
            if len(came) == self._size:
                self._cast(element, memoryview(whole))

    def _cast(self, first: int, data: memoryview) -> None:
        import torch

        if not data:
            return
        raw = torch.frombuffer(data, dtype=torch.uint8)
        source = (raw.clone() if raw.data_ptr() % self._size else raw).view(self._dtype)
        target = self._flat[first : first + len(source)]
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            if target.device.type == "cpu":
                target.copy_(source)
                return
            gpu = cuda.gpu(target.device.index)
            with cuda.beside_captures(), torch.cuda.stream(gpu.side):  # type: ignore[arg-type]
                target.copy_(source.to(target.device, non_blocking=True))
                gpu.side.synchronize()


@dataclass(frozen=True, slots=True)
class CastView:
    """The bytes `[start, start + nbytes)` of a tensor of the model, which are cast when they come."""

    caster: Caster
    start: int
    nbytes: int

    def __getitem__(self, part: slice) -> CastView:
        start, stop, _ = part.indices(self.nbytes)
        return CastView(self.caster, self.start + start, max(0, stop - start))

    def incoming(self) -> Iterator[memoryview]:
        """Scratch views, each cast when the next is requested."""
        scratch = memoryview(bytearray(min(self.nbytes, LANDING_BYTES)))
        for start in range(0, self.nbytes, LANDING_BYTES):
            view = scratch[: min(LANDING_BYTES, self.nbytes - start)]
            yield view
            self.caster.put(self.start + start, view)


def casts(manifest: Manifest, dtype: torch.dtype) -> bool:
    """Whether a tensor of the model arrives as another dtype."""
    return any(is_cast(entry, dtype) for file in manifest.files for entry in file.tensors())


def kept_chunks(manifest: Manifest, part: Part | None, dtype: torch.dtype) -> Bitfield:
    """The wanted chunks without a byte of a tensor that is cast."""
    wanted = Bitfield.full(len(manifest.chunks)) if part is None else part.chunks
    cast = Bitfield(wanted.length)
    for number, file in enumerate(manifest.files):
        unused = set(file.unused)
        tensors = [entry for entry in file.tensors() if entry.name not in unused and is_cast(entry, dtype)]
        cast = cast.union(chunks_of(manifest, number, tensors))
    return wanted.minus(cast)
