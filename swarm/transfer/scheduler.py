"""Chunk scheduling: which chunks a newcomer requests from which peer, and which chunks a seed sends (BEP 16).

A newcomer keeps every peer busy with batches that take the peer about `BATCH_S` to send: fast links carry many chunks a
request, slow links few. From another newcomer it requests chunks that start at a random chunk among the rarest.
From a seed it requests a number of chunks, and the seed chooses (`superseed_chunks`): every chunk once, to any newcomer
that requests, before it repeats any. So no two newcomers import the same chunk, their holdings differ as much as
possible, and the seed sends about one copy of the model to any number of newcomers. In the endgame, when every missing
chunk has been requested, a second holder is asked for chunks that are still on the wire.

Simulated with 512 chunks, last newcomer over the lower bound, and copies of the model that the seed sent:

    newcomers                       8               16
    rarest first from every peer    1.3, 1.3        1.4, 1.5
    the seed chooses                1.02, 1.00      1.06, 1.00

Pure functions. Must not know: sockets, clocks, messages. The caller passes the random generator.
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

BATCH_S = 0.05  # long against a message's cost (about 0.1 ms), short against the stall of a lost peer
BATCHES_OUTSTANDING = 2  # a batch on the wire and another requested: the wire never waits for a request
FAIR_BATCH_S = 0.003  # the least batch towards the end: a shorter one costs a round trip all the same
FEW_PEERS = 4  # with more peers a second batch gains nothing, and ties chunks to a slow peer
COPIES_MAX = 2  # holders asked for the same chunk in the endgame
ANNOUNCE_CHUNKS, ANNOUNCE_MIN_S, ANNOUNCE_MAX_S = 3, 0.01, 0.4
ANNOUNCE_WAITS_S = 0.05  # so frequent announcements wait for a request or a grant, to share its frame
STARVED_MIN_S = 0.25
STREAMS_WANTED = 6  # incoming streams that fill a link even when some of them are slow


@dataclass(frozen=True, slots=True)
class PeerView:
    """A peer that may be asked now. `rate_bytes_per_s` is 0 until it is measured.

    `superseeds`: a seed that chooses the chunks itself. `within`: the only chunks to request from a distant peer, each
    of which should cross into this host or rack once; None for no limit.
    """

    name: NodeId
    holds: Mask
    outstanding: int
    rate_bytes_per_s: float
    superseeds: bool = False
    within: Mask | None = None


@dataclass(frozen=True, slots=True)
class DownloadView:
    """All state that `plan` reads. Arrays have an entry per chunk.

    `free` chunks are missing and not requested, `free_count` of them. `requested` and `rarity` count the peers that a
    chunk is requested from, and the peers that hold it. `peers` may be asked now, out of `peers_total`. `starving`: the
    peers other than seeds do not keep the link busy.
    """

    free: Mask
    free_count: int
    missing: Mask
    requested: npt.NDArray[np.uint8]
    rarity: Counts
    chunk_bytes: int
    batch_chunks_max: int
    peers: Sequence[PeerView]
    peers_total: int
    starving: bool


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A transfer to request from `peer`: these chunks, ascending, or up to `count` chunks of its choice."""

    peer: NodeId
    why: str
    chunks: tuple[int, ...] = ()
    count: int = 0
    starving: bool = False


def plan(view: DownloadView, rng: random.Random) -> list[PlannedRequest]:
    """The requests to make now. A peer without a request holds no chunk that could be requested from it."""
    free, free_count = view.free.copy(), view.free_count
    copies = view.requested
    peers = list(view.peers)
    if len(peers) > 1:
        rng.shuffle(peers)
        peers.sort(key=_outstanding)
    requests = []
    for peer in peers:
        if not free_count:
            if not peer.outstanding and (chunks := _second_copy(view, copies, peer, rng)):
                requests.append(PlannedRequest(peer.name, "endgame", chunks))
                copies = copies.copy()
                copies[list(chunks)] += 1
            continue
        wanted = _batch_chunks(peer, view, free_count)
        if peer.superseeds:
            requests.append(PlannedRequest(peer.name, "its choice", count=wanted, starving=view.starving))
        elif chunks := _batch(free & _lends(peer), view.rarity, wanted, rng):
            requests.append(PlannedRequest(peer.name, "rarest", chunks))
            free[list(chunks)] = False
            free_count -= len(chunks)
    return requests


def superseed_chunks(
    wanted: Mask, *, given: Counts, held: Counts, territory: Mask, count: int, starving: bool, rng: random.Random
) -> tuple[int, ...]:
    """The chunks that a seed sends to a newcomer now, ascending, at most `count`; empty to refuse the request.

    `wanted` are the newcomer's missing chunks. `given` counts the transmissions of each chunk by this seed, `held` the
    newcomers that hold it. A seed first sends every chunk of its `territory` once; with several seeds each has its own.
    It repeats the chunk with the fewest copies, only for a starving newcomer.
    """
    copies = np.maximum(given, held)
    if chunks := _batch(wanted & territory & (copies == 0), copies, count, rng):
        return chunks
    return _batch(wanted, copies, 1, rng) if starving else ()


def outstanding_max(superseeds: bool, peers: int) -> int:
    """The batches that may be outstanding from a peer, out of `peers`."""
    return BATCHES_OUTSTANDING if superseeds or peers <= FEW_PEERS else 1


def starving(busy: int, peers: int) -> bool:
    """Whether `busy` of `peers`, seeds not counted, are too few to keep a link busy."""
    return 2 * busy < min(peers, STREAMS_WANTED) or not peers


def _outstanding(peer: PeerView) -> int:
    return peer.outstanding


def _batch_chunks(peer: PeerView, view: DownloadView, free: int) -> int:
    """The chunks that a peer sends in about BATCH_S, at most its fair part of the free chunks."""
    by_rate = int(peer.rate_bytes_per_s * BATCH_S / view.chunk_bytes)
    least = int(peer.rate_bytes_per_s * FAIR_BATCH_S / view.chunk_bytes)
    fair = free if view.peers_total == 1 else free // (2 * view.peers_total)
    return min(free, max(1, min(by_rate, max(fair, least), view.batch_chunks_max)))


def _batch(candidates: Mask, rarity: Counts, wanted: int, rng: random.Random) -> tuple[int, ...]:
    """Up to `wanted` candidates, ascending: a run that starts at a random candidate among the rarest.

    It starts earlier where the batch would not be full. Disks read runs nearly sequentially.
    """
    indices = np.flatnonzero(candidates)
    if not len(indices):
        return ()
    rarities = rarity[indices]
    rarest = np.flatnonzero(rarities == rarities.min())
    start = min(int(rarest[rng.randrange(len(rarest))]), max(0, len(indices) - wanted))
    return tuple(int(index) for index in indices[start : start + wanted])


def _second_copy(
    view: DownloadView, copies: npt.NDArray[np.uint8], peer: PeerView, rng: random.Random
) -> tuple[int, ...]:
    """A chunk on its way from another peer. The caller passes only peers with nothing outstanding."""
    wanted = np.flatnonzero(view.missing & _lends(peer) & (copies > 0) & (copies < COPIES_MAX))
    return (int(wanted[rng.randrange(len(wanted))]),) if len(wanted) else ()


def _lends(peer: PeerView) -> Mask:
    return peer.holds if peer.within is None else peer.holds & peer.within


def imports(own: NodeId, mates: Collection[NodeId], length: int) -> Mask:
    """The chunks, out of `length`, that a node imports into its host or rack: each chunk has one importer there.

    Rendezvous hashing (Thaler and Ravishankar, 1996): the member with the highest score for a chunk imports it. A
    member that comes or goes moves only its own chunks, and the importer of a rack also imports into its own host.
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


def announce_every_s(chunk_bytes: int, rate_bytes_per_s: float) -> float:
    """The least seconds between two announcements of verified chunks, which arrive at this rate.

    Late announcements leave peers idle, and each message costs both ends time. Simulated with 512 chunks, intervals of
    three chunk times, and half as long a wait, are better than four without a wait, which need twice the frames.
    """
    if rate_bytes_per_s <= 0:
        return ANNOUNCE_MIN_S
    return min(max(ANNOUNCE_CHUNKS * chunk_bytes / rate_bytes_per_s, ANNOUNCE_MIN_S), ANNOUNCE_MAX_S)


def starved_after_s(chunk_bytes: int, rate_bytes_per_s: float) -> float:
    """The seconds without a chunk after which a newcomer requests chunks that it should not import."""
    return max(STARVED_MIN_S, 4 * chunk_bytes / rate_bytes_per_s if rate_bytes_per_s > 0 else 0.0)
