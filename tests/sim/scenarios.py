"""What can go wrong in a simulated cluster: one coroutine each, played while the newcomers fetch.

A scenario waits for a state of the swarm, not for a time, does its harm, and ends. Its name is its function's, so that
one word on the command line replays it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from .cluster import Cluster

Scenario: TypeAlias = "Callable[[Cluster], Coroutine[Any, Any, None]]"

SEED, FIRST, LATE = "seed-0", "newcomer-0", "newcomer-late"
LONG_S = 60.0
PAUSES_S = (2.0, 20.0)  # newcomers wait for 30 s


async def undisturbed(cluster: Cluster) -> None:
    """Nothing happens."""


async def seed_dies(cluster: Cluster) -> None:
    """The first seed dies as soon as the newcomers together hold everything."""
    await cluster.until(lambda: cluster.spread() == 1.0)
    await cluster.kill(SEED)


async def seed_dies_early(cluster: Cluster) -> None:
    """The first seed dies while some chunks are nowhere else."""
    await cluster.until(lambda: cluster.spread() >= 0.5)
    await cluster.kill(SEED)


async def seed_falls_silent(cluster: Cluster) -> None:
    """The first seed's machine vanishes once the newcomers together hold everything; nobody is told."""
    await cluster.until(lambda: cluster.spread() == 1.0)
    await cluster.kill(SEED, silent=True)


async def seeds_leave_together(cluster: Cluster) -> None:
    """All seeds are told to end at a quarter, within a second."""
    await cluster.until(lambda: cluster.fetched(FIRST) >= 0.25)
    seeds = [name for name, member in cluster.members.items() if not member.fetch]
    await cluster.leave(*seeds, within_s=LONG_S, apart_s=cluster.dice.choice((0.0, cluster.dice.uniform(0, 1))))


async def newcomer_falls_silent(cluster: Cluster) -> None:
    """A newcomer's machine vanishes at half; nobody is told."""
    await cluster.until(lambda: cluster.fetched(FIRST) >= 0.5)
    await cluster.kill(FIRST, silent=True)


async def newcomer_dies(cluster: Cluster) -> None:
    """A newcomer's process is killed at half."""
    await cluster.until(lambda: cluster.fetched(FIRST) >= 0.5)
    await cluster.kill(FIRST)


async def newcomer_is_late(cluster: Cluster) -> None:
    """One more newcomer asks when the first is halfway."""
    await cluster.until(lambda: cluster.fetched(FIRST) >= 0.5)
    await cluster.newcomer(LATE)


async def newcomer_is_slow(cluster: Cluster) -> None:
    """One newcomer's links are ten times slower than everybody's."""
    host = cluster.fabric.hosts[FIRST]
    host.up_bytes_per_s /= 10
    host.down_bytes_per_s /= 10


async def link_is_lost(cluster: Cluster) -> None:
    """The link between the first newcomer and the first seed breaks at a quarter; both live on."""
    await cluster.until(lambda: cluster.fetched(FIRST) >= 0.25)
    cluster.fabric.cut(FIRST, SEED)


async def partition_heals(cluster: Cluster) -> None:
    """Half of the newcomers are cut off at a quarter, until their links have broken; then all is whole again."""
    await cluster.until(lambda: cluster.fetched(FIRST) >= 0.25)
    newcomers = [name for name, member in cluster.members.items() if member.fetch]
    apart = newcomers[: len(newcomers) // 2]
    cluster.fabric.partition(apart)
    await cluster.until(lambda: cluster.linked(FIRST) < len(apart))
    cluster.fabric.heal()


async def seed_pauses(cluster: Cluster) -> None:
    """The first seed's process stands still for a while, twice, from a quarter on."""
    await cluster.until(lambda: cluster.fetched(FIRST) >= 0.25)
    for _ in range(2):
        await cluster.pause(SEED, seconds=cluster.dice.uniform(*PAUSES_S))
        await asyncio.sleep(cluster.dice.uniform(0, 1))


async def newcomer_pauses(cluster: Cluster) -> None:
    """A newcomer's process stands still at a quarter, for longer than every deadline of a fetch."""
    await cluster.until(lambda: cluster.fetched(FIRST) >= 0.25)
    await cluster.pause(FIRST, seconds=2 * cluster.setup.stall_timeout_s)


async def all_pause(cluster: Cluster) -> None:
    """The machine of all processes is suspended at a quarter, for longer than every deadline of a fetch."""
    await cluster.until(lambda: cluster.fetched(FIRST) >= 0.25)
    await cluster.pause(*cluster.members, seconds=2 * cluster.setup.stall_timeout_s)


_ALL: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        undisturbed,
        seed_dies,
        seed_dies_early,
        seed_falls_silent,
        seeds_leave_together,
        newcomer_falls_silent,
        newcomer_dies,
        newcomer_is_late,
        newcomer_is_slow,
        link_is_lost,
        partition_heals,
        seed_pauses,
        newcomer_pauses,
        all_pause,
    )
}


def names() -> list[str]:
    """All scenarios."""
    return list(_ALL)


def named(name: str) -> Scenario:
    """The scenario with this name. Raises KeyError."""
    return _ALL[name]
