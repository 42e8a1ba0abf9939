"""`swarm simulate`: runs a simulated burst, and compares it with the lower bound and with a star.

    curve:   completion times of 1/4, 1/2, 3/4, 9/10 and all of the newcomers, each from its own request
    star:    completion times if each newcomer got the whole model from a seed, one after another

Owns the output. Must not know: the simulation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from swarm.content.bitfield import Bitfield
from swarm.errors import LocalProtocolError, SettingsError, StoreError
from swarm.observe.units import size_text
from swarm.simulation.crowd import Crowd, Observer
from swarm.simulation.report import BurstReport, quantile
from swarm.simulation.setup import Burst
from swarm.store.own_files import replacing

PARTS = {"1/4": 0.25, "1/2": 0.5, "3/4": 0.75, "9/10": 0.9, "all": 1.0}
NOT_ALL_FINISHED = 1
COLUMNS = 100  # of a table, without a terminal

Outcome: TypeAlias = BurstReport | LocalProtocolError


def simulate(burst: Burst, *, runs: int, as_json: bool, trace: Path | None, plot: Path | None) -> int:
    """Runs and prints. Returns 0 if every newcomer that was not killed completed in every run, else 1.

    Raises SettingsError, and StoreError for a file that cannot be written.
    """
    if runs < 1:
        raise SettingsError("runs", f"{runs}; at least 1 is needed")
    if runs > 1 and (trace or plot):
        raise SettingsError("trace" if trace else "plot", "is of one run; leave out --runs")
    console = Console() if sys.stdout.isatty() else Console(width=COLUMNS)
    with Console(stderr=True).status(f"{runs} x {burst.newcomers} newcomers, {burst.chunks} chunks"):
        if runs > 1:
            bursts = [dataclasses.replace(burst, rng_seed=burst.rng_seed + number) for number in range(runs)]
            outcomes = list(play_each(bursts))
        else:
            outcomes = [_play_and_write(burst, trace, plot)]
    reports = [outcome for outcome in outcomes if isinstance(outcome, BurstReport)]
    if as_json:
        bounds = {"copy_s": burst.copy_s, "bound_s": burst.bound_s}
        played = [as_plain(outcome) for outcome in outcomes]
        print(json.dumps({"setup": dataclasses.asdict(burst), **bounds, "runs": played}))
    elif runs == 1:
        for report in reports:
            show(report, console)
    elif reports:
        show_all(reports, console)
    failures = [line for outcome in outcomes if (line := failure(outcome))]
    for line in failures:
        print(f"swarm: {line}", file=sys.stderr)
    return NOT_ALL_FINISHED if failures else 0


def play(burst: Burst, observe: Observer | None = None) -> Outcome:
    """A single run. A LocalProtocolError of a machine is returned as the outcome."""
    try:
        return Crowd(burst, observe).run()
    except LocalProtocolError as error:
        return error


def play_each(bursts: Sequence[Burst]) -> Iterator[Outcome]:
    """The outcomes in the order of the bursts, from a process for each core."""
    processes = min(len(bursts), len(os.sched_getaffinity(0)))
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(play, bursts)
    finally:
        pool.shutdown(cancel_futures=True)


def failure(outcome: Outcome) -> str | None:
    """The failure and the command that repeats it, as a line of text; None if all newcomers completed."""
    if isinstance(outcome, LocalProtocolError):
        return str(outcome)
    if not outcome.unfinished:
        return None
    why = (
        f"{outcome.lost_chunks} of {outcome.burst.chunks} chunks died with their last holders"
        if outcome.lost_chunks
        else "although every chunk has a holder, which is a bug in swarm"
    )
    names = ", ".join(outcome.unfinished[:3]) + (", ..." if len(outcome.unfinished) > 3 else "")
    newcomers = f"{len(outcome.unfinished)} of {outcome.burst.newcomers} newcomers ({names})"
    return f"{newcomers} did not finish, {why}; replay it with: {outcome.burst.command}"


def measures(report: BurstReport) -> dict[str, tuple[float, str]]:
    """Measures of a run that apply to its burst, each with its format."""
    burst = report.burst
    found = {
        "last newcomer, times its lower bound": (report.last_ratio, "{:.3f}"),
        "mean newcomer, times its lower bound": (report.mean_ratio, "{:.3f}"),
    }
    if burst.origin_bytes_per_s:
        found["origin sent, copies of the model"] = (report.origin_models, "{:.2f}")
        found["requests at the origin"] = (report.origin_requests, "{:.0f}")
    if burst.seeds:
        found["seeds sent, copies of the model"] = (report.seed_models, "{:.2f}")
    found["control messages, part of the payload"] = (report.control_part, "{:.3%}")
    if burst.corrupt or burst.liars:
        found["rejected chunks"] = (report.rejected_chunks, "{:.0f}")
    if burst.racks > 1:
        found["copies that left a rack"] = (report.crossed_models, "{:.2f}")
    if burst.per_machine > 1:
        found["copies that entered a machine"] = (report.entered_models, "{:.2f}")
    return found


def show(report: BurstReport, console: Console) -> None:
    """Prints a run."""
    _head(report.burst, console)
    lived_s, star_s, bound_s = report.lived_s, report.star_s, report.burst.bound_s
    table = Table("done", "swarm", "lower bound", "ratio", "star")
    for words, part in PARTS.items():
        time_s = quantile(lived_s, part)
        star = seconds_text(quantile(star_s, part))
        table.add_row(words, seconds_text(time_s), seconds_text(bound_s), f"{time_s / bound_s:.3f}", star)
    console.print(table)
    for words, (value, pattern) in measures(report).items():
        console.print(f"{words}: {pattern.format(value)}", highlight=False)
    for name, count in sorted(report.banned_by.items()):
        kind = "which lies" if name in report.liars else "honest"
        console.print(f"{name}, {kind}: banned by {count}", highlight=False)


def show_all(reports: Sequence[BurstReport], console: Console) -> None:
    """Prints many runs of a burst: median and range."""
    burst = reports[0].burst
    _head(burst, console)
    table = Table(f"{len(reports)} runs", "median", "least", "most")
    for words, part in PARTS.items():
        times_s = [quantile(report.lived_s, part) for report in reports]
        table.add_row(f"{words} done", *_range(times_s, seconds_text))
    for words, (_, pattern) in measures(reports[0]).items():
        table.add_row(words, *_range([measures(report)[words][0] for report in reports], pattern.format))
    console.print(table)
    last_s = [report.star_s[-1] for report in reports if report.star_s]
    star = seconds_text(statistics.median(last_s)) if last_s else "-"
    console.print(f"lower bound {seconds_text(burst.bound_s)}; last of a star {star}", highlight=False)


def seconds_text(seconds: float) -> str:
    """A time as text, in ms below 1 s."""
    if math.isnan(seconds):
        return "-"
    if math.isinf(seconds):
        return "never"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def as_plain(outcome: Outcome) -> dict[str, Any]:
    """A run as JSON; infinite and undefined numbers are null."""
    if isinstance(outcome, LocalProtocolError):
        return {"failure": str(outcome)}
    lived_s, star_s = outcome.lived_s, outcome.star_s
    numbers = {
        "curve_s": {words: quantile(lived_s, part) for words, part in PARTS.items()},
        "star_s": {words: quantile(star_s, part) for words, part in PARTS.items()},
        "last_ratio": outcome.last_ratio,
        "mean_ratio": outcome.mean_ratio,
        "seed_models": outcome.seed_models,
        "origin_models": outcome.origin_models,
        "origin_requests": outcome.origin_requests,
        "control_part": outcome.control_part,
        "crossed_models": outcome.crossed_models,
        "entered_models": outcome.entered_models,
        "rejected_chunks": outcome.rejected_chunks,
        "banned_by": dict(outcome.banned_by),
        "liars": sorted(outcome.liars),
        "killed": sorted(outcome.killed),
        "unfinished": outcome.unfinished,
        "times_s": dict(outcome.times_s),
    }
    head = {"rng_seed": outcome.burst.rng_seed, "command": outcome.burst.command, "failure": failure(outcome)}
    return {**head, **{name: _finite(value) for name, value in numbers.items()}}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _head(burst: Burst, console: Console) -> None:
    seeds = "one seed" if burst.seeds == 1 else f"{burst.seeds or 'no'} seeds"
    if burst.origin_bytes_per_s:
        seeds += f", an origin of {size_text(burst.origin_bytes_per_s)}/s"
    model = f"{size_text(burst.model_bytes)} in {burst.chunks} chunks, links of {size_text(burst.rate_bytes_per_s)}/s"
    console.print(
        f"{burst.newcomers} newcomers, {seeds}, {model}: one copy takes {seconds_text(burst.copy_s)}", highlight=False
    )


def _range(values: Sequence[float], text: Callable[[float], str]) -> tuple[str, str, str]:
    return text(statistics.median(values)), text(min(values)), text(max(values))


def _play_and_write(burst: Burst, trace: Path | None, plot: Path | None) -> Outcome:
    """A single run; files of its journal and plot appear when they are complete."""
    if plot is None and trace is None:
        return play(burst)
    from swarm.simulation.plot import BurstPlot, ChunkHistory

    picture = BurstPlot(plot) if plot else None  # fails before the run, not after
    history = ChunkHistory()
    with contextlib.ExitStack() as files:
        draft = files.enter_context(_replacing(trace)) if trace else None
        file = files.enter_context(draft.open("w", encoding="utf-8")) if draft else None

        def observe(at_s: float, node: str, event: object) -> None:
            history.note(at_s, node, event)
            if file:
                file.write(trace_line(at_s, node, event))

        outcome = play(burst, observe)
    if plot and picture and isinstance(outcome, BurstReport):
        with _replacing(plot) as draft:
            picture.draw(outcome, history, draft)
    return outcome


def trace_line(at_s: float, node: str, event: Any) -> str:
    """An entry of the journal as a JSON line: `at_s`, `node`, module and class of the event, its fields."""
    module = type(event).__module__.rpartition(".")[2].removesuffix("_events")
    fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    return (
        json.dumps({"at_s": at_s, "node": node, "what": f"{module}.{type(event).__name__}", **fields}, default=_as_json)
        + "\n"
    )


def _as_json(value: object) -> object:
    """A bitfield as its number of chunks, a set as a sorted list."""
    return len(value) if isinstance(value, Bitfield) else sorted(value)  # type: ignore[call-overload]


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A draft that is renamed to `path` at the end. Raises StoreError."""
    try:
        with replacing(path) as draft:
            yield draft
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror}); name another place") from error
