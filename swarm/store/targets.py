"""The argument `into` of a fetch: a mapping of tensors or a module, as the tensors to fill by name.

A module is filled as `load_state_dict(strict=True)` fills it: parameters and persistent buffers by the names of its
state dict, tied ones under each of their names. Memory that must not be written to is refused:

- memory that is mapped for reading, where a write would end the process;
- inference tensors outside `torch.inference_mode()`, which torch's own writes refuse too;
- tensors that a hook of the module makes for its state dict, which the module would never see.

A parameter that requires a gradient is written to as under `torch.no_grad()`, and every write counts for autograd
(`tensor._version`), so that `backward` fails for what was saved before. Imports torch in functions: it is optional.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from swarm.errors import SettingsError, StoreConflict
from swarm.store.process_memory import WritableMemory

if TYPE_CHECKING:
    import torch

EXTRA_STATE = "_extra_state"  # the end of a name that `torch.nn.Module.get_extra_state` gives


def targets(into: Mapping[str, Any] | torch.nn.Module) -> dict[str, Any]:
    """The tensors to fill by name; to be called in the caller's thread. Raises SettingsError, StoreConflict."""
    import torch

    if isinstance(into, torch.nn.Module):
        found = _of_module(into)
    elif isinstance(into, Mapping):
        found = dict(into)
    else:
        raise SettingsError(
            "into", f"is a {type(into).__name__}, not a mapping of tensors by name or a torch.nn.Module"
        )
    for name, tensor in found.items():
        if isinstance(tensor, torch.Tensor):
            _demand_initialised(name, tensor)
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                raise StoreConflict(name, "is an inference tensor; fetch into it inside torch.inference_mode()")
    return found


def _of_module(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    owned: list[torch.Tensor] = [tensor for _, tensor in module.named_parameters(remove_duplicate=False)]
    owned += [tensor for _, tensor in module.named_buffers(remove_duplicate=False)]
    for name, tensor in module.named_parameters():
        _demand_initialised(name, tensor)
    state = {
        name: value
        for name, value in module.state_dict(keep_vars=True).items()
        if not name.rpartition(".")[2].startswith(EXTRA_STATE)
    }
    ids = {id(tensor) for tensor in owned}
    memory = {_storage(tensor) for tensor in owned}
    for name, value in state.items():
        if id(value) not in ids and _storage(value) not in memory:
            raise StoreConflict(
                name, "is made by a hook of the module for its state dict; pass tensors by name instead"
            )
    return state


def _storage(tensor: torch.Tensor) -> int | None:
    """The address of its memory; None for a tensor without any."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError, AttributeError):  # lazy, sparse, not a tensor
        return None


def _demand_initialised(name: str, tensor: torch.Tensor) -> None:
    import torch

    if torch.nn.parameter.is_lazy(tensor):
        raise StoreConflict(name, "is not initialised: run the lazy module once before the fetch")
    if tensor.is_meta:
        raise StoreConflict(name, "is on the meta device and has no memory: call module.to_empty(device=...) first")


def demand_writable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises StoreConflict for a tensor of the CPU in memory that is mapped for reading."""
    memory = WritableMemory.read()
    for name, tensor in tensors.items():
        if memory is None or tensor.device.type != "cpu" or not tensor.numel():
            continue
        steps = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        start = tensor.data_ptr()
        if (start, start + (steps + 1) * tensor.element_size()) not in memory:
            raise StoreConflict(name, "is in memory that is mapped for reading; pass a copy of it: tensor.clone()")


def count_writes(tensors: Iterable[torch.Tensor]) -> None:
    """Counts a write to each tensor, as torch's in-place operations do. They are contiguous."""
    import torch

    for tensor in tensors:
        if not tensor.is_inference():
            tensor.detach().reshape(-1).view(torch.uint8)[:0].zero_()  # shares the counter, and writes nothing
