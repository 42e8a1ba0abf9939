"""What becomes of fetches, out of journal entries."""

from __future__ import annotations

from typing import Any

from swarm.content.manifest import Digest, ModelId
from swarm.journal import FetchEnded, FetchStarted, Journal, Received
from swarm.observe import fetch_history
from swarm.observe.fetch_history import FetchHistories
from swarm.protocol.messages import NodeId
from swarm.transfer.download_events import Ban, ChunkCorrupt

M = ModelId("m")

DIGEST = Digest("d" * 64)
SEED, MATE, LIAR = NodeId("a" * 16), NodeId("b" * 16), NodeId("c" * 16)


def histories_of(*entries: tuple[float, Any]) -> FetchHistories:
    journal, histories = Journal(), FetchHistories()
    histories.follow(journal)
    for at_s, what in entries:
        subject = DIGEST if isinstance(what, Ban | ChunkCorrupt) else "node"
        journal.record(at_s, subject, what)
    return histories


def test_who_gave_a_chunk_and_when() -> None:
    fetch = histories_of(
        (10, FetchStarted(M, DIGEST, 300, 100)),
        (11, Received(SEED, DIGEST, 2, 100)),
        (13, Received(MATE, DIGEST, 0, 100)),
    ).fetches[DIGEST]
    assert fetch.parent(2) == (SEED, 1.0)
    assert fetch.parent(0) == (MATE, 3.0)
    assert fetch.parent(1) is None  # was here before
    assert fetch.chunks == 2


def test_phases_add_up_and_lanes_hold_every_byte() -> None:
    timeline = histories_of(
        (10, FetchStarted(M, DIGEST, 300, 0)),
        (12, Received(SEED, DIGEST, 0, 100)),
        (12.5, ChunkCorrupt(LIAR, 7, 1)),
        (12.6, Ban(LIAR, "sent 3 wrong chunks")),
        (14, Received(MATE, DIGEST, 1, 200)),
        (15, FetchEnded(DIGEST, None)),
    ).fetches[DIGEST].timeline(99)  # fmt: skip
    assert [phase["seconds"] for phase in timeline["phases"]] == [2, 2, 1]
    assert timeline["seconds"] == 5
    assert not timeline["running"]
    assert [(lane["node"], lane["bytes"], sum(lane["buckets"])) for lane in timeline["lanes"]] == [
        (SEED, 100, 100),
        (MATE, 200, 200),
        (LIAR, 0, 0),
    ]
    liar = timeline["lanes"][2]
    assert (liar["rejected_chunks"], liar["rejected_at_s"], liar["banned"]) == (1, [2.5], "sent 3 wrong chunks")


def test_a_fetch_that_brought_nothing_yet_waits() -> None:
    timeline = histories_of((10, FetchStarted(M, DIGEST, 300, 0))).fetches[DIGEST].timeline(13)
    assert timeline["running"]
    assert [phase["seconds"] for phase in timeline["phases"]] == [3, 0, 0]
    assert timeline["lanes"] == []


def test_what_ended_first_is_forgotten_first_and_what_runs_is_not() -> None:
    entries: list[tuple[float, Any]] = [(0, FetchStarted(ModelId("running"), DIGEST, 1, 0))]
    for number in range(fetch_history.FETCHES_KEPT + 3):
        digest = f"{number:064x}"
        entries += [(number, FetchStarted(M, Digest(digest), 1, 0)), (number, FetchEnded(Digest(digest), None))]
    kept = histories_of(*entries).fetches
    assert len(kept) == fetch_history.FETCHES_KEPT
    assert DIGEST in kept
    assert f"{0:064x}" not in kept
