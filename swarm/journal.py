"""The journal: an append-only log of all events and actions of a node, in order.

Status, metrics, traces and the dashboard are built from it alone. It keeps the latest `ENTRIES_KEPT` entries in memory,
fewer if they take more than `BYTES_KEPT`, and passes each entry to its subscribers synchronously. An event whose size a
peer chooses has a `weight_bytes`. It has no clock: callers pass the time. Fields named `digest`,
and the subject of an artifact's entries, hold the whole digest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from swarm.content.manifest import Digest, ModelId
from swarm.errors import SwarmError
from swarm.protocol.messages import Address, Announcement, NodeId

ENTRIES_KEPT = 2000  # covers the minutes before a failure
BYTES_KEPT = 16 << 20  # a peer can fill an entry: 256 announcements take 400 KB, a bitfield of the most chunks 1 MB
ENTRY_BYTES = 1024  # of an entry whose event has no weight; a member with 16 artifacts takes four times as much
ANNOUNCEMENT_BYTES = 512  # besides the model id


@dataclass(frozen=True)
class Opened:
    """This node listens. `host` and `rack` are its location labels."""

    node: NodeId
    name: str
    address: Address
    host: str = ""
    rack: str = ""


@dataclass(frozen=True)
class Paused:
    """This process stood still for `seconds`, which the node's clock leaves out; peers may have given it up."""

    seconds: float


@dataclass(frozen=True)
class Joined:
    """A link to a peer is open. Chunks come from it over the transport `scheme`."""

    node: NodeId
    name: str
    address: Address
    scheme: str


@dataclass(frozen=True)
class Unreached:
    """Dialling an address failed."""

    address: Address
    error: SwarmError


@dataclass(frozen=True)
class Left:
    """The link to a peer closed."""

    node: NodeId
    why: str


@dataclass(frozen=True)
class ArtifactsAnnounced:
    """A peer, or this node, announced its artifacts."""

    node: NodeId
    artifacts: tuple[Announcement, ...]

    @property
    def weight_bytes(self) -> int:
        """Approximate memory."""
        return ENTRY_BYTES + sum(ANNOUNCEMENT_BYTES + 4 * len(announced.model_id) for announced in self.artifacts)


@dataclass(frozen=True)
class Withdrawn:
    """The source of an artifact changed, or cannot be read: this node does not serve it any more."""

    model_id: ModelId
    digest: Digest
    why: str


@dataclass(frozen=True)
class Resolved:
    """Resolution of a model id ended, with `digest` or with `error`. `agreed_at_s` is when all holders agreed on a
    digest; the rest of the time was the transfer of the manifest. Times are seconds on the node's clock."""

    model_id: ModelId
    digest: Digest | None
    began_at_s: float
    agreed_at_s: float | None
    error: str | None


@dataclass(frozen=True)
class FetchStarted:
    """A fetch of `size` bytes started. `held` lists the chunks that were verified before, as (first, count) runs,
    `resumed_bytes` in all."""

    model_id: ModelId
    digest: Digest
    size: int
    resumed_bytes: int
    chunks_total: int = 0
    held: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class FetchEnded:
    """A fetch ended; `error` is None if it is complete."""

    digest: Digest
    error: str | None


@dataclass(frozen=True)
class Received:
    """Chunk `chunk` of `size` bytes arrived from a peer and is verified."""

    node: NodeId
    digest: Digest
    chunk: int
    size: int


@dataclass(frozen=True)
class OriginNode:
    """An origin as a node of its own. `node` is made from scheme and address: every node of a swarm names it alike."""

    node: NodeId
    name: str
    scheme: str


@dataclass(frozen=True)
class OriginListed:
    """An origin was asked for the files of a model; `error` if it failed, and is asked again unless `lasting`."""

    origin: OriginNode
    seconds: float
    error: str | None
    lasting: bool = False


@dataclass(frozen=True)
class OriginRead:
    """A read of `path` from `offset` on ended, after `size` bytes of whole chunks; `error` and `lasting` as above."""

    origin: OriginNode
    path: str
    offset: int
    size: int
    seconds: float
    error: str | None
    lasting: bool = False


@dataclass(frozen=True)
class Sent:
    """A transfer of `size` bytes to a peer is complete."""

    node: NodeId
    digest: Digest
    size: int


class Entry(NamedTuple):
    """An event or action at `at_s` on the node's clock. `subject`: a node id, a digest, 'node' or 'upload'."""

    at_s: float
    subject: str
    event: object

    def __str__(self) -> str:
        return f"{self.at_s:10.4f} {self.subject[:16]:<16} {self.event}"


def weight(event: object) -> int:
    """Approximate memory of an event in bytes."""
    return int(getattr(event, "weight_bytes", ENTRY_BYTES))


class Journal:
    """Written by the event loop of the node only."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self._weights: deque[int] = deque()  # of the entries
        self._bytes = 0
        self._subscribers: list[tuple[Callable[[Entry], None], frozenset[type]]] = []
        self._interested: dict[type, tuple[Callable[[Entry], None], ...]] = {}  # by kind of event

    def record(self, at_s: float, subject: str, event: object) -> None:
        """Appends an entry and calls the subscribers."""
        entry = Entry(at_s, subject, event)
        self._entries.append(entry)
        self._weights.append(size := weight(event))
        self._bytes += size
        while len(self._entries) > ENTRIES_KEPT or (self._bytes > BYTES_KEPT and len(self._entries) > 1):
            self._entries.popleft()
            self._bytes -= self._weights.popleft()
        kind = type(event)
        if (interested := self._interested.get(kind)) is None:
            asked = (subscriber for subscriber, kinds in self._subscribers if not kinds or kind in kinds)
            interested = self._interested[kind] = tuple(asked)
        for subscriber in interested:
            subscriber(entry)

    def subscribe(self, subscriber: Callable[[Entry], None], *kinds: type) -> None:
        """Calls `subscriber` with every new entry, or with entries of these kinds of events only.

        It must return within microseconds and must not raise: a chunk causes several entries.
        """
        self._subscribers.append((subscriber, frozenset(kinds)))
        self._interested.clear()

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._entries))
