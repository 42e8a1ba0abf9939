"""The files of compile caches: copied to be served, identified by their sha256, and added to a machine's caches.

Paths stay within the known caches, links are not followed, and no file is overwritten. Files appear complete. Locks,
temporary and hidden files are not copied.

Must not know: nodes, keys, trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from swarm.content.manifest import Manifest
from swarm.node import local_nodes
from swarm.store.confined_directory import ConfinedDirectory
from swarm.store.directory_source import DirectorySource
from swarm.store.file_errors import store_errors

COPY_BYTES_MAX = 2 << 30  # of the newest files: a cache directory may hold the output of years
PASSING = (".lock", ".tmp", ".pid")  # suffixes of files that only the writing process can use
PASSING_DIRECTORIES = {"locks"}


class CopySource(DirectorySource):
    """A copy of the caches, which change while they are used; removed when it is not served any more."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        super().__init__(root, manifest, paths=[root / "files" / entry.path for entry in manifest.files])

    def close(self) -> None:
        """Also removes the copy."""
        super().close()
        shutil.rmtree(self.root, ignore_errors=True)


def remove_abandoned(own: Path) -> None:
    """Removes the copies of processes that were killed."""
    for left in own.glob("*-*"):
        if local_nodes.dead(left.name.partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)


def copy(target: Path, places: Mapping[str, Path]) -> int:
    """Copies the files of each cache to `target/NAME/`, COPY_BYTES_MAX of the newest; returns their number."""
    copied = 0
    for name, path in _newest((name, path) for name, place in places.items() for path in servable(place)):
        goal = target / name / path.relative_to(places[name])
        goal.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a compiler may remove files at any time
            shutil.copyfile(path, goal)
            copied += 1
    return copied


def _newest(files: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    found = []
    for name, path in files:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((-status.st_mtime_ns, name, path, status.st_size))
    total_bytes = 0
    for _, name, path, size in sorted(found):
        total_bytes += size
        if total_bytes > COPY_BYTES_MAX:
            return
        yield name, path


def servable(place: Path) -> Iterator[Path]:
    """The files of a cache directory that another machine can use."""
    for parent, folders, files in os.walk(place):
        folders[:] = sorted(folder for folder in folders if folder not in PASSING_DIRECTORIES and folder[0] != ".")
        for file in sorted(files):
            path = Path(parent, file)
            if not file.endswith(PASSING) and file[0] != "." and path.is_file() and not path.is_symlink():
                yield path


def content(root: Path, manifest: Manifest) -> str:
    """The sha256 over the paths and contents of a manifest's files below `root`."""
    whole = hashlib.sha256()
    with store_errors(root):
        for entry in manifest.files:
            with (root / entry.path).open("rb") as file:
                contents = hashlib.file_digest(file, "sha256").digest()
            whole.update(hashlib.sha256(entry.path.encode()).digest() + contents)
    return whole.hexdigest()


def merge(staged: Path, manifest: Manifest, places: Mapping[str, Path]) -> tuple[int, int]:
    """Adds staged files to the caches of this machine; returns the numbers of new and existing files."""
    new, kept = 0, 0
    for name, place in places.items():
        paths = [entry.path for entry in manifest.files if entry.path.startswith(f"{name}/")]
        if not paths:
            continue
        with store_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(ConfinedDirectory.open(place)) as target:
                incoming = f".swarm-{secrets.token_hex(8)}"
                target.make(incoming)
                try:
                    with contextlib.closing(target.enter(incoming)) as here:
                        for path in paths:
                            new += _put(staged / path, path.removeprefix(f"{name}/"), here, target)
                finally:
                    target.remove_tree(incoming)
        kept += len(paths)
    return new, kept - new


def _put(staged: Path, path: str, incoming: ConfinedDirectory, target: ConfinedDirectory) -> bool:
    """Whether the file is new there."""
    with staged.open("rb") as source:
        fd = incoming.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, make_parents=True)
        with os.fdopen(fd, "wb") as copy:
            shutil.copyfileobj(source, copy)
    try:
        incoming.move(path, target)  # never overwrites, and follows no links
    except FileExistsError:
        return False
    return True
