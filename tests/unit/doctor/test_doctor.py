"""What does the doctor make of facts? And what does it print?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from swarm.content.manifest import Digest, ModelId
from swarm.doctor import checks
from swarm.doctor.checks import Finding, diagnose
from swarm.doctor.facts import (
    DialedPeer,
    DiskSpace,
    Facts,
    GossipMember,
    KeyFacts,
    LoadedLayout,
    LocalNode,
    MdnsFacts,
    PortFacts,
)
from swarm.doctor.show import as_json, show
from swarm.engines.layout import Fingerprint
from swarm.engines.start_log import EngineStart, TierAttempt
from swarm.errors import NotAdmitted, NotSwarm, PeerTimeout, PeerUnreachable, SettingsError, VersionSkew
from swarm.protocol.messages import Announcement

GIVEN = frozenset({"given"})
FOUND = frozenset({"mdns"})
HEALTHY = Facts(
    software="1.0",
    key=KeyFacts(fingerprint="aabbccdd"),
    insecure=False,
    loopback=False,
    port=PortFacts("10.0.0.1:7000"),
    mdns=MdnsFacts(started=True, heard_itself=True, found=frozenset({"10.0.0.2:7000"})),
    dialed=(DialedPeer("10.0.0.2:7000", FOUND, name="seed", software="1.0", gossips=True, clock_s=0.0),),
)


def facts(**changed: Any) -> Facts:
    return dataclasses.replace(HEALTHY, **changed)


def seen(name: str, given: Facts) -> list[Finding]:
    return [finding for finding in diagnose(given) if finding.check == name]


def bad(name: str, given: Facts) -> Finding:
    """The one bad finding of a check; it says what to do."""
    (found,) = [finding for finding in seen(name, given) if finding.level == "bad"]
    assert found.todo
    return found


def held(digest: str, *, tier: Any = "checkpoint", chunks: int = 8, model_id: str = "org/m") -> Announcement:
    return Announcement(ModelId(model_id), Digest(digest * 64), tier, 10**9, chunks, 8, True)


def holding(*artifacts: Announcement, name: str = "seed") -> DialedPeer:
    return dataclasses.replace(HEALTHY.dialed[0], name=name, artifacts=artifacts)


def failing(error: Any, ways: frozenset[str] = GIVEN) -> Facts:
    return facts(dialed=(*HEALTHY.dialed, DialedPeer("10.0.0.9:7000", ways, error=error)))


def test_is_all_well_where_all_is_well() -> None:
    assert {finding.level for finding in diagnose(HEALTHY)} == {"ok"}
    assert {finding.check for finding in diagnose(HEALTHY)} == {
        "key",
        "port",
        "mdns",
        "peers",
        "datagrams",
        "clock",
        "versions",
    }


def test_does_whatever_is_not_ok_say_what_to_do() -> None:
    worst = facts(
        key=KeyFacts(error="k is gone"), port=PortFacts("10.0.0.1:7000", error="taken", reached=False), loopback=True,
        mdns=MdnsFacts(started=False), names={"a:1": "a:1: unknown", "b:1": ()}, dialed=(),
        local_nodes=(LocalNode("c:1", error="x"),), disks=(DiskSpace("models", Path("/m"), 1),), model_id="org/m",
        starts=((1.0, EngineStart("vllm 1", "org/m", "tp 0 of 1", {}, ())),),
    )  # fmt: skip
    findings = diagnose(worst)
    assert all(finding.todo for finding in findings if finding.level != "ok")
    assert {finding.check for finding in findings if finding.level == "bad"} >= {
        "key",
        "port",
        "peers",
        "model",
        "starts",
    }


@pytest.mark.parametrize("error", ["k does not exist; make one with: swarm keygen k", "k can be used by others"])
def test_is_a_key_that_cannot_be_used_bad(error: str) -> None:
    assert bad("key", facts(key=KeyFacts(error=error), port=None)).what == error.partition(";")[0]


def test_who_refuses_the_key() -> None:
    refused = NotAdmitted("10.0.0.9:7000", "has another cluster key; give both the same key file")
    found = bad("key", failing(refused))
    assert (found.what, found.todo) == ("10.0.0.9:7000: has another cluster key", "give both the same key file")
    assert seen("key", failing(refused, FOUND))[-1].level == "note", "a neighbour of another cluster is no fault"
    assert not [finding for finding in seen("peers", failing(refused)) if "10.0.0.9" in finding.what]


NINE = "10.0.0.9:7000"


@pytest.mark.parametrize(
    ("error", "cause", "what"),
    [
        (NotAdmitted(NINE, "has another cluster key; give both the same key file"), "key", "another cluster"),
        (SettingsError("peer", f"{NINE} is beyond this machine"), "key", "this node has no cluster key"),
        (PeerUnreachable(NINE, "no program listens there; is it running?"), "peers", "no program"),
        (PeerUnreachable(NINE, "no route to this address; are both on one network?"), "peers", "no route"),
        (PeerTimeout(NINE, "no answer within 5 s; is the machine on?"), "peers", "no answer"),
        (NotSwarm(NINE, "answers, and is no swarm node; is it the right port?"), "peers", "no swarm node"),
        (VersionSkew(NINE, theirs=9, ours=3, software="9"), "versions", "speaks protocol 9"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_is_the_cause_at_the_top_and_what_follows_from_it_below(error: Any, cause: str, what: str) -> None:
    alone = facts(dialed=(DialedPeer("10.0.0.9:7000", GIVEN, error=error),), model_id="org/m", mdns=None)
    findings = diagnose(alone)
    first = next(finding for finding in findings if finding.level == "bad")
    assert (findings[0].check, first.check) == (cause, cause)
    assert what in first.what
    assert first.todo
    assert [finding.check for finding in findings if finding.level == "bad"] == [cause, "model"]


def test_is_a_name_that_is_not_known_the_cause() -> None:
    alone = facts(
        dialed=(), model_id="org/m", mdns=None, names={"seed:7000": "seed:7000: this name is not known; check it"}
    )
    assert [(finding.check, finding.what) for finding in diagnose(alone) if finding.level == "bad"] == [
        ("peers", "seed:7000: this name is not known"),
        ("model", "no node holds org/m"),
    ]


def test_is_a_node_on_loopback_without_gossip_no_fault() -> None:
    quiet = dataclasses.replace(HEALTHY.dialed[0], gossips=False)
    assert [finding.level for finding in seen("datagrams", facts(loopback=True, dialed=(quiet,)))] == ["note"]
    assert [finding.level for finding in seen("datagrams", facts(dialed=(quiet,)))] == ["bad"]


def test_what_is_said_without_a_key() -> None:
    assert "any machine that reaches" in seen("key", facts(key=KeyFacts(), insecure=True))[0].what
    assert "this machine only" in seen("key", facts(key=KeyFacts(), loopback=True))[0].what


def test_is_a_port_of_another_program_bad() -> None:
    assert (
        bad("port", facts(port=PortFacts("10.0.0.1:1", error="10.0.0.1:7000 is taken; choose another"))).todo
        == "choose another"
    )
    (own,) = seen("port", facts(port=PortFacts("10.0.0.1:1", error="taken", held_by="10.0.0.1:7000")))
    assert own.level == "note"
    assert bad("port", facts(port=PortFacts("10.0.0.1:7000", reached=False))).what.startswith(
        "this machine does not reach"
    )


def test_is_silent_multicast_bad_only_where_no_peer_is_named() -> None:
    deaf, none = MdnsFacts(started=True), MdnsFacts(started=False)
    assert "5353" in bad("mdns", facts(mdns=deaf)).todo
    assert "--peer" in bad("mdns", facts(mdns=none)).todo
    named = {"10.0.0.2:7000": ("10.0.0.2:7000",)}
    assert seen("mdns", facts(mdns=deaf, names=named))[0].level == "note"
    assert seen("mdns", facts(mdns=None, names=named))[0].level == "ok"
    assert seen("mdns", facts(mdns=None))[0].level == "note"


def test_is_a_border_that_multicast_does_not_cross_told() -> None:
    beyond = dataclasses.replace(HEALTHY.dialed[0], ways=GIVEN)
    found = seen("mdns", facts(mdns=MdnsFacts(started=True, heard_itself=True), dialed=(beyond,)))
    assert "it does not find 10.0.0.2:7000" in found[-1].what


def test_who_cannot_be_talked_to() -> None:
    gone = PeerUnreachable("10.0.0.9:7000", "Connection refused")
    assert "firewall" in bad("peers", failing(gone)).todo
    assert [f.level for f in seen("peers", failing(gone, FOUND)) if "refused" in f.what] == ["note"]
    assert bad("peers", facts(dialed=(), mdns=MdnsFacts(started=True, heard_itself=True))).what.startswith(
        "no node was found"
    )
    assert bad("peers", facts(names={"nope:1": "nope:1: its name cannot be resolved"})).what.startswith("nope:1")


def test_is_a_node_of_ones_own_that_other_settings_hide_told() -> None:
    found = seen("peers", facts(local_nodes=(LocalNode("127.0.0.1:9"), LocalNode("10.0.0.2:7000"))))
    assert [f.what for f in found if f.level == "note"] == [
        "your node at 127.0.0.1:9 runs here, and is not found with these settings"
    ]


def test_are_blocked_datagrams_bad() -> None:
    silent = dataclasses.replace(HEALTHY.dialed[0], gossips=False)
    assert "UDP" in bad("datagrams", facts(dialed=(silent,))).todo
    assert seen("datagrams", facts(dialed=())) == []


@pytest.mark.parametrize(
    ("ahead_s", "key", "level", "told"),
    [
        (400.0, "k", "bad", "400 s ahead of"),
        (-130.0, "k", "bad", "130 s behind"),
        (400.0, None, "note", "400 s ahead of"),
        (30.0, "k", "note", "30 s ahead of"),
        (2.0, "k", "ok", "agree"),
    ],
)
def test_when_is_a_clock_off(ahead_s: float, key: str | None, level: str, told: str) -> None:
    contact = dataclasses.replace(HEALTHY.dialed[0], clock_s=ahead_s)
    (found,) = seen("clock", facts(dialed=(contact,), key=KeyFacts(fingerprint=key)))
    assert found.level == level
    assert told in found.what


def test_are_versions_told_apart() -> None:
    skew = VersionSkew("10.0.0.9:7000", theirs=1, ours=2, software="0.0.1")
    assert bad("versions", failing(skew)).todo == "upgrade it"
    older = dataclasses.replace(HEALTHY.dialed[0], software="0.9")
    (found,) = seen("versions", facts(dialed=(older,)))
    assert (found.level, found.what) == ("note", "swarm 1.0 here, 0.9 elsewhere")
    heard = (GossipMember("far", "10.0.0.7:7000", software="0.8"), GossipMember("mute", "10.0.0.8:7000"))
    (found,) = seen("versions", facts(members=heard))
    assert found.what == "swarm 1.0 here, 0.8 elsewhere"


def test_is_a_disk_without_room_for_the_model_bad() -> None:
    rooms = (DiskSpace("models", Path("/a"), 2 * 10**9), DiskSpace("manifests", Path("/b"), 5 * 10**8))
    found = seen("room", facts(disks=rooms, model_id="org/m", dialed=(holding(held("a")),)))
    assert [finding.level for finding in found] == ["ok", "bad"]
    assert "the model has 1.0 GB" in found[1].what


def test_who_holds_the_model() -> None:
    assert seen("model", facts(dialed=(holding(held("a")),))) == [], "nobody asked"
    one = facts(model_id="org/m", dialed=(holding(held("a")),))
    assert [(f.level, f.what) for f in seen("model", one)] == [
        ("ok", f"seed holds 100% of org/m, checkpoint tier, {'a' * 16}")
    ]
    other = facts(model_id="org/m", dialed=(holding(held("a")), holding(held("b"), name="other")))
    assert "2 different contents (aaaaaaaaaaaaaaaa at seed; bbbbbbbbbbbbbbbb at other)" in bad("model", other).what
    ranks = [held(digest, tier="loaded", model_id=f"org/m#loaded-{digest}") for digest in "ab"]
    layouts = facts(model_id="org/m", dialed=(holding(*ranks),))
    assert len(seen("model", layouts)) == 2
    assert {f.level for f in seen("model", layouts)} == {"ok"}, "ranks differ, and should"
    none = facts(model_id="org/x", dialed=(holding(held("a")),))
    assert (
        "no node holds org/x; what is served: org/m" in bad("model", dataclasses.replace(none, model_id="org/x")).what
    )
    far = GossipMember("far", "10.0.0.7:7000", (("org/m", "c" * 64, "checkpoint", 0.5),))
    heard = facts(model_id="org/m", members=(far,))
    assert [f.level for f in seen("model", heard)] == ["ok", "note"]


def test_does_it_name_the_holders_that_trusted_keeps_out() -> None:
    stranger = dataclasses.replace(holding(held("a")), introduces=False)
    kept_out = facts(trusted=("10.1.0.0/16",), model_id="org/m", dialed=(stranger,))
    found = bad("model", kept_out)
    assert "`trusted` (10.1.0.0/16) names no machine that may introduce what these hold: seed (aaaa" in found.what
    assert "SWARM_TRUSTED" in found.todo
    introduced = dataclasses.replace(holding(held("a"), name="own"), introduces=True)
    assert {f.level for f in seen("model", dataclasses.replace(kept_out, dialed=(stranger, introduced)))} == {"ok"}
    other = dataclasses.replace(holding(held("b"), name="own"), introduces=True)
    both = seen("model", dataclasses.replace(kept_out, dialed=(stranger, other)))
    assert [f.level for f in both] == ["ok", "ok", "note"], "what is kept out is no conflict"
    heard = GossipMember("far", "10.1.0.7:7000", (("org/m", "c" * 64, "checkpoint", 1.0),))
    assert "far (cccc" in bad("model", dataclasses.replace(kept_out, dialed=(), members=(heard,))).what


def test_which_tier_did_the_last_start_of_each_rank_take() -> None:
    loaded = TierAttempt("loaded", False, "nobody has this layout")
    failed = TierAttempt("loaded", False, "failed: stalled", failed=True)
    disk = TierAttempt("disk", True, "no peer in 10 s")
    good = EngineStart("vllm 1", "org/m", "tp 0 of 2", {}, (loaded, TierAttempt("checkpoint", True, "from 2 peers")))
    poor = EngineStart("vllm 1", "org/m", "tp 1 of 2", {}, (failed, disk), 1)
    lost = EngineStart("vllm 1", "org/n", "tp 0 of 1", {}, (loaded,))
    found = seen("starts", facts(starts=((4.0, good), (3.0, poor), (2.0, lost), (1.0, poor), (0.0, good))))
    assert [finding.level for finding in found] == ["ok", "bad", "bad"]
    assert "checkpoint tier taken (from 2 peers); loaded skipped: nobody has this layout" in found[0].what
    assert "from disk or hub (no peer in 10 s), because a tier failed; loaded skipped" in found[1].what
    assert "did not get its weights" in found[2].what
    assert len(seen("starts", facts(model_id="org/n", starts=((4.0, good), (2.0, lost))))) == 1


@pytest.mark.parametrize(
    ("peers", "level", "told"),
    [
        (0, "ok", "no node served the model yet, as at every first start"),
        (None, "ok", "without looking for peers"),
        (2, "note", "although 2 nodes served the model"),
    ],
)
def test_is_a_start_from_disk_no_fault_by_itself(peers: int | None, level: str, told: str) -> None:
    attempts = (TierAttempt("loaded", False, "no twin"), TierAttempt("disk", True, "files of this machine"))
    start = EngineStart("vllm 1", "org/m", "0", {}, attempts, peers)
    (found,) = seen("starts", facts(starts=((1.0, start),)))
    assert (found.level, told in found.what, bool(found.todo)) == (level, True, level != "ok")


def test_in_which_fields_does_a_start_differ_from_what_others_hold() -> None:
    ours = {"tp_size": "1", "version": "vllm 1"}
    start = EngineStart("vllm 1", "org/m", "tp 0 of 1", ours, ())
    older, other_rank, twin = ({**ours, "version": "vllm 0"}, {"tp_size": "2", "tp_rank": "1"}, ours)

    def layouts(*held: dict[str, str]) -> Facts:
        tiers = [
            LoadedLayout(f"n{n}", Fingerprint(each).model_id("org/m"), Fingerprint(each)) for n, each in enumerate(held)
        ]
        return facts(model_id="org/m", starts=((1.0, start),), layouts=tuple(tiers))

    (found,) = seen("fingerprint", layouts(other_rank, older))
    assert found.level == "note"
    assert found.what.endswith("no twin; the nearest, n1: version is vllm 1 here and vllm 0 there")
    (found,) = seen("fingerprint", layouts(other_rank, twin))
    assert (found.level, found.what) == ("ok", "vllm 1, org/m, tp 0 of 1: n1 holds this very layout")
    assert seen("fingerprint", layouts()) == []
    broken = dataclasses.replace(
        layouts(), layouts=(LoadedLayout("n0", "org/m#loaded-1", error="fingerprint: is not JSON"),)
    )
    assert [found.level for found in seen("fingerprint", broken)] == ["note"]


def test_has_every_check_a_name_of_its_own() -> None:
    assert len({check.__name__ for check in checks.CHECKS}) == len(checks.CHECKS)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("key", "bad", "[red]wrong[/red]", "mend it"), Finding("key", "ok", "fine")]
    show(findings)
    told = capsys.readouterr().out
    assert "[red]wrong[/red]" in told
    assert "→ mend it" in told
    assert "1 of these keep a start from using the swarm" in told
    show(findings[1:])
    assert "nothing here keeps" in capsys.readouterr().out
    report = json.loads(as_json(findings))
    assert report["healthy"] is False
    assert report["findings"][1] == {"check": "key", "level": "ok", "what": "fine", "todo": ""}
    assert json.loads(as_json(findings[1:]))["healthy"] is True
