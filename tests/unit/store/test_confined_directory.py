"""Paths that may not leave their directory."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from swarm.errors import StoreConflict
from swarm.store.confined_directory import ConfinedDirectory


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
