"""Two GPUs: `swarm.fetch` between them, beside the ceilings of its transports and the origin's algorithm.

    python bench/gpu_two.py [--layers 28] [--devices 0 1] [--json FILE]

A process for each GPU; tensors with the shapes of Qwen2.5-7B in bf16, 15.2 GB. In a run:

    origin        a two-rank group of torch.distributed, a broadcast per tensor, the group taken down
    ceilings      the driver's copy out of the other process's memory; NCCL calls for 512 MiB at once
    fetch         into given tensors, every chunk verified: over cuda_ipc, over nccl

each with an idle and with a computing source. 'call' is a fetch from call to return: its node opened and linked,
handles opened or a communicator made, everything verified. 'transfer' is its part from the first request to the last
verified chunk, of a node that was linked before ('open': the part that opened handles). 'keeps' is the source's rate of
products while fetches follow each other without a pause, over its rate alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from children import ROOT, Child, clean_environment, host

TIMEOUT_S = 240.0
LOADS = {"idle": 0, "8192-row products": 8192, "16-row products": 16}
PORTS = iter(range(29600, 29700))  # of torch.distributed, which wants to be told


class Bench:
    """Two workers, and the rows that were measured."""

    def __init__(self, source: Child, newcomer: Child) -> None:
        self.source, self.newcomer = source, newcomer
        self.rows: list[dict[str, Any]] = []
        self.bytes = 0
        self.load = "idle"
        self.alone = 0.0
        self._both = ThreadPoolExecutor(2)

    def both(self, at_source: dict[str, Any], at_newcomer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tells both at once, and returns their answers."""
        asked = [
            self._both.submit(child.ask, question, timeout_s=TIMEOUT_S)
            for child, question in ((self.source, at_source), (self.newcomer, at_newcomer))
        ]
        return asked[0].result(), asked[1].result()

    def ask(self, **question: Any) -> dict[str, Any]:
        """Tells the newcomer."""
        return self.newcomer.ask(question, timeout_s=TIMEOUT_S)

    def tell(self, **question: Any) -> dict[str, Any]:
        """Tells the source."""
        return self.source.ask(question, timeout_s=TIMEOUT_S)

    def under(self, name: str) -> None:
        """From now on the source has this load."""
        self.load = name
        self.tell(do="work", rows=LOADS[name])
        self.alone = self.products_per_s(lambda: time.sleep(1.0))

    def products_per_s(self, work: Callable[[], object]) -> float:
        """Of the source, while the work is done."""
        begin = self.tell(do="products")
        work()
        end = self.tell(do="products")
        return float((end["done"] - begin["done"]) / (end["at"] - begin["at"]))

    def row(self, what: str, seconds: list[float], *, keeps: float = 1.0, **more: Any) -> None:
        """Prints and keeps the measurements, the median in front."""
        median = statistics.median(seconds)
        rate = self.bytes / median / 1e9
        self.rows.append({"load": self.load, "what": what, "seconds": seconds, "gb_per_s": rate, "keeps": keeps} | more)
        extra = "  ".join(f"{name} {value:.3g}" for name, value in more.items() if isinstance(value, float))
        times = f"{median * 1e3:9.1f} {min(seconds) * 1e3:9.1f} {rate:8.0f}"
        print(f"{self.load:>18} {what:<34} {times} {keeps:7.2f}  {extra}", flush=True)

    def kept(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """The result of the work, and the part of its products that the source keeps meanwhile."""
        if not self.alone:
            return work(), 1.0
        answers: list[Any] = []
        rate = self.products_per_s(lambda: answers.append(work()))
        return answers[0], rate / self.alone

    def check(self) -> None:
        """The received tensors equal the sent tensors."""
        sent, arrived = self.both({"do": "checksum"}, {"do": "checksum"})
        if sent != arrived:
            raise RuntimeError(f"wrong bytes: {sent} became {arrived}")

    def origin(self, repeat: int) -> None:
        port = next(PORTS)
        at_source, at_newcomer = ({"do": "origin", "port": port, "rank": rank} for rank in (0, 1))
        self.ask(do="wipe")
        (_, timed), keeps = self.kept(lambda: self.both(at_source, at_newcomer))
        self.check()
        self.row("origin, whole", [sum(timed.values())], keeps=keeps, **timed)
        port = next(PORTS)
        self.both(*({"do": "join", "port": port, "rank": rank, "ranks": 2} for rank in (0, 1)))
        first, again = ({"do": "broadcast", "repeat": n} for n in (1, repeat))
        self.both(first, first)
        (_, timed), keeps = self.kept(lambda: self.both(again, again))
        self.row("origin, broadcasts alone", timed["seconds"], keeps=keeps)
        ends = [{"do": "pass_on", "send": send, "repeat": 1} for send in (True, False)]
        self.both(*ends)
        ends = [end | {"repeat": repeat} for end in ends]
        (_, timed), keeps = self.kept(lambda: self.both(*ends))
        self.row("nccl, calls alone", timed["seconds"], keeps=keeps)
        self.both({"do": "part"}, {"do": "part"})

    def copies(self, repeat: int) -> None:
        handles = self.tell(do="handles")["handles"]
        self.ask(do="wipe")
        first = self.ask(do="copy", handles=handles, repeat=1)
        self.check()
        timed, keeps = self.kept(lambda: self.ask(do="copy", handles=handles, repeat=repeat))
        opening = {"open_s": first["open_s"], "first_s": first["seconds"][0], "handles": float(first["handles"])}
        self.row("cuda_ipc, copies alone", timed["seconds"], keeps=keeps, **opening)
        self.ask(do="close_handles")

    def fetches(self, name: str, settings: dict[str, Any], repeat: int, *, calls: int = 3) -> None:
        """Whole calls, each of a node of its own, and transfers of a node that stays."""
        whole, opened = list[float](), list[float]()
        for number in range(calls):
            self.ask(do="wipe")
            own = settings | {"name": f"newcomer{self.load[:2]}{number}"}
            timed = self.ask(do="fetch", settings=own)
            self.check()
            whole += timed["seconds"]
            opened += timed["open_s"]
        if calls:
            self.row(f"fetch, {name}, call", whole, open_s=statistics.median(opened))
        self.ask(do="stay", settings=settings)
        self.ask(do="fetch", settings=settings, repeat=2)
        timed, keeps = self.kept(lambda: self.ask(do="fetch", settings=settings, repeat=repeat))
        self.row(f"fetch, {name}, transfer", timed["transfer_s"], keeps=keeps)
        self.row(f"fetch, {name}, call of a linked node", timed["seconds"], keeps=keeps)
        self.ask(do="leave")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--devices", type=int, nargs=2, default=[0, 1])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--limit", default="40GB/s", help="upload_limit of one row over nccl")
    parser.add_argument("--hosts", action="store_true", help="both on one GPU: each passes for a host of its own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        workers = [
            Child(
                [sys.executable, str(ROOT / "bench" / "gpu_workers.py"), str(device), str(options.layers)],
                cwd=Path(place),
                environment=clean_environment(Path(place))
                | ({"NCCL_HOSTID": f"host{n}", "NCCL_SOCKET_IFNAME": "lo"} if options.hosts else {}),
            )
            for n, device in enumerate(options.devices)
        ]
        try:
            bench = Bench(*workers)
            measure(bench, options.repeat, options.limit)
        finally:
            for worker in workers:
                worker.kill()
    if options.json:
        options.json.write_text(json.dumps({"host": host(), "rows": bench.rows}, indent=1))


def measure(bench: Bench, repeat: int, limit: str) -> None:
    for child in (bench.source, bench.newcomer):
        child.told(timeout_s=TIMEOUT_S)
    made, _ = bench.both({"do": "make", "random": True}, {"do": "make", "random": False})
    bench.bytes = made["bytes"]
    print(f"# python {' '.join(sys.argv)}\n{made['gpu']}, torch {made['torch']}, NCCL {made['nccl']}, ", end="")
    print(f"{made['tensors']} tensors, {bench.bytes / 1e9:.2f} GB")
    served = bench.tell(do="serve", settings={"transports": "nccl", "name": "source"})
    print(f"served, hashed and all, in {served['seconds']:.2f} s; extra memory {served['extra_mb']:.0f} MB")
    peers = [served["address"]]
    ipc, nccl = {"peers": peers}, {"peers": peers, "transports": "nccl"}
    first = bench.ask(do="extra", command="fetch", settings=ipc | {"name": "first"})
    print(f"the first fetch, which compiles the kernels: {first['seconds'][0]:.2f} s; ", end="")
    print(f"extra memory {first['extra_mb']:.0f} MB at the newcomer")
    before = bench.tell(do="memory")["free_mb"]
    for name, settings in (("cuda_ipc", ipc), ("nccl", nccl)):
        answer = bench.ask(do="extra", command="fetch", settings=settings | {"name": "looked-at"})
        print(f"extra memory of a fetch over {name}: {answer['extra_mb']:.0f} MB at the newcomer", end=", ")
        bench.ask(do="stay", settings=settings)
        bench.ask(do="fetch", settings=settings)
        print(
            f"{before - bench.tell(do='memory')['free_mb']:.0f} MB at the source while the session stands", flush=True
        )
        bench.ask(do="leave")
    print(f"{'source is':>18} {'':<34} {'median ms':>9} {'least ms':>9} {'GB/s':>8} {'keeps':>7}")
    for load in LOADS:
        bench.under(load)
        bench.origin(repeat)
        bench.copies(repeat)
        bench.fetches("cuda_ipc", ipc, repeat)
        bench.fetches("nccl", nccl, repeat)
        if load != "idle":
            slow = bench.tell(do="serve", settings={"transports": "nccl", "name": "slow", "upload_limit": limit})
            given = nccl | {"peers": [slow["address"]]}
            bench.fetches(f"nccl, {limit}", given, max(1, repeat // 3), calls=0)
    for what in ("transfer", "call"):
        for name, ceiling in (("cuda_ipc", "cuda_ipc, copies alone"), ("nccl", "nccl, calls alone")):
            for load in LOADS:
                rates = {row["what"]: row["gb_per_s"] for row in bench.rows if row["load"] == load}
                mine = rates[f"fetch, {name}, {what}"]
                print(f"{name} {what}, {load}: {mine / rates[ceiling]:.2f} of its ceiling, ", end="")
                print(f"{mine / rates['origin, broadcasts alone']:.1f} times the origin's broadcasts, ", end="")
                print(f"{mine / rates['origin, whole']:.1f} times the origin as a whole")


if __name__ == "__main__":
    main()
