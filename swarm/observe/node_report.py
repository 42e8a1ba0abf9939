"""The picture that a journal draws: who is there, who holds what, what is moving and how fast.

Folds journal entries, and nothing else, into what `status --json`, the table and the progress bar show. Bounded:
members that left and fetches that ended are forgotten after a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from swarm.content.manifest import Digest, ModelId
from swarm.journal import (
    ArtifactsAnnounced,
    Entry,
    FetchEnded,
    FetchStarted,
    Joined,
    Journal,
    Left,
    Opened,
    Received,
    Sent,
)
from swarm.membership.swim import Changed
from swarm.protocol.messages import Address, Announcement, NodeId
from swarm.protocol.packets import Record, State

RATE_WINDOW_S = 5.0  # chunks come in bursts: over less a slow member looks fast now and then
RATE_LEAST_S = 0.2
GONE_KEPT = 64  # members that left, kept to be looked at
_HEARD = (Opened, Joined, Changed, Left, ArtifactsAnnounced, FetchStarted, FetchEnded, Received, Sent)  # of a journal


class Rate:
    """Bytes per second over the last `RATE_WINDOW_S`, or over all the time there was `since` it could have moved any.

    Always of the same time, so that the rates of its links add up to that of a fetch.
    """

    def __init__(self, since_s: float = float("-inf")) -> None:
        self._since_s = since_s
        self._window: deque[tuple[float, int]] = deque()
        self._bytes = 0

    def add(self, at_s: float, size: int) -> None:
        """Counts bytes that moved at a time."""
        self._window.append((at_s, size))
        self._bytes += size
        self._forget(at_s)

    def at(self, now: float) -> float:
        """The rate now."""
        self._forget(now)
        if not self._window:
            return 0.0
        return self._bytes / min(RATE_WINDOW_S, max(RATE_LEAST_S, now - self._since_s))

    def _forget(self, now: float) -> None:
        while self._window and self._window[0][0] < now - RATE_WINDOW_S:
            self._bytes -= self._window.popleft()[1]


@dataclass
class _Member:
    """`transport` is None while this node is not linked with it; `record` is what gossip says."""

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

    def held(self) -> list[tuple[str, str, str, int | None, float]]:
        """(model id, digest, tier, bytes, fraction) of each artifact: as its link says, or else gossip."""
        if self.transport is not None:
            linked = self.artifacts.values()
            return [(a.model_id, a.digest, a.tier, a.size, _fraction(a.chunks, a.chunks_total)) for a in linked]
        heard = self.record.profile.artifacts if self.record else ()
        return [(a.model_id, a.digest, a.tier, None, _fraction(a.chunks, a.chunks_total)) for a in heard]

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
class _Flow:
    bytes: int = 0
    rate: Rate = field(default_factory=Rate)


@dataclass
class FetchReport:
    """One fetch of this node: bytes verified so far, resumed ones included, and who they come from."""

    model_id: ModelId
    size: int
    done_bytes: int
    started_at_s: float
    sources: set[NodeId] = field(default_factory=set)
    rate: Rate = field(init=False)

    def __post_init__(self) -> None:
        self.rate = Rate(self.started_at_s)

    def eta_s(self, now: float) -> float | None:
        """Seconds until complete at the present rate; None while nothing moves."""
        rate = self.rate.at(now)
        return (self.size - self.done_bytes) / rate if rate > 0 else None


def distinct_names(members: Iterable[tuple[str, str, str]]) -> dict[str, str]:
    """A name for each (id, name, address), by id: its own unless somebody before it has that, then `name (address)`.

    The id is added to that where it does not tell them apart either.
    """
    owners: dict[str, str] = {}
    for node, name, address in members:
        shown = name if name not in owners else f"{name} ({address})"
        while shown in owners:
            shown = f"{shown} ({node})"
        owners[shown] = node
    return {node: shown for shown, node in owners.items()}


class Picture:
    """Let it `follow` a journal; read `report` and `fetches`.

    `condition` says what the journal does not, of the node itself: its version, whether it is open to all, its mDNS.
    """

    def __init__(self, condition: Callable[[], Mapping[str, Any]] = dict) -> None:
        self._condition = condition
        self.fetches: dict[Digest, FetchReport] = {}  # by digest, those that run
        self._node = {"id": "", "name": "", "address": ""}
        self._members: dict[NodeId, _Member] = {}
        self._flows: dict[tuple[Digest, str, NodeId], _Flow] = {}  # (digest, direction, node)
        self._now = 0.0

    def follow(self, journal: Journal) -> None:
        """Takes into account what happens from now on."""
        journal.subscribe(self.apply, *_HEARD)

    def apply(self, entry: Entry) -> None:
        """Takes one more entry into account."""
        self._now = entry.at_s
        match entry.event:
            case Received(node, digest, _, size):  # first: there are as many as chunks
                self._flow(digest, "down", node, size)
                if fetch := self.fetches.get(digest):
                    fetch.done_bytes += size
                    fetch.rate.add(entry.at_s, size)
                    fetch.sources.add(node)
            case Sent(node, digest, size):
                self._flow(digest, "up", node, size)
            case Opened(node, name, address):
                self._node = {"id": node, "name": name, "address": address}
                self._members[node] = _Member(name, address, "self")
            case Joined(node, name, address, scheme):
                heard = self._members.get(node)
                self._members[node] = _Member(
                    name, address, scheme, record=heard.record if heard else None, linked_at_s=entry.at_s
                )
            case Changed(record):
                self._hear(record)
            case Left(node):
                self._leave(node)
            case ArtifactsAnnounced(node, artifacts):
                if member := self._members.get(node):
                    member.artifacts = {announced.digest: announced for announced in artifacts}
            case FetchStarted(model_id, digest, size, resumed_bytes):
                self.fetches[digest] = FetchReport(model_id, size, resumed_bytes, entry.at_s)
            case FetchEnded(digest):
                self.fetches.pop(digest, None)

    def report(self, now: float) -> dict[str, Any]:
        """What `swarm status --json` prints: node, members, artifacts, transfers."""
        names = self._names()
        return {
            "node": {**self._node, **self._condition()},
            "members": [
                {"id": node, "name": names[node], **member.report(now)} for node, member in self._members.items()
            ],
            "artifacts": self._artifacts(names),
            "transfers": [
                {
                    "digest": digest,
                    "direction": direction,
                    "peer": names.get(node, node),
                    "bytes": flow.bytes,
                    "rate_bytes_per_s": round(flow.rate.at(now)),
                }
                for (digest, direction, node), flow in self._flows.items()
            ],
        }

    def _names(self) -> dict[str, str]:
        """What every member is shown as; one that left takes no name from one that is here."""
        here_first = sorted(self._members.items(), key=lambda item: not item[1].here)
        return distinct_names((node, member.name, member.address) for node, member in here_first)

    def _artifacts(self, names: dict[str, str]) -> list[dict[str, Any]]:
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for node, member in self._members.items():
            for model_id, digest, tier, size, fraction in member.held() if member.here else ():
                row = found.setdefault(
                    (model_id, digest),
                    {"model_id": model_id, "digest": digest, "tier": tier, "bytes": size, "members": {}},
                )
                row["bytes"] = row["bytes"] if size is None else size
                row["members"][names[node]] = fraction
        return [found[key] for key in sorted(found)]

    def _flow(self, digest: Digest, direction: str, node: NodeId, size: int) -> None:
        if (flow := self._flows.get((digest, direction, node))) is None:
            fetch = self.fetches.get(digest) if direction == "down" else None
            flow = self._flows[digest, direction, node] = _Flow(rate=Rate(fetch.started_at_s) if fetch else Rate())
        flow.bytes += size
        flow.rate.add(self._now, size)

    def _leave(self, node: NodeId) -> None:
        if member := self._members.get(node):
            member.transport = None
        for fetch in self.fetches.values():
            fetch.sources.discard(node)
        self._forget_gone()

    def _hear(self, record: Record) -> None:
        member = self._members.setdefault(record.node, _Member(record.name, record.address))
        member.record = record
        if member.transport is None:
            member.name, member.address = record.name, record.address
        if not member.here:
            self._forget_gone()

    def _forget_gone(self) -> None:
        gone = [name for name, member in self._members.items() if not member.here]
        for name in gone[: max(0, len(gone) - GONE_KEPT)]:
            del self._members[name]
            self._flows = {key: flow for key, flow in self._flows.items() if key[2] != name}


def _fraction(chunks: int, total: int) -> float:
    return round(chunks / total, 4) if total else 1.0
