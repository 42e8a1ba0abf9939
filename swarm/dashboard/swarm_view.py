"""The whole swarm in one value: what this node sees, joined with what members tell of themselves.

Pure. The value is made of objects only, keyed by node id, digest or link, so that the difference between two of them is
a JSON merge patch (RFC 7396): what changed, and null for what is gone. See docs/dashboard.md for its fields.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, TypeAlias

from swarm.dashboard.collector import Told
from swarm.dashboard.member_report import Own
from swarm.dashboard.warnings import STALLED_AFTER_S, warnings

Json: TypeAlias = dict[str, Any]

SLOW_PART = 0.5  # of the median rate of those that fetch the same
SLOW_AFTER_S = 3.0  # of its fetch: before that, a rate says little
GONE = ("dead", "left")
GONE_SHOWN_S = 90.0


class SwarmView:
    """Makes views, one after another; remembers when members went, and nothing else."""

    def __init__(self) -> None:
        self._gone_at_s: dict[str, float] = {}

    def view(self, report: Mapping[str, Any], own: Own, told: Mapping[str, Told], now: float) -> Json:
        """The swarm now. `report` is that of /status, `own` what this node tells of itself."""
        gone = {known["id"] for known in report["members"] if known["state"] in GONE}
        heard = {node: answer.own for node, answer in told.items() if answer.own and node not in gone}
        heard[own.node] = own
        members = self._members(report, own.node, heard, told, now)
        links = _links(heard, members)
        for link in links.values():
            members[link["source"]]["up_bytes_per_s"] += link["rate_bytes_per_s"]
            members[link["target"]]["down_bytes_per_s"] += link["rate_bytes_per_s"]
        artifacts = _artifacts(report, heard, members)
        for member in members.values():
            if rates := [fetch["rate_bytes_per_s"] for fetch in member["fetches"].values() if fetch["running"]]:
                member["down_bytes_per_s"] = sum(rates)  # what its time to go and its warning are made of
        _mark_slow(members, heard)
        _mark_wrong(members, heard)
        return {
            "node": dict(report["node"]),
            "members": members,
            "links": links,
            "artifacts": artifacts,
            "warnings": warnings(report, members),
            "asked": {"members": len(told) + 1, "answered": len(heard)},
        }

    def _members(
        self, report: Mapping[str, Any], me: str, heard: Mapping[str, Own], told: Mapping[str, Told], now: float
    ) -> Json:
        members: Json = {}
        for known in report["members"]:
            node = known["id"]
            state = known["state"]
            answer = told.get(node)
            if state == "alive" and answer and answer.silent and not known["transport"]:
                state = "silent"
            if state in GONE:
                if now - self._gone_at_s.setdefault(node, now) > GONE_SHOWN_S:
                    continue
            else:
                self._gone_at_s.pop(node, None)
            members[node] = _member(known["name"], known["address"], state) | {
                "self": node == me,
                "link": known["transport"],
                "host": heard[node].host if node in heard else known["host"],
                "rack": heard[node].rack if node in heard else known["rack"],
                "uploads": known["uploads"],
                "slots": known["slots"],
                "version": (heard[node].version if node in heard else None) or known.get("version"),
                "tells": node in heard,
                "why_not": answer.failure if answer else None,
            }
        self._gone_at_s = {node: at_s for node, at_s in self._gone_at_s.items() if node in members}
        for told_by in heard.values():
            for peer in told_by.peers:
                if peer.node not in members and peer.node not in {known["id"] for known in report["members"]}:
                    members[peer.node] = _member(peer.name, peer.address, "unknown")
        return members


def _member(name: str, address: str, state: str) -> Json:
    return {
        "name": name,
        "address": address,
        "state": state,
        "self": False,
        "link": None,
        "host": None,
        "rack": None,
        "uploads": None,
        "slots": None,
        "version": None,
        "tells": False,
        "why_not": None,
        "up_bytes_per_s": 0,
        "down_bytes_per_s": 0,
        "slow": False,
        "wrong_chunks": 0,
        "wrong_to": {},
        "banned_by": {},
        "holds": {},
        "fetches": {},
    }


def _links(heard: Mapping[str, Own], members: Json) -> Json:
    """Who feeds whom. The receiver's count is of verified chunks; where it tells nothing, the sender's must do."""
    links: Json = {}
    for node, own in heard.items():
        for flow in own.flows:
            source, target = (flow.peer, node) if flow.direction == "down" else (node, flow.peer)
            if any(members.get(end, {}).get("state", "left") in GONE for end in (source, target)):
                continue
            if flow.direction == "up" and target in heard:
                continue
            link = links.setdefault(
                f"{source}>{target}", {"source": source, "target": target, "bytes": 0, "rate_bytes_per_s": 0}
            )
            link["bytes"] += flow.bytes
            link["rate_bytes_per_s"] += _rounded(flow.rate_bytes_per_s)
    return links


def _artifacts(report: Mapping[str, Any], heard: Mapping[str, Own], members: Json) -> Json:
    """Puts what everybody holds and fetches into `members`; returns the artifacts by digest."""
    ids = {known["name"]: known["id"] for known in report["members"]}
    artifacts: Json = {}
    for known in report["artifacts"]:
        digest = known["digest"]
        artifact = artifacts.setdefault(
            digest, {"model_id": known["model_id"], "tier": known["tier"], "bytes": None, "chunks_total": None}
        )
        artifact["bytes"] = known["bytes"] or artifact["bytes"]
        for name, fraction in known["members"].items():
            if (node := ids.get(name)) in members:
                members[node]["holds"][digest] = {"fraction": fraction, "cells": None}
    for node, own in heard.items():
        if node not in members:
            continue
        for held in own.held:
            fraction = held.chunks / held.chunks_total if held.chunks_total else 1.0
            members[node]["holds"][held.digest] = {"fraction": round(fraction, 4), "cells": held.cells}
            if held.digest in artifacts:
                artifacts[held.digest]["chunks_total"] = held.chunks_total
        for fetch in own.fetches:
            members[node]["fetches"][fetch.digest] = {
                "model_id": fetch.model_id,
                "bytes": fetch.bytes,
                "done_bytes": fetch.done_bytes,
                "rate_bytes_per_s": _rounded(fetch.rate_bytes_per_s),
                "average_bytes_per_s": _rounded(fetch.average_bytes_per_s),
                "eta_s": None if fetch.eta_s is None else round(fetch.eta_s, 1 if fetch.eta_s < 10 else None),
                "seconds": None if fetch.running else round(fetch.seconds, 2),
                "sources": fetch.sources,
                "rejected_chunks": sum(wrong.chunks for wrong in own.rejected if wrong.digest == fetch.digest),
                "stalled": fetch.running and fetch.quiet_s > STALLED_AFTER_S,
                "running": fetch.running,
                "error": fetch.error,
            }
            artifact = artifacts.setdefault(
                fetch.digest,
                {"model_id": fetch.model_id, "tier": None, "bytes": fetch.bytes, "chunks_total": None},
            )
            artifact["bytes"] = artifact["bytes"] or fetch.bytes
    return artifacts


def _mark_slow(members: Json, heard: Mapping[str, Own]) -> None:
    """Who gets much less than others that fetch the same."""
    rates: dict[str, dict[str, int]] = {}
    for node, own in heard.items():
        for fetch in own.fetches:
            if fetch.running and fetch.seconds >= SLOW_AFTER_S and node in members:
                rates.setdefault(fetch.digest, {})[node] = fetch.rate_bytes_per_s
    for fetching in rates.values():
        if len(fetching) >= 3:
            median = statistics.median(fetching.values())
            for node, rate in fetching.items():
                members[node]["slow"] |= rate < SLOW_PART * median


def _mark_wrong(members: Json, heard: Mapping[str, Own]) -> None:
    for node, own in heard.items():
        for wrong in own.rejected:
            if wrong.peer in members:
                liar = members[wrong.peer]
                liar["wrong_chunks"] += wrong.chunks
                liar["wrong_to"][node] = liar["wrong_to"].get(node, 0) + wrong.chunks
                if wrong.banned:
                    liar["banned_by"][node] = wrong.why or True


def patch(old: Json, new: Json) -> Json:
    """The JSON merge patch that makes `new` out of `old`. None and what is absent are the same."""
    changes: Json = {key: None for key, value in old.items() if value is not None and new.get(key) is None}
    for key, value in new.items():
        if value is None or (key in old and old[key] == value):
            continue
        before = old.get(key)
        changes[key] = patch(before, value) if isinstance(value, dict) and isinstance(before, dict) else value
    return changes


def _rounded(rate: int) -> int:
    """With three digits: what changes less is no news."""
    step = int(10 ** max(0, len(str(rate)) - 3))
    return round(rate / step) * step
