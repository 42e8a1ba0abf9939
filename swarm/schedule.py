"""What to ask whom next: one pure function of what a download sees.

The policy: every peer is kept busy with batches that it needs about `BATCH_S` to send, so that fast links carry many
chunks a request and slow links one. A batch is a run of chunks, for sequential reads and compact messages, that
starts at a random one of the rarest, so that newcomers who ask the same seed at the same time take different parts
and can feed each other. When nothing is left to ask, the endgame asks a second holder for chunks that are already on
their way.

Must not know: sockets, clocks, messages. Randomness is handed in.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

BATCH_S = 0.05  # long against a message's cost (about 0.1 ms), short against what a lost peer may hold up
BATCHES_OUTSTANDING = 2  # one on the wire, one asked for, so that the wire never waits for a request
COPIES_MAX = 2  # holders asked for the same chunk in the endgame


@dataclass(frozen=True)
class PeerView:
    """One peer, as a download sees it. `rate_bytes_per_s` 0: not measured yet."""

    name: str
    holds: Mask
    outstanding: int
    rate_bytes_per_s: float
    asked: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True)
class View:
    """All that `plan` may look at. Masks have one entry per chunk."""

    missing: Mask
    requested: npt.NDArray[np.uint8]  # peers each chunk is being asked of now
    chunk_bytes: int
    batch_chunks_max: int
    peers: Sequence[PeerView]


@dataclass(frozen=True)
class Ask:
    """Ask `peer` for these chunks, ascending, as one transfer; and why these."""

    peer: str
    chunks: tuple[int, ...]
    why: str


def plan(view: View, rng: random.Random) -> list[Ask]:
    """The requests to make now. Empty when every peer is busy or nobody has anything that is wanted."""
    open_peers = [peer for peer in view.peers if peer.outstanding < BATCHES_OUTSTANDING]
    if not open_peers:
        return []
    free: Mask = view.missing & (view.requested == 0)
    copies = view.requested.copy()
    rarity = np.zeros(len(free), dtype=np.int32)
    for peer in view.peers:
        rarity += peer.holds
    rng.shuffle(open_peers)
    open_peers.sort(key=lambda peer: peer.outstanding)
    asks = []
    for peer in open_peers:
        if chunks := _batch(free & peer.holds, rarity, _batch_chunks(peer, view, free), rng):
            asks.append(Ask(peer.name, chunks, "rarest"))
            free[list(chunks)] = False
        elif not peer.outstanding and not free.any() and (chunks := _second_copies(view, copies, peer, rng)):
            asks.append(Ask(peer.name, chunks, "endgame"))
            copies[list(chunks)] += 1
    return asks


def _batch_chunks(peer: PeerView, view: View, free: Mask) -> int:
    """Chunks that this peer sends in about BATCH_S, but never more than its fair part of what is left."""
    by_rate = int(peer.rate_bytes_per_s * BATCH_S / view.chunk_bytes)
    fair = int(free.sum()) // (2 * len(view.peers))
    return max(1, min(by_rate, fair, view.batch_chunks_max))


def _batch(candidates: Mask, rarity: npt.NDArray[np.int32], wanted: int, rng: random.Random) -> tuple[int, ...]:
    """Up to `wanted` candidates in a row, from a random one of the rarest on."""
    indices = np.flatnonzero(candidates)
    if not len(indices):
        return ()
    rarities = rarity[indices]
    rarest = np.flatnonzero(rarities == rarities.min())
    start = int(rarest[rng.randrange(len(rarest))])
    following = indices[start : start + wanted]
    in_a_row = following - np.arange(len(following)) == following[0]
    return tuple(int(index) for index in following[in_a_row])


def _second_copies(view: View, copies: npt.NDArray[np.uint8], peer: PeerView, rng: random.Random) -> tuple[int, ...]:
    wanted = np.flatnonzero(view.missing & peer.holds & (copies > 0) & (copies < COPIES_MAX))
    wanted = wanted[[int(index) not in peer.asked for index in wanted]]
    return (int(wanted[rng.randrange(len(wanted))]),) if len(wanted) else ()
