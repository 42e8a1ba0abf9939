"""The download of one artifact, as a state machine: events in, actions out, no socket and no clock.

    chunk:      missing -> requested -> verified          back to missing when its transfer fails or its bytes are wrong
    transfer:   asked   -> granted   -> ended             one transfer carries a batch of chunks from one peer
    peer:       joined  -> left or banned                 rests after a failure, longer after each one in a row

`scheduler.plan` decides whom to ask for what; this machine keeps the view that `plan` looks at, and the rules about
peers that fail, stay silent or send wrong bytes. `check()` states the invariants, and the simulation calls it after
every event.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Manifest
from swarm.errors import LocalProtocolError
from swarm.protocol.messages import PACE_BYTES_PER_S_MAX, REQUEST_CHUNKS_MAX, NodeId
from swarm.transfer import scheduler

# One wrong chunk may be a flaky wire. So many from one peer, and more than this part of all that it sent, is a broken
# or lying one.
CORRUPT_CHUNKS_MAX, CORRUPT_PART_MAX = 3, 0.05
GRANT_PATIENCE_S = 10.0  # a peer that has not granted by then has more to do than it can say
REST_FIRST_S, REST_LONGEST_S = 0.25, 8.0  # pause after a failure, doubling with each one in a row
DECLINED_REST_S = 0.1  # at least, whatever the seed says
DISTANCE_MAX = 2  # on the way to a peer: of this host, and of this rack
RATE_SMOOTHING = 0.3  # weight of the newest transfer in a peer's measured rate


@dataclass(frozen=True)
class PeerJoined:
    """A peer that holds some of the artifact can be asked from now on. `gives`: it is a seed that chooses.

    `borders`: how many there are on the way to it: 0 it is on this host, 1 in this rack, 2 elsewhere.
    `usual_bytes_per_s`: what is expected of it until it is measured; 0: anything.
    """

    peer: NodeId
    holds: Bitfield
    superseeds: bool = False
    distance: int = 0
    usual_bytes_per_s: float = 0.0


@dataclass(frozen=True)
class Mates:
    """Who fetches the same on this host, and who in this rack (with those on this host), by name. Without oneself."""

    on_host: frozenset[NodeId]
    in_rack: frozenset[NodeId]


@dataclass(frozen=True)
class PeerPlaced:
    """Only now is it known how many borders are on the way to a peer."""

    peer: NodeId
    distance: int


@dataclass(frozen=True)
class PeerHas:
    """A peer verified more chunks."""

    peer: NodeId
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class PeerLeft:
    """The link to a peer is gone; its transfers fail with it."""

    peer: NodeId
    why: str


@dataclass(frozen=True)
class Granted:
    """A peer starts to send a transfer of these chunks."""

    peer: NodeId
    transfer: int
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Declined:
    """A seed would rather not repeat itself: ask others, and it again after `retry_s`."""

    peer: NodeId
    transfer: int
    retry_s: float


@dataclass(frozen=True)
class ChunksVerified:
    """Chunks of a transfer arrived, their digests are right, and they lie in their places."""

    peer: NodeId
    transfer: int
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class ChunkCorrupt:
    """A chunk arrived with the wrong digest."""

    peer: NodeId
    transfer: int
    chunk: int


@dataclass(frozen=True)
class TransferEnded:
    """All bytes of a transfer arrived. Says nothing about their digests."""

    peer: NodeId
    transfer: int


@dataclass(frozen=True)
class TransferFailed:
    """A transfer broke off, was refused or fell silent; what of it did not arrive is missing again."""

    peer: NodeId
    transfer: int
    why: str
    retry_s: float = 0.0


@dataclass(frozen=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True)
class Ask:
    """Ask a peer for these chunks, or for up to `count` of its choice, as one transfer; and the schedule's reason."""

    peer: NodeId
    transfer: int
    chunks: tuple[int, ...]
    why: str
    count: int = 0
    starving: bool = False
    sources: int = 0  # how many peers there are to be asked, by one who is not alone on its host and in its rack
    pace_bytes_per_s: int = 0  # what arrived so far, per second since the download began


@dataclass(frozen=True)
class Cancel:
    """Tell a peer that a transfer is not wanted any more, and stop receiving it."""

    peer: NodeId
    transfer: int
    why: str


@dataclass(frozen=True)
class Announce:
    """Tell everyone interested that these chunks can be had here."""

    chunks: tuple[int, ...]


@dataclass(frozen=True)
class Ban:
    """Have nothing to do with a peer any more."""

    peer: NodeId
    why: str


@dataclass(frozen=True)
class Complete:
    """Every chunk is verified."""


@dataclass(frozen=True)
class GiveUp:
    """Nothing has arrived for too long; `tried` says what each peer did last."""

    missing: int
    waited_s: float
    tried: tuple[str, ...]


Event: TypeAlias = (
    PeerJoined
    | PeerPlaced
    | Mates
    | PeerHas
    | PeerLeft
    | Granted
    | Declined
    | ChunksVerified
    | ChunkCorrupt
    | TransferEnded
    | TransferFailed
    | Tick
)
Action: TypeAlias = Ask | Cancel | Announce | Ban | Complete | GiveUp


@dataclass
class _Transfer:
    peer: NodeId
    chunks: set[int]  # not arrived yet; of a peer's own choice: none before the grant
    size: int
    asked_at: float
    granted_at: float | None = None


@dataclass
class _Peer:
    holds: Bitfield
    superseeds: bool
    distance: int
    transfers: set[int] = field(default_factory=set)
    usual_bytes_per_s: float = 0.0
    rate_bytes_per_s: float = 0.0
    corrupt: int = 0
    correct: int = 0
    failures: int = 0
    resting_until: float = 0.0
    last_end: float = 0.0
    nothing_wanted: bool = False  # had nothing wanted at the last look; cleared by whatever may change that


class Download:
    """One artifact coming in. `held` is shared with whoever serves it on; only this machine adds to it.

    Chunks cross the border of a host, or of a rack, about once: of peers beyond one, only those are asked that this
    `node` imports for all within, and that nobody within is known to have. While it is starved it asks for anything.
    """

    def __init__(
        self,
        manifest: Manifest,
        held: Bitfield,
        *,
        node: NodeId,
        now: float,
        stall_timeout_s: float,
        transfer_ids: Iterator[int],
        rng: random.Random,
    ) -> None:
        self.manifest = manifest
        self.held = held
        self.sources: dict[NodeId, int] = {}  # bytes of verified chunks by peer
        self._has_mates = False
        self.rejected_chunks = 0
        self.done = False
        self._node = node
        self._stall_timeout_s = stall_timeout_s
        self._rng = rng
        self._now = now
        self._began = now
        self._progress_at = now
        self._peers: dict[NodeId, _Peer] = {}
        self._banned: set[NodeId] = set()
        self._transfers: dict[int, _Transfer] = {}
        self._requested = np.zeros(held.length, dtype=np.uint8)
        self._free = ~held.mask  # missing and asked of nobody
        self._free_count = held.length - len(held)
        self._rarity = np.zeros(held.length, dtype=np.int32)
        # By how many borders a peer is away: the chunks imported over so many, and how often they are to be had nearer.
        self._imports = [np.ones(held.length, dtype=np.bool_) for _ in range(DISTANCE_MAX + 1)]
        self._nearer = [np.zeros(held.length, dtype=np.int32) for _ in range(DISTANCE_MAX + 1)]
        self._starved = False
        self._transfer_ids = transfer_ids  # shared by all downloads of a node: unique on every link
        self._last_words: dict[NodeId, str] = {}

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about one event. After Complete or GiveUp the machine is done and does nothing more."""
        self._now = now
        if self.done:
            return []
        actions = self._react(event)
        if self.held.complete:
            return [*actions, *self._finish("complete"), Complete()]
        if (waited_s := now - self._progress_at) > self._stall_timeout_s:
            missing = self.held.length - len(self.held)
            return [*actions, *self._finish("stalled"), GiveUp(missing, waited_s, self._tried())]
        return [*actions, *self._ask()]

    def stop(self) -> list[Cancel]:
        """Ends the machine before it is complete: nothing is asked for any more."""
        return [] if self.done else self._finish("stopped")

    def _react(self, event: Event) -> list[Action]:
        match event:
            case PeerJoined():
                self._join(event)
            case PeerPlaced(name, distance):
                if known := self._peers.get(name):
                    self._join(PeerJoined(name, known.holds, known.superseeds, distance))
            case Mates(on_host, in_rack):
                self._imports[1] = scheduler.imports(self._node, on_host, self.held.length)
                self._imports[2] = scheduler.imports(self._node, in_rack, self.held.length)
                self._has_mates = bool(on_host or in_rack)
                self._look_again()
            case PeerHas(peer, chunks):
                self._learn(peer, chunks)
            case PeerLeft(peer, why):
                self._leave(peer, why)
            case Granted(_, number, chunks):
                self._granted(number, chunks)
            case Declined(peer, number, retry_s):
                if known := self._peers.get(peer):
                    known.resting_until = self._now + max(retry_s, DECLINED_REST_S)
                self._end(number)
            case ChunksVerified():
                return self._verified(event)
            case ChunkCorrupt():
                return self._corrupt(event)
            case TransferEnded(peer, number):
                self._measure(peer, number)
                self._end(number)
            case TransferFailed(peer, number, why, retry_s):
                self._fail(peer, number, why, retry_s)
            case Tick():
                patience_s = scheduler.starved_after_s(self.manifest.chunk_bytes, self.rate_bytes_per_s)
                if not self._starved and self._now - self._progress_at > patience_s:
                    self._starved = True
                    self._look_again()
                return self._impatient()
            case _:
                raise LocalProtocolError(f"download cannot handle {event!r}")
        return []

    def _join(self, event: PeerJoined) -> None:
        if event.peer in self._banned:
            return
        if known := self._peers.get(event.peer):
            self._count(known, -1)  # it says so again, or its place is known now
            known.holds, known.superseeds, known.distance, known.nothing_wanted = (
                event.holds,
                event.superseeds,
                event.distance,
                False,
            )
        else:
            usual = event.usual_bytes_per_s
            known = self._peers[event.peer] = _Peer(
                event.holds, event.superseeds, event.distance, usual_bytes_per_s=usual
            )
        self._count(known, 1)

    def _count(self, peer: _Peer, sign: int) -> None:
        self._rarity += sign * peer.holds.mask
        for nearer in self._counts_nearer(peer):
            nearer += sign * peer.holds.mask

    def _counts_nearer(self, peer: _Peer) -> list[scheduler.Counts]:
        # What a seed holds is not to be had for the asking.
        return [] if peer.superseeds else self._nearer[peer.distance + 1 :]

    def _learn(self, name: NodeId, chunks: Iterable[int]) -> None:
        if peer := self._peers.get(name):
            counts = (self._rarity, *self._counts_nearer(peer))
            for chunk in chunks:
                if chunk not in peer.holds:
                    peer.holds.add(chunk)
                    for count in counts:
                        count[chunk] += 1
                    if self._free[chunk] or (not self._free_count and chunk not in self.held):
                        peer.nothing_wanted = False

    def _granted(self, number: int, chunks: tuple[int, ...]) -> None:
        if transfer := self._transfers.get(number):
            transfer.granted_at = self._now
            if not transfer.size:  # only now is it known what comes
                transfer.size = self._size(chunks)
                # What it brings twice counts as one copy: another peer may be asked for the second.
                siblings = self._peers[transfer.peer].transfers
                transfer.chunks = set(chunks).difference(*(self._transfers[sibling].chunks for sibling in siblings))
                self._request(transfer.chunks)

    def _verified(self, event: ChunksVerified) -> list[Action]:
        fresh = tuple(chunk for chunk in event.chunks if chunk not in self.held)
        if not fresh:
            return []
        self._progress_at, self._starved = self._now, False
        for chunk in fresh:
            self.held.add(chunk)
            if self._free[chunk]:  # its transfer was given up meanwhile
                self._free[chunk] = False
                self._free_count -= 1
            self._arrived(event.transfer, chunk)
        self.sources[event.peer] = self.sources.get(event.peer, 0) + self._size(fresh)
        if peer := self._peers.get(event.peer):
            peer.failures = 0
            peer.correct += len(fresh)
        actions: list[Action] = [Announce(fresh)]
        for number, other in sorted(self._transfers.items()):  # the endgame's second copies lost
            if other.chunks and all(chunk in self.held for chunk in other.chunks):
                actions.append(Cancel(other.peer, number, "arrived from another peer"))
                self._end(number)
        return actions

    def _corrupt(self, event: ChunkCorrupt) -> list[Action]:
        self.rejected_chunks += 1
        self._arrived(event.transfer, event.chunk)
        peer = self._peers.get(event.peer)
        if peer is None:
            return []
        peer.corrupt += 1
        peer.failures += 1
        self._rest(peer, 0.0)
        why = self._last_words[event.peer] = f"sent {peer.corrupt} wrong chunk{'' if peer.corrupt == 1 else 's'}"
        if peer.corrupt < CORRUPT_CHUNKS_MAX or peer.corrupt <= CORRUPT_PART_MAX * (peer.corrupt + peer.correct):
            return []
        self._banned.add(event.peer)
        cancels: list[Action] = [Cancel(event.peer, number, "banned") for number in sorted(peer.transfers)]
        self._leave(event.peer, why)
        return [*cancels, Ban(event.peer, why)]

    def _impatient(self) -> list[Action]:
        late = [
            (number, transfer)
            for number, transfer in sorted(self._transfers.items())
            if transfer.granted_at is None and self._now - transfer.asked_at > GRANT_PATIENCE_S
        ]
        for number, transfer in late:
            self._fail(transfer.peer, number, f"did not grant within {GRANT_PATIENCE_S:g} s", 0.0)
        return [Cancel(transfer.peer, number, "not granted in time") for number, transfer in late]

    def _ask(self) -> list[Action]:
        peers = self._askable()
        if not peers:
            return []  # most events change nothing about that
        asks = scheduler.plan(self._view(peers), self._rng)
        due = 0 if self._is_alone else len(self._peers), self._pace_bytes_per_s
        actions: list[Action] = []
        for ask in asks:
            number = next(self._transfer_ids)
            self._transfers[number] = _Transfer(ask.peer, set(ask.chunks), self._size(ask.chunks), self._now)
            self._peers[ask.peer].transfers.add(number)
            actions.append(Ask(ask.peer, number, ask.chunks, ask.why, ask.count, ask.starving, *due))
        for name in peers.keys() - {ask.peer for ask in asks}:
            self._peers[name].nothing_wanted = True
        for ask in asks:
            self._request(ask.chunks)
        return actions

    def _askable(self) -> dict[NodeId, _Peer]:
        total = len(self._peers)
        most, most_of_seeds = scheduler.outstanding_max(False, total), scheduler.outstanding_max(True, total)
        return {
            name: peer
            for name, peer in self._peers.items()
            if not peer.nothing_wanted
            and peer.resting_until <= self._now
            and len(peer.transfers) < (most_of_seeds if peer.superseeds else most)
        }

    def _request(self, chunks: Iterable[int]) -> None:
        for chunk in chunks:
            self._requested[chunk] += 1
            if self._free[chunk]:
                self._free[chunk] = False
                self._free_count -= 1
                if not self._free_count:
                    self._look_again()  # the endgame begins

    def _unrequest(self, chunk: int) -> None:
        self._requested[chunk] -= 1
        if chunk not in self.held:
            if not self._requested[chunk]:
                self._free[chunk] = True
                self._free_count += 1
            self._look_again()

    def _look_again(self) -> None:
        for peer in self._peers.values():
            peer.nothing_wanted = False

    def _size(self, chunks: Iterable[int]) -> int:
        return sum(self.manifest.chunks[chunk].size for chunk in chunks)

    def _view(self, askable: dict[NodeId, _Peer]) -> scheduler.View:
        others = [peer for peer in self._peers.values() if not peer.superseeds]
        within: list[scheduler.Mask | None] = [None] * (DISTANCE_MAX + 1)
        if not self._starved:
            for distance in {peer.distance for peer in askable.values()} - {0}:
                within[distance] = self._imports[distance] & (self._nearer[distance] == 0)
        return scheduler.View(
            free=self._free,
            free_count=self._free_count,
            missing=~self.held.mask,
            requested=self._requested,
            rarity=self._rarity,
            chunk_bytes=self.manifest.chunk_bytes,
            batch_chunks_max=REQUEST_CHUNKS_MAX,
            peers=[
                scheduler.PeerView(
                    name,
                    peer.holds.mask,
                    len(peer.transfers),
                    peer.rate_bytes_per_s or peer.usual_bytes_per_s,
                    peer.superseeds,
                    within[peer.distance],
                )
                for name, peer in askable.items()
            ],
            peers_total=len(self._peers),
            starving=scheduler.starving(sum(1 for peer in others if peer.transfers), len(others)),
        )

    @property
    def _is_alone(self) -> bool:
        """Whether nobody else of this host or rack is known to want, or to have, the same."""
        return not self._has_mates and all(peer.distance for peer in self._peers.values())

    @property
    def _pace_bytes_per_s(self) -> int:
        elapsed_s = self._now - self._began
        pace = sum(self.sources.values()) / elapsed_s if elapsed_s > 0 else 0.0
        return min(round(pace), PACE_BYTES_PER_S_MAX)

    def _measure(self, name: NodeId, number: int) -> None:
        peer, transfer = self._peers.get(name), self._transfers.get(number)
        if peer is None or transfer is None or transfer.granted_at is None:
            return
        # Transfers of one peer follow each other on one wire: this one began when the one before it ended.
        seconds = self._now - max(transfer.granted_at, peer.last_end)
        peer.last_end = self._now
        if seconds > 0:
            rate = transfer.size / seconds
            old = peer.rate_bytes_per_s or rate
            peer.rate_bytes_per_s = old + RATE_SMOOTHING * (rate - old)

    def _arrived(self, number: int, chunk: int) -> None:
        transfer = self._transfers.get(number)
        if transfer and chunk in transfer.chunks:
            transfer.chunks.remove(chunk)
            self._unrequest(chunk)

    def _fail(self, name: NodeId, number: int, why: str, retry_s: float) -> None:
        if number in self._transfers and (peer := self._peers.get(name)):  # else the peer left, which says more
            self._last_words[name] = why
            peer.failures += 1
            self._rest(peer, retry_s)
        self._end(number)

    def _rest(self, peer: _Peer, at_least_s: float) -> None:
        pause_s = min(REST_FIRST_S * 2.0 ** (peer.failures - 1), REST_LONGEST_S)
        peer.resting_until = self._now + max(pause_s, at_least_s)

    def _leave(self, name: NodeId, why: str) -> None:
        self._last_words[name] = why
        if peer := self._peers.pop(name, None):
            self._count(peer, -1)
            for number in list(peer.transfers):
                self._end(number)
            self._look_again()

    def _end(self, number: int) -> None:
        if transfer := self._transfers.pop(number, None):
            for chunk in transfer.chunks:
                self._unrequest(chunk)
            if peer := self._peers.get(transfer.peer):
                peer.transfers.discard(number)

    def _finish(self, why: str) -> list[Cancel]:
        self.done = True
        cancels = [Cancel(t.peer, n, why) for n, t in sorted(self._transfers.items()) if t.chunks]
        for number in list(self._transfers):
            self._end(number)
        return cancels

    def _tried(self) -> tuple[str, ...]:
        silent = dict.fromkeys(self._peers, "holds nothing that is missing")
        return tuple(f"{name}: {words}" for name, words in sorted({**silent, **self._last_words}.items()))

    def distance(self, peer: NodeId) -> int | None:
        """How many are on the way to a peer, as far as is known; None: it has not joined."""
        return known.distance if (known := self._peers.get(peer)) else None

    @property
    def rate_bytes_per_s(self) -> float:
        """Measured rate of all peers together that something is asked of."""
        return sum(peer.rate_bytes_per_s for peer in self._peers.values() if peer.transfers)

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold."""
        asked: Iterable[int] = (chunk for t in self._transfers.values() for chunk in t.chunks)
        counts = np.bincount(np.fromiter(asked, dtype=np.int64), minlength=self.held.length)
        holds = {
            "requested counts add up": bool((counts == self._requested).all()),
            "free is missing and not requested": bool((self._free == (~self.held.mask & (counts == 0))).all()),
            "free chunks are counted": int(self._free.sum()) == self._free_count,
            "transfers belong to joined peers": all(t.peer in self._peers for t in self._transfers.values()),
            "peers know their transfers": all(
                n in self._peers[t.peer].transfers for n, t in self._transfers.items() if t.peer in self._peers
            ),
            "nobody banned is joined": not self._banned & set(self._peers),
            "a finished machine asks for nothing": not (self.done and self._transfers),
            "rarity adds up": int(self._rarity.sum()) == sum(len(peer.holds) for peer in self._peers.values()),
            "what is nearer adds up": all(
                int(self._nearer[distance].sum())
                == sum(
                    len(peer.holds) for peer in self._peers.values() if peer.distance < distance and not peer.superseeds
                )
                for distance in range(DISTANCE_MAX + 1)
            ),
        }
        if broken := [name for name, true in holds.items() if not true]:
            raise LocalProtocolError(f"{self!r}: {', '.join(broken)}")

    def __repr__(self) -> str:
        return (
            f"<Download {self.manifest.digest[:8]} {len(self.held)}/{self.held.length} chunks"
            f" | {len(self._peers)} peers | {len(self._transfers)} in flight | {self.rate_bytes_per_s / 1e6:.1f} MB/s>"
        )
