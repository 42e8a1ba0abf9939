"""The facts that the doctor collects. Must not know: which of them are faults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from swarm.engines.layout import Fingerprint
from swarm.engines.start_log import EngineStart
from swarm.errors import SwarmError
from swarm.protocol.messages import Announcement


@dataclass(frozen=True)
class KeyFacts:
    """The cluster key: its fingerprints, or why it cannot be used; neither without a key."""

    fingerprint: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class PortFacts:
    """`address`: where the doctor's node listens; `error`: why not where the settings say.

    `held_by`: the node of this user that has the port. `reached`: whether this machine can connect to the address.
    """

    address: str
    error: str | None = None
    held_by: str | None = None
    reached: bool = True


@dataclass(frozen=True)
class MdnsFacts:
    """Multicast DNS: whether this machine receives its own announcement, and the other addresses found."""

    started: bool
    heard_itself: bool = False
    found: frozenset[str] = frozenset()


@dataclass(frozen=True)
class DialedPeer:
    """A dialed address: the peer's data, or the `error`.

    `ways`: how it was found, of 'given', 'mdns', 'told', 'here'. `gossips`: whether its datagrams arrive. `clock_s`:
    how far its clock is ahead, None if unknown. `introduces`: whether `trusted` lets its machine introduce models.
    """

    address: str
    ways: frozenset[str]
    error: SwarmError | None = None
    name: str = ""
    software: str = ""
    gossips: bool = False
    clock_s: float | None = None
    artifacts: tuple[Announcement, ...] = ()
    introduces: bool = True


@dataclass(frozen=True)
class GossipMember:
    """A member known by gossip alone. `artifacts`: model id, digest, tier and fraction; `software`: '' if unknown."""

    name: str
    address: str
    artifacts: tuple[tuple[str, str, str, float], ...] = ()
    software: str = ""


@dataclass(frozen=True)
class LocalNode:
    """A node of this user on this machine."""

    address: str
    error: str | None = None


@dataclass(frozen=True)
class DiskSpace:
    """Free space at a directory for weights or manifests."""

    purpose: str
    path: Path
    free_bytes: int


@dataclass(frozen=True)
class LoadedLayout:
    """Loaded tensors that a member serves: the layout's fingerprint, or why it cannot be read."""

    member: str
    artifact_id: str
    fingerprint: Fingerprint | None = None
    error: str | None = None


@dataclass(frozen=True)
class Facts:
    """All facts. `model_id`: the model in question, None for all. `trusted`: machines, () for all."""

    software: str
    key: KeyFacts
    insecure: bool
    loopback: bool
    trusted: tuple[str, ...] = ()
    model_id: str | None = None
    port: PortFacts | None = None  # None if no node could be opened
    mdns: MdnsFacts | None = None  # None if switched off
    names: Mapping[str, tuple[str, ...] | str] = field(default_factory=dict)  # --peer: addresses, or the error
    dialed: tuple[DialedPeer, ...] = ()
    members: tuple[GossipMember, ...] = ()
    local_nodes: tuple[LocalNode, ...] = ()
    disks: tuple[DiskSpace, ...] = ()
    layouts: tuple[LoadedLayout, ...] = ()
    starts: tuple[tuple[float, EngineStart], ...] = ()  # newest first

    @property
    def linked(self) -> list[DialedPeer]:
        """The dialed peers that answered."""
        return [peer for peer in self.dialed if not peer.error]
