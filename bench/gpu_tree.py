"""Sources and N newcomers at once, a process each, on as many GPUs as there are.

    python bench/gpu_tree.py [--newcomers N] [--sources 1 2 4] [--layers 28] [--json FILE]

Process n has GPU n, counted round. With a GPU for each, the numbers are those of a host with such GPUs. With more
processes than GPUs they share them, NCCL takes each for a host of its own and goes through sockets, and the run shows
only that all of it works. Without --newcomers there are as many as leave a GPU for a source.

    origin        a group of two for each newcomer, a broadcast per tensor: in sequence, and all at once
    broadcast     a group of all, which has to know them beforehand
    swarm         over cuda_ipc and over nccl, verified, the sources idle, computing, or a source killed half way

'last' and 'mean' are newcomers, from call to return (groups are made beforehand but for 'whole'); 'first' is a single
newcomer alone, 'egress' the copies of the model that the sources sent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from children import ROOT, Child, clean_environment, host

TIMEOUT_S = 240.0
LOAD_ROWS = 8192
PORTS = iter(range(29700, 29900))


class Tree:
    """All processes of a measurement, sources first."""

    def __init__(self, place: Path, sources: int, newcomers: int, *, gpus: int, layers: int) -> None:
        self.sources, self.newcomers = sources, newcomers
        self.shared = sources + newcomers > gpus
        self.children = [
            Child(
                [sys.executable, str(ROOT / "bench" / "gpu_workers.py"), str(n % gpus), str(layers)],
                cwd=place,
                environment=clean_environment(place)
                | ({"NCCL_HOSTID": f"host{n}", "NCCL_SOCKET_IFNAME": "lo"} if self.shared else {}),
            )
            for n in range(sources + newcomers)
        ]
        self._pool = ThreadPoolExecutor(len(self.children))
        for child in self.children:
            child.told(timeout_s=TIMEOUT_S)
        made = self.each(range(len(self.children)), lambda n: {"do": "make", "random": n < sources})
        self.bytes: int = made[0]["bytes"]
        self.gpu: str = made[0]["gpu"]

    def each(self, members: range, question: Any) -> list[dict[str, Any]]:
        """The answers of these, all asked at once."""
        jobs = [self._pool.submit(self.children[n].ask, question(n), timeout_s=TIMEOUT_S) for n in members]
        return [job.result() for job in jobs]

    @property
    def everybody(self) -> range:
        return range(len(self.children))

    @property
    def late(self) -> range:
        """The newcomers."""
        return range(self.sources, len(self.children))

    def check(self) -> None:
        """All newcomers have the tensors of the last source, which is never killed."""
        sums = self.each(range(self.sources - 1, len(self.children)), lambda n: {"do": "checksum"})
        if len({json.dumps(one) for one in sums}) > 1:
            raise RuntimeError(f"wrong bytes: {sums}")

    def wipe(self) -> None:
        self.each(self.late, lambda n: {"do": "wipe"})

    def close(self) -> None:
        for child in self.children:
            child.kill()


def copies(tree: Tree) -> dict[str, float]:
    """GB/s of the driver's copy for every pair of processes on different GPUs, each pair alone."""
    rates = {}
    for source in tree.everybody:
        handles = tree.each(range(source, source + 1), lambda n: {"do": "handles"})[0]["handles"]
        for target in tree.late:
            if target != source:
                asked = range(target, target + 1)
                timed = tree.each(asked, lambda n, told=handles: {"do": "copy", "handles": told, "repeat": 2})[0]
                tree.each(asked, lambda n: {"do": "close_handles"})
                rates[f"{source} to {target}"] = tree.bytes / min(timed["seconds"]) / 1e9
    return rates


def origin(tree: Tree) -> Iterator[tuple[str, list[float]]]:
    """The origin's algorithm, with a single source."""
    began, ends = 0.0, list[float]()
    for n in tree.late:
        port = next(PORTS)
        tree.wipe()
        jobs = [
            tree._pool.submit(
                tree.children[member].ask, {"do": "origin", "port": port, "rank": rank}, timeout_s=TIMEOUT_S
            )
            for rank, member in enumerate((0, n))
        ]
        began += sum(jobs[1].result().values())
        jobs[0].result()
        ends.append(began)
    yield "origin, one after another, whole", ends
    port, ranks = next(PORTS), len(tree.children)
    tree.each(tree.everybody, lambda n: {"do": "join", "port": port, "rank": n, "ranks": ranks})
    tree.wipe()
    timed = tree.each(tree.everybody, lambda n: {"do": "pairs", "rank": n, "ranks": ranks})[1:]
    tree.check()
    yield "origin, all at once", [one["seconds"][0] for one in timed]
    tree.wipe()
    tree.each(tree.everybody, lambda n: {"do": "broadcast", "repeat": 1})
    tree.check()
    timed = tree.each(tree.everybody, lambda n: {"do": "broadcast", "repeat": 3})[1:]
    yield "one broadcast to all", [statistics.median(one["seconds"]) for one in timed]
    tree.each(tree.everybody, lambda n: {"do": "part"})


def swarm(tree: Tree, addresses: list[str], scheme: str, members: range, name: str) -> tuple[list[float], float]:
    """Seconds of each newcomer, and the copies that the sources sent."""
    tree.wipe()
    settings = {"peers": addresses, **({"transports": scheme} if scheme == "nccl" else {})}
    answers = tree.each(
        members, lambda n: {"do": "fetch", "settings": settings | {"name": f"newcomer{n}-{name}"}, "keep": True}
    )
    sent = sum(size for one in answers for who, size in one["sources"].items() if who.startswith("source"))
    if len(members) == tree.newcomers:
        tree.check()
    tree.each(members, lambda n: {"do": "leave"})
    return [one["seconds"][0] for one in answers], sent / tree.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="how many to use; without it all that there are")
    parser.add_argument("--newcomers", type=int)
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gpus = options.gpus or _count()
    newcomers = options.newcomers or max(1, gpus - 1)
    rows: list[dict[str, Any]] = []
    print(f"# python {' '.join(sys.argv)}")
    for sources in options.sources:
        with contextlib.ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            tree = Tree(place, sources, newcomers, gpus=gpus, layers=options.layers)
            stack.callback(tree.close)
            print(f"{gpus} {tree.gpu}, {tree.bytes / 1e9:.2f} GB, {sources} sources, {newcomers} newcomers", end="")
            print(", several processes a GPU: rates say nothing" if tree.shared else "", flush=True)
            print(f"{'':<44} {'last ms':>9} {'mean ms':>9} {'GB/s':>7} {'egress':>7}")
            rows += measure(tree, options.repeat)
    if options.json:
        options.json.write_text(json.dumps({"host": host(), "rows": rows}, indent=1))


def measure(tree: Tree, repeat: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def row(what: str, seconds: list[float], egress: float = 0.0) -> None:
        rows.append({"sources": tree.sources, "newcomers": tree.newcomers, "what": what, "seconds": seconds})
        rows[-1]["egress"] = egress
        last, mean = max(seconds) * 1e3, statistics.mean(seconds) * 1e3
        rate = tree.bytes * len(seconds) / last / 1e6
        print(f"{what:<44} {last:9.1f} {mean:9.1f} {rate:7.0f} {egress:7.2f}", flush=True)

    if tree.sources == 1:
        for pair, rate in copies(tree).items():
            print(f"copy alone, {pair:<31} {'':>9} {'':>9} {rate:7.0f}")
            rows.append({"what": f"copy {pair}", "gb_per_s": rate})
        for what, seconds in origin(tree):
            row(what, seconds)
    served = tree.each(
        range(tree.sources), lambda n: {"do": "serve", "settings": {"transports": "nccl", "name": f"source{n}"}}
    )
    addresses = [one["address"] for one in served]
    swarm(tree, addresses, "cuda_ipc", tree.late, "warm")  # compiles the kernels
    for load in (0, LOAD_ROWS):
        tree.each(range(tree.sources), lambda n, rows=load: {"do": "work", "rows": rows})
        for scheme in ("cuda_ipc", "nccl"):
            words = f"swarm, {scheme}{', sources compute' if load else ''}"
            for name, members in (("one newcomer", tree.late[:1]), ("all at once", tree.late)):
                runs = [swarm(tree, addresses, scheme, members, f"{scheme}{load}{name[:3]}{n}") for n in range(repeat)]
                row(f"{words}, {name}", *sorted(runs, key=lambda run: max(run[0]))[len(runs) // 2])
    tree.each(range(tree.sources), lambda n: {"do": "work", "rows": 0})
    if tree.sources > 1:
        alone = next(max(one["seconds"]) for one in rows if one["what"] == "swarm, cuda_ipc, all at once")
        killer = threading.Timer(alone / 2, tree.children[0].kill)
        killer.start()
        row("swarm, cuda_ipc, a source killed half way", *swarm(tree, addresses, "cuda_ipc", tree.late, "killed"))
        killer.join()
    return rows


def _count() -> int:
    listed = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True, timeout=60)
    return len(listed.stdout.splitlines())


if __name__ == "__main__":
    main()
