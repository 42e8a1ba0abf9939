"""Does the doctor see what is wrong between real nodes?"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from swarm.engines import start_log
from swarm.engines.start_log import EngineStart, TierAttempt
from swarm.security import cluster_key

from .processes import MODEL, Ended, Machine

pytestmark = pytest.mark.integration


def key(path: Path) -> Path:
    cluster_key.create(path)
    return path


def examined(machine: Machine, *flags: str | Path, wrapper: Sequence[str] = ()) -> tuple[Ended, list[dict[str, Any]]]:
    ended = machine.start("doctor", MODEL, "--json", *flags, wrapper=wrapper).end()
    return ended, json.loads(ended.out)["findings"]


def levels(findings: list[dict[str, Any]], check: str) -> list[str]:
    return [finding["level"] for finding in findings if finding["check"] == check]


def bad(findings: list[dict[str, Any]]) -> dict[str, str]:
    return {finding["check"]: finding["what"] for finding in findings if finding["level"] == "bad"}


def test_is_a_healthy_swarm_healthy(machine: Machine, model: Path, tmp_path: Path) -> None:
    flags = ("--key-file", str(key(tmp_path / "key")))
    seed = machine.serve(model, *flags)
    ended, findings = examined(machine, "--peer", seed.address, "--no-mdns", *flags)
    assert ended.code == 0
    assert bad(findings) == {}
    for check in ("key", "port", "peers", "datagrams", "clock", "versions", "room", "model"):
        assert "ok" in levels(findings, check), check
    assert ended.err == ""


@pytest.mark.xdist_group("mdns")
def test_is_a_seed_found_by_multicast(machine: Machine, model: Path) -> None:
    seed = machine.start("serve", model, "--model-id", MODEL)
    seed.wait_for(" ready: ")
    ended, findings = examined(machine)
    assert ended.code == 0, ended.out
    assert levels(findings, "mdns") == ["ok"]
    assert f"at {seed.address} answers (here, mdns)" in ended.out


@pytest.mark.parametrize(
    ("own", "told"),
    [("other", "has another cluster key"), (None, "wants a cluster key and this node has none")],
)
def test_is_the_wrong_key_named_with_who_refuses_it(
    machine: Machine, model: Path, tmp_path: Path, own: str | None, told: str
) -> None:
    seed = machine.serve(model, "--key-file", str(key(tmp_path / "key")))
    flags = ("--key-file", key(tmp_path / own)) if own else ()
    ended, findings = examined(machine, "--peer", seed.address, "--no-mdns", *flags)
    assert ended.code == 1
    assert bad(findings)["key"] == f"{seed.address}: {told}"
    assert bad(findings)["model"] == f"no node holds {MODEL}"


def test_is_a_key_that_is_not_there_said_before_anything_else(machine: Machine, tmp_path: Path) -> None:
    ended, findings = examined(machine, "--key-file", tmp_path / "none")
    assert ended.code == 1
    assert bad(findings) == {"key": f"{tmp_path / 'none'} does not exist"}


def test_are_blocked_datagrams_and_a_closed_port_seen(
    machine: Machine, model: Path, without_udp: Sequence[str]
) -> None:
    seed = machine.start("serve", model, "--model-id", MODEL, "--no-mdns", wrapper=without_udp)
    seed.wait_for(" ready: ")
    flags = ("--peer", seed.address, "--peer", "127.0.0.1:1", "--no-mdns")
    ended, findings = examined(machine, *flags, wrapper=without_udp)
    assert ended.code == 1
    assert bad(findings).keys() == {"peers", "datagrams"}
    assert bad(findings)["datagrams"].startswith(f"no datagrams from {seed.address}")
    assert bad(findings)["peers"].startswith("127.0.0.1:1: ")


def test_are_a_taken_port_and_an_unknown_name_seen(machine: Machine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended, findings = examined(
            machine, "--listen", f"127.0.0.1:{port}", "--no-mdns", "--peer", "nowhere.invalid:7000"
        )
    assert ended.code == 1
    assert str(port) in bad(findings)["port"]
    assert any("nowhere.invalid" in finding["what"] for finding in findings if finding["check"] == "peers")


def test_are_the_last_starts_told_to_people(machine: Machine, model: Path) -> None:
    seed = machine.serve(model)
    loaded = TierAttempt("loaded", False, "failed: stalled", failed=True)
    attempts = (loaded, TierAttempt("disk", True, "no peer"))
    start_log.record(machine.cache, EngineStart("vllm 9.9", MODEL, "tp 0 of 1", {}, attempts))
    ended = machine.run("doctor", MODEL, "--no-mdns", "--peer", seed.address, environment={"COLUMNS": "200"})
    assert ended.code == 1
    brought = "from disk or hub (no peer), because a tier failed"
    assert f"vllm 9.9, org/model, tp 0 of 1: {brought}; loaded skipped: failed: stalled" in ended.out
    assert "1 of these keep a start from using the swarm" in ended.out
