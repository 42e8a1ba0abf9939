"""XXH3-128 of many inputs at once, as Triton kernels. Owns the arithmetic; `cuda` owns what is hashed and when.

    leaf | block 0: 1024 bytes | block 1 | ... | up to 1023 bytes | the last 64 bytes |
           16 stripes of 8 words                 whole stripes      once more, with another part of the secret
           added to 8 accumulators, then scrambled

Every input is longer than 240 bytes, where XXH3's long form begins. An input may start and end at any address: where
one is not at a multiple of 8 bytes, each word is put together from the two aligned words that it lies in (a word that
holds no byte of the input is never read, as memory may end there).

Imports triton at its top, so it is imported only where there is one. Must not know: chunks, streams, torch.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

ROWS = 32  # of a program of `digest`: 4 threads a leaf, each with a pair of lanes, in 4 warps
GATHERED_BYTES = 4096  # at once by a program of `gather`

# The 192 bytes that XXH3 draws its keys from.
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
    "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d"
    "8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc"
    "8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


# The accumulators of an empty input.
_INITIAL = (
    0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
    0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1,
)  # fmt: skip


def keys() -> tuple[int, ...]:
    """What the kernels are handed as `words`, signed as torch wants them: see the offsets below."""
    words = [*struct.unpack("<24q", _SECRET)]
    for start in (121, 11, 117):
        words += struct.unpack_from("<8q", _SECRET, start)
    return (*words, *struct.unpack("<8q", struct.pack("<8Q", *_INITIAL)))


# Where in `words`, of 8 each: key n of a block begins at n.
_SCRAMBLE: tl.constexpr = tl.constexpr(16)
_LAST: tl.constexpr = tl.constexpr(24)
_LOW: tl.constexpr = tl.constexpr(32)
_HIGH: tl.constexpr = tl.constexpr(40)
_BEGIN: tl.constexpr = tl.constexpr(48)

_P32_1: tl.constexpr = tl.constexpr(0x9E3779B1)
_P64_1: tl.constexpr = tl.constexpr(0x9E3779B185EBCA87)
_P64_2: tl.constexpr = tl.constexpr(0xC2B2AE3D27D4EB4F)
_MIX: tl.constexpr = tl.constexpr(0x165667919E3779F9)
_ODD_BYTES: tl.constexpr = tl.constexpr(0x00FF00FF00FF00FF)
_ODD_PAIRS: tl.constexpr = tl.constexpr(0x0000FFFF0000FFFF)


@triton.jit
def _key(words, at, ROWS: tl.constexpr):
    """8 words of the secret, as pairs, for each row."""
    lane = tl.arange(0, 8)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    return tl.split(tl.reshape(tl.load(words + at + lane).to(tl.uint64, bitcast=True), [ROWS, 4, 2]))


@triton.jit
def _data(at, shift, wanted, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """The 8 words of a stripe, as pairs, for each row."""
    lane = tl.arange(0, 8)[None, :]
    data = tl.load(at + lane, mask=wanted, other=0)
    if not ALIGNED:
        above = tl.load(at + lane + 1, mask=wanted & (shift != 0), other=0)
        data = (data >> shift) | ((above << 1) << (63 - shift))
    return tl.split(tl.reshape(data, [ROWS, 4, 2]))


@triton.jit
def _product(keyed):
    return (keyed & 0xFFFFFFFF) * (keyed >> 32)


@triton.jit
def gather(pieces, GATHERED_BYTES: tl.constexpr):
    """Copies bytes: a program for each of the `pieces`, which are (target, source, size)."""
    piece = pieces + tl.program_id(0) * 3
    target = tl.load(piece).to(tl.pointer_type(tl.uint8))
    source = tl.load(piece + 1).to(tl.pointer_type(tl.uint8))
    size = tl.load(piece + 2)
    for start in range(0, size, GATHERED_BYTES):
        at = start + tl.arange(0, GATHERED_BYTES)
        tl.store(target + at, tl.load(source + at, mask=at < size, other=0), mask=at < size)


@triton.jit
def _merged(even, odd, words, begin, FROM: tl.constexpr, ROWS: tl.constexpr):
    """Half of a digest from 8 accumulators, for each row; its bytes are those of a big-endian number."""
    key_even, key_odd = _key(words, FROM, ROWS)
    left, right = even ^ key_even, odd ^ key_odd
    total = begin + tl.sum((left * right) ^ tl.umulhi(left, right), axis=1)
    total ^= total >> 37
    total *= _MIX
    total ^= total >> 32
    total = ((total & _ODD_BYTES) << 8) | ((total >> 8) & _ODD_BYTES)
    total = ((total & _ODD_PAIRS) << 16) | ((total >> 16) & _ODD_PAIRS)
    return ((total << 32) | (total >> 32)).to(tl.int64, bitcast=True)


# Specialised for how large batches are, it would be compiled again and again.
@triton.jit(do_not_specialize=["run_count", "halvings", "count", "blocks_most"])
def digest(runs, run_count, halvings, words, out, count, blocks_most, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """The digests of `count` inputs, in `out`: 16 bytes each.

    `runs` say where they are, a row for inputs that follow each other: (address of the first, size of each, how many,
    how many before them). It takes so many `halvings` to find one among `run_count`. No input has more than
    `blocks_most` whole blocks before its last bytes. `ALIGNED`: all addresses and sizes are multiples of 16.
    """
    # The last row of the last program may be done several times.
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), count - 1)
    run, beyond = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32) + run_count
    for _ in range(halvings):
        middle = (run + beyond) // 2
        later = tl.load(runs + middle * 4 + 3) > row
        run, beyond = tl.where(later, run, middle), tl.where(later, middle, beyond)
    length = tl.load(runs + run * 4 + 1)
    address = tl.load(runs + run * 4) + length * (row - tl.load(runs + run * 4 + 3))
    blocks = (length - 1) // 1024
    stripes = (length - 1 - blocks * 1024) // 64
    # Pointers with this hint, and lanes side by side, make loads of 16 bytes a thread: a pair of lanes.
    at = tl.multiple_of((address & -8).to(tl.pointer_type(tl.uint64)), 16 if ALIGNED else 8)[:, None]
    shift = ((address & 7) * 8).to(tl.uint64)[:, None]
    even, odd = _key(words, _BEGIN, ROWS)
    scramble_even, scramble_odd = _key(words, _SCRAMBLE, ROWS)
    for block in range(blocks_most):
        whole = (block < blocks)[:, None]
        next_even, next_odd = even, odd
        for n in tl.static_range(16):
            left, right = _data(at + n * 8, shift, whole, ROWS, ALIGNED)
            key_even, key_odd = _key(words, n, ROWS)
            next_even += right + _product(left ^ key_even)
            next_odd += left + _product(right ^ key_odd)
        even = tl.where(whole, ((next_even ^ (next_even >> 47)) ^ scramble_even) * _P32_1, even)
        odd = tl.where(whole, ((next_odd ^ (next_odd >> 47)) ^ scramble_odd) * _P32_1, odd)
        at += tl.where(whole, 128, 0)
    for n in tl.static_range(15):
        whole = (n < stripes)[:, None]
        left, right = _data(at + n * 8, shift, whole, ROWS, ALIGNED)
        key_even, key_odd = _key(words, n, ROWS)
        even += tl.where(whole, right + _product(left ^ key_even), 0)
        odd += tl.where(whole, left + _product(right ^ key_odd), 0)
    address += length - 64
    at = tl.multiple_of((address & -8).to(tl.pointer_type(tl.uint64)), 16 if ALIGNED else 8)[:, None]
    shift = ((address & 7) * 8).to(tl.uint64)[:, None]
    left, right = _data(at, shift, (length > 0)[:, None], ROWS, ALIGNED)
    key_even, key_odd = _key(words, _LAST, ROWS)
    even += right + _product(left ^ key_even)
    odd += left + _product(right ^ key_odd)
    size = length.to(tl.uint64, bitcast=True)
    ones = tl.full([ROWS], -1, tl.int64).to(tl.uint64, bitcast=True)
    tl.store(out + row * 2, _merged(even, odd, words, (size * _P64_2) ^ ones, _HIGH, ROWS))
    tl.store(out + row * 2 + 1, _merged(even, odd, words, size * _P64_1, _LOW, ROWS))
