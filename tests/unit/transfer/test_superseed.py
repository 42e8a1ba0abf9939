"""What does a seed give, to whom, and what of it does it give again?"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.content.bitfield import Bitfield
from swarm.errors import LocalProtocolError
from swarm.protocol.messages import NodeId
from swarm.transfer import scheduler
from swarm.transfer.superseed import Superseed

CHUNKS = 12


class Seed:
    """A seed that gives; every step is checked. What it gives arrives only when the test says so."""

    def __init__(self, *newcomers: str, chunks: int = CHUNKS, rank: int = 0, seeds: int = 1) -> None:
        self.superseed = Superseed(chunks, rng=random.Random(0))
        self.chunks, self.rank, self.seeds = chunks, rank, seeds
        for name in newcomers:
            self.joined(name)

    def joined(self, name: str, holds: Sequence[int] = (), wants: Sequence[int] | None = None) -> None:
        wanted = None if wants is None else Bitfield(self.chunks, wants)
        self.superseed.joined(NodeId(name), Bitfield(self.chunks, holds), wanted)
        self.superseed.check()

    def left(self, name: str) -> None:
        self.superseed.left(NodeId(name))
        self.superseed.check()

    def has(self, name: str, *chunks: int) -> None:
        self.superseed.has(NodeId(name), chunks)
        self.superseed.check()

    def failed(self, name: str, *chunks: int) -> None:
        self.superseed.failed(NodeId(name), chunks)
        self.superseed.check()

    def asked(self, name: str, count: int = 1, *, starving: bool = False) -> tuple[int, ...]:
        chunks = self.superseed.choose(NodeId(name), count, starving=starving, rank=self.rank, seeds=self.seeds)
        self.superseed.check()
        return chunks

    def drained(self, *names: str, starving: bool = False) -> list[int]:
        """All that it gives to these by turns until it declines all of them."""
        found: list[int] = []
        while got := [chunk for name in names for chunk in self.asked(name, starving=starving)]:
            found += got
        return found


# The choice


@pytest.mark.parametrize(
    ("what", "wanted", "given_", "held", "territory", "count", "starving", "chosen"),
    [
        ("nothing is wanted", "000", "000", "000", "111", 3, True, ()),
        ("never given", "111", "101", "000", "111", 1, False, (1,)),
        ("nobody holds it", "111", "000", "011", "111", 1, False, (0,)),
        ("in a row", "1110", "0000", "0000", "1111", 2, False, None),
        ("the row ends where one was given", "1011", "0000", "0001", "1101", 3, False, None),
        ("in the own territory", "1111", "0000", "0000", "0010", 4, False, (2,)),
        ("in the others' territory, not hungry", "1111", "0000", "0000", "0000", 4, False, ()),
        ("in the others' territory, hungry", "0100", "0000", "0000", "0000", 4, True, (1,)),
        ("all given, not hungry", "111", "111", "000", "111", 3, False, ()),
        ("all given, hungry: the rarest, and one only", "111", "212", "000", "111", 3, True, (1,)),
        ("copies that newcomers got from each other count", "111", "111", "302", "111", 3, True, (1,)),
    ],
)
def test_what_a_seed_gives_by_table(
    what: str,
    wanted: str,
    given_: str,
    held: str,
    territory: str,
    count: int,
    starving: bool,
    chosen: tuple[int, ...] | None,
) -> None:
    counts = {
        "given": np.array([*map(int, given_)], dtype=np.int32),
        "held": np.array([*map(int, held)], dtype=np.int32),
    }
    masks = {name: np.array([bit == "1" for bit in bits]) for name, bits in (("wanted", wanted), ("own", territory))}
    for seed in range(10):
        chunks = scheduler.superseed_chunks(
            masks["wanted"], **counts, territory=masks["own"], count=count, starving=starving, rng=random.Random(seed)
        )
        if chosen is None:
            assert 1 <= len(chunks) <= count, what
            assert list(chunks) == list(range(chunks[0], chunks[0] + len(chunks))), what
            assert masks["wanted"][list(chunks)].all(), what
        else:
            assert chunks == chosen, what


# The memory


@pytest.mark.parametrize("names", ["a", "ab", "abcdefgh"])
@pytest.mark.parametrize("starving", [False, True])
def test_is_every_chunk_given_once_before_any_is_repeated(names: str, starving: bool) -> None:
    seed = Seed(*names)
    first = [chunk for turn in range(CHUNKS) for chunk in seed.asked(names[turn % len(names)], starving=starving)]
    assert sorted(first) == list(range(CHUNKS))
    repeated = [seed.asked(name, 3, starving=starving) for name in names]
    assert all(repeated) == (starving and len(names) > 1), "it repeats for the hungry only"


def test_is_a_batch_at_most_what_was_asked_for_with_nothing_left_out_between() -> None:
    seed = Seed("a")
    batches: list[tuple[int, ...]] = []
    while batch := seed.asked("a", 5):
        assert len(batch) <= 5
        given = set(itertools.chain(*batches))
        assert list(batch) == [chunk for chunk in range(batch[0], batch[-1] + 1) if chunk not in given]
        batches.append(batch)
    assert sorted(chunk for batch in batches for chunk in batch) == list(range(CHUNKS))
    assert max(map(len, batches)) > 1


def test_do_two_seeds_give_everything_once_between_them() -> None:
    one, two = Seed("a", "b", rank=0, seeds=2), Seed("a", "b", rank=1, seeds=2)
    of_one, of_two = one.drained("a", "b"), two.drained("a", "b")
    assert sorted(of_one) == list(range(0, CHUNKS, 2))
    assert sorted(of_two) == list(range(1, CHUNKS, 2))


def test_does_a_seed_take_over_the_territory_of_one_that_is_gone() -> None:
    seed = Seed("a", rank=1, seeds=2)
    seed.drained("a")
    seed.rank, seed.seeds = 0, 1
    assert sorted(seed.drained("a")) == list(range(0, CHUNKS, 2))


def test_does_one_that_is_hungry_get_the_rarest_chunk() -> None:
    seed = Seed("a", "b", "c")
    of_a = seed.drained("a")
    for name in ("a", "b"):
        seed.has(name, *(chunk for chunk in of_a if chunk != 7))
    assert seed.asked("c", 5) == ()
    assert seed.asked("c", 5, starving=True) == (7,)


def test_is_what_newcomers_hold_already_not_given_first() -> None:
    seed = Seed("a")
    seed.joined("resumed", range(8))
    assert sorted(seed.drained("a")) == [8, 9, 10, 11], "the rest can be had from the one that resumed"


def test_is_a_resumed_newcomer_given_only_what_it_lacks() -> None:
    seed = Seed()
    seed.joined("resumed", range(1, CHUNKS))
    assert seed.asked("resumed", CHUNKS, starving=True) == (0,)


def test_is_what_a_newcomer_got_elsewhere_not_given_to_it() -> None:
    seed = Seed("a")
    seed.has("a", *range(CHUNKS - 1))
    assert seed.asked("a", CHUNKS) == (CHUNKS - 1,)


def test_does_a_failed_transfer_make_its_chunks_ungiven() -> None:
    seed = Seed("a", "b")
    of_a = seed.drained("a")
    assert seed.asked("b") == ()
    seed.failed("a", *of_a[:3])
    assert sorted(seed.drained("b")) == sorted(of_a[:3])


def test_does_what_failed_and_arrived_from_another_stay_given() -> None:
    seed = Seed("a", "b")
    (chunk,) = seed.asked("a")
    seed.has("a", chunk)
    seed.failed("a", chunk)
    assert chunk not in seed.drained("b")


def test_does_a_newcomer_that_leaves_make_its_chunks_ungiven() -> None:
    seed = Seed("a", "b")
    of_a = seed.drained("a")
    seed.left("a")
    assert sorted(seed.drained("b")) == sorted(of_a)


def test_does_a_burst_after_all_have_left_find_a_seed_as_good_as_new() -> None:
    seed = Seed("a")
    seed.has("a", *seed.drained("a"))
    assert repr(seed.superseed) == "<Superseed 12/12 given | 1 newcomers>"
    seed.left("a")
    assert repr(seed.superseed) == "<Superseed 0/12 given | 0 newcomers>"
    seed.joined("b")
    seed.joined("c")
    assert sorted(seed.drained("b", "c")) == list(range(CHUNKS))


def test_does_what_one_that_left_passed_on_stay_given() -> None:
    seed = Seed("a", "b", "c")
    (chunk,) = seed.asked("a")
    for name in ("a", "b"):
        seed.has(name, chunk)
    seed.left("a")
    assert chunk not in seed.drained("c")


def test_does_one_that_comes_back_get_what_it_lost() -> None:
    seed = Seed("a")
    of_a = seed.drained("a")
    seed.joined("a", of_a[:4])
    assert sorted(seed.drained("a")) == sorted(of_a[4:])


def test_is_what_was_lost_unseen_given_again_to_one_that_asks_twice() -> None:
    """A wrong chunk, or bytes in a socket that broke: the newcomer knows, the seed does not."""
    seed = Seed("a")
    seed.has("a", *(chunk for chunk in seed.drained("a") if chunk not in (3, 7)))
    assert seed.asked("a", starving=False) == ()
    assert seed.asked("a", starving=True) == (), "it may be on its way"
    assert sorted([*seed.asked("a", starving=True), *seed.asked("a", starving=True)]) == [3, 7]
    assert seed.asked("a", starving=True) == ()


def test_does_what_is_known_to_have_failed_come_before_what_may_be_lost() -> None:
    seed = Seed("a")
    seed.drained("a")
    assert seed.asked("a", starving=True) == ()
    seed.failed("a", 3)
    assert seed.asked("a", 5, starving=True) == (3,)


def test_is_one_that_has_everything_given_nothing_however_often_it_asks() -> None:
    seed = Seed("a")
    seed.has("a", *range(CHUNKS))
    assert [seed.asked("a", starving=True) for _ in range(4)] == [()] * 4


def test_what_only_the_seed_has_is_what_newcomers_want_and_none_holds() -> None:
    seed = Seed("a", "b", chunks=4)
    assert seed.superseed.only_here() == {0, 1, 2, 3}
    seed.has("a", 0, 1)
    assert seed.superseed.only_here() == {2, 3}
    assert seed.superseed.only_here({NodeId("b")}) == {2, 3}
    assert seed.superseed.only_here({NodeId("a")}) == {0, 1, 2, 3}, "what leaves is not counted on"
    seed.left("a")
    assert seed.superseed.only_here() == {0, 1, 2, 3}
    seed.has("b", 0, 1, 2, 3)
    assert seed.superseed.only_here() == set()
    seed.left("b")
    assert seed.superseed.only_here() == set()
    seed.joined("c", holds=[0], wants=[0, 1])
    assert seed.superseed.only_here() == {1}


def test_is_a_stranger_given_nothing() -> None:
    seed = Seed("a")
    assert seed.asked("stranger", 3, starving=True) == ()
    seed.has("stranger", 1)
    seed.failed("stranger", 1)
    seed.left("stranger")
    assert sorted(seed.drained("a")) == list(range(CHUNKS))


def test_is_a_newcomer_that_wants_a_part_sent_nothing_else() -> None:
    seed = Seed("all")
    seed.joined("part", holds=[3], wants=[3, 4, 5])
    assert sorted(seed.drained("part")) == [4, 5]
    assert not set(seed.drained("all")) & {4, 5}, "they are out already: the others can be had from the newcomer"


def test_what_of_a_part_is_lost_is_sent_again_and_nothing_else() -> None:
    seed = Seed()
    seed.joined("part", wants=[4, 5])
    assert sorted(seed.drained("part", starving=True)) == [4, 5]
    assert sorted(seed.drained("part", starving=True)) == [4, 5], "at its second request it counts as lost"


def test_does_check_see_a_count_that_is_off() -> None:
    seed = Seed("a")
    seed.superseed._given[0] += 1
    with pytest.raises(LocalProtocolError, match="counts do not add up"):
        seed.superseed.check()


@given(seed=st.integers(0, 2**32), seeds=st.integers(1, 3))
@settings(max_examples=100)
def test_whatever_happens_counts_add_up_and_no_peer_is_given_what_it_has(seed: int, seeds: int) -> None:
    dice = random.Random(seed)
    giver = Seed(seeds=seeds)
    holds: dict[str, set[int]] = {}
    sent: dict[str, set[int]] = {}
    starved: dict[str, bool] = {}
    for _ in range(60):
        name, some = dice.choice("abc"), dice.sample(range(CHUNKS), dice.randrange(4))
        match dice.choice(["joined", "left", "has", "failed", "asked", "asked", "asked", "starving"]):
            case "joined":
                giver.joined(name, some)
                holds[name], sent[name], starved[name] = set(some), set(), False
            case "left":
                giver.left(name)
                holds.pop(name, None)
            case "has" if name in holds:
                giver.has(name, *some)
                holds[name] |= set(some)
            case "failed" if name in holds:
                giver.failed(name, *some)
                sent[name] -= set(some)
            case "asked" | "starving" as how if name in holds:
                starving, count = how == "starving", dice.randrange(1, 4)
                chunks = giver.asked(name, count, starving=starving)
                assert len(set(chunks)) == len(chunks) <= count
                assert not holds[name] & set(chunks), "it has one of them"
                if sent[name] & set(chunks):
                    assert starving, "it was sent one of them, and can do without"
                    assert starved[name], "it was sent one of them, which may be on its way"
                    assert holds[name] | sent[name] == set(range(CHUNKS)), "it was sent one of them, and not all others"
                    sent[name] = set()  # all of that counts as lost, so each of it may be given once more
                sent[name] |= set(chunks)
                starved[name] = not chunks and (starving or starved[name])
    assert (giver.superseed._given >= 0).all()
    assert (giver.superseed._held >= 0).all()


@given(seed=st.integers(0, 2**32), names=st.sampled_from(["ab", "abcde"]))
@settings(max_examples=50)
def test_whoever_asks_whenever_no_chunk_is_given_twice_before_all_are_once(seed: int, names: str) -> None:
    dice, giver, times = random.Random(seed), Seed(*names), Counter[int]()
    while len(times) < CHUNKS:
        name = dice.choice(names)
        chunks = giver.asked(name, dice.randrange(1, 4), starving=dice.random() < 0.5)
        times.update(chunks)
        assert max(times.values(), default=0) <= 1
        if dice.random() < 0.5:
            giver.has(name, *chunks)
