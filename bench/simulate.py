"""How close a simulated burst comes to its lower bound: `python bench/simulate.py [--large] [--plot]`.

Three tables: 32 newcomers and 2048 chunks, 1 and 2 seeds, under each disturbance; and bursts of 64 and 256 newcomers
(`--large`: of 1024 with 4096 chunks too, which takes an hour of CPU), 1 and 4 seeds; and bursts without a seed
(`--cold 64`), whose origin has a quarter of a link or 8 links. `--cold 1024 --cold-chunks 64` takes two minutes of CPU
for the fast origin; with 256 chunks it was not run to its end. Times are virtual and every run is
a function of its burst, so the machine does not matter. Raw numbers go to bench/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from disturbances import DISTURBANCES

from swarm import __version__
from swarm.cli.simulate import Outcome, as_plain, failure, play_each
from swarm.simulation.report import BurstReport
from swarm.simulation.setup import Burst

RESULTS = Path(__file__).parent / "results"
LARGE = 1024, 4096
ORIGIN_LINKS = 0.25, 8.0
COLD_CHUNK_BYTES = 62_500_000


def disturbed(newcomers: int, chunks: int) -> Iterator[tuple[str, Burst]]:
    """A burst under each disturbance, with 1 and 2 seeds."""
    base = Burst(newcomers=newcomers, chunks=chunks)
    for words, changes in DISTURBANCES.items():
        for seeds in (1, 2) if "seeds" not in changes else (changes["seeds"],):
            yield words, replace(base, **{**changes, "seeds": seeds})


def scaled(newcomers: list[int], chunks: int, *, large: bool) -> Iterator[tuple[str, Burst]]:
    """Undisturbed bursts of ever more newcomers, with 1 and 4 seeds."""
    for count, parts in [*((count, chunks) for count in newcomers), *([LARGE] if large else [])]:
        for seeds in (1, 4):
            yield f"{count} newcomers", Burst(newcomers=count, chunks=parts, seeds=seeds)


def cold(newcomers: list[int], chunks: int) -> Iterator[tuple[str, Burst]]:
    """Bursts without a seed, with a slow and a fast origin."""
    for count in newcomers:
        for links in ORIGIN_LINKS:
            rate = links * Burst.rate_bytes_per_s
            size = chunks * COLD_CHUNK_BYTES
            burst = Burst(newcomers=count, chunks=chunks, model_bytes=size, seeds=0, origin_bytes_per_s=rate)
            yield f"{count} newcomers, an origin of {links:g} links", burst


def row(words: str, outcome: Outcome) -> str:
    """A line of the table."""
    if not isinstance(outcome, BurstReport) or outcome.unfinished:
        return f"| {words} | | | failed: {failure(outcome)} | | | | | |"
    burst = outcome.burst
    crossed = outcome.crossed_models if burst.racks > 1 else outcome.entered_models
    sent, requests = outcome.seed_models + outcome.origin_models, outcome.origin_requests
    return (
        f"| {words} | {burst.seeds} | {burst.chunks} | {outcome.last_ratio:.3f} | {outcome.mean_ratio:.3f} "
        f"| {sent:.2f} | {requests or ''} | {outcome.control_part:.3%} | {f'{crossed:.2f}' if crossed else ''} |"
    )


def draw(played: list[tuple[str, Outcome]], path: Path) -> None:
    """The ratio of the last newcomer for each run, and when which part of the newcomers was done."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    reports = [(words, outcome) for words, outcome in played if isinstance(outcome, BurstReport)]
    names = [f"{words}, S = {report.burst.seeds}" for words, report in reports]
    bars.barh(names, [report.last_ratio for _, report in reports])
    bars.invert_yaxis()
    bars.set_xlim(left=1.0)
    bars.set(title="last newcomer", xlabel="times its lower bound")
    for name, (_, report) in zip(names, reports, strict=True):
        curves.plot(report.ratios, [n / len(report.ratios) for n in range(1, len(report.ratios) + 1)], label=name)
    curves.set(title="newcomers done", xlabel="times their lower bound, from their own request", ylabel="part of all")
    curves.legend(fontsize="x-small")
    figure.savefig(path)


def main() -> int:
    date = time.strftime("%Y-%m-%d")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--newcomers", default="64,256", metavar="N,N", help="of the bursts of the second table")
    parser.add_argument("--chunks", type=int, default=2048, help="of the model, in both tables")
    parser.add_argument("--disturbed", type=int, default=32, metavar="N", help="newcomers of the first table; 0: none")
    parser.add_argument("--cold", default="", metavar="N,N", help="newcomers of bursts without a seed, e.g. 64,1024")
    parser.add_argument(
        "--cold-chunks", type=int, default=256, metavar="K", help="of 62.5 MB, in bursts without a seed; 1024: 64 or so"
    )
    parser.add_argument("--rng-seed", type=int, default=0)
    parser.add_argument("--large", action="store_true", help="a burst of 1024 with 4096 chunks too")
    parser.add_argument("--plot", action="store_true", help="draw it beside the numbers; needs matplotlib")
    parser.add_argument("--out", type=Path, default=RESULTS / f"simulate-{date}.json")
    given = parser.parse_args()
    counts = [int(count) for count in given.newcomers.split(",") if count]
    asked = [
        *(disturbed(given.disturbed, given.chunks) if given.disturbed else ()),
        *scaled(counts, given.chunks, large=given.large),
        *cold([int(count) for count in given.cold.split(",") if count], given.cold_chunks),
    ]
    print(
        "| | seeds | chunks | last | mean | seeds or origin sent | requests | control | crossed, entered |", flush=True
    )
    print("| --- " * 9 + "|", flush=True)
    played: list[tuple[str, Outcome]] = []
    for (words, _), outcome in zip(
        asked, play_each([replace(burst, rng_seed=given.rng_seed) for _, burst in asked]), strict=True
    ):
        played.append((words, outcome))
        print(row(words, outcome), flush=True)
    raw: list[dict[str, Any]] = [
        {"what": words, "setup": dataclasses.asdict(burst), **as_plain(outcome)}
        for (_, burst), (words, outcome) in zip(asked, played, strict=True)
    ]
    told = {
        "date": date,
        "command": shlex.join(["python", *sys.argv]),
        "swarm": __version__,
        "python": platform.python_version(),
        "runs": raw,
    }
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        draw(played, given.out.with_suffix(".png"))
    return 1 if any(failure(outcome) for _, outcome in played) else 0


if __name__ == "__main__":
    sys.exit(main())
