"""Does the kernels' arithmetic give the library's digests? Run by triton's interpreter, on the CPU.

Whether the compiler agrees, tests/gpu/test_hashing.py asks a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import xxhash

# Around 240 bytes, words, stripes of 64, blocks of 1024.
SIZES = [241, 249, 255, 256, 257, 320, 321, 511, 1023, 1024, 1025, 1088, 1089, 2047, 2048, 2049, 3072]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_is_every_length_class_hashed_as_the_library_does() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # which counts when triton is imported
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    said = ["aligned at 0: []", "any at 0: []", "any at 1: []", "any at 7: []", "gathered wrong: []"]
    assert done.stdout.splitlines() == said


def wrong_sizes(*, aligned: bool, start: int) -> list[int]:
    """Sizes of the inputs that are not hashed as they should."""
    from swarm.hashing import kernels

    sizes = [size for size in SIZES if not aligned or size % 16 == 0]
    memory = [
        np.random.default_rng(size).integers(0, 256, size * (1 + number % 3) + 32, np.uint8)
        for number, size in enumerate(sizes)
    ]
    runs = [held[begin : begin + held.size - 32] for held in memory for begin in [-held.ctypes.data % 16 + start]]
    counts = [run.size // size for run, size in zip(runs, sizes, strict=True)]
    before = np.cumsum([0, *counts])
    rows = [(run.ctypes.data, *rest) for run, *rest in zip(runs, sizes, counts, before[:-1], strict=True)]
    table, words = torch.tensor(rows), torch.tensor(kernels.keys())
    count, most = int(before[-1]), (max(sizes) - 1) // 1024
    out = torch.zeros(count, 2, dtype=torch.int64)
    kernels.digest[-(-count // kernels.ROWS),](
        table, len(rows), len(rows).bit_length(), words, out, count, most, ROWS=kernels.ROWS, ALIGNED=aligned
    )
    inputs = [run[at : at + size] for run, size in zip(runs, sizes, strict=True) for at in range(0, run.size, size)]
    return [
        held.size
        for held, digest in zip(inputs, out.numpy(), strict=True)
        if digest.tobytes() != xxhash.xxh3_128_digest(held.tobytes())
    ]


def gathered_wrong() -> list[int]:
    """Sizes of the pieces that are not copied as they should."""
    from swarm.hashing import kernels

    sizes = [1, 7, kernels.GATHERED_BYTES, 2 * kernels.GATHERED_BYTES + 1]
    source = np.random.default_rng(1).integers(1, 256, sum(sizes), np.uint8)
    target = np.zeros(sum(sizes) + len(sizes), np.uint8)  # with a byte between any two that none may write
    starts = np.cumsum([0, *sizes])[:-1].tolist()
    pieces = [
        (target.ctypes.data + at + number, source.ctypes.data + at, size)
        for number, (at, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    kernels.gather[len(pieces),](torch.tensor(pieces), GATHERED_BYTES=kernels.GATHERED_BYTES)
    return [
        size
        for number, (at, size) in enumerate(zip(starts, sizes, strict=True))
        if target[at + number : at + number + size + 1].tolist() != [*source[at : at + size], 0]
    ]


if __name__ == "__main__":
    print("aligned at 0:", wrong_sizes(aligned=True, start=0))
    for start in (0, 1, 7):
        print(f"any at {start}:", wrong_sizes(aligned=False, start=start))
    print("gathered wrong:", gathered_wrong())
