"""The origin of a simulated burst: its link, and the streams that newcomers read from it.

Runs the `OriginReads` of each newcomer. The origin serves its streams fairly; each may have a rate limit of its own. A
stream takes `REQUESTS` round trips to open, and a stream that is closed early has sent what was in flight.

Must not know: how the machine decides, links between members.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from swarm.content.manifest import Manifest
from swarm.node.cold_start import READ_AFTER_S
from swarm.protocol.messages import NodeId
from swarm.simulation.setup import Burst
from swarm.simulation.wire import ChunkFlow, Clock, Domain, Nic, Trunk, Wire
from swarm.transfer.download import Download
from swarm.transfer.origin_driver import GATHER_S
from swarm.transfer.origin_reads import STREAMS_MAX, OriginReads, ReadRange

ROUND_TRIPS = 4  # to the hub and to its store, each with a connection of its own
FIRST_TRANSFER = 1 << 40  # reads are numbered from here: a newcomer's transfers from members are below


@dataclass
class _Reader:
    """A newcomer that reads. `tell`: its ranges have changed; `landed`: a chunk of a transfer has arrived,
    and whether the stream goes on."""

    nic: Nic
    download: Download
    reads: OriginReads
    tell: Callable[[], None]
    landed: Callable[[int, int, bool], None]
    urgent: Collection[int]
    reads_from_s: float
    progress_at: float
    flows: dict[int, ChunkFlow] = field(default_factory=dict)  # by stream


class SimulatedOrigin:
    """The origin of one burst; counts its `requests`."""

    def __init__(self, burst: Burst, manifest: Manifest, clock: Clock, wire: Wire) -> None:
        self.requests = 0
        self._burst = burst
        self._manifest = manifest
        self._clock = clock
        self._wire = wire
        self._nics: list[Nic] = []
        rate = burst.origin_bytes_per_s or 0.0
        limited = burst.origin_each_bytes_per_s or burst.origin_limit_bytes_per_s
        self._trunk = Domain(Trunk(rate), Trunk(rate)) if limited else None
        self._shared = None if limited else self._nic(rate)
        self._readers: dict[NodeId, _Reader] = {}
        self._transfers = itertools.count(FIRST_TRANSFER)

    @property
    def sent_bytes(self) -> float:
        """The bytes that left it."""
        return sum(nic.sent_bytes for nic in self._nics)

    def begin(
        self,
        node: NodeId,
        nic: Nic,
        download: Download,
        *,
        tell: Callable[[], None],
        landed: Callable[[int, int, bool], None],
        urgent: Collection[int] = (),
    ) -> None:
        """A newcomer may read; it begins when it had time to meet others. `urgent`: held chunks to read again."""
        reads, now = OriginReads(self._manifest, node=node, readers_max=self._burst.origin_readers), self._clock.now
        begins_s = now + READ_AFTER_S + GATHER_S
        self._readers[node] = _Reader(nic, download, reads, tell, landed, urgent, begins_s, begins_s)
        self._clock.at(begins_s, self.look, node)

    def reads_of(self, node: NodeId) -> OriginReads | None:
        """The machine of a newcomer that reads."""
        reader = self._readers.get(node)
        return reader.reads if reader else None

    def told(self, node: NodeId, other: NodeId, ranges: tuple[tuple[int, int], ...], *, able: bool) -> None:
        """A newcomer hears what another one reads."""
        if reader := self._readers.get(node):
            reader.reads.told(other, able, ranges, self._clock.now)
            for stream in [number for number, found in reader.reads.own.items() if found.at >= found.end]:
                self._close(node, stream)
            self.look(node)

    def left(self, node: NodeId, other: NodeId) -> None:
        """A link of a newcomer is gone."""
        if reader := self._readers.get(node):
            reader.reads.left(other)
            self.look(node)

    def met(self, node: NodeId, members: frozenset[NodeId]) -> None:
        """Gossip tells a newcomer of the others that fetch."""
        if reader := self._readers.get(node):
            reader.reads.met(members)

    def progressed(self, node: NodeId) -> None:
        """A newcomer has another chunk."""
        if reader := self._readers.get(node):
            reader.progress_at = self._clock.now

    def tick(self, node: NodeId) -> None:
        """Time has passed."""
        if reader := self._readers.get(node):
            machine = reader.download
            reader.reads.watch(self._clock.now, missing=machine.missing, elsewhere=machine.elsewhere)
            self.look(node)

    def end(self, node: NodeId) -> None:
        """A newcomer is done, or dead."""
        if reader := self._readers.pop(node, None):
            for stream, flow in reader.flows.items():
                self._wire.cancel(flow)
                reader.reads.ended(stream, self._clock.now)
            reader.tell()

    def look(self, node: NodeId, *, ended: int | None = None) -> None:
        """Opens the streams of a newcomer that have something to read; `ended`: the stream whose range is over."""
        reader, now = self._readers.get(node), self._clock.now
        if reader is None or now < reader.reads_from_s:
            return
        for stream in range(STREAMS_MAX):
            if stream in reader.reads.own:
                continue
            found = self._next(reader, stream)
            if found or stream == ended:
                reader.tell()  # once for the end of a range and its successor
            if found is None:
                return
            self._clock.after(ROUND_TRIPS * 2 * self._burst.delay_s, self._open, node, stream, found)

    def _next(self, reader: _Reader, stream: int) -> ReadRange | None:
        now, machine, found = self._clock.now, reader.download, None
        if stream < reader.reads.streams or (reader.urgent and not stream):
            missing, urgent = machine.missing, reader.urgent
            missing = missing if stream < reader.reads.streams else missing & False
            found = reader.reads.next(stream, now, missing=missing, elsewhere=machine.elsewhere, urgent=urgent)
        if found is None and not stream and not reader.reads.limited:
            found = reader.reads.late(stream, now - reader.progress_at, machine.missing)
        return found

    def _open(self, node: NodeId, stream: int, found: ReadRange) -> None:
        reader = self._readers.get(node)
        if reader is None or reader.reads.own.get(stream) is not found:
            return
        if not self._is_due(reader, found):
            self._close(node, stream)
            return
        self.requests += 1
        transfer, first = next(self._transfers), found.at
        flow = ChunkFlow(
            self._shared or self._nic(self._rate_of(reader)),
            reader.nic,
            [chunk.size for chunk in self._manifest.chunks[first : found.end]],
            landed=lambda place: self._landed(node, stream, transfer, first + place),
            ended=lambda: None,  # its last chunk has closed it
        )
        reader.flows[stream] = flow
        self._wire.send(flow)

    def _landed(self, node: NodeId, stream: int, transfer: int, chunk: int) -> None:
        reader = self._readers[node]
        found = reader.reads.own[stream]
        found.at = chunk + 1
        reader.landed(transfer, chunk, self._is_due(reader, found))
        if node in self._readers and not self._is_due(reader, found):
            self._close(node, stream)

    def _is_due(self, reader: _Reader, found: ReadRange) -> bool:
        if found.at < found.end and found.at in reader.urgent:
            return True
        if found.at >= found.end or found.at in reader.download.held:
            return False
        return found.late or not reader.download.elsewhere[found.at]

    def _close(self, node: NodeId, stream: int) -> None:
        reader = self._readers[node]
        if flow := reader.flows.pop(stream, None):
            self._wire.cancel(flow)
        reader.reads.ended(stream, self._clock.now)
        self.look(node, ended=stream)

    def _rate_of(self, reader: _Reader) -> float:
        """Of a stream, where streams or readers are limited."""
        limit = (self._burst.origin_limit_bytes_per_s or math.inf) / max(1, reader.reads.streams)
        return min(self._burst.origin_each_bytes_per_s or math.inf, limit)

    def _nic(self, rate: float) -> Nic:
        nic = Nic(rate, rate, (None, self._trunk))
        self._nics.append(nic)
        return nic
