"""`swarm replay FILE`: reads a trace, and prints where the time went as tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from swarm.cli.replay_report import replay
from swarm.errors import StoreError
from swarm.observe.trace import lines
from swarm.observe.units import size_text


def read(path: Path) -> dict[str, Any]:
    """What `replay` says of a trace. Raises StoreError for a file that is none."""
    try:
        return replay(lines(path))
    except OSError as error:
        raise StoreError(str(path), f"cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(str(path), f"is no trace of swarm ({error!r}); `--trace FILE` writes one") from error


def show(told: Mapping[str, Any]) -> None:
    """Prints what `read` returned."""
    console = Console(markup=False, highlight=False)
    for fetch in told["fetches"]:
        end = "complete" if fetch["complete"] else fetch["error"] or "not ended"
        size, seconds = size_text(fetch["received_bytes"]), fetch["seconds"]
        console.print(f"{fetch['model_id']}, {fetch['digest'][:12]}: {size} in {seconds:.2f} s, {end}")
        phases = Table("phase", "s", "of all")
        for name, spent_s in fetch["phases"].items():
            phases.add_row(name, f"{spent_s:.3f}", f"{spent_s / max(seconds, 1e-9):.0%}")
        console.print(phases)
        sources = Table("source", "chunks", "received", "rejected", "failed", "waited s", "wire s", "banned")
        for one in fetch["sources"]:
            sources.add_row(
                one["name"], str(one["chunks"]), size_text(one["bytes"]), str(one["rejected_chunks"]),
                str(one["failed_transfers"]), f"{one['waited_s']:.3f}", f"{one['wire_s']:.3f}", one["banned"] or "",
            )  # fmt: skip
        console.print(sources)
    if not told["fetches"]:
        console.print("no fetch in this trace")
    if told["left_out_entries"]:
        console.print(f"{told['left_out_entries']} entries were left out: the disk was too slow, or the file too long")
