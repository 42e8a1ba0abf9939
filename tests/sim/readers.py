"""Readers of one origin under a virtual clock: the real `OriginReads` of each node, in steps of `STEP_S`.

The origin shares `total` evenly among its connections, each at most `each`. A node gets what others have read after
`delay_s`, as its peers announce it. Nodes may die, be slow, be refused by the origin, come late, or not know each other
until `meet_s`.

Must not know: how the machine decides; it reads the ranges that it returns.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from swarm.content.manifest import Manifest
from swarm.content.promise import ListedFile, Listing, promise
from swarm.protocol.messages import NodeId
from swarm.transfer.origin_reads import STREAMS_MAX, OriginReads, ReadRange

STEP_S = 0.05
REQUEST_S = 0.1  # until the first byte of a request arrives


@dataclass
class Reader:
    """A node: `slow` is the part of a connection's rate that it gets, 0 for a node that the origin refuses."""

    name: NodeId
    reads: OriginReads
    held: np.ndarray[tuple[int], np.dtype[np.bool_]]
    slow: float = 1.0
    starts_s: float = 0.0
    dies_s: float = float("inf")
    group: int = 0
    got: dict[int, float] = field(default_factory=dict)  # bytes of the chunk on the wire, by stream
    open_at: dict[int, float] = field(default_factory=dict)
    progress_s: float = 0.0


@dataclass
class Play:
    """One run. `wire_bytes` went out of the origin, `requests` were made, `ended_s` is when every chunk was read."""

    size: int
    readers: list[Reader]
    manifest: Manifest
    total: float
    each: float
    delay_s: float = 0.05
    meet_s: float = 0.0
    wire_bytes: float = 0.0
    requests: int = 0
    ended_s: float = 0.0
    read_at: dict[int, dict[int, float]] = field(default_factory=dict)  # by chunk: group -> when it was read

    @property
    def copies(self) -> float:
        return self.wire_bytes / self.size

    def run(self, limit_s: float = 600.0) -> Play:
        now = 0.0
        while now < limit_s:
            alive = [r for r in self.readers if r.starts_s <= now < r.dies_s]
            if all(self._has(r, now).all() for r in alive) and alive:
                self.ended_s = now
                return self
            self._step(alive, now)
            now += STEP_S
        raise AssertionError(f"not read after {limit_s} s")

    def _linked(self, one: Reader, other: Reader, now: float) -> bool:
        return one.group == other.group or now >= self.meet_s

    def _has(self, reader: Reader, now: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """The chunks that a node or one of its living peers has read, as far as it knows."""
        known = reader.held.copy()
        for other in self.readers:
            if other is not reader and now < other.dies_s and self._linked(reader, other, now):
                known |= self._announced(other, now)
        return known

    def _announced(self, reader: Reader, now: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        key = id(reader)
        return (
            self._late[key][0]
            if key in self._late and now - self._late[key][1] < self.delay_s
            else self._renew(key, reader, now)
        )

    def _renew(self, key: int, reader: Reader, now: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        self._late[key] = reader.held.copy(), now
        return self._late[key][0]

    def __post_init__(self) -> None:
        self._late: dict[int, tuple[np.ndarray[tuple[int], np.dtype[np.bool_]], float]] = {}
        self._gone: set[int] = set()

    def _step(self, alive: list[Reader], now: float) -> None:
        for reader in self.readers:
            if now >= reader.dies_s and id(reader) not in self._gone:
                self._gone.add(id(reader))
                for other in alive:
                    other.reads.left(reader.name)
        for reader in alive:
            mates = [r for r in alive if r is not reader and self._linked(reader, r, now)]
            reader.reads.met([r.name for r in mates])
            for mate in mates:
                reader.reads.told(mate.name, mate.slow > 0, mate.reads.ranges(), now)
        for reader in alive:
            self._plan(reader, now)
        streams = [(r, n, span) for r in alive if r.slow > 0 for n, span in r.reads.own.items() if r.open_at[n] <= now]
        share = min(self.each, self.total / max(1, len(streams)))
        for reader, number, span in streams:
            self._pour(reader, number, span, share * reader.slow * STEP_S, now)

    def _plan(self, reader: Reader, now: float) -> None:
        if reader.slow <= 0:
            return
        elsewhere = self._has(reader, now) & ~reader.held
        for number in range(STREAMS_MAX):
            if number in reader.reads.own:
                continue
            missing, span = ~reader.held, None
            if number < reader.reads.streams:
                span = reader.reads.next(number, now, missing=missing, elsewhere=elsewhere)
            if span is None and number == 0 and not reader.reads.limited:
                span = reader.reads.late(0, now - max(reader.progress_s, reader.starts_s), missing & ~elsewhere)
            if span is not None:
                self.requests += 1
                reader.got[number], reader.open_at[number] = 0.0, now + REQUEST_S
            reader.reads.check()

    def _pour(self, reader: Reader, number: int, span: ReadRange, size: float, now: float) -> None:
        self.wire_bytes += size
        reader.got[number] += size
        elsewhere = self._has(reader, now)
        while span.at < span.end and not (elsewhere[span.at] and not span.late):
            chunk = self.manifest.chunks[span.at]
            if reader.got[number] < chunk.size:
                return
            reader.got[number] -= chunk.size
            reader.held[span.at] = True
            reader.progress_s = now
            span.at += 1
        self.wire_bytes -= reader.got[number]  # the connection is closed
        reader.reads.ended(number, now)


def play(
    dice: random.Random,
    *,
    nodes: int,
    size: int = 1 << 30,
    files: int = 8,
    total: float = 100e6,
    each: float = 1e12,
    readers_max: int | None = None,
) -> Play:
    """A run that has not begun: change its readers, then `run` it."""
    sizes = [size // files] * files
    manifest = promise(
        Listing("o", "", tuple(ListedFile(f"f{n:04}", s, "sha256:" + "a" * 64) for n, s in enumerate(sizes)))
    )
    names = [NodeId(f"{dice.getrandbits(64):016x}") for _ in range(nodes)]
    readers = [
        Reader(
            name, OriginReads(manifest, node=name, readers_max=readers_max), np.zeros(len(manifest.chunks), np.bool_)
        )
        for name in names
    ]
    return Play(sum(sizes), readers, manifest, total, each)
