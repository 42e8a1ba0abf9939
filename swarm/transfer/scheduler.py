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

import hashlib
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from swarm.protocol.messages import NodeId

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int32]

BATCH_S = 0.05  # long against a message's cost (about 0.1 ms), short against what a lost peer may hold up
BATCHES_OUTSTANDING = 2  # one on the wire, one asked for, so that the wire never waits for a request
FAIR_BATCH_S = 0.003  # batches do not become shorter towards the end: small ones cost a round trip each
FEW_PEERS = 4  # beyond that the others fill the wire meanwhile, and what is asked early is tied to a slow peer
COPIES_MAX = 2  # holders asked for the same chunk in the endgame
NEWS_CHUNKS, NEWS_MIN_S, NEWS_MAX_S = 4, 0.01, 0.4
STARVED_MIN_S = 0.25
STREAMS_WANTED = 6  # incoming streams that fill a link even when some of them are slow


@dataclass(frozen=True, slots=True)
class PeerView:
    """One peer that may be asked now. `rate_bytes_per_s` 0: not measured yet. `gives`: a seed that chooses.

    `within`: the chunks that may be asked of it, when it is beyond a border that each chunk should cross once.
    """

    name: NodeId
    holds: Mask
    outstanding: int
    rate_bytes_per_s: float
    superseeds: bool = False
    within: Mask | None = None


@dataclass(frozen=True, slots=True)
class View:
    """All that `plan` may look at. Arrays have one entry per chunk; `rarity` counts the peers that hold it.

    `free` chunks are missing and asked of nobody; `free_count` says how many. `peers` may be asked now, out of
    `peers_total`. `hungry`: this newcomer's peers, seeds apart, do not keep its link busy.
    """

    free: Mask
    free_count: int
    missing: Mask
    requested: npt.NDArray[np.uint8]  # peers each chunk is being asked of now
    rarity: Counts
    chunk_bytes: int
    batch_chunks_max: int
    peers: Sequence[PeerView]
    peers_total: int
    starving: bool


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask `peer` for these chunks, ascending, as one transfer, or for up to `count` of its own choice; and why.

    `hungry` tells a seed that the newcomer cannot keep its link busy otherwise.
    """

    peer: NodeId
    why: str
    chunks: tuple[int, ...] = ()
    count: int = 0
    starving: bool = False


def plan(view: View, rng: random.Random) -> list[Ask]:
    """The requests to make now. A peer without one has nothing that is wanted, until it or what is wanted changes."""
    free, free_count = view.free.copy(), view.free_count
    copies = view.requested
    peers = list(view.peers)
    if len(peers) > 1:
        rng.shuffle(peers)
        peers.sort(key=_outstanding)
    asks = []
    for peer in peers:
        if not free_count:
            if not peer.outstanding and (chunks := _second_copy(view, copies, peer, rng)):
                asks.append(Ask(peer.name, "endgame", chunks))
                copies = copies.copy()
                copies[list(chunks)] += 1
            continue
        wanted = _batch_chunks(peer, view, free_count)
        if peer.superseeds:
            asks.append(Ask(peer.name, "its choice", count=wanted, starving=view.starving))
        elif chunks := _batch(free & _lends(peer), view.rarity, wanted, rng):
            asks.append(Ask(peer.name, "rarest", chunks))
            free[list(chunks)] = False
            free_count -= len(chunks)
    return asks


def give(
    wanted: Mask, *, given: Counts, held: Counts, territory: Mask, count: int, starving: bool, rng: random.Random
) -> tuple[int, ...]:
    """The chunks that a seed gives a newcomer that wants these: ascending; none when it had better wait.

    `given` counts what this seed sent and `held` what newcomers are known to hold, per chunk. A seed first gives every
    chunk of its `territory` once (with several seeds each has its own), to whoever asks. It repeats one only for a
    newcomer that is hungry, and then the chunk of which there are fewest.
    """
    copies = np.maximum(given, held)
    if chunks := _batch(wanted & territory & (copies == 0), copies, count, rng):
        return chunks
    return _batch(wanted, copies, 1, rng) if starving else ()


def outstanding_max(superseeds: bool, peers: int) -> int:
    """Batches that may be outstanding from one of so many peers."""
    return BATCHES_OUTSTANDING if superseeds or peers <= FEW_PEERS else 1


def starving(busy: int, peers: int) -> bool:
    """Whether so many busy ones of so many peers, seeds apart, are too few to keep a link busy."""
    return 2 * busy < min(peers, STREAMS_WANTED) or not peers


def _outstanding(peer: PeerView) -> int:
    return peer.outstanding


def _batch_chunks(peer: PeerView, view: View, free: int) -> int:
    """Chunks that this peer sends in about BATCH_S, but of what is free no more than its fair part."""
    by_rate = int(peer.rate_bytes_per_s * BATCH_S / view.chunk_bytes)
    least = int(peer.rate_bytes_per_s * FAIR_BATCH_S / view.chunk_bytes)
    fair = free if view.peers_total == 1 else free // (2 * view.peers_total)
    return min(free, max(1, min(by_rate, max(fair, least), view.batch_chunks_max)))


def _batch(candidates: Mask, rarity: Counts, wanted: int, rng: random.Random) -> tuple[int, ...]:
    """Up to `wanted` candidates, ascending, from a random one of the rarest on, or so many before it that the batch is
    full: nearly sequential for the disks."""
    indices = np.flatnonzero(candidates)
    if not len(indices):
        return ()
    rarities = rarity[indices]
    rarest = np.flatnonzero(rarities == rarities.min())
    start = min(int(rarest[rng.randrange(len(rarest))]), max(0, len(indices) - wanted))
    return tuple(int(index) for index in indices[start : start + wanted])


def _second_copy(view: View, copies: npt.NDArray[np.uint8], peer: PeerView, rng: random.Random) -> tuple[int, ...]:
    """One chunk on its way from somebody else: a peer is asked only while nothing is outstanding from it."""
    wanted = np.flatnonzero(view.missing & _lends(peer) & (copies > 0) & (copies < COPIES_MAX))
    return (int(wanted[rng.randrange(len(wanted))]),) if len(wanted) else ()


def _lends(peer: PeerView) -> Mask:
    return peer.holds if peer.within is None else peer.holds & peer.within


def imports(own: NodeId, mates: Collection[NodeId], length: int) -> Mask:
    """The chunks, out of `length`, that this node brings into a domain for all of it: each has one importer there.

    Rendezvous hashing (Thaler and Ravishankar, 1996): who scores highest for a chunk imports it, so that a member
    that comes or goes moves only its own chunks, and whoever imports into a rack imports into its host as well.
    """
    score = _scores(own, length)
    mine: Mask = np.ones(length, dtype=np.bool_)
    for mate in mates:
        if mate != own:
            others = _scores(mate, length)
            mine &= (score > others) if mate < own else (score >= others)
    return mine


@lru_cache(maxsize=1024)
def _scores(name: NodeId, length: int) -> npt.NDArray[np.uint64]:
    start = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    mixed = start + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # splitmix64
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def news_every_s(chunk_bytes: int, rate_bytes_per_s: float) -> float:
    """How often at most to tell of newly verified chunks while they arrive at this rate.

    Late news costs the swarm, each message both its ends time: simulated with 512 chunks, four chunk times cost nothing
    that two do not, and half the messages.
    """
    if rate_bytes_per_s <= 0:
        return NEWS_MIN_S
    return min(max(NEWS_CHUNKS * chunk_bytes / rate_bytes_per_s, NEWS_MIN_S), NEWS_MAX_S)


def starved_after_s(chunk_bytes: int, rate_bytes_per_s: float) -> float:
    """After how long without a chunk a newcomer takes what it should not import."""
    return max(STARVED_MIN_S, 4 * chunk_bytes / rate_bytes_per_s if rate_bytes_per_s > 0 else 0.0)
