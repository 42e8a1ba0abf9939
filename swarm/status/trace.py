"""A journal as a file of JSON lines: `swarm fetch --trace FILE`.

Entries are only queued where they happen; a thread encodes and writes them. Bounded: when the disk cannot follow, or
the file is full, entries are left out and the last line says how many.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from swarm.errors import StoreError
from swarm.journal import Entry, Journal

QUEUED_MAX = 100_000
FILE_BYTES_MAX = 1 << 30
WRITE_EVERY_S = 0.5


def event(entry: Entry) -> dict[str, Any]:
    """An entry as an object of JSON: `at_s`, `subject`, `event` (what kind), and the fields of what happened."""
    fields = msgspec.to_builtins(entry.what, enc_hook=str)
    said = fields if isinstance(fields, dict) else {"said": fields}
    return {"at_s": round(entry.at_s, 6), "subject": entry.subject, "event": type(entry.what).__name__, **said}


@contextlib.contextmanager
def tracing(journal: Journal, path: Path | None) -> Iterator[None]:
    """Writes what happens while the block runs; without a path nothing. Raises StoreError if there can be no file."""
    if path is None:
        yield
        return
    try:
        file = path.open("wb")
    except OSError as error:
        raise StoreError(str(path), f"no trace can be written there: {error.strerror}") from error
    with file:
        writer = _Writer(file)
        journal.subscribe(writer.queue)
        try:
            yield
        finally:
            writer.close()


class _Writer:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._queued: deque[Entry] = deque()
        self._left_out = 0
        self._written_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="swarm: trace", daemon=True)
        self._thread.start()

    def queue(self, entry: Entry) -> None:
        if self._over.is_set():
            return
        if len(self._queued) < QUEUED_MAX:
            self._queued.append(entry)
        else:
            self._left_out += 1

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(WRITE_EVERY_S):
            self._write()
        self._write()
        if self._left_out:
            self._put({"event": "LeftOut", "entries": self._left_out})
            with contextlib.suppress(OSError):
                self._file.flush()

    def _write(self) -> None:
        while self._queued:
            entry = self._queued.popleft()
            if self._written_bytes > FILE_BYTES_MAX:
                self._left_out += 1
            else:
                self._put(event(entry))
        with contextlib.suppress(OSError):
            self._file.flush()

    def _put(self, said: dict[str, Any]) -> None:
        line = msgspec.json.encode(said) + b"\n"
        self._written_bytes += len(line)
        try:
            self._file.write(line)
        except OSError:  # the disk is full: a trace is not worth a fetch
            self._left_out += 1
