"""What `swarm status` shows: joined from a report and a view, in a table, in a line, again and again."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from rich.console import Console

from swarm.cli import status_table, status_watch
from swarm.cli.status_json import SCHEMA, Json, healthy, swarm_status
from swarm.content.manifest import Digest, ModelId
from swarm.dashboard.collector import MemberAnswer
from swarm.dashboard.member_report import FetchSummary, KnownPeer, MemberReport, PeerFlow, ReadOrigin, Rejected
from swarm.dashboard.swarm_view import SwarmView
from swarm.errors import PeerUnreachable
from swarm.node import status_client
from swarm.protocol.messages import NodeId

MODEL = ModelId("org/m")
DIGEST, OTHER = Digest("d" * 64), "e" * 64
ME, A, LIAR = (NodeId("1" * 16), NodeId("a" * 16), NodeId("f" * 16))


def member(node: str, name: str, state: str = "alive", **facts: Any) -> Json:
    nothing = {"host": "h", "rack": None, "uploads": 1, "slots": 8, "linked_s": 20.0, "gossip": True}
    return {"id": node, "name": name, "address": "127.0.0.1:1", "state": state, "transport": "tcp"} | nothing | facts


def report(*members: Json, node: dict[str, Any] | None = None, artifacts: tuple[Json, ...] = ()) -> Json:
    here = {"id": ME, "name": "me", "address": "127.0.0.1:1", "version": "1"} | (node or {})
    return {
        "node": here,
        "members": [member(ME, "me", transport="self"), *members],
        "artifacts": list(artifacts),
        "origins": [],
        "transfers": [],
    }


def held(digest: str, name: str) -> Json:
    holders = {"members": {name: 1.0}, "nodes": {ME if name == "me" else A: 1.0}}
    return {"model_id": "org/m", "digest": digest, "tier": "checkpoint", "bytes": 9, **holders}


def fetching(*, quiet_s: float = 0.0) -> MemberReport:
    """Tells of a fetch that A feeds, and that the liar spoilt."""
    return MemberReport(
        ME, "h", "", (KnownPeer(A, "ann", "127.0.0.1:2"),), (PeerFlow(DIGEST, "down", A, 70, 7_000_000),),
        (FetchSummary(MODEL, DIGEST, 1000, 250, 7_000_000, 7_000_000, 5.0, 9.0, 2, True, None, quiet_s),), (),
        (Rejected(DIGEST, LIAR, 3, True, "3 wrong chunks in a row"),), "1",
    )  # fmt: skip


def swarm(known: Json, own: MemberReport | None = None, **told: MemberReport) -> Json:
    own = own or MemberReport(ME, "h", "", (), (), (), (), (), known["node"]["version"])
    answers: dict[str, MemberAnswer] = {each.node: MemberAnswer(each) for each in told.values()}
    return swarm_status(known, SwarmView().view(known, own, answers, 0.0))


def codes(known: Json, own: MemberReport | None = None, **told: MemberReport) -> list[str]:
    return [warning["code"] for warning in swarm(known, own, **told)["warnings"]]


HUB = NodeId("e" * 16)


def test_is_an_origin_told_and_drawn_as_a_node() -> None:
    read = ReadOrigin(HUB, "origin hub", "hf", 105_000_000, 14, 2, "hub: 429")
    own = msgspec.structs.replace(fetching(), origins=(read,), flows=(PeerFlow(DIGEST, "down", HUB, 7, 3_000_000),))
    told = swarm(ALL, own)
    (origin,) = told["origins"]
    assert origin == {
        "id": HUB, "name": "origin hub", "scheme": "hf", "bytes": 105_000_000, "requests": 14, "retries": 2,
        "errors": {ME: "hub: 429"}, "rate_bytes_per_s": 3_000_000,
    }  # fmt: skip
    assert HUB not in {each["id"] for each in told["members"]}
    assert told["fetches"][0]["fed_by"] == [{"node": HUB, "name": "origin hub", "rate_bytes_per_s": 3_000_000}]
    row = r"origin hub +│ - +│ failing .*│ hf .*│ 105 MB read, 14 requests, 2 retries │ +3 MB/s"
    assert re.search(row, drawn(told))
    assert "origin hub: 105 MB read" in status_table.line(told)


def test_is_the_origin_of_the_asked_node_told_without_a_view() -> None:
    row = {"id": HUB, "name": "origin hub", "scheme": "hf", "bytes": 1, "rate_bytes_per_s": 2, "requests": 3}
    (origin,) = swarm_status({**ALL, "origins": [{**row, "retries": 0, "error": None}]}, None)["origins"]
    assert origin == {**row, "retries": 0, "errors": {}}


ALL = report(member(A, "ann"), member(LIAR, "liar"))


def test_is_a_fetch_told_with_who_feeds_it_and_who_lied() -> None:
    told = swarm(ALL, fetching())
    (fetch,) = told["fetches"]
    assert fetch["fed_by"] == [{"node": A, "name": "ann", "rate_bytes_per_s": 7_000_000}]
    assert (fetch["fraction"], fetch["rejected_chunks"], fetch["stalled"]) == (0.25, 3, False)
    (warning,) = told["warnings"]
    assert warning["what"] == "liar sent 3 wrong chunks to me, which has banned it"
    assert "127.0.0.1:1, host h" in warning["do"]
    assert not healthy(told)


def test_are_the_fields_of_the_json_those_that_are_documented() -> None:
    told = swarm(ALL, fetching())
    assert told["schema"] == SCHEMA == 1
    assert list(told) == [
        "schema",
        "node",
        "members",
        "artifacts",
        "origins",
        "transfers",
        "fetches",
        "links",
        "warnings",
        "asked",
    ]
    assert set(told["warnings"][0]) == {"key", "code", "level", "node", "what", "do"}
    assert {"state", "host", "rack", "up_bytes_per_s", "down_bytes_per_s", "version"} <= set(told["members"][0])


@pytest.mark.parametrize(
    ("known", "code"),
    [
        (report(node={"open": True}), "no-key"),
        (report(node={"mdns": "blocked"}), "mdns"),
        (report(node={"mdns": "silent"}), "mdns"),
        (report(node={"withdrawn": {"org/m": "model.bin changed"}}), "withdrawn"),
        (report(member(A, "ann", gossip=False)), "gossip-deaf"),
        (report(member(A, "ann", "dead")), "dead"),
        (report(member(A, "ann", "suspect")), "silent"),
        (report(artifacts=(held(DIGEST, "me"), held(OTHER, "ann"))), "conflict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_is_it_warned_of(known: Json, code: str) -> None:
    assert codes(known) == [code]


def test_is_a_version_told_that_differs() -> None:
    gossiped = report(member(A, "ann") | {"version": "2"})
    assert codes(gossiped) == ["version-skew"]
    assert codes(report(member(A, "ann", "left") | {"version": "2"})) == []
    assert [m["version"] for m in swarm_status(gossiped, None)["members"]] == [None, "2"]
    other = MemberReport(A, "h", "", (), (), (), (), (), "2")
    assert codes(report(member(A, "ann")), None, a=other) == ["version-skew"]
    assert codes(report(member(A, "ann")), None, a=MemberReport(A, "h", "", (), (), (), (), (), "1")) == []


def test_is_a_fetch_stalled_that_gets_nothing() -> None:
    assert codes(report(), fetching(quiet_s=9.0)) == ["stalled"]


@pytest.mark.parametrize(
    "known",
    [report(), report(member(A, "ann", gossip=False, linked_s=1.0)), report(member(A, "ann", "left"))],
    ids=["alone", "linked just now", "left"],
)
def test_is_there_nothing_to_warn_of(known: Json) -> None:
    assert codes(known) == []
    assert healthy(swarm(known))


def test_is_a_node_without_a_view_shown_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    told = swarm_status(ALL, None)
    assert (told["warnings"], told["fetches"], told["asked"]) == ([], [], None)
    status_table.show(told)
    assert "3 members" in capsys.readouterr().out


def drawn(told: Json, width: int = 200) -> str:
    console = Console(width=width, markup=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(status_table.screen(told))
    return console.export_text()


def test_do_warnings_come_first_and_rates_with_units() -> None:
    shown = drawn(swarm(ALL, fetching()))
    assert shown.index("liar sent") < shown.index("member ") < shown.index("rejected")
    for word in ("me at 127.0.0.1:1, 3 members", "25%", "7 MB/s", "5 s", "ann 7 MB/s", "━"):
        assert word in shown


def test_is_a_part_shown_apart_from_the_whole() -> None:
    artifact = held(DIGEST, "ann") | {"members": {"ann": 0.25, "me": 0.1}, "nodes": {A: 0.25, ME: 0.1}}
    known = report(member(A, "ann"), artifacts=(artifact | {"wanted": {A: 1.0, ME: 0.4}},))
    shown = drawn(swarm(known), width=200)
    assert "25% org/m, all it wants" in shown
    assert "10% org/m, 40% of its part" in shown
    assert swarm(known)["artifacts"][0]["wanted"] == {A: 1.0, ME: 0.4}


def test_is_a_liar_without_a_link_in_the_table_with_its_address() -> None:
    own = msgspec.structs.replace(fetching(), peers=(KnownPeer(LIAR, "liar", "127.0.0.1:9"),))
    shown = drawn(swarm(report(member(A, "ann")), own))
    assert re.search(r"│ liar +│ 127.0.0.1:9 +│ wrong chunks", shown)


def crowded(members: int, *, warnings: int = 1) -> Json:
    """So many members of which all but the first fetch, and as many warnings."""
    told = swarm(ALL, fetching())
    first, fetch, warning = told["members"][0], told["fetches"][0], told["warnings"][0]
    names = [f"member-{number}" for number in range(members)]
    return told | {
        "members": [first | {"name": name, "address": f"10.0.0.{number}:7000"} for number, name in enumerate(names)],
        "fetches": [fetch | {"name": name} for name in names[1:]],
        "warnings": [warning] * warnings,
    }


def in_place(told: Json, *, width: int, height: int) -> list[str]:
    """The lines of a screen that does not scroll."""
    console = Console(width=width, height=height, markup=False, color_system=None)
    lines = console.render_lines(status_table.screen(told, in_place=True), pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


@pytest.mark.parametrize("height", [8, 16, 24, 40])
def test_does_a_small_screen_show_warnings_then_what_fits_and_how_much_does_not(height: int) -> None:
    shown = in_place(crowded(20), width=80, height=height)
    assert len(shown) <= height
    assert "liar sent 3 wrong chunks" in shown[1]
    members = sum(line.startswith("│ member-") and "%" not in line for line in shown)
    fetches = sum(line.startswith("│ member-") and "%" in line for line in shown)
    told = [f"{20 - members} members", *([f"{19 - fetches} fetches"] if fetches < 19 else [])]
    assert shown[-1] == f"not shown: {', '.join(told)}; --json has all"
    if height >= 24:
        assert min(members, fetches) >= 3


def test_are_warnings_left_out_last() -> None:
    shown = in_place(crowded(3, warnings=9), width=80, height=12)
    assert shown[-1] == "not shown: 6 warnings, 3 members, 2 fetches; --json has all"
    assert sum("liar sent" in line for line in shown) == 3


@pytest.mark.parametrize("height", range(2, 60))
def test_is_nothing_lost_without_a_word(height: int) -> None:
    shown = in_place(crowded(9), width=100, height=height)
    assert len(shown) <= height
    whole = sum(line.startswith("│ member-") for line in shown) == 9 + 8
    assert whole != any(line.startswith("not shown: ") for line in shown)


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_do_columns_go_before_numbers_are_cut(width: int) -> None:
    shown = in_place(crowded(3), width=width, height=60)
    assert max(map(len, shown)) <= width
    (row,) = [line for line in shown if "member-1 " in line and "25%" in line]
    assert "7 MB/s" in row
    assert "5 s" in row
    head = next(line for line in shown if "state" in line)
    assert ("address" in head) == (width >= 80)
    assert ("sends" in head) == (width >= 100)


def test_does_watching_fit_the_screen_and_leave_all_of_it_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80, height=24, color_system=None)
    monkeypatch.setattr(status_watch, "Console", lambda **_: console)
    monkeypatch.setattr(status_watch, "_again", interrupted)
    assert status_watch.watch(lambda: crowded(20)) == 1
    drawn, behind = written.getvalue().split("\x1b[?1049l")
    assert "not shown: " in drawn
    assert "member-19" not in drawn
    assert "not shown: " not in behind
    assert behind.count("member-19") == 2


def interrupted(ask: object, swarm: Json, keys: int | None = None) -> Iterator[Json]:
    yield swarm
    raise KeyboardInterrupt


def test_are_those_marked_who_lie_or_are_dead() -> None:
    rows = drawn(swarm(report(member(A, "ann", "dead"), member(LIAR, "liar")), fetching())).splitlines()
    assert any("liar" in row and "wrong chunks" in row and "nothing yet" in row for row in rows)
    assert any("ann" in row and "dead" in row and "nothing yet" not in row for row in rows)


def test_can_a_name_do_nothing_to_the_terminal() -> None:
    shown = drawn(swarm(report(member(A, "\x1b[2J[red]ann\r"))))
    assert "\x1b" not in shown.replace("\x1b[0m", "")
    assert "[red]ann" in shown


def test_does_a_line_say_all_of_it() -> None:
    line = status_table.line(swarm(ALL, fetching()))
    assert line.startswith("3 members; 1 fetch at 25%, 7 MB/s; bad: liar sent 3 wrong chunks")


class Cluster:
    """Answers for nodes by address, as `client` does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive = {"1:1", "2:2"}
        monkeypatch.setattr(status_client, "ask", self.ask)
        monkeypatch.setattr(status_client, "view", lambda address, context, within_s: None)

    def ask(self, address: str, context: object = None, *, within_s: float = 0.0) -> Json:
        if address not in self.alive:
            raise PeerUnreachable(address, "is gone")
        return report(member(A, "ann", address="2:2"), node={"address": address})


def test_is_another_member_asked_when_a_node_died(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    ask = status_watch.Asker(["1:1"], None, proven=False)
    assert ask()["node"]["address"] == "1:1"
    cluster.alive = {"2:2"}
    assert ask()["node"]["address"] == "2:2"
    cluster.alive = set()
    with pytest.raises(PeerUnreachable):
        ask()


def test_are_there_plain_lines_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers: list[Json | BaseException] = [
        swarm(report()), PeerUnreachable("1:1", "is gone"), swarm(ALL, fetching()), KeyboardInterrupt(),
    ]  # fmt: skip

    def ask() -> Json:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(status_watch, "EVERY_S", 0)
    assert status_watch.watch(ask) == 1
    first, second, third = capsys.readouterr().out.splitlines()
    for words, said in (("1 member", first), ("asking again", second), ("1 fetch at 25%", third)):
        assert words in said
    assert "\x1b" not in first + second + third
