"""Records of fetches, from journal entries."""

from __future__ import annotations

from typing import Any

from swarm.content.manifest import Digest, ModelId
from swarm.journal import FetchEnded, FetchStarted, Joined, Journal, Left, Received, Resolved
from swarm.observe import fetch_record
from swarm.observe.fetch_record import PHASES, FetchRecords
from swarm.protocol.messages import Address, NodeId
from swarm.transfer.download_events import Ask, Ban, ChunkCorrupt, Granted, TransferEnded, TransferFailed

M = ModelId("m")

DIGEST = Digest("d" * 64)
SEED, MATE, LIAR = NodeId("a" * 16), NodeId("b" * 16), NodeId("c" * 16)


def recorded(*entries: tuple[float, Any]) -> FetchRecords:
    journal, fetches = Journal(), FetchRecords()
    fetches.follow(journal)
    for at_s, event in entries:
        journal.record(at_s, DIGEST, event)
    return fetches


def test_who_gave_a_chunk_and_when() -> None:
    fetch = recorded(
        (10, FetchStarted(M, DIGEST, 300, 100)),
        (11, Received(SEED, DIGEST, 2, 100)),
        (13, Received(MATE, DIGEST, 0, 100)),
    ).records[DIGEST]
    assert fetch.origin_of(2) == (SEED, 1.0)
    assert fetch.origin_of(0) == (MATE, 3.0)
    assert fetch.origin_of(1) is None  # was here before
    assert fetch.chunks == 2


def test_phases_add_up_and_lanes_hold_every_byte() -> None:
    timeline = recorded(
        (10, FetchStarted(M, DIGEST, 300, 0)),
        (12, Granted(SEED, 1, (0, 1))),
        (12, Received(SEED, DIGEST, 0, 100)),
        (12.5, ChunkCorrupt(LIAR, 7, 1)),
        (12.6, Ban(LIAR, "sent 3 wrong chunks")),
        (14, Received(MATE, DIGEST, 1, 200)),
        (14, TransferEnded(SEED, 1)),
        (15, FetchEnded(DIGEST, None)),
    ).records[DIGEST].timeline(99)  # fmt: skip
    assert timeline["phases"] == dict.fromkeys(PHASES, 0) | {"connect": 2, "transfer": 2, "seal": 1}
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
    timeline = recorded((10, FetchStarted(M, DIGEST, 300, 0))).records[DIGEST].timeline(13)
    assert timeline["running"]
    assert timeline["phases"] == dict.fromkeys(PHASES, 0) | {"connect": 3}
    assert timeline["lanes"] == []


def test_what_ended_first_is_forgotten_first_and_what_runs_is_not() -> None:
    entries: list[tuple[float, Any]] = [(0, FetchStarted(ModelId("running"), DIGEST, 1, 0))]
    for number in range(fetch_record.FETCHES_KEPT + 3):
        digest = f"{number:064x}"
        entries += [(number, FetchStarted(M, Digest(digest), 1, 0)), (number, FetchEnded(Digest(digest), None))]
    kept = recorded(*entries).records
    assert len(kept) == fetch_record.FETCHES_KEPT
    assert DIGEST in kept
    assert f"{0:064x}" not in kept


def test_phases_begin_with_the_resolution_and_add_up() -> None:
    fetch = recorded(
        (5, Resolved(ModelId("other"), None, 1.0, None, "no peer serves it")),
        (8, Resolved(M, DIGEST, 4.0, 7.0, None)),
        (10, FetchStarted(M, DIGEST, 300, 100)),
        (10.5, Ask(SEED, 1, (0,), "first")),
        (11, Granted(SEED, 1, (0,))),
        (12, Received(SEED, DIGEST, 0, 100)),
        (12, TransferEnded(SEED, 1)),
        (14, Granted(MATE, 2, (1,))),
        (15, Granted(SEED, 3, (1,))),
        (16, TransferFailed(SEED, 3, "broke off")),
        (17, TransferEnded(MATE, 2)),
        (17.5, Received(MATE, DIGEST, 1, 100)),
        (18, FetchEnded(DIGEST, None)),
    ).records[DIGEST]
    phases = fetch.phases(99)
    assert phases == {
        "resolve": 3, "manifest": 1, "hash": 2, "connect": 1, "transfer": 4, "wait": 2, "verify": 0.5, "seal": 0.5,
    }  # fmt: skip
    report = fetch.report(99)
    assert sum(phases.values()) == report["seconds"] == 14
    assert [(s["waited_s"], s["transfer_s"], s["failed_transfers"]) for s in report["sources"]] == [
        (0.5, 2, 1), (0, 3, 0),
    ]  # fmt: skip
    (seed, _) = fetch.timeline(99)["lanes"]
    assert [place for place, size in enumerate(seed["buckets"]) if size] == [int(8 / 14 * fetch_record.BUCKETS)]


def test_failed_fetches_seal_nothing() -> None:
    fetch = recorded(
        (10, FetchStarted(M, DIGEST, 300, 0)),
        (11, Granted(SEED, 1, (0, 1))),
        (12, Received(SEED, DIGEST, 0, 100)),
        (20, FetchEnded(DIGEST, "stalled")),
        (21, TransferFailed(SEED, 1, "after the end")),
    ).records[DIGEST]
    assert fetch.phases(99) == dict.fromkeys(PHASES, 0) | {"connect": 1, "transfer": 9}
    assert fetch.sources[SEED].failed_transfers == 0


def test_chunks_that_were_stored_before_need_no_source() -> None:
    fetch = recorded((10, FetchStarted(M, DIGEST, 300, 300)), (12, FetchEnded(DIGEST, None))).records[DIGEST]
    assert fetch.phases(99) == dict.fromkeys(PHASES, 0) | {"seal": 2}


def test_sources_keep_the_name_of_their_link() -> None:
    fetch = recorded(
        (9, Joined(SEED, "seed", Address("127.0.0.1:1"), "tcp")),
        (10, FetchStarted(M, DIGEST, 300, 0)),
        (11, Received(SEED, DIGEST, 0, 100)),
        (12, Left(SEED, "gone")),
        (13, Received(MATE, DIGEST, 1, 100)),
    ).records[DIGEST]
    assert [(source.name, source.linked) for source in fetch.sources.values()] == [("seed", False), (MATE, True)]
