"""What the agent keeps on the disk: what swarm wrote goes, what others wrote stays, and pins survive a restart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swarm.agent.cache import Cache, snapshots
from swarm.checkpoint import kept
from swarm.content.manifest import Digest
from swarm.errors import StoreFull

COMMIT = "a" * 40


class Machine:
    """A hub cache with models of swarm and of other programs."""

    def __init__(self, root: Path) -> None:
        self.cache, self.hub = root / "cache", root / "hub"
        self.gone: list[str] = []
        self.now = 1000.0

    def write(self, name: str, size: int, *, by_swarm: bool = True, used_at: float = 0.0) -> Path:
        snapshot = self.hub / f"models--org--{name}" / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        blob = self.hub / f"models--org--{name}" / "blobs" / f"swarm-{name}"
        blob.parent.mkdir()
        blob.write_bytes(bytes(size))
        link = snapshot / "model.safetensors"
        link.symlink_to(os.path.relpath(blob, snapshot))
        os.utime(snapshot, (used_at, used_at))
        if by_swarm:
            kept.record(self.cache, f"org/{name}", Digest(f"{len(name):064x}"), snapshot, wrote=[blob, link])
        return snapshot

    def open(self, limit: float) -> Cache:
        made = Cache(self.cache, self.hub, limit_bytes=limit, withdraw=self.gone.append, now=lambda: self.now)
        made.look()
        return made


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def key(name: str) -> str:
    return f"org/{name}@{COMMIT}"


def test_is_every_model_of_the_cache_listed(machine: Machine) -> None:
    machine.write("a", 10)
    machine.write("b", 10, by_swarm=False)
    (machine.hub / "models--org--c" / "snapshots").mkdir(parents=True)
    (machine.hub / "datasets--org--d" / "snapshots" / COMMIT).mkdir(parents=True)
    assert [each.key for each in snapshots(machine.hub)] == [key("a"), key("b")]


def test_goes_what_swarm_wrote_least_recently_used_first(machine: Machine) -> None:
    places = {name: machine.write(name, 40, used_at=float(at)) for at, name in enumerate("abc")}
    other = machine.write("z", 1000, by_swarm=False)
    cache = machine.open(200)
    cache.used(key("a"))
    cache.room(key("d"), 120)
    assert machine.gone == [key("b")]
    assert [place.exists() for place in places.values()] == [True, False, True]
    assert not (machine.hub / "models--org--b").exists()
    assert other.exists()
    assert (cache.evicted, cache.evicted_bytes) == (1, 40)


def test_stays_what_is_pinned_and_what_is_read(machine: Machine) -> None:
    for name in "ab":
        machine.write(name, 40)
    cache = machine.open(100)
    cache.pin(key("a"), pinned=True)
    with (
        cache.in_use(key("b")),
        pytest.raises(StoreFull, match=r"50 B do not fit into the 100 B .*40 B are pinned and 40 B are in use"),
    ):
        cache.room(key("c"), 50)
    cache.room(key("c"), 50)
    assert machine.gone == [key("b")]


def test_does_a_pin_survive_a_restart(machine: Machine) -> None:
    machine.write("a", 40)
    machine.open(100).pin(key("a"), pinned=True)
    machine.open(100).pin(key("later"), pinned=True)  # before it is there
    again = machine.open(100)
    assert again.pinned(key("a"))
    assert again.pinned(key("later"))
    with pytest.raises(StoreFull):
        again.room(key("b"), 70)


def test_is_a_smaller_limit_kept_from_the_start(machine: Machine) -> None:
    for at, name in enumerate("abc"):
        machine.write(name, 40, used_at=float(at))
    cache = machine.open(100)
    assert machine.gone == [key("a")]
    assert cache.policy.bytes == 80


def test_is_what_other_programs_removed_not_counted(machine: Machine) -> None:
    machine.write("a", 40)
    cache = machine.open(100)
    for path in sorted((machine.hub / "models--org--a").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    cache.look()
    assert cache.policy.bytes == 0


def test_are_damaged_records_of_pins_ignored(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.write("a", 40)
    machine.open(100).pin(key("a"), pinned=True)
    (machine.cache / "agent" / "models.json").write_text("{")
    assert not machine.open(100).pinned(key("a"))
    assert "pins are lost" in caplog.text
