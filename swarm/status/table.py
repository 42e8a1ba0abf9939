"""`swarm status` in a terminal, over rich: warnings first, then members, then what is being fetched.

Shows what `seen` joined, and nothing else. Names come from other machines: no markup is read in them, and nothing of
them can move the cursor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from swarm.status.progress import size_text

HERE = ("alive", "suspect", "silent")
SHOWN = (*HERE, "dead")  # who left in peace is no news
STYLES = {"alive": "green", "suspect": "yellow", "silent": "yellow", "dead": "red"}
MARKS = {"bad": ("✗", "bold red"), "warn": ("!", "yellow")}
LOST = "lost: no answer"  # whether gossip or whoever asked it noticed first
MEMBERS_MAX = 200  # rows; --json has all
BAR_WIDTH = 20


def show(swarm: Mapping[str, Any]) -> None:
    """Prints it once."""
    Console(markup=False, highlight=False).print(screen(swarm))


def screen(swarm: Mapping[str, Any]) -> RenderableType:
    """All of it, to be printed or drawn again and again."""
    node = swarm["node"]
    here = sum(member["state"] in HERE for member in swarm["members"])
    parts: list[RenderableType] = [
        _words(f"{node['name']} at {node['address']}, {here} member{'' if here == 1 else 's'}")
    ]
    if swarm["warnings"]:
        parts.append(_warnings(swarm))
    parts.append(_members(swarm))
    running = [fetch for fetch in swarm["fetches"] if fetch["running"]]
    parts.append(_fetches(running) if running else Text("nothing is being fetched"))
    return Group(*parts)


def line(swarm: Mapping[str, Any]) -> str:
    """All of it in one line, for a file or a pipe."""
    here = sum(member["state"] in HERE for member in swarm["members"])
    running = [fetch for fetch in swarm["fetches"] if fetch["running"]]
    rate = sum(fetch["rate_bytes_per_s"] for fetch in running)
    parts = [f"{here} member{'' if here == 1 else 's'}"]
    if running:
        done, size = (sum(fetch[key] for fetch in running) for key in ("done_bytes", "bytes"))
        count = f"{len(running)} fetch{'' if len(running) == 1 else 'es'}"
        parts.append(f"{count} at {done / max(1, size):.0%}, {size_text(rate)}/s")
    parts += [f"{warning['level']}: {warning['what']}" for warning in swarm["warnings"]]
    return _printable("; ".join(parts)).replace("\n", " ")


def _warnings(swarm: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 1))
    for warning in swarm["warnings"]:
        mark, style = MARKS.get(warning["level"], MARKS["warn"])
        table.add_row(Text(mark, style), _words(warning["what"], style))
        table.add_row("", _words(warning["do"], "dim"))
    return table


def _members(swarm: Mapping[str, Any]) -> Table:
    table = Table(_whole("member"), _whole("address"), "state", "host", "rack", "link", "sends", "holds")
    for name in ("up", "down"):
        table.add_column(name, justify="right", no_wrap=True)
    holds: dict[str, list[str]] = {}
    for artifact in swarm["artifacts"]:
        tier = "" if artifact["tier"] == "checkpoint" else f" ({artifact['tier']})"
        for name, fraction in artifact["members"].items():
            holds.setdefault(name, []).append(f"{artifact['model_id']}{tier} {fraction:.0%}")
    shown = [member for member in swarm["members"] if member["state"] in SHOWN]
    for member in shown[:MEMBERS_MAX]:
        told = (member.get(key) or "-" for key in ("host", "rack", "transport"))
        load = f"{member['uploads']}/{member['slots']}" if member.get("slots") else "-"
        word = LOST if member["state"] in ("suspect", "silent") else member["state"]
        state = f"{word}, slow" if member.get("slow") else word
        table.add_row(
            _words(member["name"], "bold" if member["id"] == swarm["node"]["id"] else ""),
            _words(member["address"]),
            Text(state, STYLES.get(member["state"], "")),
            *map(_words, told),
            load,
            _words("\n".join(holds.get(member["name"], ["nothing yet"]))),
            _rate(member.get("up_bytes_per_s")),
            _rate(member.get("down_bytes_per_s")),
        )
    if len(shown) > MEMBERS_MAX:
        table.caption = f"and {len(shown) - MEMBERS_MAX} more: --json has all"
    return table


def _fetches(fetches: list[Mapping[str, Any]]) -> Table:
    table = Table(_whole("member"), "fetches", "done", "", "rate", "left", "from", "rejected")
    for fetch in fetches:
        eta_s = fetch["eta_s"]
        left = "stalled" if fetch["stalled"] else "waiting" if eta_s is None else f"{eta_s:.0f} s"
        best = [f"{one['name']} {_rate(one['rate_bytes_per_s'])}" for one in fetch["fed_by"][:1]]
        more = len(fetch["fed_by"]) - len(best)
        from_ = ", ".join([*best, *([f"{more} more"] if more > 0 else [])]) or f"{fetch['sources']} so far"
        table.add_row(
            _words(fetch["name"]),
            _words(fetch["model_id"]),
            ProgressBar(total=max(1, fetch["bytes"]), completed=fetch["done_bytes"], width=BAR_WIDTH),
            f"{fetch['fraction']:.0%}",
            _rate(fetch["rate_bytes_per_s"]),
            Text(left, "red" if fetch["stalled"] else ""),
            _words(from_),
            Text(str(fetch["rejected_chunks"]), "red" if fetch["rejected_chunks"] else ""),
        )
    return table


def _whole(header: str) -> Column:
    """Where the screen is narrow, others give way."""
    return Column(header, no_wrap=True, overflow="fold")


def _rate(rate: float | None) -> str:
    return f"{size_text(rate)}/s" if rate else "-"


def _words(text: str, style: str = "") -> Text:
    return Text(_printable(text), style)


def _printable(text: str) -> str:
    """Without what would move the cursor, or reorder what is read."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
