"""The uploads of one node, as a state machine: which transfer is granted next, and which request is refused.

At most `slots` transfers are on the wire; the others wait. A free slot goes to a peer without a transfer on the wire
before any peer gets a second slot: otherwise slow newcomers fill the slots of a seed, and its link idles. Among those
it goes to the peer with the least use of slots so far.

Airtime fairness, as for the stations of a radio cell (docs/decisions/0009): use is the time that a peer's transfers
hold a slot, so that a peer with a saturated link does not block the slots that others wait for. It is weighted by the
square of the peer's pace (verified bytes per second since its download began) over the fastest pace, so that a peer
that fell behind catches up. Newcomers that fetch with others of their machine or rack share a bottleneck: they are
accounted by bytes, once for each of their n sources, as each source has to give them 1/n of their rate.

A peer whose session has several streams gets as many transfers at once, and they take two slots at most: the further
ones start only while no peer waits for a slot, so that upload slots are shared by peers and not by streams.

Transfers to one peer are granted in the order of its requests.

A node that closes drains first: running transfers end, and only chunks that no other node has are still granted.

Must not know: sockets, clocks, the content of chunks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

from swarm.errors import LocalProtocolError
from swarm.protocol.messages import STREAMS_MAX, NodeId, RefusalReason

QUEUED_PER_PEER_MAX = 16  # a node requests at most two batches ahead
ACTIVE_PER_PEER_MAX = 2  # the second keeps the wire busy while the end of the first is reported
SLOWEST = 8  # a pace below 1 / SLOWEST of the fastest counts as that: a peer may misreport its pace
BUSY_RETRY_S = 1.0
LEAVING_RETRY_S = 1.0


@dataclass(frozen=True)
class Requested:
    """A peer requests a transfer of `size` bytes. `sources` and `pace_bytes_per_s`: see `messages.Request`.

    `only_here`: no other node is known to hold a chunk of it.
    """

    peer: NodeId
    transfer: int
    size: int
    sources: int = 0
    pace_bytes_per_s: float = 0.0
    streams: int = 1
    only_here: bool = False


@dataclass(frozen=True)
class Cancelled:
    """A peer cancels a transfer."""

    peer: NodeId
    transfer: int


@dataclass(frozen=True)
class Ended:
    """A granted transfer is off the wire, `whole` or not, and held its slot for `seconds`."""

    peer: NodeId
    transfer: int
    seconds: float
    whole: bool = True


@dataclass(frozen=True)
class PeerLeft:
    """The link to a peer is gone."""

    peer: NodeId


@dataclass(frozen=True)
class Drain:
    """Grant no request from now on but those `only_here`; of the requests that wait, keep those in `keep`."""

    keep: frozenset[tuple[NodeId, int]]


@dataclass(frozen=True)
class Grant:
    """Send this transfer now. `sequence` counts grants to this peer."""

    peer: NodeId
    transfer: int
    sequence: int


@dataclass(frozen=True)
class Stop:
    """Stop sending a transfer that was granted."""

    peer: NodeId
    transfer: int


@dataclass(frozen=True)
class Refuse:
    """Refuse a transfer; the peer may ask again after `retry_s`."""

    peer: NodeId
    transfer: int
    reason: RefusalReason
    retry_s: float


Event: TypeAlias = Requested | Cancelled | Ended | PeerLeft | Drain
Action: TypeAlias = Grant | Stop | Refuse


@dataclass
class _Peer:
    waiting: deque[tuple[Requested, float]] = field(default_factory=deque)  # with the use of its grant
    active: dict[int, Requested] = field(default_factory=dict)  # by the transfer
    used: float = 0.0  # bytes: granted, or usually sent in the time that its transfers held a slot
    pace_bytes_per_s: float = 0.0
    streams: int = 1  # of its session
    grants: int = 0

    @property
    def slots(self) -> int:
        """Slots that its transfers take."""
        return min(len(self.active), ACTIVE_PER_PEER_MAX)


class Upload:
    """The uploads of one node, of all its artifacts together."""

    def __init__(self, *, slots: int) -> None:
        self._slots = slots
        self._peers: dict[NodeId, _Peer] = {}
        self._level = 0.0  # the highest use of a peer at the time of a grant
        self._draining = False
        self._sent_s, self._sent_bytes = 0.0, 0  # of whole transfers that are accounted by time

    def handle(self, event: Event) -> list[Action]:
        """The actions that one event causes."""
        match event:
            case Requested():
                return self._requested(event)
            case Cancelled(name, transfer):
                if peer := self._peers.get(name):
                    peer.waiting = deque(item for item in peer.waiting if item[0].transfer != transfer)
                    if transfer in peer.active:
                        return [Stop(name, transfer)]
            case Ended(name, transfer):
                if (peer := self._peers.get(name)) and (asked := peer.active.pop(transfer, None)):
                    self._account_time(peer, asked, event)
                return list(self._grants())
            case PeerLeft(name):
                peer = self._peers.pop(name, None)
                stops = [Stop(name, transfer) for transfer in sorted(peer.active)] if peer else []
                return [*stops, *self._grants()]
            case Drain(keep):
                return self._drain(keep)
            case _:
                raise LocalProtocolError(f"upload cannot handle {event!r}")
        return []

    def _drain(self, keep: frozenset[tuple[NodeId, int]]) -> list[Action]:
        self._draining = True
        refused: list[Action] = []
        for name, peer in sorted(self._peers.items()):
            gone = [asked.transfer for asked, _ in peer.waiting if (name, asked.transfer) not in keep]
            peer.waiting = deque(item for item in peer.waiting if item[0].transfer not in gone)
            refused += [Refuse(name, transfer, "leaving", LEAVING_RETRY_S) for transfer in gone]
        return [*refused, *self._grants()]

    def _requested(self, event: Requested) -> list[Action]:
        if self._draining and not event.only_here:
            return [Refuse(event.peer, event.transfer, "leaving", LEAVING_RETRY_S)]
        peer = self._peers.setdefault(event.peer, _Peer())
        if not (peer.waiting or peer.active):
            # A peer that arrives late, or returns, starts level with the others: idle time gives no claim.
            peer.used = max(peer.used, self._level)
        if len(peer.waiting) >= QUEUED_PER_PEER_MAX:
            return [Refuse(event.peer, event.transfer, "busy", BUSY_RETRY_S)]
        peer.pace_bytes_per_s, peer.streams = event.pace_bytes_per_s, event.streams
        peer.waiting.append((event, event.size * event.sources * self._behind(peer) ** 2))
        return list(self._grants())

    def _account_time(self, peer: _Peer, asked: Requested, ended: Ended) -> None:
        """Adds the time of a transfer, in bytes at the usual rate of a slot: the unit of both ways of accounting."""
        if asked.sources:
            return
        if ended.whole:
            self._sent_s += ended.seconds
            self._sent_bytes += asked.size
        usual = self._sent_bytes / self._sent_s if self._sent_s > 0 else 1.0  # any rate, until a rate is measured
        peer.used += ended.seconds * usual * self._behind(peer) ** 2

    def _behind(self, peer: _Peer) -> float:
        """A peer's pace over the fastest pace; 1 for all peers as long as no peer has any chunk."""
        fastest = max(other.pace_bytes_per_s for other in self._peers.values())
        return max(peer.pace_bytes_per_s / fastest, 1 / SLOWEST) if fastest else 1.0

    def _grants(self) -> list[Grant]:
        grants = []
        while able := self._able():
            *_, name = min(able)
            peer = self._peers[name]
            asked, use = peer.waiting.popleft()
            peer.active[asked.transfer] = asked
            self._level = max(self._level, peer.used)
            peer.used += use
            grants.append(Grant(name, asked.transfer, peer.grants))
            peer.grants += 1
        return grants

    def _able(self) -> list[tuple[int, float, NodeId]]:
        """The peers that may be granted a transfer now, with what orders them."""
        waiting = [(len(peer.active), peer.used, name) for name, peer in self._peers.items() if peer.waiting]
        wanting_slots = [entry for entry in waiting if entry[0] < ACTIVE_PER_PEER_MAX]
        if wanting_slots:
            return wanting_slots if self.active < self._slots else []
        return [entry for entry in waiting if entry[0] < self._peers[entry[2]].streams]

    @property
    def idle(self) -> bool:
        """Whether no transfer is on the wire, and none waits."""
        return not any(peer.waiting or peer.active for peer in self._peers.values())

    @property
    def active(self) -> int:
        """Number of slots in use."""
        return sum(peer.slots for peer in self._peers.values())

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold."""
        if self.active > self._slots:
            raise LocalProtocolError(f"{self!r}: more transfers than slots")
        if any(len(peer.active) > max(ACTIVE_PER_PEER_MAX, STREAMS_MAX) for peer in self._peers.values()):
            raise LocalProtocolError(f"{self!r}: one peer has too many transfers at once")

    def __repr__(self) -> str:
        waiting = sum(len(peer.waiting) for peer in self._peers.values())
        return f"<Upload {self.active}/{self._slots} slots | {waiting} waiting | {len(self._peers)} peers>"
