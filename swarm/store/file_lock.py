"""Locks of files between processes, by flock(2).

The package filelock does not fit. A held cache entry needs a shared lock that survives exec, and a store opens its lock
file relative to a directory; filelock has exclusive locks of paths only.

Must not know: what a lock protects.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

LOCK_POLL_S = 0.05


def lock_file(fd: int, path: Path, *, shared: bool = False, timeout_s: float | None = None) -> None:
    """Takes the flock(2) of the open file `fd`, named `path`, until it is closed or the process ends.

    `timeout_s` None waits for ever, 0 not at all. Raises BlockingIOError at the timeout, and FileNotFoundError when
    `path` was removed meanwhile: the next process would lock another file.
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
