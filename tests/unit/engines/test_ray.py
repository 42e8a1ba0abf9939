"""Settings of Ray's workers. Ray itself is in tests/integration/test_ray.py."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swarm.engines import ray as swarm_ray
from swarm.security import cluster_key
from swarm.settings import Settings


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    cluster_key.create(tmp_path / "swarm.key")
    return tmp_path / "swarm.key"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Nodes as Ray lists them; this worker is on the first."""
    nodes = [
        {"NodeManagerAddress": address, "Alive": alive}
        for address, alive in [("10.0.0.1", True), ("10.0.0.2", True), ("10.0.0.3", False), ("10.0.0.1", True)]
    ]
    fake = SimpleNamespace(
        util=SimpleNamespace(get_node_ip_address=lambda: nodes[0]["NodeManagerAddress"]),
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "0123456789abcdef"),
        nodes=lambda: nodes,
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    return nodes


def test_get_workers_the_settings_of_the_driver(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(key_file.parent)
    settings = Settings(
        key_file=Path("swarm.key"), upload_limit=150e6, peers=("a:7000", "b:7001"), rack="r1", mdns=False
    )
    variables = swarm_ray.runtime_env(settings)["env_vars"]
    assert all(isinstance(text, str) for text in variables.values())
    theirs = Settings.load(environment=variables)
    assert theirs.key_file == key_file  # their working directory is another one
    assert (theirs.upload_limit, theirs.peers, theirs.rack, theirs.mdns) == (150e6, ("a:7000", "b:7001"), "r1", False)


def test_are_the_settings_of_here_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_RACK", "r7")
    assert swarm_ray.runtime_env()["env_vars"]["SWARM_RACK"] == "r7"


def test_knows_a_node_the_other_nodes_of_ray(key_file: Path, cluster: list[dict[str, Any]]) -> None:
    settings = swarm_ray.node_settings(Settings(key_file=key_file, peers=("seed:7000",)))
    assert settings.peers == ("seed:7000", "10.0.0.1:7000", "10.0.0.2:7000")
    assert (settings.listen, settings.name) == ("10.0.0.1", "ray-01234567")


def test_does_a_node_listen_where_the_user_says(key_file: Path, cluster: list[dict[str, Any]]) -> None:
    settings = swarm_ray.node_settings(Settings(key_file=key_file, listen="0.0.0.0:7001", name="mine"))
    assert (settings.listen, settings.name) == ("0.0.0.0:7001", "mine")


def test_is_an_address_of_ipv6_bracketed(key_file: Path, cluster: list[dict[str, Any]]) -> None:
    cluster[0]["NodeManagerAddress"] = "fd00::1"
    settings = swarm_ray.node_settings(Settings(key_file=key_file))
    assert settings.listen == "[fd00::1]"
    assert "[fd00::1]:7000" in settings.peers


def test_stays_a_node_without_a_key_on_its_machine(
    cluster: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    settings = swarm_ray.node_settings(Settings())
    assert settings.listen == Settings().listen
    assert settings.peers == ()
    assert "no key_file: this Ray node exchanges models with nodes of its own machine only" in caplog.text


def test_knows_an_engine_the_other_nodes_of_ray_and_listens_for_them(
    key_file: Path, cluster: list[dict[str, Any]]
) -> None:
    told = Settings.load(environment=swarm_ray.engine_env(Settings(key_file=key_file, peers=("seed:7000",))))
    assert told.peers == ("seed:7000", "10.0.0.1:7000", "10.0.0.2:7000")
    assert told.listen == "0.0.0.0", "the variables are those of every node"
    own = Settings.load(environment=swarm_ray.engine_env(Settings(key_file=key_file, listen="eth0:7001")))
    assert own.listen == "eth0:7001"
    alone = Settings.load(environment=swarm_ray.engine_env(Settings()))
    assert (alone.peers, alone.listen) == ((), Settings().listen)
