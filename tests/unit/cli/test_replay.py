"""Traces: what is written, and where it says that the time went."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from swarm.cli.main import main
from swarm.cli.replay import read, replay, show
from swarm.content.manifest import CHUNKS_MAX, Digest, ModelId
from swarm.dashboard.replay_server import ReplayServer
from swarm.errors import StoreError
from swarm.journal import (
    Entry,
    FetchEnded,
    FetchStarted,
    Joined,
    Journal,
    OriginListed,
    OriginNode,
    OriginRead,
    Received,
)
from swarm.observe import trace
from swarm.observe.fetch_record import PHASES
from swarm.observe.trace import event, tracing
from swarm.protocol.messages import Address, NodeId
from swarm.transfer.download_events import Ask, Ban, ChunkCorrupt, Granted, TransferEnded

P, Q = NodeId("a" * 16), NodeId("b" * 16)

DIGEST = Digest("d" * 64)
HERE = DIGEST
STORY = (
    Entry(9.0, "p", Joined(P, "pat", Address("127.0.0.1:1"), "tcp")),
    Entry(10.0, "node", FetchStarted(ModelId("org/m"), DIGEST, 30, 0)),
    Entry(11.0, HERE, Ask(P, 1, (0, 1), "first")),
    Entry(12.0, HERE, Granted(P, 1, (0, 1))),
    Entry(13.0, "p", Received(P, DIGEST, 0, 10)),
    Entry(13.5, HERE, ChunkCorrupt(Q, 2, 2)),
    Entry(13.6, HERE, Ban(Q, "it lies")),
    Entry(14.0, HERE, TransferEnded(P, 1)),
    Entry(14.5, "p", Received(P, DIGEST, 1, 20)),
    Entry(15.0, "node", FetchEnded(DIGEST, None)),
)


def test_do_the_phases_add_up() -> None:
    (fetch,) = replay(map(event, STORY))["fetches"]
    assert fetch["phases"] == dict.fromkeys(PHASES, 0) | {
        "connect": 2.0, "transfer": 2.0, "verify": 0.5, "seal": 0.5,
    }  # fmt: skip
    assert sum(fetch["phases"].values()) == fetch["seconds"] == 5.0
    assert fetch["complete"]
    pat, liar = fetch["sources"]
    assert (pat["name"], pat["bytes"], pat["waited_s"], pat["transfer_s"]) == ("pat", 30, 1.0, 2.0)
    assert (liar["rejected_chunks"], liar["banned"]) == (1, "it lies")


def test_is_an_origin_a_source_by_name_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    hub = OriginNode(Q, "origin hub", "hf")
    story = (
        Entry(9.0, "node", OriginListed(hub, 0.2, "hub: 503")),
        Entry(9.9, "node", OriginListed(hub, 0.2, None)),
        *STORY[1:2],
        Entry(12.0, Q, Received(Q, DIGEST, 0, 30)),
        Entry(12.5, "node", OriginRead(hub, "a", 0, 30, 2.0, None)),
        *STORY[-1:],
    )
    told = replay(map(event, story))
    (source,) = told["fetches"][0]["sources"]
    assert (source["name"], source["bytes"], source["origin"]) == ("origin hub", 30, True)
    (origin,) = told["origins"]
    assert (origin["bytes"], origin["requests"], origin["retries"], origin["error"]) == (30, 3, 1, None)
    show(told)
    assert "origin hub" in capsys.readouterr().out


def test_is_a_trace_that_was_cut_short_told() -> None:
    (fetch,) = replay(map(event, STORY[:6]))["fetches"]
    assert not fetch["complete"]
    assert fetch["seconds"] == 3.5
    (begun,) = replay(map(event, STORY[:2]))["fetches"]
    assert begun["seconds"] == 0.0
    assert set(begun["phases"].values()) == {0.0}


def test_is_a_trace_written_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal, path = Journal(), tmp_path / "trace"
    with tracing(journal, path):
        for entry in STORY:
            journal.record(*entry)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        json.loads(json.dumps(event(entry))) for entry in STORY
    ]
    assert main(["replay", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == replay(map(event, STORY))
    assert main(["replay", str(path)]) == 0
    shown = capsys.readouterr().out
    for word in ("org/m", "complete", "transfer", "verify", "pat", "it lies"):
        assert word in shown


def test_is_what_is_left_out_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "FILE_BYTES_MAX", 100)
    journal, path = Journal(), tmp_path / "trace"
    with tracing(journal, path):
        for entry in STORY:
            journal.record(*entry)
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["event"] == "LeftOut"
    assert last["entries"] == len(STORY) - (len(path.read_text().splitlines()) - 1)


@pytest.mark.parametrize("text", ["[]\n", "no trace\n", '{"event": "FetchStarted"}\n', '{"event": "Joined"}\n', None])
def test_is_another_file_refused(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "x").write_text(text)
    assert main(["replay", str(tmp_path / "x")]) == 5
    assert capsys.readouterr().err.startswith("swarm: ")


def test_text_of_a_trace_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = {"event": "FetchStarted", "subject": "node", "at_s": 1, "model_id": "\u202ex", "digest": "d" * 64}
    (tmp_path / "trace").write_text(json.dumps(line | {"size": 1, "resumed_bytes": 0}) + "\n")
    show(read(tmp_path / "trace"))
    assert "\u202e" not in capsys.readouterr().out


@pytest.mark.parametrize("fields", [{"chunks_total": 1 << 60}, {"chunks_total": 4, "held": [[0, 1 << 60]]}])
def test_a_trace_with_more_chunks_than_a_manifest_has_is_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    line = {"event": "FetchStarted", "subject": "node", "at_s": 1, "model_id": "x", "digest": "d" * 64, "size": 1}
    (tmp_path / "trace").write_text(json.dumps(line | {"resumed_bytes": 0, **fields}) + "\n")
    with pytest.raises(StoreError, match=r"is no trace of swarm .*chunks"):
        read(tmp_path / "trace")


def test_the_error_of_another_file_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "true").write_text("true\n")
    with pytest.raises(StoreError, match=r"true: is no trace of swarm \(Expected") as raised:
        read(tmp_path / "true")
    assert str(raised.value).startswith(str(tmp_path))


def test_does_a_file_without_end_end_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="a line of more than 16777216 bytes"):
        read(Path("/dev/zero"))
    monkeypatch.setattr(trace, "FILE_BYTES_MAX", 1000)
    monkeypatch.setattr(trace, "LINE_BYTES_MAX", 1000)
    (tmp_path / "long").write_bytes(b'{"event":"other"}\n' * 1000)
    with pytest.raises(StoreError, match="more than 1000 bytes"):
        read(tmp_path / "long")


def test_do_many_fetches_of_large_artifacts_take_no_memory_without_end(tmp_path: Path) -> None:
    """A line of 250 bytes can say that it holds a million chunks of another artifact."""
    path = tmp_path / "trace"
    with path.open("w") as file:
        for number in range(200):
            started = FetchStarted(ModelId("m"), Digest(f"{number:064x}"), 1, 0, CHUNKS_MAX, ((0, 1),))
            file.write(json.dumps(event(Entry(1.0, "node", started))) + "\n")
    with pytest.raises(StoreError, match="bitfields of more than 134217728 chunks"):
        ReplayServer(path)
    assert len(read(path)["fetches"]) == 200


@pytest.mark.parametrize(
    "line",
    [
        {
            "event": "Received",
            "at_s": 1,
            "subject": "x",
            "node": "a" * 16,
            "digest": "d" * 64,
            "chunk": -1,
            "size": 2**70,
        },
        {"event": "FetchStarted", "at_s": 10**400, "subject": "x"},
        {"event": ["FetchStarted"], "at_s": 1, "subject": "x"},
        {"event": "LeftOut", "entries": "many"},
        {"event": "PeerHas", "at_s": 1, "subject": "d" * 64, "peer": P, "chunks": [2**70, -5]},
    ],
    ids=["huge", "time", "list", "text", "chunks"],
)
def test_is_a_crafted_line_one_error(tmp_path: Path, line: dict[str, object]) -> None:
    path = tmp_path / "trace"
    good = [event(entry) for entry in STORY[:4]]
    path.write_text("".join(json.dumps(each) + "\n" for each in (*good, line)))
    for reader in (read, ReplayServer):
        with contextlib.suppress(StoreError):  # any other error is a traceback for the user
            reader(path)


@pytest.mark.parametrize(
    "made",
    [
        Joined(NodeId("<img src=x onerror=hit()>"), "pat", Address("127.0.0.1:1"), "tcp"),
        FetchStarted(ModelId("org/m"), Digest("'] , *:not(['"), 30, 0),
        FetchStarted(ModelId("\x1b]0;owned\x07"), DIGEST, 30, 0),
        Ask(NodeId("__proto__"), 1, (0, 1), "first"),
    ],
    ids=["node", "digest", "model id", "peer"],
)
def test_are_ids_that_no_node_has_refused(tmp_path: Path, made: object) -> None:
    """They are parts of addresses and selectors in the page."""
    path = tmp_path / "trace"
    path.write_text("".join(json.dumps(event(entry)) + "\n" for entry in (*STORY[:2], Entry(11.0, HERE, made))))
    with pytest.raises(StoreError, match=r"is no trace of swarm \(Expected"):
        read(path)
