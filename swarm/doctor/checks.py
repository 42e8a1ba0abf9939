"""The doctor's checks: pure functions, each from facts to findings of one kind. `diagnose` joins and ranks them.

A cause comes before its consequences: a key that does not fit, then the other faults, then what only follows from them
(no node answers, no node holds the model).

A finding is `bad` if it keeps, or kept, an engine from using the swarm as the settings say; a `note` may be intended.
Every finding that is not `ok` says what to do.

Must not know: nodes, sockets, clocks, terminals.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from swarm.doctor.facts import DialedPeer, Facts
from swarm.engines.layout import Fingerprint, is_loaded
from swarm.engines.start_log import EngineStart
from swarm.errors import NotAdmitted, SettingsError, VersionSkew
from swarm.observe.units import count
from swarm.settings import is_loopback

Level: TypeAlias = Literal["ok", "note", "bad"]

CLOCK_GOSSIP_S = 120.0  # maximum age of sealed datagrams
CLOCK_LINK_S = 3600.0  # maximum clock difference of certificates
CLOCK_NEAR_S = 5.0  # error of synchronised clocks, and of a header in whole seconds
STARTS_SHOWN = 8
DIFFERENCES_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """The result of a `check`, and the remedy (`todo`, '' if none is needed)."""

    check: str
    level: Level
    what: str
    todo: str = ""


Results: TypeAlias = "Iterator[tuple[Level, str, str]]"  # level, what was found, remedy


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, check by check; checks with a bad finding first, the likeliest cause at the top."""
    findings = [Finding(check.__name__, *result) for check in CHECKS for result in check(facts)]
    failed = {finding.check for finding in findings if finding.level == "bad"}
    ranks = {check.__name__: rank for rank, check in enumerate(CHECKS)}
    return sorted(findings, key=lambda finding: (finding.check not in failed, ranks[finding.check]))


def key(facts: Facts) -> Results:
    """Can the cluster key be used, and which peers refuse it?"""
    if facts.key.error:
        todo = "give every machine a copy of one key file, readable by its user alone"
        yield _error("bad", facts.key.error, todo)
        return
    if facts.key.fingerprint:
        yield "ok", f"cluster key {facts.key.fingerprint}", ""
    elif facts.insecure:
        todo = "make a key with `swarm keygen`, and give it with --key-file everywhere"
        yield "note", "no cluster key: any machine that reaches this node can read what it serves", todo
    else:
        todo = "fine on one machine; for others make a key with `swarm keygen`, give it with --key-file, and --listen"
        yield "note", "no cluster key: this node talks to nodes of this machine only", todo
    for peer in facts.dialed:
        if isinstance(peer.error, NotAdmitted):
            yield _error(_level(peer), str(peer.error), "give both the same key file")
        elif isinstance(peer.error, SettingsError):
            what = f"{peer.address} is on another machine, and this node has no cluster key"
            yield (
                _level(peer),
                what,
                "name the key file of that node with --key-file, or accept the risk with --insecure",
            )


def port(facts: Facts) -> Results:
    """Can this machine listen at the address of the settings, and connect to it?"""
    if facts.port is None:
        return
    if facts.port.held_by:
        what = f"a node of yours listens at {facts.port.held_by} already"
        yield "note", what, "a second one needs another --listen port, or 0 for any free one"
    elif facts.port.error:
        yield _error("bad", facts.port.error, "choose another --listen port, or 0 for any free one")
    else:
        yield "ok", f"TCP and UDP can be had at {facts.port.address}", ""
    if not facts.port.reached:
        todo = "open the port for TCP, or --listen on the address that other machines reach"
        yield "bad", f"this machine does not reach itself at {facts.port.address}", todo
    elif facts.loopback:
        todo = "for other machines: --listen 0.0.0.0:PORT with --key-file"
        yield "note", "it listens on loopback: no other machine can reach it", todo


def mdns(facts: Facts) -> Results:
    """Does multicast DNS work, and how many nodes did it find?"""
    if facts.port is None:
        return
    name_one = "name one node with --peer or SWARM_PEERS, or a DNS name with many addresses"
    fault: Level = "note" if facts.names else "bad"  # named peers do without
    if facts.mdns is None:
        named = "" if facts.names else name_one
        yield "note" if named else "ok", "multicast DNS is switched off (--no-mdns)", named
    elif not facts.mdns.started:
        yield fault, "there is no multicast here", name_one
    elif not facts.mdns.heard_itself:
        todo = f"multicast to 224.0.0.251, UDP port 5353, is blocked on this machine: allow it, or {name_one}"
        yield fault, "this machine does not receive its own announcement", todo
    else:
        found = len(facts.mdns.found)
        yield "ok", f"works on this machine, and finds {count(found, 'other node')}", ""
        unheard = [peer for peer in facts.linked if peer.ways.isdisjoint({"mdns", "here"})]
        if unheard and not found:
            addresses = ", ".join(peer.address for peer in unheard[:3])
            todo = "keep --peer: multicast rarely crosses subnets, pods and switches that filter it"
            yield "note", f"it does not find {addresses}, which can be reached", todo


def peers(facts: Facts) -> Results:
    """Which nodes were found, and which of them answer?"""
    if facts.port is None:
        return
    for name, found in facts.names.items():
        if isinstance(found, str):
            yield _error("bad", found, "correct the name, or wait until its nodes have started")
        elif not found:
            yield "bad", f"{name} has no address", "correct the name given with --peer"
    for peer in facts.dialed:
        if peer.error is None:
            yield "ok", f"{peer.name} at {peer.address} answers ({', '.join(sorted(peer.ways))})", ""
        elif not isinstance(peer.error, NotAdmitted | VersionSkew | SettingsError):
            todo = "is a node running there, and does a firewall let its TCP port through?"
            yield _error(_level(peer), str(peer.error), todo)
    for member in facts.members:
        yield "ok", f"{member.name} at {member.address} is known through gossip", ""
    if not facts.members and not facts.linked and not _is_explained(facts):
        todo = "start `swarm serve` on some machine, and name it with --peer if multicast does not reach it"
        yield "bad", "no node was found that answers", todo
    answering = {peer.address for peer in facts.linked}
    for node in facts.local_nodes:
        if node.error:
            yield _error("note", node.error, "it may just be starting or ending")
        elif node.address not in answering:
            todo = "it has other settings (key, --listen, --no-mdns) than this command: use the same, or --peer"
            what = f"your node at {node.address} runs here, and is not found with these settings"
            yield "note", what, todo


def datagrams(facts: Facts) -> Results:
    """Do gossip's datagrams arrive?"""
    mute = [peer.address for peer in facts.linked if not peer.gossips]
    silent = ", ".join(mute)
    if silent and facts.loopback and not any(is_loopback(address.rpartition(":")[0].strip("[]")) for address in mute):
        what = f"no datagrams from {silent}: this node listens on loopback, so it fetches without gossip"
        yield "note", what, "with many newcomers: --listen 0.0.0.0:PORT, so that they feed each other"
    elif silent:
        todo = "open the port for UDP too, in both directions; on Kubernetes name both protocols in the Service"
        what = f"no datagrams from {silent}, although links stand: gossip is blocked, fetches work, and cost more"
        yield "bad", what, todo
    elif facts.linked:
        yield "ok", f"gossip reaches {count(len(facts.linked), 'node')} and comes back", ""


def clock(facts: Facts) -> Results:
    """Do the nodes' clocks agree?"""
    known = [(peer.name, ahead_s) for peer in facts.dialed if (ahead_s := peer.clock_s) is not None]
    off = [(name, ahead_s) for name, ahead_s in known if abs(ahead_s) > CLOCK_NEAR_S]
    for name, ahead_s in off:
        far = abs(ahead_s) > CLOCK_GOSSIP_S and facts.key.fingerprint is not None
        side = "ahead of" if ahead_s > 0 else "behind"
        limit = f"; gossip of more than {CLOCK_GOSSIP_S:.0f} s is refused, links of more than {CLOCK_LINK_S:.0f} s"
        what = f"the clock of {name} is {abs(ahead_s):.0f} s {side} this one{limit if far else ''}"
        yield "bad" if far else "note", what, "synchronise both with NTP"
    if known and not off:
        yield "ok", f"clocks of {count(len(known), 'node')} agree with this one", ""


def versions(facts: Facts) -> Results:
    """Do all nodes speak the same protocol?"""
    for peer in facts.dialed:
        if isinstance(peer.error, VersionSkew):
            yield _error(_level(peer), str(peer.error))
    software = {peer.software for peer in facts.linked} | {member.software for member in facts.members}
    others = sorted(software - {facts.software, ""})
    if others:
        todo = "they understand each other; upgrade the older when it suits"
        yield "note", f"swarm {facts.software} here, {', '.join(others)} elsewhere", todo
    elif facts.linked:
        yield "ok", f"all nodes run swarm {facts.software}", ""


def room(facts: Facts) -> Results:
    """Is there disk space for the model?"""
    need_bytes = max((holding.size for holding in _holdings(facts) if holding.size is not None), default=0)
    for disk in facts.disks:
        free = f"{disk.free_bytes / 1e9:.1f} GB are free for {disk.purpose} at {disk.path}"
        if disk.free_bytes < need_bytes:
            todo = "make room there, or name another place (--out, HF_HOME, SWARM_CACHE)"
            yield "bad", f"{free}, and the model has {need_bytes / 1e9:.1f} GB", todo
        else:
            yield "ok", free, ""


def model(facts: Facts) -> Results:
    """Which nodes hold the model, do they hold all of it, and is it the same content?"""
    if facts.model_id is None or facts.port is None:
        return
    holdings, barred = list(_holdings(facts)), _barred(facts)
    digests: dict[str, list[str]] = defaultdict(list)
    for held in holdings:
        if held.tier == "checkpoint" and held.digest not in barred:
            digests[held.digest].append(held.node)
        what = f"{held.node} holds {held.fraction:.0%} of {facts.model_id}, {held.tier} tier, {held.digest[:16]}"
        yield "ok", what, ""
    if barred:
        kept_out = ", ".join(sorted({f"{h.node} ({h.digest[:16]})" for h in holdings if h.digest in barred}))
        what = f"`trusted` ({', '.join(facts.trusted)}) names no machine that may introduce what these hold: {kept_out}"
        todo = "add a machine that holds it to SWARM_TRUSTED, by the address that its link comes from, or pin --digest"
        yield "bad" if not digests else "note", what, todo
    if len(digests) > 1:
        sides = "; ".join(f"{digest[:16]} at {', '.join(nodes)}" for digest, nodes in sorted(digests.items()))
        todo = "stop the wrong source, or choose one with --digest"
        yield "bad", f"{facts.model_id} stands for {len(digests)} different contents ({sides})", todo
    if not holdings:
        served = sorted({artifact.model_id for peer in facts.dialed for artifact in peer.artifacts})
        others = f"; what is served: {', '.join(served[:5])}" if served else ""
        todo = "serve it, under exactly this id (`swarm serve PATH --model-id ID`)"
        yield "bad", f"no node holds {facts.model_id}{others}", todo
    elif all(held.fraction < 1 for held in holdings):
        yield "note", f"no node holds all of {facts.model_id} yet", "wait for the first to finish"


def starts(facts: Facts) -> Results:
    """Which tier brought the weights of the last start of each engine rank?"""
    for start in _last_starts(facts):
        level, brought, todo = _verdict(start)
        skipped = [f"{attempt.tier} skipped: {attempt.why}" for attempt in start.attempts if not attempt.taken]
        yield level, f"{_name(start)}: {'; '.join([brought, *skipped])}", todo


def _verdict(start: EngineStart) -> tuple[Level, str, str]:
    taken, todo = start.taken, "see the reason of each tier, and the checks above"
    if taken is None:
        return "bad", "did not get its weights", todo
    if taken.tier != "disk":
        return "ok", f"{taken.tier} tier taken ({taken.why})", ""
    disk = f"from disk or hub ({taken.why})"
    if any(attempt.failed for attempt in start.attempts):
        return "bad", f"{disk}, because a tier failed", todo
    if start.peers:
        todo = "fine if the files are on this machine; else see the reason of each tier"
        return "note", f"{disk}, although {count(start.peers, 'node')} served the model", todo
    if start.peers is None:
        return "ok", f"{disk}, without looking for peers", ""
    return "ok", f"{disk}: no node served the model yet, as at every first start", ""


def fingerprint(facts: Facts) -> Results:
    """In which fields does a start's layout differ from the layouts that members hold?"""
    for layout in facts.layouts:
        if layout.error:
            yield _error("note", f"{layout.member}: {layout.error}", "is it of another version?")
    for start in _last_starts(facts):
        ours = Fingerprint(start.fingerprint)
        apart = [
            (layout.member, ours.differences(layout.fingerprint))
            for layout in facts.layouts
            if layout.fingerprint and is_loaded(layout.artifact_id, start.model_id)
        ]
        if not apart or not start.fingerprint:
            continue
        if twins := sorted(member for member, differences in apart if not differences):
            yield "ok", f"{_name(start)}: {', '.join(twins)} holds this very layout", ""
            continue
        member, differences = min(apart, key=lambda pair: len(pair[1]))  # a twin's other ranks differ more
        shown = "; ".join(map(str, differences[:DIFFERENCES_SHOWN]))
        todo = "start both alike to load from memory to memory; the checkpoint tier takes any layout"
        yield "note", f"{_name(start)}: no twin; the nearest, {member}: {shown}", todo


CHECKS: tuple[Callable[[Facts], Results], ...] = (
    key, port, mdns, peers, datagrams, clock, versions, room, model, starts, fingerprint,
)  # fmt: skip


@dataclass(frozen=True)
class _ModelCopy:
    node: str
    digest: str
    tier: str
    fraction: float
    size: int | None = None


def _holdings(facts: Facts) -> Iterator[_ModelCopy]:
    """The artifacts of the model, in any layout."""
    wanted = facts.model_id or ""
    for peer in facts.dialed:
        for a in peer.artifacts:
            if a.model_id == wanted or is_loaded(a.model_id, wanted):
                yield _ModelCopy(peer.name, a.digest, a.tier, a.chunks / max(1, a.chunks_total), a.size)
    for member in facts.members:
        for artifact_id, digest, tier, fraction in member.artifacts:
            if artifact_id == wanted or is_loaded(artifact_id, wanted):
                yield _ModelCopy(member.name, digest, tier, fraction)


def _barred(facts: Facts) -> set[str]:
    """Digests of the model that no trusted machine introduces: a fetch takes them only if they are pinned."""
    if not facts.trusted:
        return set()
    introduced = {artifact.digest for peer in facts.dialed if peer.introduces for artifact in peer.artifacts}
    return {held.digest for held in _holdings(facts)} - introduced


def _last_starts(facts: Facts) -> list[EngineStart]:
    """The last start of each rank of each engine, of the model in question or of all."""
    last: dict[tuple[str, str, str], EngineStart] = {}
    for _, start in facts.starts:
        if facts.model_id in (None, start.model_id):
            last.setdefault((start.engine, start.model_id, start.rank), start)
    return list(last.values())[:STARTS_SHOWN]


def _name(start: EngineStart) -> str:
    return f"{start.engine}, {start.model_id}, {start.rank}"


def _is_explained(facts: Facts) -> bool:
    """Whether a fault of an address that the user named explains that no node answers."""
    return any(_level(peer) == "bad" and peer.error for peer in facts.dialed) or any(
        isinstance(found, str) for found in facts.names.values()
    )


def _level(peer: DialedPeer) -> Level:
    """A peer that multicast or members name may belong to another cluster; a peer that the user names does not."""
    return "bad" if "given" in peer.ways else "note"


def _error(level: Level, text: str, todo: str = "") -> tuple[Level, str, str]:
    """The result of an error, whose text may name a remedy after a semicolon."""
    what, _, remedy = text.partition("; ")
    return level, what, remedy or todo
