"""The vLLM plugin: entry point `swarm` of `vllm.general_plugins`, load format `swarm`.

vLLM calls `register` in every process of its own: API server, engine core, workers. So it is light, and may be called
again. The loader comes from `engines.vllm_loader`, which is imported where vLLM is there already.

Patched into vLLM's worker wrapper, because no hook exists for them, are: the last step of starting up, after which
the worker serves; whatever changes weights or takes them away, before which it stops; waking up, after which it serves
again what is still the same; and the end of an update, after which it serves what the engine's core calls by a weight
version. Must not know: nodes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from swarm.engines.plugging import Plug

WARM_UP = "compile_or_warm_up_model"
# Each of them changes weights in memory, or what they are tied to, or moves them elsewhere.
CHANGES = (
    "reload_weights",
    "reset_weights",
    "start_weight_update",
    "start_draft_weight_update",  # a draft may share tensors with the model that it drafts for
    "update_weights",
    "elastic_ep_execute",
)
# After each of them all weights are there that were to come.
CHANGED = ("reload_weights", "finish_weight_update")
CALLED = "swarm_weight_version"  # what workers are told by the engine's core, which is told the version of weights

_plug = Plug("vLLM", "vllm")


def register() -> None:
    """Makes `--load-format swarm` known to this process's vLLM. Never raises: what this vLLM lacks, it goes without."""
    if not _plug.place("--load-format swarm", _add_format):
        return
    from swarm.engines import vllm_loader

    if not _plug.place("serving what it loaded", _wrapper):
        return

    def hooks(feature: str, method: str, **told: Callable[..., None]) -> bool:
        return _plug.place(f"{feature} ({method})", lambda: _hook(_wrapper(), method, **told))

    stops: dict[str, Callable[..., None]] = {
        **{method: functools.partial(vllm_loader.change, method) for method in CHANGES},
        "sleep": vllm_loader.pause,
        "discard": vllm_loader.discard,
    }
    unhooked = [
        method for method, told in stops.items() if not hooks("serving its loaded tensors", method, before=told)
    ]
    hooks("serving again after it slept", "wake_up", after=vllm_loader.resume)
    for method in CHANGED:
        hooks("serving weights that were updated", method, after=vllm_loader.changed)
    _plug.place("serving weights that were updated", _add_versions)
    hooks("serving what it loaded", WARM_UP, after=lambda *_, **__: vllm_loader.ready(unhooked))


def _add_format() -> None:
    from vllm.model_executor.model_loader import register_model_loader

    from swarm.engines import vllm_loader

    register_model_loader("swarm")(vllm_loader.SwarmLoader)


def _wrapper() -> Any:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    return WorkerWrapperBase


def _add_versions() -> None:
    from vllm.v1.engine.core import EngineCore

    from swarm.engines import vllm_loader

    setattr(_wrapper(), CALLED, lambda self, version: vllm_loader.call(version))
    _tell_workers(EngineCore)


def _hook(
    wrapper: type, method: str, *, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> None:
    """The wrapper forwards what it does not define itself to the worker: so does this, and calls the hooks as well.

    They get the arguments of the call.
    """
    known = wrapper.__dict__.get(method)

    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = known(self, *args, **kwargs) if known else getattr(self.worker, method)(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return result

    setattr(wrapper, method, hooked)


def _tell_workers(core: Any) -> None:
    """The version of weights is told to the engine's core, and not to its workers: so does this."""
    known = core.set_weight_version

    def set_weight_version(self: Any, weight_version: str) -> None:
        known(self, weight_version)
        if self.vllm_config.load_config.load_format == "swarm":
            self.model_executor.collective_rpc(CALLED, args=(weight_version,))

    core.set_weight_version = set_weight_version
