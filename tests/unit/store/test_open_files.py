"""Descriptors within the budget of the process."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import closing
from pathlib import Path

import pytest

from swarm.store.open_files import OpenFiles


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
