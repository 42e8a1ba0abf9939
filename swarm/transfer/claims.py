"""Claims and proofs of a promised artifact, as a state machine: which chunk digests to believe, and whom to ban.

    reader   hashes a chunk that it reads from the origin, and claims (chunk, digest)
    peer     checks the chunk against the claim of its sender, holds it, and passes the claim on with the reader's name
    file     counts when its content is the one that the origin lists: then all its claims are proven

A claim is believed for one purpose only: to hold a chunk until its file is complete. When the content of a complete
file is wrong, some of its chunks are read from the origin again, in stages: one chunk of each reader and all disputed
ones, then all chunks of the readers that were wrong, then all chunks of others, then the own ones. A reader whose claim
is disproved is banned. A relay is banned only when it has passed on wrong claims of `RELAYED_MAX` readers: it cannot
know better before its own file is complete, and it may have made up the readers.

A file that the origin lists by ETag has no content to compare. One chunk of each other reader, every
`SAMPLE_EVERY`th chunk, and all chunks of readers that were wrong elsewhere are read again; if all of them agree, the
file counts. It counts no more when one of its readers turns out to be wrong later (`reopen`).

Must not know: files, sockets, hash functions, how chunks are read again.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from swarm.content.manifest import Digests, Manifest
from swarm.content.promise import ETAG
from swarm.errors import LocalProtocolError
from swarm.protocol import messages
from swarm.protocol.messages import NodeId
from swarm.transfer.offers import Claim, Offers

T = TypeVar("T")

XXH3_BYTES, CLAIM_BYTES = 16, 48  # of the first digest, and of both
RELAYED_MAX = 3  # readers whose wrong claims a relay may pass on, before it counts as their author
SAMPLE_EVERY = 64
CULPRITS_MAX = 4096  # readers and relays that were wrong: beyond that the oldest are forgotten


class ClaimRun(NamedTuple):
    """Claims of one reader for consecutive chunks from `first` on."""

    first: int
    reader: NodeId
    digests: tuple[Digests, ...]


@dataclass(frozen=True)
class BanClaimant:
    """Exchange nothing with this peer any more: a claim of it is disproved."""

    peer: NodeId
    why: str


@dataclass
class _Doubt:
    """A complete file with the wrong content."""

    stage: int = 0
    again: set[int] = field(default_factory=set)  # chunks read again since
    wrong: set[NodeId] = field(default_factory=set)  # readers of chunks that differed then


class Claims:
    """The claims of one promised artifact at one node."""

    def __init__(self, manifest: Manifest, *, node: NodeId, rng: random.Random) -> None:
        self.manifest = manifest
        self.must_read: set[int] = set()  # held chunks to be read from the origin again, by this node itself
        self.proven: set[int] = set()  # file numbers
        self.banned: dict[NodeId, None] = {}
        self._node = node
        self._rng = rng
        self._held: dict[int, Claim] = {}  # of the chunks in the store
        self._offers = Offers(len(manifest.chunks))  # of chunks of files that are not proven
        self._distrusted: dict[NodeId, None] = {}  # readers that were wrong, as relays tell
        self._relayed: dict[NodeId, set[NodeId]] = {}  # by relay: such readers
        self._doubts: dict[int, _Doubt] = {}
        self._sampled: set[int] = set()

    # Claims of peers

    def told(self, peer: NodeId, runs: Iterable[ClaimRun]) -> tuple[list[int], list[BanClaimant]]:
        """A linked peer claims digests of chunks that it holds. Returns the chunks to believe it, and bans."""
        usable: list[int] = []
        bans: list[BanClaimant] = []
        if peer in self.banned:
            return usable, bans
        for run in runs:
            for chunk, digests in enumerate(run.digests, run.first):
                if chunk >= len(self.manifest.chunks) or peer in self.banned:
                    break
                if run.reader in self._distrusted and run.reader != peer:
                    self._offers.drop(peer, chunk)
                    continue
                claim = Claim(digests, run.reader)
                if self._is_proven(chunk):
                    bans += self._judge(peer, chunk, claim)
                elif self._offers.put(peer, chunk, claim):
                    usable.append(chunk)
        return usable, bans

    def left(self, peer: NodeId) -> None:
        """The link to a peer is gone."""
        self._offers.left(peer)

    def expected(self, peer: NodeId, chunk: int) -> Digests | None:
        """The digests that a chunk from this peer must have: proven ones, or those that it claims; None without."""
        if self._is_proven(chunk):
            return self._held[chunk].digests
        offer = self._offers.get(peer, chunk)
        return offer.digests if offer else None

    # Chunks of this node

    def landed(self, chunk: int, digests: Digests, peer: NodeId) -> None:
        """A chunk from a peer lies in the store, with these digests."""
        offer = self._offers.get(peer, chunk)
        self._held[chunk] = offer if offer and offer.digests == digests else Claim(digests, peer)

    def read(self, chunk: int, digests: Digests, *, reader: NodeId | None = None) -> None:
        """A chunk that this node read from the origin lies in the store; `reader`: another node, in a resumed fetch."""
        before = self._held.get(chunk)
        self._held[chunk] = Claim(digests, reader or self._node)
        if chunk in self.must_read:
            self.must_read.discard(chunk)
            doubt = self._doubts.get(self.manifest.chunks[chunk].file)
            if doubt and before and before.digests != digests:
                doubt.wrong.add(before.reader)

    def __contains__(self, chunk: int) -> bool:
        """Whether a chunk is held."""
        return chunk in self._held

    def claim(self, chunk: int) -> Claim:
        """The claim of a held chunk."""
        return self._held[chunk]

    def offered(self, peer: NodeId, chunks: Iterable[int]) -> list[int]:
        """Those of the chunks whose digests are known: proven, or claimed by this peer."""
        return [chunk for chunk in chunks if self._is_proven(chunk) or self._offers.get(peer, chunk)]

    def runs(self, chunks: Iterable[int]) -> Iterator[ClaimRun]:
        """The claims of these held chunks, ascending, for peers."""
        known = ((chunk, self._held[chunk]) for chunk in chunks if chunk in self._held)
        order = itertools.count()
        for (_, reader), group in itertools.groupby(known, key=lambda pair: (pair[0] - next(order), pair[1].reader)):
            pairs = list(group)
            yield ClaimRun(pairs[0][0], reader, tuple(claim.digests for _, claim in pairs))

    # Files

    def proved(self, file: int) -> list[BanClaimant]:
        """All chunks of a file are held and its content is right."""
        self.proven.add(file)
        if doubt := self._doubts.pop(file, None):
            for reader in doubt.wrong - {self._node}:
                _keep(self._distrusted, reader, None)
        bans: list[BanClaimant] = []
        for chunk in self._chunks(file):
            for peer, offer in self._offers.of(chunk):
                bans += self._judge(peer, chunk, offer)
        self._offers.settle(self._chunks(file))
        return bans

    def disproved(self, file: int) -> list[int]:
        """All chunks of a file are held and its content is wrong: the chunks to read again.

        Empty when all were read again: then the origin's bytes do not have the content that it lists.
        """
        doubt = self._doubts.setdefault(file, _Doubt())
        others = [chunk for chunk in self._chunks(file) if self._held[chunk].reader != self._node]
        while doubt.stage < 4:
            doubt.stage += 1
            chosen: Sequence[int] = self._chunks(file)
            if doubt.stage == 1:
                chosen = [*self._one_of_each(others), *(chunk for chunk in others if self._disputed(chunk))]
            elif doubt.stage == 2:
                chosen = [chunk for chunk in others if self._held[chunk].reader in doubt.wrong]
            elif doubt.stage == 3:
                chosen = others
            if again := sorted(set(chosen) - doubt.again):
                doubt.again.update(again)
                self.must_read.update(again)
                return again
        return []

    def sample(self, file: int) -> list[int]:
        """The chunks of a complete file without a known content to read again; empty if the file counts now.

        It counts when no chunk differed the second time; else `disproved` says what to read next.
        """
        if file in self._sampled:
            return [] if not self._doubts[file].wrong else self.disproved(file)
        self._sampled.add(file)
        self._doubts[file] = _Doubt(stage=1)
        others = [chunk for chunk in self._chunks(file) if self._held[chunk].reader != self._node]
        chosen = sorted({*self._one_of_each(others), *others[::SAMPLE_EVERY], *self.suspect(file)})
        self._doubts[file].again.update(chosen)
        self.must_read.update(chosen)
        return chosen

    def suspect(self, file: int) -> list[int]:
        """The chunks of a complete file whose readers were wrong elsewhere."""
        return [c for c in self._chunks(file) if (r := self._held[c].reader) in self.banned or r in self._distrusted]

    def reopen(self) -> list[int]:
        """Files count no more that no content has proven, and that have chunks of readers that were wrong elsewhere.

        Returns these chunks, which are to be read again.
        """
        again: list[int] = []
        for file in filter(self.is_weak, sorted(self.proven)):
            if chunks := self.suspect(file):
                self.proven.discard(file)
                self._doubts[file] = _Doubt(stage=1, again=set(chunks))
                again += chunks
        self.must_read.update(again)
        return again

    def is_weak(self, file: int) -> bool:
        """Whether the origin lists no hash of a file."""
        return self.manifest.files[file].content.startswith(ETAG)

    def _one_of_each(self, chunks: Iterable[int]) -> list[int]:
        by_reader: dict[NodeId, list[int]] = {}
        for chunk in chunks:
            by_reader.setdefault(self._held[chunk].reader, []).append(chunk)
        return [self._rng.choice(of_reader) for _, of_reader in sorted(by_reader.items())]

    def _disputed(self, chunk: int) -> bool:
        own = self._held[chunk].digests
        return any(offer.digests != own for _, offer in self._offers.of(chunk))

    def _chunks(self, file: int) -> range:
        return range(*self.manifest.first_chunks[file : file + 2])

    def _is_proven(self, chunk: int) -> bool:
        return self.manifest.chunks[chunk].file in self.proven

    def _judge(self, peer: NodeId, chunk: int, offer: Claim) -> list[BanClaimant]:
        """Compares a peer's claim of a proven chunk."""
        if offer.digests == self._held[chunk].digests:
            return []
        if offer.reader != peer:
            _keep(self._distrusted, offer.reader, None)
            relayed = self._relayed.get(peer, set()) | {offer.reader}
            _keep(self._relayed, peer, relayed)
            if len(relayed) < RELAYED_MAX:
                return []
        _keep(self.banned, peer, None)
        self._offers.left(peer)
        return [BanClaimant(peer, f"claimed a wrong digest of chunk {chunk}")]

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold."""
        if any(chunk not in self._held for chunk in self.must_read):
            raise LocalProtocolError(f"{self!r}: a chunk is to be read again that was never held")
        if any(chunk not in self._held for file in self.proven for chunk in self._chunks(file)):
            raise LocalProtocolError(f"{self!r}: a proven file lacks a chunk")

    def __repr__(self) -> str:
        return (
            f"<Claims {self.manifest.digest[:8]} {len(self._held)} held, {len(self.proven)} of "
            f"{len(self.manifest.files)} files proven, {len(self.must_read)} to read again>"
        )


def claim_messages(claims: Claims, chunks: Iterable[int]) -> list[messages.ChunkClaims]:
    """The messages with the claims of these held chunks, ascending."""
    found: list[messages.ClaimedRun] = []
    most = messages.CLAIMS_BYTES_MAX // CLAIM_BYTES
    for run in claims.runs(chunks):
        for start in range(0, len(run.digests), most):
            part = b"".join(digests.xxh3 + digests.blake3 for digests in run.digests[start : start + most])
            found.append(messages.ClaimedRun(run.first + start, run.reader, part))
    groups: list[list[messages.ClaimedRun]] = []
    size = 0
    for claimed in found:
        size += len(claimed.digests)
        if not groups or size > messages.CLAIMS_BYTES_MAX or len(groups[-1]) == messages.CLAIMED_RUNS_MAX:
            groups.append([])
            size = len(claimed.digests)
        groups[-1].append(claimed)
    return [messages.ChunkClaims(claims.manifest.digest, tuple(group)) for group in groups]


def claimed_runs(message: messages.ChunkClaims, chunks: int) -> list[ClaimRun]:
    """The claims of a message for an artifact of so many chunks. Raises ValueError for others."""
    found = []
    for run in message.runs:
        if len(run.digests) % CLAIM_BYTES or run.first + len(run.digests) // CLAIM_BYTES > chunks:
            raise ValueError("claims digests of chunks that do not exist")
        parts = (run.digests[at : at + CLAIM_BYTES] for at in range(0, len(run.digests), CLAIM_BYTES))
        found.append(ClaimRun(run.first, run.reader, tuple(Digests(p[:XXH3_BYTES], p[XXH3_BYTES:]) for p in parts)))
    return found


def _keep(culprits: dict[NodeId, T], node: NodeId, value: T) -> None:
    """Remembers a culprit; beyond CULPRITS_MAX forgets the oldest."""
    culprits.pop(node, None)
    culprits[node] = value
    if len(culprits) > CULPRITS_MAX:
        del culprits[next(iter(culprits))]
