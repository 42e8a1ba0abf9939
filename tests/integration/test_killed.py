"""Either side is killed at any moment, or is asked to stop."""

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm.node import local_nodes, status_client

from .processes import Ended, Machine, Process, contents, wait_until, write_model

pytestmark = pytest.mark.integration

ROUNDS = 10
SIZE, LIMIT, FETCH_S = 60_000_000, "80MB/s", 0.75
IMPATIENT = {"SWARM_STALL_TIMEOUT_S": "1"}


@pytest.fixture
def big(tmp_path: Path) -> Path:
    return write_model(tmp_path / "big", size=SIZE)


def begun(out: Path, newcomer: Process) -> Callable[[], bool]:
    """Whether a fetch has taken its room on the disk, or is over already."""
    return lambda: bool(list(out.glob(".swarm/*/a.safetensors"))) or not newcomer.running


def kill_at_random(victim: Process, *, out: Path, newcomer: Process, rng: random.Random) -> None:
    wait_until(begun(out, newcomer), "the fetch to begin")
    newcomer.wait_to_end(rng.uniform(0, FETCH_S))  # at times after the end of the fetch
    victim.kill()


def test_is_a_newcomer_killed_at_any_moment_resumed(machine: Machine, big: Path, tmp_path: Path) -> None:
    rng = random.Random(7)
    expected = contents(big)
    seed = machine.serve(big, "--upload-limit", LIMIT)
    resumed = 0
    for number in range(ROUNDS):
        out = tmp_path / f"out-{number}"
        newcomer = machine.fetch(out, peers=[seed.address])
        kill_at_random(newcomer, out=out, newcomer=newcomer, rng=rng)
        partial = contents(out)
        assert all(expected[name] == data for name, data in partial.items()), "a final name without its contents"
        report = machine.fetch(out, peers=[seed.address]).end().report
        assert contents(out) == expected
        assert not (out / ".swarm").exists()
        resumed += report["resumed_bytes"] > 0
    assert resumed > ROUNDS // 2


def test_does_a_fetch_survive_a_seed_killed_at_any_moment(machine: Machine, big: Path, tmp_path: Path) -> None:
    rng = random.Random(7)
    expected = contents(big)
    given_up = went_on = 0
    for number in range(ROUNDS):
        out = tmp_path / f"out-{number}"
        seed = machine.serve(big, "--upload-limit", LIMIT)
        again = ("--upload-limit", LIMIT, "--listen", seed.address)
        restarted = number % 2 == 1
        newcomer = machine.fetch(out, peers=[seed.address], environment={} if restarted else IMPATIENT)
        kill_at_random(seed, out=out, newcomer=newcomer, rng=rng)
        if restarted:
            seed = machine.serve(big, *again)
            went_on += newcomer.end().report["bytes"] > 0
        elif (ended := newcomer.end()).code:
            given_up += 1
            assert "chunks are missing and nothing arrived for 1 s" in ended.error(4)
            assert all(expected[name] == data for name, data in contents(out).items())
            seed = machine.serve(big, *again)
            assert machine.fetch(out, peers=[seed.address]).end().code == 0
        assert contents(out) == expected
        seed.kill()
    assert given_up > ROUNDS // 4
    assert went_on == ROUNDS // 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_is_an_interrupted_fetch_resumed(machine: Machine, big: Path, out: Path, number: signal.Signals) -> None:
    seed = machine.serve(big, "--upload-limit", "40MB/s")
    newcomer = machine.fetch(out, peers=[seed.address])
    wait_until(lambda: len(local_nodes.addresses(machine.cache)) == 2, "the newcomer to leave its note")
    (address,) = set(local_nodes.addresses(machine.cache)) - {seed.address}
    wait_until(lambda: received(status_client.ask(address)), "some bytes to be verified")
    newcomer.send(number)
    line = newcomer.end().error(130)
    assert "run the same command again" in line
    assert contents(out) == {}
    report = machine.fetch(out, peers=[seed.address]).end().report
    assert report["resumed_bytes"] > 0
    assert contents(out) == contents(big)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_does_a_stopped_seed_exit_well_and_is_seen_leaving(
    machine: Machine, model: Path, number: signal.Signals
) -> None:
    seed = machine.serve(model, "--name", "leaver")
    member = machine.serve(model, "--peer", seed.address)
    assert wait_until(lambda: states(member).get("leaver") == "alive", "the seed to be seen")
    seed.send(number)
    ended = seed.end()
    assert (ended.code, "Traceback" in ended.err) == (0, False)
    wait_until(lambda: states(member).get("leaver") == "left", "the seed to be seen leaving")


def test_does_a_stopped_newcomer_that_seeds_exit_well(machine: Machine, model: Path, out: Path) -> None:
    seed = machine.serve(model)
    newcomer = machine.start("fetch", "org/model", "--out", out, "--no-mdns", "--peer", seed.address)
    newcomer.wait_for("serving it on at")
    newcomer.send(signal.SIGTERM)
    ended: Ended = newcomer.end()
    assert (ended.code, "Traceback" in ended.err) == (0, False)
    assert contents(out) == contents(model)


def received(report: dict[str, Any]) -> int:
    return sum(transfer["bytes"] for transfer in report["transfers"] if transfer["direction"] == "down")


def states(node: Process) -> dict[str, str]:
    return {member["name"]: member["state"] for member in status_client.ask(node.address)["members"]}
