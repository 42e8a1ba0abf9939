"""Do an engine's starts on machines that have nothing read the hub together, before the engine downloads it alone?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub, hub_of

from swarm.engines.launch import prepare
from swarm.settings import Settings

pytestmark = pytest.mark.usefixtures("brief")

MODEL = "org/model"


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_of(model, MODEL) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
        yield made


def settings(tmp_path: Path, **changed: object) -> Settings:
    return Settings.load({"mdns": False, "cache": tmp_path / "ours", "find_timeout_s": 1.0, **changed}, environment={})


def test_is_the_model_in_the_hubs_cache_before_the_engine_starts(hub: Hub, tmp_path: Path, model: Path) -> None:
    launch = prepare(["vllm", "serve", MODEL], settings(tmp_path))
    assert launch.command == ("vllm", "serve", MODEL, "--load-format", "swarm")
    (snapshot,) = (tmp_path / "hub" / "models--org--model" / "snapshots").iterdir()
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }


def test_is_the_hub_not_asked_where_the_user_says_so(hub: Hub, tmp_path: Path) -> None:
    launch = prepare(["vllm", "serve", MODEL], settings(tmp_path, origin="none"))
    assert launch.command[2] == MODEL
    assert hub.requests == []


def test_does_the_engine_start_all_the_same_where_the_hub_fails(hub: Hub, tmp_path: Path) -> None:
    hub.fault = lambda _: "500"
    assert prepare(["vllm", "serve", MODEL], settings(tmp_path)).command[2] == MODEL
