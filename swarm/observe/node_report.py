"""The report of a node at `/status`: members, the artifacts that they hold, and its own transfers with their rates.

Built from journal entries alone. Bounded: members that left and fetches that ended are dropped after a while, and the
report leaves out what exceeds its budget of bytes, members without a link and rare artifacts first (`omitted`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarm.content.manifest import Digest
from swarm.journal import ArtifactsAnnounced, Entry, Joined, Journal, Left, Opened, Received, Sent
from swarm.membership.swim_events import MemberChanged
from swarm.observe import budget
from swarm.observe.fetch_record import FetchRecords
from swarm.observe.rate import Rate
from swarm.protocol.messages import Address, Announcement, NodeId
from swarm.protocol.packets import Holding, Record, State

GONE_KEPT = 64  # members that left, still reported
MEMBERS_BYTES_MAX, ARTIFACTS_BYTES_MAX, TRANSFERS_BYTES_MAX = 3 << 20, 3 << 20, 1 << 20  # of a report
LANES_MAX = 512  # sources in a timeline
REVISIONS_MAX = 8  # of an artifact; holders may name it differently
TEXT_CHARS_MAX = 256  # of a name in a page; two nodes of one name have their addresses and ids added


@dataclass(frozen=True)
class _HeldArtifact:
    """`fraction` of all chunks, `wanted` of those of the part that the member wants; None if it wants all."""

    model_id: str
    digest: str
    tier: str
    bytes: int | None
    fraction: float
    wanted: float | None

    @classmethod
    def of(cls, artifact: Announcement | Holding, size: int | None) -> _HeldArtifact:
        part = artifact.wanted
        wanted = None if part is None else _fraction(part.chunks, part.chunks_total)
        fraction = _fraction(artifact.chunks, artifact.chunks_total)
        return cls(artifact.model_id, artifact.digest, artifact.tier, size, fraction, wanted)


@dataclass
class _KnownMember:
    """`transport` is None without a link; `record` comes from gossip."""

    name: str
    address: Address
    transport: str | None = None
    artifacts: dict[Digest, Announcement] = field(default_factory=dict)
    record: Record | None = None
    linked_at_s: float | None = None

    @property
    def state(self) -> str:
        if self.record and (self.transport is None or self.record.state is State.SUSPECT):
            return self.record.state.name.lower()
        return "left" if self.transport is None else "alive"

    @property
    def here(self) -> bool:
        return self.state in ("alive", "suspect")

    def held(self) -> list[_HeldArtifact]:
        """Its artifacts: from its link, or else from gossip."""
        if self.transport is not None:
            return [_HeldArtifact.of(announced, announced.size) for announced in self.artifacts.values()]
        return [_HeldArtifact.of(held, None) for held in (self.record.profile.artifacts if self.record else ())]

    def revisions(self, digest: Digest) -> Sequence[str]:
        """Branches, tags, labels and commit of an artifact, as its link says."""
        return self.artifacts[digest].revisions if self.transport is not None and digest in self.artifacts else ()

    def report(self, now: float) -> dict[str, Any]:
        profile = self.record.profile if self.record else None
        return {
            "address": self.address,
            "state": self.state,
            "transport": self.transport,
            "linked_s": None
            if self.transport is None or self.linked_at_s is None
            else round(now - self.linked_at_s, 1),
            "gossip": self.record is not None,
            "host": profile.host if profile else None,
            "rack": profile.rack if profile else None,
            "uploads": profile.uploads if profile else None,
            "slots": profile.slots if profile else None,
            "version": (profile.software or None) if profile else None,
        }


@dataclass
class _Traffic:
    rate: Rate
    bytes: int = 0


def distinct_names(members: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """A name for each (id, name, address), by id: the first node with a name has it, the next are `name (address)`.

    The id is added if the address is the same too.
    """
    owners: dict[str, str] = {}
    for node, name, address in members:
        shown = name if name not in owners else f"{name} ({address})"
        while shown in owners:
            shown = f"{shown} ({node})"
        owners[shown] = node
    return {node: shown for shown, node in owners.items()}


class NodeReport:
    """`follow` a journal; read `report`, `timeline` and `fetches`.

    `condition` gives the facts that are not in the journal: `version`, `open` (without a key) and `mdns`.
    """

    def __init__(self, condition: Callable[[], Mapping[str, Any]] = dict) -> None:
        self.fetches = FetchRecords()
        self._condition = condition
        self._node = {"id": "", "name": "", "address": ""}
        self._members: dict[NodeId, _KnownMember] = {}
        self._traffic: dict[tuple[Digest, str, NodeId], _Traffic] = {}  # by digest, direction and node

    def follow(self, journal: Journal) -> None:
        """Applies the entries that are recorded from now on."""
        self.fetches.follow(journal)
        journal.subscribe(self._apply, Opened, Joined, MemberChanged, Left, ArtifactsAnnounced, Received, Sent)

    def apply(self, entry: Entry) -> None:
        """Applies an entry."""
        self.fetches.apply(entry)
        self._apply(entry)

    def _apply(self, entry: Entry) -> None:
        match entry.event:
            case Received(node, digest, _, size):  # first, because there are as many as chunks
                self._move(digest, "down", node, size, entry.at_s)
            case Sent(node, digest, size):
                self._move(digest, "up", node, size, entry.at_s)
            case Opened(node, name, address):
                self._node = {"id": node, "name": name, "address": address}
                self._members[node] = _KnownMember(name, address, "self")
            case Joined(node, name, address, scheme):
                known = self._members.get(node)
                self._members[node] = _KnownMember(
                    name, address, scheme, record=known.record if known else None, linked_at_s=entry.at_s
                )
            case MemberChanged(record):
                self._change(record)
            case Left(node):
                if member := self._members.get(node):
                    member.transport, member.artifacts = None, {}
                self._forget_gone()
            case ArtifactsAnnounced(node, artifacts):
                if member := self._members.get(node):
                    member.artifacts = {announced.digest: announced for announced in artifacts}

    def report(self, now: float) -> dict[str, Any]:
        """The JSON of `/status`: `node`, `members`, `artifacts`, `origins`, `transfers`, `omitted` (docs/status.md)."""
        names = self._names()
        members = [{"id": node, "name": names[node], **member.report(now)} for node, member in self._members.items()]
        artifacts, transfers = self._artifacts(names), self._transfers(names, now)
        near = {node for node, member in self._members.items() if member.transport is not None}
        shown = {
            "members": budget.within(members, MEMBERS_BYTES_MAX, first=_urgency),
            "artifacts": budget.within(
                artifacts, ARTIFACTS_BYTES_MAX, first=lambda row: (near.isdisjoint(row["nodes"]), -len(row["nodes"]))
            ),
            "transfers": budget.within(transfers, TRANSFERS_BYTES_MAX, first=lambda row: -row["rate_bytes_per_s"]),
        }
        everything = {"members": members, "artifacts": artifacts, "transfers": transfers}
        omitted = {name: len(everything[name]) - len(rows) for name, rows in shown.items()}
        origins = [record.report(now) for record in self.fetches.origins.records.values()]
        return {"node": {**self._node, **self._condition()}, **shown, "origins": origins, "omitted": omitted}

    def timeline(self, digest: Digest, now: float) -> dict[str, Any] | None:
        """The JSON of `/timeline/DIGEST`: the last fetch of an artifact by this node; None if it fetched none."""
        if (fetch := self.fetches.records.get(digest)) is None:
            return None
        names, timeline = self._names(), fetch.timeline(now)
        lanes = [
            {**lane, "name": names.get(lane["node"], lane["name"])[:TEXT_CHARS_MAX]}
            for lane in timeline["lanes"][:LANES_MAX]
        ]
        return {"node": self._node["id"], **timeline, "lanes": lanes}

    def _names(self) -> dict[str, str]:
        """Distinct names by node id; members that are here choose first."""
        here_first = sorted(self._members.items(), key=lambda item: not item[1].here)
        named = distinct_names((node, member.name, member.address) for node, member in here_first)
        return {**{node: read.origin.name for node, read in self.fetches.origins.records.items()}, **named}

    def _artifacts(self, names: dict[str, str]) -> list[dict[str, Any]]:
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for node, member in self._members.items():
            for held in member.held() if member.here else ():
                row = found.setdefault(
                    (held.model_id, held.digest),
                    {"model_id": held.model_id, "digest": held.digest, "tier": held.tier, "bytes": held.bytes}
                    | {"members": {}, "nodes": {}, "wanted": {}, "revisions": []},
                )
                row["bytes"] = row["bytes"] if held.bytes is None else held.bytes
                row["revisions"] = [*dict.fromkeys([*row["revisions"], *member.revisions(Digest(held.digest))])][
                    :REVISIONS_MAX
                ]
                row["members"][names[node]] = row["nodes"][node] = held.fraction
                if held.wanted is not None:
                    row["wanted"][node] = held.wanted
        return [found[key] for key in sorted(found)]

    def _transfers(self, names: dict[str, str], now: float) -> list[dict[str, Any]]:
        return [
            {
                "digest": digest,
                "direction": direction,
                "peer": names.get(node, node),
                "node": node,
                "bytes": traffic.bytes,
                "rate_bytes_per_s": round(traffic.rate.at(now)),
            }
            for (digest, direction, node), traffic in self._traffic.items()
        ]

    def _move(self, digest: Digest, direction: str, node: NodeId, size: int, at_s: float) -> None:
        if (traffic := self._traffic.get((digest, direction, node))) is None:
            fetch = self.fetches.records.get(digest) if direction == "down" else None
            traffic = _Traffic(Rate(fetch.started_at_s) if fetch and fetch.running else Rate())
            self._traffic[digest, direction, node] = traffic
        traffic.bytes += size
        traffic.rate.add(at_s, size)

    def _change(self, record: Record) -> None:
        member = self._members.setdefault(record.node, _KnownMember(record.name, record.address))
        member.record = record
        if member.transport is None:
            member.name, member.address = record.name, record.address
        if not member.here:
            self._forget_gone()

    def _forget_gone(self) -> None:
        gone = [name for name, member in self._members.items() if not member.here]
        if forgotten := set(gone[: max(0, len(gone) - GONE_KEPT)]):
            for name in forgotten:
                del self._members[name]
            self._traffic = {key: traffic for key, traffic in self._traffic.items() if key[2] not in forgotten}


def _urgency(member: dict[str, Any]) -> tuple[bool, bool, bool]:
    """This node, linked members and suspects come first."""
    return member["transport"] != "self", member["transport"] is None, member["state"] != "suspect"


def _fraction(chunks: int, total: int) -> float:
    return round(chunks / total, 4) if total else 1.0
