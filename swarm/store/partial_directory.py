"""The unfinished files of a fetch: `<out>/.swarm/<first digits of the digest>`, locked while a fetch writes them.

    out/.swarm/<digest[:16]>/.swarm     lock file with the id of the fetching process; no artifact has this path
    out/.swarm/<digest[:16]>/<path>     an unfinished file, at its full size from the start
    out/.swarm/<digest[:16]>.chunks     digests of the chunks of a promise, a line for each chunk that was written

Must not know: chunks, what is in the files, when they are complete.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from swarm.content.manifest import FileEntry, Manifest
from swarm.errors import StoreConflict
from swarm.store.confined_directory import ConfinedDirectory
from swarm.store.file_errors import store_errors
from swarm.store.file_lock import lock_file

PARTIAL = ".swarm"
RECORD_BYTES_MAX = 256 << 20
CLAIM_ATTEMPTS = 10  # an attempt fails only if another fetch ends in the same moment


class Claimed(StoreConflict):
    """Another fetch writes this artifact there: it can be waited for."""


class PartialDirectory:
    """The partial directory of one artifact in `final`, locked. `fresh`: no earlier fetch left files in it."""

    def __init__(
        self, final: ConfinedDirectory, parent: ConfinedDirectory, files: ConfinedDirectory, *, fresh: bool
    ) -> None:
        self.files = files
        self.fresh = fresh
        self._final = final
        self._parent = parent
        self._name = files.path.name
        self._record_fd: int | None = None

    @classmethod
    def claim(cls, final: ConfinedDirectory, name: str, *, held: ExitStack, undo: ExitStack) -> PartialDirectory:
        """Opens and locks it, and makes it if missing. `held` closes it, `undo` removes what was made.

        Raises Claimed while another fetch has it, and StoreConflict.
        """
        for _ in range(CLAIM_ATTEMPTS):
            # FileNotFoundError: another fetch ended and removed the directory.
            with ExitStack() as attempt, contextlib.suppress(FileNotFoundError):
                if final.make(PARTIAL):
                    undo.callback(final.remove_if_empty, PARTIAL)
                parent = attempt.enter_context(contextlib.closing(final.enter(PARTIAL)))
                fresh = parent.make(name)
                files = attempt.enter_context(contextlib.closing(parent.enter(name)))
                lock = files.open_file(PARTIAL, os.O_RDWR | os.O_CREAT)
                attempt.callback(os.close, lock)
                _lock(lock, files.path)
                held.push(attempt.pop_all())
                if fresh:
                    undo.callback(parent.remove_tree, name)
                return cls(final, parent, files, fresh=fresh)
        raise StoreConflict(final.path / PARTIAL / name, "other fetches keep removing it")

    def demand_room(self, entries: Iterable[FileEntry]) -> int:
        """Bytes that remain to be allocated for these files. Raises StoreFull if fewer are free, or too few inodes."""
        need_bytes = need_inodes = 0
        parents: set[str] = set()
        for entry in entries:
            status = self.files.lstat(entry.path)
            taken = status.st_blocks * 512 if status else 0  # unit of st_blocks on every disk
            need_bytes += max(0, entry.size - taken)
            need_inodes += status is None
            parents |= {str(parent) for parent in PurePosixPath(entry.path).parents[:-1]}
        need_inodes += sum(place.lstat(parent) is None for parent in parents for place in (self.files, self._final))
        self._final.demand_room(need_bytes, need_inodes)
        return need_bytes

    def allocate(self, entry: FileEntry, undo: ExitStack) -> int:
        """Gives a file its size; returns its inode."""
        known = self.files.lstat(entry.path)
        fd = self.files.open_file(entry.path, os.O_RDWR | os.O_CREAT, make_parents=True)
        try:
            return self._allocate_open(entry, fd, undo, new=known is None)
        finally:
            os.close(fd)

    def record(self, line: bytes) -> None:
        """Adds a line to the record of written chunks."""
        if self._record_fd is None:
            self._record_fd = self._parent.open_file(self._record_name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.write(self._record_fd, line)

    def recorded(self) -> Iterator[bytes]:
        """The lines of the record; one that was cut off is left out."""
        if self._parent.lstat(self._record_name) is not None:
            with os.fdopen(self._parent.open_file(self._record_name, os.O_RDONLY), "rb") as file:
                yield from file.read(RECORD_BYTES_MAX).split(b"\n")[:-1]

    def remove_unless(self, paths: Iterable[str]) -> None:
        """Removes it with its record, unless one of these files is there."""
        if not any(self.files.lstat(path) for path in paths):
            self._parent.remove_tree(self._name)
            self._parent.unlink(self._record_name)
            self._final.remove_if_empty(PARTIAL)

    def close(self) -> None:
        """Closes the record; the directories are closed by `held`."""
        if self._record_fd is not None:
            os.close(self._record_fd)

    @property
    def _record_name(self) -> str:
        return f"{self._name}.chunks"

    def _allocate_open(self, entry: FileEntry, fd: int, undo: ExitStack, *, new: bool) -> int:
        status = os.fstat(fd)
        if status.st_nlink != 1:
            raise StoreConflict(self.files.path / entry.path, "has a second name, which a write would reach; remove it")
        if new:
            undo.callback(self.files.unlink, entry.path)
        elif status.st_size < entry.size:
            undo.callback(self._truncate, entry.path, status.st_size)
        elif status.st_size > entry.size:
            os.ftruncate(fd, entry.size)
        if entry.size:
            os.posix_fallocate(fd, 0, entry.size)
        return status.st_ino

    def _truncate(self, path: str, size: int) -> None:
        fd = self.files.open_file(path, os.O_RDWR)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)


def discard(out: Path, manifest: Manifest) -> None:
    """Removes what fetches of an artifact left unfinished in a directory. Raises StoreError."""
    with store_errors(out), contextlib.suppress(FileNotFoundError), ExitStack() as held:
        final = held.enter_context(contextlib.closing(ConfinedDirectory.open(out)))
        partials = held.enter_context(contextlib.closing(final.enter(PARTIAL)))
        partials.remove_tree(manifest.digest[:16])
        final.remove_if_empty(PARTIAL)


def _lock(fd: int, directory: Path) -> None:
    """Locks a partial directory by its lock file and writes this process's id there. Raises StoreConflict."""
    try:
        lock_file(fd, directory / PARTIAL, timeout_s=0)
    except BlockingIOError as error:
        pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
        raise Claimed(directory, f"another fetch (process {pid}) is writing there; wait for it or stop it") from error
    with contextlib.suppress(OSError):  # for messages only: a full disk must not prevent a resume
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)


def next_data(fd: int, offset: int) -> float:
    """Offset of the next written byte (SEEK_DATA): inf if only a hole follows, `offset` without support for holes."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        return math.inf if error.errno == errno.ENXIO else offset
