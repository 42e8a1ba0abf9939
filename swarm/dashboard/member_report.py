"""What a node tells of itself, and of nobody else: its flows, its fetches, which chunks it holds, who sent wrong ones.

One node sees its own links only; whoever watches the whole swarm asks every member for this, a few kB each. What
arrives is checked here (`decode`): types, sizes and counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import CHUNKS_MAX, Digest, ModelId
from swarm.observe.fetch_history import Fetch, FetchHistories
from swarm.observe.node_report import FetchReport
from swarm.protocol.messages import NodeId, Text
from swarm.protocol.packets import Label

PATH = "/member"
OWN_BYTES_MAX = 256 << 10
CELLS_MAX = 256  # of a chunk map: more cannot be told apart on a screen
FLOWS_MAX = 512
HELD_MAX = 64

Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Chunks = Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Cells = Annotated[str, msgspec.Meta(max_length=CELLS_MAX, pattern=r"^[0-9]*\Z")]


class Flow(msgspec.Struct, frozen=True):
    """Bytes of one artifact between this node and a peer, so far and now."""

    digest: Digest
    direction: Literal["down", "up"]
    peer: NodeId
    bytes: Size
    rate_bytes_per_s: Size


class Rejected(msgspec.Struct, frozen=True):
    """Chunks of a peer that were not what the manifest says, in one fetch."""

    digest: Digest
    peer: NodeId
    chunks: Size
    banned: bool
    why: Annotated[str, msgspec.Meta(max_length=1000)] | None = None  # it is banned


class FetchSummary(msgspec.Struct, frozen=True):
    """A fetch of this node. `average_bytes_per_s` is since it began, `rate_bytes_per_s` of the last seconds; `quiet_s`
    is how long ago the last chunk was verified."""

    model_id: ModelId
    digest: Digest
    bytes: Size
    done_bytes: Size
    rate_bytes_per_s: Size
    average_bytes_per_s: Size
    eta_s: Seconds | None
    seconds: Seconds
    sources: Size
    running: bool
    error: Annotated[str, msgspec.Meta(max_length=1000)] | None
    quiet_s: Seconds = 0.0


class Held(msgspec.Struct, frozen=True):
    """What this node has of an artifact. `cells` is its chunk map: equal runs of chunks, each a digit from 0 (none of
    them is held) to 9 (all are)."""

    digest: Digest
    chunks: Chunks
    chunks_total: Chunks
    cells: Cells


class Known(msgspec.Struct, frozen=True):
    """A node that flows or rejected chunks are about: whoever reads this may not know it."""

    node: NodeId
    name: Text
    address: Text


class Own(msgspec.Struct, frozen=True):
    """All of it."""

    node: NodeId
    host: Label
    rack: Label
    peers: Annotated[tuple[Known, ...], msgspec.Meta(max_length=2 * FLOWS_MAX)]
    flows: Annotated[tuple[Flow, ...], msgspec.Meta(max_length=FLOWS_MAX)]
    fetches: Annotated[tuple[FetchSummary, ...], msgspec.Meta(max_length=HELD_MAX)]
    held: Annotated[tuple[Held, ...], msgspec.Meta(max_length=HELD_MAX)]
    rejected: Annotated[tuple[Rejected, ...], msgspec.Meta(max_length=FLOWS_MAX)]
    version: Annotated[str, msgspec.Meta(max_length=64)] | None = None  # of swarm


_decoder = msgspec.json.Decoder(Own)


def decode(data: bytes) -> Own:
    """What a member said. Raises ValueError, which says what is wrong with it."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def own(
    report: Mapping[str, Any],
    running: Mapping[Digest, FetchReport],
    histories: FetchHistories,
    held: Mapping[Digest, Bitfield],
    now: float,
    *,
    place: tuple[str, str],
) -> Own:
    """What a node tells that has this report and these running fetches (see `picture`), histories and chunks, on a
    `place` of these labels: host and rack."""
    ids = {member["name"]: member for member in report["members"]}
    flows = [
        Flow(t["digest"], t["direction"], ids[t["peer"]]["id"], t["bytes"], t["rate_bytes_per_s"])
        for t in report["transfers"]
        if t["peer"] in ids
    ]
    flows.sort(key=lambda flow: -flow.rate_bytes_per_s)
    latest = list(reversed(histories.fetches.values()))[:HELD_MAX]
    rejected = [
        Rejected(fetch.digest, by, chunks, by in fetch.banned, fetch.banned.get(by, "")[:1000] or None)
        for fetch in latest
        for by, chunks in fetch.rejected.items()
    ]
    told = {flow.peer for flow in flows[:FLOWS_MAX]} | {wrong.peer for wrong in rejected[:FLOWS_MAX]}
    return Own(
        report["node"]["id"],
        *place,
        tuple(Known(m["id"], m["name"], m["address"]) for m in report["members"] if m["id"] in told),
        tuple(flows[:FLOWS_MAX]),
        tuple(_own_fetch(fetch, running.get(fetch.digest), now) for fetch in latest),
        tuple(Held(d, len(bits), bits.length, cells(bits)) for d, bits in list(held.items())[:HELD_MAX]),
        tuple(rejected[:FLOWS_MAX]),
        report["node"].get("version"),
    )


def _own_fetch(fetch: Fetch, running: FetchReport | None, now: float) -> FetchSummary:
    seconds = max(0.0, now - fetch.began_at_s if fetch.seconds is None else fetch.seconds)
    if fetch.seconds is not None:
        running = None
    return FetchSummary(
        fetch.model_id,
        fetch.digest,
        fetch.size,
        fetch.resumed_bytes + fetch.received_bytes,
        round(running.rate.at(now)) if running else 0,
        round(fetch.received_bytes / seconds) if seconds else 0,
        running.eta_s(now) if running else None,
        seconds,
        len(fetch.sources),
        fetch.seconds is None,
        fetch.error and fetch.error[:1000],
        max(0.0, now - fetch.heard_at_s) if fetch.seconds is None else 0.0,
    )


def cells(bits: Bitfield) -> str:
    """The chunk map of a bitfield: at most CELLS_MAX digits."""
    count = min(bits.length, CELLS_MAX)
    edges = [cell * bits.length // max(1, count) for cell in range(count + 1)]
    return "".join(str(_digit(int(bits.mask[a:b].sum()), b - a)) for a, b in itertools.pairwise(edges))


def _digit(part: int, whole: int) -> int:
    return 9 if part == whole else 0 if part == 0 else max(1, min(8, part * 9 // whole))
