"""The report of a node about itself at `/member`: its flows, fetches and chunk maps, and peers that sent wrong chunks.

A node sees its own links only; a dashboard asks every member for this report, a few kB each. `decode` checks types,
sizes and counts of a report that arrived.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import CHUNKS_MAX, Digest, ModelId
from swarm.observe import budget
from swarm.observe.fetch_record import FetchRecord, FetchRecords
from swarm.observe.origin_record import ORIGINS_MAX
from swarm.protocol.messages import NodeId, Text
from swarm.protocol.packets import Label

PATH = "/member"
REPORT_BYTES_MAX = 256 << 10
CELLS_MAX = 256  # of a chunk map: a screen cannot show more
FLOWS_MAX = 512
HELD_MAX = 64
TEXT_CHARS_MAX = 256  # of `Text`
SECONDS_MAX = 1e9

Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Chunks = Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=SECONDS_MAX)]
Cells = Annotated[str, msgspec.Meta(max_length=CELLS_MAX, pattern=r"^[0-9]*\Z")]
Words = Annotated[str, msgspec.Meta(max_length=1000)]


class PeerFlow(msgspec.Struct, frozen=True):
    """Bytes of an artifact between this node and a peer: total and present rate."""

    digest: Digest
    direction: Literal["down", "up"]
    peer: NodeId
    bytes: Size
    rate_bytes_per_s: Size


class Rejected(msgspec.Struct, frozen=True):
    """Chunks of a peer whose digest differed from the manifest, in one fetch. `why` is the reason of a ban."""

    digest: Digest
    peer: NodeId
    chunks: Size
    banned: bool
    why: Words | None = None


class FetchSummary(msgspec.Struct, frozen=True):
    """A fetch of this node. Bytes include resumed chunks. `seconds` is since its first request could be sent,
    `average_bytes_per_s` over that time, `rate_bytes_per_s` over the last 5 s; `quiet_s` is since the last verified
    chunk. `sources` counts peers that sent a verified chunk."""

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
    error: Words | None
    quiet_s: Seconds = 0.0


class Held(msgspec.Struct, frozen=True):
    """Chunks of an artifact that this node holds. `cells` is its chunk map: equal runs of chunks, each a digit from 0
    (none held) to 9 (all held)."""

    digest: Digest
    chunks: Chunks
    chunks_total: Chunks
    cells: Cells


class ReadOrigin(msgspec.Struct, frozen=True):
    """What this node has read from an origin: see `observe.origin_record`. Its `node` is a source in `flows`."""

    node: NodeId
    name: Text
    scheme: Annotated[str, msgspec.Meta(max_length=16)]
    bytes: Size
    requests: Size
    retries: Size
    error: Words | None = None


class KnownPeer(msgspec.Struct, frozen=True):
    """Name and address of a node in `flows` or `rejected`: the reader may not know it."""

    node: NodeId
    name: Text
    address: Text


class Room(msgspec.Struct, frozen=True):
    """Bytes of the file system on which fetches land."""

    free: Size
    total: Size


class MemberReport(msgspec.Struct, frozen=True):
    """The whole report. `version` is that of swarm."""

    node: NodeId
    host: Label
    rack: Label
    peers: Annotated[tuple[KnownPeer, ...], msgspec.Meta(max_length=2 * FLOWS_MAX)]
    flows: Annotated[tuple[PeerFlow, ...], msgspec.Meta(max_length=FLOWS_MAX)]
    fetches: Annotated[tuple[FetchSummary, ...], msgspec.Meta(max_length=HELD_MAX)]
    held: Annotated[tuple[Held, ...], msgspec.Meta(max_length=HELD_MAX)]
    rejected: Annotated[tuple[Rejected, ...], msgspec.Meta(max_length=FLOWS_MAX)]
    version: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    origins: Annotated[tuple[ReadOrigin, ...], msgspec.Meta(max_length=ORIGINS_MAX)] = ()
    room: Room | None = None


_decoder = msgspec.json.Decoder(MemberReport)


def decode(data: bytes) -> MemberReport:
    """The report in an answer. Raises ValueError with the reason if it is none."""
    try:
        return _decoder.decode(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error)) from error


def member_report(
    report: Mapping[str, Any],
    fetches: FetchRecords,
    held: Mapping[Digest, Bitfield],
    now: float,
    *,
    place: tuple[str, str],
    room: tuple[int, int] | None = None,
) -> MemberReport:
    """The report of a node with this `report` at `/status`, these fetches and held chunks (by digest). `place`: its
    labels of host and rack; `room`: free and total bytes of its disk. Readers refuse more than REPORT_BYTES_MAX: slow
    flows and old fetches are left out."""
    most = FLOWS_MAX
    while budget.size(found := _member_report(report, fetches, held, now, place=place, most=most)) > REPORT_BYTES_MAX:
        most //= 2
    return msgspec.structs.replace(found, room=Room(*room)) if room else found


def _member_report(
    report: Mapping[str, Any],
    fetches: FetchRecords,
    held: Mapping[Digest, Bitfield],
    now: float,
    *,
    place: tuple[str, str],
    most: int,
) -> MemberReport:
    """With at most `most` rows of each kind."""
    flows = [
        PeerFlow(t["digest"], t["direction"], t["node"], t["bytes"], t["rate_bytes_per_s"]) for t in report["transfers"]
    ]
    flows.sort(key=lambda flow: -flow.rate_bytes_per_s)
    latest = list(reversed(fetches.records.values()))[: min(most, HELD_MAX)]
    rejected = [
        Rejected(
            fetch.digest,
            node,
            source.rejected_chunks,
            source.banned is not None,
            source.banned and source.banned[:1000],
        )
        for fetch in latest
        for node, source in fetch.sources.items()
        if source.rejected_chunks
    ]
    flows, rejected = flows[:most], rejected[:most]
    named = {flow.peer for flow in flows} | {wrong.peer for wrong in rejected}
    return MemberReport(
        report["node"]["id"],
        *place,
        tuple(
            KnownPeer(m["id"], m["name"][:TEXT_CHARS_MAX], m["address"][:TEXT_CHARS_MAX])
            for m in report["members"]
            if m["id"] in named
        ),
        tuple(flows),
        tuple(_summary(fetch, now) for fetch in latest),
        tuple(Held(d, len(bits), bits.length, cells(bits)) for d, bits in list(held.items())[: min(most, HELD_MAX)]),
        tuple(rejected),
        report["node"].get("version"),
        tuple(_read(origin) for origin in report["origins"][-most:]),
    )


def _read(origin: Mapping[str, Any]) -> ReadOrigin:
    size, requests, retries = (origin[key] for key in ("bytes", "requests", "retries"))
    name = origin["name"][:TEXT_CHARS_MAX]
    return ReadOrigin(origin["id"], name, origin["scheme"], size, requests, retries, origin["error"])


def _summary(fetch: FetchRecord, now: float) -> FetchSummary:
    seconds = max(0.0, (now if fetch.ended_at_s is None else fetch.ended_at_s) - fetch.started_at_s)
    return FetchSummary(
        fetch.model_id,
        fetch.digest,
        fetch.size,
        fetch.done_bytes,
        round(fetch.rate.at(now)) if fetch.running else 0,
        round(fetch.received_bytes / seconds) if seconds else 0,
        min(eta_s, SECONDS_MAX) if fetch.running and (eta_s := fetch.eta_s(now)) is not None else None,
        seconds,
        sum(source.chunks > 0 for source in fetch.sources.values()),
        fetch.running,
        fetch.error and fetch.error[:1000],
        max(0.0, now - fetch.chunk_at_s) if fetch.running else 0.0,
    )


def cells(bits: Bitfield) -> str:
    """The chunk map of a bitfield: at most `CELLS_MAX` digits."""
    count = min(bits.length, CELLS_MAX)
    edges = [cell * bits.length // max(1, count) for cell in range(count + 1)]
    return "".join(str(_digit(int(bits.mask[a:b].sum()), b - a)) for a, b in itertools.pairwise(edges))


def _digit(part: int, whole: int) -> int:
    return 9 if part == whole else 0 if part == 0 else max(1, min(8, part * 9 // whole))
