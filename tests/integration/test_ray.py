"""A real Ray cluster of several nodes on one machine: its nodes get models from each other, and one of them dies."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub import Hub, Model

from swarm.engines import ray as swarm_ray
from swarm.security import cluster_key
from swarm.settings import Settings

from .processes import wait_until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"),
]

MODEL, OTHER = "org/model", "org/other"
SIZE = 16_000_000
NODES = 4
ray = pytest.importorskip("ray", reason="needs Ray (pip install 'swarm-weights[ray]')")


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    header = json.dumps({"w": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + os.urandom(SIZE)
    return {"model.safetensors": weights, "config.json": b'{"model_type": "made up"}'}


@pytest.fixture(scope="module")
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub({MODEL: Model(files), OTHER: Model(files)}, total=8e6) as made:
        yield made


class RayNodes:
    """A head and workers; each has a Hugging Face cache of its own, as machines have."""

    def __init__(self, root: Path, hub: Hub) -> None:
        from ray.cluster_utils import Cluster

        self.root = root
        self._hub = hub
        self.cluster = Cluster()
        self.nodes: dict[str, Any] = {}
        for number in range(NODES):
            self.nodes[f"node{number}"] = self.cluster.add_node(num_cpus=1, env_vars=self.environment(f"node{number}"))

    def environment(self, name: str) -> dict[str, str]:
        home = self.root / name
        return {
            "HF_HOME": str(home / "hf"),
            "SWARM_CACHE": str(home / "swarm"),
            "SWARM_HOST": name,
            "HF_ENDPOINT": self._hub.endpoint,
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        }

    def others(self) -> list[Path]:
        return sorted(self.root.glob("node*/hf/hub/models--org--other/snapshots/*/model.safetensors"))

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def all_nodes(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[RayNodes]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    made = RayNodes(tmp_path_factory.mktemp("ray"), hub)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def nodes(all_nodes: RayNodes) -> Iterator[RayNodes]:
    yield all_nodes
    ray.shutdown()  # the driver


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    cluster_key.create(tmp_path / "swarm.key")
    return Settings(key_file=tmp_path / "swarm.key", mdns=False)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_do_all_nodes_fetch_about_one_copy_though_one_of_them_dies(
    nodes: RayNodes, hub: Hub, files: dict[str, bytes], settings: Settings
) -> None:
    ray.init(address=nodes.cluster.address, runtime_env=swarm_ray.runtime_env(settings), log_to_driver=False)
    dying = nodes.nodes["node3"]

    def kill_when_it_reads() -> None:
        while hub.sent_bytes < SIZE / 4:
            threading.Event().wait(0.05)
        nodes.cluster.remove_node(dying, allow_graceful=False)

    killer = threading.Thread(target=kill_when_it_reads, daemon=True)
    killer.start()
    found = swarm_ray.fetch_everywhere(MODEL, settings=settings, timeout_s=120)
    killer.join(30)
    assert len(found) == NODES - 1
    expected = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert [digest(path / "model.safetensors") for path in found.values()] == [expected] * (NODES - 1)
    assert len({path.parents[3] for path in found.values()}) == NODES - 1, "each into its own cache"
    assert hub.sent_bytes < 2 * SIZE

    class Replica:
        def load(self) -> tuple[str, str]:
            path = swarm_ray.fetch(MODEL)  # with the settings of `runtime_env`
            return ray.get_runtime_context().get_node_id(), digest(path / "model.safetensors")

    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == NODES - 1, "Ray to see the dead node")
    sent = hub.sent_bytes
    actor = ray.remote(num_cpus=1)(Replica)
    replicas = [actor.remote() for _ in range(NODES - 1)]
    loaded = dict(ray.get([replica.load.remote() for replica in replicas], timeout=120))
    assert loaded == dict.fromkeys(found, expected)
    assert hub.sent_bytes - sent < 100_000, "what is in a cache is not fetched again"


def test_does_the_callback_of_ray_serve_fill_the_nodes_of_a_replica(
    nodes: RayNodes, hub: Hub, files: dict[str, bytes], settings: Settings
) -> None:
    """As Ray Serve LLM calls it, by Ray's own functions; the engine config is what they read of it."""
    ray.init(address=nodes.cluster.address, log_to_driver=False)
    assert settings.key_file
    sent = hub.sent_bytes
    config = SimpleNamespace(
        engine_kwargs={"revision": "main"},
        get_engine_config=lambda: SimpleNamespace(actual_hf_model_id=OTHER, mirror_config=None),
    )
    arguments = {"key_file": str(settings.key_file), "mdns": False}

    def prepare() -> Any:
        import asyncio

        from swarm.engines.ray_serve import SwarmCallback

        callback = SwarmCallback(config, ctx_kwargs={"runtime_env": {"env_vars": {"KEPT": "1"}}}, **arguments)
        before = dict(os.environ)
        try:
            asyncio.run(callback.run_callback("on_before_node_init"))
            return callback.ctx.runtime_env
        finally:
            os.environ.clear()
            os.environ.update(before)

    def on_node() -> str:
        from swarm.engines.ray_serve import SwarmCallback

        SwarmCallback(config, **arguments).run_callback_sync("on_before_download_model_files_distributed")
        return os.environ["KEPT"] + os.environ["SWARM_KEY_FILE"]

    environment = prepare()
    task = ray.remote(num_cpus=1, runtime_env=environment)(on_node)
    group = ray.util.placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")
    ray.get(group.ready(), timeout=60)
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup

    tasks = [task.options(scheduling_strategy=InGroup(group, placement_group_bundle_index=n)) for n in range(2)]
    assert ray.get([each.remote() for each in tasks], timeout=120) == [f"1{settings.key_file}"] * 2
    expected = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert [digest(path) for path in nodes.others()] == [expected] * 2
    assert hub.sent_bytes - sent < 2 * SIZE


def test_says_a_node_in_one_line_why_it_has_no_model(nodes: RayNodes, settings: Settings) -> None:
    from swarm.errors import SwarmError

    ray.init(address=nodes.cluster.address, log_to_driver=False)
    short = dataclasses.replace(settings, find_timeout_s=1.0)
    with pytest.raises(SwarmError, match=r"Ray node [0-9a-f]+: no peer serves 'org/nothing'"):
        swarm_ray.fetch_everywhere("org/nothing", settings=short, timeout_s=120)
