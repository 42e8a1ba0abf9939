"""The journal: every event and action of a node, once, in order.

Status, metrics, traces and test failures read it and nothing else. It keeps the latest entries in memory, and hands
every entry to its subscribers as it happens. It is told the time; it has no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from swarm.errors import SwarmError
from swarm.protocol.messages import Announcement

ENTRIES_KEPT = 2000  # enough to see what led to a failure; an entry may hold all of a peer's announcements, some 100 KB


@dataclass(frozen=True)
class Opened:
    """This node listens; `host` and `rack` are the labels of its place."""

    node: str
    name: str
    address: str
    host: str = ""
    rack: str = ""


@dataclass(frozen=True)
class Joined:
    """A peer said hello; it is read through `scheme`."""

    node: str
    name: str
    address: str
    scheme: str


@dataclass(frozen=True)
class Unreached:
    """Nobody could be talked to at an address that was dialled."""

    address: str
    error: SwarmError


@dataclass(frozen=True)
class Left:
    """A peer is gone."""

    node: str
    why: str


@dataclass(frozen=True)
class ArtifactsAnnounced:
    """What a node (this one too) says that it holds."""

    node: str
    artifacts: tuple[Announcement, ...]


@dataclass(frozen=True)
class Resolved:
    """It was found out, or not (`error`), what a model id stands for: seconds on the node's clock of the beginning, and
    of when it was agreed on a digest and its manifest was wanted. `digest` is None as long as there is none."""

    model_id: str
    digest: str | None
    began_at_s: float
    agreed_at_s: float | None
    error: str | None


@dataclass(frozen=True)
class FetchStarted:
    """A fetch of `size` bytes begins; `resumed_bytes` of them were here already: of `chunks_total` those that `held`
    names, as (first, count) runs."""

    model_id: str
    digest: str
    size: int
    resumed_bytes: int
    chunks_total: int = 0
    held: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class FetchEnded:
    """A fetch is over; `error` is None when it is complete."""

    digest: str
    error: str | None


@dataclass(frozen=True)
class Received:
    """Chunk number `chunk`, of `size` bytes, came from a peer and is verified."""

    node: str
    digest: str
    chunk: int
    size: int


@dataclass(frozen=True)
class Sent:
    """A transfer of `size` bytes went out to a peer whole."""

    node: str
    digest: str
    size: int


class Entry(NamedTuple):
    """`event` (an event or action) happened at `at_s` on the node's clock; `subject` is a peer, an artifact or
    'node'."""

    at_s: float
    subject: str
    event: object

    def __str__(self) -> str:
        return f"{self.at_s:10.4f} {self.subject[:16]:<16} {self.event}"


class Journal:
    """Append-only; only the node's loop writes to it."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque(maxlen=ENTRIES_KEPT)
        self._subscribers: list[tuple[Callable[[Entry], None], frozenset[type]]] = []
        self._interested: dict[type, tuple[Callable[[Entry], None], ...]] = {}  # in each kind that was recorded

    def record(self, at_s: float, subject: str, event: object) -> None:
        """Appends one entry."""
        entry = Entry(at_s, subject, event)
        self._entries.append(entry)
        kind = type(event)
        if (interested := self._interested.get(kind)) is None:
            asked = (subscriber for subscriber, kinds in self._subscribers if not kinds or kind in kinds)
            interested = self._interested[kind] = tuple(asked)
        for subscriber in interested:
            subscriber(entry)

    def subscribe(self, subscriber: Callable[[Entry], None], *kinds: type) -> None:
        """Calls `subscriber` with every entry from now on, or with those about these kinds of things.

        It must be quick and must not raise: there are several entries for each chunk.
        """
        self._subscribers.append((subscriber, frozenset(kinds)))
        self._interested.clear()

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._entries))
