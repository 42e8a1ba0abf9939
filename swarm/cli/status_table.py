"""`swarm status` in a terminal, with rich: warnings, members, running fetches.

Shows the JSON of `status_json` alone. Names come from other machines: markup in them is not interpreted, and control
characters are replaced. On a narrow screen columns are dropped in a fixed order; on a screen that does not scroll rows
are dropped, and the last line counts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from swarm.errors import clean
from swarm.observe.units import count, size_text

HERE = ("alive", "suspect", "silent")
SHOWN = (*HERE, "dead")  # members that left on purpose need no attention
STYLES = {"alive": "green", "suspect": "yellow", "silent": "yellow", "dead": "red"}
MARKS = {"bad": ("✗", "bold red"), "warn": ("!", "yellow")}
LOST = "lost: no answer"  # by gossip, or by a request of this node
ROWS_MAX = 200  # of a table; --json has all
BAR_WIDTH = 20
FRAME_LINES = 4  # of a table: above and below its header and its rows


def show(swarm: Mapping[str, Any]) -> None:
    """Prints the screen once."""
    Console(markup=False, highlight=False).print(screen(swarm))


def screen(swarm: Mapping[str, Any], *, in_place: bool = False) -> RenderableType:
    """Warnings and tables; `in_place` limits them to the height of the terminal."""
    return _Screen(swarm, in_place=in_place)


def line(swarm: Mapping[str, Any]) -> str:
    """Members, fetches and warnings in one line, for a file or a pipe."""
    here = sum(member["state"] in HERE for member in swarm["members"])
    running = [fetch for fetch in swarm["fetches"] if fetch["running"]]
    rate = sum(fetch["rate_bytes_per_s"] for fetch in running)
    parts = [count(here, "member")]
    if running:
        done, size = (sum(fetch[key] for fetch in running) for key in ("done_bytes", "bytes"))
        parts.append(f"{count(len(running), 'fetch')} at {done / max(1, size):.0%}, {size_text(rate)}/s")
    parts += [f"{origin['name']}: {size_text(origin['bytes'])} read" for origin in swarm["origins"]]
    parts += [f"{warning['level']}: {warning['what']}" for warning in swarm["warnings"]]
    return _printable("; ".join(parts)).replace("\n", " ")


class _Screen:
    def __init__(self, swarm: Mapping[str, Any], *, in_place: bool) -> None:
        node = swarm["node"]
        self._in_place = in_place
        here = sum(member["state"] in HERE for member in swarm["members"])
        self._head = _words(f"{node['name']} at {node['address']}, {count(here, 'member')}")
        self._warnings = swarm["warnings"]
        self._members = _members(swarm)
        self._fetches = _fetches([fetch for fetch in swarm["fetches"] if fetch["running"]])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def lines(warnings: int) -> int:
            return len(console.render_lines(_warnings(self._warnings[:warnings]), options))

        warnings, members, fetches = len(self._warnings), len(self._members.rows), len(self._fetches.rows)
        all_of_it = 1 + lines(warnings) + self._members.lines(members) + (self._fetches.lines(fetches) or 1)
        if self._in_place and all_of_it > options.size.height:
            room = options.size.height - 2  # for the first line and the last
            while warnings and lines(warnings) > room:
                warnings -= 1
            room -= lines(warnings) + (not fetches)
            half = max(room // 2, room - self._members.lines(members))
            fetches = self._fetches.fitting(half)
            members = self._members.fitting(room - self._fetches.lines(fetches))
        yield self._head
        if warnings:
            yield _warnings(self._warnings[:warnings])
        if members:
            yield self._members.table(members, options.max_width)
        if fetches:
            yield self._fetches.table(fetches, options.max_width)
        elif not self._fetches.rows:
            yield Text("nothing is being fetched")
        left_out = {
            "warning": len(self._warnings) - warnings,
            "member": self._members.left_out(members),
            "fetch": self._fetches.left_out(fetches),
        }
        if any(left_out.values()):
            yield Text(f"not shown: {', '.join(count(n, what) for what, n in left_out.items() if n)}; --json has all")


class _Column(NamedTuple):
    """`least`: minimum width of a column that may be cut; None: it is not cut. `goes`: its place in the order in which
    columns are dropped; None: it stays."""

    header: str
    least: int | None = None
    goes: int | None = None
    justify: Any = "left"


class _Rows:
    """The cells of a table, before its size is known."""

    def __init__(self, columns: Sequence[_Column], rows: Sequence[Sequence[Text | ProgressBar]]) -> None:
        self.rows = rows[:ROWS_MAX]
        self._all = len(rows)
        self._columns = columns
        self._widths = [
            max([cell_len(column.header), *(_width(row[number]) for row in self.rows)])
            for number, column in enumerate(columns)
        ]
        heights = (max(cell.plain.count("\n") + 1 for cell in row if isinstance(cell, Text)) for row in self.rows)
        self._lines = list(accumulate(heights, initial=FRAME_LINES))

    def lines(self, count: int) -> int:
        """Height of a table of the first `count` rows, with its frame."""
        return self._lines[count] if count else 0

    def fitting(self, room: int) -> int:
        """Number of rows that fit into `room` lines."""
        return max((count for count in range(len(self.rows) + 1) if self.lines(count) <= room), default=0)

    def left_out(self, count: int) -> int:
        """Number of rows after the first `count`."""
        return self._all - count

    def table(self, count: int, width: int) -> Table:
        """The first `count` rows in `width` characters."""
        chosen, widths = self._fitted(width)
        table = Table()
        for number in chosen:
            column = self._columns[number]
            cut = column.least is not None
            table.add_column(
                column.header,
                justify=column.justify,
                no_wrap=True,
                overflow="ellipsis" if cut else "fold",
                width=widths[number] if cut else None,
                min_width=self._widths[number],  # of all rows, so that columns keep their widths
            )
        for row in self.rows[:count]:
            table.add_row(*(row[number] for number in chosen))
        return table

    def _fitted(self, width: int) -> tuple[list[int], dict[int, int | None]]:
        """The columns that fit, by number, and the widths of those that may be cut."""
        least = [
            whole if column.least is None else min(whole, column.least)
            for column, whole in zip(self._columns, self._widths, strict=True)
        ]
        chosen = list(range(len(self._columns)))
        going = sorted((column.goes, number) for number, column in enumerate(self._columns) if column.goes is not None)

        def spare() -> int:
            return width - 1 - sum(least[number] + 3 for number in chosen)

        while spare() < 0 and going:
            chosen.remove(going.pop(0)[1])
        left = max(0, spare())
        widths: dict[int, int | None] = dict.fromkeys(chosen)
        for number in chosen:
            if self._columns[number].least is not None:
                more = min(left, self._widths[number] - least[number])
                widths[number] = least[number] + more
                left -= more
        return chosen, widths


def _width(cell: Text | ProgressBar) -> int:
    return max(map(cell_len, cell.plain.split("\n"))) if isinstance(cell, Text) else BAR_WIDTH


def _warnings(warnings: Sequence[Mapping[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 1))
    for warning in warnings:
        mark, style = MARKS.get(warning["level"], MARKS["warn"])
        table.add_row(Text(mark, style), _words(warning["what"], style))
        table.add_row("", _words(warning["do"], "dim"))
    return table


def _members(swarm: Mapping[str, Any]) -> _Rows:
    columns = (
        _Column("member"), _Column("address", goes=5), _Column("state"), _Column("host", goes=3),
        _Column("rack", goes=4), _Column("link", goes=2), _Column("sends", goes=1), _Column("holds", least=14, goes=6),
        _Column("up", justify="right"), _Column("down", justify="right"),
    )  # fmt: skip
    holds: dict[str, list[str]] = {}
    names = {member["id"]: member["name"] for member in swarm["members"]}
    for artifact in swarm["artifacts"]:
        tier = "" if artifact["tier"] == "checkpoint" else f" ({artifact['tier']})"
        wanted = {names.get(node): fraction for node, fraction in artifact.get("wanted", {}).items()}
        for name, fraction in artifact["members"].items():
            part = (
                ""
                if name not in wanted
                else ", all it wants"
                if wanted[name] >= 1
                else f", {wanted[name]:.0%} of its part"
            )
            holds.setdefault(name, []).append(f"{fraction:.0%} {artifact['model_id']}{tier}{part}")
    rows = []
    for member in swarm["members"]:
        if member["state"] not in SHOWN and not member.get("wrong_chunks"):
            continue
        place = (member.get(key) or "-" for key in ("host", "rack", "transport"))
        load = f"{member['uploads']}/{member['slots']}" if member.get("slots") else "-"
        word = LOST if member["state"] in ("suspect", "silent") else member["state"]
        state = f"{word}, slow" if member.get("slow") else word
        if lies := bool(member.get("wrong_chunks")) and word not in (LOST, "dead"):
            state = "wrong chunks"
        nothing = "nothing yet" if member["state"] in HERE else "-"
        rows.append(
            (
                _words(member["name"], "bold" if member["id"] == swarm["node"]["id"] else ""),
                _words(member["address"]),
                Text(state, "bold red" if lies else STYLES.get(member["state"], "")),
                *map(_words, place),
                Text(load),
                _words("\n".join(holds.get(member["name"], [nothing]))),
                Text(_rate(member.get("up_bytes_per_s"))),
                Text(_rate(member.get("down_bytes_per_s"))),
            )
        )
    rows += [_origin(origin) for origin in swarm["origins"]]
    return _Rows(columns, rows)


def _origin(origin: Mapping[str, Any]) -> tuple[Text, ...]:
    """The row of an origin among the members."""
    words = [f"{size_text(origin['bytes'])} read", count(origin["requests"], "request")]
    words += [count(origin["retries"], "retry")] if origin["retries"] else []
    state = Text("failing", "yellow") if origin["errors"] else Text("origin")
    of_members = Text("-")
    return (
        _words(origin["name"]), of_members, state, of_members, of_members, _words(origin["scheme"]), of_members,
        _words(", ".join(words)), Text(_rate(origin["rate_bytes_per_s"])), of_members,
    )  # fmt: skip


def _fetches(fetches: Sequence[Mapping[str, Any]]) -> _Rows:
    columns = (
        _Column("member"), _Column("fetches", least=9, goes=2), _Column("done", least=10, goes=3),
        _Column("", justify="right"), _Column("rate", justify="right"), _Column("left", justify="right"),
        _Column("from", least=10, goes=4), _Column("rejected", goes=1, justify="right"),
    )  # fmt: skip
    rows: list[tuple[Text | ProgressBar, ...]] = []
    for fetch in fetches:
        eta_s = fetch["eta_s"]
        left = "stalled" if fetch["stalled"] else "waiting" if eta_s is None else f"{eta_s:.0f} s"
        best = [f"{source['name']} {_rate(source['rate_bytes_per_s'])}" for source in fetch["fed_by"][:1]]
        more = len(fetch["fed_by"]) - len(best)
        from_ = ", ".join([*best, *([f"{more} more"] if more > 0 else [])]) or f"{fetch['sources']} so far"
        rows.append(
            (
                _words(fetch["name"]),
                _words(fetch["model_id"]),
                ProgressBar(total=max(1, fetch["bytes"]), completed=fetch["done_bytes"]),
                Text(f"{fetch['fraction']:.0%}"),
                Text(_rate(fetch["rate_bytes_per_s"])),
                Text(left, "red" if fetch["stalled"] else ""),
                _words(from_),
                Text(str(fetch["rejected_chunks"]), "red" if fetch["rejected_chunks"] else ""),
            )
        )
    return _Rows(columns, rows)


def _rate(rate: float | None) -> str:
    return f"{size_text(rate)}/s" if rate else "-"


def _words(text: str, style: str = "") -> Text:
    return Text(_printable(text), style)


def _printable(text: str) -> str:
    """Each line without characters that move the cursor or reorder text."""
    return "\n".join(map(clean, text.split("\n")))
