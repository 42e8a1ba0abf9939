"""What a node sends, as a state machine: who is granted a transfer next, and who is told to come back.

A few transfers are on the wire at once (`slots`), the others wait. A free slot goes to the peer that has been granted
the least bytes so far among those that wait, so that a newcomer with many requests does not starve one with few.
Transfers to one peer keep the order of its requests.

Must not know: sockets, clocks, what a chunk holds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

from swarm.errors import LocalProtocolError
from swarm.messages import RefusalReason

QUEUED_PER_PEER_MAX = 16  # a well-behaved peer asks for two batches ahead
ACTIVE_PER_PEER_MAX = 2  # the second lets the wire go on while the first one's end is being told
BUSY_RETRY_S = 1.0


@dataclass(frozen=True)
class Requested:
    """A peer asks for a transfer of `size` bytes."""

    peer: str
    transfer: int
    size: int


@dataclass(frozen=True)
class Cancelled:
    """A peer does not want a transfer any more."""

    peer: str
    transfer: int


@dataclass(frozen=True)
class Ended:
    """A granted transfer is off the wire, well or not."""

    peer: str
    transfer: int


@dataclass(frozen=True)
class PeerLeft:
    """The link to a peer is gone."""

    peer: str


@dataclass(frozen=True)
class Grant:
    """Send this transfer now. `sequence` counts grants to this peer."""

    peer: str
    transfer: int
    sequence: int


@dataclass(frozen=True)
class Stop:
    """Stop sending a transfer that was granted."""

    peer: str
    transfer: int


@dataclass(frozen=True)
class Refuse:
    """Tell the peer that it will not get this transfer."""

    peer: str
    transfer: int
    reason: RefusalReason
    retry_s: float


Event: TypeAlias = Requested | Cancelled | Ended | PeerLeft
Action: TypeAlias = Grant | Stop | Refuse


@dataclass
class _Peer:
    waiting: deque[tuple[int, int]] = field(default_factory=deque)  # (transfer, size)
    active: set[int] = field(default_factory=set)
    granted_bytes: int = 0
    grants: int = 0


class Upload:
    """Everything one node sends, of all artifacts together."""

    def __init__(self, *, slots: int) -> None:
        self._slots = slots
        self._peers: dict[str, _Peer] = {}
        self._level_bytes = 0  # what the peer granted last had been granted before

    def handle(self, event: Event) -> list[Action]:
        """What to do about one event."""
        match event:
            case Requested(name, transfer, size):
                return self._requested(name, transfer, size)
            case Cancelled(name, transfer):
                if peer := self._peers.get(name):
                    peer.waiting = deque(item for item in peer.waiting if item[0] != transfer)
                    if transfer in peer.active:
                        return [Stop(name, transfer)]
            case Ended(name, transfer):
                if peer := self._peers.get(name):
                    peer.active.discard(transfer)
                return list(self._grants())
            case PeerLeft(name):
                peer = self._peers.pop(name, None)
                stops = [Stop(name, transfer) for transfer in sorted(peer.active)] if peer else []
                return [*stops, *self._grants()]
            case _:
                raise LocalProtocolError(f"upload cannot handle {event!r}")
        return []

    def _requested(self, name: str, transfer: int, size: int) -> list[Action]:
        peer = self._peers.setdefault(name, _Peer())
        if not (peer.waiting or peer.active):
            # Who comes late, or back, starts level with those served now: idle times give no claim on the wire.
            peer.granted_bytes = max(peer.granted_bytes, self._level_bytes)
        if len(peer.waiting) >= QUEUED_PER_PEER_MAX:
            return [Refuse(name, transfer, "busy", BUSY_RETRY_S)]
        peer.waiting.append((transfer, size))
        return list(self._grants())

    def _grants(self) -> list[Grant]:
        grants = []
        while sum(len(peer.active) for peer in self._peers.values()) < self._slots:
            able = [
                (peer.granted_bytes, name)
                for name, peer in self._peers.items()
                if peer.waiting and len(peer.active) < ACTIVE_PER_PEER_MAX
            ]
            if not able:
                break
            name = min(able)[1]
            peer = self._peers[name]
            transfer, size = peer.waiting.popleft()
            peer.active.add(transfer)
            self._level_bytes = max(self._level_bytes, peer.granted_bytes)
            peer.granted_bytes += size
            grants.append(Grant(name, transfer, peer.grants))
            peer.grants += 1
        return grants

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold."""
        active = sum(len(peer.active) for peer in self._peers.values())
        if active > self._slots:
            raise LocalProtocolError(f"{self!r}: more transfers than slots")
        if any(len(peer.active) > ACTIVE_PER_PEER_MAX for peer in self._peers.values()):
            raise LocalProtocolError(f"{self!r}: one peer has too many slots")

    def __repr__(self) -> str:
        active = sum(len(peer.active) for peer in self._peers.values())
        waiting = sum(len(peer.waiting) for peer in self._peers.values())
        return f"<Upload {active}/{self._slots} slots | {waiting} waiting | {len(self._peers)} peers>"
