from __future__ import annotations

import itertools

import numpy as np
import pytest
import xxhash
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarm.content.manifest import HashScheme
from swarm.hashing.cpu import ChunkHasher, chunk_digests

LEAF = 1024
SCHEME = HashScheme(leaf_bytes=LEAF)


def reference(data: bytes, leaf_bytes: int = LEAF) -> bytes:
    leaves = [data[i : i + leaf_bytes] for i in range(0, len(data), leaf_bytes)]
    return xxhash.xxh3_128_digest(b"".join(xxhash.xxh3_128_digest(leaf) for leaf in leaves))


def random_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


@pytest.mark.parametrize("size", [0, 1, LEAF - 1, LEAF, LEAF + 1, 2 * LEAF, 5 * LEAF + 7])
def test_is_the_digest_the_hash_of_leaf_digests(size: int) -> None:
    data = random_bytes(size)
    assert chunk_digests(SCHEME, [data]).xxh3 == reference(data)


def test_is_a_chunk_of_one_leaf_hashed_twice_too() -> None:
    data = random_bytes(LEAF)
    assert chunk_digests(SCHEME, [data]).xxh3 == xxhash.xxh3_128_digest(xxhash.xxh3_128_digest(data))


def test_does_the_leaf_size_matter_and_is_the_default_scheme_followed() -> None:
    data = random_bytes(300_000)
    assert chunk_digests(HashScheme(), [data]).xxh3 == reference(data, HashScheme().leaf_bytes)
    assert chunk_digests(HashScheme(), [data]).xxh3 != chunk_digests(SCHEME, [data]).xxh3


@given(st.lists(st.integers(0, 3 * LEAF), max_size=12))
def test_do_view_boundaries_not_matter(sizes: list[int]) -> None:
    data = random_bytes(sum(sizes))
    ends = np.cumsum([0, *sizes]).tolist()
    views = [memoryview(data)[start:end] for start, end in itertools.pairwise(ends)]
    assert chunk_digests(SCHEME, views).xxh3 == reference(data)


def test_can_a_digest_be_read_in_the_middle() -> None:
    data = random_bytes(3 * LEAF + 5)
    hasher = ChunkHasher(SCHEME)
    hasher.update(data[: LEAF + 3])
    assert hasher.digests().xxh3 == reference(data[: LEAF + 3])
    hasher.update(data[LEAF + 3 :])
    assert hasher.digests().xxh3 == reference(data)


def test_are_views_of_wider_elements_hashed_as_their_bytes() -> None:
    numbers = np.arange(1000, dtype=np.float32)
    assert chunk_digests(SCHEME, [numbers.data]).xxh3 == reference(numbers.tobytes())


def test_is_one_flipped_bit_seen() -> None:
    data = bytearray(random_bytes(4 * LEAF))
    before = chunk_digests(SCHEME, [bytes(data)]).xxh3
    data[3 * LEAF] ^= 1
    assert chunk_digests(SCHEME, [bytes(data)]).xxh3 != before


@given(st.lists(st.integers(0, 3 * LEAF), max_size=12))
def test_is_blake3_that_of_all_bytes_whatever_the_leaves_and_views(sizes: list[int]) -> None:
    data = random_bytes(sum(sizes))
    ends = np.cumsum([0, *sizes]).tolist()
    views = [memoryview(data)[start:end] for start, end in itertools.pairwise(ends)]
    found = chunk_digests(SCHEME, views, blake3=True)
    assert (found.xxh3, found.blake3) == (reference(data), blake3(data).digest())


def test_is_blake3_computed_on_demand_only() -> None:
    assert chunk_digests(SCHEME, [b"x"]).blake3 == b""
