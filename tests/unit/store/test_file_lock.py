"""Locks between processes, and lock files that vanish."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from swarm.store.file_lock import lock_file, open_locked

HOLDER = """
import sys
from pathlib import Path
from swarm.store.file_lock import open_locked
open_locked(Path(sys.argv[1]), shared=sys.argv[2] == "shared")
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(path: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, "-c", HOLDER, str(path), how]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def test_does_a_lock_end_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holder(lock, "alone") as process:
        for shared in (False, True):
            with pytest.raises(BlockingIOError):
                open_locked(lock, shared=shared, timeout_s=0)
        process.kill()
        process.wait(30)
        os.close(open_locked(lock, timeout_s=0))


def test_are_shared_locks_shared_and_refuse_an_exclusive_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holder(lock, "shared"):
        os.close(open_locked(lock, shared=True, timeout_s=0))
        with pytest.raises(BlockingIOError):
            open_locked(lock, timeout_s=0)


def test_does_a_lock_outlast_its_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    held = open_locked(tmp_path / "lock", timeout_s=0)
    with pytest.raises(BlockingIOError):
        open_locked(tmp_path / "lock", timeout_s=2)
    assert 2 <= now[0] < 2.1
    os.close(held)


@pytest.mark.parametrize("replaced", [False, True])
def test_is_a_lock_file_that_is_removed_while_waiting_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    lock, flock, calls = tmp_path / "lock", fcntl.flock, [0]

    def slow(fd: int, how: int) -> None:
        calls[0] += 1
        if calls[0] == 1:
            lock.unlink()
            if replaced:
                lock.touch()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    fd = open_locked(lock)
    assert calls == [2]
    assert os.path.samestat(os.fstat(fd), lock.stat())
    lock.unlink()
    with pytest.raises(FileNotFoundError):
        lock_file(fd, lock)
    os.close(fd)
