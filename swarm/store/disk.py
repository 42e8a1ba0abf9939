"""File-system access of the stores: confined paths, change stamps, file locks, drafts, writeback, errors.

Paths in a manifest come from other hosts, and the output directory may be shared with other users. So no path goes to
the kernel whole: `ConfinedDirectory` opens it component by component, each relative to the directory before it, and
refuses symbolic links. A rename by another user between check and use therefore cannot redirect a write.

Must not know: manifests, chunks.
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
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from swarm.errors import SourceChanged, StoreConflict, StoreError, StoreFull

WRITEBACK_BYTES = 64 << 20  # at most a second of a slow disk's time remains when the last chunk arrives
WRITEBACK_THREADS = 4
LOCK_POLL_S = 0.05
DESCRIPTORS_SPARE = 256  # for sockets, logs and the host program

_FULL = {errno.ENOSPC, errno.EDQUOT}
_IN_THE_WAY = {errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EEXIST}


@dataclass(frozen=True, slots=True)
class Stamp:
    """Identity and version of a file: size in bytes, inode, times of modification and of change in nanoseconds.

    A program sets the modification time as it likes; the time of change is the kernel's own. A new name of the file (a
    hard link) moves the time of change too, so a check while a file is served leaves it out.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The stamp in a stat result."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    @classmethod
    def at(cls, path: Path) -> Self:
        """The stamp of the file at `path`, through links. Raises SourceChanged if it cannot be read."""
        try:
            return cls.of(os.stat(path))
        except FileNotFoundError as error:
            raise SourceChanged(path, "it is gone") from error
        except OSError as error:
            raise SourceChanged(path, f"its status cannot be read: {error.strerror}") from error

    def check(self, path: Path, fd: int) -> None:
        """Raises SourceChanged unless both the file named `path` and the open file `fd` have this stamp.

        The name is checked because a directory with a replaced file is another model, `fd` because it is read.
        """
        self.demand(path, Stamp.at(path))
        self.check_open(path, fd)

    def check_open(self, path: Path, fd: int) -> None:
        """Raises SourceChanged for `path` unless the open file `fd`, which may have been moved, has this stamp."""
        self.demand(path, Stamp.of(os.fstat(fd)))

    def demand(self, path: Path, found: Stamp) -> None:
        """Raises SourceChanged for `path` unless the found stamp is this one; the time of change may differ."""
        if found.inode != self.inode:
            raise SourceChanged(path, "another file took its place")
        if found.size != self.size:
            raise SourceChanged(path, f"{self.size} bytes became {found.size}")
        if found.mtime_ns != self.mtime_ns:
            raise SourceChanged(path, "it was written to")


class ConfinedDirectory:
    """An open directory; paths inside it are resolved without following symbolic links. `path` is for messages.

    Paths are relative, with `/`. Methods raise StoreConflict for a link or file in place of a directory, and OSError.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens `path` through links: the user chose this name."""
        return cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self.fd)

    def enter(self, path: str, *, make: bool = False) -> ConfinedDirectory:
        """Opens the directory at `path`, '' for this one; the caller closes it. `make` creates missing directories."""
        here = ConfinedDirectory(self.path, os.dup(self.fd))
        for name in path.split("/") if path else ():
            with contextlib.closing(here):
                here = here._child(name, make=make)
        return here

    def make(self, name: str) -> bool:
        """Makes a subdirectory; False if the name is taken."""
        try:
            os.mkdir(name, dir_fd=self.fd)
        except FileExistsError:
            return False
        return True

    def lstat(self, path: str) -> os.stat_result | None:
        """Status of the entry at `path`, links not followed; None if there is none."""
        try:
            with self._parent(path) as (parent, name):
                return os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open_file(self, path: str, flags: int, *, make_parents: bool = False) -> int:
        """Opens the regular file at `path` and returns its descriptor. Raises StoreConflict for any other entry."""
        with self._parent(path, make=make_parents) as (parent, name):
            # O_NONBLOCK: opening a pipe would wait for its other end.
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
                # A rename would replace an existing file; a hard link fails instead.
                os.link(name, name, src_dir_fd=source.fd, dst_dir_fd=goal.fd, follow_symlinks=False)
            except FileExistsError:
                raise
            except OSError:
                # No hard links on this file system. Microseconds remain between the check and the rename.
                if target.lstat(path) is not None:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
                os.rename(name, name, src_dir_fd=source.fd, dst_dir_fd=goal.fd)
            else:
                os.unlink(name, dir_fd=source.fd)

    def unlink(self, path: str) -> None:
        """Removes a file if it exists."""
        with contextlib.suppress(FileNotFoundError), self._parent(path) as (parent, name):
            os.unlink(name, dir_fd=parent.fd)

    def remove_tree(self, name: str) -> None:
        """Removes a subdirectory with its contents, as far as possible: NFS keeps files that are open."""
        shutil.rmtree(name, dir_fd=self.fd, ignore_errors=True)  # with dir_fd it follows no links

    def remove_if_empty(self, name: str) -> None:
        """Removes a subdirectory if it is empty and can be removed."""
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=self.fd)

    def demand_room(self, need_bytes: int, need_inodes: int) -> None:
        """Raises StoreFull if fewer bytes or inodes are free, as far as the file system reports them."""
        room = os.statvfs(self.fd)
        free_bytes = room.f_bavail * room.f_frsize
        if room.f_blocks and need_bytes > free_bytes:
            raise StoreFull(self.path, need_bytes=need_bytes, free_bytes=free_bytes)
        if room.f_files and need_inodes > room.f_favail:
            why = f"{need_inodes} new files and directories are needed and {room.f_favail} inodes are free"
            raise StoreFull(self.path, need_bytes=need_bytes, free_bytes=free_bytes, why=why)

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


class OpenFiles:
    """Files of a store by number: opened when they are needed, and kept open as far as the process may.

    A lent descriptor stays open. Beyond the budget of the process (the soft limit without `DESCRIPTORS_SPARE`, at least
    half of it) the file that was not in use for longest is closed, of any store. Thread-safe.
    """

    # Of all stores:

    _lock: ClassVar = threading.RLock()  # reentrant: the garbage collector may end a `lend` at any moment
    _unused: ClassVar[OrderedDict[tuple[OpenFiles, int], None]] = OrderedDict()  # the longest unused first
    _open: ClassVar = 0

    def __init__(self, opener: Callable[[int], int]) -> None:
        self._opener = opener
        self._opening = threading.Lock()
        self._files: dict[int, list[int]] = {}  # by number: descriptor, count of users

    @contextlib.contextmanager
    def lend(self, number: int) -> Iterator[int]:
        """The descriptor of a file while the block runs. Raises as the opener does."""
        file = self._taken(number) or self._opened(number)
        try:
            yield file[0]
        finally:
            with OpenFiles._lock:
                file[1] -= 1
                if not file[1] and self._files.get(number) is file:
                    OpenFiles._unused[self, number] = None
                    self._shrink()

    def visit(self, look: Callable[[int, int], object]) -> None:
        """Calls `look(number, descriptor)` for each open file; none is closed meanwhile."""
        with OpenFiles._lock:
            for number, (fd, _) in list(self._files.items()):
                look(number, fd)

    def close(self) -> None:
        """Closes all files, lent ones too."""
        with OpenFiles._lock:
            for number in list(self._files):
                self._close(number)

    def _taken(self, number: int) -> list[int] | None:
        with OpenFiles._lock:
            if file := self._files.get(number):
                file[1] += 1
                OpenFiles._unused.pop((self, number), None)
            return file

    def _opened(self, number: int) -> list[int]:
        with self._opening:  # a file is open once: a second description would break its lease
            if file := self._taken(number):  # another thread has opened it meanwhile
                return file
            try:
                fd = self._opener(number)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                with OpenFiles._lock:
                    self._shrink(0)
                fd = self._opener(number)
            with OpenFiles._lock:
                file = self._files[number] = [fd, 1]
                OpenFiles._open += 1
                self._shrink()
        return file

    @staticmethod
    def _shrink(most: int | None = None) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if most is None:
            most = OpenFiles._open if soft == resource.RLIM_INFINITY else max(soft // 2, soft - DESCRIPTORS_SPARE)
        while OpenFiles._open > most and OpenFiles._unused:
            (owner, number), _ = OpenFiles._unused.popitem(last=False)
            owner._close(number)

    def _close(self, number: int) -> None:
        OpenFiles._unused.pop((self, number), None)
        if file := self._files.pop(number, None):
            OpenFiles._open -= 1
            os.close(file[0])


def _new_lock() -> None:
    """In a forked child: the thread that held the lock does not exist there."""
    OpenFiles._lock = threading.RLock()


os.register_at_fork(after_in_child=_new_lock)


class Writeback:
    """Starts `sync(file)` while more data arrives, every WRITEBACK_BYTES of a file. Thread-safe; `close` comes last.

    `sync` blocks until the data of the file with this number is on the disk, and raises OSError.
    """

    def __init__(self, sync: Callable[[int], None]) -> None:
        self._sync = sync
        self._flusher = ThreadPoolExecutor(WRITEBACK_THREADS, thread_name_prefix="swarm-writeback")
        self._flushes: list[Future[None]] = []
        self._waiting_bytes: Counter[int] = Counter()  # by file
        self._lock = threading.Lock()

    def wrote(self, file: int, size: int) -> None:
        """Counts `size` written bytes; does not block."""
        with self._lock:
            self._waiting_bytes[file] += size
            if self._waiting_bytes[file] >= WRITEBACK_BYTES:
                self._waiting_bytes[file] = 0
                self._flushes.append(self._flusher.submit(self._sync, file))

    def flush(self, files: Sequence[int]) -> None:
        """Blocks until all data of these files is on the disk. Raises OSError if this flush or an earlier one failed.

        Each later call raises it again: the kernel reports a lost write only once.
        """
        with self._lock:
            self._flushes += [self._flusher.submit(self._sync, file) for file in files]
            flushes = tuple(self._flushes)
        for flush in flushes:
            flush.result()

    def close(self) -> None:
        """Waits for running flushes and cancels queued flushes."""
        self._flusher.shutdown(cancel_futures=True)


@contextlib.contextmanager
def store_errors(where: Path, *, need_bytes: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Raises StoreFull, StoreConflict or StoreError for an OSError. `need_bytes`: size of the write, for StoreFull."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full(where, need_bytes(), quota=error.errno == errno.EDQUOT) from error
        if error.errno in _IN_THE_WAY:
            raise StoreConflict(where, f"is in the way ({error.strerror}); move it away") from error
        name = error.filename
        subject = name if isinstance(name, str) and os.path.isabs(name) else where
        raise StoreError(
            f"{subject}: {error.strerror or error}; mend that or use another directory, then run again"
        ) from error


def reserve_descriptors(count: int) -> None:
    """Raises the soft limit of open files (RLIMIT_NOFILE), up to the hard limit, to allow `count` more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(os.listdir("/proc/self/fd")) + count + DESCRIPTORS_SPARE
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def next_data(fd: int, offset: int) -> float:
    """Offset of the next written byte (SEEK_DATA): inf if only a hole follows, `offset` without support for holes."""
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
    """Opens the file at `path`, made if missing, locks it as `lock_file` does, and returns its descriptor."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
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

    A reader of `path` sees the old file or the new file, never a part. When the block raises, the draft is removed.
    """
    draft = (draft_dir or path.parent) / f".new-{secrets.token_hex(8)}"
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def read_own(path: Path, *, bytes_max: int) -> bytes:
    """The content of a file that no other user can have written, unless that user is root.

    Raises PermissionError for a file of another user or one that others may write, and OSError.
    """
    return _read_regular(path, bytes_max, own=True)


def read_regular(path: Path, *, bytes_max: int) -> bytes:
    """The content of a file, by any user: it may lie where others can put a link, a pipe or an endless file.

    Raises OSError for anything else than a file of at most `bytes_max` bytes.
    """
    return _read_regular(path, bytes_max, own=False)


def demand_own(path: Path) -> None:
    """Raises StoreError for an entry that another user, unless that is root, owns or may write, and for a link."""
    with store_errors(path):
        status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or _is_foreign(status):
        raise StoreError(f"{path}: another user can change it; remove it, or set SWARM_CACHE to a place of your own")


def _is_foreign(status: os.stat_result) -> bool:
    return status.st_uid not in (0, os.geteuid()) or bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _read_regular(path: Path, bytes_max: int, *, own: bool) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if own and _is_foreign(status):
            raise PermissionError(errno.EPERM, "another user can have written it")
        if not stat.S_ISREG(status.st_mode) or status.st_size > bytes_max:
            raise OSError(errno.EFBIG, f"it is not a file of at most {bytes_max} bytes")
        return file.read(bytes_max)


def remove_if_empty(place: Path) -> None:
    """Removes a directory if it is empty and can be removed."""
    with contextlib.suppress(OSError):
        place.rmdir()


def _full(where: Path, need_bytes: int, *, quota: bool) -> StoreFull:
    """What a failed write of `need_bytes` lacks, by the numbers of the file system."""
    room = _room(where)
    free_bytes = room.f_bavail * room.f_frsize if room else 0
    if quota:
        why = f"the disk quota is used up; {need_bytes} more bytes are needed"
    elif room and room.f_files and not room.f_favail:
        why = f"no inode is free for another file or directory, and {free_bytes} bytes are"
    elif need_bytes > free_bytes:
        why = ""
    else:
        why = f"there is no room for {max(need_bytes, 1)} more bytes, though {free_bytes} count as free"
    return StoreFull(where, need_bytes=need_bytes, free_bytes=free_bytes, why=why)


def _room(where: Path) -> os.statvfs_result | None:
    for place in (where, *where.parents):
        with contextlib.suppress(OSError):
            return os.statvfs(place)
    return None
