"""Which chunks a node reads from the origin, and when it stops: events in, ranges out.

All nodes that fetch a promised artifact read different parts of it, and take the rest from each other:

- A node starts at its rank among the readers, so that their parts are disjoint before any of them has said a word. A
  node that knows no other reader starts anywhere: two that have not met yet should not read the same.
- A model has parts of `PART_CHUNKS` chunks, and each reader has at least one: with more readers all chunks would be
  complete only at the end, and their exchange would begin there. Nodes of higher ranks read when no chunk comes.
- A read is one range of one file, about `RUN_BYTES` long: each is a rate-limited request at a hub. It goes on where
  the last one ended, then in the largest gap that no node reads, in its middle if another reader comes from below. A
  part is left to its reader if that reads it and will end soon, or has no link to this node: nothing is known of it.
- When no gap is left, the tail is stolen: an idle node takes the end of the range that would last longest, as much as
  lets both end together at their rates so far. The owner of a range that is overlapped from within stops there.
- Nothing is stolen while all reads together are about as fast as they have ever been: then the origin is the
  bottleneck, the streams that are left get the rate of those that have ended, and another request gains nothing.
- Streams that are idle at the same time choose in the order of their nodes, so that they choose different chunks.
- A chunk that a peer holds is not read: a member's copy beats the origin. A stream stops at such a chunk, so what lies
  behind it in its range is a gap.

`told` and `next` use the ranges that nodes announce to their peers (`messages.ReadRange`). A reader that dies gives its
range back with its link.

Must not know: sockets, clocks, files, claims.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from swarm.content.manifest import Manifest
from swarm.errors import LocalProtocolError
from swarm.protocol.messages import NodeId
from swarm.transfer.origin_rate import OriginRate

Mask = npt.NDArray[np.bool_]

RUN_BYTES = 64 << 20
# A rest that arrives sooner is not worth another request, nor are few bytes of it, unless it lasts long.
STEAL_AFTER_S, STOLEN_BYTES_MIN, LONG_S = 1.0, 1 << 20, 5.0
STEAL_PART = 0.05  # of the time so far: a rest that takes less is not worth another request either
# Without a chunk, before chunks are read that other nodes read or hold, with the time that a chunk takes at this rate
# added; and between nodes in the order of their ranks.
LATE_S, LATE_BYTES_PER_S, LATE_NEXT_S = 3.0, 1e6, 1.0
STREAMS_MAX = 8  # of all readers together while they are few; from 8 readers on each has one
STREAM_BYTES_MIN = 8 << 20  # fewer bytes are not divided over another stream
PART_CHUNKS = 8


@dataclass
class ReadRange:
    """The chunks `[at, end)` of a file that a stream still has to read, since `since`; it began at `first`.

    `end` falls when another node takes them.
    """

    at: int
    end: int
    first: int = 0
    since: float = 0.0
    late: bool = False  # read although a peer may hold it


@dataclass
class _Reader:
    able: bool
    ranges: dict[int, ReadRange] = field(default_factory=dict)  # by end


class OriginReads:
    """The reads of one promised artifact at one node. `readers_max`: nodes that read at once; None for no limit."""

    def __init__(
        self, manifest: Manifest, *, node: NodeId, run_bytes: int = RUN_BYTES, readers_max: int | None = None
    ) -> None:
        self.own: dict[int, ReadRange] = {}  # by stream
        self._manifest = manifest
        self._node = node
        self._run_bytes = run_bytes
        self._readers_max = readers_max
        self._others: dict[NodeId, _Reader] = {}
        self._members: frozenset[NodeId] = frozenset()  # that fetch the artifact, as gossip tells
        self._readers: list[NodeId] = []  # by rank; empty when a node has come or gone since
        self._edges: list[int] = []  # where the parts of all their streams begin, and the end
        self._parts: list[int] = []  # where their parts begin, and the end
        self._unheard: Mask = np.zeros(0, dtype=np.bool_)  # in the parts of readers without a link
        self._ends: dict[int, int] = {}  # by stream: where its last read ended
        self._rate = 0.0  # bytes per second of the last read
        total = len(manifest.chunks)
        self._sizes = np.fromiter((chunk.size for chunk in manifest.chunks), dtype=np.int64, count=total)
        self._all = OriginRate(self._sizes)
        self._starts = np.concatenate(([0], np.cumsum(self._sizes)))  # in bytes
        self._file_of = np.fromiter((chunk.file for chunk in manifest.chunks), dtype=np.int64, count=total)

    def told(self, node: NodeId, able: bool, ranges: Iterable[tuple[int, int]], now: float) -> None:
        """A linked node announces the (first, count) ranges that it reads; `able`: whether the origin answers it."""
        known, reader = self._others.get(node), _Reader(able)
        self._others[node] = reader
        if known is None or known.able != able:
            self._readers = []
        for first, count in ranges:
            end = min(first + count, len(self._manifest.chunks))
            if first < end:
                before = (span for span in known.ranges.values() if span.at <= first < span.end) if known else iter(())
                goes_on = next(before, None)
                begun = (goes_on.first, goes_on.since) if goes_on else (first, now)
                reader.ranges[end] = ReadRange(first, end, *begun)
                self._yield_to(node, first, end)

    def left(self, node: NodeId) -> None:
        """The link to a node is gone."""
        self._others.pop(node, None)
        self._readers = []

    def met(self, members: Collection[NodeId]) -> None:
        """The nodes that fetch the artifact, linked or not."""
        if members != self._members:
            self._members = frozenset(members)
            self._readers = []

    def knows(self, node: NodeId) -> bool:
        """Whether a node has told what it reads."""
        return node in self._others

    def watch(self, now: float, *, missing: Mask, elsewhere: Mask) -> None:
        """Notes what all nodes have read since the last call; a few times a second."""
        busy = np.zeros(len(missing), dtype=np.bool_)
        for taken in self._taken():
            busy[taken.at : taken.end] = True
        self._all.watch(now, wanted=missing & ~elsewhere, busy=busy)

    @property
    def ranks(self) -> list[NodeId]:
        """All nodes that can read by id, with this node."""
        unable = {node for node, reader in self._others.items() if not reader.able}
        return sorted({self._node, *self._others, *self._members} - unable)

    @property
    def streams(self) -> int:
        """The streams that this node should read with now; 0 while others do."""
        readers = self._of_ranks()
        return self._streams_of(len(readers)) if self._node in readers else 0

    @property
    def limited(self) -> bool:
        """Whether this node must not read while others do, also when no chunk comes."""
        return self._readers_max is not None and self._node not in self._of_ranks()

    def _of_ranks(self) -> list[NodeId]:
        """The readers by rank; divides the chunks among them."""
        if not self._readers:
            total, chunks = int(self._starts[-1]), len(self._sizes)
            most = max(1, total // max(STREAM_BYTES_MIN, PART_CHUNKS * self._manifest.chunk_bytes))
            readers = self._readers = self.ranks[: min(most, self._readers_max or most)]
            self._edges = self._divide(len(readers) * self._streams_of(len(readers)))
            self._parts = self._edges[:: self._streams_of(len(readers))]
            if self.limited:
                for reading in self.own.values():
                    reading.end = min(reading.end, reading.at + 1)
            self._unheard = np.zeros(chunks, dtype=np.bool_)
            for rank, node in enumerate(readers):
                if node != self._node and node not in self._others:
                    self._unheard[self._parts[rank] : self._parts[rank + 1]] = True
        return self._readers

    def _divide(self, parts: int) -> list[int]:
        """The chunks at which `parts` parts of about equal size begin, and the end.

        An edge near the end of a file is moved there, and those in between are spread: fewer ranges are cut by files.
        """
        total = int(self._starts[-1])
        ends = self._starts[[*np.flatnonzero(np.diff(self._file_of)) + 1, len(self._sizes)]]
        fixed = {0: 0, parts: total}
        for edge in range(1, parts):
            place = total * edge // parts
            nearest = int(ends[np.abs(ends - place).argmin()])
            if abs(nearest - place) <= total / parts / 4 and nearest < total:
                fixed[edge] = nearest
        edges = [0]
        for (first, begin), (last, end) in itertools.pairwise(sorted(fixed.items())):
            width = (end - begin) / (last - first)
            edges += [self._chunk_at(round(begin + width * (edge - first))) for edge in range(first + 1, last + 1)]
        return [*edges[:-1], len(self._sizes)]

    def _streams_of(self, readers: int) -> int:
        part = int(self._starts[-1]) // readers
        return max(1, min(STREAMS_MAX // readers, part // STREAM_BYTES_MIN))

    def next(
        self, stream: int, now: float, *, missing: Mask, elsewhere: Mask, urgent: Collection[int] = ()
    ) -> ReadRange | None:
        """The next range of a stream, None if there is nothing to read for it now.

        `missing` chunks are not held here, `elsewhere` are those that a peer holds. `urgent` chunks are read whatever
        others hold: see `claims`.
        """
        wanted = missing & ~elsewhere
        self._of_ranks()
        found = self._urgent(urgent) or self._gap(stream, wanted, now) or self._stolen(stream, wanted, now)
        if found is not None:
            found.since = now
            self.own[stream] = found
        return found

    def ended(self, stream: int, now: float) -> None:
        """A stream reads nothing now."""
        if reading := self.own.pop(stream, None):
            self._ends[stream] = reading.at
            if reading.at > reading.first and now > reading.since:
                self._rate = self._bytes(reading.first, reading.at) / (now - reading.since)

    def ranges(self) -> list[tuple[int, int]]:
        """The own ranges as (first, count), for peers."""
        return sorted((r.at, r.end - r.at) for r in self.own.values() if r.at < r.end)

    def _yield_to(self, node: NodeId, first: int, end: int) -> None:
        """Ends the own ranges where another node has begun, so that exactly one of the two goes on."""
        for reading in self.own.values():
            if reading.at < first < reading.end:
                reading.end = first
            elif reading.at == first < reading.end and node < self._node:
                reading.end = reading.at

    def _busy(self, wanted: Mask) -> Mask:
        busy = np.zeros(len(self._manifest.chunks), dtype=np.bool_)
        for taken in self._taken():
            first, end = self._rest(taken, wanted)
            busy[first:end] = True
        return busy

    @staticmethod
    def _rest(taken: ReadRange, wanted: Mask) -> tuple[int, int]:
        """The chunks that a stream still reads: from the first that is wanted, to the next that is not."""
        todo = wanted[taken.at : taken.end]
        if not todo.any():
            return taken.end, taken.end
        first = int(todo.argmax())
        stop = todo[first:].argmin()  # 0 if all are wanted
        return taken.at + first, taken.at + first + int(stop) if stop else taken.end

    def _taken(self) -> list[ReadRange]:
        return [*self.own.values(), *(span for reader in self._others.values() for span in reader.ranges.values())]

    def _urgent(self, urgent: Collection[int]) -> ReadRange | None:
        own = {chunk for reading in self.own.values() for chunk in range(reading.at, reading.end)}
        rest = np.zeros(len(self._manifest.chunks), dtype=np.bool_)
        rest[[chunk for chunk in urgent if chunk not in own]] = True
        gaps = self._gaps(rest)
        return self._run(*gaps[0]) if gaps else None

    def _gap(self, stream: int, wanted: Mask, now: float) -> ReadRange | None:
        busy = self._busy(wanted)
        gaps = self._gaps(wanted & ~busy & ~self._left_to_others(wanted, now))
        if not gaps:
            return None
        place = self._ends.get(stream)
        if place is None:
            place = self._first_place(stream)
            after = [gap for gap in gaps if gap[1] > place] or gaps
            first, end = after[0]
            return self._run(max(first, place) if end > place else first, end)
        for first, end in gaps:
            if first <= place < end:
                return self._run(place, end)
        gaps.sort(key=lambda gap: self._bytes(*gap), reverse=True)
        if own := [gap for gap in gaps if self._part_of(gap[0]) == self._node]:
            return self._run(*own[0])
        order, streams = self._turn(stream, wanted, now)
        first, end = gaps[order % len(gaps)]
        before, beside = order // len(gaps), -(-(streams - order % len(gaps)) // len(gaps))
        beside = min(beside, self._helpers_max(first, end))
        if before >= beside:
            return None
        from_below = self._comes_from_below(first, wanted, now)
        part = (before + bool(from_below)) / (beside + bool(from_below))
        return self._run(self._at(first, end, part) if part else first, end)

    def _left_to_others(self, wanted: Mask, now: float) -> Mask:
        """The chunks in the parts of other readers that are not to be taken over now."""
        left = self._unheard.copy()
        for rank, node in enumerate(self._readers):
            first, end = self._parts[rank : rank + 2]
            ranges = self._others[node].ranges.values() if node in self._others else ()
            rates = [self._rate_of(taken, wanted, now) for taken in ranges if first <= taken.at < end]
            rest = int(self._sizes[first:end] @ wanted[first:end])
            if rates and rest <= self._patience_s * (sum(rates) or rest):
                left[first:end] = True
        return left

    @property
    def _patience_s(self) -> float:
        """What a rest may last before others help. Helpers without links among them would choose the same chunks."""
        return max(STEAL_PART * self._all.lasts_s, LONG_S if self._unheard.any() else STEAL_AFTER_S)

    def _rate_of(self, taken: ReadRange, wanted: Mask, now: float) -> float:
        """Bytes per second of a range so far, at most: with the chunk on its way. 0 while it is too new to tell."""
        lasted_s, at = now - taken.since, self._rest(taken, wanted)[0]
        if lasted_s <= (STEAL_AFTER_S if at > taken.first else LATE_S):
            return 0.0
        on_its_way = int(self._sizes[min(at, len(self._sizes) - 1)])
        return (self._bytes(taken.first, at) + on_its_way) / lasted_s

    def _part_of(self, chunk: int) -> NodeId:
        """The reader of a chunk, until others take it over."""
        return self._readers[int(np.searchsorted(self._parts, chunk, "right")) - 1]

    def _comes_from_below(self, gap: int, wanted: Mask, now: float) -> bool:
        """Whether a stream of another node soon reads on where a gap begins."""
        spans = (span for reader in self._others.values() for span in reader.ranges.values())
        return any(span.end == gap and self._ends_soon(span, wanted, now) for span in spans)

    def _turn(self, stream: int, wanted: Mask, now: float) -> tuple[int, int]:
        """The number of idle streams that choose before this one, and of all that choose now, with this one."""
        each = self._streams_of(len(self._readers))
        before = sum(number not in self.own for number in range(stream))
        streams = before + 1 + sum(number not in self.own for number in range(stream + 1, each))
        for node in self._readers:
            if reader := self._others.get(node):
                busy = sum(not self._ends_soon(taken, wanted, now) for taken in reader.ranges.values())
                idle = max(0, each - busy)
                streams += idle
                before += idle if node < self._node else 0
        return before, streams

    def _ends_soon(self, taken: ReadRange, wanted: Mask, now: float) -> bool:
        """Whether a stream of another node chooses its next range at about this time."""
        rest = self._bytes(*self._rest(taken, wanted))
        return rest <= STEAL_AFTER_S * (self._rate_of(taken, wanted, now) or self._rate)

    def _helpers_max(self, first: int, end: int) -> int:
        """The streams that may divide a range among them."""
        least = min(max(LONG_S * self._rate, STOLEN_BYTES_MIN), STREAM_BYTES_MIN)
        return max(1, min(end - first, int(self._bytes(first, end) / least)))

    def _first_place(self, stream: int) -> int:
        """The chunk where a stream begins: the streams of all readers divide the bytes evenly."""
        readers = self._readers
        streams = self._streams_of(len(readers))
        stream = min(stream, streams - 1)
        if len(readers) > 1 and self._node in readers:
            return self._edges[readers.index(self._node) * streams + stream]
        part = (_anywhere(self._node) + stream / streams) % 1.0
        return self._chunk_at(int(part * self._starts[-1]))

    def _chunk_at(self, place: int) -> int:
        """The chunk of a byte."""
        return min(int(np.searchsorted(self._starts, place, "right")) - 1, len(self._sizes) - 1)

    def _stolen(self, stream: int, wanted: Mask, now: float) -> ReadRange | None:
        """The end of the range that would last longest, at its rate so far."""
        rests = []
        own = [id(taken) for taken in self.own.values()]
        taken_all = self._taken()
        starts = sorted(taken.at for taken in taken_all)
        for taken in () if self._all.full else taken_all:
            first, end = self._rest(taken, wanted)
            later = bisect.bisect_right(starts, first)  # a range that begins within this one has taken its end
            end = min(end, starts[later]) if later < len(starts) else end
            if end - first > 1 and (rate := self._rate_of(taken, wanted, now)):
                lasts_s = self._bytes(first, end) / rate
                # Streams of one node mostly share a bottleneck, which another stream would not widen.
                if lasts_s > (LONG_S if id(taken) in own else self._patience_s):
                    rests.append((lasts_s, first, end, rate))
        if not rests:
            return None
        rests.sort(reverse=True)
        order, streams = self._turn(stream, wanted, now)
        lasts_s, first, end, rate = rests[order % len(rests)]
        before, helpers = order // len(rests), -(-(streams - order % len(rests)) // len(rests))
        helpers = min(helpers, self._helpers_max(first, end))
        if before >= helpers:
            return None
        own_rate = self._rate or rate
        middle = self._at(first, end, (rate + before * own_rate) / (rate + helpers * own_rate))
        if lasts_s < LONG_S and self._bytes(middle, end) < STOLEN_BYTES_MIN:
            return None
        for reading in self.own.values():
            if reading.at < middle < reading.end:
                reading.end = middle
        return self._run(middle, end)

    def late(self, stream: int, waited_s: float, missing: Mask) -> ReadRange | None:
        """Missing chunks that others read or hold, for a stream that has waited too long for a chunk.

        Nodes come to it one after another, and to different chunks.
        """
        late_s = LATE_S + self._manifest.chunk_bytes / LATE_BYTES_PER_S
        if waited_s < late_s:
            return None
        rank = self.ranks.index(self._node)
        self._of_ranks()
        gaps = self._gaps(missing)
        if not gaps or waited_s < late_s + LATE_NEXT_S * rank:
            return None
        first, end = gaps[rank % len(gaps)]
        found = self.own[stream] = dataclasses.replace(self._run(first, end), late=True)
        return found

    def _run(self, first: int, end: int) -> ReadRange:
        readers = len(self._readers)
        part = int(self._starts[-1]) // (readers * self._streams_of(readers))
        most = min(self._run_bytes, max(part, STREAM_BYTES_MIN))
        within = int(np.searchsorted(self._starts, self._starts[first] + most, "right")) - 1
        end = min(end, *(edge for edge in self._parts if edge > first))
        if within >= end or 2 * self._bytes(within, end) < most:  # a rest is not worth a request of its own
            within = end
        return ReadRange(first, max(first + 1, within), first)

    def _gaps(self, free: Mask) -> list[tuple[int, int]]:
        """The free chunks as (first, end), each within one file."""
        chunks = np.flatnonzero(free)
        if not len(chunks):
            return []
        breaks = np.flatnonzero((np.diff(chunks) > 1) | (np.diff(self._file_of[chunks]) > 0)) + 1
        return [(int(part[0]), int(part[-1]) + 1) for part in np.split(chunks, breaks)]

    def _bytes(self, first: int, end: int) -> int:
        return int(self._starts[end] - self._starts[first])

    def _at(self, first: int, end: int, part: float) -> int:
        """The chunk at a part of the bytes of `[first, end)`, not its first one if there are several."""
        place = self._starts[first] + part * self._bytes(first, end)
        found = int(np.searchsorted(self._starts, place, "left"))
        return max(first, min(max(found, first + 1), end - 1))

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold."""
        spans: Sequence[tuple[int, int]] = sorted((r.at, r.end) for r in self.own.values() if r.at < r.end)
        if any(self._file_of[first] != self._file_of[end - 1] for first, end in spans):
            raise LocalProtocolError(f"{self!r}: a read crosses into another file")

    def __repr__(self) -> str:
        return f"<OriginReads {self._manifest.digest[:8]} {self.ranges()} | {len(self._readers)} readers>"


def _anywhere(node: NodeId) -> float:
    """A place from 0 to 1 for a node that knows no other."""
    return int.from_bytes(hashlib.sha256(node.encode()).digest()[:8], "big") / (1 << 64)
