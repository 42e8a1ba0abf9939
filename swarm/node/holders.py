"""The holders of artifacts that a node knows, by its links and by gossip.

A link announces artifacts earlier than gossip does, so the record of a linked member is not read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from swarm.content.manifest import Digest, ModelId
from swarm.peers.peer import Peer
from swarm.protocol.messages import Address, Announcement, NodeId
from swarm.protocol.packets import Holding, Record, State
from swarm.transfer.download import DISTANCE_MAX
from swarm.transfer.download_events import Mates

ARTIFACTS_SHOWN = 3
MEMBERS_SHOWN = 16  # members without a link, in error messages


@dataclass(frozen=True)
class Holder:
    """A node that announces an artifact. `peer` is None without a link to it."""

    node: NodeId
    name: str
    address: Address
    peer: Peer | None


@dataclass(frozen=True)
class Announced:
    """An artifact that another node announces. `complete`: it holds every chunk; `fetching`: it wants more chunks."""

    holder: Holder
    digest: Digest
    model_id: ModelId
    complete: bool
    fetching: bool


def announced(peers: Mapping[NodeId, Peer], members: Iterable[Record]) -> Iterator[Announced]:
    """All artifacts that other nodes announce, complete or not."""
    for peer in peers.values():
        holder = Holder(peer.node, peer.name, peer.address, peer)
        for announcement in peer.artifacts.values():
            yield _announced(holder, announcement)
    for member in members:
        if member.node not in peers:
            holder = Holder(member.node, member.name, member.address, None)
            for holding in member.profile.artifacts:
                yield _announced(holder, holding)


def _announced(holder: Holder, artifact: Announcement | Holding) -> Announced:
    complete = artifact.chunks == artifact.chunks_total
    return Announced(holder, artifact.digest, artifact.model_id, complete, not artifact.fetched)


def fetches(member: Record, digest: Digest, peers: Mapping[NodeId, Peer], *, part: str = "") -> bool:
    """Whether a member has announced that it fetches this part of an artifact; '' is all of it."""
    if (peer := peers.get(member.node)) and (announcement := peer.artifacts.get(digest)):
        return _fetches(announcement, part)
    return any(held.digest == digest and _fetches(held, part) for held in member.profile.artifacts)


def _fetches(artifact: Announcement | Holding, part: str) -> bool:
    return not artifact.fetched and (artifact.wanted.part if artifact.wanted else "") == part


def promises(peers: Mapping[NodeId, Peer], members: Iterable[Record]) -> set[Digest]:
    """The digests that are promises, as other nodes announce."""
    linked = ((a.digest, a.tier) for peer in peers.values() for a in peer.artifacts.values())
    gossiped = ((held.digest, held.tier) for member in members for held in member.profile.artifacts)
    return {digest for digest, tier in (*linked, *gossiped) if tier == "promised"}


def complete_without_leaving(peers: Mapping[NodeId, Peer], members: Iterable[Record], digest: Digest) -> bool:
    """Whether a node that stays holds all of an artifact."""
    linked = (peer.artifacts.get(digest) for peer in peers.values() if not peer.leaving)
    staying = (
        member
        for member in members
        if member.node not in peers and member.state is State.ALIVE and not member.profile.leaving
    )
    gossiped = (held for member in staying for held in member.profile.artifacts if held.digest == digest)
    return any(held.chunks == held.chunks_total for held in (*linked, *gossiped) if held)


def mates(fetching: Iterable[Record], place: tuple[str, str]) -> Mates:
    """Those of the fetching members that are near `place`, the labels of host and rack."""
    _, rack = place
    near: tuple[set[NodeId], set[NodeId]] = (set(), set())
    for member in fetching:
        distance = member.profile.distance(*place)
        if distance < DISTANCE_MAX:
            for names in near[distance:]:
                names.add(member.node)
    # Without labels all nodes have the same rack, "", which says nothing of their distance.
    return Mates(frozenset(near[0]), frozenset(near[1] if rack else ()))


def described(peers: Mapping[NodeId, Peer], members: Iterable[Record]) -> list[str]:
    """A line for each other node and its artifacts, for error messages."""
    linked = [_line(peer.name, peer.address, peer.artifacts.values()) for peer in peers.values()]
    others = [member for member in members if member.node not in peers]
    gossiped = [_line(m.name, m.address, m.profile.artifacts) for m in others[:MEMBERS_SHOWN]]
    more = [f"{len(others) - MEMBERS_SHOWN} more members"] if len(others) > MEMBERS_SHOWN else []
    return [*linked, *gossiped, *more]


def _line(name: str, address: Address, artifacts: Collection[Announcement | Holding]) -> str:
    shown = [f"{artifact.model_id} ({artifact.digest[:16]})" for artifact in artifacts]
    more = f" and {len(shown) - ARTIFACTS_SHOWN} more" if len(shown) > ARTIFACTS_SHOWN else ""
    return f"{name} at {address} serves {', '.join(shown[:ARTIFACTS_SHOWN]) + more if shown else 'nothing'}"
