"""The view: what this node sees joined with what members tell, and the difference between two views."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Digest, ModelId
from swarm.dashboard.collector import MemberAnswer
from swarm.dashboard.member_report import (
    FetchSummary,
    Held,
    KnownPeer,
    MemberReport,
    PeerFlow,
    ReadOrigin,
    Rejected,
    cells,
    decode,
)
from swarm.dashboard.swarm_view import GONE_SHOWN_S, Json, SwarmView, patch
from swarm.protocol.messages import NodeId

DIGEST = Digest("d" * 64)
ME, A, B, C, LIAR = ("1" * 16, NodeId("a" * 16), NodeId("b" * 16), "c" * 16, NodeId("f" * 16))


def told(node: str, **facts: Any) -> MemberReport:
    nothing: dict[str, Any] = {"peers": (), "flows": (), "fetches": (), "held": (), "rejected": ()}
    return MemberReport(**{"node": node, "host": "h", "rack": "r", **nothing, **facts})


def report(*members: tuple[str, str, str | None]) -> dict[str, Any]:
    facts = {"address": "127.0.0.1:1", "host": None, "rack": None, "uploads": None, "slots": None}
    return {
        "node": {"id": ME, "name": "me", "address": "127.0.0.1:1"},
        "members": [
            {"id": node, "name": node[0], "state": state, "transport": link, **facts} for node, state, link in members
        ],
        "artifacts": [],
        "origins": [],
        "transfers": [],
    }


def fetch(rate: int, *, error: str | None = None, running: bool = True, seconds: float = 9.0) -> FetchSummary:
    return FetchSummary(ModelId("m"), DIGEST, 1000, 500, rate, 50, 5.0, seconds, 2, running, error)


def view(known: dict[str, Any], *heard: MemberReport, now: float = 0.0, viewer: SwarmView | None = None) -> Json:
    return (viewer or SwarmView()).view(known, told(ME), {own.node: MemberAnswer(own) for own in heard}, now)


ALL = report((ME, "alive", "self"), (A, "alive", "tcp"), (B, "alive", None), (C, "alive", None))


def test_is_a_link_counted_once_and_as_its_target_says() -> None:
    down = PeerFlow(DIGEST, "down", A, 70, 7000)
    up = PeerFlow(DIGEST, "up", B, 90, 9000)
    seen = view(ALL, told(A, flows=(up,)), told(B, flows=(down,)))
    (link,) = seen["links"].values()
    assert link == {"source": A, "target": B, "bytes": 70, "rate_bytes_per_s": 7000}
    assert seen["members"][A]["up_bytes_per_s"] == seen["members"][B]["down_bytes_per_s"] == 7000


def test_is_a_link_shown_of_which_the_source_alone_tells() -> None:
    seen = view(ALL, told(A, flows=(PeerFlow(DIGEST, "up", B, 90, 9000),)))
    assert seen["links"][f"{A}>{B}"]["bytes"] == 90


HUB = NodeId("e" * 16)


def reading(size: int, error: str | None = None) -> ReadOrigin:
    return ReadOrigin(HUB, "origin hub", "hf", size, 3, 1, error)


def test_is_an_origin_a_node_with_the_sums_of_its_readers() -> None:
    down = PeerFlow(DIGEST, "down", HUB, 70, 7000)
    seen = view(ALL, told(A, flows=(down,), origins=(reading(70),)), told(B, origins=(reading(30),)))
    hub = seen["members"][HUB]
    assert (hub["state"], hub["name"], hub["up_bytes_per_s"]) == ("origin", "origin hub", 7000)
    assert hub["origin"] == {"scheme": "hf", "bytes": 100, "requests": 6, "retries": 2, "errors": {}}
    assert seen["links"] == {f"{HUB}>{A}": {"source": HUB, "target": A, "bytes": 70, "rate_bytes_per_s": 7000}}
    assert seen["warnings"] == {}


def test_does_a_failing_origin_warn_as_long_as_a_reader_fetches() -> None:
    broken = (reading(0, "hub: 429 Too Many Requests"),)
    seen = view(ALL, told(A, fetches=(fetch(0),), origins=broken), told(B, origins=broken))
    assert [warning["what"] for warning in seen["warnings"].values()] == [
        "origin hub fails for a: hub: 429 Too Many Requests"
    ]
    assert view(ALL, told(B, origins=broken))["warnings"] == {}


def test_does_an_origin_with_the_id_of_a_member_change_nothing_of_it() -> None:
    seen = view(ALL, told(B, origins=(ReadOrigin(A, "evil", "hf", 1, 1, 0),)))
    assert seen["members"][A] == view(ALL, told(B))["members"][A]


def test_who_is_slow() -> None:
    seen = view(ALL, *(told(node, fetches=(fetch(rate),)) for node, rate in ((A, 100), (B, 90), (C, 20))))
    assert [seen["members"][node]["slow"] for node in (A, B, C)] == [False, False, True]
    assert ["slow" in warning["what"] for warning in seen["warnings"].values()] == [True]


def test_do_warning_and_table_say_one_rate() -> None:
    burst = PeerFlow(DIGEST, "down", A, 70, 3_100_000)
    rates = ((A, 5_000_000, ()), (B, 5_000_000, ()), (C, 600_000, (burst,)))
    seen = view(ALL, *(told(node, fetches=(fetch(rate),), flows=flows) for node, rate, flows in rates))
    assert seen["members"][C]["down_bytes_per_s"] == 600_000
    assert [warning["what"][:20] for warning in seen["warnings"].values()] == ["c is slow: 600 kB/s,"]


def test_is_who_has_just_begun_not_called_slow() -> None:
    began = [told(node, fetches=(fetch(rate, seconds=1.0),)) for node, rate in ((A, 100), (B, 90), (C, 20))]
    assert not view(ALL, *began)["members"][C]["slow"]


def test_are_two_too_few_to_call_one_slow() -> None:
    seen = view(ALL, told(A, fetches=(fetch(100),)), told(B, fetches=(fetch(1),)))
    assert not seen["members"][B]["slow"]


def test_is_a_liar_named_that_this_node_does_not_know() -> None:
    wrong = Rejected(DIGEST, LIAR, 3, True)
    seen = view(ALL, told(A, rejected=(wrong,), peers=(KnownPeer(LIAR, "liar", "127.0.0.1:9"),)))
    assert seen["members"][LIAR]["name"] == "liar"
    assert (seen["members"][LIAR]["wrong_chunks"], seen["members"][LIAR]["banned_by"]) == (3, {A: True})
    (warning,) = seen["warnings"].values()
    assert warning["what"] == "liar sent 3 wrong chunks to a, which has banned it"
    assert warning["level"] == "bad"
    assert "127.0.0.1:9" in warning["do"]


def test_how_many_of_those_that_got_wrong_chunks_have_banned_who_sent_them() -> None:
    by = ((A, True), (B, False), (C, True))
    lied = [told(node, rejected=(Rejected(DIGEST, LIAR, 3, banned),)) for node, banned in by]
    known = report(*((node, "alive", "tcp") for node in (ME, A, B, C, LIAR)))
    (warning,) = view(known, *lied)["warnings"].values()
    assert warning["what"] == "f sent 9 wrong chunks to 3 members; 2 of them banned it: a, c"


def test_is_a_liar_named_though_who_got_its_chunks_is_known_no_more() -> None:
    known = report((ME, "alive", "self"), (LIAR, "alive", "tcp"))
    (warning,) = view(known, told(A, rejected=(Rejected(DIGEST, LIAR, 3, True),)))["warnings"].values()
    assert warning["what"] == "f sent 3 wrong chunks to a member that left, which has banned it"


def test_does_what_the_dead_said_count_no_more() -> None:
    dead = report((ME, "alive", "self"), (A, "dead", None), (B, "alive", None))
    flow = PeerFlow(DIGEST, "down", A, 70, 7000)
    seen = view(dead, told(A, fetches=(fetch(9),)), told(B, flows=(flow,), peers=(KnownPeer(A, "a", "x"),)))
    assert seen["links"] == {}
    assert seen["members"][A]["fetches"] == {}
    assert [warning["what"] for warning in seen["warnings"].values()] == ["a is dead"]


def test_are_the_dead_shown_for_a_while() -> None:
    viewer, dead = SwarmView(), report((ME, "alive", "self"), (A, "dead", None))
    assert A in view(dead, now=10, viewer=viewer)["members"]
    assert A in view(dead, now=10 + GONE_SHOWN_S, viewer=viewer)["members"]
    assert A not in view(dead, now=11 + GONE_SHOWN_S, viewer=viewer)["members"]


def test_is_an_address_without_a_node_silent() -> None:
    seen = SwarmView().view(ALL, told(ME), {B: MemberAnswer(failure="refused", silent=True)}, 0)
    assert seen["members"][B]["state"] == "silent"


def test_is_a_failed_fetch_a_warning() -> None:
    seen = view(ALL, told(A, fetches=(fetch(0, error="stalled", running=False),)))
    assert [warning["what"] for warning in seen["warnings"].values()] == ["a: stalled"]


leaves = st.none() | st.integers(0, 3)
branches = leaves | st.dictionaries(st.sampled_from("abc"), leaves, max_size=2)
objects = st.dictionaries(
    st.sampled_from("abc"), branches | st.dictionaries(st.sampled_from("abc"), branches, max_size=2), max_size=3
)


def merged(target: Any, changes: Any) -> Any:
    """RFC 7396, as its text has it."""
    if not isinstance(changes, dict):
        return changes
    target = dict(target) if isinstance(target, dict) else {}
    for key, value in changes.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = merged(target.get(key), value)
    return target


def bare(value: Any) -> Any:
    """Without nulls: they are the same as nothing."""
    return {k: bare(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


@given(objects, objects)
def test_makes_a_patch_the_new_view_out_of_the_old(old: Json, new: Json) -> None:
    assert merged(bare(old), patch(old, new)) == bare(new)


@given(objects)
def test_is_there_no_patch_without_change(same: Json) -> None:
    assert patch(same, same) == {}


def test_what_a_chunk_map_says() -> None:
    assert cells(Bitfield(4, [0, 3])) == "9009"
    assert cells(Bitfield(1024, range(512))) == "9" * 128 + "0" * 128
    assert cells(Bitfield(512, range(0, 512, 2))) == "4" * 256
    assert cells(Bitfield(0)) == ""


@pytest.mark.parametrize(
    "said",
    [b"", b"[]", b"{}", b'{"node":"x"}', b"\xff", b"[" * 100_000],
)
def test_is_what_is_no_answer_refused(said: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode(said)


def test_is_a_chunk_map_bounded() -> None:
    own = told(A, held=(Held(DIGEST, 1, 1, "9" * 257),))
    with pytest.raises(ValueError, match=r"length"):
        decode(msgspec.json.encode(own))
