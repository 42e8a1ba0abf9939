"""A seed that gets SIGTERM while others fetch from it."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest

from .processes import Machine, Process, contents, wait_until, write_model

pytestmark = pytest.mark.integration

SIZE, LIMIT = 8_000_000, "4MB/s"
LONG_S = 60.0  # no test waits for so long


@pytest.fixture
def big(tmp_path: Path) -> Path:
    return write_model(tmp_path / "big", size=SIZE)


def seed_of(machine: Machine, model: Path, *flags: str, drain_s: float = LONG_S) -> Process:
    return machine.serve(model, "--upload-limit", LIMIT, *flags, environment={"SWARM_DRAIN_TIMEOUT_S": str(drain_s)})


def begun(out: Path) -> bool:
    return any(any(path.read_bytes()) for path in out.glob(".swarm/*/a.safetensors"))


def test_the_only_holder_hands_over_what_it_has(machine: Machine, big: Path, out: Path) -> None:
    seed = seed_of(machine, big)
    newcomer = machine.fetch(out, peers=[seed.address])
    wait_until(lambda: begun(out), "some bytes")
    seed.send(signal.SIGTERM)
    assert newcomer.end().report["bytes"] > SIZE
    assert seed.end().code == 0
    assert contents(out) == contents(big)


def test_one_of_two_holders_leaves_the_rest_to_the_other(machine: Machine, tmp_path: Path, out: Path) -> None:
    model = write_model(tmp_path / "model-of-24", size=3 * SIZE)
    shutil.copytree(model, tmp_path / "copy")
    leaver = seed_of(machine, model, "--name", "leaver")
    other = seed_of(machine, tmp_path / "copy", "--name", "other", "--peer", leaver.address)
    newcomer = machine.fetch(out, peers=[leaver.address, other.address])
    wait_until(lambda: begun(out), "some bytes")
    leaver.send(signal.SIGTERM)
    assert leaver.end().code == 0
    sources = newcomer.end().report["sources"]
    assert sources["other"] > sources.get("leaver", 0)
    assert contents(out) == contents(model)


def test_two_seeds_that_end_together_hand_over_what_only_they_have(machine: Machine, big: Path, out: Path) -> None:
    copy = shutil.copytree(big, big.with_name("copy"))
    one = seed_of(machine, big)
    other = seed_of(machine, copy, "--peer", one.address)
    newcomer = machine.fetch(out, peers=[one.address, other.address])
    wait_until(lambda: begun(out), "some bytes")
    one.send(signal.SIGTERM)
    other.send(signal.SIGTERM)
    assert newcomer.end().report["bytes"] > SIZE
    assert [one.end().code, other.end().code] == [0, 0]
    assert contents(out) == contents(big)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_drain(machine: Machine, big: Path, out: Path, number: signal.Signals) -> None:
    seed = seed_of(machine, big)
    machine.fetch(out, peers=[seed.address])
    wait_until(lambda: begun(out), "some bytes")
    seed.send(signal.SIGTERM)
    assert not seed.wait_to_end(0.5)
    began = time.monotonic()
    seed.send(number)
    assert seed.end().code == 0
    assert time.monotonic() - began < LONG_S / 4


def test_an_interrupt_ends_a_seed_at_once(machine: Machine, big: Path, out: Path) -> None:
    seed = seed_of(machine, big)
    newcomer = machine.fetch(out, peers=[seed.address])
    wait_until(lambda: begun(out), "some bytes")
    seed.send(signal.SIGINT)
    assert seed.end().code == 0
    assert newcomer.end().code == 4


def test_a_drain_ends_at_its_deadline(machine: Machine, tmp_path: Path, out: Path) -> None:
    model = write_model(tmp_path / "large", size=60_000_000)
    seed = seed_of(machine, model, drain_s=1.0)
    newcomer = machine.fetch(out, peers=[seed.address])
    wait_until(lambda: begun(out), "some bytes")
    seed.send(signal.SIGTERM)
    assert seed.end().code == 0
    assert newcomer.end().code == 4
    assert contents(out) == {}


def test_a_key_and_a_limit_are_read_again(machine: Machine, big: Path, out: Path) -> None:
    old, new = machine.root / "old", machine.root / "new"
    for path in (old, new):
        machine.run("keygen", path)
    key = machine.root / "key"
    key.touch(0o600)
    key.write_text(old.read_text())
    seed = machine.serve(big, "--key-file", str(key))
    assert "key" in machine.fetch(out, "--key-file", str(new), peers=[seed.address]).end().error(3)
    key.write_text(new.read_text() + old.read_text())
    (machine.cwd / "swarm.toml").write_text("upload_limit = '100MB/s'\n")
    seed.send(signal.SIGHUP)
    seed.wait_for("upload limit 100 MB/s")
    assert "settings are read again: cluster key" in seed.err
    assert machine.fetch(out, "--key-file", str(new), peers=[seed.address]).end().code == 0
    assert contents(out) == contents(big)
