"""A trace as the swarm that its node saw, at any moment of it: the same view that the node's dashboard showed.

Folds lines of a trace through the very folds that a live node's journal goes through. What other members told of
themselves while somebody watched is in no trace: of them a recording knows what gossip, links and their chunks said.

Must not know: HTTP, clocks. Time is that of the trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import CHUNKS_MAX, Digest
from swarm.dashboard import member_report
from swarm.dashboard.member_report import cells
from swarm.dashboard.swarm_view import Json, SwarmView
from swarm.journal import ArtifactsAnnounced, Entry, FetchStarted, Opened, Received
from swarm.observe.fetch_history import FetchHistories
from swarm.observe.node_report import Picture
from swarm.observe.trace import entry
from swarm.protocol.messages import NodeId
from swarm.transfer.download_events import PeerHas, PeerJoined, PeerLeft


class Recording:
    """Starts before the first of the lines; `to` takes it on, and never back. `at_s` is where it is.

    Whatever reads lines raises ValueError where they are none of a trace.
    """

    def __init__(self, traced: Iterable[Mapping[str, Any]]) -> None:
        self._entries = filter(None, map(entry, traced))
        self._next: Entry | None = next(self._entries, None)
        self._picture = Picture()
        self._histories = FetchHistories()
        self._viewer = SwarmView()
        self._node = NodeId("")
        self._place = ("", "")
        self._held: dict[tuple[NodeId, Digest], Bitfield] = {}  # by node and digest
        self.begin_s = self.at_s = self._next.at_s if self._next else 0.0

    def to(self, at_s: float) -> None:
        """Takes everything into account that happened until then."""
        while self._next and self._next.at_s <= at_s:
            self._apply(self._next)
            self.at_s = self._next.at_s
            self._next = next(self._entries, None)
        if self._next:
            self.at_s = max(self.at_s, at_s)

    def view(self) -> Json:
        """The swarm as it was (docs/dashboard.md)."""
        report = self._picture.report(self.at_s)
        mine = {digest: held for (node, digest), held in self._held.items() if node == self._node}
        told = member_report.own(report, self._picture.fetches, self._histories, mine, self.at_s, place=self._place)
        view = self._viewer.view(report, told, {}, self.at_s)
        view["asked"]["members"] = sum(known["state"] in ("self", "alive", "suspect") for known in report["members"])
        for (node, digest), held in self._held.items():
            if node != self._node and node in view["members"] and digest in view["members"][node]["holds"]:
                fraction = round(len(held) / held.length, 4) if held.length else 1.0
                view["members"][node]["holds"][digest] = {"fraction": fraction, "cells": cells(held)}
        return view

    def timeline(self, digest: Digest) -> Json | None:
        """Where the time of a fetch went, as `/timeline/DIGEST` says it."""
        fetch = self._histories.fetches.get(digest)
        if fetch is None:
            return None
        found = fetch.timeline(self.at_s)
        names = {member["id"]: member["name"] for member in self._picture.report(self.at_s)["members"]}
        return {
            "node": self._node,
            **found,
            "lanes": [{**lane, "name": names.get(lane["node"], lane["node"])} for lane in found["lanes"]],
        }

    def tree(self, digest: Digest, chunk: int) -> Json | None:
        """The one edge of a chunk's way that the trace knows, as `/tree/DIGEST/INDEX` says it."""
        held = self._held.get((self._node, digest))
        if held is None or chunk >= held.length:
            return None
        fetch = self._histories.fetches.get(digest)
        source, at_s = (fetch and fetch.parent(chunk)) or (None, None)
        edges = {self._node: {"source": source, "at_s": at_s}} if chunk in held else {}
        return {"digest": digest, "chunk": chunk, "edges": edges, "silent": []}

    def _apply(self, done: Entry) -> None:
        self._picture.apply(done)
        self._histories.apply(done)
        match done.event:
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
                if (digest := Digest(done.subject)) in self._picture.fetches:
                    self._held[node, digest] = holds
            case PeerHas(node, chunks):
                self._hold(node, Digest(done.subject), chunks)
            case PeerLeft(node):
                self._held.pop((node, Digest(done.subject)), None)

    def _hold(self, node: NodeId, digest: Digest, chunks: Iterable[int]) -> None:
        bits = self._held.get((node, digest))
        if bits is not None:
            for chunk in chunks:
                if 0 <= chunk < bits.length:
                    bits.add(chunk)
