"""A swarm of real processes, watched: by `swarm status`, by Prometheus' parser, by its trace."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from .processes import Machine, wait_until, write_model
from .stage import Liar

pytestmark = pytest.mark.integration
SIZE = 32_000_000


def status(machine: Machine, *arguments: str) -> tuple[int, dict[str, object]]:
    ended = machine.run("status", "--json", *arguments)
    return ended.code, json.loads(ended.out) if ended.out else {}


def test_is_a_fetch_watched_from_its_beginning_to_where_its_time_went(machine: Machine) -> None:
    model = write_model(machine.root / "model", size=SIZE)
    trace: Path = machine.root / "trace"
    seed = machine.serve(model, "--upload-limit", "4MB/s")
    with Liar.of(model) as liar:
        fetch = machine.fetch(
            machine.root / "out", "--trace", str(trace), peers=[seed.address, liar.address], environment={}
        )

        def seen() -> bool:
            code, told = status(machine, "--peer", seed.address)
            codes = {warning["code"] for warning in told["warnings"]}  # type: ignore[attr-defined]
            running = [one for one in told["fetches"] if one["running"] and one["fed_by"]]  # type: ignore[attr-defined]
            return code == 1 and "lies" in codes and bool(running)

        wait_until(seen, "status to name who lies, and who feeds whom")
        assert fetch.end().code == 0
    ended = machine.run("replay", str(trace), "--json")
    (told,) = json.loads(ended.out)["fetches"]
    assert told["complete"]
    assert sum(told["phases"].values()) == pytest.approx(told["seconds"], abs=0.01)
    assert sum(source["bytes"] for source in told["sources"]) == told["received_bytes"] > SIZE
    assert max(source["rejected_chunks"] for source in told["sources"]) > 0
    with urllib.request.urlopen(f"http://{seed.address}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    (sent,) = [family for family in families if family.name == "swarm_sent_bytes"]
    assert sent.samples[0].value > 0


@pytest.mark.xdist_group("mdns")
def test_is_a_node_found_by_mdns_where_none_of_this_user_runs(machine: Machine) -> None:
    model = write_model(machine.root / "model", size=1000)
    seed = machine.start("serve", model, "--model-id", "org/model")
    seed.wait_for(" ready: ")

    def found() -> bool:
        return machine.run("status", environment={"SWARM_CACHE": str(machine.root / "elsewhere")}).code in (0, 1)

    wait_until(found, "a node found by mDNS")
