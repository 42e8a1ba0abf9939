"""Files that other programs can change while a fetch fills them."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from swarm.content.manifest import Chunk, Manifest
from swarm.errors import StoreError
from swarm.store.directory import DirectoryStore
from swarm.store.lease import SoleUse
from swarm.store.open_files import OpenFiles
from swarm.testing.stores import content, describe, is_right, land

CONTENTS = {"a.bin": bytes(range(256)) * 512, "b.bin": b"b" * 40_000, "empty": b"", "sub/c.json": b"{}"}
MANIFEST, _ = describe(CONTENTS)
WRITE = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); os.pwrite(fd, b'wrong', 100); os.close(fd)"
DEADLINE_S = 20.0


def leases_work(directory: Path) -> bool:
    with (directory / "probe").open("wb") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError:
            return False
    return True


class Asked:
    """`is_right` of a store, and the chunks that it was asked for."""

    def __init__(self, store: DirectoryStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self.files: set[str] = set()

    def __call__(self, chunk: Chunk) -> bool:
        with self._lock:
            self.files.add(MANIFEST.files[chunk.file].path)
        return is_right(self._store, chunk)


def fill(store: DirectoryStore, manifest: Manifest = MANIFEST) -> None:
    for chunk in manifest.chunks:
        land(store, chunk, content(manifest, CONTENTS, chunk))


def staged(out: Path, path: str) -> Path:
    return out / ".swarm" / MANIFEST.digest[:16] / path


def write(path: Path) -> None:
    subprocess.run([sys.executable, "-c", WRITE, str(path)], check=True, timeout=DEADLINE_S)


def write_and_restore_mtime(path: Path) -> None:
    before = path.stat()
    write(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def write_by_another_name(path: Path) -> None:
    other = path.with_name("other-name")
    os.link(path, other)
    write(other)
    other.unlink()


def write_by_mapping(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[100:105] = b"wrong"


def truncate(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 50)
    os.truncate(path, size)


CHANGES = [write, write_and_restore_mtime, write_by_another_name, write_by_mapping, truncate]


@pytest.mark.timeout(4 * DEADLINE_S)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("leased", [True, False])
def test_bytes_changed_after_they_were_verified_get_no_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], leased: bool
) -> None:
    if not leased:
        monkeypatch.setattr("swarm.store.lease._take", lambda _: False)
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        fill(store)
        change(staged(tmp_path, "a.bin"))
        with pytest.raises(StoreError, match=r"a\.bin: another program changed"):
            store.seal(Asked(store))
    assert not (tmp_path / "a.bin").exists()
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        for chunk in MANIFEST.chunks:
            if not is_right(store, chunk):
                land(store, chunk, content(MANIFEST, CONTENTS, chunk))
        store.seal(Asked(store))
    assert {path: (tmp_path / path).read_bytes() for path in CONTENTS} == CONTENTS


def test_a_file_that_no_other_program_opened_is_not_hashed_again(tmp_path: Path) -> None:
    if not leases_work(tmp_path):
        pytest.skip("no leases on this file system")
    with closing(DirectoryStore(tmp_path / "out", MANIFEST)) as store:
        fill(store)
        staged(tmp_path / "out", "b.bin").read_bytes()  # waits until the store gives the lease up
        asked = Asked(store)
        store.seal(asked)
        assert asked.files == {"b.bin"}
        (tmp_path / "out" / "a.bin").read_bytes()


def test_a_file_that_was_open_before_the_fetch_is_hashed_again(tmp_path: Path) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        fill(store)
    with (
        staged(tmp_path, "a.bin").open("r+b", buffering=0) as early,
        closing(DirectoryStore(tmp_path, MANIFEST)) as store,
    ):
        assert all(is_right(store, chunk) for chunk in MANIFEST.chunks)
        early.write(b"wrong")
        with pytest.raises(StoreError, match=r"a\.bin: another program changed 1 of its"):
            store.seal(Asked(store))


def test_a_file_that_is_written_to_while_it_is_hashed_again_gets_no_final_name(tmp_path: Path) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        fill(store)
        with staged(tmp_path, "a.bin").open("r+b", buffering=0) as other:

            def late(chunk: Chunk) -> bool:
                right = is_right(store, chunk)
                if chunk.file == 0:
                    other.seek(0)
                    other.write(b"wrong")
                return right

            with pytest.raises(StoreError, match=r"a\.bin: another program changed"):
                store.seal(late)
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize("change", CHANGES[:-1])
def test_a_complete_file_changed_during_the_fetch_fails_it(tmp_path: Path, change: Callable[[Path], None]) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENTS["a.bin"])
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        for chunk in MANIFEST.chunks:
            if chunk.file != 0:
                land(store, chunk, content(MANIFEST, CONTENTS, chunk))
        change(tmp_path / "a.bin")
        with pytest.raises(StoreError, match=r"a\.bin: another program changed"):
            store.seal(Asked(store))


def test_a_complete_file_that_only_got_another_name_is_right(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENTS["a.bin"])
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        for chunk in MANIFEST.chunks:
            if chunk.file != 0:
                land(store, chunk, content(MANIFEST, CONTENTS, chunk))
        os.link(tmp_path / "a.bin", tmp_path / "backup")
        asked = Asked(store)
        store.seal(asked)
        assert "a.bin" in asked.files


def test_a_file_opened_twice_is_exposed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"bytes")

    def opened(number: int) -> int:
        fd = os.open(path, os.O_RDWR)
        sole.opened(number, fd)
        return fd

    files = OpenFiles(opened)
    sole = SoleUse(files)
    with closing(files), closing(sole):
        with files.lend(0) as fd:
            assert sole.exposed(0, fd) == (not leases_work(tmp_path))
        files.close()
        with files.lend(0) as fd:
            assert sole.exposed(0, fd)
