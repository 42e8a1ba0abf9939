"""A journal as a file of JSON lines: `swarm fetch --trace FILE`.

The event loop only queues entries; a thread encodes and writes them. Bounded: if the disk is too slow, or the file is
full, entries are dropped and the last line counts them.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import CHUNKS_MAX
from swarm.errors import StoreError
from swarm.journal import (
    ArtifactsAnnounced,
    Entry,
    FetchEnded,
    FetchStarted,
    Joined,
    Journal,
    Left,
    Opened,
    OriginListed,
    OriginRead,
    Received,
    Resolved,
    Sent,
    weight,
)
from swarm.membership.swim_events import MemberChanged
from swarm.observe.fetch_record import TRANSFER_EVENTS
from swarm.transfer.download_events import PeerHas, PeerJoined, PeerLeft

QUEUED_MAX = 100_000
QUEUED_BYTES_MAX = 64 << 20
FILE_BYTES_MAX = 1 << 30
LINE_BYTES_MAX = 16 << 20  # of a file that is read; news of all chunks of the largest artifact take 8 MB
WRITE_EVERY_S = 0.5

_REPLAYED: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        ArtifactsAnnounced, FetchEnded, FetchStarted, Joined, Left, MemberChanged, Opened, OriginListed, OriginRead,
        PeerHas, PeerJoined, PeerLeft, Received, Resolved, Sent, *TRANSFER_EVENTS,
    )
}  # fmt: skip


def event(entry: Entry) -> dict[str, Any]:
    """An entry as a JSON object: `at_s`, `subject`, `event` (its class), and the fields of the event."""
    fields = msgspec.to_builtins(entry.event, enc_hook=_encoded)
    return {"at_s": round(entry.at_s, 6), "subject": entry.subject, "event": type(entry.event).__name__, **fields}


def entry(line: Mapping[str, Any]) -> Entry | None:
    """The entry of a line that `event` made; None for a class that replays do not need.

    Raises ValueError or KeyError if it is no line of a trace.
    """
    kind = _REPLAYED.get(line["event"])
    if kind is None:
        return None
    event: Any = msgspec.convert(line, kind, dec_hook=_decoded)
    if isinstance(event, FetchStarted):
        _check(event)
    return Entry(float(line["at_s"]), str(line["subject"]), event)


def _check(started: FetchStarted) -> None:
    """A reader makes room for every chunk, and a trace may come from anywhere. Raises ValueError."""
    if not 0 <= started.chunks_total <= CHUNKS_MAX:
        raise ValueError(f"a fetch of {started.chunks_total} chunks; a manifest has at most {CHUNKS_MAX}")
    if any(first < 0 or count < 0 or first + count > started.chunks_total for first, count in started.held):
        raise ValueError(f"a fetch that holds chunks beyond its {started.chunks_total}")


def _encoded(value: object) -> Any:
    """A bitfield as `chunks_total` and its bits in hexadecimal, chunk 0 first; other values as text."""
    if isinstance(value, Bitfield):
        return {"chunks_total": value.length, "held": value.pack().hex()}
    return str(value)


def _decoded(kind: type, value: Any) -> Any:
    if kind is not Bitfield or not isinstance(value, Mapping):
        raise ValueError(f"no {kind.__name__}: {value!r}")
    return Bitfield.unpack(bytes.fromhex(value["held"]), msgspec.convert(value["chunks_total"], int))


@contextlib.contextmanager
def tracing(journal: Journal, path: Path | None) -> Iterator[None]:
    """Writes the entries that are recorded while the block runs. Without a path it writes none.

    Raises StoreError if the file cannot be written.
    """
    if path is None:
        yield
        return
    try:
        file = path.open("wb")
    except OSError as error:
        raise StoreError(f"{path}: no trace can be written there: {error.strerror}") from error
    with file:
        writer = _Writer(file)
        journal.subscribe(writer.queue)
        try:
            yield
        finally:
            writer.close()


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a trace. Raises OSError, and ValueError for another kind of file, or one without end."""
    read_bytes = 0
    with path.open("rb") as file:
        while line := file.readline(LINE_BYTES_MAX + 1):
            read_bytes += len(line)
            if len(line) > LINE_BYTES_MAX:
                raise ValueError(f"a line of more than {LINE_BYTES_MAX} bytes")
            if read_bytes > FILE_BYTES_MAX + LINE_BYTES_MAX:
                raise ValueError(f"more than {FILE_BYTES_MAX} bytes")
            if line.endswith(b"\n"):  # a killed process may leave the last line cut
                yield _line_decoder.decode(line)


_line_decoder = msgspec.json.Decoder(dict[str, Any])


class _Writer:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._queued: deque[Entry] = deque()
        self._left_out = 0
        self._queued_bytes, self._taken_bytes = 0, 0  # in all; one is counted by the loop, the other by the thread
        self._written_bytes = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="swarm: trace", daemon=True)
        self._thread.start()

    def queue(self, entry: Entry) -> None:
        if self._closed.is_set():
            return
        size = weight(entry.event)
        if len(self._queued) < QUEUED_MAX and self._queued_bytes + size - self._taken_bytes <= QUEUED_BYTES_MAX:
            self._queued_bytes += size
            self._queued.append(entry)
        else:
            self._left_out += 1

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(WRITE_EVERY_S):
            self._write()
        self._write()
        if self._left_out:
            self._put({"event": "LeftOut", "entries": self._left_out})
            with contextlib.suppress(OSError):
                self._file.flush()

    def _write(self) -> None:
        while self._queued:
            entry = self._queued.popleft()
            self._taken_bytes += weight(entry.event)
            if self._written_bytes > FILE_BYTES_MAX:
                self._left_out += 1
            else:
                self._put(event(entry))
        with contextlib.suppress(OSError):
            self._file.flush()

    def _put(self, fields: dict[str, Any]) -> None:
        line = msgspec.json.encode(fields) + b"\n"
        self._written_bytes += len(line)
        try:
            self._file.write(line)
        except OSError:  # the disk is full: a trace is not worth a fetch
            self._left_out += 1
