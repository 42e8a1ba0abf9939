"""Do N nodes read one copy, in few requests, as fast as the origin gives it, whatever happens to them?"""

from __future__ import annotations

import random

import pytest

from .readers import play

MIB = 1 << 20


@pytest.mark.parametrize("nodes", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_is_one_copy_read_in_few_requests(nodes: int, seed: int) -> None:
    run = play(random.Random(seed), nodes=nodes).run()
    assert run.copies <= 1.05
    assert run.requests <= 1.2 * (run.size / (64 * MIB) + 8) + nodes
    assert run.ended_s <= 1.15 * run.size / run.total


CUT_BY_LAYERS = [int(size * MIB) for size in (133.9, 123.6, 132.4, 123.6)] + [60]  # as published models are


@pytest.mark.parametrize("uneven", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_are_requests_few_where_streams_share_a_bottleneck_unevenly(nodes: int, uneven: float) -> None:
    run = play(random.Random(nodes), nodes=nodes, sizes=CUT_BY_LAYERS, total=12.5e6)
    run.uneven, run.delay_s = uneven, 0.1
    run.run()
    assert run.requests <= 1.2 * (run.size / (64 * MIB) + len(CUT_BY_LAYERS))
    assert run.copies <= 1.02
    assert run.ended_s <= 1.05 * run.size / run.total


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_do_readers_add_up_where_each_connection_is_limited(nodes: int) -> None:
    run = play(random.Random(nodes), nodes=nodes, total=1e12, each=10e6).run()
    streams = nodes * max(1, 8 // nodes)
    assert run.ended_s <= 1.2 * run.size / (streams * 10e6)
    assert run.copies <= 1.05


def test_is_the_rest_of_a_slow_reader_taken_over() -> None:
    run = play(random.Random(5), nodes=4, total=1e12, each=20e6)
    run.readers[0].slow = 0.02
    run.run()
    assert run.ended_s <= 1.5 * run.size / (3 * 2 * 20e6)
    assert run.copies <= 1.1


def test_does_one_reader_do_where_the_origin_refuses_all_others() -> None:
    run = play(random.Random(6), nodes=8)
    for reader in run.readers[1:]:
        reader.slow = 0.0
    run.run()
    assert run.copies <= 1.02
    assert run.ended_s <= 1.1 * run.size / run.total


def test_do_two_groups_that_meet_halfway_share_what_they_have() -> None:
    run = play(random.Random(7), nodes=8)
    for number, reader in enumerate(run.readers):
        reader.group = number % 2
    run.meet_s = 0.5 * run.size / run.total
    run.run()
    assert run.copies <= 1.6


def test_do_few_readers_read_where_few_may() -> None:
    run = play(random.Random(8), nodes=8, readers_max=2)
    run.run()
    assert sum(bool(reader.held.any()) for reader in run.readers) == 2
    assert run.copies <= 1.05


def test_do_latecomers_take_their_part() -> None:
    run = play(random.Random(9), nodes=8, total=1e12, each=10e6)
    for number, reader in enumerate(run.readers):
        reader.starts_s = number * 0.7
    run.run()
    assert run.copies <= 1.1
    assert sum(bool(reader.held.any()) for reader in run.readers) == 8


@pytest.mark.parametrize(
    "seed", [*range(30), *(pytest.param(number, marks=pytest.mark.integration) for number in range(30, 100))]
)
def test_is_everything_read_whoever_dies_or_dawdles(seed: int) -> None:
    dice = random.Random(seed)
    nodes = dice.choice([2, 3, 5, 8])
    size, files = dice.choice([20, 200, 600]) * MIB, dice.choice([1, 3, 40])
    run = play(dice, nodes=nodes, sizes=[size // files] * files)
    run.delay_s = dice.choice([0.05, 0.2])
    for reader in run.readers[1:]:  # the first one lives and reads
        what = dice.random()
        if what < 0.2:
            reader.dies_s = dice.uniform(0.2, 8.0)
        elif what < 0.4:
            reader.slow = dice.choice([0.0, 0.05, 0.5])
        elif what < 0.6:
            reader.starts_s = dice.uniform(0.0, 5.0)
    run.run()
    dead = sum(reader.dies_s < run.ended_s for reader in run.readers)
    assert run.copies <= 1.35 + dead
