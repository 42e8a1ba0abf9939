"""Chunks travel over torch.distributed between processes, from several at once, and from one that is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.security import cluster_key

from .processes import Machine, contents, wait_until, write_model

pytestmark = pytest.mark.integration

GLOO = {"SWARM_TRANSPORTS": "gloo"}


@pytest.fixture
def big(tmp_path: Path) -> Path:
    return write_model(tmp_path / "big", size=40_000_000)


def test_does_a_model_arrive_from_two_seeds(machine: Machine, big: Path, out: Path) -> None:
    seeds = [machine.serve(big, environment=GLOO) for _ in range(2)]
    ended = machine.fetch(out, peers=[seed.address for seed in seeds], environment=GLOO).end()
    assert ended.code == 0, ended.err
    assert contents(out) == contents(big)
    assert len(ended.report["sources"]) == 2
    assert "is read over" not in ended.err  # nobody gave gloo up


def test_do_members_feed_each_other_where_chunks_may_be_in_the_open(
    machine: Machine, big: Path, out: Path, tmp_path: Path
) -> None:
    cluster_key.create(tmp_path / "key")
    keyed = {**GLOO, "SWARM_KEY_FILE": str(tmp_path / "key")}
    assert 'data_encryption = "none"' in machine.run("serve", big, "--no-mdns", environment=keyed).error(2)
    keyed["SWARM_DATA_ENCRYPTION"] = "none"
    seed = machine.serve(big, environment=keyed)
    ended = machine.fetch(out, peers=[seed.address], environment=keyed).end()
    assert ended.code == 0, ended.err
    assert contents(out) == contents(big)
    assert "gloo opens connections of its own" in seed.err
    assert "is read over" not in ended.err  # nobody gave gloo up


def test_does_a_killed_seed_not_end_the_fetch(machine: Machine, big: Path, out: Path) -> None:
    slow = ("--upload-limit", "20MB/s")
    first, second = (machine.serve(big, *slow, environment=GLOO) for _ in range(2))
    newcomer = machine.fetch(out, peers=[first.address, second.address], environment=GLOO)
    wait_until(lambda: bool(list(out.glob(".swarm/*/a.safetensors"))) or not newcomer.running, "the fetch to begin")
    first.kill()
    ended = newcomer.end()
    assert ended.code == 0, ended.err
    assert contents(out) == contents(big)


def test_is_a_peer_without_gloo_served_over_tcp(machine: Machine, big: Path, out: Path) -> None:
    seed = machine.serve(big, environment=GLOO)
    assert machine.fetch(out, peers=[seed.address]).end().code == 0
    assert contents(out) == contents(big)


def test_is_a_backend_that_is_missing_named(machine: Machine, big: Path) -> None:
    import torch.distributed

    if torch.distributed.is_ucc_available():
        pytest.skip("this torch has UCC")
    line = machine.run("serve", big, "--no-mdns", environment={**GLOO, "SWARM_TRANSPORTS": "ucc"}).error(2)
    assert "transports: ucc: torch" in line
    assert "was built without it" in line
