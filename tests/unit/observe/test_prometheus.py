"""Metrics of a node, as Prometheus reads them, and the dashboard and alerts that rest on their names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from swarm.agent.cache import Cache
from swarm.agent.face import Face
from swarm.content.manifest import Digest, ModelId
from swarm.journal import FetchEnded, FetchStarted, Journal, OriginListed, OriginNode, OriginRead, Received, Sent
from swarm.observe.prometheus import Metrics
from swarm.protocol.messages import NodeId
from swarm.transfer.download_events import Ban, ChunkCorrupt

P, Q = NodeId("p"), NodeId("q")
HUB = OriginNode(NodeId("a" * 16), "origin hub", "hf")
BUCKET = OriginNode(NodeId("b" * 16), "origin s3://bucket", "s3")

MONITORING = Path(__file__).parents[3] / "examples" / "monitoring"
DIGEST = Digest("d" * 64)
REPORT: dict[str, Any] = {
    "node": {"id": "n0", "version": "1"},
    "members": [{"state": "self", "transport": "self"}, {"state": "alive", "transport": "tcp"}],
}
FETCH = {"running": True, "bytes": 100, "done_bytes": 30, "stalled": True}
VIEW: dict[str, Any] = {
    "members": {"n0": {"fetches": {DIGEST: FETCH}, "holds": {DIGEST: {}}}},
    "warnings": {"k": {"code": "stalled"}},
}


def metrics(*what: object) -> Metrics:
    counted = Metrics(lambda: REPORT, lambda: VIEW, lambda: ["org/model: is being fetched"])
    journal = Journal()
    counted.follow(journal)
    for one in what:
        journal.record(1.0, DIGEST, one)
    return counted


def samples(counted: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(counted.exposition().decode())
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_are_events_counted_and_the_present_told() -> None:
    told = samples(
        metrics(
            FetchStarted(ModelId("m"), DIGEST, 100, 0), Received(P, DIGEST, 0, 30), Sent(P, DIGEST, 7),
            OriginListed(HUB, 0.5, None), Received(HUB.node, DIGEST, 1, 50), OriginRead(HUB, "a", 0, 50, 1.0, None),
            OriginRead(HUB, "a", 50, 0, 1.0, "it broke"), OriginRead(BUCKET, "a", 50, 0, 1.0, "gone", lasting=True),
            ChunkCorrupt(Q, 1, 2), Ban(Q, "lies"), FetchEnded(DIGEST, None), FetchEnded(DIGEST, "stalled"),
        )
    )  # fmt: skip
    expected = {
        "swarm_received_bytes_total": 80, "swarm_sent_bytes_total": 7, "swarm_chunks_rejected_total": 1,
        "swarm_ready": 0, "swarm_bans_total": 1, "swarm_fetches_started_total": 1,
        "swarm_fetches_ended_total complete": 1,
        "swarm_fetches_ended_total failed": 1, "swarm_members alive": 2, "swarm_links": 1,
        "swarm_origin_bytes_total hf": 50, "swarm_origin_requests_total hf": 3, "swarm_origin_retries_total hf": 1,
        "swarm_origin_requests_total s3": 1, "swarm_origin_retries_total s3": 0,
        "swarm_fetches_missing_bytes": 70, "swarm_fetches_stalled": 1, "swarm_warnings stalled": 1,
    }  # fmt: skip
    assert {name: told[name] for name in expected} == expected


def test_are_labels_bounded() -> None:
    """However many peers and digests there are."""
    few = metrics(Received(P, DIGEST, 0, 1))
    many = metrics(*(Received(NodeId(f"p{n}"), Digest(f"{n:064x}"), n, 1) for n in range(500)))
    assert samples(few).keys() == samples(many).keys()


def of_agents(tmp_path: Path) -> set[str]:
    """The names that an agent adds."""
    cache = Cache(tmp_path, tmp_path, limit_bytes=1.0, withdraw=lambda _: None)
    face = Face.__new__(Face)
    face.answered, face.sent_bytes, face._streams = Counter({200: 1}), 1, 0
    figures = [*cache.figures(), *face.figures()]
    counted = Metrics(lambda: REPORT, lambda: VIEW, list, lambda: figures)
    return {name.split()[0] for name in samples(counted)}


def test_are_the_names_of_dashboard_and_alerts_those_that_there_are(tmp_path: Path) -> None:
    there = {name.split()[0] for name in samples(metrics())} | of_agents(tmp_path)
    board = json.loads((MONITORING / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += re.findall(r"expr: (.*)", (MONITORING / "alerts.yml").read_text())
    named = {name for expression in asked for name in re.findall(r"swarm_\w+", expression)}
    assert len(asked) >= 10
    assert named <= there


def test_fits_the_board_any_scrape_interval_and_any_data_source() -> None:
    board = json.loads((MONITORING / "grafana.json").read_text())
    variables = {each["name"] for each in board["templating"]["list"]}
    cells: Counter[tuple[int, int]] = Counter()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells.update((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"]))
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert set(re.findall(r"\[([^\]]*)\]", target["expr"])) <= {"$__rate_interval"}, target["expr"]
            assert set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"} <= variables
    assert set(cells.values()) == {1}, "panels do not overlap"
    assert max(x for x, _ in cells) == 23
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
@pytest.mark.parametrize("arguments", [["rules", str(MONITORING / "alerts.yml")], ["metrics"]], ids=lambda a: a[0])
def test_does_promtool_find_nothing(arguments: list[str]) -> None:
    said = metrics(FetchEnded(DIGEST, None)).exposition() if arguments == ["metrics"] else b""
    found = subprocess.run(["promtool", "check", *arguments], input=said, capture_output=True, timeout=30, check=False)
    assert (found.returncode, found.stderr.replace(b"Checking", b"")) == (0, b"") or b"SUCCESS" in found.stdout


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
def test_are_the_queries_of_the_board_promql(tmp_path: Path) -> None:
    board = json.loads((MONITORING / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "4m").replace("$instance", ".*")}
        for number, query in enumerate(queries)
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "board", "rules": rules}]}))  # JSON is YAML
    found = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, timeout=30, check=False)
    assert found.returncode == 0, found.stderr
    assert f"{len(queries)} rules found".encode() in found.stdout
