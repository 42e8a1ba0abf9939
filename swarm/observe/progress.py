"""The progress of a fetch for its caller: `Progress` objects for a callback, and a bar in terminals and notebooks.

The caller's own thread, or event loop, looks about ten times a second and calls back: a callback may touch what belongs
to it. Reads the record that the node's loop writes; numbers may be as old as one look.

Must not know: how a fetch runs.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from swarm.content.manifest import Digest
from swarm.errors import clean
from swarm.observe.fetch_record import FetchRecords
from swarm.observe.rate import Rate
from swarm.observe.units import count, size_text

LOOK_EVERY_S = 0.1
BAR_CELLS = 20
COLUMNS_LEAST = 20


@dataclass(frozen=True)
class Progress:
    """How far a fetch is.

    `bytes_total`: bytes of the wanted part, 0 until the model is found. `bytes_done`: those verified, with those that
    were here before. `rate_bytes_per_s`: over the last 5 s. `peers`: the number that sent a chunk. `eta_s`: seconds
    left at this rate, None while nothing arrives. `done`: in the last call, after the fetch has succeeded. `origin`:
    the name of the origin that chunks were read from, empty for none.
    """

    model_id: str
    bytes_done: int = 0
    bytes_total: int = 0
    rate_bytes_per_s: float = 0.0
    peers: int = 0
    eta_s: float | None = None
    done: bool = False
    origin: str = ""

    @property
    def sources(self) -> str:
        """Peers and origin, in words."""
        peers = [count(self.peers, "peer")] if self.peers or not self.origin else []
        return " and ".join([*([self.origin] if self.origin else []), *peers])


ShowProgress: TypeAlias = "Callable[[Progress], object] | bool | None"


class ProgressWatch:
    """Looks at a fetch and calls back. `resolved` is called on the node's loop, `look` by the caller of the fetch."""

    def __init__(self, model_id: str, call: Callable[[Progress], object], *, ended: Callable[[], object]) -> None:
        self._model_id = model_id
        self._call = call
        self._ended = ended
        self._found: tuple[FetchRecords, Digest, int] | None = None
        self._rate = Rate()
        self._done_bytes = 0

    def resolved(self, fetches: FetchRecords, digest: Digest, size: int) -> None:
        """The fetch of `size` bytes of this artifact begins."""
        self._rate = Rate(time.monotonic())
        self._found = fetches, digest, size

    def look(self, *, done: bool = False) -> None:
        """Calls back with the present state."""
        self._call(self._state(done=done))

    def end(self) -> None:
        """The fetch has ended, well or not."""
        self._ended()

    def _state(self, *, done: bool) -> Progress:
        if self._found is None:
            return Progress(self._model_id, done=done)
        fetches, digest, size = self._found
        record, now = fetches.records.get(digest), time.monotonic()
        if record is None or not (record.running or done):
            return Progress(self._model_id, size if done else 0, size, done=done)
        received = record.received_bytes
        if received > self._done_bytes:
            self._rate.add(now, received - self._done_bytes)
        self._done_bytes = received
        here = size if done else min(size, record.resumed_bytes + received)
        rate = self._rate.at(now)
        sent = [source for source in list(record.sources.values()) if source.chunks > 0]
        peers, origin = sum(not source.origin for source in sent), next((s.name for s in sent if s.origin), "")
        eta_s = (size - here) / rate if rate > 0 else None
        return Progress(self._model_id, here, size, rate, peers, eta_s, done, clean(origin))


def watch(model_id: str, show: ShowProgress) -> ProgressWatch | None:
    """The watch for the argument `progress` of a fetch: a callback, False for none, None for a bar where one fits."""
    if callable(show):
        return ProgressWatch(model_id, show, ended=lambda: None)
    if show is False or not (show or draws_bars()):
        return None
    bar = Bar()
    return ProgressWatch(model_id, bar.show, ended=bar.end)


def draws_bars() -> bool:
    """Whether standard error is a terminal that can redraw a line, or a notebook's."""
    terminal = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return terminal or in_notebook()


def in_notebook() -> bool:
    """Whether this is the kernel of a notebook, whose cells run inside an event loop."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython and hasattr(ipython, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None


class Bar:
    """A line on standard error that is drawn over itself; it stays when the fetch has ended."""

    def __init__(self) -> None:
        self._drawn = 0  # characters

    def show(self, progress: Progress) -> None:
        """Draws the line."""
        line = self._line(progress)[: max(COLUMNS_LEAST, shutil.get_terminal_size().columns - 1)]
        sys.stderr.write("\r" + line.ljust(self._drawn))
        sys.stderr.flush()
        self._drawn = len(line)

    def end(self) -> None:
        """Leaves the line."""
        if self._drawn:
            sys.stderr.write("\n")
            sys.stderr.flush()

    def _line(self, progress: Progress) -> str:
        name = clean(progress.model_id, chars_max=40)
        if progress.done:
            return f"{name}: {size_text(progress.bytes_total)}, verified, from {progress.sources}"
        if not progress.bytes_total:
            return f"{name}: looking for peers"
        part = progress.bytes_done / progress.bytes_total
        bar = "#" * int(part * BAR_CELLS)
        left = "waiting" if progress.eta_s is None else f"{progress.eta_s:.0f} s left"
        sizes = f"{size_text(progress.bytes_done)} of {size_text(progress.bytes_total)}"
        rate = f"{size_text(progress.rate_bytes_per_s)}/s"
        return f"{name}: [{bar:-<{BAR_CELLS}}] {part:4.0%} {sizes}, {rate}, {progress.sources}, {left}"
