"""Second copies of verified files: the blocks are shared where the file system can (reflink), copied elsewhere.

A hard link would be cheaper and is not made: a program that edits the one would change the other.

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
from swarm.store.file_errors import store_errors
from swarm.store.stamp import Stamp

FICLONE = 0x40049409  # <linux/fs.h>
COPY_BYTES = 64 << 20
_CANNOT = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}


def clone(source: Path, stamp: Stamp, target: Path, *, draft: Path, fsync: bool) -> None:
    """Makes `target` a file with the bytes that `source` has while it has this stamp; `draft` is on the same disk.

    A target with the same bytes stays. Raises SourceChanged if the source is another one, StoreConflict if the target
    has other content, StoreFull and StoreError.
    """
    with store_errors(target, need_bytes=lambda: stamp.size), source.open("rb", buffering=0) as reading:
        stamp.check_open(source, reading.fileno())
        if os.path.lexists(target):
            same = target.is_file() and not target.is_symlink() and filecmp.cmp(source, target, shallow=False)
            stamp.check_open(source, reading.fileno())
            if not same:
                raise StoreConflict(target, "exists with other content; move it away or fetch to another directory")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb", buffering=0) as writing:
            if not _reflink(reading.fileno(), writing.fileno()):
                _copy(reading.fileno(), writing.fileno(), stamp.size)
            if fsync:
                os.fsync(writing.fileno())
        stamp.check_open(source, reading.fileno())
        os.link(draft, target)  # unlike a rename, never over a file
        draft.unlink()


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
