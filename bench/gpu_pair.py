"""A source and a newcomer with tensors in GPU memory: the driver's copy as the ceiling, `swarm.fetch`, and the cost of
both for a source that computes.

    python -m bench.gpu_pair [--gigabytes 8] [--repeat 3]

Two processes; on a machine with a single GPU both share it, so that a copy reads and writes the same memory and the
source's kernels and the newcomer's take turns: rates between two GPUs and the disturbance there are other numbers.
Tensors have the shapes of Qwen2.5-7B's layers, in bf16. 'raw' opens every handle and copies every tensor, no more;
'fetch' is the call into given tensors, from a warm process, with connection, handles, verification; 'transfer' is its
part that fetches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import swarm
from swarm.settings import Settings
from swarm.store import cuda

MODEL = "bench/pair"
LAYER = [
    *[(3584, 3584), (512, 3584), (512, 3584), (3584, 3584)],
    *[(18944, 3584), (18944, 3584), (3584, 18944), (3584,), (3584,)],
]
LAYER_BYTES = 2 * sum(torch.Size(shape).numel() for shape in LAYER)


def shapes(gigabytes: float) -> list[tuple[int, ...]]:
    return LAYER * max(1, round(gigabytes * 1e9 / LAYER_BYTES))


class Load(threading.Thread):
    """Products back to back on the source's GPU, counted."""

    def __init__(self, rows: int) -> None:
        super().__init__(daemon=True)
        self._left = torch.randn(rows, 8192, device="cuda", dtype=torch.bfloat16)
        self._right = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self._over = threading.Event()
        self.products = 0
        self.start()

    def run(self) -> None:
        ahead: list[torch.cuda.Event] = []
        while not self._over.is_set():
            for _ in range(4 if self._left.shape[0] > 100 else 64):
                torch.mm(self._left, self._right)
                self.products += 1
            ahead.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
            ahead[-1].record()
            if len(ahead) > 2:
                ahead.pop(0).synchronize()

    def end(self) -> None:
        self._over.set()
        self.join()


def source(gigabytes: float) -> None:
    """Serves, and obeys lines: a load's rows, 'products', 'handles'."""
    tensors = {f"w{n:04}": torch.randn(s, device="cuda").to(torch.bfloat16) for n, s in enumerate(shapes(gigabytes))}
    torch.cuda.empty_cache()
    began = time.perf_counter()
    with swarm.serve(tensors, model_id=MODEL, settings=Settings(mdns=False)) as served:
        load: Load | None = None
        answer: Any = {"address": served.address, "serve_s": time.perf_counter() - began}
        print(json.dumps(answer), flush=True)
        gpu = cuda.gpu(0)
        for line in sys.stdin:
            word = line.strip()
            if word == "handles":
                answer = []
                for tensor in tensors.values():
                    start, _, _ = gpu.allocation(tensor.data_ptr())
                    answer.append((gpu.export(start).hex(), tensor.data_ptr() - start))
            elif word == "products":
                answer = [load.products if load else 0, time.perf_counter()]
            else:
                if load:
                    load.end()
                load = Load(int(word)) if int(word) else None
                answer = None
            print(json.dumps(answer), flush=True)
        if load:
            load.end()


class Child:
    def __init__(self, gigabytes: float) -> None:
        command = [sys.executable, "-m", "bench.gpu_pair", "--source", "--gigabytes", str(gigabytes)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.started = self.read()

    def read(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def ask(self, word: str) -> Any:
        assert self._process.stdin
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        return self.read()

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


def raw(child: Child, targets: list[torch.Tensor]) -> tuple[float, float]:
    """Seconds to open the handles, and to copy."""
    handles = child.ask("handles")
    gpu, opened = cuda.gpu(0), dict[str, int]()
    began = time.perf_counter()
    for handle, _ in handles:
        opened[handle] = opened.get(handle) or gpu.open(bytes.fromhex(handle))
    opened_at = time.perf_counter()
    stream = gpu.side.cuda_stream
    for (handle, offset), target in zip(handles, targets, strict=True):
        gpu.copy(target.data_ptr(), opened[handle] + offset, target.nbytes, stream=stream)
    gpu.side.synchronize()
    copied_at = time.perf_counter()
    for start in opened.values():
        gpu.close(start)
    return opened_at - began, copied_at - opened_at


def products_per_s(child: Child, begin: list[float]) -> float:
    products, now = child.ask("products")
    return float((products - begin[0]) / (now - begin[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--source", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.source:
        source(options.gigabytes)
        return
    child = Child(options.gigabytes)
    wanted = shapes(options.gigabytes)
    targets = {f"w{n:04}": torch.empty(s, device="cuda", dtype=torch.bfloat16) for n, s in enumerate(wanted)}
    total = sum(target.nbytes for target in targets.values())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {len(targets)} tensors, {total / 1e9:.1f} GB")
    print(f"served, hashed and all, in {child.started['serve_s']:.2f} s")
    settings = Settings(mdns=False, peers=(child.started["address"],))
    rows = []
    print(f"{'source is':>20} {'':>10} {'open ms':>8} {'ms':>8} {'GB/s':>8} {'source keeps':>13} {'extra MB':>9}")
    for name, load in (("idle", 0), ("8192^3 products", 8192), ("16-row products", 16)):
        child.ask(str(load))
        begin = child.ask("products")
        time.sleep(1.0)
        alone = products_per_s(child, begin) if load else 0.0
        for attempt in range(options.repeat):
            for what in ("raw", "fetch"):
                for target in targets.values():
                    target.zero_()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                begin, opening, transfer = child.ask("products"), 0.0, 0.0
                began = time.perf_counter()
                if what == "raw":
                    opening, seconds = raw(child, list(targets.values()))
                else:
                    with swarm.fetch(MODEL, into=targets, settings=settings, timeout_s=60) as weights:
                        seconds, transfer = time.perf_counter() - began, weights.fetched.seconds
                kept = products_per_s(child, begin) / alone if load else 1.0
                extra = (torch.cuda.max_memory_allocated() - before) / 1e6
                rate = total / seconds / 1e9
                row = {"load": name, "what": what, "attempt": attempt, "open_s": opening, "seconds": seconds}
                row |= {"transfer_s": transfer, "gb_per_s": rate, "source_keeps": kept, "extra_mb": extra}
                rows.append(row)
                timed = f"{opening * 1e3:8.0f} {seconds * 1e3:8.0f} {rate:8.0f}"
                print(f"{name:>20} {what:>10} {timed} {kept:13.2f} {extra:9.0f}", flush=True)
                if transfer:
                    print(f"{'':>20} {'transfer':>10} {'':>8} {transfer * 1e3:8.0f} {total / transfer / 1e9:8.0f}")
    child.end()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
