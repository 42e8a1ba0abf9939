"""What to ask whom next, and what a seed gives: pure functions of what a download, or a seed, sees.

A newcomer keeps every peer busy with batches that the peer needs about `BATCH_S` to send, so that fast links carry many
chunks a request and slow links one. Of a peer that is itself incomplete it asks for chunks from a random one of the
rarest on. A seed it merely asks for some, and the seed chooses (`give`): it hands out every chunk once,
to whoever asks, before it repeats any. So no two newcomers import the same chunk, what they have to offer each other
is as different as can be, and a seed sends about one copy of the model, however many newcomers there are. When
nothing is left to ask, the endgame asks a second holder for chunks that are already on their way.

Measured in the simulation with 512 chunks, last newcomer over the lower bound, and what the seed sent:

    newcomers                                       8               16
    rarest first from everyone                      1.3, 1.3        1.4, 1.5 models
    the seed chooses                                1.02, 1.00      1.06, 1.00 models

Must not know: sockets, clocks, messages. Randomness is handed in.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int32]

BATCH_S = 0.05  # long against a message's cost (about 0.1 ms), short against what a lost peer may hold up
BATCHES_OUTSTANDING = 2  # one on the wire, one asked for, so that the wire never waits for a request
FEW_PEERS = 4  # beyond that the others fill the wire meanwhile, and what is asked early is tied to a slow peer
COPIES_MAX = 2  # holders asked for the same chunk in the endgame
STREAMS_WANTED = 6  # incoming streams that fill a link even when some of them are slow


@dataclass(frozen=True)
class PeerView:
    """One peer, as a download sees it. `rate_bytes_per_s` 0: not measured yet. `gives`: a seed that chooses."""

    name: str
    holds: Mask
    outstanding: int
    rate_bytes_per_s: float
    gives: bool = False


@dataclass(frozen=True)
class View:
    """All that `plan` may look at. Arrays have one entry per chunk; `rarity` counts the peers that hold it."""

    missing: Mask
    requested: npt.NDArray[np.uint8]  # peers each chunk is being asked of now
    rarity: Counts
    chunk_bytes: int
    batch_chunks_max: int
    peers: Sequence[PeerView]


@dataclass(frozen=True)
class Ask:
    """Ask `peer` for these chunks, ascending, as one transfer, or for up to `count` of its own choice; and why.

    `hungry` tells a seed that the newcomer cannot keep its link busy otherwise.
    """

    peer: str
    why: str
    chunks: tuple[int, ...] = ()
    count: int = 0
    hungry: bool = False


def plan(view: View, rng: random.Random) -> list[Ask]:
    """The requests to make now. Empty when every peer is busy or nobody has anything that is wanted."""
    free: Mask = view.missing & (view.requested == 0)
    copies = view.requested.copy()
    hungry = _hungry(view.peers)
    open_peers = [peer for peer in view.peers if peer.outstanding < outstanding_max(peer.gives, len(view.peers))]
    rng.shuffle(open_peers)
    open_peers.sort(key=lambda peer: peer.outstanding)
    asks = []
    for peer in open_peers:
        wanted = _batch_chunks(peer, view, int(free.sum()))
        if not wanted:
            if not peer.outstanding and (chunks := _second_copies(view, copies, peer, rng)):
                asks.append(Ask(peer.name, "endgame", chunks))
                copies[list(chunks)] += 1
        elif peer.gives:
            asks.append(Ask(peer.name, "its choice", count=wanted, hungry=hungry))
        elif chunks := _batch(free & peer.holds, view.rarity, wanted, rng):
            asks.append(Ask(peer.name, "rarest", chunks))
            free[list(chunks)] = False
    return asks


def give(
    wanted: Mask, *, given: Counts, held: Counts, territory: Mask, count: int, hungry: bool, rng: random.Random
) -> tuple[int, ...]:
    """The chunks that a seed gives a newcomer that wants these: ascending; none when it had better wait.

    `given` counts what this seed sent and `held` what newcomers are known to hold, per chunk. A seed first gives every
    chunk of its `territory` once (with several seeds each has its own), to whoever asks. It repeats one only for a
    newcomer that is hungry, and then the chunk of which there are fewest.
    """
    copies = np.maximum(given, held)
    if chunks := _batch(wanted & territory & (copies == 0), copies, count, rng):
        return chunks
    return _batch(wanted, copies, 1, rng) if hungry else ()


def outstanding_max(gives: bool, peers: int) -> int:
    """Batches that may be outstanding from one of so many peers."""
    return BATCHES_OUTSTANDING if gives or peers <= FEW_PEERS else 1


def _hungry(peers: Sequence[PeerView]) -> bool:
    others = [peer for peer in peers if not peer.gives]
    return 2 * sum(peer.outstanding > 0 for peer in others) < min(len(others), STREAMS_WANTED) or not others


def _batch_chunks(peer: PeerView, view: View, free: int) -> int:
    """Chunks that this peer sends in about BATCH_S, but never more than its fair part of what is free."""
    by_rate = int(peer.rate_bytes_per_s * BATCH_S / view.chunk_bytes)
    fair = free // (2 * len(view.peers))
    return min(free, max(1, min(by_rate, fair, view.batch_chunks_max)))


def _batch(candidates: Mask, rarity: Counts, wanted: int, rng: random.Random) -> tuple[int, ...]:
    """Up to `wanted` candidates, ascending, from a random one of the rarest on: nearly sequential for the disks."""
    indices = np.flatnonzero(candidates)
    if not len(indices):
        return ()
    rarities = rarity[indices]
    rarest = np.flatnonzero(rarities == rarities.min())
    start = int(rarest[rng.randrange(len(rarest))])
    return tuple(int(index) for index in indices[start : start + wanted])


def _second_copies(view: View, copies: npt.NDArray[np.uint8], peer: PeerView, rng: random.Random) -> tuple[int, ...]:
    """One chunk on its way from somebody else: a peer is asked only while nothing is outstanding from it."""
    wanted = np.flatnonzero(view.missing & peer.holds & (copies > 0) & (copies < COPIES_MAX))
    return (int(wanted[rng.randrange(len(wanted))]),) if len(wanted) else ()
