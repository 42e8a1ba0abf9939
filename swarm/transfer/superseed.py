"""Super-seeding (BEP 16) of an artifact, as a state machine: the chunks sent to each newcomer so far.

`scheduler.superseed_chunks` chooses among them. A chunk counts as given from the moment it is sent, until its transfer
fails or its newcomer leaves: the next burst starts afresh. Bytes can also be lost unnoticed, in a broken socket or as a
corrupt chunk, and then the newcomer asks again although every chunk was sent to it. At its second such request in a row
the chunks that it has not announced count as lost.

Must not know: sockets, clocks.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from swarm.content.bitfield import Bitfield
from swarm.errors import LocalProtocolError
from swarm.protocol.messages import NodeId
from swarm.transfer import scheduler


@dataclass
class _Newcomer:
    holds: Bitfield
    sent: Bitfield
    wants: Bitfield
    starved: bool = False  # its last request was refused while it was starving


class Superseed:
    """An artifact of `length` chunks on a seed."""

    def __init__(self, length: int, *, rng: random.Random) -> None:
        self._given = np.zeros(length, dtype=np.int32)
        self._held = np.zeros(length, dtype=np.int32)
        self._newcomers: dict[NodeId, _Newcomer] = {}
        self._own = 0, 1, np.ones(length, dtype=np.bool_)  # the territory of rank 0 of 1 seed
        self._rng = rng

    def joined(self, peer: NodeId, holds: Bitfield, wants: Bitfield | None = None) -> None:
        """A newcomer joins that holds these chunks, and is sent chunks of `wants` only; None for all chunks."""
        self.left(peer)
        everything = Bitfield.full(holds.length)
        self._newcomers[peer] = _Newcomer(holds, Bitfield(holds.length), everything if wants is None else wants)
        self._held += holds.mask

    def has(self, peer: NodeId, chunks: Iterable[int]) -> None:
        """A newcomer verified more chunks."""
        if newcomer := self._newcomers.get(peer):
            for chunk in chunks:
                if chunk not in newcomer.holds:
                    newcomer.holds.add(chunk)
                    self._held[chunk] += 1

    def choose(
        self, peer: NodeId, count: int, *, starving: bool, rank: int, seeds: int, among: frozenset[int] | None = None
    ) -> tuple[int, ...]:
        """The chunks to send to a newcomer now, at most `count`; empty to refuse its request.

        This seed is number `rank` of `seeds`; chunk c is the territory of seed c modulo `seeds`. `among`: no others.
        """
        newcomer = self._newcomers.get(peer)
        if newcomer is None:
            return ()
        wanted = newcomer.wants.mask & ~(newcomer.holds.mask | newcomer.sent.mask)
        if starving and newcomer.starved and not wanted.any():  # at the first, chunks or announcements may be in flight
            self.failed(peer, newcomer.sent)
            wanted = newcomer.wants.mask & ~newcomer.holds.mask
        if among is not None:
            wanted = wanted & Bitfield(len(wanted), sorted(among)).mask
        chunks = scheduler.superseed_chunks(
            wanted,
            given=self._given,
            held=self._held,
            territory=self._territory(rank, seeds),
            count=count,
            starving=starving,
            rng=self._rng,
        )
        for chunk in chunks:
            newcomer.sent.add(chunk)
            self._given[chunk] += 1
        newcomer.starved = not chunks and (starving or newcomer.starved)
        return chunks

    def only_here(self, leaving: Collection[NodeId] = ()) -> frozenset[int]:
        """The chunks that a newcomer still wants and that none is known to hold, but those that are `leaving`."""
        wanted, held = np.zeros(len(self._held), dtype=np.bool_), self._held.copy()
        for name, newcomer in self._newcomers.items():
            wanted |= newcomer.wants.mask & ~newcomer.holds.mask
            if name in leaving:
                held -= newcomer.holds.mask
        return frozenset(np.flatnonzero(wanted & (held == 0)).tolist())

    def _territory(self, rank: int, seeds: int) -> scheduler.Mask:
        if self._own[:2] != (rank, seeds):
            self._own = rank, seeds, np.arange(len(self._given)) % seeds == rank
        return self._own[2]

    def failed(self, peer: NodeId, chunks: Iterable[int]) -> None:
        """A transfer of these chunks failed."""
        if newcomer := self._newcomers.get(peer):
            for chunk in chunks:
                if chunk in newcomer.sent and chunk not in newcomer.holds:
                    newcomer.sent.discard(chunk)
                    self._given[chunk] -= 1

    def left(self, peer: NodeId) -> None:
        """A newcomer is gone, and with it its chunks."""
        if newcomer := self._newcomers.pop(peer, None):
            self._held -= newcomer.holds.mask
            self._given -= newcomer.sent.mask

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold."""
        for count, fields in (
            (self._given, [newcomer.sent for newcomer in self._newcomers.values()]),
            (self._held, [newcomer.holds for newcomer in self._newcomers.values()]),
        ):
            if (count != sum((field.mask.astype(np.int32) for field in fields), np.zeros_like(count))).any():
                raise LocalProtocolError(f"{self!r}: counts do not add up")

    def __repr__(self) -> str:
        once = int((np.maximum(self._given, self._held) > 0).sum())
        return f"<Superseed {once}/{len(self._given)} given | {len(self._newcomers)} newcomers>"
