"""GB/s of the GPU's hashes by batch and leaf size, beside the rate of a copy within the device.

    python -m bench.gpu_hash

A copy reads and writes each byte, a hash only reads it: the copy's bytes count once here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from swarm.content.manifest import HashScheme
from swarm.hashing import cuda as on_gpu
from swarm.hashing import kernels
from swarm.store import DeviceView, cuda

LEAVES = [4 << 10, 16 << 10, 64 << 10, 128 << 10]
BATCHES = [16 << 20, 64 << 20, 256 << 20, 1 << 30, 4 << 30]
CHUNK = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    repeat = parser.parse_args().repeat
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    data = torch.randint(0, 256, (max(BATCHES),), dtype=torch.uint8, device="cuda")
    target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copying = _median_s(lambda: target.copy_(data[: 1 << 30]), repeat)
    print(f"copy within the device: {(1 << 30) / copying / 1e9:.0f} GB/s of 1 GiB (by events)")
    for name, rate in (("the kernel alone, by events", _kernel), ("start and collect, by the host's clock", _whole)):
        print(f"\n{name}, GB/s\n{'leaf':>10}" + "".join(f"{size >> 20:>9} MiB" for size in BATCHES))
        for leaf in LEAVES:
            row = [rate(data[:size], leaf, repeat) for size in BATCHES]
            print(f"{leaf >> 10:>6} KiB" + "".join(f"{value:>13.0f}" for value in row), flush=True)
    print("\nboth XXH3 (leaves of 16 KiB) and BLAKE3, start and collect, GB/s by batch:")
    print("".join(f"{_whole(data[:size], 16 << 10, repeat, blake3=True):>13.0f}" for size in BATCHES))
    print("BLAKE3 alone, its two kernels, by events, GB/s by batch:")
    print("".join(f"{_blake3(data[:size], repeat):>13.0f}" for size in BATCHES))
    print(f"the same from start 1, 256 MiB: {_blake3(data[1 : 1 + (256 << 20)], repeat):.0f} GB/s")
    print("\nunaligned (start 1), the kernel, 16 KiB leaves, 256 MiB:", end=" ")
    print(f"{_kernel(data[1 : 1 + (256 << 20)], 16 << 10, repeat):.0f} GB/s")


def _kernel(data: torch.Tensor, leaf: int, repeat: int) -> float:
    count = data.numel() // leaf
    runs = torch.tensor([data.data_ptr(), leaf, count, 0], dtype=torch.int64, device="cuda")
    out = torch.empty(2 * count, dtype=torch.int64, pin_memory=True)
    aligned = data.data_ptr() % 16 == 0
    loaded, stream = kernels.kernels(0), torch.cuda.current_stream().cuda_stream

    def launch() -> None:
        loaded.xxh3(runs.data_ptr(), 1, out.data_ptr(), count, aligned=aligned, stream=stream)

    return data.numel() / _median_s(launch, repeat) / 1e9


def _blake3(data: torch.Tensor, repeat: int) -> float:
    chunks = max(1, data.numel() // CHUNK)
    size = min(CHUNK, data.numel())
    blocks, groups = size // kernels.BLAKE3_BLOCK_BYTES, size // kernels.BLAKE3_BLOCK_BYTES // kernels.GROUP_BLOCKS
    rows = [(data.data_ptr() + n * CHUNK, size, n * blocks, 0, blocks) for n in range(chunks)]
    table = torch.tensor(rows, dtype=torch.int64, device="cuda")
    spans = torch.tensor([(n * groups, groups) for n in range(chunks)], dtype=torch.int64, device="cuda")
    values = torch.empty(chunks * groups * kernels.BLAKE3_VALUE_BYTES, dtype=torch.uint8, device="cuda")
    out = torch.empty(chunks * kernels.BLAKE3_VALUE_BYTES, dtype=torch.uint8, pin_memory=True)
    aligned = data.data_ptr() % 16 == 0
    loaded, stream = kernels.kernels(0), torch.cuda.current_stream().cuda_stream

    def launch() -> None:
        loaded.blake3_groups(
            table.data_ptr(), chunks, values.data_ptr(), chunks * groups, aligned=aligned, stream=stream
        )
        loaded.blake3_chunks(spans.data_ptr(), chunks, values.data_ptr(), out.data_ptr(), stream=stream)

    return chunks * size / _median_s(launch, repeat) / 1e9


def _whole(data: torch.Tensor, leaf: int, repeat: int, *, blake3: bool = False) -> float:
    cuda.gpu(0)
    chunks = [
        [DeviceView(0, data.data_ptr() + at, min(CHUNK, data.numel() - at), data)]
        for at in range(0, data.numel(), CHUNK)
    ]
    scheme, times = HashScheme(leaf_bytes=leaf), list[float]()
    for _ in range(repeat):
        torch.cuda.synchronize()
        began = time.perf_counter()
        on_gpu.chunk_digests(scheme, chunks, blake3=blake3)
        times.append(time.perf_counter() - began)
    return data.numel() / statistics.median(times) / 1e9


def _median_s(work: Callable[[], object], repeat: int) -> float:
    times: list[float] = []
    for _ in range(repeat + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
