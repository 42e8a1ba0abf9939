"""Inputs that are nearly right: valid inputs with bytes changed, cut, doubled, spliced and words put in."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

MUTATIONS_MAX = 4  # of an input; beyond that, the first check refuses the noise
BYTES_MAX = 4096  # an input grows no longer: speed finds more than size does

NUMBERS = [0, 1, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, 2**64 - 1]
WORDS = [
    b"0", b"-1", b"1e999", b"-0.0", b"NaN", b"null", b"true", b'""', b"[]", b"{}", b"[[", b'{"',
    b'"\\ud800"', b"\\u0000", b"\0", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"..", b"/", b"../", b"\\",
    b"1" * 400, b"[" * 1500, b"9223372036854775808", b"18446744073709551616",
    b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff", b"\xcb\x7f\xf8\0\0\0\0\0\0",
]  # fmt: skip


def inputs(seeds: Sequence[bytes], *, seed: str) -> Iterator[bytes]:
    """Mutations of these seeds without end; the same for the same `seed`."""
    rng = random.Random(seed)
    while True:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, MUTATIONS_MAX)):
            _mutate(data, seeds, rng)
        yield bytes(data[:BYTES_MAX])


def _mutate(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> None:
    place = rng.randrange(len(data) + 1)
    match rng.randrange(9):
        case 0 | 1 if place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        case 2 if place < len(data):
            data[place] = rng.randrange(256)
        case 3:
            del data[place : place + rng.randint(1, 16)]
        case 4:
            del data[place:]
        case 5:
            data[place:place] = data[place : place + rng.randint(1, 64)]
        case 6:
            data[place : place + rng.choice((0, 1, 4))] = rng.choice(WORDS)
        case 7:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
            data[place : place + size] = number.to_bytes(size, rng.choice(("big", "little")))
        case _:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[place : place + rng.randint(0, 32)] = other[start : start + rng.randint(1, 64)]
