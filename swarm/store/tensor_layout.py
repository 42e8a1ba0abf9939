"""The memory of tensors: which hold plain bytes of their own, which are the same, which overlap.

Must not know: chunks, manifests. torch is optional, so functions import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from swarm.errors import SettingsError, StoreConflict

if TYPE_CHECKING:
    import torch

_OVERLAP_WORK_MAX = 10_000  # steps of the exact test of two strided layouts; beyond, they count as overlapping

# Equal for names of the same tensor: data pointer, dtype, shape, strides.
Identity: TypeAlias = "tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]"


def plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of the mapping. Raises for a value that is no tensor with plain bytes of its own on a CPU or CUDA GPU."""
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


def identity(tensor: torch.Tensor) -> Identity:
    """Equal for names of the same tensor."""
    # torch chooses the stride of a dimension of size 1 freely.
    strides = (stride if n > 1 else 0 for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(strides)


def refuse_overlaps(given: Mapping[str, torch.Tensor]) -> None:
    """Raises StoreConflict if a write to a tensor would change another tensor, or another element of its own."""
    distinct = {identity(tensor): (name, tensor) for name, tensor in given.items() if tensor.numel()}
    reaching: list[tuple[str, torch.Tensor]] = []
    for name, tensor in sorted(distinct.values(), key=lambda pair: pair[1].data_ptr()):
        if any(stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape, strict=True)):
            raise StoreConflict(name, "is expanded: several of its elements share memory")
        reaching = [(other, earlier) for other, earlier in reaching if _end(earlier) > tensor.data_ptr()]
        for other, earlier in reaching:
            if _shares(earlier, tensor):
                raise StoreConflict(name, f"overlaps {other!r} in memory without being the same tensor")
        reaching.append((name, tensor))


def _end(tensor: torch.Tensor) -> int:
    steps = sum(stride * (n - 1) for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr() + (steps + 1) * tensor.element_size()


def _shares(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors with overlapping extents share a byte; columns of a matrix share none."""
    try:
        return np.shares_memory(_Extent(tensor), _Extent(other), max_work=_OVERLAP_WORK_MAX)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Extent:
    """A tensor's layout as a numpy array interface, for comparison only: the memory may be a GPU's."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }
