"""Time of a newcomer's only fetch: fresh processes with empty caches, GPU to GPU.

    python bench/gpu_cold.py [--source 0] [--newcomer 1] [--layers 28] [--rounds 5] [--transport cuda_ipc nccl]

Each round starts a process whose caches (swarm's, CUDA's, triton's) are new folders. It imports torch, then swarm, and
calls `swarm.fetch` twice: the first call is cold, the second (into new tensors, from the same process) is warm. The
tensors have the shapes of Qwen2.5-7B in bf16; all 28 layers are 15.2 GB. With --newcomer equal to --source both
processes share one GPU: the set-up is the same, the copy runs at the speed of its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PHASES = (
    "python", "import torch", "import swarm", "GPU's context", "node and link", "resolved", "first request",
    "first grant", "first chunk", "last chunk", "returned",
)  # fmt: skip


def main() -> None:
    if sys.argv[1] in ("serve", "fetch"):
        json.dump({"serve": serve, "fetch": fetch}[sys.argv[1]](json.loads(sys.argv[2])), sys.stdout)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=int, default=0, metavar="GPU")
    parser.add_argument("--newcomer", type=int, default=1, metavar="GPU")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transport", nargs="+", default=["cuda_ipc", "nccl"], choices=["cuda_ipc", "nccl", "tcp"])
    options = parser.parse_args()
    print(f"{platform.node()}, {os.cpu_count()} cores; {' '.join(sys.argv)}")
    for transport in options.transport:
        measure(transport, options)


def measure(transport: str, options: argparse.Namespace) -> None:
    """A source in a fresh process, then newcomers in fresh processes, in sequence."""
    given = {"transport": transport, "layers": options.layers}
    with tempfile.TemporaryDirectory() as place:
        source = start("serve", given | {"gpu": options.source}, Path(place, "source"))
        assert source.stdout is not None
        served = json.loads(source.stdout.readline())
        size = served["bytes"] / 1e9
        print(f"\n{transport}: {size:.1f} GB in {served['tensors']} tensors, {served['gpu']}")
        print(f"  a fresh process serves them (hashed, announced) in {served['serve_s']:.2f} s")
        rounds = []
        for number in range(options.rounds):
            given |= {"gpu": options.newcomer, "peer": served["address"], "began_at": time.time()}
            newcomer = start("fetch", given, Path(place, str(number)))
            said, _ = newcomer.communicate(timeout=300)
            rounds.append(json.loads(said.splitlines()[-1]))
            assert rounds[-1]["checksum"] == served["checksum"], "wrong bytes"
        source.communicate("\n", timeout=60)
    show(rounds, size)


def show(rounds: list[dict[str, Any]], size: float) -> None:
    print(f"  {'':<34}{'median':>8}  range, s")
    for name in ("call to return, cold", "  transfer, cold", "process start to tensors", "call to return, warm"):
        told = sorted(one["seconds"][name.strip()] for one in rounds)
        rate = f", {size / statistics.median(told):.0f} GB/s" if "transfer" in name else ""
        print(f"  {name:<34}{statistics.median(told):8.3f}  {told[0]:.3f} to {told[-1]:.3f}{rate}")
    print("  from process start, median of each:")
    for phase in PHASES:
        print(f"    {phase:<32}{statistics.median(one['phases'][phase] for one in rounds):8.3f}")


def start(kind: str, given: dict[str, Any], place: Path) -> subprocess.Popen[str]:
    """A process that finds no cache of anything."""
    caches = {name: str(place / name) for name in ("SWARM_CACHE", "CUDA_CACHE_PATH", "TRITON_CACHE_DIR")}
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, __file__, kind, json.dumps(given)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **caches, "PYTHONPATH": paths},
    )  # fmt: skip


def settings(given: dict[str, Any]) -> Any:
    from swarm.settings import Settings

    if given["transport"] != "cuda_ipc":  # as between hosts: the boot id of another machine
        from swarm.transport import cuda_ipc

        cuda_ipc.machine_id = lambda: str(os.getpid())
    transports = {"transports": ("nccl",)} if given["transport"] == "nccl" else {}
    peers = {"peers": (given["peer"],)} if "peer" in given else {}
    return Settings.load({"mdns": False, **transports, **peers})


def serve(given: dict[str, Any]) -> dict[str, Any]:
    import torch
    from gpu_workers import MODEL, Worker

    import swarm

    worker = Worker(given["gpu"], given["layers"])
    made = worker.make(random=True)
    began = time.perf_counter()
    with swarm.serve(worker._tensors, model_id=MODEL, settings=settings(given)) as served:
        told = {"serve_s": time.perf_counter() - began, "address": served.address, "gpu": torch.cuda.get_device_name()}
        print(json.dumps(made | told | worker.checksum()), flush=True)
        sys.stdin.readline()
    return {}


def fetch(given: dict[str, Any]) -> dict[str, Any]:
    began_at = given["began_at"]
    phases, seconds = {"python": time.time() - began_at}, dict[str, float]()
    import torch

    phases["import torch"] = time.time() - began_at
    import swarm
    import swarm.api  # modules that `swarm.fetch` loads on first use
    from swarm import journal
    from swarm.transfer import download_events as download

    phases["import swarm"] = time.time() - began_at
    torch.zeros(1, device=f"cuda:{given['gpu']}")
    torch.cuda.synchronize()
    phases["GPU's context"] = time.time() - began_at
    marks = {
        journal.Joined: "node and link", journal.Resolved: "resolved", download.Ask: "first request",
        download.Granted: "first grant", journal.Received: "first chunk", download.Complete: "last chunk",
    }  # fmt: skip
    real = journal.Journal.record

    def record(self: journal.Journal, at_s: float, subject: str, event: object) -> None:
        if name := marks.get(type(event)):
            phases.setdefault(name, time.time() - began_at)
        real(self, at_s, subject, event)

    journal.Journal.record = record  # type: ignore[method-assign]
    model, device, how = "bench/qwen2.5-7b", f"cuda:{given['gpu']}", settings(given)
    began = time.perf_counter()
    weights = swarm.fetch(model, device=device, settings=how, timeout_s=120)
    seconds["call to return, cold"] = time.perf_counter() - began
    phases["returned"] = seconds["process start to tensors"] = time.time() - began_at
    seconds["transfer, cold"] = phases["last chunk"] - phases["first request"]
    sums = checksum(weights)
    weights.close()
    del weights
    torch.cuda.empty_cache()
    began = time.perf_counter()
    weights = swarm.fetch(model, device=device, settings=how, timeout_s=120)
    seconds["call to return, warm"] = time.perf_counter() - began
    weights.close()
    return {"phases": phases, "seconds": seconds, "checksum": sums}


def checksum(weights: Any) -> int:
    """As `gpu_workers.Worker.checksum`: in the order of its tensors."""
    import torch
    from gpu_workers import shapes

    total = 0
    names = [name for name in shapes(1000) if name in weights]
    for number, name in enumerate(names, 1):
        words = weights[name].reshape(-1).view(torch.int32)
        total = (total * 31 + number * int(words.sum(dtype=torch.int64))) % (1 << 61)
    return total


if __name__ == "__main__":
    main()
