"""What does a journal look like to people?"""

from __future__ import annotations

import pytest

from swarm.content.manifest import Digest, ModelId
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
from swarm.membership.swim import Changed
from swarm.observe import node_report as pictures
from swarm.observe.node_report import RATE_WINDOW_S, Picture, Rate, distinct_names
from swarm.protocol.messages import Address, Announcement, NodeId
from swarm.protocol.packets import Holding, Profile, Record, State

ORG_MODEL, N0, N1, N2 = ModelId("org/model"), NodeId("n0"), NodeId("n1"), NodeId("n2")

DIGEST = Digest("ab" * 32)


def announced(node: str, chunks: int, *, total: int = 4, model_id: str = "org/model") -> ArtifactsAnnounced:
    return ArtifactsAnnounced(
        NodeId(node), (Announcement(ModelId(model_id), DIGEST, "checkpoint", 100, chunks, total, False),)
    )


def picture_of(*happenings: object) -> Picture:
    """One second apart, beginning at 1."""
    picture, journal = Picture(), Journal()
    picture.follow(journal)
    for at_s, what in enumerate(happenings, 1):
        journal.record(at_s, "node", what)
    return picture


OPENED = Opened(N0, "me", Address("127.0.0.1:1"))
JOINED = Joined(N1, "peer", Address("127.0.0.1:2"), "tcp")


def test_what_does_an_empty_journal_show() -> None:
    report = Picture().report(0)
    assert report == {
        "node": {"id": "", "name": "", "address": ""},
        "members": [],
        "artifacts": [],
        "transfers": [],
    }


def test_who_is_there() -> None:
    report = picture_of(OPENED, JOINED, Left(N1, "tired"), Left(NodeId("n9"), "never seen")).report(5)
    assert report["node"] == {"id": "n0", "name": "me", "address": "127.0.0.1:1"}
    assert [(m["name"], m["state"], m["transport"]) for m in report["members"]] == [
        ("me", "alive", "self"),
        ("peer", "left", None),
    ]


HOLDING = Holding(ORG_MODEL, DIGEST, "checkpoint", 1, 4, False)


def heard(state: State, version: int = 0) -> Changed:
    profile = Profile((HOLDING,), 0, ("tcp",), "h1", "r1", 2, 8, "0.1.0")
    return Changed(Record(NodeId("f" * 16), version, state, version, "far", Address("10.0.0.9:1"), profile))


def test_are_members_shown_that_only_gossip_knows() -> None:
    picture = picture_of(OPENED, heard(State.ALIVE))
    (_, far) = picture.report(2)["members"]
    assert far == {
        "id": "f" * 16, "name": "far", "address": "10.0.0.9:1", "state": "alive", "transport": None,
        "host": "h1", "rack": "r1", "uploads": 2, "slots": 8, "linked_s": None, "gossip": True, "version": "0.1.0",
    }  # fmt: skip
    (artifact,) = picture.report(2)["artifacts"]
    assert (artifact["bytes"], artifact["members"]) == (None, {"far": 0.25})


def test_says_a_link_more_than_gossip_and_gossip_who_is_dead() -> None:
    node = "f" * 16
    picture = picture_of(
        OPENED, heard(State.ALIVE), Joined(NodeId(node), "far", Address("10.0.0.9:1"), "tcp"), announced(node, 2)
    )
    assert picture.report(4)["artifacts"][0]["members"] == {"far": 0.5}
    assert picture.report(4)["artifacts"][0]["bytes"] == 100
    picture.apply(Entry(5, "node", heard(State.SUSPECT)))
    assert picture.report(5)["members"][1]["state"] == "suspect"
    picture.apply(Entry(6, "node", Left(NodeId(node), "gone")))
    picture.apply(Entry(7, "node", heard(State.DEAD)))
    assert picture.report(7)["members"][1]["state"] == "dead"
    assert picture.report(7)["artifacts"] == []


def test_is_a_member_that_comes_back_alive() -> None:
    (_, peer) = picture_of(OPENED, JOINED, Left(N1, "tired"), JOINED).report(5)["members"]
    assert peer["state"] == "alive"


def test_who_holds_how_much() -> None:
    picture = picture_of(OPENED, JOINED, announced("n0", 1), announced("n1", 4), announced("n9", 4))
    (artifact,) = picture.report(6)["artifacts"]
    assert artifact == {
        "model_id": "org/model",
        "digest": DIGEST,
        "tier": "checkpoint",
        "bytes": 100,
        "members": {"me": 0.25, "peer": 1.0},
    }
    picture.apply(Entry(7, "node", ArtifactsAnnounced(N0, ())))
    picture.apply(Entry(8, "node", Left(N1, "tired")))
    assert picture.report(9)["artifacts"] == []


def test_are_two_members_of_one_name_told_apart() -> None:
    twin = Joined(N2, "peer", Address("127.0.0.1:3"), "tcp")
    picture = picture_of(OPENED, JOINED, twin, announced("n1", 4), announced("n2", 1), Sent(N2, DIGEST, 5))
    report = picture.report(7)
    names = ["me", "peer", "peer (127.0.0.1:3)"]
    assert [member["name"] for member in report["members"]] == names
    assert report["artifacts"][0]["members"] == {"peer": 1.0, "peer (127.0.0.1:3)": 0.25}
    assert report["transfers"][0]["peer"] == "peer (127.0.0.1:3)"
    picture.apply(Entry(8, "node", Left(N1, "tired")))
    assert picture.report(9)["artifacts"][0]["members"] == {"peer": 0.25}


def test_does_everyone_have_a_name_of_their_own_whatever_they_call_themselves() -> None:
    members = [("n0", "a (x:1)", "w:1"), ("n1", "a", "x:1"), ("n2", "a", "x:1"), ("n3", "a", "y:1")]
    assert distinct_names(members) == {"n0": "a (x:1)", "n1": "a", "n2": "a (x:1) (n2)", "n3": "a (y:1)"}


def test_is_an_empty_artifact_whole() -> None:
    (artifact,) = picture_of(OPENED, announced("n0", 0, total=0)).report(3)["artifacts"]
    assert artifact["members"] == {"me": 1.0}


def test_what_is_moving() -> None:
    picture = picture_of(
        OPENED, JOINED, Received(N1, DIGEST, 0, 30), Received(N1, DIGEST, 0, 10), Sent(NodeId("n9"), DIGEST, 5)
    )
    down, up = picture.report(5)["transfers"]
    assert down == {"digest": DIGEST, "direction": "down", "peer": "peer", "bytes": 40, "rate_bytes_per_s": 8}
    assert (up["direction"], up["peer"], up["bytes"]) == ("up", "n9", 5)
    assert [flow["rate_bytes_per_s"] for flow in picture.report(60)["transfers"]] == [0, 0]


def test_how_far_is_a_fetch() -> None:
    picture = picture_of(
        OPENED,
        JOINED,
        FetchStarted(ORG_MODEL, DIGEST, 100, 20),
        Received(N1, DIGEST, 0, 30),
        Received(N2, Digest("other"), 0, 9),
    )
    fetch = picture.fetches[DIGEST]
    assert (fetch.done_bytes, fetch.size, fetch.sources, fetch.started_at_s) == (50, 100, {"n1"}, 3)
    assert fetch.eta_s(5) == pytest.approx(50 / 15)
    assert fetch.eta_s(60) is None
    picture.apply(Entry(6, "node", FetchEnded(DIGEST, None)))
    picture.apply(Entry(7, "node", FetchEnded(Digest("unknown"), "why")))
    assert picture.fetches == {}


def test_are_members_that_left_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "GONE_KEPT", 2)
    picture = picture_of(OPENED)
    for number in range(5):
        node = f"gone-{number}"
        picture.apply(Entry(number, "node", Joined(NodeId(node), node, Address(""), "tcp")))
        picture.apply(Entry(number, "node", Sent(NodeId(node), DIGEST, 1)))
        picture.apply(Entry(number, "node", Left(NodeId(node), "tired")))
    report = picture.report(9)
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
    picture = picture_of(
        OPENED,
        FetchStarted(ORG_MODEL, DIGEST, 1000, 0),
        *(Received(NodeId(node), DIGEST, 0, 30) for node in ("n1", "n2", "n1", "n3", "n2", "n3")),
    )
    for now in (8, 9, 11):
        links = [flow["rate_bytes_per_s"] for flow in picture.report(now)["transfers"]]
        assert sum(links) == pytest.approx(picture.fetches[DIGEST].rate.at(now), abs=1.5)
