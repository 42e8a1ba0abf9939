"""Processes that are stopped for longer than every deadline, and go on: Ctrl-Z, a frozen container, a migration."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from swarm.node import status_client

from .processes import DEADLINE_S, LOOK_EVERY_S, MODEL, Machine, Process, contents, wait_until, write_model

pytestmark = pytest.mark.integration

# A pause is longer than heartbeats, suspicions and idle timeouts, and than the stall timeout of the stopped process.
# A newcomer whose only seed is stopped waits for it.
PAUSE_S = 12.0
SUSPENDED_S = 5.0  # longer than the timeouts of a fetch
SIZE = 8_000_000
IMPATIENT = {"SWARM_IDLE_TIMEOUT_S": "1", "SWARM_STALL_TIMEOUT_S": "4", "SWARM_FIND_TIMEOUT_S": "3"}
PATIENT = {**IMPATIENT, "SWARM_STALL_TIMEOUT_S": "60", "SWARM_FIND_TIMEOUT_S": "10"}


def stopped(seconds: float, *processes: Process) -> None:
    for process in processes:
        process.send(signal.SIGSTOP)
    threading.Event().wait(seconds)
    for process in processes:
        process.send(signal.SIGCONT)


def begun(out: Path) -> bool:
    return any(any(path.read_bytes()) for path in out.glob(".swarm/*/a.safetensors"))


def states(node: Process) -> dict[str, str]:
    return {member["name"]: member["state"] for member in status_client.ask(node.address)["members"]}


@pytest.mark.timeout(180)
def test_fetches_and_searches_go_on_after_a_pause(machine: Machine, tmp_path: Path, out: Path) -> None:
    """One pause for all: newcomers, seeds and both, without a key and with one, and a newcomer that finds no node."""
    model = write_model(tmp_path / "model", size=SIZE)
    machine.run("keygen", machine.root / "key")
    limits = machine.cwd / "swarm.toml"
    limits.write_text("upload_limit = '200kB/s'\n")  # until all have begun and stood still
    keys = {"": (), "with a key": ("--key-file", str(machine.root / "key"))}
    cases = [(who, key) for who in ("newcomer", "seed", "both") for key in keys]
    serve = ("serve", model, "--model-id", MODEL, "--no-mdns")
    seeds = {case: machine.start(*serve, *keys[case[1]], environment=IMPATIENT) for case in cases}
    newcomers: dict[tuple[str, str], Process] = {}
    for (who, key), seed in seeds.items():
        seed.wait_for(" ready: ")
        environment = PATIENT if who == "seed" else IMPATIENT
        target = out / f"{who} {key}"
        newcomers[who, key] = machine.fetch(target, *keys[key], peers=[seed.address], environment=environment)
    wait_until(lambda: all(begun(out / " ".join(case)) for case in cases), "some bytes for each")
    searching = machine.fetch(out, "--listen", "127.0.0.1:0", peers=["127.0.0.1:9"], environment=PATIENT)
    searching.wait_for("no cluster key")
    paused = [newcomers[case] for case in cases if case[0] != "seed"]
    paused += [seeds[case] for case in cases if case[0] != "newcomer"]
    stopped(PAUSE_S, *paused, searching)
    limits.write_text("")
    for seed in seeds.values():
        seed.send(signal.SIGHUP)
    assert searching.running
    assert "127.0.0.1:9" in searching.end().error(3)
    for case, newcomer in newcomers.items():
        assert newcomer.end().report["bytes"] > SIZE, case
        assert contents(out / " ".join(case)) == contents(model), case
        assert "Traceback" not in newcomer.err + seeds[case].err, case


@pytest.mark.timeout(120)
def test_members_know_each_other_again_after_a_pause(machine: Machine, model: Path) -> None:
    """One stands still for the two others, and these for each other."""
    one = machine.serve(model, "--name", "one")
    nodes = [one, *(machine.serve(model, "--name", name, "--peer", one.address) for name in ("two", "three"))]

    def all_known() -> bool:
        return all(set(states(node).values()) == {"alive"} and len(states(node)) == len(nodes) for node in nodes)

    wait_until(all_known, "all to be known")
    stopped(PAUSE_S, *nodes[1:])
    for node in nodes[1:]:
        node.wait_for("this process stood still")
    wait_until(all_known, "all to be known again")
    assert "this process stood still" not in one.err


@pytest.mark.timeout(120)
def test_a_fetch_goes_on_that_a_terminal_suspends(machine: Machine, tmp_path: Path, out: Path) -> None:
    """Ctrl-Z and `fg` in a shell with job control: SIGTSTP, then SIGCONT."""
    model = write_model(tmp_path / "model", size=SIZE)
    seed = machine.serve(model, "--upload-limit", "4MB/s", environment=IMPATIENT)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(machine.cwd)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**machine.environment, **IMPATIENT})
    try:
        command = [sys.executable, "-m", "swarm", "fetch", MODEL, "--peer", seed.address, "--no-mdns", "--no-seed"]
        os.write(terminal, f"{shlex.join([*command, '--out', str(out)])}; echo ended with $?\n".encode())
        wait_until(lambda: begun(out), "some bytes")
        os.write(terminal, b"\x1a")
        says(terminal, r"Stopped")
        threading.Event().wait(SUSPENDED_S)
        assert contents(out) == {}
        os.write(terminal, b"fg; echo fetched with $?\n")
        assert says(terminal, r"fetched with (\d+)\r") == "0"
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(child, 0)
    assert contents(out) == contents(model)


def says(terminal: int, pattern: str) -> str:
    """What a terminal says that matches."""
    said, deadline = "", time.monotonic() + DEADLINE_S
    while (found := re.search(pattern, said)) is None:
        assert time.monotonic() < deadline, f"no {pattern!r} in {said!r}"
        if select.select([terminal], [], [], LOOK_EVERY_S)[0]:
            said += os.read(terminal, 4096).decode(errors="replace")
    return found[found.re.groups]
