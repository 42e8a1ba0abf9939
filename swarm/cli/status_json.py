"""The JSON of `swarm status --json`: the status report of a node joined with its view.

Pure; runs in the client, which also joins reports of nodes of other versions without a view. docs/status.md has the
fields. `SCHEMA` counts changes that break a reader; new fields do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]

SCHEMA = 1
ORIGIN = "origin"  # the state of an origin among the members of a view
OF_VIEW = (
    "version",
    "up_bytes_per_s",
    "down_bytes_per_s",
    "slow",
    "wrong_chunks",
    "banned_by",
    "disk_free_bytes",
    "disk_bytes",
)


def swarm_status(report: Mapping[str, Any], view: Mapping[str, Any] | None) -> Json:
    """The join of `/status` and `/view`; without a view its fields are null or empty."""
    everything = view["members"] if view else {}
    viewed = {node: member for node, member in everything.items() if member["state"] != ORIGIN}
    origins = [_origin(node, member) for node, member in everything.items() if member["state"] == ORIGIN]
    if not view:
        origins = [_own_origin(row, report["node"]["id"]) for row in report.get("origins", ())]
    known = {member["id"]: member for member in report["members"]}
    members = [_member(member, viewed.get(node)) for node, member in known.items()]
    members += [
        {"id": node, "name": m["name"], "address": m["address"], "state": m["state"], "transport": None} | _of_view(m)
        for node, m in viewed.items()
        if node not in known
    ]
    names = {each["id"]: each["name"] for each in (*origins, *members)}
    links = [_named(link, names) for link in view["links"].values()] if view else []
    return {
        "schema": SCHEMA,
        **report,
        "members": members,
        "origins": origins,
        "fetches": [
            _fetch(node, digest, fetch, names, links)
            for node, member in viewed.items()
            for digest, fetch in member["fetches"].items()
        ],
        "links": links,
        "warnings": [{"key": key, **warning} for key, warning in sorted(view["warnings"].items())] if view else [],
        "asked": view["asked"] if view else None,
    }


def healthy(swarm: Mapping[str, Any]) -> bool:
    """Whether no warning is bad."""
    return not any(warning["level"] == "bad" for warning in swarm["warnings"])


def _member(member: Json, viewed: Mapping[str, Any] | None) -> Json:
    if viewed is None:
        return {**dict.fromkeys(OF_VIEW), **member}
    placed = {key: viewed[key] for key in ("state", "host", "rack") if viewed.get(key) is not None}
    return {**member, **placed, **_of_view(viewed)}


def _origin(node: str, member: Mapping[str, Any]) -> Json:
    rate = member["up_bytes_per_s"]
    return {"id": node, "name": member["name"], **member[ORIGIN], "rate_bytes_per_s": rate}


def _own_origin(row: Mapping[str, Any], node: str) -> Json:
    """What the node that answers has read; its view, which adds up all members, is missing."""
    errors = {node: row["error"]} if row["error"] else {}
    return {**{key: value for key, value in row.items() if key != "error"}, "errors": errors}


def _of_view(viewed: Mapping[str, Any]) -> Json:
    return {key: viewed.get(key) for key in OF_VIEW}


def _named(link: Mapping[str, Any], names: Mapping[str, str]) -> Json:
    ends = {f"{end}_name": names.get(link[end], link[end]) for end in ("source", "target")}
    return {**link, **ends}


def _fetch(node: str, digest: str, fetch: Mapping[str, Any], names: Mapping[str, str], links: list[Json]) -> Json:
    """`fed_by` lists links that carry chunks now, the fastest first; `sources` also counts former sources."""
    fed_by = [
        {"node": link["source"], "name": link["source_name"], "rate_bytes_per_s": link["rate_bytes_per_s"]}
        for link in links
        if link["target"] == node and link["rate_bytes_per_s"] and fetch["running"]
    ]
    fed_by.sort(key=lambda link: -link["rate_bytes_per_s"])
    fraction = round(fetch["done_bytes"] / fetch["bytes"], 4) if fetch["bytes"] else 1.0
    return {
        "node": node,
        "name": names.get(node, node),
        "digest": digest,
        **fetch,
        "fraction": fraction,
        "fed_by": fed_by,
    }
