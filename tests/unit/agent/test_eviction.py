"""The bounded cache: who has to go, who may stay, and what is refused before a byte is fetched?"""

from __future__ import annotations

import math
import random

import pytest

from swarm.agent.eviction import Eviction, NoRoom


def cache(limit: float, **sizes: int) -> Eviction:
    """Models that were used in the order of their names."""
    made = Eviction(limit)
    for at, (key, size) in enumerate(sizes.items()):
        made.add(key, size, used_at=float(at))
    return made


def test_does_the_least_recently_used_go_first() -> None:
    made = cache(100, a=40, b=40)
    made.use("a", 10.0)
    assert made.reserve("c", 30) == ["b"]
    made.settle("c", 30)
    made.add("c", 30, used_at=11.0)
    assert (set(made.kept), made.bytes) == ({"a", "c"}, 70)
    assert repr(made) == "<Eviction 70 of 100 bytes | 2 models, 0 pinned | 0 in use | 0 arriving>"


@pytest.mark.parametrize("limit", [100, math.inf])
def test_goes_nothing_while_there_is_room(limit: float) -> None:
    assert cache(limit, a=40).reserve("b", 60) == []


def test_stay_pinned_and_leased_and_arriving_ones() -> None:
    made = cache(100, a=20, b=20, c=20, d=20)
    made.pin("a", pinned=True)
    made.lease("b")
    assert made.reserve("c", 20) == []
    with pytest.raises(NoRoom, match="50 bytes beside 20 pinned and 60 in use, of 100"):
        made.reserve("e", 50)
    assert set(made.kept) == {"a", "b", "c", "d"}, "nothing goes for what does not fit"
    assert made.reserve("e", 20) == ["d"]
    made.release("b")
    made.settle("c", 20)
    assert made.reserve("f", 40) == ["b"]


def test_is_room_promised_once() -> None:
    made = cache(100)
    made.reserve("a", 60)
    with pytest.raises(NoRoom, match="0 pinned and 60 in use"):
        made.reserve("b", 60)
    made.settle("a", 60)
    assert made.reserve("b", 60) == []


def test_does_a_model_never_make_room_for_itself() -> None:
    """A second part of it arrives: the first part stays."""
    made = cache(100, a=60)
    with pytest.raises(NoRoom):
        made.reserve("a", 60)
    assert made.reserve("a", 40) == []
    made.settle("a", 40)
    made.add("a", 100, used_at=5.0)
    assert made.kept["a"].size == 100


def test_does_a_pin_survive_that_its_model_grows() -> None:
    made = cache(100, a=10)
    made.pin("a", pinned=True)
    made.add("a", 20, used_at=0.0)
    assert made.kept["a"].pinned
    assert made.kept["a"].size == 20


def test_what_goes_when_the_limit_shrinks() -> None:
    made = cache(100, a=40, b=40, c=10)
    made.limit_bytes = 60
    assert made.overdue() == ["a"]
    made.pin("b", pinned=True)
    made.limit_bytes = 20
    assert made.overdue() == ["c"], "what is pinned stays, beyond the limit"
    assert made.bytes == 40


@pytest.mark.parametrize("seed", range(20))
def test_is_the_limit_kept_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    made, leased, arriving = Eviction(1000), list[str](), list[tuple[str, int]]()
    for now in range(400):
        key = f"m{rng.randrange(30)}"
        match rng.randrange(6):
            case 0 | 1:
                before = set(made.kept)
                pinned = {name for name, model in made.kept.items() if model.pinned}
                try:
                    gone = made.reserve(key, size := rng.randrange(1, 500))
                except NoRoom:
                    assert set(made.kept) == before
                else:
                    assert not set(gone) & ({key, *leased, *(name for name, _ in arriving)} | pinned)
                    arriving.append((key, size))
            case 2 if arriving:
                key, size = arriving.pop(rng.randrange(len(arriving)))
                there = made.kept[key].size if key in made.kept else 0
                made.settle(key, size)
                made.add(key, there + size, used_at=float(now))
            case 3 if key in made.kept:
                made.pin(key, pinned=rng.random() < 0.2)
            case 4 if key in made.kept:
                made.lease(key)
                leased.append(key)
            case 5 if leased:
                made.release(leased.pop())
        made.check()
        assert made.bytes <= 1000


def test_do_two_reservations_of_a_model_end_apart() -> None:
    made = cache(100)
    made.reserve("a", 30)
    made.reserve("a", 40)
    made.settle("a", 30)
    assert made.bytes == 40
    assert made.leased("a")
    made.settle("a", 40)
    assert not made.leased("a")
