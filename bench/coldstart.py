"""Replicas that start with nothing: `swarm` beside the hub's own client and a seed-first start, on shaped links.

    python bench/coldstart.py [--newcomers 1,2,4,8] [--systems swarm,hub,first,aria2] [--rate 100mbit]
        [--origin 100mbit] [--each RATE] [--mib 96] [--repeat 1]

    swarm    every node calls swarm.fetch(id, out=HUB_CACHE) at the same time
    hub      every node calls huggingface_hub.snapshot_download
    first    one node does, then serves; the others fetch from it
    aria2    every node downloads the files with aria2c, 8 connections, without a look at their content

Every host is a network namespace with a link of its own (hosts.py), so it needs root. The origin is tests/hub.py on a
host of its own, with a cap for all connections together (`--origin`) and one for each (`--each`). Every node is a warm
process; its time runs from its call until the snapshot is there. Afterwards the hub's client judges each cache, and
every file is compared with the origin's.

The bound is max(bytes / origin, bytes / link). Pick a rate at which the machine's cores are not the bottleneck.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import children
import hosts
import models

ROOT = Path(__file__).resolve().parent.parent
MODEL = "org/model"
PORT = 7000
DEADLINE_S = 600.0
SYSTEMS = ("swarm", "hub", "first", "aria2")
ARIA2 = ("aria2c", "--no-conf", "--quiet", "--split=8", "--max-connection-per-server=8", "--min-split-size=8M")
TMPFS = Path("/dev/shm")


@dataclass(frozen=True)
class ColdStart:
    """A run. `last_s`: the last node's time; `ratio`: that over the bound.

    `reads`: (time, path, first byte, bytes) of each request for a file.
    """

    system: str
    newcomers: int
    last_s: float
    ratio: float
    copies: float
    requests: int
    listings: int
    verified: bool
    reads: list[tuple[float, str, int, int]]


class Worker:
    """A warm process on a host."""

    def __init__(self, host: hosts.Host, place: Path, system: str, *, endpoint: str, peers: list[str]) -> None:
        place.mkdir()
        self._place = place
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SWARM_"))},
            "PYTHONPATH": str(ROOT),
            "HOME": str(place),
            "HF_HOME": str(place / "hf"),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "SWARM_CACHE": str(place / "cache"),
            "SWARM_INSECURE": "1",
            "SWARM_MDNS": "0",
            "SWARM_FSYNC": "0",
            "SWARM_LISTEN": f"{host.address}:{PORT}",
            "SWARM_PEERS": ",".join(peers),
        }
        argv = host.inside([sys.executable, __file__, "--worker", system])
        self._errors = place / "errors"
        with self._errors.open("wb") as errors:
            self._popen = subprocess.Popen(
                argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.line()

    def go(self) -> None:
        """Starts it."""
        assert self._popen.stdin
        self._popen.stdin.write("go\n")
        self._popen.stdin.flush()

    def line(self) -> str:
        """Its next line."""
        assert self._popen.stdout
        text = self._popen.stdout.readline().strip()
        if not text:
            raise RuntimeError(f"a worker ended: {self._errors.read_text()[-2000:]}")
        return text

    def end(self) -> None:
        """Ends it."""
        self._popen.kill()
        self._popen.wait()


def main() -> int:
    options = _options()
    if options.worker:
        return _work(options.worker)
    if why := hosts.lacking():
        print(f"needs network namespaces: {why}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="swarm-bench-", dir=TMPFS if TMPFS.is_dir() else None) as text:
        place = Path(text)
        model = models.model(place, options.mib << 20)
        size = sum(path.stat().st_size for path in model.iterdir())
        report: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "host": children.host(),
            "command": ["bench/coldstart.py", *sys.argv[1:]],
            "bytes": size,
            "files": len(list(model.iterdir())),
        }
        print(json.dumps(report))
        print(f"{'system':8} {'N':>3} {'last s':>8} {'/bound':>7} {'copies':>7} {'requests':>9} {'listings':>9}")
        outcomes = []
        for number in range(options.repeat):
            for newcomers in options.newcomers:
                for system in options.systems:
                    outcome = _run(options, system, newcomers, model, place / f"{system}-{newcomers}-{number}")
                    outcomes.append(outcome)
                    print(
                        f"{system:8} {newcomers:3} {outcome.last_s:8.2f} {outcome.ratio:7.2f} {outcome.copies:7.2f} "
                        f"{outcome.requests:9} {outcome.listings:9}{'' if outcome.verified else '  NOT VERIFIED'}",
                        flush=True,
                    )
        out = options.out or ROOT / "bench" / "results" / f"coldstart-{options.rate}-{report['date']}.json"
        out.write_text(json.dumps({**report, "runs": [asdict(outcome) for outcome in outcomes]}, indent=1) + "\n")
        for system in options.systems:
            worst = [o.ratio for o in outcomes if o.system == system]
            print(f"{system}: median of the last node over the bound {statistics.median(worst):.2f}")
        print(f"raw numbers: {out}")
    return 0 if all(outcome.verified for outcome in outcomes) else 1


def _run(options: argparse.Namespace, system: str, newcomers: int, model: Path, place: Path) -> ColdStart:
    place.mkdir()
    link = hosts.rate_bits_per_s(options.rate) / 8
    origin = hosts.rate_bits_per_s(options.origin or options.rate) / 8
    size = sum(path.stat().st_size for path in model.iterdir())
    with (
        hosts.Network(bits_per_s=hosts.rate_bits_per_s(options.rate), size=newcomers + 1) as network,
        contextlib.ExitStack() as ending,
    ):
        hub_host = network.host()
        each = hosts.rate_bits_per_s(options.each) / 8 if options.each else None
        # aria2 asks a redirected address for further ranges.
        hub = _hub(hub_host, model, total=origin, each=each, signed=system != "aria2", ending=ending)
        endpoint = hub.stdout.readline().strip() if hub.stdout else ""
        machines = [network.host() for _ in range(newcomers)]
        addresses = [f"{machine.address}:{PORT}" for machine in machines]
        workers = []
        for number, machine in enumerate(machines):
            others = [address for address in addresses if address != addresses[number]]
            kind = {"first": "hub-then-serve" if number == 0 else "peers"}.get(system, system)
            worker = Worker(machine, place / str(number), kind, endpoint=endpoint, peers=others)
            ending.callback(worker.end)
            workers.append(worker)
        began = time.monotonic()
        paths = list(_finish(workers, in_turn=system == "first"))
        last_s = time.monotonic() - began
        counts = _counts(hub)
        wanted = {path.name: path.read_bytes() for path in model.iterdir()}
        verified = all(_right(Path(path), wanted) for path in paths)
    bound_s = max(size / origin, size / link)
    ratio, reads = last_s / bound_s, counts["reads"]
    requests, listings = counts["resolve"], counts["api"]
    return ColdStart(system, newcomers, last_s, ratio, counts["copies"], requests, listings, verified, reads)


def _finish(workers: list[Worker], *, in_turn: bool) -> Iterator[str]:
    """The snapshots, once all are there. `in_turn`: the first node serves before the others start."""
    first = workers[:1] if in_turn else []
    for worker in first:
        worker.go()
        yield worker.line()
    rest = workers[len(first) :]
    for worker in rest:
        worker.go()
    for worker in rest:
        yield worker.line()


def _hub(
    host: hosts.Host, model: Path, *, total: float, each: float | None, signed: bool, ending: contextlib.ExitStack
) -> subprocess.Popen[str]:
    argv = [sys.executable, str(ROOT / "tests" / "hub.py"), str(model), "--model", MODEL, "--host", host.address]
    argv += ["--total", str(total), *(["--each", str(each)] if each else []), *([] if signed else ["--unsigned"])]
    hub = subprocess.Popen(host.inside(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ending.callback(hub.wait)
    ending.callback(hub.kill)
    return hub


def _counts(hub: subprocess.Popen[str]) -> dict[str, Any]:
    assert hub.stdin
    assert hub.stdout
    hub.stdin.write("\n")
    hub.stdin.flush()
    return dict(json.loads(hub.stdout.readline()))


def _right(snapshot: Path, wanted: dict[str, bytes]) -> bool:
    return all((snapshot / name).read_bytes() == data for name, data in wanted.items())


def _work(system: str) -> int:
    """A node, on its host: says `ready`, waits for a line, and says where the snapshot is."""
    if system in ("hub", "hub-then-serve"):
        import huggingface_hub
    if system not in ("hub", "aria2"):
        import swarm.api
    print("ready", flush=True)
    sys.stdin.readline()
    if system == "aria2":
        print(_aria2(os.environ["HF_ENDPOINT"], Path(os.environ["HOME"]) / "aria2"), flush=True)
        sys.stdin.readline()
        return 0
    if system in ("hub", "hub-then-serve"):
        path = huggingface_hub.snapshot_download(MODEL)
        if system == "hub-then-serve":
            served = swarm.api.serve(MODEL)
            print(path, flush=True)
            sys.stdin.readline()
            served.close()
            return 0
    else:
        settings = swarm.Settings.load({"origin": "none"} if system == "peers" else {})
        path = str(swarm.fetch(MODEL, out=swarm.HUB_CACHE, settings=settings).path)
    print(path, flush=True)
    sys.stdin.readline()
    return 0


def _aria2(endpoint: str, out: Path) -> Path:
    with urllib.request.urlopen(f"{endpoint}/api/models/{MODEL}/revision/main") as answer:
        names = [sibling["rfilename"] for sibling in json.load(answer)["siblings"]]
    listed = "".join(f"{endpoint}/{MODEL}/resolve/main/{name}\n  out={name}\n" for name in names)
    subprocess.run([*ARIA2, f"--dir={out}", "--input-file=-"], input=listed, text=True, check=True)
    return out


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--newcomers", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS))
    parser.add_argument("--rate", default="100mbit", help="of each link")
    parser.add_argument("--origin", default=None, help="of the origin in all; by default that of a link")
    parser.add_argument("--each", default=None, help="of each connection to the origin")
    parser.add_argument("--mib", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
