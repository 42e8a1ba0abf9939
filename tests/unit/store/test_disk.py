"""Locks, drafts, confined paths and holes, by themselves."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from swarm.errors import SourceChanged, StoreConflict, StoreError, StoreFull
from swarm.store.disk import (
    ConfinedDirectory,
    OpenFiles,
    Stamp,
    Writeback,
    lock_file,
    next_data,
    open_locked,
    replacing,
    store_errors,
)

HOLDER = """
import sys
from pathlib import Path
from swarm.store.disk import open_locked
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


def test_does_a_draft_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path, drafts = tmp_path / "file", tmp_path / "drafts"
    drafts.mkdir()
    for content, draft_dir in (("first", None), ("second", drafts)):
        with replacing(path, draft_dir=draft_dir) as draft:
            assert draft.parent == (draft_dir or tmp_path)
            draft.write_text(content)
        assert path.read_text() == content
    with pytest.raises(TypeError), replacing(path) as draft, draft.open("w") as file:
        file.write(b"half")  # type: ignore[arg-type]
    assert path.read_text() == "second"
    assert sorted(tmp_path.rglob("*")) == [drafts, path], "no draft is left"


def test_does_a_confined_path_never_leave_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("x")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to("../outside")
    with closing(ConfinedDirectory.open(inside)) as directory:
        for use in (lambda: directory.enter("link"), lambda: directory.open_file("link/file", os.O_RDONLY)):
            with pytest.raises(StoreConflict, match="is a link or no directory"):
                use()
        with pytest.raises(StoreConflict, match="not a regular file"):
            directory.open_file("link", os.O_RDONLY)
        assert directory.lstat("missing/file") is None
        os.close(directory.open_file("a/b", os.O_RDWR | os.O_CREAT, make_parents=True))
        directory.remove_if_empty("a")
        assert (inside / "a" / "b").exists()


def test_does_a_move_never_overwrite(tmp_path: Path) -> None:
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with (
        closing(ConfinedDirectory.open(tmp_path / "from")) as source,
        closing(ConfinedDirectory.open(tmp_path / "to")) as target,
    ):
        with pytest.raises(FileExistsError):
            source.move("file", target)
        target.unlink("file")
        target.unlink("file")
        source.move("file", target)
    assert (tmp_path / "to" / "file").read_text() == "from"
    assert not (tmp_path / "from" / "file").exists()


def test_does_a_stamp_name_the_change(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("content")
    stamp = Stamp.at(path)
    with path.open("r+") as file:
        stamp.check(path, file.fileno())
        file.truncate(3)
        with pytest.raises(SourceChanged, match="7 bytes became 3"):
            stamp.check(path, file.fileno())
        path.rename(tmp_path / "moved")
        with pytest.raises(SourceChanged, match="it is gone"):
            stamp.check(path, file.fileno())


def test_is_room_that_was_never_written_a_hole(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        os.ftruncate(file.fileno(), 1 << 20)
        assert next_data(file.fileno(), 0) == math.inf
        os.pwrite(file.fileno(), b"x", 512 << 10)
        assert 0 < next_data(file.fileno(), 0) <= 512 << 10


def test_does_each_failure_have_its_error(tmp_path: Path) -> None:
    for number, kind in ((errno.ENOSPC, StoreFull), (errno.ENOTDIR, StoreConflict), (errno.EIO, StoreError)):
        with pytest.raises(kind) as caught, store_errors(tmp_path):
            raise OSError(number, os.strerror(number))
        assert str(tmp_path) in str(caught.value)


def test_is_a_failed_writeback_raised_at_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("swarm.store.disk.WRITEBACK_BYTES", 4)
    with closing(Writeback(lost)) as writeback, (tmp_path / "file").open("w+b") as file:
        writeback.wrote(file.fileno(), 3)
        assert not writeback._flushes
        writeback.wrote(file.fileno(), 3)
        with pytest.raises(OSError, match="Input/output"):
            writeback.flush([])


def test_unused_files_are_closed_beyond_the_budget_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (20, 20))  # half of them for files
    for number in range(50):
        (tmp_path / str(number)).write_text(str(number))
    opened: list[int] = []

    def opener(number: int) -> int:
        opened.append(number)
        return os.open(tmp_path / str(number), os.O_RDONLY)

    def text(fd: int) -> str:
        return os.pread(fd, 9, 0).decode()

    before = set(os.listdir("/proc/self/fd"))
    with closing(OpenFiles(opener)) as first, closing(OpenFiles(opener)) as second:
        with first.lend(0) as lent:
            for number in range(1, 50):
                for files in (first, second):
                    with files.lend(number) as fd:
                        assert text(fd) == str(number)
                assert len(set(os.listdir("/proc/self/fd")) - before) <= 11  # and that of the directory
            assert text(lent) == "0"
        count = len(opened)
        with first.lend(0) as fd, first.lend(0) as same, second.lend(49):
            assert fd == same == lent
        assert len(opened) == count
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_file_is_opened_although_the_process_has_no_descriptor_left(tmp_path: Path) -> None:
    attempts = 0

    def opener(_: int) -> int:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return os.open(tmp_path, os.O_RDONLY)

    with closing(OpenFiles(opener)) as files:
        with files.lend(0) as fd:
            pass
        with files.lend(1):
            assert attempts == 3
            with files.lend(0) as again:  # it was closed to make room
                assert attempts == 4
                assert os.path.samestat(os.fstat(again), os.stat(tmp_path))
        assert fd >= 0
