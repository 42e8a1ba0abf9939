"""Second copies of verified files: the blocks are shared where the file system can (reflink), copied elsewhere.

A hard link would be cheaper and is not made: a program that edits the one would change the other. The directory may be
shared with other users: no link in it is followed, nothing there is overwritten.

Must not know: manifests, where files come from.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import filecmp
import os
from pathlib import Path

from swarm.errors import StoreConflict
from swarm.store.confined_directory import ConfinedDirectory
from swarm.store.file_errors import store_errors
from swarm.store.own_files import open_regular
from swarm.store.stamp import Stamp

FICLONE = 0x40049409  # <linux/fs.h>
COPY_BYTES = 64 << 20
_CANNOT = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}


def clone(source: Path, stamp: Stamp, into: ConfinedDirectory, path: str, *, staged: str, fsync: bool) -> None:
    """Makes `path` in `into` a file with the bytes that `source` has while it has this stamp.

    `staged`: a directory there for unfinished files. A file with the same bytes stays. Raises SourceChanged if the
    source is another one, StoreConflict if another file or a link has its place, StoreFull and StoreError; and
    OSError if the source cannot be opened.
    """
    where = into.path / path
    with open_regular(source, buffering=0) as reading, store_errors(where, need_bytes=lambda: stamp.size):
        stamp.check_open(source, reading.fileno())
        if into.lstat(path) is not None:
            there = into.open_file(path, os.O_RDONLY)
            try:
                same = filecmp.cmp(source, f"/proc/self/fd/{there}", shallow=False)
            finally:
                os.close(there)
            stamp.check_open(source, reading.fileno())
            if not same:
                raise StoreConflict(where, "exists with other content; move it away or fetch to another directory")
            return
        with contextlib.closing(into.enter(staged, make=True)) as drafts:
            with open(drafts.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, make_parents=True), "wb") as writing:
                if not _reflink(reading.fileno(), writing.fileno()):
                    _copy(reading.fileno(), writing.fileno(), stamp.size)
                if fsync:
                    os.fsync(writing.fileno())
            stamp.check_open(source, reading.fileno())
            drafts.move(path, into)


def _reflink(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def _copy(source: int, target: int, size: int) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        os.posix_fallocate(target, 0, size)
    offset = 0
    while offset < size:
        try:
            done = os.copy_file_range(source, target, min(COPY_BYTES, size - offset), offset, offset)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            done = os.pwrite(target, os.pread(source, 1 << 20, offset), offset)
        if not done:
            raise OSError(errno.EIO, "the source became shorter")
        offset += done
