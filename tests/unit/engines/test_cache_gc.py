"""What goes of the cache directory, and what never does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.engines import cache_gc
from swarm.engines.cache_gc import prune, size_bytes

KIB = 1024
HOLDER = """
import sys
from pathlib import Path
from swarm.engines import cache_gc
cache_gc.hold(Path(sys.argv[1]), through_exec=len(sys.argv) > 2)
"""
WAITS = "import sys; print('held', flush=True); sys.stdin.read()"
BECOMES = "import os; os.execv(sys.executable, [sys.executable, '-c', sys.argv[2]])"


@pytest.fixture(autouse=True)
def _lets_go() -> Iterator[None]:
    yield
    for place in list(cache_gc._held):
        cache_gc.release(place)


def make(cache: Path, name: str, *, used: float, folder: str = "checkpoints") -> Path:
    """A directory of 64 KiB that was used so many days ago."""
    place = cache / folder / name
    (place / "deep").mkdir(parents=True)
    (place / "deep" / "weights").write_bytes(os.urandom(64 * KIB))
    cache_gc.hold(place)
    cache_gc.release(place)
    when = time.time() - used * 86400
    os.utime(cache_gc._lock_of(place), (when, when))
    return place


def test_does_the_least_recently_used_go_until_the_rest_fits(tmp_path: Path) -> None:
    old, older = make(tmp_path, "a", used=2), make(tmp_path, "b", used=3, folder="models")
    fresh = make(tmp_path, "c", used=1)
    each = size_bytes(fresh)
    assert each >= 64 * KIB
    assert prune(tmp_path, 3 * each) == []
    assert prune(tmp_path, 2 * each) == [older]
    assert prune(tmp_path, 2 * each, need_bytes=each) == [old]
    assert fresh.is_dir()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [".use-c", "c"], "no lock is left"


def test_is_room_made_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, fresh = make(tmp_path, "a", used=2), make(tmp_path, "b", used=1)
    free = shutil.disk_usage(tmp_path)

    def usage(_: Path) -> object:
        return free._replace(free=0 if old.is_dir() else 10**9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert prune(tmp_path, float("inf")) == []
    assert prune(tmp_path, float("inf"), need_bytes=10**8) == [old]
    assert fresh.is_dir()


@pytest.mark.parametrize("script", [f"{HOLDER}\n{WAITS}", f"{HOLDER}\n{BECOMES}"])
def test_does_what_a_live_process_uses_stay(tmp_path: Path, script: str) -> None:
    place = make(tmp_path, "a", used=9)
    arguments = [sys.executable, "-c", script, str(place)] + ([WAITS] if "execv" in script else [])
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        assert prune(tmp_path, 0) == []
        assert place.is_dir()
    finally:
        process.kill()
        process.wait(30)
        process.communicate()
    assert prune(tmp_path, 0) == [place], "killed: the kernel let go"


def test_is_a_use_the_newest_one(tmp_path: Path) -> None:
    first, second = make(tmp_path, "a", used=9), make(tmp_path, "b", used=5)
    cache_gc.hold(first)
    cache_gc.release(first)
    assert prune(tmp_path, size_bytes(first)) == [second]


def test_does_what_died_halfway_go_and_what_is_not_ours_stay(tmp_path: Path) -> None:
    unfinished, being_made = tmp_path / "models" / ".new-1", tmp_path / "models" / ".new-2"
    kept = tmp_path / "manifests" / "x.json"
    for path in (unfinished, being_made, kept.parent):
        path.mkdir(parents=True)
    kept.write_text("{}")
    (tmp_path / "models" / "note.txt").write_text("mine")
    os.utime(unfinished, (1, 1))
    assert prune(tmp_path, 0) == []
    assert not unfinished.exists()
    assert being_made.is_dir()
    assert kept.exists()
    assert (tmp_path / "models" / "note.txt").exists()


def test_is_a_hold_of_what_is_not_there_yet_one_and_its_lock_no_litter(tmp_path: Path) -> None:
    cache_gc.hold(tmp_path / "checkpoints" / "a")
    assert prune(tmp_path, 0) == []
    assert (tmp_path / "checkpoints" / ".use-a").exists()
    cache_gc.release(tmp_path / "checkpoints" / "a")
    prune(tmp_path, 0)
    assert not (tmp_path / "checkpoints" / ".use-a").exists()


def test_does_nothing_fail_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cache_gc.hold(tmp_path / "file" / "checkpoints" / "a")
    assert prune(tmp_path / "file", 0) == []
    assert prune(tmp_path / "nowhere", 0) == []
