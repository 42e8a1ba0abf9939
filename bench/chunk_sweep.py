"""`swarm.fetch` into warm tensors over chunk sizes: the reason of `swarm.content.manifest.default_chunk_bytes`.

    python bench/chunk_sweep.py [--mib 128 1024 4096] [--repeat 3] [--dir DIR] [--out FILE]

A seed for each chunk size, all at once, because idle seeds cost nothing; a single newcomer, on loopback; the sizes are
interleaved within a round. A small chunk costs messages and system calls. A large chunk leaves a burst of newcomers
little to exchange while it is on its way, which a pair cannot show: so the default is at the small end of the plateau.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import children
import models
from children import Child

CHUNKS = [(256 << 10) << power for power in range(9)]  # 256 KiB to 64 MiB

Run = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, nargs="+", default=[128, 1024, 4096], help="sizes of the model")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where models are made and kept; default: a temporary directory")
    parser.add_argument("--congestion", default="cubic", help="congestion control: bbr loses 25-45 %% on loopback")
    parser.add_argument("--out", type=Path, help="JSON file for the raw numbers")
    options = parser.parse_args()
    report: dict[str, Any] = {"congestion_control": children.isolate(options.congestion), "host": children.host()}
    for name, value in report["host"].items():
        print(f"{name}: {value}")
    print(f"congestion control: {report['congestion_control']}")
    report["runs"] = {}
    with contextlib.ExitStack() as held:
        place = options.dir or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="swarm-bench-")))
        place.mkdir(parents=True, exist_ok=True)
        for mib in options.mib:
            model = models.model(place.absolute(), mib << 20)
            models.warm(model)
            runs = report["runs"][model.name] = _sweep(place.absolute(), model, repeat=options.repeat)
            _print_table(model, runs)
    out = options.out or Path(__file__).parent / "results" / f"chunks-{platform.node()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


def _sweep(place: Path, model: Path, *, repeat: int) -> dict[int, list[Run]]:
    size = models.size_of(model)
    deadline_s = 60 + size / 50e6
    runs: dict[int, list[Run]] = {chunk_bytes: [] for chunk_bytes in CHUNKS}
    with contextlib.ExitStack() as held:
        worker = [sys.executable, str(Path(__file__).with_name("workers.py")), "fetcher", str(model)]
        fetcher = held.enter_context(Child(worker, cwd=place))
        fetcher.line(deadline_s)
        seeds = {chunk_bytes: held.enter_context(_seed(place, model, chunk_bytes)) for chunk_bytes in CHUNKS}
        addresses = {chunk_bytes: seed.line(deadline_s).split()[0] for chunk_bytes, seed in seeds.items()}
        for _ in range(repeat):
            for chunk_bytes, seed in seeds.items():
                before_s = seed.cpu_s()
                answer = fetcher.ask({"do": "into", "peer": addresses[chunk_bytes]}, timeout_s=deadline_s)
                run = {
                    "gb_per_s": size / answer["seconds"] / 1e9,
                    "transfer_gb_per_s": size / answer["transfer_s"] / 1e9,
                }
                run["cpu_s_per_gb"] = (answer["cpu_s"] + seed.cpu_s() - before_s) / size * 1e9
                runs[chunk_bytes].append(run)
    return runs


def _seed(place: Path, model: Path, chunk_bytes: int) -> Child:
    environment = children.clean_environment(place, chunk_bytes=str(chunk_bytes))
    return Child(children.swarm("serve", str(model), "--no-mdns"), cwd=place, environment=environment)


def _print_table(model: Path, runs: dict[int, list[Run]]) -> None:
    print(f"\n{model.name}, medians\n{'chunk':>10}{'GB/s':>8}{'transfer GB/s':>16}{'CPU s/GB, both ends':>22}")
    for chunk_bytes, some in runs.items():
        rate, transfer, cpu = (statistics.median(run[key] for run in some) for key in some[0])
        print(f"{chunk_bytes >> 10:>6} KiB{rate:>8.2f}{transfer:>16.2f}{cpu:>22.2f}", flush=True)


if __name__ == "__main__":
    main()
