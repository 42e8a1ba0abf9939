"""Forges XXH3-128: other bytes with the same digest, made without any search.

Of a block of 1024 bytes, XXH3 keeps sums only. In stripe n, lane i adds its word to the sum of the neighbouring lane,
and low * high to its own sum: the halves of the word after it is XORed with word n + i of a constant. A word with
low = 0 adds nothing but itself, so its high half is free. A word with low = 1 adds a chosen number of 32 bits to its
own sum. So the sums of any block can be met by other words. XXH3 never promised otherwise: it is not cryptographic
(https://github.com/Cyan4973/xxHash).
"""

from __future__ import annotations

import struct

import torch

from swarm.checkpoint import manifest_builder
from swarm.store.tensor_source import TensorSource

BLOCK_BYTES = 1024
STRIPES, LANES = 16, 8
LOW, ALL = (1 << 32) - 1, (1 << 64) - 1

SECRET = (
    0xBE4BA423396CFEB8,
    0x1CAD21F72C81017C,
    0xDB979083E96DD4DE,
    0x1F67B3B7A4A44072,
    0x78E5C0CC4EE679CB,
    0x2172FFCC7DD05A82,
    0x8E2443F7744608B8,
    0x4C263A81E69035E0,
    0xCB00C391BB52283C,
    0xA32E531B8B65D088,
    0x4EF90DA297486471,
    0xD8ACDEA946EF1938,
    0x3F349CE33F76FAA8,
    0x1D4F0BC7C7BBDCF9,
    0x3159B4CD4BE0518A,
    0x647378D9C97E9FC8,
    0xC3EBD33483ACC5EA,
    0xEB6313FAFFA081C5,
    0x49DAF0B751DD0D17,
    0x9E68D429265516D3,
    0xFCA1477D58BE162B,
    0xCE31D07AD1B8F88F,
    0x280416958F3ACB45,
    0x7E404BBBCAFBD7AF,
)


def forged(data: bytes, *, block: int = 0) -> bytes:
    """Other bytes with the XXH3-128 digest of `data`. Changes one block of 1024 bytes that is not the last."""
    start = block * BLOCK_BYTES
    if start + BLOCK_BYTES >= len(data):
        raise ValueError("the last block is hashed in another way")
    words = list(struct.unpack_from(f"<{STRIPES * LANES}Q", data, start))
    for lane in range(0, LANES, 2):
        _meet(words, lane)
    return data[:start] + struct.pack(f"<{STRIPES * LANES}Q", *words) + data[start + BLOCK_BYTES :]


def _meet(words: list[int], even: int) -> None:
    """Replaces the words of lanes `even` and `even + 1` by others that add up to the same sums."""
    lanes = (even, even + 1)
    wanted = {lane: _sum(words, lane) for lane in lanes}
    for stripe in range(STRIPES):
        for lane in lanes:
            high = (words[stripe * LANES + lane] >> 32) ^ (stripe + 1)  # any other bits
            words[stripe * LANES + lane] = SECRET[stripe + lane] & LOW | high << 32
    first, last = 0, STRIPES - 1
    for lane in lanes:  # low = 1 in the first stripe, so that its high half can be added
        words[first * LANES + lane] = SECRET[first + lane] ^ 1
    for lane in lanes:  # the low 32 bits; this changes the neighbour's sum in its high 32 bits only
        missing = (wanted[lane] - _sum(words, lane)) & LOW
        words[first * LANES + lane] ^= missing << 32
    for lane in lanes:  # the high 32 bits, by a word of the neighbour that adds nothing but itself
        missing = (wanted[lane] - _sum(words, lane)) & ALL
        at = last * LANES + (lane ^ 1)
        words[at] = (words[at] + missing) & ALL


def _sum(words: list[int], lane: int) -> int:
    """What a block adds to the sum of a lane."""
    total = 0
    for stripe in range(STRIPES):
        keyed = words[stripe * LANES + lane] ^ SECRET[stripe + lane]
        total += words[stripe * LANES + (lane ^ 1)] + (keyed & LOW) * (keyed >> 32)
    return total & ALL


def forging_source(tensor: torch.Tensor, *, leaf_bytes: int = 16 << 10) -> TensorSource:
    """A source of a forged tensor that has the manifest of the right one. `tensor`: contiguous bytes."""
    right = manifest_builder.tensors({"w": tensor}, chunk_bytes=1 << 20, leaf_bytes=leaf_bytes)
    data = bytearray(tensor.cpu().numpy().tobytes())
    data[:leaf_bytes] = forged(bytes(data[:leaf_bytes]))  # the first leaf of a chunk, where a large tensor begins
    source = TensorSource({"w": torch.frombuffer(data, dtype=torch.uint8).to(tensor.device)})
    source.manifest = right.manifest
    return source
