"""The claims of linked peers for chunks of a promise. Equal claims are kept once: many honest peers cost little.

    chunk ──> distinct claims, at most ALTERNATIVES_MAX        peer ──> a byte for each chunk: the number of its claim

A claim takes some 400 bytes. Honest peers agree, except where several nodes read a chunk from the origin. Claims that
no peer makes any more give their place to others, so a peer that comes and goes keeps no place.

Must not know: which claims are right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from swarm.content.manifest import Digests
from swarm.protocol.messages import NodeId

ALTERNATIVES_MAX = 8  # different claims of a chunk; a further one is not believed


class Claim(NamedTuple):
    """The digests of a chunk, XXH3 and BLAKE3, as `reader` claims to have read it from the origin."""

    digests: Digests
    reader: NodeId


class Offers:
    """What peers claim of `length` chunks."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._claims: dict[int, list[Claim]] = {}
        self._numbers: dict[NodeId, bytearray] = {}  # place in the list of the chunk, plus 1; 0 for no claim

    def put(self, peer: NodeId, chunk: int, claim: Claim) -> bool:
        """Replaces a peer's claim of a chunk. Returns whether there was room for it."""
        numbers = self._numbers.get(peer)
        if numbers is None:
            numbers = self._numbers[peer] = bytearray(self._length)
        numbers[chunk] = 0
        claims = self._claims.setdefault(chunk, [])
        if claim in claims:
            numbers[chunk] = claims.index(claim) + 1
        elif len(claims) < ALTERNATIVES_MAX:
            claims.append(claim)
            numbers[chunk] = len(claims)
        elif unused := set(range(1, ALTERNATIVES_MAX + 1)) - {made[chunk] for made in self._numbers.values()}:
            numbers[chunk] = min(unused)
            claims[numbers[chunk] - 1] = claim
        return numbers[chunk] > 0

    def get(self, peer: NodeId, chunk: int) -> Claim | None:
        """A peer's claim of a chunk."""
        numbers = self._numbers.get(peer)
        return self._claims[chunk][numbers[chunk] - 1] if numbers and numbers[chunk] else None

    def of(self, chunk: int) -> Iterator[tuple[NodeId, Claim]]:
        """The claims of a chunk, by peer."""
        for peer in list(self._numbers):
            if claim := self.get(peer, chunk):
                yield peer, claim

    def drop(self, peer: NodeId, chunk: int) -> None:
        """Forgets a peer's claim of a chunk."""
        if numbers := self._numbers.get(peer):
            numbers[chunk] = 0

    def left(self, peer: NodeId) -> None:
        """Forgets a peer."""
        self._numbers.pop(peer, None)

    def settle(self, chunks: Iterable[int]) -> None:
        """Forgets all claims of these chunks."""
        for chunk in chunks:
            self._claims.pop(chunk, None)
            for numbers in self._numbers.values():
                numbers[chunk] = 0

    def __len__(self) -> int:
        """The number of different claims that are kept."""
        return sum(map(len, self._claims.values()))

    def __repr__(self) -> str:
        return f"<Offers {len(self)} claims of {len(self._claims)} chunks by {len(self._numbers)} peers>"
