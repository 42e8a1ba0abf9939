"""Do N empty nodes fill themselves from a hub together: one copy read, every byte proven, nothing read twice?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub import Fault, Hub, Model, read_files

import swarm
from swarm.cli.demo import write_made_up
from swarm.errors import ManifestNotFound
from swarm.settings import Settings

from .processes import MODEL, PORTS, Machine, Process, contents, wait_until

pytestmark = pytest.mark.integration

SIZE = 24_000_000


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A model of two shards, with documentation that is no part of it."""
    root = tmp_path / "original"
    root.mkdir()
    rng = np.random.default_rng(4)
    write_made_up(root / "a.safetensors", [("a.weight", (SIZE // 4,)), ("a.bias", (7,))], rng=rng)
    write_made_up(root / "b.safetensors", [("b.weight", (SIZE // 4,))], rng=rng)
    (root / "config.json").write_text('{"model_type": "made up"}')
    (root / "empty.txt").write_text("")
    (root / "README.md").write_text("# read me")
    return read_files(root)


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub({MODEL: Model(files)}) as made:
        yield made


class Replicas:
    """Nodes on one machine, each with caches of its own, that know each other's addresses."""

    def __init__(self, machine: Machine, hub: Hub, count: int) -> None:
        self._machine, self._hub = machine, hub
        self._ports = [next(PORTS) for _ in range(count)]
        self.nodes: list[Process] = []

    @property
    def addresses(self) -> list[str]:
        return [f"127.0.0.1:{port}" for port in self._ports]

    def home(self, number: int) -> Path:
        return self._machine.root / f"hf{number}"

    def start(self, number: int, *flags: str, environment: Mapping[str, str] | None = None) -> Process:
        others = [port for port in self._ports if port != self._ports[number]]
        peers = [word for port in others for word in ("--peer", f"127.0.0.1:{port}")]
        own = {
            "HF_ENDPOINT": self._hub.endpoint,
            "HF_HOME": str(self.home(number)),
            "SWARM_CACHE": str(self._machine.root / f"cache{number}"),
            **(environment or {}),
        }
        listen = ("--listen", f"127.0.0.1:{self._ports[number]}", "--no-mdns", "--json")
        node = self._machine.start("fetch", MODEL, *listen, *peers, *flags, environment=own)
        self.nodes.append(node)
        return node

    def report(self, node: Process) -> dict[str, object]:
        """What `--json` printed, of a node that goes on serving."""
        text = wait_until(lambda: node.out.strip() or ("" if node.running else node.err), f"the end of {node!r}")
        assert text.startswith("{"), text
        return dict(json.loads(text))

    def snapshot(self, number: int) -> dict[str, bytes]:
        folder = self.home(number) / "hub" / "models--org--model" / "snapshots"
        (found,) = folder.iterdir()
        assert found.name == self._hub.models[MODEL].commit
        return contents(found)


@pytest.fixture
def replicas(machine: Machine, hub: Hub) -> Callable[[int], Replicas]:
    return lambda count: Replicas(machine, hub, count)


def served(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if path != "README.md"}


def bits(tensors: Mapping[str, Any]) -> dict[str, bytes]:
    """The bytes of tensors by name: random ones hold NaN, which differs from itself."""
    return {name: bytes(tensor.contiguous().flatten().view(torch_bytes()).numpy()) for name, tensor in tensors.items()}


def torch_bytes() -> Any:
    return pytest.importorskip("torch").uint8


def test_is_one_node_a_plain_downloader_for_the_hubs_own_client(
    replicas: Callable[[int], Replicas], hub: Hub, files: dict[str, bytes]
) -> None:
    alone = replicas(1)
    report = alone.report(alone.start(0, "--no-seed"))
    assert alone.snapshot(0) == served(files)
    assert report["sources"] == {hub.endpoint.replace("http://", "origin "): sum(map(len, served(files).values()))}
    assert hub.copies() < 1.1  # a stream that another one helps leaves bytes in the buffers of its socket
    script = (
        "import huggingface_hub as h\n"
        f"print(h.snapshot_download({MODEL!r}, local_files_only=True))\n"
        "found = h.scan_cache_dir()\n"
        "assert not found.warnings, found.warnings\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_HOME": str(alone.home(0))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0].endswith(hub.models[MODEL].commit)


def test_do_four_empty_nodes_read_about_one_copy(
    replicas: Callable[[int], Replicas], hub: Hub, files: dict[str, bytes]
) -> None:
    hub.shaper.total = 4e6  # else the first one is done before the last one has started
    four = replicas(4)
    nodes = [four.start(number) for number in range(4)]
    reports = [four.report(node) for node in nodes]
    for number in range(4):
        assert four.snapshot(number) == served(files)
    assert len({report["digest"] for report in reports}) == 1
    assert hub.copies() < 2.0, "processes of one machine meet late; the simulation asks for 1.05"
    assert any(len(report["sources"]) > 1 for report in reports)  # type: ignore[arg-type]


def test_is_nothing_read_again_after_kill_9(
    replicas: Callable[[int], Replicas], hub: Hub, files: dict[str, bytes]
) -> None:
    hub.shaper.total = 4e6
    alone = replicas(1)
    node = alone.start(0, "--no-seed")
    wait_until(lambda: hub.sent_bytes > SIZE // 2, "half of the model")
    node.kill()
    before = hub.sent_bytes
    hub.shaper.total = None
    report = alone.report(alone.start(0, "--no-seed"))
    assert alone.snapshot(0) == served(files)
    kept = int(str(report["resumed_bytes"]))
    assert kept > before - 6_000_000, "chunks that were on the way, and bytes in the buffers of sockets"
    assert hub.sent_bytes - before < SIZE * 1.05 - kept


@pytest.mark.parametrize(
    "faults", [("429", "truncate", "403"), ("500", "wrong", "reset"), ("stall", "length", "nonsense")]
)
def test_does_a_fetch_end_whole_whatever_the_hub_does(
    replicas: Callable[[int], Replicas], hub: Hub, files: dict[str, bytes], faults: tuple[Fault, ...]
) -> None:
    left = list(faults)
    hub.fault = lambda asked: left.pop(0) if asked.where == "store" and left else ""
    alone = replicas(1)
    alone.report(alone.start(0, "--no-seed"))
    assert alone.snapshot(0) == served(files)
    assert not left


def test_are_bytes_that_stay_wrong_never_given_a_name(replicas: Callable[[int], Replicas], hub: Hub) -> None:
    hub.fault = lambda asked: "wrong" if asked.where == "store" else ""
    alone = replicas(1)
    line = alone.start(0, "--no-seed").end().error(7)
    assert "does not have the content that the origin lists" in line
    assert not list(alone.home(0).rglob("snapshots/*"))


def test_is_a_gated_model_one_line(replicas: Callable[[int], Replicas], hub: Hub) -> None:
    hub.token = "hf_secret"
    hub.models[MODEL].gated = "all"
    alone = replicas(1)
    assert "is gated" in alone.start(0, "--no-seed").end().error(3)
    assert alone.report(alone.start(0, "--no-seed", environment={"HF_TOKEN": "hf_secret"}))
    assert {asked.authorization for asked in hub.asked("store")} == {None}


def test_is_a_branch_another_model(replicas: Callable[[int], Replicas], hub: Hub) -> None:
    alone = replicas(1)
    assert "has no revision 'nope'" in alone.start(0, "--no-seed", "--revision", "nope").end().error(3)


def test_is_the_hub_left_alone_where_the_setting_says_none(replicas: Callable[[int], Replicas], hub: Hub) -> None:
    alone = replicas(1)
    alone.start(0, "--no-seed", "--origin", "none", environment={"SWARM_FIND_TIMEOUT_S": "1"}).end().error(3)
    assert hub.requests == []


def test_do_latecomers_ask_peers_and_read_nothing_whether_they_reach_the_hub_or_not(
    replicas: Callable[[int], Replicas], hub: Hub, files: dict[str, bytes]
) -> None:
    three = replicas(3)
    three.report(three.start(0))
    hub.sent_bytes = 0
    late = [three.start(1), three.start(2, "--origin", "none")]
    for number, node in enumerate(late, 1):
        assert "origin" not in str(three.report(node)["sources"])
        assert three.snapshot(number) == served(files)
    assert hub.sent_bytes == 0


def test_are_tensors_fetched_from_the_hub(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    settings = Settings(mdns=False, cache=tmp_path / "cache")
    expected = safetensors.load(files["a.safetensors"]) | safetensors.load(files["b.safetensors"])
    with swarm.fetch(MODEL, settings=settings) as weights:
        assert sorted(weights) == sorted(expected)
        assert bits(weights) == bits(expected)
        assert bytes(weights.files["config.json"]) == files["config.json"]
        into = {name: tensor * 0 for name, tensor in expected.items()}
        other = Settings(mdns=False, cache=tmp_path / "cache", name="other", stall_timeout_s=20.0)
        with swarm.fetch(MODEL, into=into, settings=other):
            assert bits(into) == bits(expected)


def test_is_an_unreachable_hub_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ManifestNotFound, match=r"127.0.0.1:9: the connection failed"):
        swarm.fetch(MODEL, out=tmp_path / "out", settings=Settings(mdns=False, cache=tmp_path, find_timeout_s=1.0))


def test_are_the_limits_of_reads_kept(replicas: Callable[[int], Replicas], hub: Hub, files: dict[str, bytes]) -> None:
    rate = 3e6  # else the first one is done before the second one has started
    two = replicas(2)
    limits = {"SWARM_ORIGIN_LIMIT": "3MB/s", "SWARM_ORIGIN_READERS": "1"}
    reports = [two.report(node) for node in [two.start(number, environment=limits) for number in range(2)]]
    took_s = time.time() - hub.asked("store")[0].at
    assert took_s > 0.8 * SIZE / rate
    assert all(two.snapshot(number) == served(files) for number in range(2))
    assert sum("origin" in str(report["sources"]) for report in reports) == 1


def test_does_a_seed_that_appears_late_help(
    replicas: Callable[[int], Replicas], hub: Hub, machine: Machine, tmp_path: Path, files: dict[str, bytes]
) -> None:
    hub.shaper.total = 1e6
    two = replicas(2)
    first = two.start(0)
    wait_until(lambda: hub.sent_bytes > SIZE // 20, "the first chunks")
    here, there = two.addresses
    machine.serve(tmp_path / "original", "--listen", there, "--peer", here)
    report = two.report(first)
    assert two.snapshot(0) == served(files)
    assert hub.copies() < 0.7
    assert len(dict(report["sources"])) == 2  # type: ignore[call-overload]
