"""SGLang's default loader, with the swarm before it: one rank's tensors from twins, else its files, else as without.

    initialise -> load_weights -> postprocess_weights -> the scheduler's loop
                  |                                      |
                  tensors come and are kept here         and are served from here on

The hand-over point is the same as in vLLM. What differs: some models compute tensors at the end of `load_weights` that
are neither parameters nor buffers (DeepSeek's absorbed projections). No name leads to them, so such models take the
files; and whoever finds that loading made such tensors does not serve what it has loaded.

Owns what decides a rank's layout in SGLang. Must not know: nodes, artifacts. Written for SGLang 0.5.23.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sglang
import torch
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.runtime_context import get_parallel, get_server_args
from torch import nn

from swarm.checkpoint import hf_cache
from swarm.engines.layout import short_digest
from swarm.engines.load import Join, Options, Rank
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

KEY = "swarm"  # in the loader's extra config, beside SGLang's own keys
# Ranks and widths by which SGLang cuts tensors. What a version lacks is said to be so, and then the same for twins.
PARALLEL = (
    "tp_rank", "tp_size", "pp_rank", "pp_size", "dp_size", "attn_tp_rank", "attn_tp_size", "attn_dp_rank",
    "attn_dp_size", "attn_cp_rank", "attn_cp_size", "moe_ep_rank", "moe_ep_size", "moe_dp_rank", "moe_dp_size",
    "moe_tp_rank", "moe_tp_size",
)  # fmt: skip
# Arguments of the server that may differ between twins: where it runs, what it is called, what it logs and limits.
# Whatever is not named here makes another layout: at worst a twin is not recognised, and the files are taken.
ELSEWHERE = {
    "host", "port", "grpc_port", "nccl_port", "dist_init_addr", "node_rank", "base_gpu_id", "gpu_id_step",
    "model_path", "tokenizer_path", "served_model_name", "download_dir", "revision", "random_seed", "api_key",
    "admin_api_key", "file_storage_path", "log_level", "log_level_http", "log_requests", "log_requests_level",
    "enable_metrics", "mem_fraction_static", "max_running_requests", "max_total_tokens", "model_loader_extra_config",
    "load_format", "warmups", "skip_server_warmup", "watchdog_timeout", "crash_dump_folder",
}  # fmt: skip

log = logging.getLogger("swarm")
_joins: list[Join] = []  # of this process: the hooks find them here


def asked_for(load_config: Any) -> tuple[dict[str, Any] | None, Any]:
    """The swarm's options in a load config, None where there are none, and the config without them."""
    extra = load_config.model_loader_extra_config
    if not isinstance(extra, dict) or KEY not in extra:
        return None, load_config
    rest = {name: value for name, value in extra.items() if name != KEY}
    return dict(extra[KEY] or {}), dataclasses.replace(load_config, model_loader_extra_config=rest)


def instead_of(loader: Any, load_config: Any, model_config: Any, options: dict[str, Any]) -> Any:
    """The loader that tries the swarm first, or the given one where that has ways of its own."""
    if type(loader) is not DefaultModelLoader:
        log.info("%s loads as without swarm: it does not read a checkpoint's files as they are", type(loader).__name__)
        return loader
    if model_config is None or model_config.is_draft_model or load_config.draft_model_idx is not None:
        return loader
    return SwarmLoader(load_config, options)


class SwarmLoader(DefaultModelLoader):
    """SGLang's default loader, which asks the swarm first."""

    def __init__(self, load_config: Any, options: dict[str, Any]) -> None:
        super().__init__(load_config)
        self._options = options
        self._model_config: Any = None

    def load_model(self, *, model_config: Any, device_config: Any) -> nn.Module:
        """As SGLang's; it comes to `load_weights_and_postprocess` when the model is made."""
        self._model_config = model_config
        return super().load_model(model_config=model_config, device_config=device_config)

    def load_weights_and_postprocess(self, model: nn.Module, weights: Iterable[Any], target_device: Any) -> None:
        """Loads by the first tier that works, processes, and remembers what to serve. Raises what SGLang's own does."""
        config = self._model_config
        if config is None:  # weights that overlap with start-up, which have ways of their own
            DefaultModelLoader.load_weights_and_postprocess(model, weights, target_device)
            return
        options = Options.read(self._options)
        join = Join(
            f"sglang {sglang.__version__}",
            model_id_of(config.model_path),
            Rank(_rank_label(), torch.cuda.current_device() if torch.cuda.is_available() else _read("tp_rank", 0)),
            directory=directory_of(config.model_path, config.revision),
            fields=layout_fields(config),
            options=options,
        )
        unsafe = _unsafe(model)
        copies: dict[str, torch.Tensor] = {}
        nameless = _nameless(model)

        def loaded() -> None:
            live = named_tensors(model)
            copies.update(take(join, live, spared=live))

        def checkpoint() -> None:
            self._load_from(join.fetch_checkpoint(), model, target_device)

        def disk() -> None:
            if join.local == "whole" or not is_directory(config.model_path):
                self.load_weights_only(model, weights, target_device)
            elif join.described and hf_cache.is_model_id(join.model_id):
                self._load_from(join.model_id, model, target_device)
            else:
                raise SettingsError("model path", f"{config.model_path} holds no weights, and none came from the swarm")

        join.load(
            {"loaded": loaded, "checkpoint": checkpoint, "disk": disk}, unsafe=unsafe, unread=lambda described: ""
        )
        if made := _nameless(model) - nameless:
            unsafe = f"loading made {len(made)} tensors without a name: {', '.join(sorted(made)[:3])}"
            log.info("%s: what was loaded is not served: %s", join, unsafe)
        if not unsafe and options.serve and not copies:
            copies = clone(named_tensors(model))
        self.postprocess_weights(model, target_device)
        if not unsafe and options.serve:
            served = servable(copies, named_tensors(model))
            join.offer.keep(lambda: served)
        _joins.append(join)

    def _load_from(self, place: Path | str, model: nn.Module, target_device: Any) -> None:
        """By SGLang's own loader, out of another directory or from the hub; every tensor is written."""
        moved = copy.copy(self._model_config)
        moved.model_path, moved.revision = str(place), None
        self.load_weights_only(model, self._get_all_weights(moved, model), target_device)


def ready(unhooked: Sequence[str] = ()) -> None:
    """The scheduler begins to serve: so does the swarm. `unhooked` are changes of weights that nobody would tell of."""
    for join in _joins:
        if unhooked:
            join.offer.change(
                f"this SGLang has no {unhooked[0].rpartition('.')[2]}, so nobody would tell when weights change"
            )
        join.ready()


def pause() -> None:
    """The scheduler is about to give the memory of its weights away, and may restore them."""
    for join in _joins:
        join.offer.pause("the engine was told to release their memory")


def resume() -> None:
    """The scheduler has restored its weights, or has memory for others."""
    for join in _joins:
        join.offer.resume()


def change(why: str) -> None:
    """The scheduler is about to change its weights."""
    for join in _joins:
        join.offer.change(f"the engine was told to {why.replace('_', ' ')}")


def layout_fields(model_config: Any) -> dict[str, str]:
    """Everything that decides what a rank holds after `load_weights`, content aside.

    To be called before loading: processing may change the quantisation config.
    """
    arguments = {key: value for key, value in vars(get_server_args()).items() if key not in ELSEWHERE}
    return {
        **model_fields("sglang", sglang.__version__, model_config),
        "server_args": short_digest({key: str(value) for key, value in arguments.items()}),
        "platform": "cuda" if torch.cuda.is_available() else "cpu",
        **{name: str(_read(name, "(not said)")) for name in PARALLEL},
    }


def _read(name: str, default: Any) -> Any:
    try:
        return getattr(get_parallel(), name)
    except Exception:  # whatever a version raises for what it does not know, or not yet
        return default


def _rank_label() -> str:
    parts = {"tp": ("tp_rank", "tp_size"), "pp": ("pp_rank", "pp_size"), "ep": ("moe_ep_rank", "moe_ep_size")}
    known = {name: (_read(rank, 0), _read(size, 1)) for name, (rank, size) in parts.items()}
    return ",".join(f"{name}{rank}" for name, (rank, size) in known.items() if size > 1) or "0"


def _unsafe(model: nn.Module) -> str:
    """Why the tensors of this rank cannot be handed over; '' when they can."""
    if getattr(get_server_args(), "enable_eplb", False):
        return "experts move while the engine runs (EPLB)"
    if hasattr(model, "post_load_weights"):
        return f"{type(model).__name__} computes tensors while it loads, to which no name leads"
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
