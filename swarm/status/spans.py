"""Fetches as OpenTelemetry spans, where its API is installed; an SDK that the application sets up exports them."""

from __future__ import annotations

from swarm.journal import Entry, FetchEnded, FetchStarted, Journal


def follow(journal: Journal) -> None:
    """Makes a span of every fetch from now on. Does nothing without opentelemetry-api."""
    try:
        from opentelemetry import trace
    except ImportError:  # the name `opentelemetry` alone says little: other packages live in it
        return

    tracer = trace.get_tracer("swarm")
    running: dict[str, trace.Span] = {}

    def apply(entry: Entry) -> None:
        match entry.what:
            case FetchStarted(model_id, digest, size, resumed_bytes):
                span = running[digest] = tracer.start_span("swarm.fetch")
                span.set_attribute("swarm.model_id", model_id)
                span.set_attribute("swarm.digest", digest)
                span.set_attribute("swarm.bytes", size)
                span.set_attribute("swarm.resumed_bytes", resumed_bytes)
            case FetchEnded(digest, error) if digest in running:
                span = running.pop(digest)
                if error is not None:
                    span.set_status(trace.StatusCode.ERROR, error)
                span.end()

    journal.subscribe(apply, FetchStarted, FetchEnded)
