"""What a node sends, as a state machine: who is granted a transfer next, and who is told to come back.

A few transfers are on the wire at once (`slots`), the others wait. A free slot goes to a peer with nothing on the wire
before one gets its second, or the slots of a seed fill with slow newcomers and its link is idle. Among those it goes to
the peer that was charged least so far, so that a newcomer with many requests does not starve one with few.

A peer is charged for the time that its transfers held a slot, as among stations of one radio: whose link is full anyway
takes long for a chunk, and by bytes it would hold the slots that others wait for. And it is charged by the square of
its pace, what it got per second since it began, over that of the fastest: what a link does not carry now it never makes
up for, and who fell behind, with slow parents say, gets more until it has caught up.

Who fetches together with others of its machine or rack is charged by bytes, once for every source that it has: what
takes long there is a link that they share, and of n parents each gives a part of 1/n.

Simulated, the last newcomer over the lower bound (32 newcomers, 2048 chunks; one seed, two seeds):

                                                    undisturbed     a tenth at quarter speed
    every byte charged by sources                   1.025, 1.074    1.188, 1.193
    no second transfer while somebody waits         1.025, 1.074    1.059, 1.192
    and by pace                                     1.022, 1.046    1.057, 1.098
    time instead of bytes                           1.028, 1.024    1.067, 1.049

and with four seeds: 256 newcomers 1.094 by bytes and 1.040 by time, 1024 (4096 chunks) 1.087 and 1.043.

Transfers to one peer keep the order of its requests.

Must not know: sockets, clocks, what a chunk holds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

from swarm.errors import LocalProtocolError
from swarm.protocol.messages import NodeId, RefusalReason

QUEUED_PER_PEER_MAX = 16  # a well-behaved peer asks for two batches ahead
ACTIVE_PER_PEER_MAX = 2  # the second lets the wire go on while the first one's end is being told
SLOWEST = 8  # whose pace is less than this part of the fastest is charged as if it were so: what is told may be a lie
BUSY_RETRY_S = 1.0


@dataclass(frozen=True)
class Requested:
    """A peer asks for a transfer of `size` bytes. It got so much since it began; `sources`: see `messages.Request`."""

    peer: NodeId
    transfer: int
    size: int
    sources: int = 0
    pace_bytes_per_s: float = 0.0


@dataclass(frozen=True)
class Cancelled:
    """A peer does not want a transfer any more."""

    peer: NodeId
    transfer: int


@dataclass(frozen=True)
class Ended:
    """A granted transfer is off the wire, `whole` or not; it held its slot for so long."""

    peer: NodeId
    transfer: int
    seconds: float
    whole: bool = True


@dataclass(frozen=True)
class PeerLeft:
    """The link to a peer is gone."""

    peer: NodeId


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
    """Tell the peer that it will not get this transfer."""

    peer: NodeId
    transfer: int
    reason: RefusalReason
    retry_s: float


Event: TypeAlias = Requested | Cancelled | Ended | PeerLeft
Action: TypeAlias = Grant | Stop | Refuse


@dataclass
class _Peer:
    waiting: deque[tuple[Requested, float]] = field(default_factory=deque)  # with what its grant is charged
    active: dict[int, Requested] = field(default_factory=dict)  # by the transfer
    charged: float = 0.0  # bytes: those that were granted, or what usually moves in the time that was taken
    pace_bytes_per_s: float = 0.0
    grants: int = 0


class Upload:
    """Everything one node sends, of all artifacts together."""

    def __init__(self, *, slots: int) -> None:
        self._slots = slots
        self._peers: dict[NodeId, _Peer] = {}
        self._level = 0.0  # what the peer granted last had been charged before
        self._taken_s, self._taken_bytes = 0.0, 0  # by whole transfers that are charged by time

    def handle(self, event: Event) -> list[Action]:
        """What to do about one event."""
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
                    self._charge_time(peer, asked, event)
                return list(self._grants())
            case PeerLeft(name):
                peer = self._peers.pop(name, None)
                stops = [Stop(name, transfer) for transfer in sorted(peer.active)] if peer else []
                return [*stops, *self._grants()]
            case _:
                raise LocalProtocolError(f"upload cannot handle {event!r}")
        return []

    def _requested(self, event: Requested) -> list[Action]:
        peer = self._peers.setdefault(event.peer, _Peer())
        if not (peer.waiting or peer.active):
            # Who comes late, or back, starts level with those served now: idle times give no claim on the wire.
            peer.charged = max(peer.charged, self._level)
        if len(peer.waiting) >= QUEUED_PER_PEER_MAX:
            return [Refuse(event.peer, event.transfer, "busy", BUSY_RETRY_S)]
        peer.pace_bytes_per_s = event.pace_bytes_per_s
        peer.waiting.append((event, event.size * event.sources * self._behind(peer) ** 2))
        return list(self._grants())

    def _charge_time(self, peer: _Peer, asked: Requested, ended: Ended) -> None:
        """In bytes, at the usual rate of a slot, so that both ways to charge can be compared."""
        if asked.sources:
            return
        if ended.whole:
            self._taken_s += ended.seconds
            self._taken_bytes += asked.size
        usual = self._taken_bytes / self._taken_s if self._taken_s > 0 else 1.0  # any, until there is one
        peer.charged += ended.seconds * usual * self._behind(peer) ** 2

    def _behind(self, peer: _Peer) -> float:
        """A peer's pace over that of the fastest: 1 for that one, and for all while nobody got anything yet."""
        fastest = max(other.pace_bytes_per_s for other in self._peers.values())
        return max(peer.pace_bytes_per_s / fastest, 1 / SLOWEST) if fastest else 1.0

    def _grants(self) -> list[Grant]:
        grants = []
        while self.active < self._slots:
            able = [
                (len(peer.active), peer.charged, name)
                for name, peer in self._peers.items()
                if peer.waiting and len(peer.active) < ACTIVE_PER_PEER_MAX
            ]
            if not able:
                break
            *_, name = min(able)
            peer = self._peers[name]
            asked, charge = peer.waiting.popleft()
            peer.active[asked.transfer] = asked
            self._level = max(self._level, peer.charged)
            peer.charged += charge
            grants.append(Grant(name, asked.transfer, peer.grants))
            peer.grants += 1
        return grants

    @property
    def active(self) -> int:
        """Slots that are taken."""
        return sum(len(peer.active) for peer in self._peers.values())

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold."""
        if self.active > self._slots:
            raise LocalProtocolError(f"{self!r}: more transfers than slots")
        if any(len(peer.active) > ACTIVE_PER_PEER_MAX for peer in self._peers.values()):
            raise LocalProtocolError(f"{self!r}: one peer has too many slots")

    def __repr__(self) -> str:
        waiting = sum(len(peer.waiting) for peer in self._peers.values())
        return f"<Upload {self.active}/{self._slots} slots | {waiting} waiting | {len(self._peers)} peers>"
