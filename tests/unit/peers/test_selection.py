"""Whom a newcomer links with: by table, and what holds whoever is there."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.peers import selection
from swarm.peers.selection import Candidate
from swarm.protocol.messages import NodeId

HERE, RACK, AWAY = 0, 1, 2


def some(
    count: int, *, distance: int = AWAY, whole: bool = False, load: float = 0.0, name: str = "p"
) -> list[Candidate]:
    return [Candidate(NodeId(f"{name}{distance}{number}"), whole, distance, load) for number in range(count)]


def chosen(linked: list[Candidate], others: list[Candidate], wanted: int, seed: int = 0) -> list[Candidate]:
    return selection.choose(linked, others, wanted=wanted, rng=random.Random(seed))


def count(candidates: list[Candidate], distance: int) -> int:
    return sum(one.distance == distance for one in candidates)


SEED = some(1, whole=True, name="s")
SEEDS = some(9, whole=True, name="s")


@pytest.mark.parametrize(
    ("linked", "others", "wanted", "seeds", "here", "rack", "away"),
    [
        ([], [], 12, 0, 0, 0, 0),
        ([], SEED, 12, 1, 0, 0, 1),
        ([], SEEDS, 1, 2, 0, 0, 3),
        ([], [*SEED, *some(20)], 4, 1, 0, 0, 5),
        ([], [*SEED, *some(20)], 12, 1, 0, 0, 13),
        (SEEDS[:2], some(20), 12, 0, 0, 0, 12),
        (SEEDS[:5], some(20), 12, 0, 0, 0, 9),  # those beyond two take the places of others
        (some(12, name="q"), some(20), 12, 0, 0, 0, 0),
        (some(13, name="q"), some(20), 12, 0, 0, 0, 0),  # others dialled meanwhile
        (some(12, name="q"), SEED, 12, 1, 0, 0, 1),
        ([], [*some(20, distance=HERE), *some(20)], 12, 0, 6, 0, 6),
        ([], [*some(20, distance=HERE), *some(20, distance=RACK), *some(20)], 12, 0, 6, 3, 3),
        ([], [*some(20, distance=RACK), *some(20)], 12, 0, 0, 6, 6),
        ([], [*some(2, distance=HERE), *some(20)], 12, 0, 2, 0, 10),
        ([], some(20, distance=HERE), 12, 0, 12, 0, 0),
        (some(6, distance=HERE, name="q"), [*some(20, distance=HERE), *some(20)], 12, 0, 0, 0, 6),
    ],
)
def test_who_is_chosen(
    linked: list[Candidate], others: list[Candidate], wanted: int, seeds: int, here: int, rack: int, away: int
) -> None:
    found = chosen(linked, others, wanted)
    assert sum(one.whole for one in found) >= seeds
    assert [count(found, distance) for distance in (HERE, RACK, AWAY)] == [here, rack, away]


def test_are_the_least_loaded_of_those_looked_at_chosen() -> None:
    busy, idle = some(selection.PROBES // 2, load=5.0, name="busy"), some(selection.PROBES // 2, load=1.0, name="idle")
    assert set(chosen([], [*busy, *idle], selection.PROBES // 2)) == set(idle)


def test_are_links_spread_over_many_choices() -> None:
    others = some(40)
    taken = {one.node for seed in range(40) for one in chosen([], others, 4, seed)}
    assert len(taken) > 35


def test_is_a_choice_a_function_of_its_dice() -> None:
    others = [*SEEDS, *some(40)]
    assert chosen([], others, 12, seed=7) == chosen([], others, 12, seed=7)


@st.composite
def known(draw: st.DrawFn) -> tuple[list[Candidate], list[Candidate]]:
    """Linked and others, of different names."""
    kinds = st.tuples(st.booleans(), st.sampled_from([HERE, RACK, AWAY]), st.integers(0, 20))
    all_of_them = [Candidate(NodeId(f"m{n}"), *kind) for n, kind in enumerate(draw(st.lists(kinds, max_size=40)))]
    linked = draw(st.integers(0, len(all_of_them)))
    return all_of_them[:linked], all_of_them[linked:]


@given(known(), st.integers(0, 20), st.integers(0, 5))
def test_what_holds_whoever_is_there(known: tuple[list[Candidate], list[Candidate]], wanted: int, seed: int) -> None:
    linked, others = known
    found = chosen(linked, others, wanted, seed)
    seeds, linked_seeds = sum(one.whole for one in others), sum(one.whole for one in linked)
    room = max(0, wanted + min(selection.SEEDS_WANTED, seeds + linked_seeds) - len(linked))
    assert len(found) <= room, "never more than wanted"
    assert len(set(found)) == len(found), "nobody twice"
    assert set(found) <= set(others), "nobody who is linked or unknown"
    # Seeds come first: as many as are lacking, are there, and have room.
    lacking = max(0, selection.SEEDS_WANTED - linked_seeds)
    assert sum(one.whole for one in found) >= min(lacking, room, seeds)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 16), st.integers(0, 5))
def test_are_near_ones_preferred(near: int, far: int, wanted: int, seed: int) -> None:
    found = chosen([], [*some(near, distance=HERE), *some(far)], wanted, seed)
    assert len(found) == min(wanted, near if not far else min(near, -(-wanted // 2)) + far)
    if near and far:
        assert count(found, HERE) == min(near, -(-wanted // 2))
