"""Events and actions of `download.Download`: its whole vocabulary.

Every event and action of a fetch is a journal entry, so the names below are also those in traces and metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from swarm.content.bitfield import Bitfield
from swarm.journal import Paused
from swarm.protocol.messages import NodeId, RefusalReason

EVENT_BYTES, CHUNK_BYTES = 1024, 40  # approximate memory of an event, and of a chunk's number in it


@dataclass(frozen=True)
class PeerJoined:
    """A peer that holds some chunks of the artifact can be asked from now on.

    `superseeds`: it is a seed and chooses the chunks that it sends. `distance`: 0 same host, 1 same rack, 2 else.
    `usual_bytes_per_s`: the expected rate until a transfer measures it; 0 when there is no expectation.
    """

    peer: NodeId
    holds: Bitfield
    superseeds: bool = False
    distance: int = 0
    usual_bytes_per_s: float = 0.0

    @property
    def weight_bytes(self) -> int:
        """Approximate memory, for the journal."""
        return EVENT_BYTES + self.holds.length


@dataclass(frozen=True)
class PeerPlaced:
    """The distance of a peer has become known."""

    peer: NodeId
    distance: int


@dataclass(frozen=True)
class Mates:
    """Ids of the nodes that fetch the same artifact on this host, and in this rack (this host included).

    The node itself is in neither set.
    """

    on_host: frozenset[NodeId]
    in_rack: frozenset[NodeId]


@dataclass(frozen=True)
class PeerHas:
    """A peer verified more chunks."""

    peer: NodeId
    chunks: tuple[int, ...]

    @property
    def weight_bytes(self) -> int:
        """Approximate memory, for the journal."""
        return EVENT_BYTES + CHUNK_BYTES * len(self.chunks)


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
class Refused:
    """A peer will not send a transfer, and names the seconds after which it can be asked again.

    "nothing_to_give" is no failure: the seed has sent every chunk that is missing here to some peer already.
    """

    peer: NodeId
    transfer: int
    reason: RefusalReason
    retry_s: float


@dataclass(frozen=True)
class SessionGrew:
    """The session with a peer carries so many transfers side by side now."""

    peer: NodeId
    streams: int


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
class TransferBroke:
    """A transfer cannot go on: its session broke, or a faster peer took its place."""

    peer: NodeId
    transfer: int
    why: str


@dataclass(frozen=True)
class ClaimDisproved:
    """A peer claimed a digest of a promised chunk that is not the chunk's: it is banned."""

    peer: NodeId
    why: str


@dataclass(frozen=True)
class Proven:
    """All files of a promise have the content that its origin lists: the download is complete."""


@dataclass(frozen=True)
class OriginFailed:
    """A read of an origin failed. `wait_s`: seconds that the origin itself asks to wait, in which nothing stalls."""

    origin: NodeId
    why: str
    wait_s: float


@dataclass(frozen=True)
class OriginReadEnded:
    """This node reads a range of the origin no more. Peers hear of its chunks first, and read none of them."""


@dataclass(frozen=True)
class Tick:
    """Time passed. `received_bytes`: the bytes that each peer's session has received since it was opened."""

    received_bytes: Mapping[NodeId, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Connect:
    """Open a session with a peer now, so that the first request to it costs no round trip."""

    peer: NodeId


@dataclass(frozen=True)
class Ask:
    """Request these chunks, or up to `count` chunks of the peer's choice, as one transfer.

    `why` is the scheduler's reason. `sources` is the number of peers that can be asked, 0 for a node without mates.
    `pace_bytes_per_s` is the mean rate of verified bytes since the download began. Both decide its share of upload
    slots, see `upload`.
    """

    peer: NodeId
    transfer: int
    chunks: tuple[int, ...]
    why: str
    count: int = 0
    starving: bool = False
    sources: int = 0
    pace_bytes_per_s: int = 0
    streams: int = 1


@dataclass(frozen=True)
class Cancel:
    """Tell a peer that a transfer is not wanted any more, and stop receiving it."""

    peer: NodeId
    transfer: int
    why: str


@dataclass(frozen=True)
class TransferFailed:
    """A transfer broke off, was refused or fell silent. For the journal: there is nothing to carry out."""

    peer: NodeId
    transfer: int
    why: str


@dataclass(frozen=True)
class Announce:
    """Send `have` messages for these chunks, verified since the last announcement, within `within_s`."""

    chunks: tuple[int, ...]
    within_s: float = 0.0

    @property
    def weight_bytes(self) -> int:
        """Approximate memory, for the journal."""
        return EVENT_BYTES + CHUNK_BYTES * len(self.chunks)


@dataclass(frozen=True)
class Ban:
    """Exchange nothing with a peer any more: it sent wrong chunks."""

    peer: NodeId
    why: str


@dataclass(frozen=True)
class Complete:
    """Every wanted chunk is verified."""


@dataclass(frozen=True)
class GiveUp:
    """No chunk has arrived for `waited_s`; `tried` says for each peer why."""

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
    | Refused
    | SessionGrew
    | ChunksVerified
    | ChunkCorrupt
    | TransferEnded
    | TransferBroke
    | ClaimDisproved
    | Proven
    | OriginFailed
    | OriginReadEnded
    | Tick
    | Paused
)
Action: TypeAlias = Connect | Ask | Cancel | TransferFailed | Announce | Ban | Complete | GiveUp
