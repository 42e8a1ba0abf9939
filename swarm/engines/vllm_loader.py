"""vLLM's model loader `swarm`: one rank's tensors from twins, else its files from the swarm, else as without.

    create_model -> load_weights -> process_weights_after_loading -> warm-up
                    |                                                |
                    tensors come and are kept here                   and are served from here on

The hand-over point lies between the two: what a rank holds there is the same for every kernel that vLLM may choose
afterwards. Processing may pack weights into handles that no name leads to, so what it changed, found out by comparing
every tensor with a copy of before, is served from that copy; the rest is served where it lies.

Owns what decides a rank's layout in vLLM. Must not know: nodes, artifacts. Written for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_world_group
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from swarm.checkpoint import hf_cache
from swarm.engines import compile_caches, metadata
from swarm.engines.layout import short_digest
from swarm.engines.load import Join, Options, Rank
from swarm.engines.serve_loaded import ANEW
from swarm.engines.snapshot import (
    clone,
    directory_of,
    is_directory,
    model_fields,
    model_id_of,
    named_tensors,
    servable,
    take,
)
from swarm.errors import SettingsError

WEIGHTS = "weights"  # what vLLM tags their memory with
HEADER_QUANTISATIONS = ("awq", "gptq")  # which vLLM may find out about by the headers of the files

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class Loaded:
    """A model that this process has loaded, for the hooks.

    `compiles` is the key of what it compiles, if it speaks for its host; `lost` says why its tensors, once they were
    updated, would not be what another engine has when it has loaded the same, '' when they would.
    """

    join: Join
    model: nn.Module
    compiles: dict[str, str]
    lost: str


_loaded: list[Loaded] = []


class SwarmLoader(BaseModelLoader):
    """What `--load-format swarm` stands for. Made more than once in a worker: making it does nothing."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self._extra = dict(load_config.model_loader_extra_config or {})
        self._copies: dict[str, torch.Tensor] = {}
        self._join: Join | None = None
        self._compiles: dict[str, str] = {}  # the key of what this process compiles, if it speaks for its host

    def download_model(self, model_config: ModelConfig) -> None:
        """As without swarm."""
        self._disk().download_model(model_config)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
        """What reloading from disk reads."""
        return self._disk().get_all_weights(model_config, model)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Loads by the first tier that works. Raises what vLLM's own loader raises when none does."""
        config = get_current_vllm_config()
        if model_config is not config.model_config:
            log.info("%s: a draft model is loaded as without swarm", model_config.model)
            self._disk().load_weights(model, model_config)
            return
        _log_as_vllm_does()
        options = Options.read(self._extra)
        fields = layout_fields(model_config, config)
        join = self._join = Join(
            f"vllm {vllm.__version__}",
            model_id_of(model_config.model),
            Rank(_rank_label(config), get_world_group().local_rank),
            directory=directory_of(model_config.model, model_config.revision),
            fields=fields,
            options=options,
        )
        if join.first_of_host:
            self._compiles = {**fields, "compilation": config.compute_hash()}
            compile_caches.before_compiling(self._compiles, join.settings)
        unsafe = _unsafe(model, config)

        def loaded() -> None:
            self._copies = take(join, named_tensors(model), spared=_not_in_files(model, model_config))

        def checkpoint() -> None:
            self._load_from(join.fetch_checkpoint(), model, model_config)

        def disk() -> None:
            if join.local == "whole" or not is_directory(model_config.model):
                self._disk().load_weights(model, model_config)
            elif join.described and hf_cache.is_model_id(join.model_id):
                self._load_from(join.model_id, model, model_config)
            else:
                raise SettingsError(
                    "load format", f"{model_config.model} holds no weights, and none came from the swarm"
                )

        join.load(
            {"loaded": loaded, "checkpoint": checkpoint, "disk": disk}, unsafe=unsafe, unread=_unread(model_config)
        )
        if unsafe or not options.serve:
            self._copies = {}
        elif not self._copies:
            self._copies = clone(named_tensors(model))

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """As every loader does; and remembers what to serve after warm-up."""
        model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        if self._join is not None and model_config is vllm_config.model_config:
            lost = "they are not to be served"
            if self._copies:
                served = servable(self._copies, named_tensors(model))
                packed = sum(served[name] is kept for name, kept in self._copies.items())
                lost = f"processing changed {packed} of them, so that it is not known what they were" if packed else ""
                if model_config.quantization is not None:
                    lost = "they are quantised, and processing may change others than it did"
                self._join.offer.keep(lambda: served)
                self._copies = {}
            _loaded.append(Loaded(self._join, model, self._compiles, lost))
        return model

    def _disk(self) -> DefaultModelLoader:
        return DefaultModelLoader(
            dataclasses.replace(self.load_config, load_format="auto", model_loader_extra_config={})
        )

    def _load_from(self, place: Path | str, model: nn.Module, model_config: ModelConfig) -> None:
        """By vLLM's own loader, out of another directory or from the hub; every tensor is written."""
        moved = copy.copy(model_config)
        moved.model, moved.revision = str(place), None
        moved.model_weights = ""
        self._disk().load_weights(model, moved)


def ready(unhooked: Sequence[str] = ()) -> None:
    """The worker has warmed up: what it loaded is served from now on.

    `unhooked` are changes of weights that this vLLM would not tell of.
    """
    for one in _loaded:
        if unhooked:
            one.join.offer.change(f"this vLLM has no {unhooked[0]}, which would tell when weights change")
        then = (
            functools.partial(compile_caches.after_warm_up, one.compiles, one.join.settings) if one.compiles else None
        )
        one.join.ready(then=then)


def pause(*_: object, **__: object) -> None:
    """The worker is about to give the memory of its weights away, and may restore them."""
    for one in _loaded:
        one.join.offer.pause("the engine was told to sleep")


def resume(tags: Collection[str] | None = None) -> None:
    """The worker has memory again of what these tags name, None for all of it."""
    if tags is None or WEIGHTS in tags:
        for one in _loaded:
            one.join.offer.resume()


def discard(tags: Collection[str]) -> None:
    """The worker is about to give memory away of what these tags name, for good."""
    if WEIGHTS in tags:
        change("discard its weights")


def change(why: str, *_: object, **__: object) -> None:
    """The worker is about to change its weights, or to lose them."""
    for one in _loaded:
        until = ANEW if one.lost else "an update of them is finished and has a weight version"
        one.join.offer.change(f"the engine was told to {why.replace('_', ' ')}", until)


def changed(*_: object, **__: object) -> None:
    """The worker has all weights of what it was to change them to."""
    for one in _loaded:
        one.join.offer.changed()


def call(version: str) -> None:
    """The engine calls its weights by a version."""
    for one in _loaded:
        if one.lost:
            log.info("%s: weight version %r is not served: %s", one.join, version, one.lost)
        else:
            one.join.offer.call(version, functools.partial(_live, one.model))


def joins() -> list[Join]:
    """Those of this process, for whoever wants to know what became of them."""
    return [one.join for one in _loaded]


def _live(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in named_tensors(model).items()}


def _not_in_files(model: nn.Module, model_config: ModelConfig) -> dict[str, torch.Tensor]:
    """What loading from files need not write, so that half a copy of it would stay.

    vLLM checks that files bring every parameter of a model that is not quantised; buffers it made itself.
    """
    if model_config.quantization is not None:
        return named_tensors(model)
    return dict(model.named_buffers(remove_duplicate=False))


def layout_fields(model_config: ModelConfig, config: VllmConfig) -> dict[str, str]:
    """Everything that decides what a rank holds after `load_weights`, content aside.

    To be called before loading: processing may change the quantisation config.
    """
    hf, parallel = model_config.hf_config, config.parallel_config
    lora = config.lora_config
    experts = f"{parallel.expert_placement_strategy}" if parallel.enable_expert_parallel else "off"
    return {
        **model_fields("vllm", vllm.__version__, model_config),
        "quantization_config": short_digest(getattr(hf, "quantization_config", None)),
        "tied": str(getattr(hf.get_text_config(), "tie_word_embeddings", False)),
        "tp": f"{get_tensor_model_parallel_rank()} of {parallel.tensor_parallel_size}",
        "pp": f"{get_pp_group().rank_in_group} of {parallel.pipeline_parallel_size}",
        "dp_size": str(parallel.data_parallel_size),
        "dp_rank": str(parallel.data_parallel_rank if parallel.enable_expert_parallel else 0),
        "experts": experts,
        "lora": "" if lora is None else str(getattr(lora, "lora_extra_vocab_size", "on")),
        "platform": vllm.platforms.current_platform.device_type,
    }


def _unsafe(model: nn.Module, config: VllmConfig) -> str:
    """Why the tensors of this rank cannot be handed over; '' when they can."""
    if config.parallel_config.enable_eplb:
        return "experts move while the engine runs (EPLB)"
    if any(getattr(getattr(m, "quant_method", None), "uses_meta_device", False) for m in model.modules()):
        return "weights are quantised while they are loaded"
    if any(tensor.is_meta for tensor in named_tensors(model).values()):
        return "some tensors have no memory before they are loaded"
    return ""


def _unread(model_config: ModelConfig) -> Any:
    """What vLLM read of the headers of the files, or would have, had there been any."""

    def unread(described: metadata.Description) -> str:
        hf = model_config.hf_config
        quantisation = str(model_config.quantization or "")
        has_head = any(name.endswith("lm_head.weight") for name in described.tensor_names())
        if getattr(hf.get_text_config(), "tie_word_embeddings", False) and has_head:
            return (
                "the config says that embeddings are tied and the files have a head of their own, which vLLM did not "
                "see: start it with `swarm run`"
            )
        if getattr(hf, "dtype", None) is None:
            return "the config names no dtype, and vLLM saw no files: start it with `swarm run`"
        if quantisation.startswith(HEADER_QUANTISATIONS):
            return f"{quantisation} is read off the files, which vLLM did not see: start it with `swarm run`"
        return ""

    return unread


def _rank_label(config: VllmConfig) -> str:
    parallel = config.parallel_config
    parts = {
        "tp": (get_tensor_model_parallel_rank(), parallel.tensor_parallel_size),
        "pp": (get_pp_group().rank_in_group, parallel.pipeline_parallel_size),
        "dp": (parallel.data_parallel_rank, parallel.data_parallel_size),
    }
    return ",".join(f"{name}{rank}" for name, (rank, size) in parts.items() if size > 1) or "0"


def _log_as_vllm_does() -> None:
    """Lines of `swarm` go where vLLM's go, with its prefix that names the process, unless somebody set them up."""
    ours, theirs = logging.getLogger("swarm"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.propagate = False
        ours.setLevel(theirs.level)
