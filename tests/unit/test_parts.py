"""Parts of a model as users fetch them: into directories, the hub's cache, and tensors; then the whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch

import swarm
from swarm import HUB_CACHE, Settings
from swarm.cli.main import main
from swarm.errors import SettingsError, StoreConflict
from swarm.runtime import runtime

pytestmark = pytest.mark.usefixtures("brief")

MODEL = "org/model"
SHARDS = {
    "model-00001-of-00002.safetensors": {
        "embed": torch.arange(70_000, dtype=torch.float32),
        "layers.0.w": torch.ones(300, 100, dtype=torch.bfloat16),
        "layers.0.b": torch.arange(7, dtype=torch.float16),
    },
    "model-00002-of-00002.safetensors": {
        "layers.1.w": torch.full((300, 100), 2.0, dtype=torch.bfloat16),
        "layers.1.b": torch.arange(9, dtype=torch.float16),
        "norm": torch.arange(200_000, dtype=torch.float64),
    },
}
STATE = {name: tensor for shard in SHARDS.values() for name, tensor in shard.items()}
FIRST, SECOND = SHARDS
INDEX = "model.safetensors.index.json"
PLAIN = {"config.json": b'{"model_type": "toy"}', "tokenizer.json": b"{}" * 1000}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    for path, tensors in SHARDS.items():
        safetensors.torch.save_file(tensors, place / path, {"format": "pt"})
    weight_map = {name: path for path, tensors in SHARDS.items() for name in tensors}
    (place / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (place / "pytorch_model.bin").write_bytes(bytes(range(256)) * 1000)
    for path, data in PLAIN.items():
        (place / path).write_bytes(data)
    return place


def settings(tmp_path: Path, name: str, *peers: str) -> Settings:
    cache = tmp_path / f"cache-{name}"
    return Settings(name=name, mdns=False, cache=cache, peers=peers, find_timeout_s=5, stall_timeout_s=5)


@pytest.fixture
def seed(tmp_path: Path, model: Path) -> Iterator[swarm.Served]:
    here = Settings(name="seed", mdns=False, cache=tmp_path / "cache-seed", chunk_bytes=16 << 10)
    with swarm.serve(model, model_id=MODEL, settings=here) as served:
        yield served


@pytest.fixture
def there(tmp_path: Path, seed: swarm.Served) -> Settings:
    return settings(tmp_path, "newcomer", seed.address)


def files(place: Path) -> dict[str, bytes]:
    return {p.relative_to(place).as_posix(): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def size_of(model: Path, *paths: str) -> int:
    return sum((model / path).stat().st_size for path in paths)


def same(found: Any, names: set[str]) -> bool:
    return set(found) == names and all(torch.equal(found[name], STATE[name]) for name in names)


@pytest.mark.parametrize(
    ("selection", "paths"),
    [
        ({"include": "*.json"}, {"config.json", "tokenizer.json", INDEX}),
        ({"exclude": ["*.bin", FIRST]}, {"config.json", "tokenizer.json", INDEX, SECOND}),
        ({"tensors": "layers.1.*"}, {"config.json", "tokenizer.json", INDEX, SECOND}),
        ({"tensors": ["embed"], "include": "*.safetensors"}, {FIRST}),
        ({"tensors": lambda name: name == "norm", "exclude": "*.json"}, {SECOND}),
    ],
)
def test_does_a_directory_get_the_files_of_the_part_and_later_the_rest(
    tmp_path: Path, model: Path, there: Settings, selection: Any, paths: set[str]
) -> None:
    out = tmp_path / "out"
    with swarm.fetch(MODEL, out=out, settings=there, **selection) as weights:
        assert files(out) == {path: data for path, data in files(model).items() if path in paths}
        assert weights.fetched.bytes == weights.fetched.sources["seed"] == size_of(model, *paths)
    with swarm.fetch(MODEL, out=out, settings=there) as weights:
        assert files(out) == files(model)
        assert weights.fetched.resumed_bytes == size_of(model, *paths)
        assert weights.fetched.sources["seed"] == weights.fetched.bytes - weights.fetched.resumed_bytes


def test_does_the_whole_go_on_from_a_part_while_that_is_served(tmp_path: Path, model: Path, there: Settings) -> None:
    out = tmp_path / "out"
    with (
        swarm.fetch(MODEL, out=out, settings=there, include="*.json"),
        swarm.fetch(MODEL, out=out, settings=there) as w,
    ):
        assert files(out) == files(model)
        assert w.fetched.resumed_bytes == size_of(model, *PLAIN, INDEX)


def test_is_what_another_interrupted_fetch_left_kept(tmp_path: Path, model: Path, there: Settings) -> None:
    out, staged = tmp_path / "out", None
    with swarm.fetch(MODEL, out=out, settings=there, include=FIRST) as weights:
        staged = out / ".swarm" / weights.digest[:16]
    (out / FIRST).unlink()
    staged.mkdir(parents=True)
    (staged / FIRST).write_bytes((model / FIRST).read_bytes())
    with swarm.fetch(MODEL, out=out, settings=there, include="*.json"):
        assert (staged / FIRST).exists()
    with swarm.fetch(MODEL, out=out, settings=there) as weights:
        assert weights.fetched.resumed_bytes == size_of(model, *PLAIN, INDEX, FIRST)
    assert files(out) == files(model)


def test_does_a_part_in_the_hubs_cache_look_as_the_hub_leaves_it(tmp_path: Path, model: Path, there: Settings) -> None:
    cache = tmp_path / "hub" / "hub"  # said to huggingface_hub, which reads HF_HOME at its import
    with swarm.fetch(MODEL, out=HUB_CACHE, settings=there, include=["*.json"]) as weights:
        found = huggingface_hub.snapshot_download(
            MODEL, cache_dir=cache, allow_patterns=["*.json"], local_files_only=True
        )
        assert Path(found) == weights.path
        assert set(files(Path(found))) == {*PLAIN, INDEX}
    scanned = huggingface_hub.scan_cache_dir(cache)
    assert not scanned.warnings
    with swarm.fetch(MODEL, out=HUB_CACHE, settings=there, tensors="layers.0.?", include=["*.safetensors"]) as weights:
        assert set(files(Path(found))) == {*PLAIN, INDEX, FIRST}
        assert weights.fetched.sources == {"seed": size_of(model, FIRST)}
    with swarm.fetch(MODEL, out=HUB_CACHE, settings=there) as weights:
        assert weights.fetched.resumed_bytes == size_of(model, *PLAIN, INDEX, FIRST)
        assert files(Path(found)) == files(model)


@pytest.mark.parametrize("names", [{"layers.0.b"}, {"embed", "norm"}, {"layers.0.w", "layers.1.w", "layers.1.b"}])
def test_are_only_the_chunks_of_the_tensors_transferred(there: Settings, names: set[str]) -> None:
    with swarm.fetch(MODEL, settings=there, tensors=names) as weights:
        assert same(weights, names)
        assert bytes(weights.files["config.json"]) == PLAIN["config.json"]
        assert set(weights.files) == {*PLAIN, INDEX}
        wanted = sum(STATE[name].nbytes for name in names)
        assert weights.fetched.bytes <= wanted + 2 * len(names) * (16 << 10) + sum(map(len, weights.files.values()))
    with swarm.fetch(MODEL, settings=there, tensors=names, include="*.safetensors") as weights:
        assert same(weights, names)
        assert weights.files == {}


def test_do_tensors_come_by_files(there: Settings) -> None:
    with swarm.fetch(MODEL, settings=there, exclude=[SECOND, "*.bin"]) as weights:
        assert same(weights, set(SHARDS[FIRST]))


def test_are_given_tensors_of_a_part_filled(there: Settings) -> None:
    mine = {name: torch.zeros_like(tensor) for name, tensor in STATE.items() if name.startswith("layers")}
    with swarm.fetch(MODEL, settings=there, into=mine, tensors="layers.*", exclude="*.json"):
        assert same(mine, set(mine))
    with pytest.raises(StoreConflict, match="2 missing: 'embed', 'norm'"):
        swarm.fetch(MODEL, settings=there, into=mine)


def test_does_the_holder_of_a_part_serve_it_without_a_seed(tmp_path: Path, seed: swarm.Served, there: Settings) -> None:
    with swarm.fetch(MODEL, settings=there, tensors="layers.*", exclude="*.json") as first:
        own = runtime()._nodes[there].node.address
        seed.close()
        third = settings(tmp_path, "third", own)
        with swarm.fetch(MODEL, settings=third, tensors="layers.1.*", exclude="*.json") as weights:
            assert same(weights, {"layers.1.w", "layers.1.b"})
            assert set(weights.fetched.sources) == {"newcomer"}
        assert first["layers.0.w"].shape == (300, 100)


@pytest.mark.parametrize("how", ["cpu", "out", "hub"])
def test_does_a_part_that_matches_nothing_say_what_there_is(tmp_path: Path, there: Settings, how: str) -> None:
    targets: dict[str, dict[str, Any]] = {"cpu": {}, "out": {"out": tmp_path / "out"}, "hub": {"out": HUB_CACHE}}
    target = targets[how]
    with pytest.raises(SettingsError, match=r"include: matches no file: there are config.json, model-00001"):
        swarm.fetch(MODEL, settings=there, include="*.gguf", **target)
    with pytest.raises(SettingsError, match=r"no tensor 'layers.0.weight'.*layers\.0\.w"):
        swarm.fetch(MODEL, settings=there, tensors="layers.0.weight", **target)
    assert not (tmp_path / "out").exists()


def test_is_a_selection_of_everything_the_whole(model: Path, there: Settings) -> None:
    with swarm.fetch(MODEL, settings=there, include="*", tensors="*") as weights:
        assert same(weights, set(STATE))
        assert weights.fetched.bytes == size_of(model, *files(model))


def test_does_the_command_fetch_a_part(
    tmp_path: Path, model: Path, seed: swarm.Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path / "cache-cli"))
    command = ["fetch", MODEL, "--peer", seed.address, "--no-mdns", "--no-seed", "--json"]
    part = ["--include", "*.json", "--include", "*.safetensors", "--exclude", "tokenizer*", "--tensors", "layers.0.*"]
    assert main([*command, "--out", str(tmp_path / "out"), *part]) == 0
    assert set(files(tmp_path / "out")) == {"config.json", INDEX, FIRST}
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == size_of(model, "config.json", INDEX, FIRST)
    assert main([*command, "--out", str(tmp_path / "other"), "--tensors", "lm_head"]) == SettingsError.exit_code
    assert "no tensor 'lm_head'" in capsys.readouterr().err


@pytest.mark.parametrize("cached", [False, True], ids=["directory", "cache"])
def test_does_verify_check_a_part_as_a_part(
    tmp_path: Path, there: Settings, cached: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARM_CACHE", str(there.cache))

    def verified(*options: str) -> tuple[int, str]:
        code = main(["verify", MODEL if cached else "out", *options])
        return code, capsys.readouterr().out

    out: Any = HUB_CACHE if cached else "out"
    with swarm.fetch(MODEL, out=out, settings=there, include="*.json") as weights:
        place = weights.path or Path()
    code, said = verified()
    assert (code, "a part, 3 of 6 files" in said) == (0, True), said
    with swarm.fetch(MODEL, out=out, settings=there, tensors="embed"):
        code, said = verified()
    assert (code, "a part, 4 of 6 files" in said) == (0, True), said
    if not cached:
        assert verified("--digest", weights.digest[:9])[0] == 0
    whole = (place / FIRST).read_bytes()
    (place / FIRST).write_bytes(whole[:-1] + b"?")
    code, said = verified()
    assert (code, said.startswith(f"{FIRST}: 1 of ")) == (1, True), said
    (place / FIRST).unlink()
    code, said = verified()
    assert (code, said.startswith(f"{FIRST}: ") and "missing" in said) == (1, True), said
    with swarm.fetch(MODEL, out=out, settings=there):
        code, said = verified()
    assert (code, "part" in said) == (0, False), said


def test_is_a_part_read_from_an_origin(model: Path, tmp_path: Path) -> None:
    origin, alone = f"file://{model}", settings(tmp_path, "alone")
    with swarm.fetch(origin, include="*.json", out=tmp_path / "out", settings=alone):
        assert sorted(path.name for path in (tmp_path / "out").glob("*.*")) == sorted([INDEX, *PLAIN])
    with swarm.fetch(origin, tensors="norm", settings=alone) as weights:
        assert list(weights) == ["norm"]
        assert torch.equal(weights["norm"], STATE["norm"])
        assert weights.fetched.bytes == size_of(model, SECOND, INDEX, *PLAIN), "the first shard is not read"


@pytest.mark.parametrize("told", ["by an index", "by headers", "not at all"])
def test_are_only_files_read_from_an_origin_that_hold_chosen_tensors(
    model: Path, tmp_path: Path, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told == "by headers":
        (model / INDEX).unlink()
    elif told == "not at all":
        monkeypatch.setattr("swarm.origin.tensor_names.INDEX_BYTES_MAX", 0)
    out, alone = tmp_path / "out", settings(tmp_path, "alone")
    with swarm.fetch(f"file://{model}", tensors="layers.1.*", out=out, settings=alone):
        shards = {path.name for path in out.glob("*.safetensors")}
        assert shards == ({FIRST, SECOND} if told == "not at all" else {SECOND})
        assert (out / "config.json").exists()
    with pytest.raises(SettingsError, match=r"layers\.9\.w"):
        swarm.fetch(f"file://{model}", tensors="layers.9.w", settings=alone)
