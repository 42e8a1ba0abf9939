"""`/metrics`: counters and gauges of a node, for Prometheus.

Journal entries become plain numbers, and metrics only on request: there are entries for each chunk, and counting them
must take less than a microsecond. Labels are bounded: none holds a name, an id or an address. Origins are counted by
scheme.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from swarm.journal import Entry, FetchEnded, FetchStarted, Journal, Received, Sent, Unreached
from swarm.observe.origin_record import OriginRecords
from swarm.transfer.download_events import Ban, ChunkCorrupt, TransferFailed

if TYPE_CHECKING:
    from prometheus_client.core import Metric

COMMON = "hf"  # the scheme whose counters are there before its first request
STATES = ("self", "alive", "suspect", "dead", "left")

View = Callable[[], Mapping[str, Any]]

_KINDS: dict[type, tuple[str, str]] = {
    ChunkCorrupt: ("swarm_chunks_rejected", "Chunks whose digest differs from the manifest"),
    Ban: ("swarm_bans", "Peers banned by a fetch"),
    TransferFailed: ("swarm_transfers_failed", "Transfers that broke off, were refused or timed out"),
    Unreached: ("swarm_dials_failed", "Dials that failed"),
    FetchStarted: ("swarm_fetches_started", "Fetches that started"),
}


@dataclass(frozen=True)
class Figure:
    """A metric of another part of the process: its values by the value of `label`, or one under ''."""

    kind: Literal["counter", "gauge"]
    name: str
    about: str
    values: Mapping[str, float]
    label: str = ""


class Metrics:
    """`follow` a journal; gauges come from `report` (`/status`), `view` (`/view`) and `unready` (`/readyz`)."""

    def __init__(
        self,
        report: View,
        view: View,
        unready: Callable[[], Sequence[str]],
        figures: Callable[[], Iterable[Figure]] = tuple,
    ) -> None:
        self._report = report
        self._view = view
        self._unready = unready
        self._figures = figures
        self._counts: Counter[type] = Counter()
        self._moved: Counter[type] = Counter()  # bytes, by Received or Sent
        self._ended: Counter[str] = Counter()
        self._origins = OriginRecords()

    def follow(self, journal: Journal) -> None:
        """Counts the entries that are recorded from now on."""
        journal.subscribe(self.apply, *_KINDS, Received, Sent, FetchEnded)
        self._origins.follow(journal)

    def apply(self, entry: Entry) -> None:
        """Counts an entry."""
        event = entry.event
        self._counts[type(event)] += 1
        if isinstance(event, (Received, Sent)):  # a union would be built again for every chunk
            self._moved[type(event)] += event.size
        elif isinstance(event, FetchEnded):
            self._ended["complete" if event.error is None else "failed"] += 1

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        text: bytes = generate_latest(registry)
        return text

    def collect(self) -> Iterator[Metric]:
        """All metrics, as prometheus_client's collector protocol."""
        from prometheus_client.core import CounterMetricFamily as CounterOf
        from prometheus_client.core import GaugeMetricFamily as GaugeOf
        from prometheus_client.core import InfoMetricFamily as InfoOf

        report, view = self._report(), self._view()
        yield InfoOf("swarm_node", "The node", value={"version": str(report["node"].get("version", ""))})
        for moved, name, about in (
            (Received, "swarm_received", "Bytes of verified chunks from peers"),
            (Sent, "swarm_sent", "Bytes of complete transfers to peers"),
        ):
            yield CounterOf(f"{name}_bytes", about, value=self._moved[moved])
        for name, about, counts in (
            ("bytes", "Bytes of verified chunks from origins", self._origins.bytes),
            ("requests", "Listings and ranges that origins were asked for", self._origins.requests),
            ("retries", "Requests to origins that failed and were sent again", self._origins.retries),
        ):
            counter = CounterOf(f"swarm_origin_{name}", about, labels=["origin"])
            for scheme in sorted({COMMON, *self._origins.requests}):
                counter.add_metric([scheme], counts[scheme])
            yield counter
        yield CounterOf("swarm_chunks_verified", "Verified chunks from peers", value=self._counts[Received])
        for kind, (name, about) in _KINDS.items():
            yield CounterOf(name, about, value=self._counts[kind])
        ended = CounterOf("swarm_fetches_ended", "Fetches that ended", labels=["result"])
        for result in ("complete", "failed"):
            ended.add_metric([result], self._ended[result])
        yield ended
        yield from self._present(report, view, GaugeOf)
        for figure in self._figures():
            family = CounterOf if figure.kind == "counter" else GaugeOf
            found = family(figure.name, figure.about, labels=[figure.label] if figure.label else [])
            for value, number in figure.values.items():
                found.add_metric([value] if figure.label else [], number)
            yield found

    def _present(self, report: Mapping[str, Any], view: Mapping[str, Any], gauge: Any) -> Iterator[Metric]:
        yield gauge("swarm_ready", "1 if all that was asked for is there and served, else 0", value=not self._unready())
        states = Counter(member["state"] for member in report["members"])
        members = gauge("swarm_members", "Members that this node knows, itself included", labels=["state"])
        states["alive"] += states.pop("self", 0)
        for state in STATES[1:]:
            members.add_metric([state], states[state])
        yield members
        linked = sum(member["transport"] not in (None, "self") for member in report["members"])
        yield gauge("swarm_links", "Members with a link to this node", value=linked)
        own = view["members"].get(report["node"]["id"], {"fetches": {}, "holds": {}})
        running = [fetch for fetch in own["fetches"].values() if fetch["running"]]
        size, done = (sum(fetch[key] for fetch in running) for key in ("bytes", "done_bytes"))
        yield gauge("swarm_fetches_running", "Running fetches of this node", value=len(running))
        yield gauge(
            "swarm_fetches_stalled",
            "Running fetches without a verified chunk for 5 s",
            value=sum(f["stalled"] for f in running),
        )
        yield gauge("swarm_fetches_missing_bytes", "Bytes missing in running fetches", value=max(0, size - done))
        yield gauge("swarm_artifacts_held", "Artifacts held by this node, whole or in part", value=len(own["holds"]))
        by_code = Counter(warning["code"] for warning in view["warnings"].values())
        warned = gauge("swarm_warnings", "Warnings, by the codes of docs/status.md", labels=["code"])
        for code, count in sorted(by_code.items()):
            warned.add_metric([code], count)
        yield warned
