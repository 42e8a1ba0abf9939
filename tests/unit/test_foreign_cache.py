"""SWARM_CACHE in a place where another user has put links, pipes, files and directories of their own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from swarm.checkpoint import proven
from swarm.content.manifest import Digest
from swarm.engines import metadata, start_log
from swarm.engines.cache_start import CacheStart
from swarm.errors import StoreError
from swarm.node import local_nodes
from swarm.security import cluster_key
from swarm.settings import Settings
from swarm.store.file_lock import open_locked
from swarm.store.own_files import demand_own, read_own, read_regular

OTHER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("mine")
    return path


def test_does_a_note_not_follow_a_link(tmp_path: Path, victim: Path) -> None:
    folder = tmp_path / "cache" / "running"
    folder.mkdir(parents=True)
    (folder / f"{local_nodes.process()}-7000").symlink_to(victim)
    with local_nodes.note(tmp_path / "cache", "127.0.0.1:7000"):
        assert local_nodes.addresses(tmp_path / "cache") == ["127.0.0.1:7000"]
    assert victim.read_text() == "mine"


def test_does_a_pipe_or_a_link_in_place_of_a_note_hold_nothing_up(tmp_path: Path, victim: Path) -> None:
    folder = tmp_path / "running"
    folder.mkdir()
    os.mkfifo(folder / f"{local_nodes.process()}-1")
    (folder / f"{local_nodes.process()}-2").symlink_to("/dev/zero")
    (folder / f"{local_nodes.process()}-3").write_bytes(b"x" * 100_000)
    assert local_nodes.addresses(tmp_path) == []


def test_does_a_pipe_in_place_of_a_recorded_start_hold_nothing_up(tmp_path: Path) -> None:
    folder = tmp_path / start_log.FOLDER
    folder.mkdir()
    os.mkfifo(folder / "1.json")
    (folder / "2.json").symlink_to("/dev/zero")
    assert start_log.recall(tmp_path) == []


def test_does_a_record_of_compiled_caches_not_follow_a_link(tmp_path: Path, victim: Path) -> None:
    cluster_key.create(tmp_path / "key")
    settings = Settings(mdns=False, cache=tmp_path / "cache", key_file=tmp_path / "key")
    start = CacheStart({"a": "b"}, settings, places={})
    start._record.parent.mkdir(parents=True)
    start._record.symlink_to(victim)
    start.serve()
    assert victim.read_text() == "mine"
    assert not start._record.is_symlink()


def test_does_a_lock_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "made")
    with pytest.raises(OSError, match="symbolic links"):
        open_locked(tmp_path / "lock")
    assert not (tmp_path / "made").exists()


def test_is_a_record_that_a_commit_is_proven_not_followed(tmp_path: Path) -> None:
    proven.remember(tmp_path, "https://hub/org/model", "c" * 40, Digest("d" * 64))
    assert proven.known(tmp_path, "https://hub/org/model", "c" * 40, Digest("d" * 64))
    assert not proven.known(tmp_path, "https://hub/org/other", "c" * 40, Digest("d" * 64))
    (record,) = (tmp_path / "proven").iterdir()
    record.rename(tmp_path / "moved")
    record.symlink_to(tmp_path / "moved")
    assert not proven.known(tmp_path, "https://hub/org/model", "c" * 40, Digest("d" * 64))


FOREIGN = [
    lambda path: path.chmod(0o777 if path.is_dir() else 0o666),
    lambda path: path.chmod(0o775 if path.is_dir() else 0o664),
    pytest.param(lambda path: os.chown(path, OTHER, OTHER), marks=needs_root),
]


@pytest.mark.parametrize("give", FOREIGN, ids=["all may write", "a group may write", "another owner"])
def test_what_another_user_can_change_is_not_taken(give: Callable[[Path], None], tmp_path: Path) -> None:
    (file := tmp_path / "file").write_bytes(b"x")
    file.chmod(0o600)
    (place := tmp_path / "place").mkdir(mode=0o700)
    for path in (file, place):
        demand_own(path)
        give(path)
        with pytest.raises(StoreError, match=re.escape(f"{path}: another user can change it; remove it, or set ")):
            demand_own(path)
    with pytest.raises(PermissionError):
        read_own(file, bytes_max=10)
    assert read_regular(file, bytes_max=10) == b"x"


@pytest.mark.parametrize("give", FOREIGN, ids=["all may write", "a group may write", "another owner"])
def test_is_metadata_of_another_user_refused(give: Callable[[Path], None], tmp_path: Path) -> None:
    """It is a model directory for an engine: config, tokenizer, maybe code."""
    place = tmp_path / "metadata" / ("d" * 16)
    place.mkdir(parents=True)
    (place / metadata.DESCRIPTION).write_text('{"content": "' + "d" * 64 + '", "headers": {}}')
    assert metadata.staged(tmp_path, "d" * 64) == place
    give(place)
    with pytest.raises(StoreError, match="another user can change it"):
        metadata.staged(tmp_path, "d" * 64)
    with pytest.raises(StoreError, match="another user can change it"):
        metadata.adopt(tmp_path, place)
