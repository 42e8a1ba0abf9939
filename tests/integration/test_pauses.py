"""Processes that are stopped for longer than every deadline, and go on: Ctrl-Z, a frozen container, a migration."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from swarm.node import status_client

from .processes import Machine, Process, contents, wait_until, write_model

pytestmark = pytest.mark.integration

# A pause is longer than heartbeats, suspicions and idle timeouts, and than the stall timeout of the stopped process.
# A newcomer whose only seed is stopped waits for it.
PAUSE_S = 12.0
IMPATIENT = {"SWARM_IDLE_TIMEOUT_S": "1", "SWARM_STALL_TIMEOUT_S": "4", "SWARM_FIND_TIMEOUT_S": "3"}
PATIENT = {**IMPATIENT, "SWARM_STALL_TIMEOUT_S": "60"}


def stopped(seconds: float, *processes: Process) -> None:
    for process in processes:
        process.send(signal.SIGSTOP)
    threading.Event().wait(seconds)
    for process in processes:
        process.send(signal.SIGCONT)


def begun(out: Path) -> bool:
    return any(any(path.read_bytes()[:1]) for path in out.glob(".swarm/*/a.safetensors"))


def states(node: Process) -> dict[str, str]:
    return {member["name"]: member["state"] for member in status_client.ask(node.address)["members"]}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("who", ["newcomer", "seed", "both"])
@pytest.mark.parametrize("key", [False, True])
def test_a_fetch_goes_on_after_a_pause(machine: Machine, tmp_path: Path, out: Path, who: str, key: bool) -> None:
    model = write_model(tmp_path / "model", size=24_000_000)
    flags = []
    if key:
        machine.run("keygen", machine.root / "key")
        flags = ["--key-file", str(machine.root / "key")]
    seed = machine.serve(model, "--upload-limit", "6MB/s", *flags, environment=IMPATIENT)
    newcomer = machine.fetch(out, *flags, peers=[seed.address], environment=PATIENT if who == "seed" else IMPATIENT)
    wait_until(lambda: begun(out), "some bytes")
    stopped(PAUSE_S, *{"newcomer": [newcomer], "seed": [seed], "both": [newcomer, seed]}[who])
    assert newcomer.end().report["bytes"] > 24_000_000
    assert contents(out) == contents(model)
    assert "Traceback" not in newcomer.err + seed.err


@pytest.mark.timeout(120)
def test_members_know_each_other_again_after_a_pause(machine: Machine, model: Path) -> None:
    one = machine.serve(model, "--name", "one")
    two = machine.serve(model, "--name", "two", "--peer", one.address)
    wait_until(lambda: states(one).get("two") == states(two).get("one") == "alive", "both to be known")
    stopped(PAUSE_S, two)
    two.wait_for("this process stood still")
    wait_until(lambda: states(one).get("two") == states(two).get("one") == "alive", "both to be known again")
    assert "this process stood still" not in one.err
    stopped(PAUSE_S, one, two)
    wait_until(lambda: states(one).get("two") == states(two).get("one") == "alive", "both to be known again")


@pytest.mark.timeout(60)
def test_a_search_goes_on_after_a_pause(machine: Machine, model: Path, out: Path) -> None:
    newcomer = machine.fetch(out, "--listen", "127.0.0.1:0", peers=["127.0.0.1:9"], environment=IMPATIENT)
    newcomer.wait_for("no cluster key")
    stopped(8.0, newcomer)
    assert newcomer.running
    assert "127.0.0.1:9" in newcomer.end().error(3)
