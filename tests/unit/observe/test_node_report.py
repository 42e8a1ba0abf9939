"""What does a journal look like to people?"""

from __future__ import annotations

import json

import pytest

from swarm.cli import status_table
from swarm.cli.status_json import swarm_status
from swarm.content.manifest import Digest, ModelId
from swarm.dashboard.member_report import member_report
from swarm.dashboard.swarm_view import SwarmView
from swarm.journal import (
    ArtifactsAnnounced,
    Entry,
    FetchEnded,
    FetchStarted,
    Joined,
    Journal,
    Left,
    Opened,
    Received,
    Sent,
)
from swarm.membership.swim_events import MemberChanged
from swarm.node import status_client
from swarm.observe import budget, node_report
from swarm.observe.node_report import NodeReport, distinct_names
from swarm.observe.rate import RATE_WINDOW_S, Rate
from swarm.protocol.messages import Address, Announcement, HeldPart, NodeId
from swarm.protocol.packets import Holding, Profile, Record, State

ORG_MODEL, N0, N1, N2 = ModelId("org/model"), NodeId("n0"), NodeId("n1"), NodeId("n2")

DIGEST = Digest("ab" * 32)
SMILE = "\N{GRINNING FACE}"  # four bytes


def announced(node: str, chunks: int, *, total: int = 4, model_id: str = "org/model") -> ArtifactsAnnounced:
    return ArtifactsAnnounced(
        NodeId(node), (Announcement(ModelId(model_id), DIGEST, "checkpoint", 100, chunks, total, False),)
    )


def reported(*events: object) -> NodeReport:
    """One second apart, beginning at 1."""
    report, journal = NodeReport(), Journal()
    report.follow(journal)
    for at_s, event in enumerate(events, 1):
        journal.record(at_s, "node", event)
    return report


OPENED = Opened(N0, "me", Address("127.0.0.1:1"))
JOINED = Joined(N1, "peer", Address("127.0.0.1:2"), "tcp")


def test_what_does_an_empty_journal_show() -> None:
    report = NodeReport().report(0)
    assert report == {
        "node": {"id": "", "name": "", "address": ""},
        "members": [],
        "artifacts": [],
        "origins": [],
        "transfers": [],
        "omitted": {"members": 0, "artifacts": 0, "transfers": 0},
    }


def test_who_is_there() -> None:
    report = reported(OPENED, JOINED, Left(N1, "tired"), Left(NodeId("n9"), "never seen")).report(5)
    assert report["node"] == {"id": "n0", "name": "me", "address": "127.0.0.1:1"}
    assert [(m["name"], m["state"], m["transport"]) for m in report["members"]] == [
        ("me", "alive", "self"),
        ("peer", "left", None),
    ]


HOLDING = Holding(ORG_MODEL, DIGEST, "checkpoint", 1, 4, False)


def heard(state: State, version: int = 0) -> MemberChanged:
    profile = Profile((HOLDING,), 0, ("tcp",), "h1", "r1", 2, 8, "0.1.0")
    return MemberChanged(Record(NodeId("f" * 16), version, state, version, "far", (Address("10.0.0.9:1"),), profile))


def test_are_members_shown_that_only_gossip_knows() -> None:
    known = reported(OPENED, heard(State.ALIVE))
    (_, far) = known.report(2)["members"]
    assert far == {
        "id": "f" * 16, "name": "far", "address": "10.0.0.9:1", "state": "alive", "transport": None,
        "host": "h1", "rack": "r1", "uploads": 2, "slots": 8, "linked_s": None, "gossip": True, "version": "0.1.0",
    }  # fmt: skip
    (artifact,) = known.report(2)["artifacts"]
    assert (artifact["bytes"], artifact["members"]) == (None, {"far": 0.25})


def test_says_a_link_more_than_gossip_and_gossip_who_is_dead() -> None:
    node = "f" * 16
    known = reported(
        OPENED, heard(State.ALIVE), Joined(NodeId(node), "far", Address("10.0.0.9:1"), "tcp"), announced(node, 2)
    )
    assert known.report(4)["artifacts"][0]["members"] == {"far": 0.5}
    assert known.report(4)["artifacts"][0]["bytes"] == 100
    known.apply(Entry(5, "node", heard(State.SUSPECT)))
    assert known.report(5)["members"][1]["state"] == "suspect"
    known.apply(Entry(6, "node", Left(NodeId(node), "gone")))
    known.apply(Entry(7, "node", heard(State.DEAD)))
    assert known.report(7)["members"][1]["state"] == "dead"
    assert known.report(7)["artifacts"] == []


def test_is_a_member_that_comes_back_alive() -> None:
    (_, peer) = reported(OPENED, JOINED, Left(N1, "tired"), JOINED).report(5)["members"]
    assert peer["state"] == "alive"


def test_who_holds_how_much() -> None:
    known = reported(OPENED, JOINED, announced("n0", 1), announced("n1", 4), announced("n9", 4))
    (artifact,) = known.report(6)["artifacts"]
    assert artifact == {
        "model_id": "org/model",
        "digest": DIGEST,
        "tier": "checkpoint",
        "bytes": 100,
        "members": {"me": 0.25, "peer": 1.0},
        "nodes": {"n0": 0.25, "n1": 1.0},
        "wanted": {},
        "revisions": [],
    }
    known.apply(Entry(7, "node", ArtifactsAnnounced(N0, ())))
    known.apply(Entry(8, "node", Left(N1, "tired")))
    assert known.report(9)["artifacts"] == []


def test_is_what_a_member_has_of_its_part_told_apart_from_what_it_has_of_all() -> None:
    part = Announcement(ORG_MODEL, DIGEST, "checkpoint", 100, 2, 8, False, HeldPart("a" * 16, 2, 2))
    gossiped = Holding(ORG_MODEL, DIGEST, "checkpoint", 1, 8, False, HeldPart("b" * 16, 1, 4))
    member = Record(NodeId("n2"), 1, State.ALIVE, 1, "far", (Address("f:1"),), Profile((gossiped,)))
    known = reported(OPENED, JOINED, ArtifactsAnnounced(N1, (part,)), MemberChanged(member))
    (artifact,) = known.report(6)["artifacts"]
    assert artifact["nodes"] == {"n1": 0.25, "n2": 0.125}
    assert artifact["wanted"] == {"n1": 1.0, "n2": 0.25}


def test_has_an_artifact_the_revisions_that_its_holders_tell() -> None:
    told = {N0: ("main", "v1"), N1: ("v1", "c0" * 20)}
    events = [
        ArtifactsAnnounced(
            node, (Announcement(ModelId("org/model"), DIGEST, "checkpoint", 9, 4, 4, False, revisions=names),)
        )
        for node, names in told.items()
    ]
    known = reported(OPENED, JOINED, *events)
    (artifact,) = known.report(6)["artifacts"]
    assert artifact["revisions"] == ["main", "v1", "c0" * 20]


def test_are_two_members_of_one_name_told_apart() -> None:
    twin = Joined(N2, "peer", Address("127.0.0.1:3"), "tcp")
    known = reported(OPENED, JOINED, twin, announced("n1", 4), announced("n2", 1), Sent(N2, DIGEST, 5))
    report = known.report(7)
    names = ["me", "peer", "peer (127.0.0.1:3)"]
    assert [member["name"] for member in report["members"]] == names
    assert report["artifacts"][0]["members"] == {"peer": 1.0, "peer (127.0.0.1:3)": 0.25}
    assert report["transfers"][0]["peer"] == "peer (127.0.0.1:3)"
    known.apply(Entry(8, "node", Left(N1, "tired")))
    assert known.report(9)["artifacts"][0]["members"] == {"peer": 0.25}


def test_does_everyone_have_a_name_of_their_own_whatever_they_call_themselves() -> None:
    members = [("n0", "a (x:1)", "w:1"), ("n1", "a", "x:1"), ("n2", "a", "x:1"), ("n3", "a", "y:1")]
    assert distinct_names(members) == {"n0": "a (x:1)", "n1": "a", "n2": "a (x:1) (n2)", "n3": "a (y:1)"}


def test_is_an_empty_artifact_whole() -> None:
    (artifact,) = reported(OPENED, announced("n0", 0, total=0)).report(3)["artifacts"]
    assert artifact["members"] == {"me": 1.0}


def test_what_is_moving() -> None:
    known = reported(
        OPENED, JOINED, Received(N1, DIGEST, 0, 30), Received(N1, DIGEST, 0, 10), Sent(NodeId("n9"), DIGEST, 5)
    )
    down, up = known.report(5)["transfers"]
    assert down == {
        "digest": DIGEST, "direction": "down", "peer": "peer", "node": "n1", "bytes": 40, "rate_bytes_per_s": 8,
    }  # fmt: skip
    assert (up["direction"], up["peer"], up["bytes"]) == ("up", "n9", 5)
    assert [flow["rate_bytes_per_s"] for flow in known.report(60)["transfers"]] == [0, 0]


def test_how_far_is_a_fetch() -> None:
    known = reported(
        OPENED,
        JOINED,
        FetchStarted(ORG_MODEL, DIGEST, 100, 20),
        Received(N1, DIGEST, 0, 30),
        Received(N2, Digest("other"), 0, 9),
    )
    fetch = known.fetches.records[DIGEST]
    assert (fetch.done_bytes, fetch.size, set(fetch.sources), fetch.started_at_s) == (50, 100, {"n1"}, 3)
    assert fetch.eta_s(5) == pytest.approx(50 / 15)
    assert fetch.eta_s(60) is None
    known.apply(Entry(6, "node", FetchEnded(DIGEST, None)))
    known.apply(Entry(7, "node", FetchEnded(Digest("unknown"), "why")))
    assert known.fetches.running == {}


def test_are_members_that_left_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_report, "GONE_KEPT", 2)
    known = reported(OPENED)
    for number in range(5):
        node = f"gone-{number}"
        known.apply(Entry(number, "node", Joined(NodeId(node), node, Address(""), "tcp")))
        known.apply(Entry(number, "node", Sent(NodeId(node), DIGEST, 1)))
        known.apply(Entry(number, "node", Left(NodeId(node), "tired")))
    report = known.report(9)
    assert [member["name"] for member in report["members"]] == ["me", "gone-3", "gone-4"]
    assert [flow["peer"] for flow in report["transfers"]] == ["gone-3", "gone-4"]


def test_how_fast_is_a_burst() -> None:
    rate = Rate()
    assert rate.at(0) == 0
    rate.add(10, 100)
    assert rate.at(10) == rate.at(11) == 100 / RATE_WINDOW_S
    rate.add(11, 100)
    assert rate.at(12) == 200 / RATE_WINDOW_S
    assert rate.at(10.5 + RATE_WINDOW_S) == 100 / RATE_WINDOW_S
    assert rate.at(99) == 0


def test_how_fast_is_what_has_just_begun() -> None:
    rate = Rate(since_s=9)
    rate.add(10, 100)
    assert rate.at(10) == 100
    assert rate.at(11) == 50
    assert rate.at(9 + RATE_WINDOW_S) == rate.at(10 + RATE_WINDOW_S) == 100 / RATE_WINDOW_S


def test_do_the_rates_of_its_links_add_up_to_that_of_a_fetch() -> None:
    known = reported(
        OPENED,
        FetchStarted(ORG_MODEL, DIGEST, 1000, 0),
        *(Received(NodeId(node), DIGEST, 0, 30) for node in ("n1", "n2", "n1", "n3", "n2", "n3")),
    )
    for now in (8, 9, 11):
        links = [flow["rate_bytes_per_s"] for flow in known.report(now)["transfers"]]
        assert sum(links) == pytest.approx(known.fetches.records[DIGEST].rate.at(now), abs=1.5)


def test_is_the_report_of_thousands_of_members_one_that_readers_accept() -> None:
    """5,000 members, real or made up, with the longest texts; those that this node has a link to are not left out."""
    report = NodeReport()
    journal = Journal()
    report.follow(journal)
    journal.record(0, "node", OPENED)
    journal.record(0, "node", JOINED)
    journal.record(0, "node", announced(N1, 4))
    long = SMILE * 32
    for number in range(5000):
        held = tuple(
            Holding(
                ModelId(f"{number}-{n}".ljust(40, SMILE)), Digest(f"{number:060x}{n:04x}"), "checkpoint", 1, 1, True
            )
            for n in range(4)
        )
        profile = Profile(held, 0, ("tcp",), long, long, 1, 8, "9")
        record = Record(NodeId(f"{number:016x}"), 0, State.ALIVE, 0, long, (Address("h" * 51 + ":1"),) * 8, profile)
        journal.record(1, "node", MemberChanged(record))
    told = report.report(2)
    data = json.dumps(told, ensure_ascii=False).encode()
    assert len(data) < status_client.REPORT_BYTES_MAX // 2
    assert {N0, N1} <= {member["id"] for member in told["members"]}
    assert len(told["members"]) + told["omitted"]["members"] == 5002
    assert len(told["artifacts"]) + told["omitted"]["artifacts"] == 20_001
    assert DIGEST in {artifact["digest"] for artifact in told["artifacts"]}

    own = member_report(told, report.fetches, {}, 2.0, place=("", ""))
    view = SwarmView().view(told, own, {}, 2.0)
    assert len(json.dumps(view, ensure_ascii=False).encode()) < status_client.REPORT_BYTES_MAX
    joined = swarm_status(told, view)
    assert {N0, N1} <= {member["id"] for member in joined["members"]}
    assert len(status_table.line(joined)) < 100_000


def test_is_a_report_without_much_complete() -> None:
    rows = [{"n": number, "text": "x" * 100} for number in range(100)]
    number = {id(row): place for place, row in enumerate(rows)}
    assert budget.within(rows, 1 << 20, first=lambda row: number[id(row)]) == rows
    assert budget.within(rows, 500, first=lambda row: -number[id(row)]) == rows[-4:], "in their order, the urgent ones"
    assert budget.items_within({"a": 1, "b": 2}, 12, first=lambda value: -value) == {"b": 2}
