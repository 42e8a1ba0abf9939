"""The record of the origins that a node reads: bytes, requests, retries and the last failure of each.

Built from journal entries alone. Status, dashboard, metrics and `swarm replay` all read this record. A node tells it to
other members in its report, and a view adds up what all members tell (`dashboard.swarm_view`).

    requests   listings and ranges that were asked for; a range may take a redirect and further requests of its client
    retries    those of them that failed and are asked for again
    bytes      of verified chunks; a chunk that is read again for a proof counts again

Bounded: `ORIGINS_MAX` records, those of the origins that were read last.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from swarm.journal import Entry, Journal, OriginListed, OriginNode, OriginRead, Received
from swarm.observe.rate import Rate
from swarm.protocol.messages import NodeId

ORIGINS_MAX = 64
ERROR_CHARS_MAX = 1000


@dataclass
class OriginRecord:
    """What this node has read from an origin. `error`: of the last request, None if that succeeded."""

    origin: OriginNode
    rate: Rate
    bytes: int = 0
    requests: int = 0
    retries: int = 0
    error: str | None = None

    def report(self, now: float) -> dict[str, Any]:
        """The record as JSON."""
        return {
            "id": self.origin.node,
            "name": self.origin.name,
            "scheme": self.origin.scheme,
            "bytes": self.bytes,
            "rate_bytes_per_s": round(self.rate.at(now)),
            "requests": self.requests,
            "retries": self.retries,
            "error": self.error,
        }


class OriginRecords:
    """`follow` a journal; `records` are by node id, the origin that was asked last comes last.

    `bytes`, `requests` and `retries` are by scheme, of all origins that there ever were.
    """

    KINDS = (Received, OriginListed, OriginRead)

    def __init__(self) -> None:
        self.records: dict[NodeId, OriginRecord] = {}
        self.bytes: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()

    def follow(self, journal: Journal) -> None:
        """Applies the entries that are recorded from now on."""
        journal.subscribe(self.apply, *self.KINDS)

    def apply(self, entry: Entry) -> None:
        """Applies an entry."""
        match entry.event:
            case Received(node, _, _, size):  # first, because there are as many as chunks
                if record := self.records.get(node):
                    record.bytes += size
                    record.rate.add(entry.at_s, size)
                    self.bytes[record.origin.scheme] += size
            case OriginListed(origin, _, error, lasting) | OriginRead(origin, _, _, _, _, error, lasting):
                self._asked(origin, error, again=error is not None and not lasting, at_s=entry.at_s)

    def _asked(self, origin: OriginNode, error: str | None, *, again: bool, at_s: float) -> None:
        record = self.records.pop(origin.node, None) or OriginRecord(origin, Rate(at_s))
        self.records[origin.node] = record
        record.requests += 1
        record.retries += again
        record.error = error and error[:ERROR_CHARS_MAX]
        self.requests[origin.scheme] += 1
        self.retries[origin.scheme] += again
        if len(self.records) > ORIGINS_MAX:
            del self.records[next(iter(self.records))]
