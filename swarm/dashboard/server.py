"""The web dashboard of a node: a static page, and the JSON that it draws (docs/dashboard.md).

    /                             the page, with its assets under /web/
    /events                       the view as server-sent events
    /view                         the view, once
    /member                       the report of this node about itself
    /chunk/DIGEST/INDEX           the node that sent this node a chunk
    /tree/DIGEST/INDEX            the same for every member: the distribution tree of the chunk
    /timeline/DIGEST              a fetch of this node: phases, and a lane for each source
    /timeline/DIGEST/of/NODE      the same for another member

Owns the paths. Assets come from a fixed table. Requests name members by id, never by address; requests to members are
bounded in number, time and size.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.resources
from collections.abc import Callable
from typing import Annotated, Protocol, TypeVar

import msgspec

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import CHUNKS_MAX, Digest, ModelId
from swarm.dashboard.collector import Collector, Read
from swarm.dashboard.member_report import PATH, MemberReport, Words, member_report
from swarm.dashboard.sse import EventStream
from swarm.dashboard.swarm_view import Json, SwarmView
from swarm.errors import PeerError, SettingsError
from swarm.journal import Entry, Journal, Left
from swarm.net.http_pages import Asset, EventPage, Page
from swarm.observe import budget
from swarm.observe.fetch_record import BUCKETS
from swarm.observe.node_report import LANES_MAX, NodeReport
from swarm.protocol.messages import Address, NodeId, Text
from swarm.protocol.packets import Record

ASSETS = {
    "index.html": "text/html",
    "style.css": "text/css",
    **dict.fromkeys(
        (
            "main.js",
            "stream.js",
            "swarm.js",
            "members.js",
            "chunks.js",
            "timeline.js",
            "history.js",
            "replay.js",
            "words.js",
        ),
        "text/javascript",
    ),
    "icon.svg": "image/svg+xml",
}
ASKED_MAX = 256  # members asked for their edge of a tree
ASKED_AT_ONCE = 16
ASK_TIMEOUT_S = 2.0
EDGE_BYTES_MAX = 4096
TIMELINE_BYTES_MAX = 1 << 20

T = TypeVar("T")

DIGEST = "{digest:[0-9a-f]{64}}"
INDEX = "{index:[0-9]{1,8}}"
NODE = "{node:[0-9a-f]{16}}"


class _Edge(msgspec.Struct, frozen=True):
    """Edge of a chunk's tree: `source` sent the chunk to `node`; None if `node` stored it before."""

    node: NodeId
    held: bool
    source: NodeId | None
    at_s: float | None


_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class _Lane(msgspec.Struct, frozen=True):
    node: NodeId
    name: Text
    bytes: _Count
    chunks: _Count
    rejected_chunks: _Count
    banned: Words | None
    rejected_at_s: Annotated[tuple[_Seconds, ...], msgspec.Meta(max_length=BUCKETS)]
    buckets: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=BUCKETS)]


class _Timeline(msgspec.Struct, frozen=True):
    """The JSON of `NodeReport.timeline`."""

    node: NodeId
    model_id: ModelId
    digest: Digest
    bytes: _Count
    resumed_bytes: _Count
    received_bytes: _Count
    running: bool
    error: Words | None
    seconds: _Seconds
    bucket_s: _Seconds
    phases: Annotated[dict[Text, _Seconds], msgspec.Meta(max_length=16)]
    lanes: Annotated[tuple[_Lane, ...], msgspec.Meta(max_length=LANES_MAX)]


_edge_decoder = msgspec.json.Decoder(_Edge)
_timeline_decoder = msgspec.json.Decoder(_Timeline)


class Watched(Protocol):
    """The part of a node that the dashboard reads."""

    id: NodeId
    address: Address

    def now(self) -> float:
        """Seconds on the node's clock."""

    def members(self) -> list[Record]:
        """All other members that gossip knows."""

    @property
    def place(self) -> tuple[str, str]:
        """Labels of host and rack."""

    def holdings(self) -> dict[Digest, Bitfield]:
        """Held chunks by digest."""


class Dashboard:
    """Call `attach` before the first request. `room`: free and total bytes of this node's disk, if known."""

    def __init__(self, report: NodeReport, *, room: Callable[[], tuple[int, int] | None] = lambda: None) -> None:
        self._report = report
        self._room = room
        self._viewer = SwarmView()
        self._events = EventStream(self.view, lambda: self._collector.run())

    def attach(self, node: Watched, read: Read) -> None:
        """Shows this node; `read` reads pages of other nodes."""
        self._node = node
        self._read = read
        self._collector = Collector(read, node.members, node.now)

    def follow(self, journal: Journal) -> None:
        """Asks a member as soon as its link closes. A killed member thus shows as lost before gossip declares it
        dead."""

        def apply(entry: Entry) -> None:
            if isinstance(entry.event, Left):
                self._collector.ask_next(entry.event.node)

        journal.subscribe(apply, Left)

    def pages(self) -> dict[str, Page]:
        """All pages by path."""
        return {
            "/": asset("index.html"),
            **{f"/web/{name}": asset(name) for name in ASSETS},
            "/events": EventPage(self._events.watch),
            "/view": self.view_once,
            PATH: lambda: msgspec.to_builtins(self.own()),
            f"/chunk/{DIGEST}/{INDEX}": self.chunk,
            f"/tree/{DIGEST}/{INDEX}": self.tree,
            f"/timeline/{DIGEST}": self.timeline,
            f"/timeline/{DIGEST}/of/{NODE}": self.timeline_of,
        }

    def own(self) -> MemberReport:
        """The report of this node about itself."""
        return self._own(self._report.report(self._node.now()))

    def view(self) -> Json:
        """The view, from the reports of members that have arrived."""
        now = self._node.now()
        status = self._report.report(now)
        return self._viewer.view(status, self._own(status), self._collector.answers, now)

    async def view_once(self) -> Json:
        """The view, after asking every member once unless a browser watches."""
        await self._collector.ask_all(ASKED_MAX)
        return self.view()

    def chunk(self, digest: Digest, index: str) -> Json | None:
        """This node's edge of a chunk's tree; None if it does not hold the artifact."""
        edge = self._edge(digest, int(index))
        return None if edge is None else dict(msgspec.to_builtins(edge))

    async def tree(self, digest: Digest, index: str) -> Json | None:
        """The edges of all members that hold the artifact; `silent` lists members that did not answer."""
        if int(index) >= CHUNKS_MAX:
            return None
        holders = [m for m in self._node.members() if any(h.digest == digest for h in m.profile.artifacts)][:ASKED_MAX]
        limit = asyncio.Semaphore(ASKED_AT_ONCE)

        async def ask(member: Record) -> _Edge | None:
            async with limit:
                data = await self._page_of(member, f"/chunk/{digest}/{int(index)}", EDGE_BYTES_MAX)
            edge = _decoded(_edge_decoder, data)
            return edge if edge and edge.node == member.node else None

        answers = await asyncio.gather(*map(ask, holders))
        own = self._edge(digest, int(index))
        edges = [edge for edge in (own, *answers) if edge and edge.held]
        return {
            "digest": digest,
            "chunk": int(index),
            "edges": {e.node: {"source": e.source, "at_s": e.at_s} for e in edges},
            "silent": [member.node for member, edge in zip(holders, answers, strict=True) if edge is None],
        }

    def timeline(self, digest: Digest) -> Json | None:
        """The last fetch of an artifact by this node; None if there was none. Readers refuse more than
        TIMELINE_BYTES_MAX: lanes are left out."""
        timeline = self._report.timeline(digest, self._node.now())
        while timeline and budget.size(timeline) > TIMELINE_BYTES_MAX:
            timeline["lanes"] = timeline["lanes"][: len(timeline["lanes"]) // 2]
        return timeline

    async def timeline_of(self, digest: Digest, node: str) -> Json | None:
        """The last fetch of an artifact by a member; `silent` if it does not answer or has none. That is no 404: a
        member that the page still shows may have died."""
        if node == self._node.id:
            return self.timeline(digest)
        member = next((member for member in self._node.members() if member.node == node), None)
        data = await self._page_of(member, f"/timeline/{digest}", TIMELINE_BYTES_MAX) if member else None
        timeline = _decoded(_timeline_decoder, data)
        return msgspec.to_builtins(timeline) if timeline else {"node": node, "digest": digest, "silent": True}

    def _own(self, status: Json) -> MemberReport:
        held, now = self._node.holdings(), self._node.now()
        return member_report(status, self._report.fetches, held, now, place=self._node.place, room=self._room())

    def _edge(self, digest: Digest, index: int) -> _Edge | None:
        held = self._node.holdings().get(digest)
        if held is None or index >= held.length:
            return None
        fetch = self._report.fetches.records.get(digest)
        source, at_s = (fetch and fetch.origin_of(index)) or (None, None)
        return _Edge(self._node.id, index in held, source, at_s)

    async def _page_of(self, member: Record, path: str, bytes_max: int) -> bytes | None:
        try:
            return await self._read(member.address, path, ASK_TIMEOUT_S, bytes_max)
        except (PeerError, SettingsError):
            return None


def _decoded(decoder: msgspec.json.Decoder[T], data: bytes | None) -> T | None:
    try:
        return decoder.decode(data or b"")
    except (ValueError, RecursionError):
        return None


def asset(name: str) -> Asset:
    """An asset of the page, read at its first request."""
    return Asset(ASSETS[name], functools.partial(_read, name))


@functools.cache
def _read(name: str) -> bytes:
    return importlib.resources.files("swarm.dashboard").joinpath("web", name).read_bytes()
