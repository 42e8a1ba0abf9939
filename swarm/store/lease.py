"""Sole use of files: whether another program can have changed a file since this process opened it.

A write lease (`F_SETLEASE` of fcntl(2)) is granted while no other open file or mapping refers to the file. A program
that opens or truncates it afterwards, under any of its names, waits until the holder gives the lease up, or for 45 s
(/proc/sys/fs/lease-break-time). So a file whose lease was never broken has only this process's bytes, and needs no
second look at 100 GB.

    lease taken ── write, write, write ──> still there: sole use          broken, refused, opened twice: exposed

Network file systems, FUSE and some sandboxes grant no lease: their files count as exposed.

Must not know: chunks, hash functions, what is done about an exposed file.
"""

from __future__ import annotations

import contextlib
import fcntl
import signal
import threading

from swarm.store.open_files import OpenFiles

LOOK_EVERY_S = 0.1  # a program that opens a leased file waits so long at most


class SoleUse:
    """The files of one store by number, in `files`. Thread-safe. `close` before the files."""

    def __init__(self, files: OpenFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen: set[int] = set()  # opened once
        self._leased: set[int] = set()
        self._closed = threading.Event()
        self._watch: threading.Thread | None = None

    def opened(self, number: int, fd: int) -> None:
        """A file was opened. At the second time it is exposed: it had no lease in between."""
        with self._lock:
            if number in self._seen or not _take(fd):
                self._leased.discard(number)
            else:
                self._leased.add(number)
            self._seen.add(number)
            if self._leased and self._watch is None:
                self._watch = threading.Thread(target=self._look, name="swarm-lease", daemon=True)
                self._watch.start()

    def exposed(self, number: int, fd: int) -> bool:
        """Whether another program can have changed the file."""
        with self._lock:
            return number not in self._leased or not _holds(fd)

    def give_up(self, number: int, fd: int) -> None:
        """Lets other programs open the file; it is exposed from now on."""
        with self._lock:
            if number in self._leased:
                self._leased.remove(number)
                _release(fd)

    def close(self) -> None:
        """Ends the watch. The leases end with their files."""
        self._closed.set()
        if self._watch:
            self._watch.join()

    def _look(self) -> None:
        """Gives up the leases that other programs wait for."""
        while not self._closed.wait(LOOK_EVERY_S):
            self._files.visit(self._look_at)

    def _look_at(self, number: int, fd: int) -> None:
        if number in self._leased and not _holds(fd):
            self.give_up(number, fd)


def _take(fd: int) -> bool:
    try:
        # The kernel tells of a broken lease by SIGIO, which ends a process that does not handle it. SIGURG is ignored.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETOWN, 0)  # and no process is told: a program may handle SIGURG
    except OSError:
        return False
    return True


def _holds(fd: int) -> bool:
    try:
        return fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK
    except OSError:
        return False


def _release(fd: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
