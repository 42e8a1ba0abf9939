"""Flushes files to the disk while their data still arrives.

Must not know: which files, and how they are opened.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

WRITEBACK_BYTES = 64 << 20  # at most a second of a slow disk's time remains when the last chunk arrives
WRITEBACK_THREADS = 4


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
