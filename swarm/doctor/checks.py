"""What the facts mean: pure functions, each from facts to findings of one kind. `diagnose` joins them.

A finding is `bad` when it keeps, or kept, a start from using the swarm as the settings ask for; a `note` is worth
knowing and may be meant; the rest is `ok`. Whatever is not ok says what to do.

Must not know: nodes, sockets, clocks, terminals.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from swarm.doctor.facts import Contact, Facts
from swarm.engines.layout import Fingerprint, is_loaded
from swarm.engines.start_log import Start
from swarm.errors import NotAdmitted, VersionSkew

Level: TypeAlias = Literal["ok", "note", "bad"]

CLOCK_GOSSIP_S = 120.0  # sealed datagrams that are older are refused
CLOCK_LINK_S = 3600.0  # certificates of a clock that is further off are
CLOCK_NEAR_S = 5.0  # what synchronised clocks, and a header in whole seconds, may differ by
STARTS_SHOWN = 8
DIFFERENCES_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """`what` was found by a `check`, and what to do about it (`todo`, empty where nothing is)."""

    check: str
    level: Level
    what: str
    todo: str = ""


def diagnose(facts: Facts) -> list[Finding]:
    """All findings, check by check."""
    return [finding for check in CHECKS for finding in check(facts)]


def key(facts: Facts) -> Iterator[Finding]:
    """Is there a cluster key, can it be used, and who refuses it?"""
    if facts.key.error:
        what, todo = _split(facts.key.error)
        yield Finding(
            "key", "bad", what, todo or "give every machine a copy of one key file, readable by its user alone"
        )
        return
    if facts.key.fingerprint:
        yield Finding("key", "ok", f"cluster key {facts.key.fingerprint}")
    elif facts.insecure:
        todo = "make a key with `swarm keygen`, and give it with --key-file everywhere"
        yield Finding("key", "note", "no cluster key: whoever reaches this node can read what it serves", todo)
    else:
        todo = "fine on one machine; for others make a key with `swarm keygen`, give it with --key-file, and --listen"
        yield Finding("key", "note", "no cluster key: this node talks to nodes of this machine only", todo)
    for contact in facts.contacts:
        if isinstance(contact.error, NotAdmitted):
            what, todo = _split(str(contact.error))
            yield Finding("key", _level(contact), what, todo or "give both the same key file")


def port(facts: Facts) -> Iterator[Finding]:
    """Can this machine listen where the settings say, and be reached there?"""
    if facts.port is None:
        return
    if facts.port.held_by:
        what = f"a node of yours listens at {facts.port.held_by} already"
        yield Finding("port", "note", what, "a second one needs another --listen port, or 0 for any free one")
    elif facts.port.error:
        what, todo = _split(facts.port.error)
        yield Finding("port", "bad", what, todo or "choose another --listen port, or 0 for any free one")
    else:
        yield Finding("port", "ok", f"TCP and UDP can be had at {facts.port.address}")
    if not facts.port.reached:
        todo = "open the port for TCP, or --listen on the address that others reach this machine by"
        yield Finding("port", "bad", f"this machine does not reach itself at {facts.port.address}", todo)
    elif facts.loopback:
        todo = "for other machines: --listen 0.0.0.0:PORT with --key-file"
        yield Finding("port", "note", "it listens on loopback: nobody beyond this machine can reach it", todo)


def mdns(facts: Facts) -> Iterator[Finding]:
    """Does multicast DNS work, and what did it bring?"""
    if facts.port is None:
        return
    name_one = "name one node with --peer or SWARM_PEERS, or a DNS name with many addresses"
    if facts.mdns is None:
        named = "" if facts.names else name_one
        yield Finding("mdns", "note" if named else "ok", "multicast DNS is switched off (--no-mdns)", named)
    elif not facts.mdns.started:
        yield Finding("mdns", "bad" if not facts.names else "note", "there is no multicast here", name_one)
    elif not facts.mdns.heard_itself:
        todo = f"multicast to 224.0.0.251, UDP port 5353, is blocked on this machine: allow it, or {name_one}"
        level: Level = "bad" if not facts.names else "note"
        yield Finding("mdns", level, "this machine does not hear its own announcement", todo)
    else:
        found = len(facts.mdns.found)
        yield Finding("mdns", "ok", f"works on this machine, and finds {_count(found, 'other node')}")
        unheard = [c for c in facts.contacts if not c.error and c.ways.isdisjoint({"mdns", "here"})]
        if unheard and not found:
            where = ", ".join(c.address for c in unheard[:3])
            todo = "keep --peer: multicast rarely crosses subnets, pods and switches that filter it"
            yield Finding("mdns", "note", f"nothing is heard of {where}, which can be reached", todo)


def peers(facts: Facts) -> Iterator[Finding]:
    """Who was found, and who of them can be talked to?"""
    if facts.port is None:
        return
    for name, found in facts.names.items():
        if isinstance(found, str):
            yield Finding(
                "peers", "bad", *_split(found, "correct the name, or wait until what it stands for has started")
            )
        elif not found:
            yield Finding("peers", "bad", f"{name} has no address", "correct the name given with --peer")
    for contact in facts.contacts:
        if contact.error is None:
            ways = ", ".join(sorted(contact.ways))
            yield Finding("peers", "ok", f"{contact.name} at {contact.address} answers ({ways})")
        elif not isinstance(contact.error, NotAdmitted | VersionSkew):
            what, todo = _split(str(contact.error))
            todo = todo or "is a node running there, and does a firewall let its TCP port through?"
            yield Finding("peers", _level(contact), what, todo)
    for member in facts.members:
        yield Finding("peers", "ok", f"{member.name} at {member.address} is known through gossip")
    if not facts.members and all(contact.error for contact in facts.contacts):
        todo = "start `swarm serve` somewhere, and name it with --peer where multicast does not reach it"
        yield Finding("peers", "bad", "nobody was found who can be talked to", todo)
    for running in facts.running:
        if running.error:
            yield Finding("peers", "note", *_split(running.error, "it may just be starting or ending"))
        elif not any(running.address == contact.address for contact in facts.contacts if not contact.error):
            todo = "it has other settings (key, --listen, --no-mdns) than this command: use the same, or --peer"
            what = f"your node at {running.address} runs here, and is not found with these settings"
            yield Finding("peers", "note", what, todo)


def datagrams(facts: Facts) -> Iterator[Finding]:
    """Does gossip get through?"""
    linked = [contact for contact in facts.contacts if not contact.error]
    silent = [contact for contact in linked if not contact.gossips]
    if silent:
        who = ", ".join(contact.address for contact in silent)
        todo = "open the port for UDP too, in both directions; on Kubernetes name both protocols in the Service"
        what = f"no datagrams from {who}, although links stand: gossip is blocked, fetches work, and cost more"
        yield Finding("datagrams", "bad", what, todo)
    elif linked:
        yield Finding("datagrams", "ok", f"gossip reaches {_count(len(linked), 'node')} and comes back")


def clock(facts: Facts) -> Iterator[Finding]:
    """Do clocks agree?"""
    known = [(contact, ahead_s) for contact in facts.contacts if (ahead_s := contact.clock_s) is not None]
    off = [(contact, ahead_s) for contact, ahead_s in known if abs(ahead_s) > CLOCK_NEAR_S]
    for contact, ahead_s in off:
        far = abs(ahead_s) > CLOCK_GOSSIP_S and facts.key.fingerprint is not None
        side = "ahead of" if ahead_s > 0 else "behind"
        limit = f"; gossip of more than {CLOCK_GOSSIP_S:.0f} s is refused, links of more than {CLOCK_LINK_S:.0f} s"
        what = f"the clock of {contact.name} is {abs(ahead_s):.0f} s {side} this one{limit if far else ''}"
        yield Finding("clock", "bad" if far else "note", what, "synchronise both with NTP")
    if known and not off:
        yield Finding("clock", "ok", f"clocks of {_count(len(known), 'node')} agree with this one")


def versions(facts: Facts) -> Iterator[Finding]:
    """Do all speak the same protocol?"""
    for contact in facts.contacts:
        if isinstance(contact.error, VersionSkew):
            yield Finding("versions", _level(contact), *_split(str(contact.error)))
    told = {c.software for c in facts.contacts if not c.error} | {m.software for m in facts.members}
    others = sorted(told - {facts.software, ""})
    if others:
        todo = "they understand each other; upgrade the older when it suits"
        yield Finding("versions", "note", f"swarm {facts.software} here, {', '.join(others)} elsewhere", todo)
    elif any(not contact.error for contact in facts.contacts):
        yield Finding("versions", "ok", f"everybody runs swarm {facts.software}")


def room(facts: Facts) -> Iterator[Finding]:
    """Is there room for the model?"""
    need_bytes = max((size for _, _, _, _, size in _offers(facts) if size is not None), default=0)
    for place in facts.rooms:
        free = f"{place.free_bytes / 1e9:.1f} GB are free for {place.purpose} at {place.path}"
        if place.free_bytes < need_bytes:
            todo = "make room there, or name another place (--out, HF_HOME, SWARM_CACHE)"
            yield Finding("room", "bad", f"{free}, and the model has {need_bytes / 1e9:.1f} GB", todo)
        else:
            yield Finding("room", "ok", free)


def model(facts: Facts) -> Iterator[Finding]:
    """Who holds the model, whole, and is it one content?"""
    if facts.model_id is None or facts.port is None:
        return
    offers = list(_offers(facts))
    digests: dict[str, list[str]] = defaultdict(list)
    barred = _barred(facts)
    for who, digest, tier, fraction, _ in offers:
        if tier == "checkpoint" and digest not in barred:
            digests[digest].append(who)
        yield Finding("model", "ok", f"{who} holds {fraction:.0%} of {facts.model_id}, {tier} tier, {digest[:16]}")
    if barred:
        kept_out = [offer for offer in offers if offer[1] in barred]
        who = ", ".join(sorted({f"{name} ({digest[:16]})" for name, digest, *_ in kept_out}))
        what = f"`trusted` ({', '.join(facts.trusted)}) names no machine that may introduce what these hold: {who}"
        todo = "add a machine that holds it to SWARM_TRUSTED, by the address that its link comes from, or pin --digest"
        yield Finding("model", "bad" if not digests else "note", what, todo)
    if len(digests) > 1:
        sides = "; ".join(f"{digest[:16]} at {', '.join(who)}" for digest, who in sorted(digests.items()))
        todo = "stop the wrong source, or choose one with --digest"
        yield Finding("model", "bad", f"{facts.model_id} stands for {len(digests)} different contents ({sides})", todo)
    if not offers:
        served = sorted({a.model_id for c in facts.contacts for a in c.artifacts})
        others = f"; what is served: {', '.join(served[:5])}" if served else ""
        todo = "serve it, under exactly this id (`swarm serve PATH --model-id ID`)"
        yield Finding("model", "bad", f"nobody holds {facts.model_id}{others}", todo)
    elif all(fraction < 1 for *_, fraction, _ in offers):
        yield Finding("model", "note", f"nobody holds all of {facts.model_id} yet", "wait for the first to finish")


def starts(facts: Facts) -> Iterator[Finding]:
    """What did the last start of each engine rank decide?"""
    for start in _last_starts(facts):
        left = [f"{step.tier} left: {step.why}" for step in start.steps if not step.taken]
        taken = start.taken
        if taken and taken.tier != "disk":
            told = "; ".join([f"{taken.tier} tier taken ({taken.why})", *left])
            yield Finding("starts", "ok", f"{_named(start)}: {told}")
        else:
            came = f"from disk or hub ({taken.why})" if taken else "did not get its weights"
            told = "; ".join([came, *left])
            yield Finding("starts", "bad", f"{_named(start)}: {told}", "see what is said of each tier, and above")


def fingerprints(facts: Facts) -> Iterator[Finding]:
    """In which fields does what a start wanted differ from what members hold in an engine's layout?"""
    for tier in facts.loaded:
        if tier.error:
            yield Finding("fingerprint", "note", *_split(f"{tier.member}: {tier.error}", "is it of another version?"))
    for start in _last_starts(facts):
        held = [tier for tier in facts.loaded if is_loaded(tier.artifact_id, start.model_id)]
        ours = Fingerprint(start.fingerprint)
        apart = [(tier.member, ours.differences(tier.fingerprint)) for tier in held if tier.fingerprint]
        if not apart or not start.fingerprint:
            continue
        twins = sorted(member for member, differences in apart if not differences)
        if twins:
            yield Finding("fingerprint", "ok", f"{_named(start)}: {', '.join(twins)} holds this very layout")
            continue
        member, differences = min(apart, key=lambda pair: len(pair[1]))  # other ranks of a twin differ, and should
        told = "; ".join(map(str, differences[:DIFFERENCES_SHOWN]))
        todo = "start both alike to load from memory to memory; the checkpoint tier takes any layout"
        yield Finding("fingerprint", "note", f"{_named(start)}: no twin; the nearest, {member}: {told}", todo)


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    key, port, mdns, peers, datagrams, clock, versions, room, model, starts, fingerprints,
)  # fmt: skip


def _last_starts(facts: Facts) -> list[Start]:
    """The last start of each rank of each engine, of the model that was asked about or of all."""
    last: dict[tuple[str, str, str], Start] = {}
    for _, start in facts.starts:
        if facts.model_id in (None, start.model_id):
            last.setdefault((start.engine, start.model_id, start.rank), start)
    return list(last.values())[:STARTS_SHOWN]


def _named(start: Start) -> str:
    return f"{start.engine}, {start.model_id}, {start.rank}"


def _offers(facts: Facts) -> Iterator[tuple[str, str, str, float, int | None]]:
    """Who holds the model: name, digest, tier, fraction, and bytes where they are known."""
    wanted = facts.model_id or ""
    for contact in facts.contacts:
        for a in contact.artifacts:
            if a.model_id == wanted or is_loaded(a.model_id, wanted):
                yield contact.name, a.digest, a.tier, a.chunks / max(1, a.chunks_total), a.size
    for member in facts.members:
        for artifact_id, digest, tier, fraction in member.artifacts:
            if artifact_id == wanted or is_loaded(artifact_id, wanted):
                yield member.name, digest, tier, fraction, None


def _barred(facts: Facts) -> set[str]:
    """Digests of the model that nobody who may do so introduces: a fetch passes them over unless they are pinned."""
    if not facts.trusted:
        return set()
    held = {digest for _, digest, *_ in _offers(facts)}
    return held - {a.digest for contact in facts.contacts if contact.introduces for a in contact.artifacts}


def _level(contact: Contact) -> Level:
    """What multicast and members bring may belong to somebody else; what a user gives does not."""
    return "bad" if "given" in contact.ways else "note"


def _split(text: str, todo: str = "") -> tuple[str, str]:
    """An error's text as what happened and what to do: that is what the semicolon in them separates."""
    what, _, said = text.partition("; ")
    return what, said or todo


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
