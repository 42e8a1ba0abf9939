"""`swarm replay FILE`: the phases and sources of every fetch in a trace, as tables or JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from swarm.errors import StoreError, clean
from swarm.journal import FetchStarted
from swarm.observe import trace
from swarm.observe.fetch_record import FetchRecord, FetchRecords
from swarm.observe.units import size_text

FETCHES_MAX = 10_000  # in a trace; the records of all of them are in memory


def replay(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The report of every fetch in the lines of a trace. A fetch that did not end lasts until the last line."""
    records, fetches = FetchRecords(), list[FetchRecord]()
    left_out, last_s = 0, 0.0
    for line in lines:
        if line["event"] == "LeftOut":
            left_out += line["entries"]
        elif entry := trace.entry(line):
            last_s = entry.at_s
            records.apply(entry)
            if len(fetches) >= FETCHES_MAX:
                raise ValueError(f"more than {FETCHES_MAX} fetches")
            if isinstance(entry.event, FetchStarted):
                fetches.append(records.records[entry.event.digest])
    reports = [fetch.report(last_s) for fetch in fetches]
    for report in reports:
        report["sources"].sort(key=lambda source: -source["bytes"])
    origins = [record.report(last_s) for record in records.origins.records.values()]
    return {"fetches": reports, "origins": origins, "left_out_entries": left_out}


def read(path: Path) -> dict[str, Any]:
    """`replay` of a file. Raises StoreError if it is no trace."""
    try:
        return replay(trace.lines(path))
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise StoreError(f"{path}: is no trace of swarm ({clean(error)}); `--trace FILE` writes one") from error


def show(replayed: Mapping[str, Any]) -> None:
    """Prints the result of `read` as tables."""
    console = Console(markup=False, highlight=False)
    for fetch in replayed["fetches"]:
        end = "complete" if fetch["complete"] else fetch["error"] or "not ended"
        size, seconds = size_text(fetch["received_bytes"]), fetch["seconds"]
        head = f"{size} in {seconds:.2f} s, {clean(end)}; digest {clean(fetch['digest'])}"
        console.print(f"{clean(fetch['model_id'])}: {head}")
        phases = Table("phase", "s", "of all")
        for name, spent_s in fetch["phases"].items():
            phases.add_row(name, f"{spent_s:.3f}", f"{spent_s / max(seconds, 1e-9):.0%}")
        console.print(phases)
        sources = Table("source", "chunks", "received", "rejected", "failed", "wait s", "transfer s", "banned")
        for source in fetch["sources"]:
            sources.add_row(
                clean(source["name"]), str(source["chunks"]),
                size_text(source["bytes"]), str(source["rejected_chunks"]),
                str(source["failed_transfers"]), f"{source['waited_s']:.3f}", f"{source['transfer_s']:.3f}",
                clean(source["banned"] or ""),
            )  # fmt: skip
        console.print(sources)
    if replayed["origins"]:
        origins = Table("origin", "scheme", "received", "requests", "retries", "last error")
        for origin in replayed["origins"]:
            counts = (str(origin["requests"]), str(origin["retries"]))
            words = (clean(origin["name"]), clean(origin["scheme"]), size_text(origin["bytes"]))
            origins.add_row(*words, *counts, clean(origin["error"] or ""))
        console.print(origins)
    if not replayed["fetches"]:
        console.print("no fetch in this trace")
    if replayed["left_out_entries"]:
        console.print(f"{replayed['left_out_entries']} entries were dropped: slow disk, or a trace over 1 GiB")
