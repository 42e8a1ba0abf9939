"""Plugins in engines of other versions, which lack what a plugin wants: each such engine is a made-up module."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from swarm.engines.hooks import EngineHooks

FORMATS, WORKER, CORE = "vllm.model_executor.model_loader", "vllm.v1.worker.worker_base", "vllm.v1.engine.core"
CONFIG = "vllm.config"
REGISTRY = "sglang.srt.plugins.hook_registry"
Told = list[tuple[str, Any]]


def module(name: str, **content: Any) -> Any:
    made = types.ModuleType(name)
    made.__dict__.update(content)
    return made


class Explosive(types.ModuleType):
    """A module that fails in a way of its own when anything is taken from it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name} needs a GPU")


class Rigid(type):
    """A class that does not let some methods be replaced."""

    rigid: frozenset[str] = frozenset()

    def __setattr__(cls, name: str, value: Any) -> None:
        if name in cls.rigid:
            raise TypeError(f"{name} cannot be replaced")
        super().__setattr__(name, value)


def importing(monkeypatch: pytest.MonkeyPatch, package: str, modules: dict[str, Any], plugin: str) -> Any:
    """The plugin, imported anew where the package is made of these modules and of no others."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # cannot be imported
    for name, made in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            if sys.modules.get(parent) is None:
                monkeypatch.setitem(sys.modules, parent, module(parent, __path__=[], __version__="0.25.1"))
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.delitem(sys.modules, plugin, raising=False)
    found = importlib.import_module(plugin)
    monkeypatch.delitem(sys.modules, plugin)
    return found


class VLLM:
    """A vLLM that has everything the plugin wants, until a test takes something away."""

    def __init__(self) -> None:
        self.formats: dict[str, Any] = {}
        self.told: Told = []

        class WorkerWrapperBase(metaclass=Rigid):
            """Forwards to its worker, as vLLM's does."""

            def __init__(self, worker: Any) -> None:
                self.worker = worker
                self.vllm_config = "the config"

            def init_device(self) -> Any:
                return self.worker.init_device()

        class EngineCore:
            def set_weight_version(self, weight_version: str) -> None:
                pass

        class VllmConfig:
            def __init__(self, load_format: str, **model: Any) -> None:
                self.load_config = types.SimpleNamespace(load_format=load_format)
                self.model_config = types.SimpleNamespace(**model)

            def compute_hash(self) -> str:
                return repr(sorted(vars(self.model_config).items()))

        self.config: Any = VllmConfig
        self.wrapper: Any = WorkerWrapperBase
        self.core: Any = EngineCore
        self.modules: dict[str, Any] = {
            FORMATS: module(
                FORMATS, register_model_loader=lambda name: lambda loader: self.formats.setdefault(name, loader)
            ),
            WORKER: module(WORKER, WorkerWrapperBase=WorkerWrapperBase),
            CORE: module(CORE, EngineCore=EngineCore),
            CONFIG: module(CONFIG, VllmConfig=VllmConfig),
        }

    def register(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def hook(name: str) -> Callable[..., None]:
            return lambda *words: self.told.append((name, words))

        steps = {name: hook(name) for name in ("begin", "initialised")}
        names = ("ready", "begin_change", "end_change", "pause", "resume", "set_version")
        models = types.SimpleNamespace(**{name: hook(name) for name in names})
        own: dict[str, Any] = {"VllmLoader": object, "models": models, "join_caches": hook("join"), **steps}
        loader = module("swarm.engines.vllm_loader", **own)
        monkeypatch.setitem(sys.modules, "swarm.engines.vllm_loader", loader)
        monkeypatch.setattr(importlib.import_module("swarm.engines"), "vllm_loader", loader, raising=False)
        plugin = importing(monkeypatch, "vllm", self.modules, "swarm.engines.vllm")
        plugin.register()
        return plugin

    def warmed_up(self) -> list[str]:
        """What the loader is told that this vLLM would not tell of, when a worker has warmed up."""
        self.wrapper(types.SimpleNamespace(compile_or_warm_up_model=lambda: None)).compile_or_warm_up_model()
        ((name, (unhooked,)),) = self.told
        assert name == "ready"
        return list(unhooked)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "swarm"]


def test_does_an_engine_that_has_everything_say_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = VLLM()
    plugin = engine.register(monkeypatch)
    plugin.register()  # vLLM may call it again
    assert set(engine.formats) == {"swarm"}
    assert engine.warmed_up() == []
    assert lines(caplog) == []


class Worker:
    """A worker whose module has the function that makes its ranks known."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def init_device(self) -> str:
        ranks_known("the config")
        self._told.append(("the rest of init_device", ()))
        return "initialised"


def ranks_known(config: str) -> None:
    pass


@pytest.mark.parametrize("known", [True, False])
def test_does_the_node_open_as_soon_as_a_worker_has_its_ranks(
    known: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = VLLM()
    plugin = engine.register(monkeypatch)
    if known:
        monkeypatch.setattr(plugin, "RANKS_KNOWN", "ranks_known")
    assert engine.wrapper(Worker(engine.told)).init_device() == "initialised"
    rest = ("the rest of init_device", ())
    ended = ("initialised", ("the config",))
    assert engine.told == ([("begin", ("the config",)), rest, ended] if known else [rest, ended])
    assert ranks_known.__name__ == "ranks_known"
    assert not hasattr(ranks_known, "__wrapped__"), "the worker's module is as it was"
    monkeypatch.delattr(sys.modules["swarm.engines.vllm_loader"], "initialised")
    with caplog.at_level("INFO", "swarm"):
        assert engine.wrapper(Worker(engine.told)).init_device() == "initialised"
    assert "the node is not started early" in caplog.text


def test_is_a_compile_cache_there_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VLLM()
    engine.register(monkeypatch)
    worker = types.SimpleNamespace(determine_available_memory=lambda: engine.told.append(("runs the model", ())))
    engine.wrapper(worker).determine_available_memory()
    assert engine.told == [("join", ()), ("runs the model", ())]


def test_are_names_of_compiled_code_the_same_wherever_the_model_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VLLM()
    engine.register(monkeypatch)

    def named(load_format: str, place: str, **more: str) -> str:
        config = engine.config(load_format, model=place, revision=None, model_weights="", **more)
        found = str(config.compute_hash())
        assert config.model_config.model == place
        return found

    assert named("swarm", "/a") == named("swarm", "/b")
    assert named("swarm", "/a", dtype="x") != named("swarm", "/a", dtype="y")
    assert named("auto", "/a") != named("auto", "/b")


def test_does_vllm_without_weight_versions_go_without_these_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = VLLM()
    del engine.core.set_weight_version
    plugin = engine.register(monkeypatch)
    plugin.register()
    assert set(engine.formats) == {"swarm"}
    assert engine.warmed_up() == []
    (line,) = lines(caplog)
    assert line.startswith("vLLM 0.25.1 goes without serving weights that were updated: ")
    assert "no attribute 'set_weight_version' (AttributeError)" in line


@pytest.mark.parametrize(
    ("missing", "feature"),
    [
        (FORMATS, "--load-format swarm"),
        (WORKER, "serving what it loaded"),
        (CORE, "serving weights that were updated"),
        (CONFIG, "compile caches that fit wherever the model lies"),
    ],
)
@pytest.mark.parametrize("how", ["no module", "nothing in it", "it raises"])
def test_does_a_module_that_vllm_lacks_cost_its_feature(
    missing: str, feature: str, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = VLLM()
    engine.modules[missing] = {"no module": None, "nothing in it": module(missing), "it raises": Explosive(missing)}[
        how
    ]
    engine.register(monkeypatch)
    assert set(engine.formats) == (set() if missing == FORMATS else {"swarm"})
    (line,) = lines(caplog)
    assert line.startswith(f"vLLM 0.25.1 goes without {feature}: ")


@pytest.mark.parametrize("method", ["update_weights", "sleep"])
def test_does_an_untold_change_keep_tensors_from_being_served(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = VLLM()
    engine.wrapper.rigid = frozenset({method})
    engine.register(monkeypatch)
    assert engine.warmed_up() == [method]
    (line,) = lines(caplog)
    assert line.startswith(f"vLLM 0.25.1 goes without serving its loaded tensors ({method}): ")


def test_does_no_vllm_at_all_stop_no_process(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    importing(monkeypatch, "vllm", {}, "swarm.engines.vllm").register()
    (line,) = lines(caplog)
    assert line.startswith("vLLM of an unknown version goes without --load-format swarm: ")


class Registry:
    """SGLang's registry of hooks, which may refuse some."""

    def __init__(self, *refused: str) -> None:
        self.hooks: dict[str, str] = {}
        self._refused = refused

    def register(self, target: str, hook: Any, kind: str) -> None:
        if target.rpartition(".")[2] in self._refused:
            raise ValueError(f"{target} is not for plugins")
        self.hooks[target.rpartition(".")[2]] = kind


KINDS = {"AROUND": "around", "BEFORE": "before", "AFTER": "after"}


def sglang(monkeypatch: pytest.MonkeyPatch, **content: Any) -> Any:
    made = {REGISTRY: module(REGISTRY, **content)} if content else {}
    return importing(monkeypatch, "sglang", made, "swarm.engines.sglang")


def test_does_a_hook_that_sglang_refuses_cost_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry("update_weights_from_ipc", "resume_memory_occupation")
    sglang(monkeypatch, HookRegistry=registry, HookType=KINDS).register()
    assert registry.hooks["get_model_loader"] == "around"
    assert registry.hooks["dispatch_event_loop"] == "before"
    assert len(registry.hooks) == 7
    assert [line.partition(": ")[0] for line in lines(caplog)] == [
        "SGLang 0.25.1 goes without serving its loaded tensors (update_weights_from_ipc)",
        "SGLang 0.25.1 goes without serving again after it slept (resume_memory_occupation)",
    ]


def test_does_a_kind_of_hook_that_sglang_lacks_cost_what_needs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry()
    kinds = {name: kind for name, kind in KINDS.items() if name != "AFTER"}
    sglang(monkeypatch, HookRegistry=registry, HookType=kinds).register()
    assert "get_model_loader" in registry.hooks
    (line,) = lines(caplog)
    assert "goes without serving again after it slept" in line


@pytest.mark.parametrize("content", [{}, {"HookRegistry": Registry()}])
def test_does_sglang_without_plugins_of_this_kind_start(
    content: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sglang(monkeypatch, **content).register()
    (line,) = lines(caplog)
    assert " goes without swarm: " in line


def test_is_a_failure_said_once(caplog: pytest.LogCaptureFixture) -> None:
    hooks, tried = EngineHooks("An engine", "no_such_engine"), []

    def put() -> None:
        tried.append(1)
        raise OSError("no")

    assert not hooks.install("flying", put)
    assert not hooks.install("flying", put)
    assert tried == [1]
    (line,) = lines(caplog)
    assert line.startswith("An engine of an unknown version goes without flying: no (OSError); docs/engines.md")
