"""A set of chunks: does it count, travel and refuse what is no bitfield?"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.content.bitfield import Bitfield, runs


@given(st.integers(0, 70).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, max(0, n - 1)), max_size=n))))
def test_is_a_packed_bitfield_unpacked(case: tuple[int, set[int]]) -> None:
    length, held = case
    field = Bitfield(length, held)
    assert set(field) == held
    assert len(field) == len(held)
    assert field.complete == (len(held) == length)
    again = Bitfield.unpack(field.pack(), length)
    assert (list(again), len(again), again.length) == (sorted(held), len(held), length)


def test_which_bit_is_chunk_0() -> None:
    assert Bitfield(10, [0, 9]).pack() == b"\x80\x40"


def test_does_adding_twice_count_once() -> None:
    field = Bitfield(3)
    field.add(1)
    field.add(1)
    assert (len(field), list(field), 1 in field, 0 in field) == (1, [1], True, False)
    assert repr(field) == "<Bitfield 1/3>"


def test_is_a_full_field_complete() -> None:
    assert Bitfield.full(9).complete
    assert list(Bitfield.full(2)) == [0, 1]
    assert not Bitfield(1).complete


@pytest.mark.parametrize(
    ("data", "length"), [(b"", 1), (b"\0\0", 8), (b"\0", 9), (b"\0", 0), (b"\x01", 7), (b"\0\x7f", 9)]
)
def test_are_bytes_of_another_length_refused(data: bytes, length: int) -> None:
    with pytest.raises(ValueError, match="bitfield"):
        Bitfield.unpack(data, length)


@given(st.sets(st.integers(0, 50)))
def test_do_runs_say_the_same(indices: set[int]) -> None:
    found = runs(sorted(indices))
    assert [index for first, count in found for index in range(first, first + count)] == sorted(indices)
    assert all(first + count < following for (first, count), (following, _) in itertools.pairwise(found))


def test_what_two_fields_have_in_common_and_what_not() -> None:
    some, others = Bitfield(5, [0, 1, 4]), Bitfield(5, [1, 3])
    assert (list(some.union(others)), list(some.minus(others)), some.common(others)) == ([0, 1, 3, 4], [0, 4], 1)
    assert (len(some.union(others)), len(some.minus(others))) == (4, 2)
    assert some.covers(Bitfield(5, [4, 0]))
    assert not some.covers(others)
