"""The hash kernels of NVIDIA GPUs: xxh3.cu, compiled ahead of time, loaded and launched by the driver.

xxh3.fatbin holds machine code for compute capabilities 8.x, 9.0, 10.0 and 12.x, and PTX that the driver compiles for
every other from 7.5 on. So a process compiles nothing, and a first launch takes milliseconds. To compile xxh3.cu after
a change (the unit tests compare the result with the shipped file where nvcc is of the same release):

    python -m swarm.hashing.kernels

Must not know: chunks, leaves, torch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import subprocess
from pathlib import Path

from swarm.store import cuda

IMAGE = "xxh3.fatbin"
SOURCE = "xxh3.cu"
NVCC_RELEASE = "13.0"
TARGETS = (
    "arch=compute_75,code=compute_75",
    *(f"arch=compute_{capability},code=sm_{capability}" for capability in (80, 90, 100, 120)),
)

THREADS = 128  # of a block, as in xxh3.cu
THREADS_PER_INPUT = 4
RUN_WORDS, PIECE_WORDS = 4, 3  # of 8 bytes, as in xxh3.cu: address, size, count, before; target, source, size


class Kernels:
    """The kernels on one GPU. All addresses are of device memory or of pinned memory; any thread may launch."""

    def __init__(self, device: int) -> None:
        self._gpu = cuda.gpu(device)
        module = self._gpu.load(importlib.resources.files(__package__).joinpath(IMAGE).read_bytes())
        self._any = self._gpu.function(module, "xxh3_128")
        self._aligned = self._gpu.function(module, "xxh3_128_aligned")
        self._gather = self._gpu.function(module, "gather")

    def digest(self, runs: int, run_count: int, digests: int, count: int, *, aligned: bool, stream: int) -> None:
        """Enqueues the XXH3-128 digests of `count` inputs, each longer than 240 bytes: 16 bytes apiece at `digests`.

        `runs` is the address of `run_count` rows of RUN_WORDS. `aligned`: all addresses and sizes are multiples of 16.
        Raises CudaError.
        """
        arguments = ctypes.c_int64(runs), ctypes.c_int(run_count), ctypes.c_int64(digests), ctypes.c_int64(count)
        blocks = -(-count * THREADS_PER_INPUT // THREADS)
        self._gpu.launch(self._aligned if aligned else self._any, blocks, THREADS, arguments, stream=stream)

    def gather(self, pieces: int, count: int, *, stream: int) -> None:
        """Enqueues copies: `pieces` is the address of `count` rows of PIECE_WORDS. Raises CudaError."""
        self._gpu.launch(self._gather, count, THREADS, (ctypes.c_int64(pieces),), stream=stream)


@functools.cache
def kernels(device: int) -> Kernels:
    """The kernels on a GPU, loaded on first use, which may wait until the GPU is idle. Raises CudaError."""
    return Kernels(device)


def build(source: Path, image: Path) -> None:
    """Compiles `source` to `image`. Raises CalledProcessError, and FileNotFoundError where nvcc is missing."""
    command = ["nvcc", "-fatbin", "-O3", "--std=c++17", "--compress-mode=size"]
    command += [f"-gencode={target}" for target in TARGETS]
    subprocess.run([*command, "-o", str(image.absolute()), source.name], cwd=source.parent, check=True)  # noqa: S603


if __name__ == "__main__":
    here = Path(__file__).parent
    build(here / SOURCE, here / IMAGE)
