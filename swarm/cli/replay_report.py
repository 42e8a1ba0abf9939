"""Where the time of a fetch went, out of its trace: a pure function of the entries.

A trace has the beginning and end of each transfer and the moment at which each chunk was verified, so that waiting,
wire and the rest can be told apart. Hashing and writing cannot: a chunk is verified when both are done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

PHASES = ("waiting for sources", "wire", "hashing and disk", "sealing")


@dataclass
class _Source:
    chunks: int = 0
    bytes: int = 0
    rejected_chunks: int = 0
    failed_transfers: int = 0
    waited_s: float = 0.0  # from asking to being granted
    wire_s: float = 0.0  # from being granted to the end
    banned: str | None = None


@dataclass
class _Fetch:
    model_id: str
    digest: str
    size: int
    resumed_bytes: int
    began_at_s: float
    heard_at_s: float  # the last entry about it
    ended_at_s: float | None = None
    error: str | None = None
    asked: dict[tuple[str, int], float] = field(default_factory=dict)
    granted: dict[tuple[str, int], float] = field(default_factory=dict)
    wires: list[tuple[float, float]] = field(default_factory=list)
    verified_at_s: list[float] = field(default_factory=list)
    sources: dict[str, _Source] = field(default_factory=dict)

    def source(self, node: str) -> _Source:
        return self.sources.setdefault(node, _Source())


def replay(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`entries` are the lines of a trace; what is unknown in them is passed over. Times are in seconds."""
    fetches: dict[str, _Fetch] = {}
    done: list[_Fetch] = []
    names: dict[str, str] = {}
    left_out = 0
    for entry in entries:
        kind, at_s = entry.get("event"), entry.get("at_s", 0.0)
        if kind in ("Joined", "Opened"):
            names[entry["node"]] = entry["name"]
        elif kind == "FetchStarted":
            fetch = _Fetch(entry["model_id"], entry["digest"], entry["size"], entry["resumed_bytes"], at_s, at_s)
            fetches[fetch.digest] = fetch
            done.append(fetch)
        elif kind == "LeftOut":
            left_out += entry["entries"]
        elif fetch_of := fetches.get(entry.get("digest") or entry.get("subject") or ""):
            fetch_of.heard_at_s = at_s
            _apply(fetch_of, entry, at_s)
    return {"fetches": [_told(fetch, names) for fetch in done], "left_out_entries": left_out}


def _apply(fetch: _Fetch, entry: Mapping[str, Any], at_s: float) -> None:
    key = (entry.get("peer", ""), entry.get("transfer", -1))
    match entry["event"]:
        case "Ask":
            fetch.asked[key] = at_s
        case "Granted":
            fetch.source(key[0]).waited_s += at_s - fetch.asked.pop(key, at_s)
            fetch.granted[key] = at_s
        case "TransferEnded" | "TransferFailed" | "Cancel" | "Refused" as what:
            fetch.asked.pop(key, None)
            began_s = fetch.granted.pop(key, None)
            if began_s is not None:
                fetch.wires.append((began_s, at_s))
                fetch.source(key[0]).wire_s += at_s - began_s
            fetch.source(key[0]).failed_transfers += what == "TransferFailed"
        case "Received":
            source = fetch.source(entry["node"])
            source.chunks += 1
            source.bytes += entry["size"]
            fetch.verified_at_s.append(at_s)
        case "ChunkCorrupt":
            fetch.source(key[0]).rejected_chunks += 1
        case "Ban":
            fetch.source(key[0]).banned = entry["why"]
        case "FetchEnded":
            fetch.ended_at_s, fetch.error = at_s, entry["error"]


def _told(fetch: _Fetch, names: Mapping[str, str]) -> dict[str, Any]:
    end_s = fetch.heard_at_s if fetch.ended_at_s is None else fetch.ended_at_s
    last_s = max(fetch.verified_at_s, default=end_s)
    wires = [*fetch.wires, *((began_s, end_s) for began_s in fetch.granted.values())]
    wire_s = _covered(wires, fetch.began_at_s, last_s)
    last_wire_s = min(last_s, max((end for _, end in wires), default=last_s))
    hashing_s = last_s - last_wire_s
    sealing_s = end_s - last_s
    seconds = end_s - fetch.began_at_s
    waiting_s = max(0.0, seconds - wire_s - hashing_s - sealing_s)
    received = sum(source.bytes for source in fetch.sources.values())
    return {
        "model_id": fetch.model_id,
        "digest": fetch.digest,
        "bytes": fetch.size,
        "resumed_bytes": fetch.resumed_bytes,
        "received_bytes": received,
        "seconds": round(seconds, 4),
        "complete": fetch.ended_at_s is not None and fetch.error is None,
        "error": fetch.error,
        "phases": dict(zip(PHASES, (round(s, 4) for s in (waiting_s, wire_s, hashing_s, sealing_s)), strict=True)),
        "sources": [
            {
                "node": node,
                "name": names.get(node, node),
                "chunks": source.chunks,
                "bytes": source.bytes,
                "rejected_chunks": source.rejected_chunks,
                "failed_transfers": source.failed_transfers,
                "banned": source.banned,
                "waited_s": round(source.waited_s, 4),
                "wire_s": round(source.wire_s, 4),
            }
            for node, source in sorted(fetch.sources.items(), key=lambda item: -item[1].bytes)
        ],
    }


def _covered(intervals: Iterable[tuple[float, float]], begin_s: float, end_s: float) -> float:
    """How much of a time is covered by at least one interval."""
    covered, reached = 0.0, begin_s
    for one, other in sorted(intervals):
        one, other = max(one, reached), min(other, end_s)
        if other > one:
            covered += other - one
            reached = other
    return covered
