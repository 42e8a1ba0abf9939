"""What became of this node's fetches: which chunk came from whom and when, what was rejected, where the time went.

Folds journal entries, and nothing else. A chunk's way through the swarm is a tree, of which each node knows one edge:
the peer that it got the chunk from. Bounded: the fetches that ended first are forgotten.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from swarm.content.manifest import Digest, ModelId
from swarm.journal import Entry, FetchEnded, FetchStarted, Journal, Received
from swarm.protocol.messages import NodeId
from swarm.transfer.download_events import Ban, ChunkCorrupt

FETCHES_KEPT = 16
CHUNKS_KEPT = 1 << 20  # of all fetches together, 14 bytes each
BUCKETS = 120  # of a timeline: a lane is some hundred pixels wide


@dataclass
class Fetch:
    """One fetch, running or ended. Chunks are in the order in which they arrived; times are seconds since it began."""

    model_id: ModelId
    digest: Digest
    size: int
    resumed_bytes: int
    began_at_s: float
    seconds: float | None = None  # from its beginning to its end
    error: str | None = None
    received_bytes: int = 0
    sources: list[NodeId] = field(default_factory=list)  # node ids
    rejected: Counter[NodeId] = field(default_factory=Counter)  # chunks by the node that they came from
    banned: dict[NodeId, str] = field(default_factory=dict)  # node id -> why
    rejected_at: list[tuple[float, NodeId]] = field(default_factory=list)
    _chunks: array[int] = field(default_factory=lambda: array("L"))
    _from: array[int] = field(default_factory=lambda: array("H"))
    _at: array[float] = field(default_factory=lambda: array("f"))
    _sizes: array[int] = field(default_factory=lambda: array("L"))

    @property
    def chunks(self) -> int:
        """How many arrived."""
        return len(self._chunks)

    @property
    def heard_at_s(self) -> float:
        """When the last one arrived, on the node's clock; without any, when it began."""
        return self.began_at_s + (self._at[-1] if self._at else 0.0)

    def add(self, at_s: float, node: NodeId, chunk: int, size: int) -> None:
        """A chunk arrived and is verified."""
        if node not in self.sources:
            self.sources.append(node)
        self.received_bytes += size
        self._chunks.append(chunk)
        self._from.append(self.sources.index(node))
        self._at.append(at_s - self.began_at_s)
        self._sizes.append(size)

    def parent(self, chunk: int) -> tuple[NodeId, float] | None:
        """The node that gave this chunk, and when; None: it was here before, or is not here yet."""
        try:
            found = self._chunks.index(chunk)
        except ValueError:
            return None
        return self.sources[self._from[found]], round(self._at[found], 3)

    def timeline(self, now: float) -> dict[str, Any]:
        """Lanes of bytes over time, one for each source, and the phases, which add up to `seconds`."""
        seconds = now - self.began_at_s if self.seconds is None else self.seconds
        bucket_s = max(seconds, 1e-3) / BUCKETS
        senders = [*self.sources, *(node for node in self.rejected if node not in self.sources)]
        lanes = [
            {
                "node": node,
                "bytes": 0,
                "chunks": 0,
                "rejected_chunks": self.rejected[node],
                "banned": self.banned.get(node),
                "rejected_at_s": [round(at_s, 3) for at_s, by in self.rejected_at if by == node],
                "buckets": [0] * BUCKETS,
            }
            for node in senders
        ]
        for source, at_s, size in zip(self._from, self._at, self._sizes, strict=True):
            lane: dict[str, Any] = lanes[source]
            lane["bytes"] += size
            lane["chunks"] += 1
            lane["buckets"][min(BUCKETS - 1, int(at_s / bucket_s))] += size
        first, last = (self._at[0], self._at[-1]) if self._at else (seconds, seconds)
        ended = self.seconds is not None
        return {
            "model_id": self.model_id,
            "digest": self.digest,
            "bytes": self.size,
            "resumed_bytes": self.resumed_bytes,
            "received_bytes": self.received_bytes,
            "running": not ended,
            "error": self.error,
            "seconds": round(seconds, 3),
            "bucket_s": round(bucket_s, 6),
            "phases": [
                {"name": "waiting for sources", "seconds": round(first, 3)},
                {"name": "receiving and hashing", "seconds": round((last if ended else seconds) - first, 3)},
                {"name": "sealing", "seconds": round(seconds - last, 3) if ended else 0.0},
            ],
            "lanes": lanes,
        }


class FetchHistories:
    """Let it `follow` a journal. `fetches` are by digest, the latest begun last."""

    def __init__(self) -> None:
        self.fetches: dict[Digest, Fetch] = {}

    def follow(self, journal: Journal) -> None:
        """Takes into account what happens from now on."""
        journal.subscribe(self.apply, FetchStarted, FetchEnded, Received, ChunkCorrupt, Ban)

    def apply(self, entry: Entry) -> None:
        """Takes one more entry into account."""
        match entry.event:
            case Received(node, digest, chunk, size):  # first: there are as many as chunks
                if fetch := self.fetches.get(digest):
                    fetch.add(entry.at_s, node, chunk, size)
            case FetchStarted(model_id, digest, size, resumed_bytes):
                self.fetches.pop(digest, None)
                self.fetches[digest] = Fetch(model_id, digest, size, resumed_bytes, entry.at_s)
                self._forget()
            case FetchEnded(digest, error):
                if fetch := self.fetches.get(digest):
                    fetch.seconds, fetch.error = entry.at_s - fetch.began_at_s, error
            case ChunkCorrupt(node, _, _):
                if fetch := self.fetches.get(Digest(entry.subject)):
                    fetch.rejected[node] += 1
                    if len(fetch.rejected_at) < BUCKETS:
                        fetch.rejected_at.append((entry.at_s - fetch.began_at_s, node))
            case Ban(node, why):
                if fetch := self.fetches.get(Digest(entry.subject)):
                    fetch.banned[node] = why

    def _forget(self) -> None:
        ended = [digest for digest, fetch in self.fetches.items() if fetch.seconds is not None]
        while ended and (
            len(self.fetches) > FETCHES_KEPT or sum(fetch.chunks for fetch in self.fetches.values()) > CHUNKS_KEPT
        ):
            del self.fetches[ended.pop(0)]
