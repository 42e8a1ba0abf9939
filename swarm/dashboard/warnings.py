"""Warnings about a swarm, each with an action for the user: a pure function of the status report and the view.

Terminal, dashboard, metrics and JSON show these warnings, most urgent first, and add none. docs/status.md lists the
codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from swarm.content.commit import PART
from swarm.observe.units import count, size_text

STALLED_AFTER_S = 5.0  # without a verified chunk
DEAF_AFTER_S = 10.0  # with a link to a member, but no gossip about it

# Keys begin with the urgency, so that their order is the order of urgency.
URGENCY = {
    "lies": 1,
    "conflict": 1,
    "dead": 2,
    "failed": 2,
    "withdrawn": 2,
    "stalled": 2,
    "silent": 3,
    "gossip-deaf": 3,
    "mdns": 3,
    "no-key": 3,
    "origin": 3,
    "slow": 4,
    "version-skew": 4,
}


class Warn(NamedTuple):
    """`about` is the node or artifact. `level` is "bad" if something fails, else "warn"."""

    code: str
    level: str
    node: str | None
    about: str
    what: str
    do: str


def warnings(report: Mapping[str, Any], members: Mapping[str, Any]) -> dict[str, Any]:
    """Warnings by key; the order of keys is that of urgency. `report`: `/status`, `members`: of the view."""
    found = [*_of_node(report), *_of_artifacts(report, members), *_versions(report, members)]
    for node, member in members.items():
        found += _of_member(node, member, members)
    return {
        f"{URGENCY[w.code]}-{w.code}-{w.about}": {
            "code": w.code,
            "level": w.level,
            "node": w.node,
            "what": w.what,
            "do": w.do,
        }
        for w in found
    }


def _of_node(report: Mapping[str, Any]) -> Iterator[Warn]:
    node = report["node"]
    me = node["id"]
    if node.get("open"):
        what = f"{node['name']} has no cluster key: any machine that reaches it can read its artifacts"
        yield Warn("no-key", "warn", me, me, what, "Make one with `swarm keygen` and give it with --key-file.")
    if node.get("mdns") in ("blocked", "silent"):
        cannot = (
            "cannot use multicast DNS"
            if node["mdns"] == "blocked"
            else "hears nothing by multicast DNS, not even itself"
        )
        what = f"{node['name']} {cannot}"
        yield Warn("mdns", "warn", me, me, what, "Name a member with --peer; `swarm doctor` says more.")
    for model_id, why in node.get("withdrawn", {}).items():
        do = "Serve it again; `swarm serve` does so by itself once its files are complete and quiet."
        yield Warn("withdrawn", "bad", me, model_id, f"{model_id} is not served any more: {why}", do)
    linked = [m for m in report["members"] if m["transport"] not in (None, "self") and m["state"] == "alive"]
    if linked and all(m.get("linked_s", 0) > DEAF_AFTER_S and not m.get("gossip") for m in linked):
        what = f"{node['name']} has links, but no gossip arrives over them"
        yield Warn("gossip-deaf", "warn", me, me, what, "Open its port for UDP too; `swarm doctor` says from where.")


def _of_artifacts(report: Mapping[str, Any], members: Mapping[str, Any]) -> Iterator[Warn]:
    """Two digests for one model id. Ranks of engines differ by layout; checkpoints must not differ."""
    holders: dict[str, dict[str, list[str]]] = {}
    named: dict[str, list[str]] = {}
    for artifact in report["artifacts"]:
        if artifact["tier"] == "checkpoint" and artifact["members"] and not artifact["model_id"].endswith(PART):
            holders.setdefault(artifact["model_id"], {})[artifact["digest"]] = list(artifact["members"])
            named[artifact["digest"]] = artifact.get("revisions") or []
    for model_id, contents in holders.items():
        if len(contents) > 1 and not _told_apart([named[digest] for digest in contents]):
            each = "; ".join(f"{digest[:12]} by {listed(names)}" for digest, names in sorted(contents.items()))
            what = f"{model_id} has two digests: {each}"
            do = "Choose one with --revision or --digest, or stop the members that serve the other."
            yield Warn("conflict", "bad", None, model_id, what, do)


def _told_apart(revisions: Sequence[Sequence[str]]) -> bool:
    """Whether each content has revisions, and none of another's: a rollout."""
    names = [name for shown in revisions for name in set(shown)]
    return all(revisions) and len(names) == len(set(names))


def _versions(report: Mapping[str, Any], members: Mapping[str, Any]) -> Iterator[Warn]:
    by_version: dict[str, list[str]] = {}
    for member in members.values():
        if member["version"] and member["state"] not in ("dead", "left"):
            by_version.setdefault(member["version"], []).append(member["name"])
    if len(by_version) > 1:
        each = "; ".join(f"{version}: {listed(names)}" for version, names in sorted(by_version.items()))
        what = f"members run different versions of swarm ({each})"
        do = "Install one version; mixed versions may not link with each other."
        yield Warn("version-skew", "warn", None, "all", what, do)


def _of_member(node: str, member: Mapping[str, Any], members: Mapping[str, Any]) -> Iterator[Warn]:
    name = member["name"]
    if member["state"] == "origin":
        failing = {reader: why for reader, why in member["origin"]["errors"].items() if _fetches(members.get(reader))}
        if failing:
            readers = listed(members[reader]["name"] for reader in failing)
            what = f"{name} fails for {readers}: {next(iter(failing.values()))}"
            do = "It is asked again, and members that it answers pass on what they read. See docs/origins.md."
            yield Warn("origin", "warn", node, node, what, do)
        return
    if member["wrong_chunks"]:
        what = f"{name} sent {count(member['wrong_chunks'], 'wrong chunk')} to {_banned(member, members)}"
        do = f"They were dropped and requested elsewhere. Stop it ({_where(member)}), and check its disk and memory."
        yield Warn("lies", "bad", node, node, what, do)
    if member["state"] == "dead":
        do = f"If it should run, restart it ({_where(member)}): a fetch resumes."
        yield Warn("dead", "bad", node, node, f"{name} is dead", do)
    elif member["state"] in ("suspect", "silent"):
        do = "It counts as dead in a few seconds unless it answers. Check its process and its network."
        yield Warn("silent", "warn", node, node, f"{name} is lost: it does not answer", do)
    for digest, fetch in member["fetches"].items():
        about = f"{digest[:8]}-{node}"
        if fetch["error"]:
            do = "Run the same fetch again: it resumes."
            yield Warn("failed", "bad", node, about, f"{name}: {fetch['error']}", do)
        elif fetch["stalled"]:
            what = f"{name}: no chunk of {fetch['model_id']} arrived for more than {STALLED_AFTER_S:g} s"
            do = "Check that a member still holds the missing chunks, or start another seed."
            yield Warn("stalled", "bad", node, about, what, do)
        elif member["slow"] and fetch["running"]:
            what = f"{name} is slow: {size_text(fetch['rate_bytes_per_s'])}/s, less than half of the median"
            do = "Check its network and its disk. Only its own fetch is delayed."
            yield Warn("slow", "warn", node, about, what, do)


def _fetches(member: Mapping[str, Any] | None) -> bool:
    return member is not None and any(fetch["running"] for fetch in member["fetches"].values())


def _banned(member: Mapping[str, Any], members: Mapping[str, Any]) -> str:
    """The members that received its wrong chunks, and those that banned it."""
    receivers, by = (
        [members[other]["name"] if other in members else "a member that left" for other in member[field]]
        for field in ("wrong_to", "banned_by")
    )
    if len(receivers) == 1:
        return f"{receivers[0]}{', which has banned it' if by else ''}"
    if not by:
        return f"{len(receivers)} members, which have not banned it yet"
    return (
        f"{len(receivers)} members; {'all' if len(by) == len(receivers) else len(by)} of them banned it: {listed(by)}"
    )


def _where(member: Mapping[str, Any]) -> str:
    """The machine of a member: address, host and rack."""
    return ", ".join([member["address"], *(f"{key} {member[key]}" for key in ("host", "rack") if member[key])])


def listed(names: Iterable[str]) -> str:
    """The first three names, and the number of the others."""
    named = list(names)
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
