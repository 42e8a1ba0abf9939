"""The open files of all stores, within the limit of the process for descriptors.

Must not know: what the files are, where they lie.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import ClassVar

DESCRIPTORS_SPARE = 256  # for sockets, logs and the host program


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


def reserve_descriptors(count: int) -> None:
    """Raises the soft limit of open files (RLIMIT_NOFILE), up to the hard limit, to allow `count` more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:  # no descriptor is left for the listing itself
        used = soft
    wanted = used + count + DESCRIPTORS_SPARE
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
