"""Nodes whose clock is wrong, and is set right while they run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swarm.node import status_client

from .processes import Machine, Process, contents, wait_until

pytestmark = pytest.mark.integration

# `time.time()` of a process shows the seconds in a file more.
LATE = """
import time
real = time.time
def late():
    try:
        return real() + float(open({path!r}).read())
    except (OSError, ValueError):
        return real()
time.time = late
"""
RENEWED_S = 20.0  # certificates are looked at every 5 s


class Clock:
    """The clock of the processes with `environment`."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self._ahead = root / "ahead"
        (root / "sitecustomize.py").write_text(LATE.format(path=str(self._ahead)))
        self.environment = {"PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])}

    def set(self, ahead_s: float) -> None:
        new = self._ahead.with_suffix(".new")
        new.write_text(str(ahead_s))
        new.replace(self._ahead)


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path / "clock")


@pytest.fixture
def key(machine: Machine) -> tuple[str, str]:
    path = str(machine.root / "key")
    assert machine.run("keygen", path).code == 0
    return ("--key-file", path)


def is_fetched(machine: Machine, seed: Process, out: Path, key: tuple[str, str]) -> bool:
    return machine.fetch(out, *key, peers=[seed.address]).end().code == 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ahead_s", [30 * 3600.0, -30 * 3600.0])
def test_a_node_whose_clock_was_wrong_at_its_start_recovers(
    machine: Machine, clock: Clock, model: Path, tmp_path: Path, key: tuple[str, str], ahead_s: float
) -> None:
    clock.set(ahead_s)
    seed = machine.serve(model, *key, environment=clock.environment)
    line = machine.fetch(tmp_path / "early", *key, peers=[seed.address]).end().error(3)
    assert "compare the clocks" in line
    clock.set(0.0)
    wait_until(lambda: is_fetched(machine, seed, tmp_path / "out", key), "the seed to be trusted", deadline_s=RENEWED_S)
    assert contents(tmp_path / "out") == contents(model)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ahead_s", [30 * 3600.0, -30 * 3600.0])
def test_a_node_whose_clock_jumps_while_it_runs_keeps_its_links_and_recovers(
    machine: Machine, clock: Clock, model: Path, tmp_path: Path, key: tuple[str, str], ahead_s: float
) -> None:
    def state() -> str | None:
        members = status_client.ask(member.address)["members"]
        return next((each["state"] for each in members if each["name"] == "seed"), None)

    seed = machine.serve(model, *key, "--name", "seed", environment=clock.environment)
    member = machine.serve(model, *key, "--peer", seed.address)
    wait_until(lambda: state() == "alive", "the seed to be known")
    clock.set(ahead_s)
    wait_until(lambda: "datagram" in member.err, "the jump to be noticed")
    clock.set(0.0)
    wait_until(lambda: state() == "alive", "the seed to be known again")
    wait_until(lambda: is_fetched(machine, seed, tmp_path / "out", key), "the seed to be trusted", deadline_s=RENEWED_S)
