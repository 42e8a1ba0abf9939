"""The dtypes of safetensors in torch, and back.

Must not know: memory, chunks. torch is optional, so functions import it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING

from swarm.content.safetensors_header import Tensor
from swarm.errors import SettingsError, StoreConflict
from swarm.store.casting import is_cast

if TYPE_CHECKING:
    import torch

# torch lacks the 6-bit types. It packs two F4 elements into a byte, which halves the last dimension.
_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F4": "float4_e2m1fn_x2", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_SAFETENSORS_NAMES = {f"torch.{theirs}": ours for ours, theirs in _TORCH_NAMES.items()}
_FOUR_BIT = "F4"


def demand_representable(entries: Iterable[Tensor]) -> None:
    """Raises StoreConflict for a tensor that torch cannot hold."""
    for entry in entries:
        whole = entry.dtype != _FOUR_BIT or (entry.shape and entry.shape[-1] % 2 == 0)
        if entry.dtype not in _TORCH_NAMES or not whole:
            raise StoreConflict(entry.name, f"torch cannot hold {entry.dtype} {entry.shape}; fetch into a directory")


def demand_types(entries: Iterable[Tensor]) -> None:
    """Raises SettingsError without torch, StoreConflict for a dtype that it lacks."""
    if importlib.util.find_spec("torch") is None:
        raise SettingsError("torch", "is not installed; install it, or fetch into a directory")
    for entry in entries:
        torch_type(entry)


def torch_type(entry: Tensor, cast: torch.dtype | None = None) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a tensor of the model, or those that it is cast to. Raises StoreConflict."""
    import torch

    if cast is not None and is_cast(entry, cast):
        return entry.shape, cast
    dtype = getattr(torch, _TORCH_NAMES[entry.dtype], None)
    if dtype is None:
        raise StoreConflict(entry.name, f"torch {torch.__version__} has no type for {entry.dtype}; install a newer one")
    *outer, last = entry.shape or (0,)
    return (*outer, last // 2) if entry.dtype == _FOUR_BIT else entry.shape, dtype


def header_entry(name: str, tensor: torch.Tensor) -> tuple[str, str, tuple[int, ...], int]:
    """Name, dtype, shape and size of a tensor in a safetensors header."""
    dtype, shape = _SAFETENSORS_NAMES.get(str(tensor.dtype)), tuple(tensor.shape)
    if dtype is None or (dtype == _FOUR_BIT and not shape):
        raise SettingsError(name, f"{tensor.dtype} {shape} has no safetensors type; convert it or leave it out")
    if dtype == _FOUR_BIT:
        shape = (*shape[:-1], 2 * shape[-1])
    return name, dtype, shape, tensor.numel() * tensor.element_size()
