"""The view: the whole swarm as a JSON object, from this node's status report and the reports of members.

Pure. The view holds objects only, keyed by node id, digest or link, so that the difference between two views is a JSON
merge patch (RFC 7396): changed values, and null for removed ones. docs/dashboard.md has its fields.

An origin that members read is among the members, with the state `origin`, so that links start there. Its numbers are
the sums of what the members tell.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, TypeAlias

from swarm.dashboard.collector import MemberAnswer
from swarm.dashboard.member_report import MemberReport
from swarm.dashboard.warnings import STALLED_AFTER_S, warnings
from swarm.observe import budget

Json: TypeAlias = dict[str, Any]

SLOW_PART = 0.5  # of the median rate of members that fetch the same
SLOW_AFTER_S = 3.0  # of its fetch: earlier rates vary too much
# Of a view: readers accept 16 MiB (`node.status_client`), and reports of members say more than anyone reads.
MEMBERS_BYTES_MAX, LINKS_BYTES_MAX, ARTIFACTS_BYTES_MAX, WARNINGS_BYTES_MAX = 8 << 20, 2 << 20, 2 << 20, 1 << 20
GONE = ("dead", "left")
ORIGIN = "origin"
GONE_SHOWN_S = 90.0
ABSENT = ("link", "host", "rack", "uploads", "slots", "version", "disk_free_bytes", "disk_bytes", "failure")


class SwarmView:
    """Makes views. Its only state is the time at which members died or left."""

    def __init__(self) -> None:
        self._gone_at_s: dict[str, float] = {}

    def view(
        self, status: Mapping[str, Any], own: MemberReport, answers: Mapping[str, MemberAnswer], now: float
    ) -> Json:
        """The swarm now. `status` is the report of `/status`, `own` that of `/member`, both of this node."""
        gone = {member["id"] for member in status["members"] if member["state"] in GONE}
        reports = {node: answer.report for node, answer in answers.items() if answer.report and node not in gone}
        reports[own.node] = own
        members = self._members(status, own.node, reports, answers, now)
        _add_origins(reports, members)
        links = _links(reports, members)
        for link in links.values():
            members[link["source"]]["up_bytes_per_s"] += link["rate_bytes_per_s"]
            members[link["target"]]["down_bytes_per_s"] += link["rate_bytes_per_s"]
        artifacts = _artifacts(status, reports, members)
        for member in members.values():
            if rates := [fetch["rate_bytes_per_s"] for fetch in member["fetches"].values() if fetch["running"]]:
                member["down_bytes_per_s"] = sum(rates)  # the same rate as in its eta_s and its warning
        _mark_slow(members, reports)
        _mark_wrong(members, reports)
        urgent = warnings(status, members)
        members = budget.items_within(members, MEMBERS_BYTES_MAX, first=_attention)
        links = {key: link for key, link in links.items() if link["source"] in members and link["target"] in members}
        return {
            "node": dict(status["node"]),
            "members": members,
            "links": budget.items_within(links, LINKS_BYTES_MAX, first=lambda link: -link["rate_bytes_per_s"]),
            "artifacts": budget.items_within(artifacts, ARTIFACTS_BYTES_MAX, first=lambda found: found["tier"] is None),
            "warnings": budget.items_within(dict(sorted(urgent.items())), WARNINGS_BYTES_MAX, first=lambda _: 0),
            "asked": {"members": len(answers) + 1, "answered": len(reports)},
        }

    def _members(
        self,
        status: Mapping[str, Any],
        own: str,
        reports: Mapping[str, MemberReport],
        answers: Mapping[str, MemberAnswer],
        now: float,
    ) -> Json:
        members: Json = {}
        for known in status["members"]:
            node, state = known["id"], known["state"]
            report, answer = reports.get(node), answers.get(node)
            if state == "alive" and answer and answer.silent and not known["transport"]:
                state = "silent"
            if state in GONE:
                if now - self._gone_at_s.setdefault(node, now) > GONE_SHOWN_S:
                    continue
            else:
                self._gone_at_s.pop(node, None)
            members[node] = _member(known["name"], known["address"], state) | {
                "self": node == own,
                "link": known["transport"],
                "host": report.host if report else known["host"],
                "rack": report.rack if report else known["rack"],
                "uploads": known["uploads"],
                "slots": known["slots"],
                "version": (report and report.version) or known.get("version"),
                "reports": report is not None,
                "disk_free_bytes": report.room.free if report and report.room else None,
                "disk_bytes": report.room.total if report and report.room else None,
                "failure": answer.failure if answer else None,
            }
        self._gone_at_s = {node: at_s for node, at_s in self._gone_at_s.items() if node in members}
        in_status = {known["id"] for known in status["members"]}
        for report in reports.values():
            for peer in report.peers:
                if peer.node not in members and peer.node not in in_status:
                    members[peer.node] = _member(peer.name, peer.address, "unknown")
        return members


def _attention(member: Json) -> tuple[bool, bool, bool, bool]:
    """This node first, then origins and members that fetch, have a link or tell of themselves."""
    busy = member["fetches"] or member["state"] == ORIGIN
    return not member["self"], not busy, not member["link"], not member["reports"]


def _member(name: str, address: str, state: str) -> Json:
    absent = dict.fromkeys(ABSENT)
    rates = {"up_bytes_per_s": 0, "down_bytes_per_s": 0, "slow": False, "wrong_chunks": 0}
    by_key: Json = {"wrong_to": {}, "banned_by": {}, "holds": {}, "fetches": {}}
    return {"name": name, "address": address, "state": state, "self": False, "reports": False} | absent | rates | by_key


def _add_origins(reports: Mapping[str, MemberReport], members: Json) -> None:
    """Puts the origins that members read into `members`. A report cannot change another member this way."""
    for node, report in reports.items():
        for read in report.origins:
            if read.node not in members:
                counts: Json = {"scheme": read.scheme, "bytes": 0, "requests": 0, "retries": 0, "errors": {}}
                members[read.node] = _member(read.name, "", ORIGIN) | {ORIGIN: counts}
            if (counts := members[read.node].get(ORIGIN)) is None:
                continue
            for name in ("bytes", "requests", "retries"):
                counts[name] += getattr(read, name)
            if read.error:
                counts["errors"][node] = read.error


def _links(reports: Mapping[str, MemberReport], members: Json) -> Json:
    """Sources and targets of chunks. A receiver counts verified chunks; without its report, the sender's count is
    used."""
    links: Json = {}
    for node, report in reports.items():
        for flow in report.flows:
            source, target = (flow.peer, node) if flow.direction == "down" else (node, flow.peer)
            if any(members.get(end, {}).get("state", "left") in GONE for end in (source, target)):
                continue
            if flow.direction == "up" and target in reports:
                continue
            link = links.setdefault(
                f"{source}>{target}", {"source": source, "target": target, "bytes": 0, "rate_bytes_per_s": 0}
            )
            link["bytes"] += flow.bytes
            link["rate_bytes_per_s"] += _rounded(flow.rate_bytes_per_s)
    return links


def _artifacts(status: Mapping[str, Any], reports: Mapping[str, MemberReport], members: Json) -> Json:
    """Puts holdings and fetches into `members`; returns the artifacts by digest."""
    artifacts: Json = {}
    for known in status["artifacts"]:
        digest = known["digest"]
        artifact = artifacts.setdefault(
            digest, _artifact(known["model_id"], tier=known["tier"], revisions=known.get("revisions", []))
        )
        artifact["bytes"] = known["bytes"] or artifact["bytes"]
        for node, fraction in known["nodes"].items():
            if node in members:
                wanted = known.get("wanted", {}).get(node)
                members[node]["holds"][digest] = {"fraction": fraction, "cells": None, "wanted": wanted}
    for node, report in reports.items():
        if node not in members:
            continue
        for held in report.held:
            fraction = held.chunks / held.chunks_total if held.chunks_total else 1.0
            wanted = members[node]["holds"].get(held.digest, {}).get("wanted")
            members[node]["holds"][held.digest] = {
                "fraction": round(fraction, 4),
                "cells": held.cells,
                "wanted": wanted,
            }
            if held.digest in artifacts:
                artifacts[held.digest]["chunks_total"] = held.chunks_total
        for fetch in report.fetches:
            members[node]["fetches"][fetch.digest] = {
                "model_id": fetch.model_id,
                "bytes": fetch.bytes,
                "done_bytes": fetch.done_bytes,
                "rate_bytes_per_s": _rounded(fetch.rate_bytes_per_s),
                "average_bytes_per_s": _rounded(fetch.average_bytes_per_s),
                "eta_s": None if fetch.eta_s is None else round(fetch.eta_s, 1 if fetch.eta_s < 10 else None),
                "seconds": None if fetch.running else round(fetch.seconds, 2),
                "sources": fetch.sources,
                "rejected_chunks": sum(wrong.chunks for wrong in report.rejected if wrong.digest == fetch.digest),
                "stalled": fetch.running and fetch.quiet_s > STALLED_AFTER_S,
                "running": fetch.running,
                "error": fetch.error,
            }
            artifact = artifacts.setdefault(
                fetch.digest,
                _artifact(fetch.model_id, bytes=fetch.bytes),
            )
            artifact["bytes"] = artifact["bytes"] or fetch.bytes
    return artifacts


def _artifact(model_id: str, **known: Any) -> Json:
    return {"model_id": model_id, "tier": None, "bytes": None, "chunks_total": None, "revisions": []} | known


def _mark_slow(members: Json, reports: Mapping[str, MemberReport]) -> None:
    """Marks members that receive less than half of the median of at least three that fetch the same."""
    rates: dict[str, dict[str, int]] = {}
    for node, report in reports.items():
        for fetch in report.fetches:
            if fetch.running and fetch.seconds >= SLOW_AFTER_S and node in members:
                rates.setdefault(fetch.digest, {})[node] = fetch.rate_bytes_per_s
    for fetching in rates.values():
        if len(fetching) >= 3:
            median = statistics.median(fetching.values())
            for node, rate in fetching.items():
                members[node]["slow"] |= rate < SLOW_PART * median


def _mark_wrong(members: Json, reports: Mapping[str, MemberReport]) -> None:
    for node, report in reports.items():
        for wrong in report.rejected:
            if wrong.peer in members:
                liar = members[wrong.peer]
                liar["wrong_chunks"] += wrong.chunks
                liar["wrong_to"][node] = liar["wrong_to"].get(node, 0) + wrong.chunks
                if wrong.banned:
                    liar["banned_by"][node] = wrong.why or True


def patch(old: Json, new: Json) -> Json:
    """The JSON merge patch (RFC 7396) from `old` to `new`. None and an absent key are the same."""
    changes: Json = {key: None for key, value in old.items() if value is not None and new.get(key) is None}
    for key, value in new.items():
        if value is None or (key in old and old[key] == value):
            continue
        before = old.get(key)
        changes[key] = patch(before, value) if isinstance(value, dict) and isinstance(before, dict) else value
    return changes


def _rounded(rate: int) -> int:
    """To three digits, so that smaller changes make no patch."""
    step = int(10 ** max(0, len(str(rate)) - 3))
    return round(rate / step) * step
