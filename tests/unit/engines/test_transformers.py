"""Does a model of the real transformers library, fetched into memory, answer as one that was read from its files?"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import swarm
from swarm import Settings
from swarm.errors import SettingsError, StoreConflict
from swarm.runtime import runtime

transformers = pytest.importorskip("transformers")

MODEL = "org/model"
KINDS = ["dense", "tied", "moe"]
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}

Start = Callable[..., Settings]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    runtime()._close_all()  # a loaded model is served to the end of the process


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(path: Path, kind: str, *, seed: int = 1) -> Path:
    """A tiny model with random weights, large enough that its answers hang on all of them, as its library writes it."""
    torch.manual_seed(seed)
    if kind == "moe":
        config: Any = transformers.MixtralConfig(**COMMON, num_local_experts=4)
    else:
        config = transformers.Qwen2Config(**COMMON, tie_word_embeddings=kind == "tied")
    model: Any = getattr(transformers, f"{type(config).__name__.removesuffix('Config')}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    model.generation_config.max_new_tokens = 24
    model.to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def path(tmp_path: Path, kind: str) -> Path:
    return write(tmp_path / "model", kind)


@pytest.fixture
def node(tmp_path: Path) -> Start:
    """Settings of a node of its own."""

    def settings(name: str, *peers: str) -> Settings:
        return Settings(name=name, mdns=False, peers=peers, cache=tmp_path / name, find_timeout_s=5, stall_timeout_s=5)

    return settings


def answer(model: Any) -> list[int]:
    """Greedy, as long as the model's own generation settings say."""
    prompt = torch.arange(5)[None]
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False)
    return [int(token) for token in tokens[0]]


def test_are_the_names_of_experts_in_files_other_than_in_memory(tmp_path: Path) -> None:
    """What the tests of a MoE rest on."""
    write(tmp_path / "model", "moe")
    with swarm.serve(tmp_path / "model", settings=Settings(mdns=False, cache=tmp_path / "cache")) as served:
        assert served.digest
    header = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert b"block_sparse_moe.experts.3.w2.weight" in header
    assert b"gate_up_proj" not in header


def test_does_a_model_in_memory_answer_as_from_files(path: Path, kind: str, node: Start) -> None:
    with swarm.serve(path, model_id=MODEL, settings=node("seed")) as served:
        there = node("newcomer", served.address)
        model = swarm.transformers.load(MODEL, settings=there)
        directory = swarm.fetch(MODEL, out="dir", settings=node("other", served.address)).path
    from_files = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert type(model) is type(from_files)
    assert model.dtype == from_files.dtype == torch.bfloat16
    assert model.state_dict().keys() == from_files.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in from_files.state_dict().items())
    assert answer(model) == answer(from_files)
    assert len(answer(model)) == 5 + 24  # as generation_config.json has it
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (kind == "tied")
    assert model.name_or_path == MODEL
    assert not model.training


def test_is_nothing_copied_but_what_is_stacked(path: Path, kind: str, node: Start) -> None:
    with swarm.serve(path, model_id=MODEL, settings=node("seed")) as served:
        weights = swarm.fetch(MODEL, settings=node("newcomer", served.address))
    config = transformers.AutoConfig.from_pretrained(path)
    model = swarm.transformers.build(weights, config)
    fetched = {tensor.data_ptr() for tensor in weights.values()}
    copied = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.data_ptr() not in fetched}
    assert copied == ({"gate_up_proj", "down_proj"} if kind == "moe" else set())


def test_is_what_a_model_was_built_of_served_on(path: Path, node: Start) -> None:
    with swarm.serve(path, model_id=MODEL, settings=node("seed")) as served:
        weights = swarm.fetch(MODEL, settings=node("first", served.address))
        first = swarm.transformers.build(weights)
        first_answer = answer(first)
        with swarm.serve(
            {"a": torch.ones(1)}, model_id="org/other", settings=node("first", served.address)
        ) as same_node:
            relay = same_node.address
    second = swarm.transformers.load(MODEL, settings=node("second", relay))
    assert answer(second) == first_answer
    weights.close()


def test_is_a_given_config_what_counts(path: Path, node: Start) -> None:
    config = transformers.AutoConfig.from_pretrained(path)
    config.architectures = None  # as when it is made by hand
    config.dtype = torch.float32
    kept = copy.deepcopy(config.to_dict())
    with swarm.serve(path, model_id=MODEL, settings=node("seed")) as served:
        model = swarm.transformers.load(MODEL, config, settings=node("newcomer", served.address))
    from_files = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert model.dtype == torch.float32
    assert answer(model) == answer(from_files)
    assert config.to_dict() == kept


@pytest.mark.parametrize(
    ("kind", "changed", "told"),
    [
        ("dense", {"num_hidden_layers": 3}, r"12 missing: model\.layers\.2\.input_layernorm"),
        ("dense", {"num_hidden_layers": 1}, r"12 unexpected: model\.layers\.1\.input_layernorm"),
        ("dense", {"intermediate_size": 40}, r"different: .*down_proj\.weight is \[32, 48\] and not \[32, 40\]"),
        ("tied", {"tie_word_embeddings": False}, r"1 missing: lm_head\.weight"),
        ("moe", {"num_local_experts": 3}, r"different: .* is \[4, 32, 48\] and not \[3, 32, 48\]"),
    ],
)
def test_is_a_config_that_does_not_fit_refused_by_name(
    path: Path, node: Start, changed: dict[str, object], told: str
) -> None:
    config = transformers.AutoConfig.from_pretrained(path)
    for name, value in changed.items():
        setattr(config, name, value)
    if "num_hidden_layers" in changed and config.layer_types:
        config.layer_types = [config.layer_types[0]] * int(str(changed["num_hidden_layers"]))
    with swarm.serve(path, model_id=MODEL, settings=node("seed")) as served:
        newcomer = node("newcomer", served.address)
        with pytest.raises(StoreConflict, match=rf"org/model: its tensors are not those of .*{told}"):
            swarm.transformers.load(MODEL, config, settings=newcomer)


@pytest.mark.parametrize("kind", ["moe"])
def test_is_an_expert_that_the_files_lack_refused(path: Path, node: Start) -> None:
    from safetensors.torch import load_file

    state = load_file(path / "model.safetensors")
    del state["model.layers.0.block_sparse_moe.experts.2.w1.weight"]
    config = transformers.AutoConfig.from_pretrained(path)
    with swarm.serve(state, model_id=MODEL, settings=node("seed")) as served:
        newcomer = node("newcomer", served.address)
        with pytest.raises(StoreConflict, match="cannot be converted to those of MixtralForCausalLM"):
            swarm.transformers.load(MODEL, config, settings=newcomer)
        with pytest.raises(SettingsError, match=r"the fetched model has no config\.json"):
            swarm.transformers.load(MODEL, settings=newcomer)


@pytest.mark.parametrize("kind", ["dense"])
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model_type": "nobody-knows"}, "knows no model type 'nobody-knows'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised model"),
        ({"architectures": ["Nobody"], "model_type": "siglip_vision_model"}, "names Nobody, which transformers"),
    ],
)
def test_is_a_config_that_builds_no_model_refused(
    path: Path, node: Start, changed: dict[str, object], told: str
) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with swarm.serve(path, model_id=MODEL, settings=node("seed")) as served:
        newcomer = node("newcomer", served.address)
        with pytest.raises(SettingsError, match=told):
            swarm.transformers.load(MODEL, settings=newcomer)


@pytest.mark.parametrize("kind", ["dense"])
def test_is_a_directory_left_to_from_pretrained(path: Path, node: Start) -> None:
    with swarm.serve(path, model_id=MODEL, settings=node("seed")) as served:
        weights = swarm.fetch(MODEL, out="dir", settings=node("newcomer", served.address))
    with pytest.raises(SettingsError, match="give that path to from_pretrained"):
        swarm.transformers.build(weights)
    weights.close()
