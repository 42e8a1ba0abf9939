"""The SGLang plugin: entry point `swarm` of `sglang.srt.plugins`.

SGLang calls `register` in each of its processes. Its load formats are a closed list, so the plugin wraps the function
that chooses a loader. It returns swarm's loader if `--model-loader-extra-config '{"swarm": {}}'` or SWARM_SGLANG=1 asks
for it.

Further hooks run when a scheduler begins to serve, and before its weights change or are released. Must not know: nodes.
"""

from __future__ import annotations

import functools
import os
import pkgutil
from collections.abc import Callable
from typing import Any

from swarm.engines.hooks import EngineHooks

GET_LOADER = "sglang.srt.model_loader.loader.get_model_loader"
READY = "sglang.srt.managers.scheduler.dispatch_event_loop"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
# Methods that change weights in memory.
CHANGES = (
    f"{_UPDATER}.begin_weight_update",
    f"{_UPDATER}.update_weights_from_disk",
    f"{_UPDATER}.update_weights_from_distributed",
    f"{_UPDATER}.update_weights_from_tensor",
    f"{_UPDATER}.update_weights_from_ipc",
)
RELEASE, RESUME = f"{_UPDATER}.release_memory_occupation", f"{_UPDATER}.resume_memory_occupation"
WEIGHTS = "weights"  # SGLang's tag for the memory of weights
SWITCH = "SWARM_SGLANG"

_hooks = EngineHooks("SGLang", "sglang")


def register() -> None:
    """Registers the hooks; SGLang applies them after it has called all plugins.

    Never raises: a missing feature is logged.
    """
    if not _hooks.install("swarm", _registry):
        return

    def hook(feature: str, target: str, call: Callable[..., Any], kind: str) -> None:
        def put() -> None:
            registry, kinds = _registry()
            registry.register(target, call, kinds[kind])

        _hooks.install(f"{feature} ({_method(target)})", put)

    hook("loading by swarm", GET_LOADER, choose_loader, "AROUND")
    for target in CHANGES:
        hook("serving its loaded tensors", target, functools.partial(begin_change, _method(target)), "BEFORE")
    hook("serving its loaded tensors", RELEASE, pause, "BEFORE")
    hook("serving again after it slept", RESUME, resume, "AFTER")
    hook("serving what it loaded", READY, lambda *_, **__: _models().ready(unhooked()), "BEFORE")


def choose_loader(original: Any, load_config: Any, model_config: Any = None) -> Any:
    """SGLang's choice, or swarm's loader if it was asked for."""
    from swarm.engines import sglang_loader

    options, without = sglang_loader.asked_for(load_config)
    loader = original(without, model_config)
    if options is None and os.environ.get(SWITCH, "").lower() not in ("1", "true", "yes", "on"):
        return loader
    return sglang_loader.instead_of(loader, without, model_config, options or {})


def unhooked() -> list[str]:
    """Methods that change or release weights and that this SGLang has no hook for."""
    return [_method(target) for target in (*CHANGES, RELEASE) if not hasattr(_resolved(target), "__wrapped__")]


def begin_change(method: str, /, *_: object, **__: object) -> None:
    """Before the scheduler changes its weights."""
    _models().begin_change(method)


def pause(_: Any, request: Any) -> None:
    """Before the scheduler releases memory."""
    if _of_weights(request):
        _models().pause("release their memory")


def resume(_: Any, __: Any, request: Any) -> None:
    """After the scheduler has restored memory."""
    if _of_weights(request):
        _models().resume()


def _of_weights(request: Any) -> bool:
    """Whether a request about memory includes the weights; a request without tags is about all memory."""
    return not request.tags or WEIGHTS in request.tags


def _models() -> Any:
    from swarm.engines.sglang_loader import models

    return models


def _registry() -> tuple[Any, Any]:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    return HookRegistry, HookType


def _method(target: str) -> str:
    return target.rpartition(".")[2]


def _resolved(target: str) -> object:
    try:
        return pkgutil.resolve_name(target)
    except (AttributeError, ImportError):
        return None
