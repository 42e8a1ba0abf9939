"""Fetches as OpenTelemetry spans, with its API alone."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from swarm.journal import FetchEnded, FetchStarted, Journal
from swarm.status import spans

trace = pytest.importorskip("opentelemetry.trace", reason="opentelemetry-api is optional")


class Span:
    """Remembers what was said of it."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}
        self.ended = False

    def set_attribute(self, name: str, value: object) -> None:
        self.said[name] = value

    def set_status(self, code: object, why: str) -> None:
        self.said["status"] = (code, why)

    def end(self) -> None:
        self.ended = True


class Tracer:
    def __init__(self) -> None:
        self.started: list[Span] = []

    def start_span(self, name: str) -> Span:
        assert name == "swarm.fetch"
        self.started.append(Span())
        return self.started[-1]


def test_is_a_fetch_a_span(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer()
    monkeypatch.setattr(trace, "get_tracer", lambda name: tracer)
    journal = Journal()
    spans.follow(journal)
    journal.record(1.0, "node", FetchStarted("org/m", "d" * 64, 30, 10))
    (span,) = tracer.started
    assert span.said == {
        "swarm.model_id": "org/m", "swarm.digest": "d" * 64, "swarm.bytes": 30, "swarm.resumed_bytes": 10,
    }  # fmt: skip
    assert not span.ended
    journal.record(2.0, "node", FetchEnded("d" * 64, "stalled"))
    assert span.ended
    assert span.said["status"] == (trace.StatusCode.ERROR, "stalled")
    journal.record(3.0, "node", FetchEnded("d" * 64, None))  # of nobody


def test_is_nothing_done_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["opentelemetry"], "trace")
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)  # as where another package of that name space is
    journal = Journal()
    spans.follow(journal)
    journal.record(1.0, "node", FetchStarted("org/m", "d" * 64, 30, 10))
