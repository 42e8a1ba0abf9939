"""Files beside an artifact, read from the hub: what if it lists or sends more than the disk has room for?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swarm.agent.hub_files import _read
from swarm.content.promise import ListedFile
from swarm.errors import StoreConflict, StoreFull

NAME = "a" * 40


class Endless:
    """An origin that sends as much as it lists."""

    address = "hub"

    def __init__(self) -> None:
        self.asked = 0

    def read(self, *_: object) -> Any:
        self.asked += 1
        raise AssertionError("it is asked")


def test_is_a_file_refused_before_it_is_read_for_which_there_is_no_room(tmp_path: Path) -> None:
    origin: Any = Endless()
    file = ListedFile("README.md", 10**18, f"git-sha1:{NAME}")
    with pytest.raises(StoreFull):
        _read(origin, None, file, tmp_path / "draft", NAME)
    assert not origin.asked
    assert not list(tmp_path.iterdir())


def test_is_no_link_in_place_of_a_draft_written_through(tmp_path: Path) -> None:
    origin: Any = Endless()
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "draft").symlink_to(tmp_path / "victim")
    with pytest.raises(StoreConflict):
        _read(origin, None, ListedFile("README.md", 5, f"git-sha1:{NAME}"), tmp_path / "draft", NAME)
    assert (tmp_path / "victim").read_bytes() == b"mine"
