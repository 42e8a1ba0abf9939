"""A checkpoint of 120,000 tensors, as of a large mixture of experts: `swarm.fetch` into memory beside `safetensors`.

    python bench/many_tensors.py [--tensors 120000] [--tensor-bytes 4096] [--repeat 3] [--out FILE]

Both take turns in one run, each time in a fresh process that has imported torch. `safetensors` loads the file, warm in
the page cache, with `safetensors.torch.load_file`. swarm fetches it from a seed on this machine, and asks for every
tensor. The tensors are small, so that the cost of each one is measured and not that of its bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import children
from children import Child

BUDGET = 2.0  # times what safetensors takes

LOAD = """
import sys, time, torch, safetensors.torch
began = time.perf_counter()
found = safetensors.torch.load_file(sys.argv[1])
print(time.perf_counter() - began, len(found))
"""

FETCH = """
import sys, time, torch, swarm
settings = swarm.Settings(mdns=False, peers=(sys.argv[1],))
began = time.perf_counter()
weights = swarm.fetch("bench/experts", settings=settings)
fetched = time.perf_counter() - began
found = dict(weights)
print(time.perf_counter() - began, len(found), fetched, weights.fetched.seconds)
weights.close()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=120_000)
    parser.add_argument("--tensor-bytes", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as place:
        model = Path(place) / "model"
        model.mkdir()
        _write(model / "model.safetensors", options.tensors, options.tensor_bytes)
        (model / "config.json").write_text("{}")
        report: dict[str, Any] = {"host": children.host(), "command": ["bench/many_tensors.py", *sys.argv[1:]]}
        report["seconds"] = _measure(model, options.repeat, options.tensors)
    times = report["seconds"]
    load, fetch = statistics.median(times["safetensors"]), statistics.median(times["swarm"])
    report["ratio"] = round(fetch / load, 2)
    for name, seconds in times.items():
        print(f"{name:24} {statistics.median(seconds):6.2f} s   ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"swarm over safetensors   {fetch / load:6.2f}     (at most {BUDGET:g})")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if fetch <= BUDGET * load else 1


def _write(path: Path, count: int, size: int) -> None:
    import torch
    from safetensors.torch import save_file

    block = torch.arange(size // 2, dtype=torch.int32).to(torch.bfloat16)
    names = (f"model.layers.{n // 768}.mlp.experts.{n // 3 % 256}.{'gud'[n % 3]}_proj.weight" for n in range(count))
    save_file({name: (block + number).reshape(2, -1) for number, name in enumerate(names)}, path, {"format": "pt"})


def _measure(model: Path, repeat: int, count: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"safetensors": [], "swarm": [], "  call alone": [], "  transfer alone": []}
    serve = children.swarm("serve", str(model), "--model-id", "bench/experts", "--no-mdns")
    with Child(serve, cwd=model.parent) as seed:
        address = seed.line(timeout_s=300.0).split()[0]
        for _ in range(repeat):
            times["safetensors"] += _run(LOAD, model / "model.safetensors", count, cwd=model.parent)
            total, call, transfer = _run(FETCH, address, count, cwd=model.parent)
            for name, seconds in (("swarm", total), ("  call alone", call), ("  transfer alone", transfer)):
                times[name].append(seconds)
    return times


def _run(script: str, argument: object, count: int, *, cwd: Path) -> list[float]:
    """Runs a script that prints its seconds, the number of tensors, and further seconds."""
    ran = children.run([sys.executable, "-c", script, str(argument)], cwd=cwd, timeout_s=600.0)
    seconds, found, *more = ran.out.split()
    if int(found) != count:
        raise RuntimeError(f"{found} tensors instead of {count}")
    return [float(seconds), *map(float, more)]


if __name__ == "__main__":
    sys.exit(main())
