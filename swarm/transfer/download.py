"""The download of an artifact, as a state machine: events in, actions out, no socket and no clock.

    chunk:      missing   -> requested -> verified        missing again when its transfer fails or its digest is wrong
    transfer:   requested -> granted   -> ended           a transfer carries a batch of chunks from one peer
    peer:       joined    -> left or banned               rests after a failure, longer after each failure in a row

`scheduler.plan` chooses the requests. This machine keeps the state that `plan` reads, and owns the timing rules:

- A peer is connected to as soon as it joins.
- A transfer is cancelled when it is not granted within `GRANT_PATIENCE_S`, or when its peer then sends no byte for
  `idle_timeout_s`. A slow transfer goes on; the endgame requests a second copy.
- A seed with nothing to give rests for the time that it names; every other failure doubles the rest of its peer.
- The first verified chunk is announced at once, further chunks every `scheduler.announce_every_s`. An announcement may
  wait for half as long, if they are at most `scheduler.ANNOUNCE_WAITS_S` apart. The driver sends a `Tick` at `due_at`.
- The download is complete when the chunks of `wanted` are verified: all chunks, or those of a part. No other chunk is
  requested, or counts as missing.
- After a pause of this process (`Paused`) every deadline starts again.
- The download gives up when no chunk is verified for `stall_timeout_s`, or, if its caller has another source, when no
  joined peer holds a missing chunk for `abandon_s`.

`check()` states the invariants; the simulation calls it after every event.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Manifest
from swarm.errors import LocalProtocolError
from swarm.journal import Paused
from swarm.protocol.messages import PACE_BYTES_PER_S_MAX, REQUEST_CHUNKS_MAX, NodeId
from swarm.transfer import scheduler
from swarm.transfer.download_events import (
    Action,
    Announce,
    Ask,
    Ban,
    Cancel,
    ChunkCorrupt,
    ChunksVerified,
    ClaimDisproved,
    Complete,
    Connect,
    Event,
    GiveUp,
    Granted,
    Mates,
    OriginFailed,
    OriginReadEnded,
    PeerHas,
    PeerJoined,
    PeerLeft,
    PeerPlaced,
    Proven,
    Refused,
    SessionGrew,
    Tick,
    TransferBroke,
    TransferEnded,
    TransferFailed,
)

# A peer is banned after so many wrong chunks, if they are also more than this part of all that it sent: a faulty
# network card may corrupt a few chunks of an honest peer.
CORRUPT_CHUNKS_MAX, CORRUPT_PART_MAX = 3, 0.05
BANNED_MAX = 4096  # banned peers that are remembered; a member may come again under new ids
WORDS_MAX = 256  # peers that left whose last failure is remembered, for the error of a fetch that gives up
GRANT_PATIENCE_S = 10.0
REST_FIRST_S, REST_LONGEST_S = 0.25, 8.0  # rest after a failure, doubling with each in a row
NOTHING_TO_GIVE_REST_S = 0.1  # the least rest of a seed, however short a time it names
DISTANCE_MAX = 2  # 0 same host, 1 same rack, 2 else
DUE_EARLY_S = 1e-6  # a timer may fire so early, by the rounding of its clock: not to be set again for the rest
SIDE_BY_SIDE_MEASURE_S = 0.005
RATE_SMOOTHING = 0.3  # weight of the newest transfer in a peer's measured rate


@dataclass
class _Transfer:
    peer: NodeId
    chunks: set[int]  # not arrived yet; empty until the grant when a seed chooses them
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
    failures: int = 0  # in a row
    received_bytes: int = 0
    heard_at: float = 0.0  # the last tick at which `received_bytes` had changed
    resting_until: float = 0.0
    last_end: float = 0.0
    ended_bytes: int = 0  # of the transfers that have ended since
    streams: int = 1  # transfers that its session carries side by side
    nothing_wanted: bool = False  # `plan` found no chunk to request from it; reset when that may have changed


class Download:
    """An artifact being fetched. `held` is shared with the uploads; only this machine adds to it.

    A chunk crosses into a host or a rack about once: from distant peers a node requests only the chunks that it
    imports for its mates (`scheduler.imports`) and that no nearer peer holds. A starved download requests any chunk.
    """

    def __init__(
        self,
        manifest: Manifest,
        held: Bitfield,
        *,
        node: NodeId,
        now: float,
        idle_timeout_s: float,
        stall_timeout_s: float,
        transfer_ids: Iterator[int],
        rng: random.Random,
        abandon_s: float = math.inf,
        wanted: Bitfield | None = None,
    ) -> None:
        self.manifest = manifest
        self.held = held
        self.wanted = Bitfield.full(held.length) if wanted is None else wanted
        self.sources: dict[NodeId, int] = {}  # bytes of verified chunks by peer
        self.rejected_chunks = 0
        self.done = False
        self.due_at = math.inf  # the time of the next announcement, for which a `Tick` is needed
        self._announced_at = -math.inf
        self._announce_within_s = 0.0
        self._fresh: list[int] = []  # verified and not announced
        self._node = node
        self._has_mates = False
        self._idle_timeout_s = idle_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._abandon_s = abandon_s
        self._rng = rng
        self._now = now
        self._began = now
        self._progress_at = now
        self._sourced_at = now  # the last tick at which a peer held a missing chunk; kept if `abandon_s` is finite
        self._peers: dict[NodeId, _Peer] = {}
        self._banned: dict[NodeId, None] = {}  # the oldest first
        self._transfers: dict[int, _Transfer] = {}
        self._requested = np.zeros(held.length, dtype=np.uint8)
        self._free = self.wanted.mask & ~held.mask  # missing and not requested
        self._free_count = self._missing_count = int(self._free.sum())
        self._rarity = np.zeros(held.length, dtype=np.int32)
        # By distance: the chunks that this node imports over it, and the number of nearer peers that hold each chunk.
        self._imports = [np.ones(held.length, dtype=np.bool_) for _ in range(DISTANCE_MAX + 1)]
        self._nearer = [np.zeros(held.length, dtype=np.int32) for _ in range(DISTANCE_MAX + 1)]
        self._starved = False
        self._redundant = False  # a seed has granted chunks that had arrived meanwhile
        self._proven = False  # of a promise
        self._excused_until = -math.inf  # the origin asked to wait
        self._transfer_ids = transfer_ids  # shared by all downloads of the node: unique on every link
        self._last_words: dict[NodeId, str] = {}

    def handle(self, event: Event, now: float) -> list[Action]:
        """The actions that one event causes; none after Complete or GiveUp."""
        self._now = now
        if self.done:
            return []
        actions = self._react(event)
        if not self._missing_count:
            if self.manifest.promised and not self._proven:
                self._progress_at = now  # the content of its files is being hashed, or some chunks are read again
                return [*self._announce(at_once=True), *actions]
            return [*self._announce(at_once=True), *actions, *self._finish("complete"), Complete()]
        waited_s = now - max(self._progress_at, self._excused_until)
        if waited_s > self._stall_timeout_s or now - self._sourced_at > self._abandon_s:
            give_up = GiveUp(self._missing_count, waited_s, self._tried())
            return [*self._announce(at_once=True), *actions, *self._finish("stalled"), give_up]
        return [*self._announce(), *actions, *self._ask()]

    def stop(self) -> list[Action]:
        """Ends the download before it is complete."""
        return [] if self.done else [*self._announce(at_once=True), *self._finish("stopped")]

    def _react(self, event: Event) -> list[Action]:
        match event:
            case PeerJoined():
                return self._join(event)
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
                return [TransferFailed(peer, number, why) for number in self._leave(peer, why)]
            case Granted(_, number, chunks):
                self._granted(number, chunks)
            case Refused():
                return self._refused(event)
            case SessionGrew(name, streams):
                if grown := self._peers.get(name):
                    grown.streams = streams
            case ChunksVerified():
                return self._verified(event)
            case ChunkCorrupt():
                return self._corrupt(event)
            case TransferEnded(peer, number):
                self._measure(peer, number)
                self._end(number)
            case TransferBroke(peer, number, why):
                return self._fail(peer, number, why)
            case Tick() | Paused():
                return self._pass_time(event)
            case _:
                return self._promised(event)
        return []

    def _promised(self, event: Event) -> list[Action]:
        """The events of promises."""
        match event:
            case ClaimDisproved(peer, why):
                return self._ban(peer, why)
            case Proven():
                self._proven = True
            case OriginFailed(origin, why, wait_s):
                self._last_words[origin] = why
                self._excused_until = max(self._excused_until, self._now + wait_s)
            case OriginReadEnded():
                return self._announce(at_once=True)
            case _:
                raise LocalProtocolError(f"download cannot handle {event!r}")
        return []

    def _pass_time(self, event: Tick | Paused) -> list[Action]:
        if isinstance(event, Paused):
            self._start_again()
            return []
        patience_s = scheduler.starved_after_s(self.manifest.chunk_bytes, self.rate_bytes_per_s)
        if not self._starved and self._now - self._progress_at > patience_s:
            self._starved = True
            self._look_again()
        if math.isfinite(self._abandon_s) and self._rarity[self._missing].any():
            self._sourced_at = self._now
        return self._cut_silent(event.received_bytes)

    def _start_again(self) -> None:
        """Starts every deadline again: while this process stood still, no peer could show that it is there."""
        self._progress_at = self._sourced_at = self._now
        for peer in self._peers.values():
            peer.heard_at, peer.resting_until, peer.failures = self._now, self._now, 0
        for transfer in self._transfers.values():
            transfer.asked_at = self._now
            transfer.granted_at = None if transfer.granted_at is None else self._now

    def _join(self, event: PeerJoined) -> list[Action]:
        if event.peer in self._banned:
            return []
        actions: list[Action] = []
        if known := self._peers.get(event.peer):
            self._count(known, -1)
            known.holds, known.superseeds, known.distance = event.holds, event.superseeds, event.distance
            known.nothing_wanted = False
        else:
            known = self._peers[event.peer] = _Peer(
                event.holds, event.superseeds, event.distance, usual_bytes_per_s=event.usual_bytes_per_s
            )
            actions.append(Connect(event.peer))
        self._count(known, 1)
        return actions

    def _count(self, peer: _Peer, sign: int) -> None:
        self._rarity += sign * peer.holds.mask
        for nearer in self._counts_nearer(peer):
            nearer += sign * peer.holds.mask

    def _counts_nearer(self, peer: _Peer) -> list[scheduler.Counts]:
        # A super-seeding seed does not send a chunk just because it is requested.
        return [] if peer.superseeds else self._nearer[peer.distance + 1 :]

    def _learn(self, name: NodeId, chunks: Iterable[int]) -> None:
        if peer := self._peers.get(name):
            counts = (self._rarity, *self._counts_nearer(peer))
            for chunk in chunks:
                if chunk not in peer.holds:
                    peer.holds.add(chunk)
                    for count in counts:
                        count[chunk] += 1
                    if self._free[chunk] or (not self._free_count and self._is_missing(chunk)):
                        peer.nothing_wanted = False

    def _granted(self, number: int, chunks: tuple[int, ...]) -> None:
        if transfer := self._transfers.get(number):
            transfer.granted_at = self._now
            if not transfer.size:  # the seed has chosen the chunks
                transfer.size = self._size(chunks)
                # Two copies from one peer count as one, so that a second peer may be asked.
                siblings = self._peers[transfer.peer].transfers
                transfer.chunks = set(chunks).difference(*(self._transfers[sibling].chunks for sibling in siblings))
                self._request(transfer.chunks)
                self._redundant |= any(chunk in self.held for chunk in transfer.chunks)

    def _refused(self, event: Refused) -> list[Action]:
        if event.reason != "nothing_to_give":
            return self._fail(event.peer, event.transfer, f"refused: {event.reason}", event.retry_s)
        if peer := self._peers.get(event.peer):
            peer.resting_until = self._now + max(event.retry_s, NOTHING_TO_GIVE_REST_S)
        self._end(event.transfer)
        return []

    def _verified(self, event: ChunksVerified) -> list[Action]:
        fresh = tuple(chunk for chunk in event.chunks if chunk not in self.held)
        if self.manifest.promised and len(fresh) < len(event.chunks):
            # Read again from the origin: its claim may be another now, and peers would take the new bytes for wrong.
            self._fresh += [chunk for chunk in event.chunks if chunk in self.held and chunk not in self._fresh]
            if not fresh:
                return self._announce(at_once=True)
        if not fresh:
            return []
        self._progress_at, self._starved = self._now, False
        for chunk in fresh:
            self._missing_count -= self._is_missing(chunk)
            self.held.add(chunk)
            if self._free[chunk]:  # its transfer was cancelled meanwhile
                self._free[chunk] = False
                self._free_count -= 1
            self._arrived(event.transfer, chunk)
        self.sources[event.peer] = self.sources.get(event.peer, 0) + self._size(fresh)
        if peer := self._peers.get(event.peer):
            peer.failures = 0
            peer.correct += len(fresh)
        if not self._fresh:
            every_s = scheduler.announce_every_s(self.manifest.chunk_bytes, self.rate_bytes_per_s)
            self.due_at = max(self._now, self._announced_at + every_s)
            first = self._announced_at == -math.inf
            self._announce_within_s = 0.0 if first or every_s > scheduler.ANNOUNCE_WAITS_S else every_s / 2
        self._fresh += fresh
        actions: list[Action] = []
        if not self._redundant and not any(self._requested[chunk] for chunk in fresh):
            return actions
        self._redundant = False
        for number, other in sorted(self._transfers.items()):  # the slower copies of the endgame
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
        return self._ban(event.peer, why)

    def _ban(self, peer: NodeId, why: str) -> list[Action]:
        self._banned[peer] = None
        if len(self._banned) > BANNED_MAX:
            del self._banned[next(iter(self._banned))]
        return [*(Cancel(peer, number, "banned") for number in self._leave(peer, why)), Ban(peer, why)]

    def _announce(self, *, at_once: bool = False) -> list[Action]:
        if not self._fresh or not (at_once or self.due_at - self._now <= DUE_EARLY_S):
            return []
        fresh, self._fresh = tuple(self._fresh), []
        self._announced_at, self.due_at = self._now, math.inf
        return [Announce(fresh, 0.0 if at_once else self._announce_within_s)]

    def _cut_silent(self, received_bytes: Mapping[NodeId, int]) -> list[Action]:
        """Cancels transfers without a grant or a byte for too long.

        A session carries its transfers in sequence, so a byte of any of them counts for all.
        """
        for name, size in received_bytes.items():
            if (peer := self._peers.get(name)) and size != peer.received_bytes:
                peer.received_bytes, peer.heard_at = size, self._now
        actions: list[Action] = []
        for number, transfer in sorted(self._transfers.items()):
            if transfer.granted_at is None:
                patience_s, since, why = GRANT_PATIENCE_S, transfer.asked_at, "did not grant within"
            else:
                since = max(transfer.granted_at, self._peers[transfer.peer].heard_at)
                patience_s, why = self._idle_timeout_s, "sent nothing for"
            if self._now - since > patience_s:
                why = f"{why} {patience_s:g} s"
                actions += [Cancel(transfer.peer, number, why), *self._fail(transfer.peer, number, why)]
        return actions

    def _ask(self) -> list[Action]:
        actions: list[Action] = []
        asked = 0
        while (peers := self._askable()) and asked < max(peer.streams for peer in self._peers.values()):
            actions += self._ask_each(peers)
            asked += 1
        return actions

    def _ask_each(self, peers: dict[NodeId, _Peer]) -> list[Action]:
        """One request to each of these peers, unless it holds nothing that is wanted."""
        requests = scheduler.plan(self._view(peers), self._rng)
        due = 0 if self._is_alone else len(self._peers), self._pace_bytes_per_s
        actions: list[Action] = []
        for request in requests:
            number = next(self._transfer_ids)
            size = self._size(request.chunks)
            self._transfers[number] = _Transfer(request.peer, set(request.chunks), size, self._now)
            peer = self._peers[request.peer]
            peer.transfers.add(number)
            what = request.chunks, request.why, request.count, request.starving
            actions.append(Ask(request.peer, number, *what, *due, peer.streams))
        for name in peers.keys() - {request.peer for request in requests}:
            self._peers[name].nothing_wanted = True
        for request in requests:
            self._request(request.chunks)
        return actions

    def _askable(self) -> dict[NodeId, _Peer]:
        total = len(self._peers)
        most, most_of_seeds = scheduler.outstanding_max(False, total), scheduler.outstanding_max(True, total)
        return {
            name: peer
            for name, peer in self._peers.items()
            if not peer.nothing_wanted
            and peer.resting_until <= self._now
            and len(peer.transfers) < peer.streams * (most_of_seeds if peer.superseeds else most)
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
        if self._is_missing(chunk):
            if not self._requested[chunk]:
                self._free[chunk] = True
                self._free_count += 1
            self._look_again()

    def _look_again(self) -> None:
        for peer in self._peers.values():
            peer.nothing_wanted = False

    @property
    def _missing(self) -> scheduler.Mask:
        return self.wanted.mask & ~self.held.mask

    def _is_missing(self, chunk: int) -> bool:
        return chunk in self.wanted and chunk not in self.held

    def _size(self, chunks: Iterable[int]) -> int:
        return sum(self.manifest.chunks[chunk].size for chunk in chunks)

    def _view(self, askable: dict[NodeId, _Peer]) -> scheduler.DownloadView:
        missing = self._missing
        others = [peer for peer in self._peers.values() if not peer.superseeds]
        if not self.wanted.complete:  # peers that fetch another part cannot keep the link busy
            others = [peer for peer in others if peer.transfers or (peer.holds.mask & missing).any()]
        within: list[scheduler.Mask | None] = [None] * (DISTANCE_MAX + 1)
        if not self._starved:
            for distance in {peer.distance for peer in askable.values()} - {0}:
                within[distance] = self._imports[distance] & (self._nearer[distance] == 0)
        return scheduler.DownloadView(
            free=self._free,
            free_count=self._free_count,
            missing=missing,
            requested=self._requested,
            rarity=self._rarity,
            chunk_bytes=self.manifest.chunk_bytes,
            batch_chunks_max=REQUEST_CHUNKS_MAX,
            peers=[
                scheduler.PeerView(
                    name,
                    peer.holds.mask,
                    len(peer.transfers),
                    (peer.rate_bytes_per_s or peer.usual_bytes_per_s) / peer.streams,
                    peer.superseeds,
                    within[peer.distance],
                )
                for name, peer in askable.items()
            ],
            peers_total=sum(peer.streams for peer in self._peers.values()),
            starving=scheduler.starving(sum(1 for peer in others if peer.transfers), len(others)),
        )

    @property
    def _is_alone(self) -> bool:
        """Whether no node of this host or rack is known to fetch the artifact or to hold some of it."""
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
        # Transfers of one peer share a session: this transfer began when the previous one ended. Side by side, several
        # end at almost the same time.
        seconds = self._now - max(transfer.granted_at, peer.last_end)
        peer.ended_bytes += transfer.size
        if peer.streams > 1 and self._now - peer.last_end < SIDE_BY_SIDE_MEASURE_S:
            return
        peer.last_end, size, peer.ended_bytes = self._now, peer.ended_bytes, 0
        if seconds > 0:
            rate = size / seconds
            old = peer.rate_bytes_per_s or rate
            peer.rate_bytes_per_s = old + RATE_SMOOTHING * (rate - old)

    def _arrived(self, number: int, chunk: int) -> None:
        transfer = self._transfers.get(number)
        if transfer and chunk in transfer.chunks:
            transfer.chunks.remove(chunk)
            self._unrequest(chunk)

    def _fail(self, name: NodeId, number: int, why: str, retry_s: float = 0.0) -> list[Action]:
        if number not in self._transfers or (peer := self._peers.get(name)) is None:
            return []  # its peer left, and why it left says more
        self._last_words[name] = why
        peer.failures += 1
        self._rest(peer, retry_s)
        self._end(number)
        return [TransferFailed(name, number, why)]

    def _rest(self, peer: _Peer, at_least_s: float) -> None:
        pause_s = min(REST_FIRST_S * 2.0 ** (peer.failures - 1), REST_LONGEST_S)
        peer.resting_until = self._now + max(pause_s, at_least_s)

    def _leave(self, name: NodeId, why: str) -> list[int]:
        """Forgets a peer; returns its transfers, which have ended."""
        self._last_words.pop(name, None)
        self._last_words[name] = why
        if len(self._last_words) > WORDS_MAX + len(self._peers):
            del self._last_words[next(iter(self._last_words))]
        if (peer := self._peers.pop(name, None)) is None:
            return []
        self._count(peer, -1)
        for number in peer.transfers:
            self._end(number)
        self._look_again()
        return sorted(peer.transfers)

    def _end(self, number: int) -> None:
        if transfer := self._transfers.pop(number, None):
            for chunk in transfer.chunks:
                self._unrequest(chunk)
            if peer := self._peers.get(transfer.peer):
                peer.transfers.discard(number)

    def _finish(self, why: str) -> list[Action]:
        self.done = True
        cancels: list[Action] = [Cancel(t.peer, n, why) for n, t in sorted(self._transfers.items()) if t.chunks]
        for number in list(self._transfers):
            self._end(number)
        return cancels

    def _tried(self) -> tuple[str, ...]:
        silent = dict.fromkeys(self._peers, "holds nothing that is missing")
        return tuple(f"{name}: {words}" for name, words in sorted({**silent, **self._last_words}.items()))

    @property
    def elsewhere(self) -> scheduler.Mask:
        """The chunks that a peer holds."""
        return self._rarity > 0

    @property
    def missing(self) -> scheduler.Mask:
        """The wanted chunks that are not held."""
        return self._missing

    def distance(self, peer: NodeId) -> int | None:
        """0 same host, 1 same rack, 2 else; None for a peer that has not joined."""
        return known.distance if (known := self._peers.get(peer)) else None

    @property
    def rate_bytes_per_s(self) -> float:
        """Measured rate of all peers with outstanding transfers together."""
        return sum(peer.rate_bytes_per_s for peer in self._peers.values() if peer.transfers)

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold."""
        asked: Iterable[int] = (chunk for t in self._transfers.values() for chunk in t.chunks)
        counts = np.bincount(np.fromiter(asked, dtype=np.int64), minlength=self.held.length)
        holds = {
            "requested counts add up": bool((counts == self._requested).all()),
            "free is missing and not requested": bool((self._free == (self._missing & (counts == 0))).all()),
            "missing chunks are counted": int(self._missing.sum()) == self._missing_count,
            "free chunks are counted": int(self._free.sum()) == self._free_count,
            "transfers belong to joined peers": all(t.peer in self._peers for t in self._transfers.values()),
            "peers know their transfers": all(
                n in self._peers[t.peer].transfers for n, t in self._transfers.items() if t.peer in self._peers
            ),
            "no banned peer is joined": not self._banned.keys() & self._peers.keys(),
            "a finished download requests nothing": not (self.done and self._transfers),
            "rarity adds up": int(self._rarity.sum()) == sum(len(peer.holds) for peer in self._peers.values()),
            "counts of nearer holders add up": all(
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
            f"<Download {self.manifest.digest[:8]} {len(self.wanted) - self._missing_count}/{len(self.wanted)} chunks"
            f" | {len(self._peers)} peers | {len(self._transfers)} in flight | {self.rate_bytes_per_s / 1e6:.1f} MB/s>"
        )
