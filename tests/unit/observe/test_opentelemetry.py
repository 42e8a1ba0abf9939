"""What a node does as OpenTelemetry spans, exported into memory by its SDK."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import swarm
from swarm import Settings
from swarm.content.manifest import Digest, ModelId
from swarm.journal import FetchEnded, FetchStarted, Joined, Journal, Left, Received, Resolved
from swarm.observe import opentelemetry
from swarm.observe.fetch_record import FetchRecords
from swarm.protocol.messages import Address, NodeId
from swarm.transfer.download_events import Ask, Ban, ChunkCorrupt, TransferEnded, TransferFailed

ORG_M, ID_ANN, ID_BEN = ModelId("org/m"), NodeId("id-ann"), NodeId("id-ben")

trace = pytest.importorskip("opentelemetry.trace", reason="opentelemetry-api is optional")
sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="without the SDK nothing is exported")
DIGEST = Digest("d" * 64)
SUBJECT = DIGEST


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Any]]:
    """The spans that ended so far, by name; those of sources by the source's name."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)

    def ended() -> dict[str, Any]:
        opentelemetry: tuple[Any, ...] = exporter.get_finished_spans()
        return {span.attributes.get("swarm.node_name", span.name): span for span in opentelemetry}

    return ended


def followed() -> Journal:
    journal, fetches = Journal(), FetchRecords()
    fetches.follow(journal)
    opentelemetry.follow(journal, fetches)
    return journal


def test_is_a_fetch_a_span(exported: Callable[[], dict[str, Any]]) -> None:
    journal = followed()
    journal.record(1.0, "node", FetchStarted(ORG_M, DIGEST, 30, 10))
    assert not exported()
    journal.record(2.0, "node", FetchEnded(DIGEST, "stalled"))
    span = exported()["swarm.fetch"]
    assert span.attributes == {
        "swarm.model_id": "org/m", "swarm.digest": DIGEST, "swarm.bytes": 30, "swarm.resumed_bytes": 10,
    }  # fmt: skip
    assert (span.status.status_code, span.status.description) == (trace.StatusCode.ERROR, "stalled")
    journal.record(3.0, "node", FetchEnded(DIGEST, None))  # of nobody


def test_is_each_source_a_span_of_its_fetch(exported: Callable[[], dict[str, Any]]) -> None:
    journal = followed()
    for name in ("ann", "ben"):
        journal.record(0.0, "node", Joined(NodeId(f"id-{name}"), name, Address("at"), "tcp"))
    journal.record(1.0, "node", FetchStarted(ORG_M, DIGEST, 30, 0))
    for transfer, name in enumerate(("ann", "ben")):
        journal.record(1.0, SUBJECT, Ask(NodeId(f"id-{name}"), transfer, (0, 1), "rarest"))
    journal.record(2.0, "id-ann", Received(ID_ANN, DIGEST, 0, 10))
    journal.record(2.0, "node", Left(ID_BEN, "gone"))
    journal.record(3.0, "id-ann", Received(ID_ANN, DIGEST, 1, 5))
    journal.record(3.0, SUBJECT, TransferEnded(ID_ANN, 0))
    journal.record(3.0, SUBJECT, Ask(ID_ANN, 2, (2,), "rarest"))  # goes on, and is no second span
    journal.record(4.0, SUBJECT, TransferFailed(ID_ANN, 2, "broke off"))
    journal.record(5.0, SUBJECT, ChunkCorrupt(ID_BEN, 1, 0))
    journal.record(5.0, SUBJECT, Ban(ID_BEN, "wrong chunks"))
    journal.record(9.0, "node", FetchEnded(DIGEST, None))
    ann, ben, fetch = (exported()[name] for name in ("ann", "ben", "swarm.fetch"))
    assert ann.name == ben.name == "swarm.fetch.source"
    assert ann.parent == ben.parent == fetch.context
    assert ann.attributes == {
        "swarm.node": "id-ann", "swarm.node_name": "ann",
        "swarm.bytes": 15, "swarm.chunks": 2, "swarm.rejected_chunks": 0, "swarm.failed_transfers": 1,
    }  # fmt: skip
    assert ben.attributes["swarm.rejected_chunks"] == 1
    assert ben.status.description == "banned: wrong chunks"
    assert fetch.end_time - ann.end_time == 5e9  # nothing came of it from 4.0 to 9.0
    assert fetch.end_time - ben.end_time == 4e9


def test_is_resolving_a_span(exported: Callable[[], dict[str, Any]]) -> None:
    journal = followed()
    journal.record(5.0, "node", Resolved(ORG_M, DIGEST, 1.0, 4.0, None))
    span = exported()["swarm.resolve"]
    assert span.attributes == {"swarm.model_id": "org/m", "swarm.digest": DIGEST}
    assert span.end_time - span.start_time == 4e9
    (agreed,) = span.events
    assert span.end_time - agreed.timestamp == 1e9
    assert span.status.is_ok


def test_are_spans_within_the_callers_own(exported: Callable[[], dict[str, Any]]) -> None:
    journal = followed()
    with trace.use_span(trace.get_tracer("application").start_span("start"), end_on_exit=True):
        journal.record(1.0, "node", Resolved(ORG_M, None, 0.0, None, "nobody serves it"))
        journal.record(1.0, "node", FetchStarted(ORG_M, DIGEST, 30, 0))
    journal.record(2.0, "node", FetchEnded(DIGEST, None))
    found = exported()
    assert found["swarm.resolve"].parent == found["swarm.fetch"].parent == found["start"].context
    assert found["swarm.resolve"].status.description == "nobody serves it"


def test_does_a_real_fetch_show_all_of_it_within_the_callers_span(
    exported: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_bytes(bytes(range(256)) * 4096)
    alike: dict[str, Any] = {"mdns": False, "cache": tmp_path / "cache", "find_timeout_s": 20.0}
    with swarm.serve(tmp_path / "model", model_id="org/m", settings=Settings(name="seed", **alike)) as served:
        newcomer = Settings(name="newcomer", peers=(served.address,), **alike)
        with trace.get_tracer("application").start_as_current_span("start"):
            swarm.fetch("org/m", out=tmp_path / "out", settings=newcomer).close()
    found = exported()
    start, resolve, fetch, seed = (found[name] for name in ("start", "swarm.resolve", "swarm.fetch", "seed"))
    assert resolve.parent == fetch.parent == start.context
    assert seed.parent == fetch.context
    assert seed.attributes["swarm.bytes"] == fetch.attributes["swarm.bytes"] == 1 << 20
    assert resolve.attributes["swarm.digest"] == fetch.attributes["swarm.digest"] == served.digest
    assert start.start_time <= resolve.start_time <= resolve.events[0].timestamp <= resolve.end_time
    assert fetch.start_time <= seed.start_time <= seed.end_time <= fetch.end_time


def test_do_spans_begin_when_the_application_imports_the_package(
    exported: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    journal = followed()
    journal.record(1.0, "node", FetchStarted(ORG_M, DIGEST, 30, 10))
    assert "opentelemetry.trace" not in sys.modules
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", trace)
    journal.record(2.0, "node", FetchEnded(DIGEST, None))
    assert exported() == {}
    journal.record(3.0, "node", FetchStarted(ORG_M, DIGEST, 30, 10))
    journal.record(4.0, "node", FetchEnded(DIGEST, None))
    assert list(exported()) == ["swarm.fetch"]
