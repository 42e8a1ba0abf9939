"""The vLLM plugin: entry point `swarm` of `vllm.general_plugins`, load format `swarm`.

vLLM calls `register` in every process of its own: API server, engine core, workers. So it is light, and may be called
again. The loader comes from `engines.vllm_loader`, which is imported where vLLM is there already.

Two things are patched into vLLM's worker wrapper, because no hook exists for them: the last step of starting up, after
which the worker serves, and whatever changes weights or takes them away, before which it stops. Must not know: nodes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

WARM_UP = "compile_or_warm_up_model"
# Each of them changes weights in memory or gives their memory away.
CHANGES = ("sleep", "discard", "reload_weights", "start_weight_update", "update_weights")
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
        setattr(WorkerWrapperBase, _MARK, True)


def _hook(
    wrapper: type, method: str, *, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
) -> None:
    """The wrapper forwards what it does not define itself to the worker: so does this, and calls the hooks as well."""
    known = wrapper.__dict__.get(method)

    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        result = known(self, *args, **kwargs) if known else getattr(self.worker, method)(*args, **kwargs)
        if after is not None:
            after()
        return result

    setattr(wrapper, method, hooked)
