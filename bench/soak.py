"""A seed for half an hour, and newcomers that come and go: does the seed leak?

    python bench/soak.py [--minutes 30] [--together 4] [--key] [--out FILE]

A newcomer fetches a model of 8 MB into a directory, which is compared. At random it then leaves well, stays for some
seconds as a seed, is killed, or is killed before it is done. The seed's memory, handles, threads, tasks and Python
objects are counted all the time. Flat means: the medians of the last quarter are those of the second (the first fills
caches and allocators), within `SLACK`.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import forked

from swarm.cli.demo import write_made_up
from swarm.security import cluster_key

MODEL, MODEL_BYTES = "soak/model", 8_000_000
LOOKS = 180
FETCH_TIMEOUT_S = 60.0
TIMEOUT = ("--timeout", f"{FETCH_TIMEOUT_S:g}")
STAYS_S = 5.0
# The last quarter may exceed the second by this: allocators keep a little, and the number of guests varies.
SLACK = {"memory_bytes": 8 << 20, "handles": 8, "threads": 8, "tasks": 24, "objects": 5000}
SEED = """
import asyncio, gc, json, os, sys
from pathlib import Path
import swarm
from swarm.runtime import runtime

async def tasks():
    return len(asyncio.all_tasks())

served = swarm.serve(sys.argv[1], model_id=sys.argv[2])
print(served.address, flush=True)
for _ in sys.stdin:
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({
        "memory_bytes": int(status["RssAnon"].split()[0]) << 10, "threads": int(status["Threads"]),
        "handles": len(os.listdir("/proc/self/fd")), "tasks": runtime().run(tasks()), "objects": len(gc.get_objects()),
    }), flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--together", type=int, default=4, help="newcomers at once")
    parser.add_argument("--key", action="store_true", help="with a cluster key, so that everything is encrypted")
    parser.add_argument("--dice", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the raw numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swarm-soak-") as place:
        report = Soak(Path(place), key=options.key, dice=random.Random(options.dice)).run(
            seconds=60 * options.minutes, together=options.together
        )
    report = {"command": ["bench/soak.py", *sys.argv[1:]], **report}
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return _conclude(report)


class Soak:
    """The seed, and its present newcomers."""

    def __init__(self, place: Path, *, key: bool, dice: random.Random) -> None:
        import numpy as np

        self._place, self._rng = place, dice
        self._model = place / "model"
        self._model.mkdir()
        shape = (MODEL_BYTES // 2,)
        write_made_up(self._model / "a.safetensors", [("a", shape)], rng=np.random.default_rng(1))
        self._environment = {"SWARM_MDNS": "false", "SWARM_CACHE": str(place / "cache"), "SWARM_UPLOAD_LIMIT": "40MB/s"}
        if key:
            cluster_key.create(place / "key")
            self._environment["SWARM_KEY_FILE"] = str(place / "key")
        self._guests: list[Guest] = []
        self._counts = {"came": 0, "complete": 0, "killed early": 0, "failed": 0, "wrong": 0}

    def run(self, *, seconds: float, together: int) -> dict[str, Any]:
        argv = [sys.executable, "-c", SEED, str(self._model), MODEL]
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parent.parent), **self._environment}
        samples: list[dict[str, float]] = []
        with (
            (self._place / "seed.err").open("wb") as err,
            subprocess.Popen(
                argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, text=True
            ) as seed,
        ):
            if seed.stdin is None or seed.stdout is None:
                raise RuntimeError("no pipes")
            address = seed.stdout.readline().strip()
            began = look_at = time.monotonic()
            while (now := time.monotonic()) < began + seconds:
                self._guests = [guest for guest in self._guests if not self._over(guest, now)]
                if len(self._guests) < together:
                    self._counts["came"] += 1
                    self._guests.append(Guest(self._counts["came"], address, self._environment, self._place, self._rng))
                if now >= look_at:
                    look_at += seconds / LOOKS
                    print("look", file=seed.stdin, flush=True)
                    samples.append({"at_s": round(now - began, 1)} | json.loads(seed.stdout.readline()))
                    print(f"\r{samples[-1]} {self._counts}", end="", file=sys.stderr, flush=True)
                time.sleep(0.05)
            for guest in self._guests:
                guest.leave(signal.SIGKILL)
            seed.terminate()
        print(file=sys.stderr)
        complaints = (self._place / "seed.err").read_text()
        return {**self._counts, "tracebacks of the seed": complaints.count("Traceback"), "samples": samples}

    def _over(self, guest: Guest, now: float) -> bool:
        outcome = guest.look(now)
        if outcome is None:
            return False
        self._counts[outcome] += 1
        if outcome == "failed":
            print(f"\n{guest.command.name}: {guest.command.err[-500:]}", file=sys.stderr)
        if outcome == "complete" and not guest.equals(self._model):
            self._counts["wrong"] += 1
        guest.clean()
        return True


class Guest:
    """A newcomer, and its randomly chosen end."""

    def __init__(self, number: int, seed: str, environment: dict[str, str], place: Path, dice: random.Random) -> None:
        self._out = place / f"out-{number}"
        self._how = dice.choice(["leaves", "stays", "stays and is killed", "is killed early"])
        self._die_at = time.monotonic() + dice.uniform(0.0, 1.0)
        self._until: float | None = None
        self._give_up_at = time.monotonic() + FETCH_TIMEOUT_S + STAYS_S
        arguments = [
            "fetch",
            MODEL,
            "--out",
            str(self._out),
            "--peer",
            seed,
            "--json",
            "--timeout",
            f"{FETCH_TIMEOUT_S}",
        ]
        if self._how == "leaves":
            arguments.append("--no-seed")
        self._place = place
        self.command = forked.Command(arguments, environment, place=place, name=f"newcomer-{number}")

    def look(self, now: float) -> str | None:
        """Its result, once it has ended."""
        if self._how == "is killed early" and now > self._die_at:
            self.leave(signal.SIGKILL)
            return "killed early"
        if self.command.exit_code is not None:
            return "complete" if self.command.exit_code == 0 else "failed"
        if self._until is None and self._how.startswith("stays") and self.command.out:
            self._until = now + STAYS_S
        if self._until is not None and now > self._until:
            self.leave(signal.SIGKILL if "killed" in self._how else signal.SIGTERM)
            return "complete"
        return "failed" if now > self._give_up_at else None

    def leave(self, number: signal.Signals) -> None:
        self.command.send(number)
        self.command.stop()

    def equals(self, model: Path) -> bool:
        """Whether it got every byte right."""
        return all(filecmp.cmp(file, self._out / file.name, shallow=False) for file in model.iterdir())

    def clean(self) -> None:
        shutil.rmtree(self._out, ignore_errors=True)
        for path in self._place.glob(f"{self.command.name}.*"):
            path.unlink()


def _conclude(report: dict[str, Any]) -> int:
    samples = report["samples"]
    quarter = len(samples) // 4
    flat = not (report["tracebacks of the seed"] or report["failed"] or report["wrong"]) and quarter > 0
    counts = {name: value for name, value in report.items() if isinstance(value, int)}
    print("newcomers: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    for name, slack in SLACK.items():
        second, last = (
            statistics.median(sample[name] for sample in part)
            for part in (samples[quarter : 2 * quarter], samples[-quarter:])
        )
        flat = flat and last <= second + slack
        print(f"{name:14} second quarter {second:>12,.0f}   last quarter {last:>12,.0f}   {last - second:+,.0f}")
    print("flat" if flat else "NOT FLAT")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
