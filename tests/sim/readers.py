"""Readers of one origin under a virtual clock: the real `OriginReads` of each node, in steps of `STEP_S`.

The origin shares `total` evenly among its connections, each at most `each`. A node tells the others after `delay_s`
which ranges it has begun and ended, and which chunks it has read: when a range ends, and every `HAVE_S` in between.
Nodes may die, be slow, be refused by the origin, come late, or not know each other until `meet_s`. With `uneven`,
connections of different nodes get different parts of `total`, as TCP shares a bottleneck, drawn again every `UNEVEN_S`.

Must not know: how the machine decides; it reads the ranges that it returns.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from swarm.content.manifest import Manifest
from swarm.content.promise import ListedFile, Listing, promise
from swarm.protocol.messages import NodeId
from swarm.transfer.origin_driver import POLL_S
from swarm.transfer.origin_reads import STREAMS_MAX, OriginReads, ReadRange

STEP_S = 0.05
REQUEST_S = 0.1  # until the first byte of a request arrives
HAVE_S = 0.5
UNEVEN_S = 10.0

Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass
class Reader:
    """A node: `slow` is the part of a connection's rate that it gets, 0 for a node that the origin refuses."""

    name: NodeId
    reads: OriginReads
    held: Mask
    slow: float = 1.0
    starts_s: float = 0.0
    dies_s: float = float("inf")
    group: int = 0
    got: dict[int, float] = field(default_factory=dict)  # bytes of the chunk on the wire, by stream
    open_at: dict[int, float] = field(default_factory=dict)
    progress_s: float = 0.0
    looks_s: float = 0.0  # for something to read
    haves_s: float = 0.0
    ended: bool = False  # a range, which is not told yet
    ranges: Sequence[tuple[int, int]] = ()  # as it has told them
    told: Mask = field(default_factory=lambda: np.zeros(0, np.bool_))  # chunks and ranges that others know of
    told_ranges: Sequence[tuple[int, int]] = ()
    met: set[NodeId] = field(default_factory=set)


@dataclass
class Play:
    """One run. `wire_bytes` went out of the origin, `requests` were made, `ended_s` is when every chunk was read."""

    size: int
    readers: list[Reader]
    manifest: Manifest
    total: float
    each: float
    dice: random.Random
    uneven: float = 0.0  # sigma of the logarithm of a node's weight
    delay_s: float = 0.05
    meet_s: float = 0.0
    wire_bytes: float = 0.0
    requests: int = 0
    ended_s: float = 0.0

    def __post_init__(self) -> None:
        self._told: list[tuple[float, int, Reader, Mask, Sequence[tuple[int, int]]]] = []  # on its way
        self._numbers = itertools.count()
        self._gone: set[NodeId] = set()
        self._weights: dict[NodeId, float] = {}
        self._weighed_s = 0.0

    @property
    def copies(self) -> float:
        return self.wire_bytes / self.size

    def run(self, limit_s: float = 600.0) -> Play:
        now = 0.0
        while now < limit_s:
            alive = [r for r in self.readers if r.starts_s <= now < r.dies_s]
            if all(np.all(r.held | self._elsewhere(r, now)) for r in alive) and alive:
                self.ended_s = now
                return self
            self._step(alive, now)
            now += STEP_S
        raise AssertionError(f"not read after {limit_s} s")

    def _linked(self, one: Reader, other: Reader, now: float) -> bool:
        return one.group == other.group or now >= self.meet_s

    def _elsewhere(self, reader: Reader, now: float) -> Mask:
        """The chunks that a node lacks and that one of its living peers has told it of."""
        known = np.zeros(len(reader.held), np.bool_)
        for other in self.readers:
            if other is not reader and other.name in reader.met and now < other.dies_s:
                known |= other.told
        return known & ~reader.held

    def _step(self, alive: list[Reader], now: float) -> None:
        self._meet(alive, now)
        self._deliver(alive, now)
        for reader in alive:
            reader.reads.watch(now, missing=~reader.held, elsewhere=self._elsewhere(reader, now))
            if now >= reader.looks_s:
                reader.looks_s = now + POLL_S
                self._plan(reader, now)
        if now >= self._weighed_s:
            self._weighed_s = now + UNEVEN_S
            self._weights = {r.name: self.dice.lognormvariate(0, self.uneven) for r in self.readers}
        streams = [(r, n, span) for r in alive if r.slow > 0 for n, span in r.reads.own.items() if r.open_at[n] <= now]
        weights = sum(self._weights[reader.name] for reader, _, _ in streams)
        for reader, number, span in streams:
            share = min(self.each, self.total * self._weights[reader.name] / weights)
            self._pour(reader, number, span, share * reader.slow * STEP_S, now)
        for reader in alive:
            if now >= reader.haves_s:
                self._tell(reader, now, reader.ranges)

    def _meet(self, alive: list[Reader], now: float) -> None:
        for reader in self.readers:
            if now >= reader.dies_s and reader.name not in self._gone:
                self._gone.add(reader.name)
                for other in alive:
                    other.reads.left(reader.name)
                    other.looks_s = now
        for reader in alive:
            mates = [r for r in alive if r is not reader and self._linked(reader, r, now)]
            reader.reads.met([r.name for r in mates])
            for mate in mates:
                if mate.name not in reader.met:
                    reader.met.add(mate.name)
                    reader.reads.told(mate.name, mate.slow > 0, mate.ranges, now)

    def _tell(self, reader: Reader, now: float, ranges: Sequence[tuple[int, int]]) -> None:
        reader.haves_s = now + HAVE_S
        reader.ranges = ranges
        heapq.heappush(self._told, (now + self.delay_s, next(self._numbers), reader, reader.held.copy(), ranges))

    def _deliver(self, alive: list[Reader], now: float) -> None:
        while self._told and self._told[0][0] <= now:
            _, _, reader, held, ranges = heapq.heappop(self._told)
            changed, progressed = ranges != reader.told_ranges, bool(np.any(held & ~reader.told))
            reader.told, reader.told_ranges = held, ranges
            for other in alive:
                if reader.name not in other.met or reader.name in self._gone:
                    continue
                if progressed:
                    other.progress_s = now  # it gets these chunks soon
                if changed:
                    other.reads.told(reader.name, reader.slow > 0, ranges, now)
                    other.looks_s = now

    def _plan(self, reader: Reader, now: float) -> None:
        if reader.slow <= 0:
            return
        elsewhere = self._elsewhere(reader, now)
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
        if reader.ended or any(span.since == now for span in reader.reads.own.values()):
            reader.ended = False
            self._tell(reader, now, reader.reads.ranges())

    def _pour(self, reader: Reader, number: int, span: ReadRange, size: float, now: float) -> None:
        self.wire_bytes += size
        reader.got[number] += size
        elsewhere = self._elsewhere(reader, now)
        while span.at < span.end and not (elsewhere[span.at] and not span.late):
            chunk = self.manifest.chunks[span.at]
            if reader.got[number] < chunk.size:
                return
            reader.got[number] -= chunk.size
            reader.held[span.at] = True
            reader.progress_s = now
            span.at += 1
        self.wire_bytes -= min(size, reader.got[number])  # the connection is closed
        reader.reads.ended(number, now)
        reader.looks_s, reader.ended = now, True  # its successor is told with its end


def play(
    dice: random.Random,
    *,
    nodes: int,
    sizes: Sequence[int] = (128 << 20,) * 8,
    total: float = 100e6,
    each: float = 1e12,
    readers_max: int | None = None,
) -> Play:
    """A run that has not begun: change its readers, then `run` it."""
    manifest = promise(
        Listing("o", "", tuple(ListedFile(f"f{n:04}", s, "sha256:" + "a" * 64) for n, s in enumerate(sizes)))
    )
    names = [NodeId(f"{dice.getrandbits(64):016x}") for _ in range(nodes)]
    nothing = np.zeros(len(manifest.chunks), np.bool_)
    readers = [
        Reader(name, OriginReads(manifest, node=name, readers_max=readers_max), nothing.copy(), told=nothing.copy())
        for name in names
    ]
    return Play(sum(sizes), readers, manifest, total, each, dice)
