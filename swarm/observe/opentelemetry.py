"""What a node does as OpenTelemetry spans, where its API is installed; an SDK that the application sets up exports
them.

    swarm.resolve           from a model id to its manifest
    swarm.fetch             from there to the last file sealed
      swarm.fetch.source    one for each peer that was asked: from the first request to the last that was heard of it

They are children of whatever span the caller is in. Spans of peers are few, as a fetch has few sources; a span for each
transfer would be thousands.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from swarm.content.manifest import Digest
from swarm.journal import Entry, FetchEnded, FetchStarted, Joined, Journal, Left, Received, Resolved
from swarm.protocol.messages import NodeId
from swarm.transfer.download_events import Ask, Ban, ChunkCorrupt, TransferEnded, TransferFailed


def follow(journal: Journal) -> None:
    """Makes spans of what happens from now on. Does nothing without opentelemetry-api."""
    try:
        from opentelemetry import trace
    except ImportError:  # the name `opentelemetry` alone says little: other packages live in it
        return
    spans = _Spans(trace)
    journal.subscribe(
        spans.apply,
        *(Resolved, FetchStarted, FetchEnded, Received, Joined, Left),
        *(Ask, Ban, ChunkCorrupt, TransferEnded, TransferFailed),
    )


@dataclass
class _Source:
    span: Any
    heard_at_s: float  # when it was asked, or anything came of it, last
    bytes: int = 0
    chunks: int = 0
    rejected_chunks: int = 0
    failed_transfers: int = 0


@dataclass
class _Fetch:
    span: Any
    sources: dict[NodeId, _Source] = field(default_factory=dict)  # by node id


class _Spans:
    def __init__(self, trace: Any) -> None:
        self._trace = trace
        self._tracer = trace.get_tracer("swarm")
        self._names: dict[NodeId, str] = {}  # of linked nodes
        self._fetches: dict[Digest, _Fetch] = {}  # by digest, the subject of a download's entries

    def apply(self, entry: Entry) -> None:
        match entry.event:
            case Joined(node, name):
                self._names[node] = name
            case Left(node):
                self._names.pop(node, None)
            case Resolved() as resolved:
                self._resolved(entry.at_s, resolved)
            case FetchStarted() as started:
                self._started(started)
            case FetchEnded(digest, error):
                self._ended(entry.at_s, digest, error)
            case Received(node, digest):
                self._of_source(entry, digest, node)
            case Ask(node) | ChunkCorrupt(node) | TransferFailed(node) | TransferEnded(node) | Ban(node):
                self._of_source(entry, Digest(entry.subject), node)

    def _of_source(self, entry: Entry, digest: Digest, node: NodeId) -> None:
        if (fetch := self._fetches.get(digest)) is None:
            return
        if (source := fetch.sources.get(node)) is None:
            source = fetch.sources[node] = _Source(self._asked(fetch, node), entry.at_s)
        source.heard_at_s = entry.at_s
        match entry.event:
            case Received(size=size):
                source.bytes += size
                source.chunks += 1
            case ChunkCorrupt():
                source.rejected_chunks += 1
            case TransferFailed():
                source.failed_transfers += 1
            case Ban(why=why):
                source.span.set_status(self._trace.StatusCode.ERROR, f"banned: {why}")

    def _resolved(self, at_s: float, resolved: Resolved) -> None:
        over_ns = time.time_ns()

        def wall_ns(then_s: float) -> int:
            return over_ns - int((at_s - then_s) * 1e9)

        span = self._tracer.start_span("swarm.resolve", start_time=wall_ns(resolved.began_at_s))
        span.set_attribute("swarm.model_id", resolved.model_id)
        if resolved.digest is not None:
            span.set_attribute("swarm.digest", resolved.digest)
        if resolved.agreed_at_s is not None:
            span.add_event("agreed on the digest", timestamp=wall_ns(resolved.agreed_at_s))
        self._end(span, resolved.error, over_ns)

    def _started(self, started: FetchStarted) -> None:
        span = self._tracer.start_span("swarm.fetch")
        span.set_attribute("swarm.model_id", started.model_id)
        span.set_attribute("swarm.digest", started.digest)
        span.set_attribute("swarm.bytes", started.size)
        span.set_attribute("swarm.resumed_bytes", started.resumed_bytes)
        self._fetches[started.digest] = _Fetch(span)

    def _asked(self, fetch: _Fetch, node: NodeId) -> Any:
        within = self._trace.set_span_in_context(fetch.span)
        span = self._tracer.start_span("swarm.fetch.source", context=within)
        span.set_attribute("swarm.node", node)
        span.set_attribute("swarm.node_name", self._names.get(node, node))
        return span

    def _ended(self, at_s: float, digest: Digest, error: str | None) -> None:
        if fetch := self._fetches.pop(digest, None):
            over_ns = time.time_ns()
            for source in fetch.sources.values():
                for name in ("bytes", "chunks", "rejected_chunks", "failed_transfers"):
                    source.span.set_attribute(f"swarm.{name}", getattr(source, name))
                source.span.end(end_time=over_ns - int((at_s - source.heard_at_s) * 1e9))
            self._end(fetch.span, error, over_ns)

    def _end(self, span: Any, error: str | None, over_ns: int) -> None:
        if error is not None:
            span.set_status(self._trace.StatusCode.ERROR, error)
        span.end(end_time=over_ns)
