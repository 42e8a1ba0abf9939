"""What pins cost: a pinned fetch beside an unpinned one, and the building of manifests beside plain reading.

    python bench/pins.py [--mib 512] [--repeat 7] [--dir DIR] [--out FILE]

One seed process serves over TCP; this process fetches into the same existing tensors, pinned and unpinned in turn. Then
the same files are read, hashed in each way, and made a manifest of, from the page cache and, after POSIX_FADV_DONTNEED,
from the disk, in turn again.

Each row has the median and the range of GB/s by the wall clock and of processor seconds a GB, of all threads (of both
ends for fetches). On a machine that other programs use too, only the processor seconds say something.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import children
import models
from children import Child

import swarm
from swarm.checkpoint import manifest_builder
from swarm.content.manifest import HashScheme
from swarm.hashing.cpu import ChunkHasher
from swarm.settings import Settings

READY_TIMEOUT_S = 120.0
PART_BYTES = manifest_builder.SCRATCH_BYTES
CHUNK_BYTES = 4 << 20

Way = Callable[[Path], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="size of the model")
    parser.add_argument("--repeat", type=int, default=7, help="rounds; every way runs once in each")
    parser.add_argument("--dir", type=Path, help="where the model is made; by default a temporary directory")
    parser.add_argument("--out", type=Path, help="JSON file for the raw numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swarm-bench-") as own:
        place = options.dir or Path(own)
        place.mkdir(parents=True, exist_ok=True)
        model = models.model(place.absolute(), options.mib << 20)
        report: dict[str, Any] = {
            "host": children.host(),
            "command": ["bench/pins.py", *sys.argv[1:]],
            "load_before": os.getloadavg(),
            "rows": {**_fetches(model, Path(own), options.repeat), **_readings(model, Path(own), options.repeat)},
            "load_after": os.getloadavg(),
        }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"load {report['load_before'][0]:.1f} before, {report['load_after'][0]:.1f} after")
    return 0


def _fetches(model: Path, own: Path, repeat: int) -> dict[str, list[tuple[float, float]]]:
    """GB/s and processor seconds a GB, by way."""
    command = children.swarm("serve", str(model), "--model-id", "org/model", "--no-mdns")
    with Child(command, cwd=own, environment=children.clean_environment(own, SWARM_CACHE=str(own / "seed"))) as seed:
        line = seed.line(READY_TIMEOUT_S)
        address, digest = line.split()[0], line.rpartition("digest ")[2].strip()
        settings = Settings(peers=(address,), mdns=False, cache=own / "newcomer", origin="none")
        with swarm.fetch("org/model", settings=settings) as weights:
            into = {name: tensor.clone() for name, tensor in weights.items()}
        rows: dict[str, list[tuple[float, float]]] = {"fetch": [], "fetch, pinned by its digest": []}
        for _ in range(repeat):
            for row, pin in zip(rows, (None, digest), strict=True):
                cpu_s, began = time.process_time() + seed.cpu_s(), time.perf_counter()
                with swarm.fetch("org/model", into=into, digest=pin, settings=settings) as weights:
                    seconds = time.perf_counter() - began
                    size = weights.fetched.bytes
                rows[row].append(_rates(size, seconds, time.process_time() + seed.cpu_s() - cpu_s))
    return _shown(rows)


def _readings(model: Path, own: Path, repeat: int) -> dict[str, list[tuple[float, float]]]:
    ways: dict[str, Way] = {
        "read": lambda path: _read(path, lambda: None),
        "read, XXH3": lambda path: _read(path, lambda: ChunkHasher(HashScheme())),
        "read, XXH3 and BLAKE3": lambda path: _read(path, lambda: ChunkHasher(HashScheme(), blake3=True)),
        "manifest": _build,
    }
    size = models.size_of(model)
    rows: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeat):
        for where in ("page cache", "disk"):
            for way, work in ways.items():
                if where == "disk":
                    _drop(model)
                else:
                    models.warm(model)
                cpu_s, began = time.process_time(), time.perf_counter()
                work(model)
                seconds = time.perf_counter() - began
                rows.setdefault(f"{where}: {way}", []).append(_rates(size, seconds, time.process_time() - cpu_s))
    return _shown(rows)


def _read(path: Path, make: Callable[[], ChunkHasher | None]) -> None:
    """Reads all files by as many threads as there are cores, each a run of chunks at a time."""

    def part(job: tuple[Path, int]) -> None:
        file, start = job
        buffer, fd = memoryview(bytearray(PART_BYTES)), os.open(file, os.O_RDONLY)
        for chunk in range(start, start + manifest_builder.JOB_BYTES, CHUNK_BYTES):
            hasher = make()
            for offset in range(chunk, chunk + CHUNK_BYTES, PART_BYTES):
                got = os.preadv(fd, [buffer], offset)
                if hasher is not None:
                    hasher.update(buffer[:got])
            if hasher is not None:
                hasher.digests()
        os.close(fd)

    files = sorted(path.iterdir())
    jobs = [(file, at) for file in files for at in range(0, file.stat().st_size, manifest_builder.JOB_BYTES)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(part, jobs))


def _build(path: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        manifest_builder.checkpoint(path, cache_dir=Path(cache))[1].close()


def _drop(path: Path) -> None:
    for file in path.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _rates(size: int, seconds: float, cpu_s: float) -> tuple[float, float]:
    return size / seconds / 1e9, cpu_s / (size / 1e9)


def _shown(rows: dict[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    for row, samples in rows.items():
        rate, cost = ([sample[place] for sample in samples] for place in (0, 1))
        print(
            f"{row:34} {statistics.median(rate):6.2f} GB/s ({min(rate):.2f} to {max(rate):.2f}), "
            f"{statistics.median(cost):6.3f} CPU s/GB ({min(cost):.3f} to {max(cost):.3f})",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
