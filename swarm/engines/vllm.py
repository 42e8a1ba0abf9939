"""The vLLM plugin: entry point `swarm` of `vllm.general_plugins`, load format `swarm`.

vLLM calls `register` in each of its processes: API server, engine core, workers. So it is light, and may be called
again. It imports `engines.vllm_loader`, which needs vLLM.

vLLM has no hooks for these events, so the plugin patches methods of its worker wrapper: `init_device`, after which the
node opens; the last step of start-up, after which the worker serves; methods that change or release weights, before
which it withdraws them; `wake_up`, after which it serves unchanged weights again; and the end of an update, after which
it serves the weights as the version that the engine core names. Must not know: nodes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

from swarm.engines.hooks import EngineHooks

COMPILES = "determine_available_memory"  # the first step that runs the model
RANKS_KNOWN = "init_worker_distributed_environment"  # a function of the worker's module; `init_device` calls it early
WARM_UP = "compile_or_warm_up_model"
# Methods that change the memory of weights or of tensors tied to them, or move weights.
CHANGES = (
    "reload_weights",
    "reset_weights",
    "start_weight_update",
    "start_draft_weight_update",  # a draft model may share tensors with the model that it drafts for
    "update_weights",
    "elastic_ep_execute",
)
# Methods after which a change is complete.
CHANGED = ("reload_weights", "finish_weight_update")
SET_VERSION = "swarm_weight_version"  # the worker method by which the engine core passes the version on
WEIGHTS = "weights"  # vLLM's tag for the memory of weights

log = logging.getLogger("swarm")
_hooks = EngineHooks("vLLM", "vllm")


def register() -> None:
    """Adds `--load-format swarm` to this process's vLLM. Never raises: a missing feature is logged."""
    if not _hooks.install("--load-format swarm", _add_format):
        return
    from swarm.engines import vllm_loader

    models = vllm_loader.models
    if not _hooks.install("serving what it loaded", _wrapper):
        return

    _hooks.install("an early start of its node", _start_early)
    _hooks.install("compile caches that fit wherever the model lies", _hash_without_paths)

    def hook(feature: str, method: str, **calls: Callable[..., None]) -> bool:
        return _hooks.install(f"{feature} ({method})", lambda: _patch(_wrapper(), method, **calls))

    def resume(tags: Collection[str] | None = None) -> None:
        if tags is None or WEIGHTS in tags:
            models.resume()

    def discard(tags: Collection[str]) -> None:
        if WEIGHTS in tags:
            models.begin_change("discard its weights")

    before: dict[str, Callable[..., None]] = {
        **{method: functools.partial(_ignore_arguments, models.begin_change, method) for method in CHANGES},
        "sleep": functools.partial(_ignore_arguments, models.pause, "sleep"),
        "discard": discard,
    }
    hook("fetched compile caches", COMPILES, before=lambda *_, **__: vllm_loader.join_caches())
    unhooked = [
        method for method, call in before.items() if not hook("serving its loaded tensors", method, before=call)
    ]
    hook("serving again after it slept", "wake_up", after=resume)
    for method in CHANGED:
        hook("serving weights that were updated", method, after=lambda *_, **__: models.end_change())
    _hooks.install("serving weights that were updated", _add_versions)
    hook("serving what it loaded", WARM_UP, after=lambda *_, **__: models.ready(unhooked))


def _ignore_arguments(call: Callable[[str], None], method: str, /, *_: object, **__: object) -> None:
    call(method)


def _add_format() -> None:
    from vllm.model_executor.model_loader import register_model_loader

    from swarm.engines.vllm_loader import VllmLoader

    register_model_loader("swarm")(VllmLoader)


def _wrapper() -> Any:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    return WorkerWrapperBase


def _patch(
    wrapper: type, method: str, *, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> None:
    """Adds calls, with the method's arguments, before and after a method of the wrapper.

    The wrapper forwards methods that it does not define to the worker; so does the patched method.
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


def _start_early() -> None:
    """Begins once the worker's ranks are known: the node opens while vLLM sets up its device and builds the model."""
    wrapper = _wrapper()
    known = wrapper.init_device

    def tell(step: str, config: Any) -> None:
        from swarm.engines import vllm_loader

        try:
            getattr(vllm_loader, step)(config)
        except Exception as error:  # loading comes to the same error, and decides
            log.info("the node is not started early: %s", error)

    @functools.wraps(known)
    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = sys.modules.get(type(self.worker).__module__)
        with _calling(module, RANKS_KNOWN, lambda: tell("begin", self.vllm_config)):
            result = known(self, *args, **kwargs)
        tell("initialised", self.vllm_config)
        return result

    wrapper.init_device = init_device


@contextlib.contextmanager
def _calling(module: Any, name: str, call: Callable[[], None]) -> Iterator[None]:
    """In the block, calls `call` after each call of a module's function, if the module has it."""
    known = getattr(module, name, None)
    if known is None:
        yield
        return

    @functools.wraps(known)
    def called(*args: Any, **kwargs: Any) -> Any:
        result = known(*args, **kwargs)
        call()
        return result

    setattr(module, name, called)
    try:
        yield
    finally:
        setattr(module, name, known)


def _hash_without_paths() -> None:
    """Leaves the model's place out of the hash that names compiled code, for models that are loaded by swarm.

    The hash covers the model's config. `swarm run` and `vllm serve DIRECTORY` have the model at different places.
    """
    from vllm.config import VllmConfig

    known = VllmConfig.compute_hash

    @functools.wraps(known)
    def compute_hash(self: Any) -> Any:
        if self.load_config.load_format != "swarm" or self.model_config is None:
            return known(self)
        elsewhere, model = copy.copy(self), copy.copy(self.model_config)
        model.model = model.model_weights = ""
        model.revision = None
        elsewhere.model_config = model
        return known(elsewhere)

    VllmConfig.compute_hash = compute_hash


def _add_versions() -> None:
    """Passes the version of weights on to the workers: vLLM tells its engine core alone."""
    from vllm.v1.engine.core import EngineCore

    from swarm.engines.vllm_loader import models

    known = EngineCore.set_weight_version

    def set_weight_version(self: Any, weight_version: str) -> None:
        known(self, weight_version)
        if self.vllm_config.load_config.load_format == "swarm":
            self.model_executor.collective_rpc(SET_VERSION, args=(weight_version,))

    setattr(_wrapper(), SET_VERSION, lambda self, version: models.set_version(version))
    EngineCore.set_weight_version = set_weight_version
