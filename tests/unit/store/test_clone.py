"""Second copies of verified files: the same bytes, of a file that nothing changed, over nothing else."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import pytest

from swarm.errors import SourceChanged, StoreConflict, StoreError
from swarm.store import clone as module
from swarm.store.clone import clone
from swarm.store.confined_directory import ConfinedDirectory
from swarm.store.stamp import Stamp

DATA = bytes(range(256)) * 1000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


def copy(source: Path, target: Path, stamp: Stamp | None = None) -> None:
    """`target` is a path below the directory of the source."""
    with contextlib.closing(ConfinedDirectory.open(source.parent)) as into:
        path = str(target.relative_to(source.parent))
        clone(source, stamp or Stamp.at(source), into, path, staged=".swarm/drafts", fsync=False)


@pytest.mark.parametrize("kind", ["as it can", "no copy_file_range", "reflink"])
def test_are_the_bytes_the_same(kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> int:
        raise OSError(errno.EXDEV, "not here")

    def reflinks(target: int, _: int, given: int) -> int:
        os.pwrite(target, os.pread(given, len(DATA), 0), 0)
        return 0

    if kind == "no copy_file_range":
        monkeypatch.setattr(os, "copy_file_range", cannot)
    if kind == "reflink":
        monkeypatch.setattr(fcntl, "ioctl", reflinks)
        monkeypatch.setattr(module, "_copy", cannot)
    target = tmp_path / "deep" / "target"
    copy(source, target)
    assert target.read_bytes() == DATA
    assert target.stat().st_ino != source.stat().st_ino, "an edit of the one leaves the other alone"
    assert not list(source.parent.glob(".swarm/drafts/**/target"))
    copy(source, target)  # what is there already stays


def test_is_a_source_that_changed_refused(source: Path, tmp_path: Path) -> None:
    stamp = Stamp.at(source)
    source.write_bytes(DATA[::-1])
    with pytest.raises(SourceChanged):
        copy(source, tmp_path / "target", stamp)
    assert not (tmp_path / "target").exists()


def test_is_a_source_that_changes_meanwhile_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(*_: object) -> bool:
        source.write_bytes(b"x" * len(DATA))
        os.utime(source, ns=(0, 0))
        return True

    monkeypatch.setattr(module, "_reflink", change)
    with pytest.raises(SourceChanged):
        copy(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_is_nothing_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"mine")
    with pytest.raises(StoreConflict, match="exists with other content"):
        copy(source, tmp_path / "target")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(StoreConflict):
        copy(source, tmp_path / "link")
    assert (tmp_path / "target").read_bytes() == b"mine"


@pytest.mark.parametrize("place", ["deep", ".swarm", ".swarm/drafts"])
def test_is_no_link_in_a_directory_of_several_users_followed(place: str, source: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "target").write_bytes(b"mine")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).symlink_to(elsewhere)
    with pytest.raises(StoreConflict, match="move it away"):
        copy(source, tmp_path / "deep" / "target")
    with pytest.raises(StoreConflict, match="move it away"):
        copy(source, tmp_path / "deep" / "new")
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == {"target": b"mine"}


def test_is_a_draft_that_lies_there_already_left_alone(source: Path, tmp_path: Path) -> None:
    """A link to a file of the user, under the name of the draft."""
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / ".swarm" / "drafts").mkdir(parents=True)
    for make in (os.link, os.symlink):
        make(tmp_path / "victim", tmp_path / ".swarm" / "drafts" / "target")
        with pytest.raises(StoreConflict):
            copy(source, tmp_path / "target")
        (tmp_path / ".swarm" / "drafts" / "target").unlink()
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_is_a_failing_disk_an_error_of_the_store(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bool:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(module, "_reflink", full)
    with pytest.raises(StoreError, match="broken"):
        copy(source, tmp_path / "target")
