"""Small files where other users may write too: read with bounds on size and owner, replaced as a whole.

A record that vouches for content counts only if no other user can have written it. Any other file may be a link, a pipe
or endless.

Must not know: the contents.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from swarm.errors import SourceChanged, StoreError
from swarm.store.file_errors import store_errors


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


def open_regular(path: Path, *, buffering: int = -1) -> BinaryIO:
    """A file, open for reading, through links. Raises OSError for anything else: a pipe would wait for its writer."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return open(fd, "rb", buffering=buffering)


def demand_there(path: Path, fd: int) -> None:
    """Raises SourceChanged unless an open file lies at `path`, whose links were resolved: who may write to a directory
    on the way could have exchanged it for a link since."""
    with contextlib.suppress(OSError):  # without /proc
        there = os.readlink(f"/proc/self/fd/{fd}")
        if there != str(path):
            raise SourceChanged(path, f"it is {there} now")


def write_new(path: Path, data: bytes) -> None:
    """Makes a file. Raises FileExistsError for whatever lies there, and OSError."""
    with path.open("xb") as file:
        file.write(data)


def demand_own(path: Path) -> None:
    """Raises StoreError for an entry that another user, unless that is root, owns or may write, and for a link."""
    with store_errors(path):
        status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or _is_foreign(status):
        raise StoreError(f"{path}: another user can change it; remove it, or set SWARM_CACHE to a place of your own")


def close_to_others(folder: Path) -> None:
    """Makes a directory of this user one for this user alone: volumes of pods are opened to a group. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o700)
    finally:
        os.close(fd)


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
