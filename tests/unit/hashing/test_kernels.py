"""Do the kernels compute the library's digests, and is the shipped image compiled from the source beside it?

Here the kernels' arithmetic is compiled for the CPU. Whether GPUs agree, tests/gpu/test_hashing.py asks a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from blake3 import blake3

from swarm.hashing import kernels

FOLDER = Path(str(importlib.resources.files("swarm.hashing")))

# Around 240 bytes, words, stripes of 64, blocks of 1024.
SIZES = [*range(241, 260), 319, 320, 321, 511, 1023, 1024, 1025, 1088, 1089, 2047, 2048, 2049, 3072, 16 << 10, 20001]

# Around compressions of 64, blocks of 1024, groups of 128 blocks.
BLAKE3_SIZES = [1, 3, 63, 64, 65, 127, 129, 1023, 1024, 1025, 1088, 2047, 2048, 2049, 3072, 3073, 5000, 20001, 131073]

XXH3_ON_THE_CPU = """
#include "xxh3.cu"
extern "C" void digest(const unsigned char* input, u64 size, u64* out) {
    Pair totals = {0, 0};
    for (int pair = 0; pair < 4; pair++) {
        Pair part = merged(accumulated<false>(input, size, pair), pair);
        totals.even += part.even, totals.odd += part.odd;
    }
    Pair bytes = finished(totals, size);
    out[0] = bytes.even, out[1] = bytes.odd;
}
"""

BLAKE3_ON_THE_CPU = """
#include "blake3.cu"
#include <vector>
extern "C" void digest(const unsigned char* input, u64 size, u32* out) {
    std::vector<Value> values;
    for (u64 at = 0; at < size; at += BLOCK_BYTES) {
        u32 rest = size - at < BLOCK_BYTES ? size - at : BLOCK_BYTES;
        values.push_back(block_value<false>(input + at, rest, at / BLOCK_BYTES, size <= BLOCK_BYTES));
    }
    while (values.size() > 1) {
        std::vector<Value> above;
        for (u64 n = 0; n + 1 < values.size(); n += 2)
            above.push_back(parent_value(values[n], values[n + 1], values.size() == 2));
        if (values.size() % 2) above.push_back(values.back());
        values = above;
    }
    for (int n = 0; n < WORDS; n++) out[n] = values[0].word[n];
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("program", "sizes", "reference"),
    [
        pytest.param(XXH3_ON_THE_CPU, SIZES, xxhash.xxh3_128_digest, id="xxh3"),
        pytest.param(BLAKE3_ON_THE_CPU, BLAKE3_SIZES, lambda data: blake3(data).digest(), id="blake3"),
    ],
)
def test_is_every_length_class_hashed_as_the_library_does(
    tmp_path: Path, program: str, sizes: list[int], reference: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "digest.cpp").write_text(program)
    library = tmp_path / "digest.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{FOLDER}", "-o", str(library)]
    subprocess.run([*command, str(tmp_path / "digest.cpp")], check=True, timeout=100)
    digest, out = ctypes.CDLL(str(library)).digest, (ctypes.c_ubyte * 32)()
    wrong = []
    for size in sizes:
        for start in (0, 1, 3, 7, 8):
            raw = random.Random(size).randbytes(start + size + 8)  # a word beyond, which the arithmetic may read
            memory = (ctypes.c_ubyte * len(raw)).from_buffer_copy(raw)
            digest(ctypes.c_void_p(ctypes.addressof(memory) + start), ctypes.c_ulonglong(size), out)
            wanted = reference(raw[start : start + size])
            if bytes(out)[: len(wanted)] != wanted:
                wrong.append((size, start))
    assert wrong == []


def nvcc_release() -> str:
    if shutil.which("nvcc") is None:
        return "none"
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    return said.partition("release ")[2].partition(",")[0]


@pytest.mark.integration  # the compiler runs for seconds
@pytest.mark.skipif(nvcc_release() != kernels.NVCC_RELEASE, reason=f"nvcc is not of release {kernels.NVCC_RELEASE}")
@pytest.mark.parametrize("source", kernels.SOURCES)
def test_is_the_shipped_image_compiled_from_the_source(tmp_path: Path, source: str) -> None:
    image = kernels.image_of(source)
    kernels.build(FOLDER / source, tmp_path / image)
    assert (tmp_path / image).read_bytes() == (FOLDER / image).read_bytes()
