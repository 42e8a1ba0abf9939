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
    assert done.stdout.splitlines() == ["aligned at 0: []", "any at 0: []", "any at 1: []", "any at 7: []"]


def wrong_sizes(*, aligned: bool, start: int) -> list[int]:
    """Sizes of the inputs that are not hashed as they should."""
    from swarm.hashing import kernels

    sizes = [size for size in SIZES if not aligned or size % 16 == 0]
    memory = [np.random.default_rng(size).integers(0, 256, size + 32, np.uint8) for size in sizes]
    inputs = [
        held[begin : begin + size]
        for held, size in zip(memory, sizes, strict=True)
        for begin in [-held.ctypes.data % 16 + start]
    ]
    addresses = torch.tensor([held.ctypes.data for held in inputs])
    lengths, words = torch.tensor(sizes), torch.tensor(kernels.keys())
    accumulators, out = (torch.zeros(len(sizes), n, dtype=torch.int64) for n in (8, 2))
    most = (max(sizes) - 1) // 1024
    grid = (-(-len(sizes) // kernels.ROWS),)
    kernels.accumulate[grid](
        addresses, lengths, words, accumulators, len(sizes), most, ROWS=kernels.ROWS, ALIGNED=aligned
    )
    kernels.merge[1,](accumulators, lengths, words, out, len(sizes), ROWS=kernels.MERGED)
    return [
        len(held)
        for held, digest in zip(inputs, out.numpy(), strict=True)
        if digest.byteswap().tobytes() != xxhash.xxh3_128_digest(held.tobytes())
    ]


if __name__ == "__main__":
    print("aligned at 0:", wrong_sizes(aligned=True, start=0))
    for start in (0, 1, 7):
        print(f"any at {start}:", wrong_sizes(aligned=False, start=start))
