"""The tensors of one rank at the point where they change hands: loaded, and not processed for any kernel yet.

    take        fills a model's tensors from twins, and keeps copies of what came
    clone       copies of what an engine's own loader brought
    servable    what to serve of either, after processing: live tensors where they are still the same bytes
    model_fields, model_id_of, ...    what of a model engines say alike

What engines have in common; each has its own loader that calls this. Must not know: engines, nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swarm.checkpoint import hf_cache
from swarm.engines import metadata
from swarm.engines.layout import short_digest
from swarm.engines.load import Join

NOT_OF_TENSORS = ("_name_or_path", "transformers_version")  # of a model's config: they differ between machines

log = logging.getLogger("swarm")


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under every name that it has: tied ones are one object."""
    found: dict[str, torch.Tensor] = {}
    for tensors in (model.named_parameters, model.named_buffers):
        found.update(tensors(remove_duplicate=False))
    return found


def take(
    join: Join, live: Mapping[str, torch.Tensor], *, spared: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Fills these tensors from twins; copies of what came, tied as they are; none of what is still to be cloned.

    After an error `spared` are what they were: those that a loader of files need not write. Raises what
    `Join.fetch_loaded` raises.
    """
    if all(tensor.device.type == "cpu" for tensor in live.values()):
        copies = _like(live)
        join.fetch_loaded(copies)
        _copy_into(live, copies)
        return copies
    kept = clone(spared)
    try:
        join.fetch_loaded(live)
    except BaseException:
        _copy_into({name: live[name] for name in kept}, kept)
        raise
    join.offer.release_twin("the engine processes its weights")  # it writes to these very tensors
    return {}


def clone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in the host's memory, tied as they are."""
    copies = _like(tensors)
    for name, tensor in tensors.items():
        copies[name].copy_(tensor.detach())
    return copies


def servable(copies: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was loaded, after processing: the live tensor where its bytes are still those, else the copy."""
    unchanged: dict[int, torch.Tensor] = {}  # by identity of the copy, so that ties stay ties
    taken: set[int] = set()  # by address: what processing has tied was two tensors before
    for name, kept in copies.items():
        now = live.get(name)
        if now is None or id(kept) in unchanged or now.data_ptr() in taken or not _same_bytes(kept, now):
            continue
        unchanged[id(kept)] = now.detach()
        taken.add(now.data_ptr())
    served = {name: unchanged.get(id(kept), kept) for name, kept in copies.items()}
    log.info("%d of %d tensors are served where the engine uses them", len(unchanged), len({*map(id, copies.values())}))
    return served


def model_fields(engine: str, version: str, model_config: Any) -> dict[str, str]:
    """What every engine's layout depends on, as fields of a fingerprint."""
    hf = model_config.hf_config
    config = {key: value for key, value in hf.to_dict().items() if key not in NOT_OF_TENSORS}
    return {
        "engine": engine,
        "engine_version": version,
        "architectures": ",".join(getattr(hf, "architectures", None) or []),
        "model_impl": str(model_config.model_impl),
        "dtype": str(model_config.dtype),
        "quantization": str(model_config.quantization),
        "hf_config": short_digest(config),
    }


def model_id_of(model: str) -> str:
    """What a model that an engine was given is called among nodes: as `swarm serve` or `swarm run` would call it."""
    path = Path(model)
    if not is_directory(model):
        return model
    if (path / metadata.NAME).is_file():
        return (path / metadata.NAME).read_text(encoding="utf-8").strip()
    return hf_cache.model_id_of(path) or path.resolve().name


def directory_of(model: str, revision: str | None) -> Path | None:
    """Where its files are on this machine, if they are."""
    return Path(model) if is_directory(model) else hf_cache.snapshot(model, revision=revision or "main")


def is_directory(model: str) -> bool:
    """Whether the engine was given a directory, and not a model id."""
    return Path(model).is_dir()


def _like(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New memory for each tensor, tied as they are: what is one in memory is one here."""
    made: dict[object, torch.Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        one = (tensor.data_ptr(), tensor.dtype, shape, tensor.stride()) if tensor.numel() else name
        if one not in made:
            made[one] = torch.empty(shape, dtype=tensor.dtype, device="cpu")
        found[name] = made[one]
    return found


def _copy_into(live: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.data.copy_(tensors[name])


def _same_bytes(kept: torch.Tensor, now: torch.Tensor) -> bool:
    if (kept.dtype, kept.shape) != (now.dtype, now.shape) or not now.is_contiguous():
        return False
    there = now.detach().to("cpu")
    return torch.equal(kept.reshape(-1).view(torch.uint8), there.reshape(-1).view(torch.uint8))
