"""The record of a fetch: its sources, the source and time of every chunk, and the phases that took its time.

Built from journal entries alone. Status, progress, dashboard, spans and `swarm replay` all read this record. Bounded:
the records of the fetches that ended first are dropped.

    resolve    until all holders agree on the digest
    manifest   until the manifest is here
    hash       until the chunks that were stored before are hashed
    connect    until the first peer grants a transfer
    transfer   at least one transfer runs
    wait       no transfer runs, although chunks are missing
    verify     from the end of the last transfer to the last verified chunk
    seal       from there to the end: files are forced to disk and renamed
"""

from __future__ import annotations

from array import array
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from swarm.content.manifest import Digest, ModelId
from swarm.journal import (
    Entry,
    FetchEnded,
    FetchStarted,
    Joined,
    Journal,
    Left,
    OriginListed,
    OriginRead,
    Received,
    Resolved,
)
from swarm.observe.origin_record import OriginRecords
from swarm.observe.rate import Rate
from swarm.protocol.messages import NodeId
from swarm.transfer.download_events import (
    Ask,
    Ban,
    Cancel,
    ChunkCorrupt,
    Granted,
    Refused,
    TransferEnded,
    TransferFailed,
)

PHASES = ("resolve", "manifest", "hash", "connect", "transfer", "wait", "verify", "seal")
FETCHES_KEPT = 16
SOURCES_MAX = 4096  # of a fetch; further nodes count as one
CHUNKS_KEPT = 1 << 20  # of all fetches together, 14 bytes each
BUCKETS = 120  # of a timeline: a lane is some hundred pixels wide
OTHERS = NodeId("0" * 16)  # of the source that stands for the nodes beyond SOURCES_MAX

TransferEvent: TypeAlias = Ask | Granted | Refused | Cancel | TransferEnded | TransferFailed | ChunkCorrupt | Ban
TRANSFER_EVENTS = (Ask, Granted, Refused, Cancel, TransferEnded, TransferFailed, ChunkCorrupt, Ban)


@dataclass
class FetchSource:
    """The part of a peer in a fetch, or of an `origin`."""

    node: NodeId
    name: str
    heard_at_s: float  # the last request to it, or event of it
    chunks: int = 0  # verified
    bytes: int = 0
    rejected_chunks: int = 0
    failed_transfers: int = 0
    waited_s: float = 0.0  # from request to grant, of all transfers together
    transfer_s: float = 0.0  # from grant to end, of all transfers together
    banned: str | None = None
    linked: bool = True
    origin: bool = False


@dataclass
class FetchRecord:
    """A fetch, running or ended. Times are on the node's clock, if not said otherwise.

    The fetch began at `began_at_s` and its manifest was here at `manifest_at_s`; `started_at_s` is when requests could
    begin, because the chunks stored before were hashed.
    """

    model_id: ModelId
    digest: Digest
    size: int
    resumed_bytes: int
    started_at_s: float
    began_at_s: float
    agreed_at_s: float
    manifest_at_s: float
    ended_at_s: float | None = None
    error: str | None = None
    received_bytes: int = 0
    sources: dict[NodeId, FetchSource] = field(default_factory=dict)  # by node id, in the order of the first request
    rejected: list[tuple[NodeId, float]] = field(default_factory=list)  # node id, seconds since `started_at_s`
    rate: Rate = field(init=False)
    _chunks: array[int] = field(default_factory=lambda: array("L"))  # in the order of arrival, as the next three
    _source_numbers: array[int] = field(default_factory=lambda: array("H"))
    _sizes: array[int] = field(default_factory=lambda: array("L"))
    _seconds: array[float] = field(default_factory=lambda: array("f"))  # since `started_at_s`
    _asked: dict[tuple[NodeId, int], float] = field(default_factory=dict)  # by peer and transfer
    _granted: dict[tuple[NodeId, int], float] = field(default_factory=dict)
    _connected_at_s: float | None = None  # the first grant, or chunk
    _busy_since_s: float | None = None  # since then at least one transfer runs
    _busy_until_s: float | None = None
    _busy_s: float = 0.0  # without the time since `_busy_since_s`
    _busy_at_chunk: tuple[float, float] = (0.0, 0.0)  # (seconds with a transfer, end of it) at the last chunk

    def __post_init__(self) -> None:
        self.rate = Rate(self.started_at_s)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.ended_at_s is None

    @property
    def chunks(self) -> int:
        """Number of chunks that arrived and are verified."""
        return len(self._chunks)

    @property
    def done_bytes(self) -> int:
        """Bytes verified so far, resumed chunks included."""
        return self.resumed_bytes + self.received_bytes

    @property
    def chunk_at_s(self) -> float:
        """Arrival of the last chunk; `started_at_s` before the first."""
        return self.started_at_s + (self._seconds[-1] if self._seconds else 0.0)

    def eta_s(self, now: float) -> float | None:
        """Seconds until complete at the present rate; None while nothing arrives."""
        rate = self.rate.at(now)
        return (self.size - self.done_bytes) / rate if rate > 0 else None

    def origin_of(self, chunk: int) -> tuple[NodeId, float] | None:
        """Node that sent a chunk, and seconds since `started_at_s`; None if it was stored before or is missing."""
        try:
            found = self._chunks.index(chunk)
        except ValueError:
            return None
        return list(self.sources)[self._source_numbers[found]], round(self._seconds[found], 3)

    def source(self, node: NodeId, name: str, at_s: float, *, origin: bool = False) -> FetchSource:
        """The source with this node id, made at its first event."""
        if node not in self.sources and len(self.sources) >= SOURCES_MAX:
            node, name = OTHERS, f"more than {SOURCES_MAX} nodes"
        if (source := self.sources.get(node)) is None:
            source = self.sources[node] = FetchSource(node, name, at_s, origin=origin)
        source.heard_at_s = at_s
        return source

    def receive(self, source: FetchSource, at_s: float, chunk: int, size: int) -> None:
        """Counts a verified chunk."""
        source.chunks += 1
        source.bytes += size
        source.linked = True
        self.received_bytes += size
        self.rate.add(at_s, size)
        self._chunks.append(chunk)
        self._source_numbers.append(list(self.sources).index(source.node))
        self._sizes.append(size)
        self._seconds.append(at_s - self.started_at_s)
        if self._connected_at_s is None:
            self._connected_at_s = at_s
        busy_until_s = at_s if self._busy_until_s is None or self._granted else self._busy_until_s
        self._busy_at_chunk = (self._busy_until(at_s), busy_until_s)

    def apply(self, source: FetchSource, at_s: float, event: TransferEvent) -> None:
        """Takes an event of the download machine, about a transfer from `source`."""
        match event:
            case Ask(peer, transfer):
                self._asked[peer, transfer] = at_s
            case Granted(peer, transfer):
                source.waited_s += at_s - self._asked.pop((peer, transfer), at_s)
                if not self._granted:
                    self._busy_since_s = at_s
                if self._connected_at_s is None:
                    self._connected_at_s = at_s
                self._granted[peer, transfer] = at_s
            case ChunkCorrupt(peer):
                source.rejected_chunks += 1
                if len(self.rejected) < BUCKETS:
                    self.rejected.append((peer, at_s - self.started_at_s))
            case Ban(_, why):
                source.banned = why
            case Refused(peer, transfer) | Cancel(peer, transfer) | TransferEnded(peer, transfer):
                self._end(source, (peer, transfer), at_s)
            case TransferFailed(peer, transfer):
                source.failed_transfers += 1
                self._end(source, (peer, transfer), at_s)

    def end(self, at_s: float, error: str | None) -> None:
        """The fetch ended."""
        self.ended_at_s, self.error = at_s, error
        self._busy_s, self._busy_since_s = self._busy_until(at_s), None
        self._asked.clear()
        self._granted.clear()

    def phases(self, now: float) -> dict[str, float]:
        """Seconds of each of `PHASES`; they add up to the time from `began_at_s` to the end, or to now."""
        end_s = now if self.ended_at_s is None else self.ended_at_s
        if self.done_bytes >= self.size or (self.chunks and not self.running and self.error is None):
            last_s = self.chunk_at_s
            transfer_s, verify_s = self._busy_at_chunk[0], last_s - self._busy_at_chunk[1] if self.chunks else 0.0
        else:  # incomplete: nothing is left to verify or to seal
            last_s, transfer_s, verify_s = end_s, self._busy_until(end_s), 0.0
        connect_s = (last_s if self._connected_at_s is None else self._connected_at_s) - self.started_at_s
        seconds = (
            self.agreed_at_s - self.began_at_s,
            self.manifest_at_s - self.agreed_at_s,
            self.started_at_s - self.manifest_at_s,
            connect_s,
            transfer_s,
            last_s - self.started_at_s - connect_s - transfer_s - verify_s,
            verify_s,
            end_s - last_s,
        )
        return {name: max(0.0, round(spent_s, 4)) for name, spent_s in zip(PHASES, seconds, strict=True)}

    def report(self, now: float) -> dict[str, Any]:
        """The record as JSON: `phases` by name, and `sources` in the order of the first request."""
        return {
            "model_id": self.model_id,
            "digest": self.digest,
            "bytes": self.size,
            "resumed_bytes": self.resumed_bytes,
            "received_bytes": self.received_bytes,
            "seconds": round((now if self.ended_at_s is None else self.ended_at_s) - self.began_at_s, 4),
            "running": self.running,
            "complete": not self.running and self.error is None,
            "error": self.error,
            "phases": self.phases(now),
            "sources": [asdict(source) for source in self.sources.values()],
        }

    def timeline(self, now: float) -> dict[str, Any]:
        """`report` with `lanes` for `sources`: each peer that sent a chunk, and its bytes in `BUCKETS` parts of the
        time; peers that sent wrong chunks alone come last."""
        report = self.report(now)
        bucket_s = max(report["seconds"], 1e-3) / BUCKETS
        before_s = self.started_at_s - self.began_at_s
        buckets = [[0] * BUCKETS for _ in self.sources]
        for number, arrived_s, size in zip(self._source_numbers, self._seconds, self._sizes, strict=True):
            buckets[number][min(BUCKETS - 1, int((before_s + arrived_s) / bucket_s))] += size
        lanes = [
            {
                **source,
                "rejected_at_s": [round(before_s + at_s, 3) for node, at_s in self.rejected if node == source["node"]],
                "buckets": of_source,
            }
            for source, of_source in zip(report.pop("sources"), buckets, strict=True)
            if source["chunks"] or source["rejected_chunks"]
        ]
        lanes.sort(key=lambda lane: not lane["chunks"])
        return {**report, "bucket_s": round(bucket_s, 6), "lanes": lanes}

    def _end(self, source: FetchSource, key: tuple[NodeId, int], at_s: float) -> None:
        self._asked.pop(key, None)
        if (granted_at_s := self._granted.pop(key, None)) is not None:
            source.transfer_s += at_s - granted_at_s
            if not self._granted:
                self._busy_s, self._busy_since_s, self._busy_until_s = self._busy_until(at_s), None, at_s

    def _busy_until(self, at_s: float) -> float:
        """Seconds until `at_s` with at least one running transfer."""
        return self._busy_s + (0.0 if self._busy_since_s is None else at_s - self._busy_since_s)


class FetchRecords:
    """`follow` a journal; `records` are by digest, the latest begun last. `origins`: what was read from each."""

    KINDS = (Received, FetchStarted, FetchEnded, Resolved, Joined, Left, OriginListed, OriginRead, *TRANSFER_EVENTS)

    def __init__(self) -> None:
        self.records: dict[Digest, FetchRecord] = {}
        self.origins = OriginRecords()
        self._names: dict[NodeId, str] = {}  # of linked peers
        self._resolved: dict[Digest, tuple[Resolved, float]] = {}  # by digest, until the fetch starts

    @property
    def running(self) -> dict[Digest, FetchRecord]:
        """The fetches that have not ended, by digest."""
        return {digest: fetch for digest, fetch in self.records.items() if fetch.running}

    def follow(self, journal: Journal) -> None:
        """Applies the entries that are recorded from now on."""
        journal.subscribe(self.apply, *self.KINDS)

    def apply(self, entry: Entry) -> None:
        """Applies an entry."""
        match entry.event:
            case Received(node, digest, chunk, size):  # first, because there are as many as chunks
                if fetch := self._running(digest):
                    fetch.receive(self._source(fetch, node, entry.at_s), entry.at_s, chunk, size)
                if self.origins.records:
                    self.origins.apply(entry)
            case OriginListed() | OriginRead():
                self.origins.apply(entry)
            case FetchStarted(model_id, digest, size, resumed_bytes):
                resolved, manifest_at_s = self._resolved.pop(digest, (None, entry.at_s))
                began_at_s = resolved.began_at_s if resolved else entry.at_s
                agreed_at_s = (resolved and resolved.agreed_at_s) or manifest_at_s
                self.records.pop(digest, None)
                self.records[digest] = FetchRecord(
                    model_id, digest, size, resumed_bytes, entry.at_s, began_at_s, agreed_at_s, manifest_at_s
                )
                self._forget()
            case FetchEnded(digest, error):
                if fetch := self._running(digest):
                    fetch.end(entry.at_s, error)
            case Resolved(_, digest, error=None) as resolved if digest is not None:
                self._resolved[digest] = (resolved, entry.at_s)
                for oldest in list(self._resolved)[:-FETCHES_KEPT]:
                    del self._resolved[oldest]
            case Joined(node, name):
                self._names[node] = name
            case Left(node):
                self._names.pop(node, None)
                for fetch in self.records.values():
                    if source := fetch.sources.get(node):
                        source.linked = False
            case event if isinstance(event, TRANSFER_EVENTS):
                if fetch := self._running(Digest(entry.subject)):
                    fetch.apply(self._source(fetch, event.peer, entry.at_s), entry.at_s, event)

    def _running(self, digest: Digest) -> FetchRecord | None:
        fetch = self.records.get(digest)
        return fetch if fetch and fetch.running else None

    def _source(self, fetch: FetchRecord, node: NodeId, at_s: float) -> FetchSource:
        if origin := self.origins.records.get(node):
            return fetch.source(node, origin.origin.name, at_s, origin=True)
        return fetch.source(node, self._names.get(node, node), at_s)

    def _forget(self) -> None:
        ended = [digest for digest, fetch in self.records.items() if not fetch.running]
        while ended and (
            len(self.records) > FETCHES_KEPT or sum(fetch.chunks for fetch in self.records.values()) > CHUNKS_KEPT
        ):
            del self.records[ended.pop(0)]
