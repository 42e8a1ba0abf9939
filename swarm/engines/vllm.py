"""The vLLM plugin: entry point `swarm` of `vllm.general_plugins`, load format `swarm`.

vLLM calls `register` in every process of its own: API server, engine core, workers. So it is light, and may be called
again. The loader comes from `engines.vllm_loader`, which is imported where vLLM is there already.

Three things are patched into vLLM's worker wrapper, because no hook exists for them: the last step of starting up,
after which the worker serves; whatever changes weights or takes them away, before which it stops; and waking up, after
which it serves again what is still the same. Must not know: nodes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

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
_MARK = "_swarm_hook"


def register() -> None:
    """Makes `--load-format swarm` known to this process's vLLM."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from swarm.engines import vllm_loader

    if not getattr(WorkerWrapperBase, _MARK, False):
        register_model_loader("swarm")(vllm_loader.SwarmLoader)
        _hook(WorkerWrapperBase, WARM_UP, after=vllm_loader.ready)
        for method in CHANGES:
            _hook(WorkerWrapperBase, method, before=functools.partial(vllm_loader.stop, method))
        _hook(WorkerWrapperBase, "sleep", before=vllm_loader.pause)
        _hook(WorkerWrapperBase, "wake_up", after=vllm_loader.resume)
        _hook(WorkerWrapperBase, "discard", before=vllm_loader.discard)
        setattr(WorkerWrapperBase, _MARK, True)


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
