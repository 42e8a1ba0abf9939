"""Newcomers that fetch parts of an artifact, as the hosts of a pipeline do: real nodes under a virtual clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from . import scenarios
from .cluster import Cluster, Report, Setup

STAGES, REPLICAS, CHUNKS = 4, 2, 64
SETUP = Setup(seeds=1, newcomers=0, chunks=CHUNKS, known="all")
seeds = pytest.mark.parametrize("seed", [1, 2])


def stage(number: int) -> range:
    """The chunks of a stage: a quarter, and the first chunk, which all want."""
    return range(number * CHUNKS // STAGES, (number + 1) * CHUNKS // STAGES)


def names() -> list[tuple[str, int]]:
    return [(f"stage-{number}-{replica}", number) for replica in range(REPLICAS) for number in range(STAGES)]


def played(setup: Setup, scenario: scenarios.Scenario) -> Report:
    print(setup.command)
    report = Cluster(setup).run(scenario)
    print(report)
    assert not report.failed
    assert not report.wrong
    return report


async def pipeline(cluster: Cluster) -> None:
    for name, number in names():
        await cluster.newcomer(name, wanted={0, *stage(number)})


@seeds
def test_does_a_seed_send_each_part_about_once_to_all_its_replicas(seed: int) -> None:
    report = played(replace(SETUP, seed=seed), pipeline)
    assert len(report.finished_s) == STAGES * REPLICAS
    assert 1.0 <= report.seed_models <= 1.4
    chunk_bytes = SETUP.chunk_bytes
    for name, sources in report.sources.items():
        assert sum(sources.values()) <= (CHUNKS // STAGES + 1) * chunk_bytes, f"{name} got more than it wants"


@seeds
def test_do_holders_of_parts_make_up_a_whole_when_the_seed_is_gone(seed: int) -> None:
    async def then_all(cluster: Cluster) -> None:
        await pipeline(cluster)
        await cluster.until(lambda: all(m.outcome for m in cluster.members.values() if m.fetch))
        await cluster.kill("seed-0")
        await cluster.newcomer("all")

    report = played(replace(SETUP, seed=seed), then_all)
    assert len(report.sources["all"]) >= STAGES
    assert sum(report.sources["all"].values()) > (CHUNKS - 1) * SETUP.chunk_bytes


@seeds
def test_do_newcomers_of_a_part_and_of_all_feed_each_other(seed: int) -> None:
    async def mixed(cluster: Cluster) -> None:
        for number in range(3):
            await cluster.newcomer(f"all-{number}")
            await cluster.newcomer(f"part-{number}", wanted=stage(number))

    report = played(replace(SETUP, seed=seed), mixed)
    assert len(report.finished_s) == 6
    assert report.seed_models <= 1.4


@seeds
def test_does_a_part_survive_the_death_of_its_seed_among_its_replicas(seed: int) -> None:
    async def orphans(cluster: Cluster) -> None:
        for number in range(3):
            await cluster.newcomer(f"part-{number}", wanted=stage(1))
        await cluster.until(lambda: cluster.spread() >= 1 / STAGES)
        await cluster.kill("seed-0")

    assert len(played(replace(SETUP, seed=seed), orphans).finished_s) == 3
