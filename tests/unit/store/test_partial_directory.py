"""Holes of unfinished files."""

from __future__ import annotations

import math
import os
from pathlib import Path

from swarm.store.partial_directory import next_data


def test_is_room_that_was_never_written_a_hole(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        os.ftruncate(file.fileno(), 1 << 20)
        assert next_data(file.fileno(), 0) == math.inf
        os.pwrite(file.fileno(), b"x", 512 << 10)
        assert 0 < next_data(file.fileno(), 0) <= 512 << 10
