"""The loaded tensors of a model, between loading and processing: filled, copied, compared, and served after warm-up.

    load_weights     a model by the first tier that works; copies of its loaded tensors
    servable         after processing: live tensors whose bytes are unchanged, copies of the others
    LoadedModels     the models of this process, for the engine's hooks

The code that vLLM and SGLang share. Must not know: the engines' own modules, nodes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swarm.checkpoint import hf_cache
from swarm.engines.layout import short_digest
from swarm.engines.load import RankLoader, Unread
from swarm.engines.serve_loaded import RESTART
from swarm.errors import SettingsError

UNSHARED = ("_name_or_path", "transformers_version")  # keys of a model's config that differ between machines

log = logging.getLogger("swarm")


def load_weights(
    loader: RankLoader,
    model: nn.Module,
    *,
    own: Callable[[], object],
    own_from: Callable[[Path | str], object],
    unsafe: str,
    unread: Unread,
    spared: Callable[[], Mapping[str, torch.Tensor]],
    unsafe_after: Callable[[], str] = str,
) -> dict[str, torch.Tensor]:
    """Loads by the first tier that works; returns copies of the loaded tensors, {} if they are not to be served.

    `own()` is the engine's loader on the model that it was given, `own_from(place)` on another directory or hub id.
    `spared()`: tensors that a loader of files need not write. `unsafe` and `unsafe_after()`: why ranks cannot exchange
    tensors. Raises as the engine's loader does if no tier works.
    """
    copies: dict[str, torch.Tensor] = {}

    def loaded() -> None:
        copies.update(take(loader, named_tensors(model), spared=spared()))

    def disk() -> None:
        if loader.files.local == "whole" or not loader.files.is_directory:
            own()
        elif loader.files.description and hf_cache.is_model_id(loader.model_id):
            own_from(loader.model_id)
        else:
            raise SettingsError("model", f"{loader.model_id}: its directory holds no weights, and no peer had them")

    ways = {"loaded": loaded, "checkpoint": lambda: own_from(loader.fetch_checkpoint()), "disk": disk}
    loader.load(ways, unsafe=unsafe, unread=unread)  # type: ignore[arg-type]
    if not unsafe and (unsafe := unsafe_after()):
        log.info("%s: loaded tensors are not served: %s", loader, unsafe)
    if unsafe or not loader.options.serve:
        return {}
    return copies or clone(named_tensors(model))


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under each of its names; tied tensors are the same object."""
    found: dict[str, torch.Tensor] = {}
    for tensors in (model.named_parameters, model.named_buffers):
        found.update(tensors(remove_duplicate=False))
    return found


def take(
    loader: RankLoader, live: Mapping[str, torch.Tensor], *, spared: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Fills these tensors from twins; returns copies of them, tied alike, or {} if they are yet to be cloned.

    After an error `spared` are unchanged. Raises as `RankLoader.fetch_loaded` does.
    """
    if all(tensor.device.type == "cpu" for tensor in live.values()):
        copies = _like(live)
        loader.fetch_loaded(copies)
        _copy_into(live, copies)
        return copies
    kept = clone(spared)
    try:
        loader.fetch_loaded(live)
    except BaseException:
        _copy_into({name: live[name] for name in kept}, kept)
        raise
    loader.server.release_twin("the engine processes its weights")  # it writes to these very tensors
    return {}


def clone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory, tied alike."""
    copies = _like(tensors)
    for name, tensor in tensors.items():
        copies[name].copy_(tensor.detach())
    return copies


def servable(copies: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loaded tensors, after processing: the live tensor if its bytes are unchanged, else the copy."""
    unchanged: dict[int, torch.Tensor] = {}  # by identity of the copy, so that ties stay ties
    taken: set[int] = set()  # addresses: processing may tie two tensors
    for name, kept in copies.items():
        now = live.get(name)
        if now is None or id(kept) in unchanged or now.data_ptr() in taken or not _same_bytes(kept, now):
            continue
        unchanged[id(kept)] = now.detach()
        taken.add(now.data_ptr())
    served = {name: unchanged.get(id(kept), kept) for name, kept in copies.items()}
    log.info("%d of %d tensors are served where the engine uses them", len(unchanged), len({*map(id, copies.values())}))
    return served


@dataclass(frozen=True)
class LoadedModel:
    """A model and its rank's loader.

    `lost`: why its tensors, once updated, could not be served as a weight version; '' if they could. `then` is called
    after warm-up.
    """

    loader: RankLoader
    model: nn.Module
    lost: str
    then: Callable[[], object] | None = None


@dataclass
class LoadedModels:
    """The models that this process of an engine has loaded. The engine's hooks call these methods."""

    engine: str
    entries: list[LoadedModel] = field(default_factory=list)

    def ready(self, unhooked: Sequence[str] = ()) -> None:
        """After warm-up: serves. `unhooked`: functions that change weights and have no hook in this version."""
        for entry in self.entries:
            if unhooked:
                why = f"this {self.engine} has no {unhooked[0]}, so that changed weights would go unnoticed"
                entry.loader.server.begin_change(why)
            entry.loader.ready(entry.then)

    def pause(self, method: str) -> None:
        """Before the engine releases its weights' memory, perhaps to restore it."""
        for entry in self.entries:
            entry.loader.server.pause(f"the engine was told to {method}")

    def resume(self) -> None:
        """After the engine has restored its weights' memory."""
        for entry in self.entries:
            entry.loader.server.resume()

    def begin_change(self, method: str) -> None:
        """Before the engine changes its weights, or releases them for good."""
        for entry in self.entries:
            until = RESTART if entry.lost else "an update of them is finished and has a weight version"
            entry.loader.server.begin_change(f"the engine was told to {method.replace('_', ' ')}", until)

    def end_change(self) -> None:
        """After the engine has changed all weights."""
        for entry in self.entries:
            entry.loader.server.end_change()

    def set_version(self, version: str) -> None:
        """The engine names its current weights."""
        for entry in self.entries:
            if entry.lost:
                log.info("%s: weight version %r is not served: %s", entry.loader, version, entry.lost)
            else:
                entry.loader.server.set_version(version, functools.partial(_live, entry.model))


def model_fields(engine: str, version: str, model_config: Any) -> dict[str, str]:
    """The fingerprint's fields that both engines have."""
    hf = model_config.hf_config
    config = {key: value for key, value in hf.to_dict().items() if key not in UNSHARED}
    return {
        "engine": engine,
        "engine_version": version,
        "architectures": ",".join(getattr(hf, "architectures", None) or []),
        "model_impl": str(model_config.model_impl),
        "dtype": str(model_config.dtype),
        "quantization": str(model_config.quantization),
        "hf_config": short_digest(config),
    }


def _live(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in named_tensors(model).items()}


def _like(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New host memory for each tensor; tensors that share memory share the new memory."""
    made: dict[object, torch.Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        memory = (tensor.data_ptr(), tensor.dtype, shape, tensor.stride()) if tensor.numel() else name
        if memory not in made:
            made[memory] = torch.empty(shape, dtype=tensor.dtype, device="cpu")
        found[name] = made[memory]
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
