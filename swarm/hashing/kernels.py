"""The hash kernels of NVIDIA GPUs: xxh3.cu and blake3.cu, compiled ahead of time, loaded and launched by the driver.

A `.fatbin` holds machine code for compute capabilities 8.x, 9.0, 10.0 and 12.x, and PTX that the driver compiles for
every other from 7.5 on. So a process compiles nothing, and a first launch takes milliseconds. To compile the sources
after a change (the unit tests compare the result with the shipped files where nvcc is of the same release):

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

SOURCES = ("xxh3.cu", "blake3.cu")
NVCC_RELEASE = "13.0"
TARGETS = (
    "arch=compute_75,code=compute_75",
    *(f"arch=compute_{capability},code=sm_{capability}" for capability in (80, 90, 100, 120)),
)

THREADS = 128  # of a thread block, as in both sources
THREADS_PER_INPUT = 4
# Rows of words of 8 bytes, as in xxh3.cu: address, size, count, before; target, source, size.
RUN_WORDS, PIECE_WORDS = 4, 3
# As in blake3.cu: address, size, before, counter, total; first, count.
ROW_WORDS, GROUPS_WORDS = 5, 2
BLAKE3_BLOCK_BYTES, BLAKE3_VALUE_BYTES = 1024, 32
GROUP_BLOCKS = THREADS


class Kernels:
    """The kernels on one GPU. All addresses are of device memory or of pinned memory; any thread may launch."""

    def __init__(self, device: int) -> None:
        self._gpu = cuda.gpu(device)
        folder = importlib.resources.files(__package__)
        xxh3, blake3 = (self._gpu.load(folder.joinpath(image_of(source)).read_bytes()) for source in SOURCES)
        self._any = self._gpu.function(xxh3, "xxh3_128")
        self._aligned = self._gpu.function(xxh3, "xxh3_128_aligned")
        self._gather = self._gpu.function(xxh3, "gather")
        self._groups = self._gpu.function(blake3, "blake3_groups")
        self._groups_aligned = self._gpu.function(blake3, "blake3_groups_aligned")
        self._chunks = self._gpu.function(blake3, "blake3_chunks")

    def xxh3(self, runs: int, run_count: int, digests: int, count: int, *, aligned: bool, stream: int) -> None:
        """Enqueues the XXH3-128 digests of `count` inputs, each longer than 240 bytes: 16 bytes apiece at `digests`.

        `runs` is the address of `run_count` rows of RUN_WORDS. `aligned`: all addresses and sizes are multiples of 16.
        Raises CudaError.
        """
        arguments = ctypes.c_int64(runs), ctypes.c_int(run_count), ctypes.c_int64(digests), ctypes.c_int64(count)
        blocks = -(-count * THREADS_PER_INPUT // THREADS)
        self._gpu.launch(self._aligned if aligned else self._any, blocks, THREADS, arguments, stream=stream)

    def blake3_groups(self, rows: int, row_count: int, values: int, groups: int, *, aligned: bool, stream: int) -> None:
        """Enqueues the BLAKE3 values of `groups` groups of GROUP_BLOCKS blocks: BLAKE3_VALUE_BYTES apiece at `values`.

        `rows` is the address of `row_count` rows of ROW_WORDS. `aligned`: all addresses are multiples of 16. Raises
        CudaError.
        """
        arguments = ctypes.c_int64(rows), ctypes.c_int(row_count), ctypes.c_int64(values)
        self._gpu.launch(self._groups_aligned if aligned else self._groups, groups, THREADS, arguments, stream=stream)

    def blake3_chunks(self, chunks: int, count: int, values: int, digests: int, *, stream: int) -> None:
        """Enqueues the BLAKE3 digests of `count` chunks, from the values of their groups. Raises CudaError.

        `chunks` is the address of `count` rows of GROUPS_WORDS. A chunk has at most 512 groups.
        """
        arguments = ctypes.c_int64(chunks), ctypes.c_int64(values), ctypes.c_int64(digests)
        self._gpu.launch(self._chunks, count, THREADS, arguments, stream=stream)

    def gather(self, pieces: int, count: int, *, stream: int) -> None:
        """Enqueues copies: `pieces` is the address of `count` rows of PIECE_WORDS. Raises CudaError."""
        self._gpu.launch(self._gather, count, THREADS, (ctypes.c_int64(pieces),), stream=stream)


@functools.cache
def kernels(device: int) -> Kernels:
    """The kernels on a GPU, loaded on first use, which may wait until the GPU is idle. Raises CudaError."""
    return Kernels(device)


def image_of(source: str) -> str:
    """The name of the file that a source is compiled to."""
    return source.removesuffix(".cu") + ".fatbin"


def build(source: Path, image: Path) -> None:
    """Compiles `source` to `image`. Raises CalledProcessError, and FileNotFoundError where nvcc is missing."""
    command = ["nvcc", "-fatbin", "-O3", "--std=c++17", "--compress-mode=size"]
    command += [f"-gencode={target}" for target in TARGETS]
    subprocess.run([*command, "-o", str(image.absolute()), source.name], cwd=source.parent, check=True)  # noqa: S603


if __name__ == "__main__":
    here = Path(__file__).parent
    for name in SOURCES:
        build(here / name, here / image_of(name))
