"""Which members a newcomer links to: a pure function of the known holders of its artifact.

A link costs both ends messages about every chunk, so a newcomer keeps about LINKS_WANTED. They must be spread evenly:
a newcomer with half as many links gets half the rate. So it dials LINKS_FIRST at once and the rest after SETTLE_S,
prefers the least loaded of PROBES random candidates, and refuses links at LINKS_FULL while it fetches. In swarms of up
to LINKS_WANTED nodes all nodes are linked.

Seeds come on top and do not count towards LINKS_FULL: a seed sends each chunk once and rests, so newcomers that counted
seeds had fewer sources.

Simulated (64 newcomers, 512 chunks, one seed), last newcomer over the lower bound: 8 links at once and no upper bound
1.4; 8 at once, full at 14, 1.22; a few first, full at 16, 1.10; least loaded of 16 candidates, 1.06.
Seeds on top (32 newcomers, two seeds): 1.11 to 1.09, and from 1.18 to 1.08 where half of them come at half time.

Must not know: sockets, clocks, links.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.protocol.messages import NodeId

LINKS_FIRST = 4  # at once
LINKS_WANTED = 12  # from SETTLE_S on
LINKS_FULL = 16
SEEDS_WANTED = 2
LINKS_MOST = LINKS_WANTED + SEEDS_WANTED
NEAR_PART = 0.5
PROBES = 16  # fewer miss idle candidates; with more, all newcomers choose the same
SETTLE_S = 0.1  # by then the newcomers of a burst have their first links
LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Candidate:
    """A holder of some chunks of the artifact, or of the `whole`. `load`: in any unit.

    `distance`: 0 on this host, 1 in this rack, 2 elsewhere.
    """

    node: NodeId
    whole: bool
    distance: int
    load: float


def choose(
    linked: Sequence[Candidate], others: Sequence[Candidate], *, wanted: int, rng: random.Random
) -> list[Candidate]:
    """The candidates of `others` to dial, for about `wanted` links besides those to seeds.

    Up to SEEDS_WANTED holders of the whole first. Of the rest half on this host, half of the remainder in this rack.
    """
    whole = [other for other in others if other.whole]
    seeds = sum(candidate.whole for candidate in linked)
    most = wanted + min(SEEDS_WANTED, seeds + len(whole))
    chosen = rng.sample(whole, max(0, min(SEEDS_WANTED - seeds, len(whole), most - len(linked))))
    counted = [*linked, *chosen]
    room = most
    rest = [other for other in others if other not in chosen]
    distances = sorted({candidate.distance for candidate in (*counted, *rest)})
    for distance in distances:
        here = sum(candidate.distance == distance for candidate in counted)
        share = room if distance == distances[-1] else math.ceil(NEAR_PART * room)
        near = [other for other in rest if other.distance == distance]
        probed = rng.sample(near, min(PROBES, len(near)))
        probed.sort(key=lambda candidate: candidate.load)
        taken = probed[: max(0, min(share - here, most - len(linked) - len(chosen)))]
        chosen += taken
        room -= here + len(taken)
    return chosen
