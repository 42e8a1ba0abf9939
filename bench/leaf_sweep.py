"""How fast `ChunkHasher` is with leaves of 4 KiB to 4 MiB, hot and cold, on a single thread and on two at once.

    python bench/leaf_sweep.py [--mib 512] [--repeat 5]

Hot: the same 1 MiB view again and again, as a transport hashes a view that it has just received. Cold: through memory
that no cache holds, as a seed hashes a model. xxhash releases the GIL only above 65,536 bytes, so below that two
threads are no faster than a single thread; and leaves longer than a view go through the streaming hasher. GB/s, the
best run: disturbances only make a run slower.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable

import children
import numpy as np

from swarm.content.manifest import HashScheme
from swarm.hashing.cpu import ChunkHasher

VIEW_BYTES = 1 << 20
LEAVES = [4 << 10, 16 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 4 << 20]
THREADS = 2
HOT_VIEWS = 4096  # about 0.1 s: far longer than threads take to start and to hand the GIL over


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=512, help="bytes that each thread hashes; more than any cache holds")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    for name, value in children.host().items():
        print(f"{name}: {value}")
    rng = np.random.Generator(np.random.SFC64(1))
    cold = [_views(rng.bytes(options.mib << 20)) for _ in range(THREADS)]
    hot = [[views[0]] * HOT_VIEWS for views in cold]
    print(f"\n{'leaf':>10}{'hot, 1':>10}{'hot, 2':>10}{'cold, 1':>10}{'cold, 2':>10}   GB/s")
    for leaf_bytes in LEAVES:
        row = [
            max(_rate(leaf_bytes, views[:threads]) for _ in range(options.repeat))
            for views in (hot, cold)
            for threads in (1, THREADS)
        ]
        print(f"{leaf_bytes >> 10:>6} KiB" + "".join(f"{rate:>10.1f}" for rate in row), flush=True)


def _views(data: bytes) -> list[memoryview]:
    whole = memoryview(data)
    return [whole[start : start + VIEW_BYTES] for start in range(0, len(whole), VIEW_BYTES)]


def _rate(leaf_bytes: int, work: list[list[memoryview]]) -> float:
    """GB/s of all threads together, each with its own views."""
    start = threading.Barrier(len(work) + 1)
    threads = [threading.Thread(target=_hasher(leaf_bytes, views, start)) for views in work]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(VIEW_BYTES * len(views) for views in work) / (time.perf_counter() - began) / 1e9


def _hasher(leaf_bytes: int, views: list[memoryview], start: threading.Barrier) -> Callable[[], None]:
    def work() -> None:
        hasher = ChunkHasher(HashScheme(leaf_bytes=leaf_bytes))
        start.wait()
        for view in views:
            hasher.update(view)
        hasher.digests()

    return work


if __name__ == "__main__":
    main()
