"""Do the kernels compute the library's digests, and is the shipped image compiled from the source beside it?

Here the kernels' arithmetic is compiled for the CPU. Whether GPUs agree, tests/gpu/test_hashing.py asks a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import xxhash

from swarm.hashing import kernels

SOURCE = Path(str(importlib.resources.files("swarm.hashing"))) / kernels.SOURCE

# Around 240 bytes, words, stripes of 64, blocks of 1024.
SIZES = [*range(241, 260), 319, 320, 321, 511, 1023, 1024, 1025, 1088, 1089, 2047, 2048, 2049, 3072, 16 << 10, 20001]

ON_THE_CPU = """
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_is_every_length_class_hashed_as_the_library_does(tmp_path: Path) -> None:
    (tmp_path / "digest.cpp").write_text(ON_THE_CPU)
    library = tmp_path / "digest.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{SOURCE.parent}", "-o", str(library)]
    subprocess.run([*command, str(tmp_path / "digest.cpp")], check=True, timeout=100)
    digest, out = ctypes.CDLL(str(library)).digest, (ctypes.c_ubyte * 16)()
    wrong = []
    for size in SIZES:
        for start in (0, 1, 7, 8):
            raw = random.Random(size).randbytes(start + size + 8)  # a word beyond, which the arithmetic may read
            memory = (ctypes.c_ubyte * len(raw)).from_buffer_copy(raw)
            digest(ctypes.c_void_p(ctypes.addressof(memory) + start), ctypes.c_ulonglong(size), out)
            if bytes(out) != xxhash.xxh3_128_digest(raw[start : start + size]):
                wrong.append((size, start))
    assert wrong == []


def nvcc_release() -> str:
    if shutil.which("nvcc") is None:
        return "none"
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    return said.partition("release ")[2].partition(",")[0]


@pytest.mark.skipif(nvcc_release() != kernels.NVCC_RELEASE, reason=f"nvcc is not of release {kernels.NVCC_RELEASE}")
def test_is_the_shipped_image_compiled_from_the_source(tmp_path: Path) -> None:
    kernels.build(SOURCE, tmp_path / kernels.IMAGE)
    assert (tmp_path / kernels.IMAGE).read_bytes() == SOURCE.with_name(kernels.IMAGE).read_bytes()
