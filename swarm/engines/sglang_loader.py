"""SGLang's model loader with swarm: a rank's tensors from twins, else its files from peers, else SGLang's own loader.

    initialise -> load_weights -> postprocess_weights -> the scheduler's loop
                  |                                      |
                  tensors are fetched and copied here    and served from here on

Tensors are exchanged at the same point as in vLLM. But some models compute tensors at the end of
`load_weights` that are neither parameters nor buffers (DeepSeek's absorbed projections). These have no name, so such
models load files, and a rank does not serve its tensors if loading made such attributes.

Owns the fields of a rank's layout in SGLang. Must not know: nodes, artifacts. Written for SGLang 0.5.23.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sglang
import torch
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.runtime_context import get_parallel, get_server_args
from torch import nn

from swarm.engines.cache_start import CacheStart
from swarm.engines.layout import short_digest
from swarm.engines.load import RankLoader
from swarm.engines.rank import LoadOptions, Rank
from swarm.engines.snapshot import (
    LoadedModel,
    LoadedModels,
    keep_loaded,
    load_weights,
    model_fields,
    named_tensors,
    prepare_gpu,
)

KEY = "swarm"  # in the loader's extra config, beside SGLang's own keys
# Ranks and sizes by which SGLang splits tensors. Twins of a version that lacks a name have the same value for it.
PARALLEL = (
    "tp_rank", "tp_size", "pp_rank", "pp_size", "dp_size", "attn_tp_rank", "attn_tp_size", "attn_dp_rank",
    "attn_dp_size", "attn_cp_rank", "attn_cp_size", "moe_ep_rank", "moe_ep_size", "moe_dp_rank", "moe_dp_size",
    "moe_tp_rank", "moe_tp_size",
)  # fmt: skip
# Server arguments that may differ between twins: addresses, names, logs, limits. Any other argument makes another
# layout: at worst twins do not recognise each other and load files.
UNSHARED_ARGUMENTS = {
    "host", "port", "grpc_port", "nccl_port", "dist_init_addr", "node_rank", "base_gpu_id", "gpu_id_step",
    "model_path", "tokenizer_path", "served_model_name", "download_dir", "revision", "random_seed", "api_key",
    "admin_api_key", "file_storage_path", "log_level", "log_level_http", "log_requests", "log_requests_level",
    "enable_metrics", "mem_fraction_static", "max_running_requests", "max_total_tokens", "model_loader_extra_config",
    "load_format", "warmups", "skip_server_warmup", "watchdog_timeout", "crash_dump_folder",
}  # fmt: skip

log = logging.getLogger("swarm")
models = LoadedModels("SGLang")


def asked_for(load_config: Any) -> tuple[dict[str, Any] | None, Any]:
    """The swarm's options in a load config, None if absent, and the config without them."""
    extra = load_config.model_loader_extra_config
    if not isinstance(extra, dict) or KEY not in extra:
        return None, load_config
    rest = {name: value for name, value in extra.items() if name != KEY}
    return dict(extra[KEY] or {}), dataclasses.replace(load_config, model_loader_extra_config=rest)


def instead_of(loader: Any, load_config: Any, model_config: Any, options: dict[str, Any]) -> Any:
    """Swarm's loader, or the given loader if it is not SGLang's default or loads a draft model."""
    if type(loader) is not DefaultModelLoader:
        log.info("%s loads without swarm: it does not read a checkpoint's files as they are", type(loader).__name__)
        return loader
    if model_config is None or model_config.is_draft_model or load_config.draft_model_idx is not None:
        return loader
    return SglangLoader(load_config, options)


class SglangLoader(DefaultModelLoader):
    """SGLang's default loader, with the swarm's tiers before it."""

    def __init__(self, load_config: Any, options: dict[str, Any]) -> None:
        super().__init__(load_config)
        self._options = options
        self._model_config: Any = None
        self._begun: RankLoader | None = None
        self._cache: CacheStart | None = None  # on the first rank of a host

    def load_model(self, *, model_config: Any, device_config: Any) -> nn.Module:
        """Initialises the model as SGLang does, which then calls `load_weights_and_postprocess`.

        The rank's node opens meanwhile. Raises SettingsError.
        """
        self._model_config, self._begun = model_config, self._rank_loader(model_config)
        self._begun.begin()
        prepare_gpu()
        if self._begun.node.rank.first_of_host:
            self._cache = CacheStart(self._begun.fields, self._begun.settings)
            self._cache.begin()
        model = super().load_model(model_config=model_config, device_config=device_config)
        if self._cache is not None:  # the scheduler compiles next
            self._cache.join()
        return model

    def load_weights_and_postprocess(self, model: nn.Module, weights: Iterable[Any], target_device: Any) -> None:
        """Loads by the first tier that works, processes, and keeps the tensors to serve.

        Raises as SGLang's own loader does if no tier works.
        """
        config = self._model_config
        if config is None:  # SGLang loads weights by other means while it starts
            DefaultModelLoader.load_weights_and_postprocess(model, weights, target_device)
            return
        loader, self._begun = self._begun or self._rank_loader(config), None
        nameless = _nameless(model)
        snapshot = load_weights(
            loader,
            model,
            own=lambda: self.load_weights_only(model, weights, target_device),
            own_from=lambda place: self._own_from(place, model, target_device),
            unsafe=_unsafe(model),
            unread=lambda described: "",
            spared=lambda: named_tensors(model),
            unsafe_after=lambda: _made_nameless(model, nameless),
        )
        self.postprocess_weights(model, target_device)
        keep_loaded(loader, snapshot, model)
        then = None if self._cache is None else self._cache.serve
        models.entries.append(LoadedModel(loader, model, lost="SGLang names no weight version", then=then))

    def _rank_loader(self, config: Any) -> RankLoader:
        rank = Rank.of(
            torch.cuda.current_device() if torch.cuda.is_available() else _read("tp_rank", 0),
            tp=(_read("tp_rank", 0), _read("tp_size", 1)),
            pp=(_read("pp_rank", 0), _read("pp_size", 1)),
            ep=(_read("moe_ep_rank", 0), _read("moe_ep_size", 1)),
        )
        engine, options = f"sglang {sglang.__version__}", LoadOptions.read(self._options)
        return RankLoader(
            engine, config.model_path, config.revision, rank, fields=layout_fields(config), options=options
        )

    def _own_from(self, place: Path | str, model: nn.Module, target_device: Any) -> None:
        """By SGLang's own loader, from another directory or the hub; it writes every tensor."""
        moved = copy.copy(self._model_config)
        moved.model_path, moved.revision = str(place), None
        self.load_weights_only(model, self._get_all_weights(moved, model), target_device)


def layout_fields(model_config: Any) -> dict[str, str]:
    """The fingerprint's fields: all that decides a rank's tensors after `load_weights`, except the content.

    Call it before loading: processing may change the quantisation config.
    """
    arguments = {key: value for key, value in vars(get_server_args()).items() if key not in UNSHARED_ARGUMENTS}
    return {
        **model_fields("sglang", sglang.__version__, model_config),
        "server_args": short_digest({key: str(value) for key, value in arguments.items()}),
        "platform": "cuda" if torch.cuda.is_available() else "cpu",
        **{name: str(_read(name, "(not said)")) for name in PARALLEL},
    }


def _read(name: str, default: Any) -> Any:
    try:
        return getattr(get_parallel(), name)
    except Exception:  # a version may raise anything for a name that it does not know, or not yet
        return default


def _unsafe(model: nn.Module) -> str:
    """Why ranks cannot exchange this model's tensors; '' if they can."""
    if getattr(get_server_args(), "enable_eplb", False):
        return "experts move while the engine runs (EPLB)"
    if hasattr(model, "post_load_weights"):
        return f"{type(model).__name__} computes tensors without a name while it loads"
    if any(tensor.is_meta for tensor in named_tensors(model).values()):
        return "some tensors have no memory before they are loaded"
    return ""


def _nameless(model: nn.Module) -> set[str]:
    """Tensors that are attributes of modules and neither parameters nor buffers."""
    return {
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }


def _made_nameless(model: nn.Module, before: set[str]) -> str:
    made = sorted(_nameless(model) - before)
    return f"loading made {len(made)} tensors without a name: {', '.join(made[:3])}" if made else ""
