from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import swarm
from swarm.api import serve_source
from swarm.checkpoint import manifest_builder
from swarm.cli.demo import write_made_up
from swarm.engines import metadata, vllm_modelinfos
from swarm.engines.launch import prepare
from swarm.engines.layout import metadata_id
from swarm.errors import ManifestNotFound, SettingsError
from swarm.security import cluster_key
from swarm.settings import Settings

from .models import hashed

pytestmark = pytest.mark.usefixtures("brief")

MODEL = "org/model"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def peer(model: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a node that serves a model's metadata."""
    cache = tmp_path / "theirs"
    manifest = hashed(model, cache)
    staged = metadata.stage(cache, model, manifest)
    with swarm.serve(staged, model_id=metadata_id(MODEL), settings=Settings(mdns=False, cache=cache)) as served:
        yield served.address


def test_is_a_model_of_several_files_laid_out_with_its_index(sharded: Path, tmp_path: Path) -> None:
    cache = tmp_path / "theirs"
    manifest = hashed(sharded, cache)
    staged = manifest_builder.files(metadata.stage(cache, sharded, manifest), cache_dir=cache)
    theirs = Settings(mdns=False, cache=cache)
    with serve_source(metadata_id(MODEL), staged, None, settings=theirs) as served:
        launch = prepare(["vllm", "serve", MODEL], settings(tmp_path, served.address))
    here = Path(launch.command[2])
    assert {path.name for path in sharded.iterdir()} < {path.name for path in here.iterdir()}
    assert metadata.read(here).content == manifest.digest
    assert not metadata.is_whole(here)


def settings(tmp_path: Path, *peers: str) -> Settings:
    return Settings(mdns=False, cache=tmp_path / "ours", peers=peers, find_timeout_s=0.5 if not peers else 5.0)


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (["vllm", "serve", MODEL, "--port", "8000"], 2),
        (["python", "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL], 4),
        (["python", "-m", "vllm.entrypoints.openai.api_server", f"--model={MODEL}"], 3),
    ],
)
def test_is_the_model_of_a_command_replaced_by_what_was_fetched(
    command: list[str], place: int, peer: str, tmp_path: Path
) -> None:
    launch = prepare(command, settings(tmp_path, peer))
    word = launch.command[place].removeprefix("--model=")
    assert (Path(word) / "config.json").is_file()
    assert metadata.read(Path(word)).tensor_names() == {"a.weight"}
    assert launch.command[len(command) :] == ("--served-model-name", MODEL, "--load-format", "swarm")
    assert launch.command[:place] == tuple(command[:place])
    assert launch.environment == {
        "SWARM_MODEL_ID": MODEL,
        "SWARM_MDNS": "False",
        "SWARM_PEERS": peer,
        "SWARM_CACHE": str(tmp_path / "ours"),
        "SWARM_FIND_TIMEOUT_S": "5.0",
    }
    assert Settings.load(environment=launch.environment) == settings(tmp_path, peer)


def test_are_flags_that_are_there_left_alone(peer: str, tmp_path: Path) -> None:
    flags = ["--served-model-name=mine", "--load-format", "auto"]
    launch = prepare(["vllm", "serve", MODEL, *flags], settings(tmp_path, peer))
    assert launch.command[3:] == tuple(flags)


def test_do_other_engines_get_no_flags_of_vllm(peer: str, tmp_path: Path) -> None:
    launch = prepare(["python", "-m", "sglang.launch_server", "--model-path", MODEL], settings(tmp_path, peer))
    assert len(launch.command) == 5
    launch = prepare(["./my-engine", MODEL], settings(tmp_path, peer), model_id=MODEL)
    assert Path(launch.command[1]).is_dir()


def test_is_a_directory_that_is_here_left_where_it_is(tmp_path: Path) -> None:
    write_made_up(tmp_path / "model.safetensors", [("a", (3,))], rng=np.random.default_rng(1))
    launch = prepare(["vllm", "serve", str(tmp_path)], settings(tmp_path))
    assert launch.command == ("vllm", "serve", str(tmp_path), "--load-format", "swarm")
    assert launch.environment["SWARM_MODEL_ID"] == tmp_path.name


def test_does_an_id_of_the_hub_start_without_the_swarm(tmp_path: Path) -> None:
    assert prepare(["vllm", "serve", MODEL], settings(tmp_path)).command[2] == MODEL


def test_is_an_empty_directory_without_seeds_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestNotFound, match="nothing#metadata"):
        prepare(["vllm", "serve", str(tmp_path / "nothing")], settings(tmp_path))


@pytest.mark.parametrize("command", [["my-engine"], ["vllm", "serve"], ["vllm", "serve", "--port", "1"]])
def test_is_a_command_without_a_model_refused(command: list[str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--model-id"):
        prepare(command, settings(tmp_path))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_are_descriptions_of_model_classes_fetched_for_the_same_vllm(
    version: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would make them anew, which takes it 20 s."""
    key, cache = tmp_path / "key", tmp_path / "theirs"
    cluster_key.create(key)
    (model / "config.json").write_text('{"architectures": ["Toy"]}')
    staged = manifest_builder.files(metadata.stage(cache, model, hashed(model, cache)), cache_dir=cache)
    theirs = Settings(mdns=False, cache=cache, key_file=key)
    ours = Settings(mdns=False, cache=tmp_path / "ours", key_file=key, find_timeout_s=5)

    def at(root: str, installed: str) -> Path:
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / root))
        monkeypatch.setattr("importlib.metadata.version", lambda package: installed)
        return tmp_path / root / "modelinfos" / "toy.json"

    made = at("there", "1.0")
    made.parent.mkdir(parents=True)
    made.write_text("{}")
    offered = vllm_modelinfos.offer(["Toy"], theirs)
    assert offered is not None
    fetched = at("here", version)
    with offered, serve_source(metadata_id(MODEL), staged, None, settings=theirs) as served:
        prepare(["vllm", "serve", MODEL], dataclasses.replace(ours, peers=(served.address,)))
    assert fetched.is_file() == (version == "1.0")


def test_is_a_revision_in_the_id_refused_with_what_engines_take(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"say org/model --revision release/v1$"):
        prepare(["vllm", "serve", "org/model@release/v1"], settings(tmp_path, "127.0.0.1:1"))
