"""What being watched costs: a fetch alone beside one that is traced, while metrics are scraped and status is watched.

    python bench/watched.py [--size MB] [--rounds N]

One seed and one newcomer, real processes over loopback, without a limit; interleaved, medians. Watching is harder than
in use: metrics of both ends are scraped five times a second, and the whole view is asked for once a second.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from integration.processes import Machine, write_model

from swarm import __version__

RESULTS = Path(__file__).parent / "results"
SCRAPE_EVERY_S = 0.2


def fetch_s(machine: Machine, seed: str, number: int, *, watched: bool) -> float:
    """Seconds of the transfer, as the fetch itself reports them."""
    over = threading.Event()
    out = machine.root / f"out-{number}"
    flags = ("--trace", str(machine.root / f"trace-{number}")) if watched else ()

    def scrape() -> None:
        while not over.wait(SCRAPE_EVERY_S):
            with urllib.request.urlopen(f"http://{seed}/metrics", timeout=10) as answer:
                answer.read()

    scraper = threading.Thread(target=scrape)
    status = None
    if watched:
        scraper.start()
        status = machine.start("status", "--watch", "--peer", seed)
        status.wait_for("member")
    try:
        ended = machine.fetch(out, *flags, peers=[seed]).end()
    finally:
        over.set()
        if status:
            status.kill()
            scraper.join()
    assert ended.code == 0, ended.err
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return float(json.loads(ended.out)["seconds"])


def main() -> None:
    """Prints medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1000, metavar="MB")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"alone": [], "watched": []}
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder))
        try:
            seed = machine.serve(write_model(machine.root / "model", size=options.size * 1_000_000)).address
            fetch_s(machine, seed, 0, watched=False)  # warms the page cache
            for number in range(options.rounds):
                for which in ("alone", "watched") if number % 2 else ("watched", "alone"):
                    took_s = fetch_s(machine, seed, number + 1, watched=which == "watched")
                    seconds[which].append(took_s)
        finally:
            machine.close()
    medians = {which: statistics.median(took) for which, took in seconds.items()}
    cost = medians["watched"] / medians["alone"] - 1
    report = {
        "command": " ".join(sys.argv),
        "host": {"python": platform.python_version(), "kernel": platform.release(), "machine": platform.machine()},
        "swarm": __version__,
        "size_bytes": options.size * 1_000_000,
        "seconds": seconds,
        "median_s": medians,
        "cost": cost,
    }
    print(json.dumps(report, indent=1))
    path = RESULTS / f"watched-{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{options.size} MB: alone {medians['alone']:.3f} s, watched {medians['watched']:.3f} s: {cost:+.1%}")


if __name__ == "__main__":
    main()
