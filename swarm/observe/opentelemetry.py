"""Activity of a node as OpenTelemetry spans, once the application has imported `opentelemetry.trace`; its SDK exports
them.

Nothing is imported here: many engines bring the package, few use it, and its import would delay a cold process.

    swarm.resolve           from a model id to its manifest
    swarm.fetch             from there to the last file sealed
      swarm.fetch.source    for each peer: from the first request to its last event

They are children of the caller's current span. A fetch has few sources, hence few spans; a span for each transfer
would be thousands. Counts come from the record of the fetch.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from swarm.content.manifest import Digest
from swarm.journal import Entry, FetchEnded, FetchStarted, Journal, Received, Resolved
from swarm.observe.fetch_record import TRANSFER_EVENTS, FetchRecords
from swarm.protocol.messages import NodeId
from swarm.transfer.download_events import Ban

COUNTS = ("bytes", "chunks", "rejected_chunks", "failed_transfers")


def follow(journal: Journal, fetches: FetchRecords) -> None:
    """Makes spans of the entries that are recorded from now on. `fetches` has to follow the journal already."""
    spans: _Spans | None = None

    def apply(entry: Entry) -> None:
        nonlocal spans
        if spans is None and hasattr(trace := sys.modules.get("opentelemetry.trace"), "get_tracer"):
            spans = _Spans(trace, fetches)
        if spans is not None:
            spans.apply(entry)

    journal.subscribe(apply, Resolved, FetchStarted, FetchEnded, Received, *TRANSFER_EVENTS)


class _Spans:
    def __init__(self, trace: Any, fetches: FetchRecords) -> None:
        self._trace = trace
        self._tracer = trace.get_tracer("swarm")
        self._fetches = fetches
        self._open: dict[Digest, tuple[Any, dict[NodeId, Any]]] = {}  # digest -> span, spans of sources by node id

    def apply(self, entry: Entry) -> None:
        match entry.event:
            case Received(node, digest):
                self._source(digest, node)
            case Resolved() as resolved:
                self._resolved(entry.at_s, resolved)
            case FetchStarted(model_id, digest, size, resumed_bytes):
                attributes = {"model_id": model_id, "digest": digest, "bytes": size, "resumed_bytes": resumed_bytes}
                self._open[digest] = (self._tracer.start_span("swarm.fetch", attributes=_named(attributes)), {})
            case FetchEnded(digest, error):
                self._ended(entry.at_s, digest, error)
            case event if isinstance(event, TRANSFER_EVENTS):
                span = self._source(Digest(entry.subject), event.peer)
                if span and isinstance(event, Ban):
                    span.set_status(self._trace.StatusCode.ERROR, f"banned: {event.why}")

    def _source(self, digest: Digest, node: NodeId) -> Any:
        if digest not in self._open:
            return None
        fetch, sources = self._open[digest]
        if node not in sources:
            attributes = {"node": node, "node_name": self._fetches.records[digest].sources[node].name}
            within = self._trace.set_span_in_context(fetch)
            sources[node] = self._tracer.start_span("swarm.fetch.source", within, attributes=_named(attributes))
        return sources[node]

    def _resolved(self, at_s: float, resolved: Resolved) -> None:
        over_ns = time.time_ns()

        def wall_ns(then_s: float) -> int:
            return over_ns - int((at_s - then_s) * 1e9)

        span = self._tracer.start_span("swarm.resolve", start_time=wall_ns(resolved.began_at_s))
        span.set_attributes(_named({"model_id": resolved.model_id, "digest": resolved.digest}))
        if resolved.agreed_at_s is not None:
            span.add_event("agreed on the digest", timestamp=wall_ns(resolved.agreed_at_s))
        self._end(span, resolved.error, over_ns)

    def _ended(self, at_s: float, digest: Digest, error: str | None) -> None:
        if digest in self._open:
            over_ns = time.time_ns()
            fetch, sources = self._open.pop(digest)
            for node, span in sources.items():
                source = self._fetches.records[digest].sources[node]
                span.set_attributes(_named({name: getattr(source, name) for name in COUNTS}))
                span.end(end_time=over_ns - int((at_s - source.heard_at_s) * 1e9))
            self._end(fetch, error, over_ns)

    def _end(self, span: Any, error: str | None, over_ns: int) -> None:
        if error is not None:
            span.set_status(self._trace.StatusCode.ERROR, error)
        span.end(end_time=over_ns)


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {f"swarm.{name}": value for name, value in attributes.items() if value is not None}
