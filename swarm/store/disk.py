"""What the directory store needs from a file system: confined paths, change stamps, locks, writeback, named errors.

A manifest's paths come from strangers, and the directory they land in may be shared with other users. So a path is
never handed to the kernel whole: `ConfinedDirectory` opens it component by component, relative to the directory before
it, and no component may be a symbolic link. What was checked is therefore what is used, whoever renames what meanwhile.

Must not know: manifests, chunks, or what the files are for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import resource
import secrets
import shutil
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from swarm.errors import SourceChanged, StoreConflict, StoreError, StoreFull

WRITEBACK_BYTES = 64 << 20  # a second or less of a slow disk's time, so little is left when the last chunk lands
WRITEBACK_THREADS = 4
LOCK_POLL_S = 0.05
DESCRIPTORS_SPARE = 256  # left for sockets, logs and whatever else the process opens

_FULL = {errno.ENOSPC, errno.EDQUOT}
_IN_THE_WAY = {errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EEXIST}


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells a changed file from the file it was: size in bytes, modification time in nanoseconds, inode."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The stamp in a stat result."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    @classmethod
    def at(cls, path: Path) -> Self:
        """The stamp of the file at `path`, through links. Raises SourceChanged when there is none."""
        try:
            return cls.of(os.stat(path))
        except OSError as error:
            raise SourceChanged(path, error.strerror or str(error)) from error

    def check(self, path: Path, fd: int) -> None:
        """Raises SourceChanged unless `path` still names a file with this stamp, and the open file `fd` has it too.

        By name, because a directory whose files are replaced is another model; open, because bytes come from there.
        """
        try:
            found = os.stat(path)
        except FileNotFoundError as error:
            raise SourceChanged(path, "it is gone") from error
        except OSError as error:
            raise SourceChanged(path, f"it cannot be looked at: {error.strerror}") from error
        self._demand(path, found)
        self.check_open(path, fd)

    def check_open(self, path: Path, fd: int) -> None:
        """Raises SourceChanged, naming `path`, unless the open file `fd` has this stamp. It may have been moved."""
        self._demand(path, os.fstat(fd))

    def _demand(self, path: Path, status: os.stat_result) -> None:
        found = Stamp.of(status)
        if found != self:
            raise SourceChanged(path, self._difference(found))

    def _difference(self, other: Stamp) -> str:
        if other.inode != self.inode:
            return "another file took its place"
        if other.size != self.size:
            return f"{self.size} bytes became {other.size}"
        return "it was written to"


class ConfinedDirectory:
    """An open directory, `path` for messages, whose inside is reached without following any symbolic link.

    Paths are relative, with `/`. Methods raise StoreConflict when a link or a file stands where a directory should,
    and OSError for the rest.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def open(cls, path: Path) -> Self:
        """The directory itself may be reached through links: its name is the user's, not a stranger's."""
        return cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self.fd)

    def enter(self, path: str, *, make: bool = False) -> ConfinedDirectory:
        """The directory at `path`, '' for this one; whoever asks closes it. `make` makes what is missing."""
        here = ConfinedDirectory(self.path, os.dup(self.fd))
        for name in path.split("/") if path else ():
            with contextlib.closing(here):
                here = here._child(name, make=make)
        return here

    def make(self, name: str) -> bool:
        """Makes one directory in this one; False when the name is taken."""
        try:
            os.mkdir(name, dir_fd=self.fd)
        except FileExistsError:
            return False
        return True

    def lstat(self, path: str) -> os.stat_result | None:
        """Status of what is at `path`, not of what it links to; None when nothing is there."""
        try:
            with self._parent(path) as (parent, name):
                return os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open_file(self, path: str, flags: int, *, make_parents: bool = False) -> int:
        """A descriptor of the regular file at `path`; anything else there raises StoreConflict."""
        with self._parent(path, make=make_parents) as (parent, name):
            # O_NONBLOCK: opening a pipe that somebody put there must not wait for its other end.
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                fd = os.open(name, flags, 0o666, dir_fd=parent.fd)
            except OSError as error:
                if error.errno in _IN_THE_WAY | {errno.ENXIO}:
                    raise StoreConflict(self.path / path, "is not a regular file; move it away") from error
                raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StoreConflict(self.path / path, "is not a regular file; move it away")
        return fd

    def move(self, path: str, target: ConfinedDirectory) -> None:
        """Moves a file to the same path in `target`, making directories. Raises FileExistsError, never overwrites."""
        with self._parent(path) as (source, name), target._parent(path, make=True) as (goal, _):
            try:
                # A rename would replace whatever appeared there since anybody looked; a link refuses to.
                os.link(name, name, src_dir_fd=source.fd, dst_dir_fd=goal.fd, follow_symlinks=False)
            except FileExistsError:
                raise
            except OSError:
                # This file system has no hard links. The look before the rename leaves a gap, of microseconds.
                if target.lstat(path) is not None:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
                os.rename(name, name, src_dir_fd=source.fd, dst_dir_fd=goal.fd)
            else:
                os.unlink(name, dir_fd=source.fd)

    def unlink(self, path: str) -> None:
        """Removes one file, if it is there."""
        with contextlib.suppress(FileNotFoundError), self._parent(path) as (parent, name):
            os.unlink(name, dir_fd=parent.fd)

    def remove_tree(self, name: str) -> None:
        """Removes a directory in this one with all that it holds.

        What cannot be removed stays: it is out of use by now, and some network file systems refuse while a file in it
        is still open. `rmtree` with `dir_fd` follows no links.
        """
        shutil.rmtree(name, dir_fd=self.fd, ignore_errors=True)

    def remove_if_empty(self, name: str) -> None:
        """Removes a directory in this one unless it holds something, or cannot be removed."""
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=self.fd)

    def free_bytes(self) -> int | None:
        """Room on its file system for this user; None when the file system does not tell."""
        room = os.statvfs(self.fd)
        return room.f_bavail * room.f_frsize if room.f_blocks else None

    @contextlib.contextmanager
    def _parent(self, path: str, *, make: bool = False) -> Iterator[tuple[ConfinedDirectory, str]]:
        directory, _, name = path.rpartition("/")
        with contextlib.closing(self.enter(directory, make=make)) as parent:
            yield parent, name

    def _child(self, name: str, *, make: bool) -> ConfinedDirectory:
        if make:
            self.make(name)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return ConfinedDirectory(self.path / name, os.open(name, flags, dir_fd=self.fd))
        except OSError as error:
            if error.errno in _IN_THE_WAY:
                raise StoreConflict(self.path / name, "is a link or no directory; move it away") from error
            raise


class Writeback:
    """Sends written data on to the disk while more of it arrives. Any thread may call; `close` comes last."""

    def __init__(self) -> None:
        self._flusher = ThreadPoolExecutor(WRITEBACK_THREADS, thread_name_prefix="swarm-writeback")
        self._flushes: list[Future[None]] = []
        self._waiting_bytes: Counter[int] = Counter()  # by descriptor
        self._lock = threading.Lock()

    def wrote(self, fd: int, size: int) -> None:
        """`size` more bytes of a file wait for the disk; once they are enough, they start. Does not block."""
        with self._lock:
            self._waiting_bytes[fd] += size
            if self._waiting_bytes[fd] >= WRITEBACK_BYTES:
                self._waiting_bytes[fd] = 0
                self._flushes.append(self._flusher.submit(os.fdatasync, fd))

    def flush(self, fds: Sequence[int]) -> None:
        """Returns when all data of these files is on the disk. Raises OSError when it, or any before it, failed.

        A failure is raised each time from then on: the kernel itself tells of a lost write once and then forgets it.
        """
        with self._lock:
            self._flushes += [self._flusher.submit(os.fdatasync, fd) for fd in fds]
            flushes = tuple(self._flushes)
        for flush in flushes:
            flush.result()

    def close(self) -> None:
        """Waits for flushes that run; forgets those that do not yet."""
        self._flusher.shutdown(cancel_futures=True)


@contextlib.contextmanager
def store_errors(where: Path, *, need_bytes: int = 0) -> Iterator[None]:
    """Turns an OSError into the StoreError that says what to do; `need_bytes` is what was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull(where, need_bytes=need_bytes, free_bytes=_free_bytes(where)) from error
        if error.errno in _IN_THE_WAY:
            raise StoreConflict(where, f"is in the way ({error.strerror}); move it away") from error
        raise StoreError(
            f"{_named(error) or where}: {error.strerror or error}; mend that or use another directory, then run again"
        ) from error


def reserve_descriptors(count: int) -> None:
    """Raises the process's soft limit of open files, as far as it may, to make room for `count` more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + count + DESCRIPTORS_SPARE
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def next_data(fd: int, offset: int) -> float:
    """Where something was first written to a file, from here on: this very offset when the file system cannot tell,
    inf when nothing was."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        return math.inf if error.errno == errno.ENXIO else offset


def lock_file(fd: int, path: Path, *, shared: bool = False, timeout_s: float | None = None) -> None:
    """Takes the flock(2) of the open file `fd`, named `path`, until it is closed or the process ends.

    `timeout_s` None waits for ever, 0 not at all. Raises BlockingIOError at the timeout, and FileNotFoundError when
    `path` was removed meanwhile: the next process would lock another file.

    The package filelock does not fit. A held cache entry needs a shared lock that survives exec, and a store opens
    its lock file relative to a directory; filelock has exclusive locks of paths only.
    """
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(fd, how if deadline is None else how | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if deadline is None or time.monotonic() >= deadline:
                raise
            time.sleep(LOCK_POLL_S)
    if not os.path.samestat(os.fstat(fd), os.stat(path)):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def open_locked(path: Path, *, shared: bool = False, timeout_s: float | None = None) -> int:
    """A descriptor of the file at `path`, made if missing and locked as by `lock_file`. Raises OSError."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            lock_file(fd, path, shared=shared, timeout_s=timeout_s)
        except BaseException as error:
            os.close(fd)
            if not isinstance(error, FileNotFoundError):
                raise
        else:
            return fd


@contextlib.contextmanager
def replacing(path: Path, *, draft_dir: Path | None = None) -> Iterator[Path]:
    """Yields a new path in `draft_dir` (default: beside `path`), and renames it to `path` when the block ends.

    A reader of `path` sees the old file or the new one, never a part. When the block raises, the draft is removed.
    """
    draft = (draft_dir or path.parent) / f".new-{secrets.token_hex(8)}"
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def remove_if_empty(place: Path) -> None:
    """Removes a directory unless it holds something, or cannot be removed."""
    with contextlib.suppress(OSError):
        place.rmdir()


def _named(error: OSError) -> str | None:
    """The file that the error is about, unless its name says nothing by itself."""
    name = error.filename
    return name if isinstance(name, str) and os.path.isabs(name) else None


def _free_bytes(where: Path) -> int:
    for place in (where, *where.parents):
        with contextlib.suppress(OSError):
            room = os.statvfs(place)
            return room.f_bavail * room.f_frsize
    return 0
