from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
import xxhash
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from swarm.content.manifest import HashScheme
from swarm.errors import SettingsError
from swarm.hashing.cpu import LeafHasher, chunk_digest, demand

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
    assert chunk_digest(SCHEME, [data]) == reference(data)


def test_is_a_chunk_of_one_leaf_hashed_twice_too() -> None:
    data = random_bytes(LEAF)
    assert chunk_digest(SCHEME, [data]) == xxhash.xxh3_128_digest(xxhash.xxh3_128_digest(data))


def test_does_the_leaf_size_matter_and_is_the_default_scheme_followed() -> None:
    data = random_bytes(300_000)
    assert chunk_digest(HashScheme(), [data]) == reference(data, HashScheme().leaf_bytes)
    assert chunk_digest(HashScheme(), [data]) != chunk_digest(SCHEME, [data])


@given(st.lists(st.integers(0, 3 * LEAF), max_size=12))
def test_do_view_boundaries_not_matter(sizes: list[int]) -> None:
    data = random_bytes(sum(sizes))
    ends = np.cumsum([0, *sizes]).tolist()
    views = [memoryview(data)[start:end] for start, end in itertools.pairwise(ends)]
    assert chunk_digest(SCHEME, views) == reference(data)


def test_can_a_digest_be_read_in_the_middle() -> None:
    data = random_bytes(3 * LEAF + 5)
    hasher = LeafHasher(SCHEME)
    hasher.update(data[: LEAF + 3])
    assert hasher.digest() == reference(data[: LEAF + 3])
    hasher.update(data[LEAF + 3 :])
    assert hasher.digest() == reference(data)


def test_are_views_of_wider_elements_hashed_as_their_bytes() -> None:
    numbers = np.arange(1000, dtype=np.float32)
    assert chunk_digest(SCHEME, [numbers.data]) == reference(numbers.tobytes())


def test_is_one_flipped_bit_seen() -> None:
    data = bytearray(random_bytes(4 * LEAF))
    before = chunk_digest(SCHEME, [bytes(data)])
    data[3 * LEAF] ^= 1
    assert chunk_digest(SCHEME, [bytes(data)]) != before


@given(st.lists(st.integers(0, 3 * LEAF), max_size=12))
def test_is_blake3_a_hash_of_leaf_digests_too(sizes: list[int]) -> None:
    data = random_bytes(sum(sizes))
    ends = np.cumsum([0, *sizes]).tolist()
    views = [memoryview(data)[start:end] for start, end in itertools.pairwise(ends)]
    leaves = [data[i : i + LEAF] for i in range(0, len(data), LEAF)]
    wanted = blake3(b"".join(blake3(leaf).digest() for leaf in leaves)).digest()
    assert chunk_digest(HashScheme("blake3", LEAF), views) == wanted


def test_is_a_hash_that_is_not_installed_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    demand(HashScheme())
    with pytest.raises(SettingsError, match=r"pip install 'swarm-weights\[blake3\]'"):
        demand(HashScheme("blake3"))
