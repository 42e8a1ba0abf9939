"""`/metrics`: what a node counts, for Prometheus.

Folds journal entries into plain numbers, and turns them into metrics when somebody asks: counting must cost next to
nothing, as there are entries for each chunk. Labels are bounded: none holds a name, an id or an address.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from swarm.journal import Entry, FetchEnded, FetchStarted, Journal, Received, Sent, Unreached
from swarm.transfer.download_events import Ban, ChunkCorrupt, TransferFailed

if TYPE_CHECKING:
    from prometheus_client.core import Metric

PATH = "/metrics"
STATES = ("self", "alive", "suspect", "dead", "left")

View = Callable[[], Mapping[str, Any]]

_KINDS: dict[type, tuple[str, str]] = {
    ChunkCorrupt: ("swarm_chunks_rejected", "Chunks that were not what the manifest says"),
    Ban: ("swarm_bans", "Peers that a fetch has nothing to do with any more"),
    TransferFailed: ("swarm_transfers_failed", "Transfers that broke off, were refused or fell silent"),
    Unreached: ("swarm_dials_failed", "Addresses where nobody could be talked to"),
    FetchStarted: ("swarm_fetches_started", "Fetches that began"),
}


class Metrics:
    """Let it `follow` a journal, and give it what tells the present: `report` (of /status) and `view` (of /view)."""

    def __init__(self, report: View, view: View) -> None:
        self._report = report
        self._view = view
        self._counts: Counter[type] = Counter()
        self._moved: Counter[type] = Counter()  # bytes, by Received or Sent
        self._ended: Counter[str] = Counter()

    def follow(self, journal: Journal) -> None:
        """Counts what happens from now on."""
        journal.subscribe(self.apply, *_KINDS, Received, Sent, FetchEnded)

    def apply(self, entry: Entry) -> None:
        """Counts one more entry."""
        what = entry.event
        self._counts[type(what)] += 1
        if isinstance(what, (Received, Sent)):  # no union, which would be made anew for every chunk
            self._moved[type(what)] += what.size
        elif isinstance(what, FetchEnded):
            self._ended["complete" if what.error is None else "failed"] += 1

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        text: bytes = generate_latest(registry)
        return text

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for them."""
        from prometheus_client.core import CounterMetricFamily as CounterOf
        from prometheus_client.core import GaugeMetricFamily as GaugeOf
        from prometheus_client.core import InfoMetricFamily as InfoOf

        report, view = self._report(), self._view()
        yield InfoOf("swarm_node", "The node", value={"version": str(report["node"].get("version", ""))})
        for moved, name, about in (
            (Received, "swarm_received", "Bytes of verified chunks that came from peers"),
            (Sent, "swarm_sent", "Bytes of transfers that went to peers whole"),
        ):
            yield CounterOf(f"{name}_bytes", about, value=self._moved[moved])
        yield CounterOf(
            "swarm_chunks_verified", "Chunks that came from peers and are right", value=self._counts[Received]
        )
        for kind, (name, about) in _KINDS.items():
            yield CounterOf(name, about, value=self._counts[kind])
        ended = CounterOf("swarm_fetches_ended", "Fetches that ended", labels=["result"])
        for result in ("complete", "failed"):
            ended.add_metric([result], self._ended[result])
        yield ended
        yield from self._present(report, view, GaugeOf)

    def _present(self, report: Mapping[str, Any], view: Mapping[str, Any], gauge: Any) -> Iterator[Metric]:
        states = Counter(member["state"] for member in report["members"])
        members = gauge("swarm_members", "Members that this node knows of, itself included", labels=["state"])
        states["alive"] += states.pop("self", 0)
        for state in STATES[1:]:
            members.add_metric([state], states[state])
        yield members
        linked = sum(member["transport"] not in (None, "self") for member in report["members"])
        yield gauge("swarm_links", "Members that this node is linked with", value=linked)
        own = view["members"].get(report["node"]["id"], {"fetches": {}, "holds": {}})
        running = [fetch for fetch in own["fetches"].values() if fetch["running"]]
        size, done = (sum(fetch[key] for fetch in running) for key in ("bytes", "done_bytes"))
        yield gauge("swarm_fetches_running", "Fetches of this node that run", value=len(running))
        yield gauge("swarm_fetches_stalled", "Those that get nothing", value=sum(f["stalled"] for f in running))
        yield gauge("swarm_fetches_missing_bytes", "Bytes that running fetches still miss", value=max(0, size - done))
        yield gauge("swarm_artifacts_held", "Artifacts that this node holds whole or in part", value=len(own["holds"]))
        by_code = Counter(warning["code"] for warning in view["warnings"].values())
        warned = gauge("swarm_warnings", "What is wrong, by the codes of docs/status.md", labels=["code"])
        for code, count in sorted(by_code.items()):
            warned.add_metric([code], count)
        yield warned
