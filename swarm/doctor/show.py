"""Prints the doctor's findings: as a table with remedies, or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import groupby

from swarm.doctor.checks import Finding
from swarm.errors import LINE_CHARS_MAX, clean

MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "bad": ("bad", "bold red")}


def show(findings: Sequence[Finding]) -> None:
    """Prints a table of findings, and the number of bad findings."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("check", "", "found, and what to do", box=None, pad_edge=False)
    for check, group in groupby(findings, key=lambda finding: finding.check):
        for number, finding in enumerate(group):
            text = Text(
                clean(finding.what, chars_max=LINE_CHARS_MAX)
            )  # names come from peers, and may look like markup
            if finding.todo:
                text.append(f"\n→ {clean(finding.todo, chars_max=LINE_CHARS_MAX)}", style="italic")
            table.add_row("" if number else check, Text(*MARKS[finding.level]), text)
    console = Console()
    console.print(table)
    bad = sum(finding.level == "bad" for finding in findings)
    verdict = (
        f"{bad} of these keep a start from using the swarm" if bad else "nothing here keeps a start from the swarm"
    )
    console.print(Text(verdict, style=MARKS["bad" if bad else "ok"][1]))


def as_json(findings: Sequence[Finding]) -> str:
    """A JSON object: `healthy`, and every finding."""
    healthy = all(finding.level != "bad" for finding in findings)
    return json.dumps({"healthy": healthy, "findings": [dataclasses.asdict(finding) for finding in findings]})
