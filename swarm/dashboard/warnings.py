"""What is wrong in a swarm, and what to do about it: a pure function of the picture that was drawn of it.

Whatever shows the swarm (terminal, dashboard, metrics, JSON) shows these, worst first, and decides nothing of its own.
docs/status.md lists the codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from swarm.observe.units import size_text

STALLED_AFTER_S = 5.0  # without a verified chunk
DEAF_AFTER_S = 10.0  # a link leads to a member, and gossip has brought nothing of it

# Urgency is the order of keys, which begin with it.
URGENCY = {
    "lies": 1,
    "conflict": 1,
    "dead": 2,
    "failed": 2,
    "stalled": 2,
    "silent": 3,
    "gossip-deaf": 3,
    "mdns": 3,
    "no-key": 3,
    "slow": 4,
    "version-skew": 4,
}


class Warn(NamedTuple):
    """`about` tells two of one code apart: a node, or an artifact. `level`: bad (something fails), or warn."""

    code: str
    level: str
    node: str | None
    about: str
    what: str
    do: str


def warnings(report: Mapping[str, Any], members: Mapping[str, Any]) -> dict[str, Any]:
    """By key, most urgent first in the order of keys. `report` is that of /status, `members` those of the view."""
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
    """About the node that was asked itself."""
    node = report["node"]
    me = node["id"]
    if node.get("open"):
        what = f"{node['name']} has no cluster key: whoever reaches it can read what it serves"
        yield Warn("no-key", "warn", me, me, what, "Make one with `swarm keygen` and give it with --key-file.")
    if node.get("mdns") in ("blocked", "silent"):
        cannot = (
            "cannot use multicast DNS"
            if node["mdns"] == "blocked"
            else "hears nothing by multicast DNS, not even itself"
        )
        what = f"{node['name']} {cannot}"
        yield Warn("mdns", "warn", me, me, what, "Name a member with --peer; `swarm doctor` says more.")
    linked = [m for m in report["members"] if m["transport"] not in (None, "self") and m["state"] == "alive"]
    if linked and all(m.get("linked_s", 0) > DEAF_AFTER_S and not m.get("gossip") for m in linked):
        what = f"{node['name']} has links, but no gossip arrives over them"
        yield Warn("gossip-deaf", "warn", me, me, what, "Open its port for UDP too; `swarm doctor` says from where.")


def _of_artifacts(report: Mapping[str, Any], members: Mapping[str, Any]) -> Iterator[Warn]:
    """Two contents under one id. Ranks of engines differ by layout, checkpoints must not."""
    holders: dict[str, dict[str, list[str]]] = {}
    for artifact in report["artifacts"]:
        if artifact["tier"] == "checkpoint" and artifact["members"]:
            holders.setdefault(artifact["model_id"], {})[artifact["digest"]] = list(artifact["members"])
    for model_id, contents in holders.items():
        if len(contents) > 1:
            each = "; ".join(f"{digest[:12]} by {listed(names)}" for digest, names in sorted(contents.items()))
            what = f"{model_id} is two contents: {each}"
            yield Warn(
                "conflict", "bad", None, model_id, what, "Fetch one with --digest, or stop who serves the other."
            )


def _versions(report: Mapping[str, Any], members: Mapping[str, Any]) -> Iterator[Warn]:
    by_version: dict[str, list[str]] = {}
    for member in members.values():
        if member["version"] and member["state"] not in ("dead", "left"):
            by_version.setdefault(member["version"], []).append(member["name"])
    if len(by_version) > 1:
        each = "; ".join(f"{version}: {listed(names)}" for version, names in sorted(by_version.items()))
        what = f"members run different versions of swarm ({each})"
        yield Warn(
            "version-skew", "warn", None, "all", what, "They work together as far as they do; install one version."
        )


def _of_member(node: str, member: Mapping[str, Any], members: Mapping[str, Any]) -> Iterator[Warn]:
    name = member["name"]
    if member["wrong_chunks"]:
        what = f"{name} sent {_counted(member['wrong_chunks'], 'wrong chunk')} to {_banned(member, members)}"
        do = f"They were thrown away and asked elsewhere. Stop it ({_where(member)}), and look at its disk and memory."
        yield Warn("lies", "bad", node, node, what, do)
    if member["state"] == "dead":
        do = f"If it should run, restart it ({_where(member)}): a fetch resumes."
        yield Warn("dead", "bad", node, node, f"{name} is dead", do)
    elif member["state"] in ("suspect", "silent"):
        do = "In a few seconds it counts as dead unless it answers. Is its process gone or stopped, or its network?"
        yield Warn("silent", "warn", node, node, f"{name} is lost: it does not answer", do)
    for digest, fetch in member["fetches"].items():
        about = f"{digest[:8]}-{node}"
        if fetch["error"]:
            yield Warn(
                "failed", "bad", node, about, f"{name}: {fetch['error']}", "Run the same fetch again: it resumes."
            )
        elif fetch["stalled"]:
            what = f"{name}: {fetch['model_id']} has got nothing for {STALLED_AFTER_S:g} s and more"
            yield Warn(
                "stalled", "bad", node, about, what, "Is anybody left who holds it? Start one more who serves it."
            )
        elif member["slow"] and fetch["running"]:
            what = f"{name} is slow: {size_text(fetch['rate_bytes_per_s'])}/s, less than half of what others get"
            yield Warn(
                "slow", "warn", node, about, what, "Look at its network and its disk. Only its own fetch ends later."
            )


def _banned(member: Mapping[str, Any], members: Mapping[str, Any]) -> str:
    """Who got wrong chunks of it, and what became of that."""
    got, by = (
        [members[other]["name"] if other in members else "one that is gone" for other in member[told]]
        for told in ("wrong_to", "banned_by")
    )
    if len(got) == 1:
        return f"{got[0]}{', which has banned it' if by else ''}"
    if not by:
        return f"{len(got)} members, which have not banned it yet"
    return f"{len(got)} members; {'all' if len(by) == len(got) else len(by)} of them banned it: {listed(by)}"


def _where(member: Mapping[str, Any]) -> str:
    """So that one knows which machine it is."""
    return ", ".join([member["address"], *(f"{key} {member[key]}" for key in ("host", "rack") if member[key])])


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def listed(names: Iterable[str]) -> str:
    """The first three, and how many there are more."""
    named = list(names)
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
