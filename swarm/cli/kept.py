"""`swarm ls` and `swarm rm`: the models of the swarm, and what swarm keeps on this machine.

Must not know: how files are removed.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from swarm.checkpoint import hf_cache, kept
from swarm.cli import agent, stdio
from swarm.content.commit import PART
from swarm.errors import LINE_CHARS_MAX, PeerUnreachable, SettingsError, StoreError, clean
from swarm.observe.units import size_text
from swarm.protocol.messages import SHORT_COMMIT_MIN
from swarm.settings import Settings
from swarm.store.file_errors import store_errors

SCHEMA = 1
REVISIONS_SHOWN = 3


def listed(report: Mapping[str, Any] | None, settings: Settings, model_id: str | None) -> dict[str, Any]:
    """The JSON of `swarm ls --json`: `swarm` by a node's report, None without one, and `here`."""
    model_id, revision = (None, None) if model_id is None else hf_cache.with_revision(model_id)
    artifacts = None if report is None else [_artifact(row) for row in report["artifacts"] if row["members"]]
    here = [
        {
            "model_id": found.model_id,
            "revisions": [
                *hf_cache.revisions(found.model_id, root=found.folder.parent).get(found.commit, []),
                found.commit,
            ],
            "digest": found.digest,
            "bytes": found.size,
            "path": found.snapshot,
        }
        for found in kept.all_kept(settings.cache)
    ]
    return {
        "schema": SCHEMA,
        "swarm": None if artifacts is None else [row for row in artifacts if _is_of(row, model_id, revision)],
        "here": [row for row in here if _is_of(row, model_id, revision)],
    }


def show(found: Mapping[str, Any], model_id: str | None = None) -> None:
    """Prints the tables of `swarm ls`."""
    console = Console(markup=False, highlight=False)
    if found["swarm"] is None:
        what = "no node of this user runs on this machine; name one with --peer HOST to see the swarm"
        console.print(what, soft_wrap=True)
    elif not found["swarm"]:
        console.print(f"no member serves {model_id or 'a model'}")
    else:
        table = _table("in the swarm", "id", "revisions", "size", "holders", "digest")
        for row in found["swarm"]:
            holders = ", ".join(_holder(name, fraction) for name, fraction in row["holders"].items())
            size = "-" if row["bytes"] is None else size_text(row["bytes"])
            table.add_row(row["model_id"], _revisions(row), size, holders, row["digest"][:12])
        console.print(table)
    if found["here"]:
        table = _table("kept on this machine", "id", "revisions", "size", "digest")
        for row in found["here"]:
            table.add_row(row["model_id"], _revisions(row), size_text(row["bytes"]), row["digest"][:12])
        console.print(table)
        for row in found["here"]:  # outside the table, which would break a path in two: it could not be copied
            print(f"{row['digest'][:12]} {clean(row['path'], chars_max=stdio.PATH_CHARS_MAX)}")


def remove(what: str, *, revision: str | None, yes: bool, force: bool, settings: Settings) -> int:
    """Removes what swarm keeps of a model; asks first, unless `yes`, and then needs `force` for what is pinned.

    Returns 1 if the answer is no.

    Raises SettingsError if nothing is kept of it, or nothing can be asked; StoreError.
    """
    model_id, revision = hf_cache.with_revision(what, revision)
    everything = kept.all_kept(settings.cache)
    chosen = kept.chosen(everything, model_id, revision)
    if len({found.model_id for found in chosen}) > 1:
        one_digest = len({found.digest for found in chosen}) == 1
        shown = ", ".join(f"{found.digest} ({found.model_id})" for found in chosen)
        advice = "say the model id" if one_digest else "say more digits"
        raise SettingsError("digest", f"{what!r} begins more than one: {shown}; {advice}")
    staged = kept.unfinished(model_id) if revision is None else {}
    if not chosen and not staged:
        known = ", ".join(sorted({f"{found.model_id}@{found.commit[:12]}" for found in everything})) or "nothing"
        raise SettingsError(
            "model_id",
            f"nothing in {hf_cache.cache_root()} is a fetch of {what!r} by swarm; fetched by swarm: {known}; files "
            "that other programs wrote stay",
        )
    pinned = agent.pinned(settings)
    for found in chosen:
        stays = ", pinned" if f"{found.model_id}@{found.commit}" in pinned else ""
        what = f"{found.model_id}@{found.commit[:12]}: {size_text(found.size)}{stays} in {found.snapshot}"
        print(clean(what, chars_max=LINE_CHARS_MAX))
        if stays and yes and not force:
            why = f"{found.model_id} is pinned; `swarm pin {found.model_id} --remove` ends that, or say --force"
            raise SettingsError("model_id", why)
    for place, size in staged.items():
        print(clean(f"{model_id}: {size_text(size)} of an unfinished fetch in {place}", chars_max=LINE_CHARS_MAX))
    if not yes and not _confirmed():
        return 1
    freed = 0
    if (through := agent.remove(model_id, revision, settings) if _is_id(chosen, model_id) else None) is not None:
        return through  # it stops serving the files first
    for found in chosen:
        with store_errors(found.folder):
            freed += kept.remove(settings.cache, found)
    for place, size in staged.items():
        with store_errors(place):
            if kept.remove_unfinished(place):
                freed += size
            else:
                print(clean(f"{place} stays: a fetch uses it", chars_max=LINE_CHARS_MAX))
    for address in _serving({found.digest for found in chosen}, settings):
        print(clean(f"the node at {address} has the files open and serves on: their space is free when it ends"))
    print(f"removed: {size_text(freed)}; other revisions and files of other programs are as they were")
    return 0


def _is_id(chosen: Sequence[kept.Kept], model_id: str) -> bool:
    """Whether the models were chosen by their id, and not by a digest."""
    return any(found.model_id == model_id for found in chosen)


def _serving(digests: set[str], settings: Settings) -> list[str]:
    """Addresses of the nodes of this machine that hold chunks of these artifacts."""
    from swarm.node import local_nodes, status_client

    found = []
    for address in local_nodes.addresses(settings.cache) if digests else ():
        with contextlib.suppress(PeerUnreachable):
            report = status_client.ask(address)
            own = report["node"]["id"]
            if any(row["digest"] in digests and row["nodes"].get(own) for row in report["artifacts"]):
                found.append(address)
    return found


def _confirmed() -> bool:
    if not sys.stdin or not sys.stdin.isatty():
        raise StoreError("nothing was removed: there is no terminal to ask; say --yes")
    return input("remove? [y/N] ").strip().lower() in ("y", "yes")


def _names(found: kept.Kept) -> Sequence[str]:
    return hf_cache.revisions(found.model_id, root=found.folder.parent).get(found.commit, [])


def _artifact(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_id": row["model_id"],
        "revisions": row.get("revisions", []),
        "digest": row["digest"],
        "tier": row["tier"],
        "bytes": row["bytes"],
        "holders": dict(row["members"]),
    }


def _is_of(row: Mapping[str, Any], model_id: str | None, revision: str | None) -> bool:
    if model_id is None:
        return True
    names: Sequence[str] = row["revisions"]
    if revision is not None and not any(_is_revision(name, revision) for name in names):
        return False
    return row["model_id"].removesuffix(PART) == model_id or (len(model_id) >= 6 and row["digest"].startswith(model_id))


def _is_revision(name: str, revision: str) -> bool:
    short = len(name) == 40 and len(revision) >= SHORT_COMMIT_MIN
    return name == revision or (short and name.startswith(revision))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="")
    for column in columns:
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    return table


def _holder(name: str, fraction: float) -> str:
    return name if fraction == 1 else f"{name} ({fraction:.0%})"


def _revisions(row: Mapping[str, Any]) -> str:
    names: Sequence[str] = row["revisions"]
    shown = [name[:12] if len(name) == 40 else name for name in names[:REVISIONS_SHOWN]]
    return ", ".join(shown) + (", …" if len(names) > REVISIONS_SHOWN else "") if names else "-"


def report_of(address: str | None, settings: Settings) -> Mapping[str, Any] | None:
    """The status of a node; None if none was named and none runs here. Raises PeerUnreachable for a named one."""
    from swarm.node import local_nodes, status_client

    context = None
    if settings.key_file:
        from swarm.security import cluster_key
        from swarm.security.certificates import visitor

        context = visitor(cluster_key.load(settings.key_file))
    if address:
        return status_client.ask(address, context)
    try:
        return status_client.ask_any(local_nodes.addresses(settings.cache))[1]
    except PeerUnreachable:
        return None


def as_json(found: Mapping[str, Any]) -> str:
    """One line."""
    return json.dumps(found)
