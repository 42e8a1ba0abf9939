"""Whom a newcomer links with: a pure function of who is known to have what it fetches.

A link costs both ends messages about every chunk, so that a newcomer keeps about a dozen. What matters is that they are
spread evenly: a newcomer with half the links of the others gets half of what they get. So it opens a few at once,
the rest when everybody has had time for that, takes the least loaded of a few random candidates, and is itself full at
`LINKS_FULL`; only who has everything takes more. In swarms of up to a dozen everyone is linked with everyone.

Seeds come on top and fill nobody: they give each chunk once and rest, so that who counted them had fewer to ask.

Simulated (64 newcomers, 512 chunks, one seed), last newcomer over the lower bound: 8 links at once and no upper bound
1.4; so many at once but full at 14, 1.22; a few first, full at 16, 1.10; least loaded of 16 candidates, 1.06.
Seeds on top (32 newcomers, two seeds): 1.11 to 1.09, and from 1.18 to 1.08 where half of them come at half time.

Must not know: sockets, clocks, links themselves. Randomness is handed in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.protocol.messages import NodeId

LINKS_FIRST = 4  # at once
LINKS_WANTED = 12  # from SETTLE_S on
LINKS_FULL = 16  # a newcomer accepts no more; whoever asks looks elsewhere
SEEDS_WANTED = 2
LINKS_MOST = LINKS_WANTED + SEEDS_WANTED
NEAR_PART = 0.5
PROBES = 16  # candidates looked at: fewer find no free ones, more all find the same
SETTLE_S = 0.1  # by then a burst has opened its first links
LOOK_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Candidate:
    """A member that has some of the artifact, or the `whole` of it. `load`: how busy it is, in any unit.

    `borders` on the way to it: 0 it is on this host, 1 in this rack, 2 elsewhere.
    """

    node: NodeId
    whole: bool
    distance: int
    load: float


def choose(
    linked: Sequence[Candidate], others: Sequence[Candidate], *, wanted: int, rng: random.Random
) -> list[Candidate]:
    """Those of `others`, who are not full, to link with now, so that about `wanted` links besides seeds come about.

    Some that have the whole first; of the rest half on this host, half of what is left in this rack, if there are any.
    """
    whole = [other for other in others if other.whole]
    seeds = sum(one.whole for one in linked)
    most = wanted + min(SEEDS_WANTED, seeds + len(whole))
    chosen = rng.sample(whole, max(0, min(SEEDS_WANTED - seeds, len(whole), most - len(linked))))
    counted = [*linked, *chosen]
    room = most
    rest = [other for other in others if other not in chosen]
    distance = sorted({one.distance for one in (*counted, *rest)})
    for border in distance:
        here = sum(one.distance == border for one in counted)
        share = room if border == distance[-1] else math.ceil(NEAR_PART * room)
        near = [other for other in rest if other.distance == border]
        probed = rng.sample(near, min(PROBES, len(near)))
        probed.sort(key=_load)
        taken = probed[: max(0, min(share - here, most - len(linked) - len(chosen)))]
        chosen += taken
        room -= here + len(taken)
    return chosen


def _load(candidate: Candidate) -> float:
    return candidate.load
