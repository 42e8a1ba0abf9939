"""Room on a disk, measured by a thread."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from swarm.dashboard.disk_room import EVERY_S, DiskRoom


def measured(room: DiskRoom) -> tuple[int, int] | None:
    room()
    assert room._measuring is not None
    room._measuring.join(10)
    return room()


def test_is_the_room_that_of_the_nearest_directory_that_is_there(tmp_path: Path) -> None:
    found = measured(DiskRoom(lambda: tmp_path / "not" / "there"))
    assert found is not None
    assert found[1] == shutil.disk_usage(tmp_path).total


def test_is_a_disk_asked_once_in_a_while_and_never_twice_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked, begun, go_on = 0.0, list[Path](), threading.Event(), threading.Event()

    def usage(path: Path) -> object:
        asked.append(path)
        begun.set()
        go_on.wait(10)
        raise OSError("stale file handle")

    monkeypatch.setattr(shutil, "disk_usage", usage)
    room = DiskRoom(lambda: tmp_path, clock=lambda: now)
    assert room() is None
    begun.wait(10)
    now += 10 * EVERY_S
    assert room() is None  # it hangs, and holds nothing up
    assert len(asked) == 1
    go_on.set()
    assert room._measuring is not None
    room._measuring.join(10)
    assert measured(room) is None
    assert len(asked) == 2
    assert measured(room) is None
    assert len(asked) == 2, "not again within EVERY_S"
