"""A trace as the view that its node's dashboard showed, at any time of the trace.

Applies the entries of a trace to the classes that follow a live node's journal. A trace has no reports of other
members: their part of the view comes from gossip, links and announced chunks.

Must not know: HTTP, clocks. Time is that of the trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import CHUNKS_MAX, Digest
from swarm.dashboard.member_report import cells, member_report
from swarm.dashboard.swarm_view import Json, SwarmView
from swarm.journal import ArtifactsAnnounced, Entry, FetchStarted, Opened, Received
from swarm.observe import trace
from swarm.observe.node_report import NodeReport
from swarm.protocol.messages import NodeId
from swarm.transfer.download_events import PeerHas, PeerJoined, PeerLeft

HELD_CHUNKS_MAX = 128 << 20  # in the bitfields of a recording, a byte each; a line of 200 bytes can name 1 MiB


class Recording:
    """Starts before the first line; `to` moves it forward. `at_s` is its present time.

    Methods that read lines raise ValueError or KeyError if they are not from a trace, or name too many chunks.
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self._entries = filter(None, map(trace.entry, lines))
        self._next: Entry | None = next(self._entries, None)
        self._report = NodeReport()
        self._viewer = SwarmView()
        self._node = NodeId("")
        self._place = ("", "")
        self._held: dict[tuple[NodeId, Digest], Bitfield] = {}  # by node and digest
        self.begin_s = self.at_s = self._next.at_s if self._next else 0.0

    def to(self, at_s: float) -> None:
        """Applies all entries until then."""
        while self._next and self._next.at_s <= at_s:
            self._apply(self._next)
            self.at_s = self._next.at_s
            self._next = next(self._entries, None)
        if self._next:
            self.at_s = max(self.at_s, at_s)

    def view(self) -> Json:
        """The view at this time (docs/dashboard.md)."""
        status = self._report.report(self.at_s)
        held = {digest: bits for (node, digest), bits in self._held.items() if node == self._node}
        own = member_report(status, self._report.fetches, held, self.at_s, place=self._place)
        view = self._viewer.view(status, own, {}, self.at_s)
        view["asked"]["members"] = sum(member["state"] in ("self", "alive", "suspect") for member in status["members"])
        for (node, digest), bits in self._held.items():
            if node != self._node and node in view["members"] and digest in view["members"][node]["holds"]:
                fraction = round(len(bits) / bits.length, 4) if bits.length else 1.0
                known = view["members"][node]["holds"].get(digest, {"wanted": None})
                view["members"][node]["holds"][digest] = {**known, "fraction": fraction, "cells": cells(bits)}
        return view

    def timeline(self, digest: Digest) -> Json | None:
        """The JSON of `/timeline/DIGEST`."""
        return self._report.timeline(digest, self.at_s)

    def tree(self, digest: Digest, chunk: int) -> Json | None:
        """The JSON of `/tree/DIGEST/INDEX`, with this node's edge alone."""
        held = self._held.get((self._node, digest))
        if held is None or chunk >= held.length:
            return None
        fetch = self._report.fetches.records.get(digest)
        source, at_s = (fetch and fetch.origin_of(chunk)) or (None, None)
        edges = {self._node: {"source": source, "at_s": at_s}} if chunk in held else {}
        return {"digest": digest, "chunk": chunk, "edges": edges, "silent": []}

    def _apply(self, entry: Entry) -> None:
        self._report.apply(entry)
        before = len(self._held)
        self._follow(entry)
        if len(self._held) > before and sum(bits.length for bits in self._held.values()) > HELD_CHUNKS_MAX:
            raise ValueError(f"bitfields of more than {HELD_CHUNKS_MAX} chunks")

    def _follow(self, entry: Entry) -> None:
        match entry.event:
            case Opened(node, _, _, host, rack):
                self._node, self._place = node, (host, rack)
            case ArtifactsAnnounced(node, artifacts) if node == self._node:
                for announced in artifacts:
                    if announced.chunks == announced.chunks_total:
                        self._held[node, announced.digest] = Bitfield.full(announced.chunks_total)
            case FetchStarted(_, digest, _, _, chunks_total, held):
                self._held[self._node, digest] = Bitfield(min(chunks_total, CHUNKS_MAX))
                for first, count in held:
                    self._hold(self._node, digest, range(first, min(first + count, chunks_total)))
            case Received(_, digest, chunk, _):
                self._hold(self._node, digest, [chunk])
            case PeerJoined(node, holds):
                if (digest := Digest(entry.subject)) in self._report.fetches.running:
                    self._held[node, digest] = holds
            case PeerHas(node, chunks):
                self._hold(node, Digest(entry.subject), chunks)
            case PeerLeft(node):
                self._held.pop((node, Digest(entry.subject)), None)

    def _hold(self, node: NodeId, digest: Digest, chunks: Iterable[int]) -> None:
        bits = self._held.get((node, digest))
        if bits is not None:
            for chunk in chunks:
                if 0 <= chunk < bits.length:
                    bits.add(chunk)
