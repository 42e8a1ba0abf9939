"""The long run, at a desk: see the package."""

from __future__ import annotations

import argparse
import resource
import sys
import time
import traceback
from itertools import islice
from pathlib import Path, PurePath

from .mutation import inputs
from .target import Target
from .targets import TARGETS

BATCH = 10_000
SLOW_S = 1.0  # an input of at most 4 KiB that keeps a node busy for so long is a finding


def main() -> int:
    """Feeds every target its share; returns 1 when any of them broke."""
    parser = argparse.ArgumentParser("python -m fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many, over all targets")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--target", action="append", choices=[target.name for target in TARGETS])
    parser.add_argument("--replay", type=Path, help="a kept input, for a single target")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="where inputs that break a target go")
    options = parser.parse_args()
    targets = [target for target in TARGETS if target.name in (options.target or [target.name])]
    if options.replay:
        return int(sum(_broke(target, options.replay.read_bytes(), options.keep) for target in targets) > 0)
    whole = sum(target.share for target in targets)
    broken = sum(_run(t, round(options.inputs * t.share / whole), options.seed, options.keep) for t in targets)
    print(f"{broken} inputs broke a target; most memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
    return int(broken > 0)


def _run(target: Target, count: int, seed: str, keep: Path) -> int:
    began = time.perf_counter()
    accepted = broken = 0
    slowest = 0.0
    for batch in range(0, count, BATCH):
        for data in islice(inputs(target.seeds, seed=f"{seed} {target.name} {batch}"), min(BATCH, count - batch)):
            start = time.perf_counter()
            try:
                accepted += target.feed(data)
            except Exception:
                broken += _broke(target, data, keep)
            took = time.perf_counter() - start
            if took > max(slowest, SLOW_S):
                print(f"{target.name}: {took:.1f} s for {data!r:.300}", flush=True)
            slowest = max(slowest, took)
    rate = count / (time.perf_counter() - began)
    print(
        f"{target.name:12} {count:>9} inputs, {accepted:>8} accepted, {broken} broke it; "
        f"{rate:,.0f} a second, the slowest took {slowest * 1e3:.1f} ms",
        flush=True,
    )
    return broken


def _broke(target: Target, data: bytes, keep: Path) -> int:
    """Whether an input breaks a target; it is kept, and the first of each kind is shown."""
    try:
        target.feed(data)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{target.name}-{PurePath(frame.filename).stem}-{frame.lineno}"
        path = keep / where
        if not path.exists():
            keep.mkdir(exist_ok=True)
            path.write_bytes(data)
            traceback.print_exc()
            print(f"again with: python -m fuzz --target {target.name} --replay {path}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
