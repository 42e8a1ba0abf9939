"""The SGLang plugin against SGLang's contract: the real package where it can be imported, else a stand-in for it.

The stand-in has what the plugin touches of SGLang 0.5.23 and nothing else: a default loader that initialises a model,
loads weights out of safetensors files and processes them, a function that chooses loaders, and the registry of hooks.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from swarm.engines import start_log
from swarm.runtime import runtime

REAL = importlib.util.find_spec("sglang") is not None
LOADER = "sglang.srt.model_loader.loader"
Load = Callable[..., Any]


class Transposing:
    """What packing for a kernel does to a tensor."""

    def process_weights_after_loading(self, module: Any) -> None:
        module.inner = nn.Parameter(module.inner.data.t().contiguous(), requires_grad=False)


class Toy(nn.Module):
    """A model that renames what files hold and ties two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
        self.inner = nn.Parameter(torch.zeros(4, 3), requires_grad=False)
        self.head = self.embed
        self.register_buffer("scale", torch.zeros(2))
        self.quant_method = Transposing()

    def load_weights(self, weights: Any) -> None:
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, tensor in weights:
            own[name.removeprefix("model.")].data.copy_(tensor)


def stand_in() -> dict[str, types.ModuleType]:
    """Modules by name."""
    names = ("sglang", "sglang.srt", "sglang.srt.model_loader", LOADER, "sglang.srt.runtime_context")
    made: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    made["sglang"].__version__ = "0.5.23"

    class DefaultModelLoader:
        def __init__(self, load_config: Any) -> None:
            assert not load_config.model_loader_extra_config, "it takes no keys that it does not know"
            self.load_config = load_config

        def load_model(self, *, model_config: Any, device_config: Any) -> Any:
            model = made[LOADER]._initialize_model(model_config, self.load_config, None)
            device = torch.device(device_config.device)
            self.load_weights_and_postprocess(model, self._get_all_weights(model_config, model), device)
            return model.eval()

        def _get_all_weights(self, model_config: Any, model: Any) -> Iterator[Any]:
            yield from load_file(Path(model_config.model_path) / "model.safetensors").items()

        @staticmethod
        def load_weights_and_postprocess(model: Any, weights: Any, target_device: Any) -> None:
            DefaultModelLoader.load_weights_only(model, weights, target_device)
            DefaultModelLoader.postprocess_weights(model, target_device)

        @staticmethod
        def load_weights_only(model: Any, weights: Any, target_device: Any) -> None:
            model.load_weights(weights)

        @staticmethod
        def postprocess_weights(model: Any, target_device: Any) -> None:
            model.quant_method.process_weights_after_loading(model)

    made[LOADER].DefaultModelLoader = DefaultModelLoader
    made[LOADER].get_model_loader = lambda load_config, model_config=None: DefaultModelLoader(load_config)
    made["sglang.srt.runtime_context"].get_parallel = lambda: SimpleNamespace(tp_rank=0, tp_size=1)
    made["sglang.srt.runtime_context"].get_server_args = lambda: SimpleNamespace()
    return made


class Config(SimpleNamespace):
    """As far as a load config or a model config is looked at."""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    monkeypatch.chdir(tmp_path)
    if not REAL:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    for name in ("swarm.engines.sglang_loader", "swarm.engines.sglang"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    theirs = importlib.import_module(LOADER)
    ours = importlib.import_module("swarm.engines.sglang_loader")
    plugin = importlib.import_module("swarm.engines.sglang")
    monkeypatch.setattr(theirs, "_initialize_model", lambda *_: Toy(), raising=REAL)
    monkeypatch.setattr(theirs, "_get_quantization_config", lambda *_: None, raising=False)
    monkeypatch.setattr(ours, "get_server_args", lambda: SimpleNamespace(chunked_prefill_size=1, port=1))

    def run(path: Path, name: str, *peers: str, original: Any = theirs.get_model_loader, **options: Any) -> Any:
        given = {
            "mdns": False,
            "cache": str(tmp_path / name),
            "name": name,
            "peers": list(peers),
            "model_id": "org/toy",
            "look_s": 2,
        }
        load_config = load_config_kind()(model_loader_extra_config={"swarm": given | options})
        hf = SimpleNamespace(architectures=["Toy"], to_dict=dict)
        model_config = Config(
            model_path=str(path), revision=None, dtype=torch.float32, quantization=None, hf_config=hf,
            model_impl="auto", is_draft_model=False,
        )  # fmt: skip
        loader = plugin.choose_loader(original, load_config, model_config)
        return loader.load_model(model_config=model_config, device_config=Config(device="cpu"))

    run.ours = ours  # type: ignore[attr-defined]
    yield run
    ours.models.entries.clear()
    runtime()._close_all()


def load_config_kind() -> Any:
    if REAL:
        return importlib.import_module("sglang.srt.configs.load_config").LoadConfig
    return dataclasses.make_dataclass(
        "LoadConfig", [("model_loader_extra_config", dict), ("draft_model_idx", Any, None)]
    )


@pytest.fixture
def files(tmp_path: Path) -> Path:
    path = tmp_path / "toy"
    path.mkdir()
    dice = torch.Generator().manual_seed(1)
    tensors = {"model.embed": torch.randn(6, 4, generator=dice), "model.inner": torch.randn(4, 3, generator=dice)}
    save_file({**tensors, "model.scale": torch.ones(2)}, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"architectures": ["Toy"]}))
    return path


def bare(tmp_path: Path) -> Path:
    path = tmp_path / "bare"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["Toy"]}))
    return path


def address(ours: Any) -> str:
    (entry,) = ours.models.entries
    entry.loader.server.serving.result(20)
    return str(entry.loader.node.opened.address)


def taken(tmp_path: Path, name: str) -> str:
    ((_, start),) = start_log.recall(tmp_path / name)
    assert start.taken is not None
    assert start.engine.startswith("sglang ")
    return start.taken.tier


def same(one: nn.Module, other: nn.Module) -> bool:
    state = one.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(("tiers", "tier"), [("loaded,checkpoint", "loaded"), ("checkpoint", "checkpoint")])
def test_does_a_newcomer_without_weights_load_what_the_first_one_has(
    load: Load, files: Path, tmp_path: Path, tiers: str, tier: str
) -> None:
    first = load(files, "first")
    assert taken(tmp_path, "first") == "disk"
    load.ours.models.ready()  # type: ignore[attr-defined]
    seed = address(load.ours)  # type: ignore[attr-defined]
    second = load(bare(tmp_path), "second", seed, tiers=tiers)
    assert taken(tmp_path, "second") == tier
    assert same(second, first)
    assert second.inner.shape == (3, 4), "processed here, and not there"
    assert second.head is second.embed


def test_is_what_changes_served_no_longer(load: Load, files: Path, tmp_path: Path) -> None:
    load(files, "first")
    load.ours.models.ready()  # type: ignore[attr-defined]
    seed = address(load.ours)  # type: ignore[attr-defined]
    importlib.import_module("swarm.engines.sglang").begin_change("update_weights_from_disk")
    load(bare(tmp_path), "second", seed)
    assert taken(tmp_path, "second") == "checkpoint"


@pytest.mark.parametrize(("tags", "tier"), [(None, "loaded"), (["weights"], "loaded"), (["kv_cache"], "checkpoint")])
def test_is_what_was_released_served_again_when_it_is_back(
    load: Load, files: Path, tmp_path: Path, tags: list[str] | None, tier: str
) -> None:
    plugin = importlib.import_module("swarm.engines.sglang")
    load(files, "first")
    load.ours.models.ready()  # type: ignore[attr-defined]
    seed = address(load.ours)  # type: ignore[attr-defined]
    plugin.pause(None, SimpleNamespace(tags=["weights"]))
    plugin.resume(None, None, SimpleNamespace(tags=tags))
    address(load.ours)  # type: ignore[attr-defined]
    load(bare(tmp_path), "second", seed)
    assert taken(tmp_path, "second") == tier


def test_is_a_model_with_tensors_that_no_name_leads_to_left_to_its_files(
    load: Load, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_weights(self: Any, weights: Any, known: Any = Toy.load_weights) -> None:
        known(self, weights)
        self.absorbed = self.inner.data * 2

    monkeypatch.setattr(Toy, "load_weights", load_weights)
    first = load(files, "first")
    load.ours.models.ready()  # type: ignore[attr-defined]
    second = load(bare(tmp_path), "second", address(load.ours))  # type: ignore[attr-defined]
    assert taken(tmp_path, "second") == "checkpoint"
    assert torch.equal(second.absorbed, first.absorbed)


def test_is_nothing_changed_for_who_did_not_ask(load: Load, files: Path, tmp_path: Path) -> None:
    plugin, theirs = importlib.import_module("swarm.engines.sglang"), importlib.import_module(LOADER)
    kind = load_config_kind()
    plain = kind(model_loader_extra_config={})
    assert type(plugin.choose_loader(theirs.get_model_loader, plain, None)) is theirs.DefaultModelLoader

    class Special:
        """A loader with ways of its own."""

    asked = kind(model_loader_extra_config={"swarm": {}})
    assert type(plugin.choose_loader(lambda *_: Special(), asked, Config(is_draft_model=False))) is Special
    draft = plugin.choose_loader(theirs.get_model_loader, asked, Config(is_draft_model=True, quantization=None))
    assert type(draft) is theirs.DefaultModelLoader


def test_are_the_entry_points_what_the_package_declares() -> None:
    from importlib.metadata import entry_points

    found = [point.value for point in entry_points(group="sglang.srt.plugins") if point.name == "swarm"]
    if not found:
        pytest.skip("installed before there was a plugin, or run from its sources")
    assert found == ["swarm.engines.sglang:register"]
