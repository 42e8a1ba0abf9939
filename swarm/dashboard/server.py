"""The web dashboard that every node serves: a static page, and the JSON that it draws (docs/dashboard.md).

    /                             the page, with its parts under /web/
    /events                       the view as server-sent events
    /view                         the view, once
    /member                       what this node tells of itself
    /chunk/DIGEST/INDEX           who gave this node that chunk
    /tree/DIGEST/INDEX            the same from every member: the way that one chunk took
    /timeline/DIGEST              a fetch of this node: lanes by source, phases
    /timeline/DIGEST/of/NODE      the same of another member

Owns which paths there are. The parts of the page come from a fixed table; other members are found by their ids, never
by an address in a request; and all questions to them are bounded in number, time and size.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.resources
from typing import Annotated, Protocol

import msgspec

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import CHUNKS_MAX, Digest, ModelId
from swarm.dashboard import member_report
from swarm.dashboard.collector import Collector, Read
from swarm.dashboard.member_report import Own
from swarm.dashboard.sse import EventStream
from swarm.dashboard.swarm_view import Json, SwarmView
from swarm.errors import PeerError, SettingsError
from swarm.journal import Entry, Journal, Left
from swarm.net.http_pages import Asset, EventPage, Page
from swarm.observe.fetch_history import BUCKETS, FetchHistories
from swarm.observe.node_report import Picture
from swarm.protocol.messages import Address, NodeId, Text
from swarm.protocol.packets import Record

ASSETS = {
    "index.html": "text/html",
    "style.css": "text/css",
    **dict.fromkeys(
        ("main.js", "stream.js", "swarm.js", "members.js", "chunks.js", "timeline.js", "replay.js", "words.js"),
        "text/javascript",
    ),
    "icon.svg": "image/svg+xml",
}
ASKED_MAX = 256  # members asked for their edge of a chunk's tree
ASKED_AT_ONCE = 16
ASK_TIMEOUT_S = 2.0
EDGE_BYTES_MAX = 4096
TIMELINE_BYTES_MAX = 1 << 20
LANES_MAX = 512

DIGEST = "{digest:[0-9a-f]{64}}"
INDEX = "{index:[0-9]{1,8}}"
NODE = "{node:[0-9a-f]{16}}"


class _Edge(msgspec.Struct, frozen=True):
    """One member's part of a chunk's tree: `source` is the node that gave it, None where it was there before."""

    node: NodeId
    held: bool
    source: NodeId | None
    at_s: float | None


_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
_Words = Annotated[str, msgspec.Meta(max_length=1000)]


class _Phase(msgspec.Struct, frozen=True):
    name: Text
    seconds: _Seconds


class _Lane(msgspec.Struct, frozen=True):
    node: NodeId
    name: Text
    bytes: _Count
    chunks: _Count
    rejected_chunks: _Count
    banned: _Words | None
    rejected_at_s: Annotated[tuple[_Seconds, ...], msgspec.Meta(max_length=BUCKETS)]
    buckets: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=BUCKETS)]


class _Timeline(msgspec.Struct, frozen=True):
    """See `history.Fetch.timeline`."""

    node: NodeId
    model_id: ModelId
    digest: Digest
    bytes: _Count
    resumed_bytes: _Count
    received_bytes: _Count
    running: bool
    error: _Words | None
    seconds: _Seconds
    bucket_s: _Seconds
    phases: Annotated[tuple[_Phase, ...], msgspec.Meta(max_length=16)]
    lanes: Annotated[tuple[_Lane, ...], msgspec.Meta(max_length=LANES_MAX)]


_edge_decoder = msgspec.json.Decoder(_Edge)
_timeline_decoder = msgspec.json.Decoder(_Timeline)


class Watched(Protocol):
    """What the dashboard needs of a node."""

    id: NodeId
    address: Address

    def now(self) -> float:
        """Seconds on the node's clock."""

    def members(self) -> list[Record]:
        """All others that gossip knows."""

    @property
    def place(self) -> tuple[str, str]:
        """Labels of host and rack."""

    def holdings(self) -> dict[Digest, Bitfield]:
        """Chunks by digest."""


class Dashboard:
    """`attach` gives it the node that it shows, before anybody can ask."""

    def __init__(self, picture: Picture, histories: FetchHistories) -> None:
        self._picture = picture
        self._histories = histories
        self._viewer = SwarmView()
        self._feed = EventStream(self.view, self._collect)

    def attach(self, node: Watched, read: Read) -> None:
        """Shows this node; `read` reads other nodes' pages."""
        self._node = node
        self._read = read
        self._collector = Collector(read, node.members, node.now)

    def follow(self, journal: Journal) -> None:
        """Asks whoever has lost its link from now on at once, so that one that was killed is seen to be lost before
        gossip gives it up."""

        def apply(entry: Entry) -> None:
            if isinstance(entry.event, Left):
                self._collector.hurry(entry.event.node)

        journal.subscribe(apply, Left)

    def pages(self) -> dict[str, Page]:
        """All of them, by path."""
        return {
            "/": asset("index.html"),
            **{f"/web/{name}": asset(name) for name in ASSETS},
            "/events": EventPage(self._feed.watch),
            "/view": self.view_once,
            member_report.PATH: lambda: msgspec.to_builtins(self.own()),
            f"/chunk/{DIGEST}/{INDEX}": self.chunk,
            f"/tree/{DIGEST}/{INDEX}": self.tree,
            f"/timeline/{DIGEST}": self.timeline,
            f"/timeline/{DIGEST}/of/{NODE}": self.timeline_of,
        }

    def own(self) -> Own:
        """What this node tells of itself."""
        return self._own(self._picture.report(self._node.now()))

    def view(self) -> Json:
        """The swarm as far as members have told."""
        now = self._node.now()
        report = self._picture.report(now)
        return self._viewer.view(report, self._own(report), self._collector.told, now)

    async def view_once(self) -> Json:
        """The swarm, after every member was asked once if nobody watches."""
        await self._collector.ask_all(ASKED_MAX)
        return self.view()

    def chunk(self, digest: Digest, index: str) -> Json | None:
        """This node's edge of a chunk's tree; None where it knows nothing of the artifact."""
        edge = self._edge(digest, int(index))
        return None if edge is None else dict(msgspec.to_builtins(edge))

    async def tree(self, digest: Digest, index: str) -> Json | None:
        """The edges that all members tell. `silent` are those that did not answer."""
        if int(index) >= CHUNKS_MAX:
            return None
        holders = [m for m in self._node.members() if any(h.digest == digest for h in m.profile.artifacts)][:ASKED_MAX]
        limit = asyncio.Semaphore(ASKED_AT_ONCE)

        async def ask(member: Record) -> _Edge | None:
            async with limit:
                data = await self._asked(member, f"/chunk/{digest}/{int(index)}", EDGE_BYTES_MAX)
            try:
                edge = _edge_decoder.decode(data or b"")
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                return None
            return edge if edge.node == member.node else None

        told = await asyncio.gather(*map(ask, holders))
        mine = self._edge(digest, int(index))
        edges = [edge for edge in (mine, *told) if edge and edge.held]
        return {
            "digest": digest,
            "chunk": int(index),
            "edges": {e.node: {"source": e.source, "at_s": e.at_s} for e in edges},
            "silent": [member.node for member, edge in zip(holders, told, strict=True) if edge is None],
        }

    def timeline(self, digest: Digest) -> Json | None:
        """Where the time of a fetch of this node went."""
        fetch = self._histories.fetches.get(digest)
        if fetch is None:
            return None
        found = fetch.timeline(self._node.now())
        names = {member["id"]: member["name"] for member in self._picture.report(self._node.now())["members"]}
        for lane in found["lanes"]:
            lane["name"] = names.get(lane["node"], lane["node"])
        return {"node": self._node.id, **found, "lanes": found["lanes"][:LANES_MAX]}

    async def timeline_of(self, digest: Digest, node: str) -> Json | None:
        """The same of a member; `silent` where it does not answer, or knows of none: it may just have died, and a page
        that asks for what it sees has made no mistake."""
        if node == self._node.id:
            return self.timeline(digest)
        silent: Json = {"node": node, "digest": digest, "silent": True}
        member = next((member for member in self._node.members() if member.node == node), None)
        data = member and await self._asked(member, f"/timeline/{digest}", TIMELINE_BYTES_MAX)
        try:
            return dict(msgspec.to_builtins(_timeline_decoder.decode(data or b"")))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return silent

    def _own(self, report: Json) -> Own:
        fetches, held = self._picture.fetches, self._node.holdings()
        return member_report.own(report, fetches, self._histories, held, self._node.now(), place=self._node.place)

    async def _collect(self) -> None:
        await self._collector.run()

    def _edge(self, digest: Digest, index: int) -> _Edge | None:
        held = self._node.holdings().get(digest)
        if held is None or index >= held.length:
            return None
        fetch = self._histories.fetches.get(digest)
        source, at_s = (fetch and fetch.parent(index)) or (None, None)
        return _Edge(self._node.id, index in held, source, at_s)

    async def _asked(self, member: Record, path: str, bytes_max: int) -> bytes | None:
        try:
            return await self._read(member.address, path, ASK_TIMEOUT_S, bytes_max)
        except (PeerError, SettingsError):
            return None


def asset(name: str) -> Asset:
    """A part of the page, read when it is first asked for."""
    return Asset(ASSETS[name], functools.partial(_read, name))


@functools.cache
def _read(name: str) -> bytes:
    return importlib.resources.files("swarm.dashboard").joinpath("web", name).read_bytes()
