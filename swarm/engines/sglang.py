"""The SGLang plugin: entry point `swarm` of `sglang.srt.plugins`.

SGLang calls `register` in every process of its own. Load formats are a closed list there, so the plugin wraps the
function that chooses a loader, and answers with its own where it was asked for: `swarm` in
`--model-loader-extra-config '{"swarm": {}}'`, or SWARM_SGLANG=1 in the environment.

Further hooks say when a scheduler begins to serve, and when its weights are about to change or to go. Must not know:
nodes.
"""

from __future__ import annotations

import functools
import os
import pkgutil
from collections.abc import Callable
from typing import Any

from swarm.engines.plugging import Plug

GET_LOADER = "sglang.srt.model_loader.loader.get_model_loader"
READY = "sglang.srt.managers.scheduler.dispatch_event_loop"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
# Each of them changes weights in memory.
CHANGES = (
    f"{_UPDATER}.begin_weight_update",
    f"{_UPDATER}.update_weights_from_disk",
    f"{_UPDATER}.update_weights_from_distributed",
    f"{_UPDATER}.update_weights_from_tensor",
    f"{_UPDATER}.update_weights_from_ipc",
)
RELEASE, RESUME = f"{_UPDATER}.release_memory_occupation", f"{_UPDATER}.resume_memory_occupation"
WEIGHTS = "weights"  # what SGLang tags their memory with
SWITCH = "SWARM_SGLANG"

_plug = Plug("SGLang", "sglang")


def register() -> None:
    """Puts the hooks in place; SGLang applies them once all plugins have been called.

    Never raises: what this SGLang lacks, it goes without.
    """
    if not _plug.place("swarm", _registry):
        return

    def hooks(feature: str, target: str, told: Callable[..., Any], kind: str) -> None:
        def put() -> None:
            registry, kinds = _registry()
            registry.register(target, told, kinds[kind])

        _plug.place(f"{feature} ({target.rpartition('.')[2]})", put)

    hooks("loading by swarm", GET_LOADER, choose_loader, "AROUND")
    for target in CHANGES:
        told = functools.partial(_change, target.rpartition(".")[2])
        hooks("serving its loaded tensors", target, told, "BEFORE")
    hooks("serving its loaded tensors", RELEASE, _pause, "BEFORE")
    hooks("serving again after it slept", RESUME, _resume, "AFTER")
    hooks("serving what it loaded", READY, _ready, "BEFORE")


def _registry() -> tuple[Any, Any]:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    return HookRegistry, HookType


def choose_loader(original: Any, load_config: Any, model_config: Any = None) -> Any:
    """What SGLang would choose, or, where it was asked for, the loader that tries the swarm before."""
    from swarm.engines import sglang_loader

    options, without = sglang_loader.asked_for(load_config)
    loader = original(without, model_config)
    if options is None and not _switched_on():
        return loader
    return sglang_loader.instead_of(loader, without, model_config, options or {})


def unhooked() -> list[str]:
    """Hooks that this SGLang has no place for, so that nobody would tell when weights change."""
    return [target for target in (*CHANGES, RELEASE) if not hasattr(_resolved(target), "__wrapped__")]


def _resolved(target: str) -> object:
    try:
        return pkgutil.resolve_name(target)
    except (AttributeError, ImportError):
        return None


def _switched_on() -> bool:
    return os.environ.get(SWITCH, "").lower() in ("1", "true", "yes", "on")


def _ready(*_: Any, **__: Any) -> None:
    from swarm.engines import sglang_loader

    sglang_loader.ready(unhooked())


def _change(why: str, *_: Any, **__: Any) -> None:
    from swarm.engines import sglang_loader

    sglang_loader.change(why)


def _pause(_: Any, request: Any) -> None:
    from swarm.engines import sglang_loader

    if _of_weights(request):
        sglang_loader.pause()


def _resume(_: Any, __: Any, request: Any) -> None:
    from swarm.engines import sglang_loader

    if _of_weights(request):
        sglang_loader.resume()


def _of_weights(request: Any) -> bool:
    """Whether a request about memory is about that of weights; one that names no kind is about all."""
    return not request.tags or WEIGHTS in request.tags
