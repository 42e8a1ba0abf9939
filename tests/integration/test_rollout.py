"""A new revision under one id: do starts that name their revision work all the way, whatever is killed?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .processes import Ended, Machine, Process, contents, wait_until, write_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

NODES = 8
SLOW_S = 90.0  # on a machine that does other work
PATIENT = {"SWARM_FIND_TIMEOUT_S": "30", "SWARM_STALL_TIMEOUT_S": "30", "SWARM_IDLE_TIMEOUT_S": "10"}


def test_do_pinned_starts_work_all_through_a_rollout(machine: Machine, tmp_path: Path) -> None:
    models = {name: write_model(tmp_path / name, size=400_000, seed=number) for number, name in enumerate(("v1", "v2"))}
    seeds = {name: machine.serve(models[name], "--revision", name) for name in ("v1", "v2")}
    peers = [seed.address for seed in seeds.values()]

    def start(revision: str, out: Path, *flags: str) -> Process:
        named = [word for peer in peers for word in ("--peer", peer)]
        what = f"org/model@{revision}"
        return machine.start("fetch", what, "--out", out, "--no-mdns", *named, *flags, environment=PATIENT)

    def node(revision: str, number: int) -> Process:
        """A replica that serves what it fetched."""
        process = start(revision, tmp_path / f"{revision}-node-{number}")
        wait_until(lambda: "serving it on" in process.err, f"a node of {revision}", deadline_s=SLOW_S)
        return process

    def began(number: int) -> list[tuple[str, Path, Process]]:
        """Starts of each revision that a node has."""
        there = models if number < NODES - 1 else ["v2"]
        places = [(revision, tmp_path / f"start-{number}-{revision}") for revision in there]
        return [(revision, out, start(revision, out, "--no-seed")) for revision, out in places]

    old = [node("v1", number) for number in range(NODES)]
    ended: list[tuple[str, Path, Ended]] = []
    for number, replica in enumerate(old):
        running = began(number)  # while a replica is killed and another comes
        replica.kill()
        if number == NODES // 2:
            seeds["v1"].kill()  # the last four replicas of v1 serve those that still want it
        if number < NODES - 1:
            node("v2", number)
        ended += [(revision, out, process.end()) for revision, out, process in running]
        if number == 0:
            quick = {"SWARM_FIND_TIMEOUT_S": "8"}
            unpinned = machine.fetch(tmp_path / "unpinned", peers=peers, environment=quick).end().error(3)
            assert re.search(
                r"swarm fetch org/model@v1, swarm fetch org/model@v2|@v2, swarm fetch org/model@v1", unpinned
            )
    failed = [(revision, end.err) for revision, _, end in ended if end.code]
    assert failed == []
    assert len(ended) == 2 * NODES - 1
    for revision, out, _ in ended:
        assert contents(out) == contents(models[revision])
