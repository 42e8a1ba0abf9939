"""vLLM's model loader `swarm`: a rank's tensors from twins, else its files from peers, else vLLM's own loader.

    create_model -> load_weights -> process_weights_after_loading -> warm-up
                    |                                                |
                    tensors are fetched and copied here              and served from here on

After `load_weights` a rank's tensors are the same for every kernel that vLLM may choose later. Processing may pack them
into handles that have no name. So every tensor is compared with its copy afterwards: if unchanged, it is served from
where the engine uses it, else from the copy.

Owns the fields of a rank's layout in vLLM. Must not know: nodes, artifacts. Written for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
import vllm
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_world_group
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from swarm.engines import metadata, vllm_modelinfos
from swarm.engines.cache_start import CacheStart
from swarm.engines.compile_caches import refusal
from swarm.engines.layout import short_digest
from swarm.engines.load import RankLoader
from swarm.engines.rank import LoadOptions, Rank
from swarm.engines.snapshot import (
    LoadedModel,
    LoadedModels,
    Snapshot,
    keep_loaded,
    load_weights,
    model_fields,
    named_tensors,
    prepare_gpu,
)

FORMAT = "swarm"
HEADER_QUANTISATIONS = ("awq", "gptq")  # vLLM may detect these by the files' headers

log = logging.getLogger("swarm")
models = LoadedModels("vLLM")
_begun: list[RankLoader] = []  # by `begin`, until its engine loads
_caches: list[CacheStart] = []  # of this process's engine, on the first rank of a host


class VllmLoader(BaseModelLoader):
    """The loader of `--load-format swarm`. vLLM makes several in a worker, so `__init__` does nothing."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self._snapshot: Snapshot | None = None
        self._loader: RankLoader | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        """By vLLM's own loader."""
        self._own().download_model(model_config)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
        """By vLLM's own loader: a reload reads the disk."""
        return self._own().get_all_weights(model_config, model)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Loads by the first tier that works. Raises as vLLM's own loader does if none works."""
        config = get_current_vllm_config()
        if model_config is not config.model_config:
            log.info("%s: vLLM's own loader loads draft models", model_config.model)
            self._own().load_weights(model, model_config)
            return
        if not _begun:
            begin(config)
        self._loader = _rank_loader(config)
        self._snapshot = load_weights(
            self._loader,
            model,
            own=lambda: self._own().load_weights(model, model_config),
            own_from=lambda place: self._own_from(place, model, model_config),
            unsafe=_unsafe(model, config),
            unread=functools.partial(_unread, model_config),
            spared=lambda: _not_in_files(model, model_config),
        )

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Loads and processes as every loader does, and keeps the tensors to serve."""
        model = super().load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        if (loader := self._loader) is not None and model_config is vllm_config.model_config:
            lost = keep_loaded(loader, self._snapshot, model)
            self._snapshot = None
            if model_config.quantization is not None:
                lost = "they are quantised, and processing an update may change other tensors"
            then = functools.partial(_serve_caches, _caches[0], model_config, loader) if _caches else None
            models.entries.append(LoadedModel(loader, model, lost, then))
        return model

    def _own(self) -> DefaultModelLoader:
        return DefaultModelLoader(
            dataclasses.replace(self.load_config, load_format="auto", model_loader_extra_config={})
        )

    def _own_from(self, place: Path | str, model: nn.Module, model_config: ModelConfig) -> None:
        """By vLLM's own loader, from another directory or the hub; it writes every tensor."""
        moved = copy.copy(model_config)
        moved.model, moved.revision, moved.model_weights = str(place), None, ""
        self._own().load_weights(model, moved)


def begin(config: VllmConfig) -> None:
    """Opens the rank's node, looks for peers and compile caches, loads the hash kernels, while vLLM builds the model.

    The engine's ranks are known by now. Does nothing for other load formats; raises SettingsError.
    """
    if config.load_config.load_format != FORMAT or _begun:
        return
    _begun.append(loader := _rank_loader(config))
    loader.begin()
    prepare_gpu()
    _caches.clear()
    if loader.node.rank.first_of_host:
        try:
            cache = CacheStart({**loader.fields, "compilation": config.compute_hash()}, loader.settings)
        except Exception as error:  # of a configuration that vLLM cannot hash; compiling may come to the same error
            log.info("compile cache: not exchanged (%s)", error)
        else:
            _caches.append(cache)
            cache.begin()


def initialised(config: VllmConfig) -> None:
    """After `init_device`: begins unless that is done, and keeps vLLM's garbage collections around loading short.

    vLLM collects three times around loading, and each time walks the objects of all imported modules, for 0.4 s. They
    are static: vLLM has collected just now, and freezes them itself at the end of its start. Raises as `begin` does.
    """
    if config.load_config.load_format == FORMAT:
        gc.freeze()
    begin(config)


def join_caches() -> None:
    """Before vLLM compiles: returns once the first rank of each host has the compile cache that it found, if any."""
    try:
        for cache in _caches:
            cache.join()
    finally:
        world = get_world_group()
        if models.entries and world.world_size > 1 and not refusal(models.entries[0].loader.settings):
            world.barrier()  # else other ranks of this host would compile meanwhile


def _serve_caches(cache: CacheStart, model_config: ModelConfig, loader: RankLoader) -> None:
    cache.serve()
    if not refusal(loader.settings):
        vllm_modelinfos.offer(getattr(model_config.hf_config, "architectures", None) or (), loader.settings)


def _rank_loader(config: VllmConfig) -> RankLoader:
    """The rank's loader; the one that `begin` made, unless the engine's configuration has changed since."""
    _share_log_handlers()
    model_config, parallel = config.model_config, config.parallel_config
    fields = layout_fields(model_config, config)
    options = LoadOptions.read(dict(config.load_config.model_loader_extra_config or {}))
    if _begun and ((ready := _begun.pop()).fields, ready.options) == (fields, options):
        return ready
    rank = Rank.of(
        get_world_group().local_rank,
        tp=(get_tensor_model_parallel_rank(), parallel.tensor_parallel_size),
        pp=(get_pp_group().rank_in_group, parallel.pipeline_parallel_size),
        dp=(parallel.data_parallel_rank, parallel.data_parallel_size),
    )
    engine = f"vllm {vllm.__version__}"
    return RankLoader(engine, model_config.model, model_config.revision, rank, fields=fields, options=options)


def layout_fields(model_config: ModelConfig, config: VllmConfig) -> dict[str, str]:
    """The fingerprint's fields: all that decides a rank's tensors after `load_weights`, except the content.

    Call it before loading: processing may change the quantisation config.
    """
    hf, parallel = model_config.hf_config, config.parallel_config
    lora = config.lora_config
    return {
        **model_fields("vllm", vllm.__version__, model_config),
        "quantization_config": short_digest(getattr(hf, "quantization_config", None)),
        "tied": str(getattr(hf.get_text_config(), "tie_word_embeddings", False)),
        "tp": f"{get_tensor_model_parallel_rank()} of {parallel.tensor_parallel_size}",
        "pp": f"{get_pp_group().rank_in_group} of {parallel.pipeline_parallel_size}",
        "dp_size": str(parallel.data_parallel_size),
        "dp_rank": str(parallel.data_parallel_rank if parallel.enable_expert_parallel else 0),
        "experts": str(parallel.expert_placement_strategy) if parallel.enable_expert_parallel else "off",
        "lora": "" if lora is None else str(getattr(lora, "lora_extra_vocab_size", "on")),
        "platform": vllm.platforms.current_platform.device_type,
    }


def _not_in_files(model: nn.Module, model_config: ModelConfig) -> dict[str, torch.Tensor]:
    """Tensors that loading from files need not write, so that a partial copy would stay.

    vLLM checks that files bring every parameter of a model that is not quantised; it makes buffers itself.
    """
    if model_config.quantization is not None:
        return named_tensors(model)
    return dict(model.named_buffers(remove_duplicate=False))


def _unsafe(model: nn.Module, config: VllmConfig) -> str:
    """Why ranks cannot exchange this model's tensors; '' if they can."""
    if config.parallel_config.enable_eplb:
        return "experts move while the engine runs (EPLB)"
    if any(getattr(getattr(m, "quant_method", None), "uses_meta_device", False) for m in model.modules()):
        return "weights are quantised while they are loaded"
    if any(tensor.is_meta for tensor in named_tensors(model).values()):
        return "some tensors have no memory before they are loaded"
    return ""


def _unread(model_config: ModelConfig, described: metadata.CheckpointDescription) -> str:
    """The decision for which vLLM reads the files' headers, if these would have changed it."""
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


def _share_log_handlers() -> None:
    """Sends swarm's log lines to vLLM's handlers, which name the process, unless swarm has handlers."""
    ours, theirs = logging.getLogger("swarm"), logging.getLogger("vllm")
    if not ours.handlers and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.propagate = False
        ours.setLevel(theirs.level)
