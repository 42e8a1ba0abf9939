"""An OSError of the disk as an error of a store, with what it lacks and what to do.

Must not know: what is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from swarm.errors import StoreConflict, StoreError, StoreFull

_FULL = {errno.ENOSPC, errno.EDQUOT}
IN_THE_WAY = {errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EEXIST}


@contextlib.contextmanager
def store_errors(where: Path, *, need_bytes: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Raises StoreFull, StoreConflict or StoreError for an OSError. `need_bytes`: size of the write, for StoreFull."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _full(where, need_bytes(), quota=error.errno == errno.EDQUOT) from error
        if error.errno in IN_THE_WAY:
            raise StoreConflict(where, f"is in the way ({error.strerror}); move it away") from error
        name = error.filename
        subject = name if isinstance(name, str) and os.path.isabs(name) else where
        advice = "mend that or use another directory"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            advice = "allow more open files (`ulimit -n`)"
        raise StoreError(f"{subject}: {error.strerror or error}; {advice}, then run again") from error


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
