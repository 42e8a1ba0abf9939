"""Cost and speed of gossip among real node processes on loopback: `python bench/gossip.py --real N`.

All processes share the cores of the machine: measure on a quiet machine.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from children import Child, host

WORKER = Path(__file__).with_name("gossip_worker.py")
TIMEOUT_S = 120.0
LOOK_EVERY_S = 0.1
REST_S = 20.0
BURN = "while True: pass"


class Swarm:
    """Node processes. `changes` of all of them: (time, observer, subject, state)."""

    def __init__(self, place: Path, network: str) -> None:
        self.nodes: dict[str, Child] = {}
        self.opened_at: dict[str, float] = {}
        self.changes: list[tuple[float, str, str, str]] = []
        self._place = place
        self._network = network
        self._first = ""

    def add(self) -> str:
        """Starts a node, which joins through the first node, and returns its id."""
        contact = [self._first] if self._first else []
        child = Child([sys.executable, str(WORKER), self._network, *contact], cwd=self._place)
        hello = child.told(timeout_s=TIMEOUT_S)
        self._first = self._first or hello["address"]
        self.nodes[hello["node"]] = child
        self.opened_at[hello["node"]] = hello["opened_at"]
        return str(hello["node"])

    def look(self) -> dict[str, dict[str, Any]]:
        """The present report of every node, by id."""
        told = {node: child.ask({}, timeout_s=TIMEOUT_S) for node, child in self.nodes.items()}
        self.changes += [(at, by, whom, state) for by, said in told.items() for at, whom, state in said["changes"]]
        return told

    def until(self, condition: Callable[[dict[str, dict[str, Any]]], bool], what: str) -> None:
        """Waits; raises RuntimeError when it takes too long."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition(self.look()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not within {TIMEOUT_S:g} s: {what}")
            time.sleep(LOOK_EVERY_S)

    def all_know_all(self) -> None:
        others = len(self.nodes) - 1
        self.until(lambda told: all(len(said["known"]) == others for said in told.values()), "all know all")

    def close(self) -> None:
        for child in self.nodes.values():
            child.close()


def measure(count: int, *, network: str, busy_s: float) -> None:
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        swarm = Swarm(place, network)
        stack.callback(swarm.close)
        for _ in range(count):
            swarm.add()
        swarm.all_know_all()
        newcomer(swarm, count)
        rest(swarm, count)
        death(swarm, count)
        if busy_s > 0:
            alarms(swarm, count, busy_s)


def newcomer(swarm: Swarm, count: int) -> None:
    node = swarm.add()
    swarm.all_know_all()
    began = swarm.opened_at[node]
    first: dict[tuple[str, str], float] = {}
    for at, by, whom, _ in swarm.changes:
        first.setdefault((by, whom), at)
    knows = max(at for (by, _), at in first.items() if by == node) - began
    known = max(at for (_, whom), at in first.items() if whom == node) - began
    print(
        f"{count}: a newcomer knows all {knows:.3f} s after it began to open, and is known to all after {known:.3f} s"
    )
    swarm.nodes.pop(node).close()
    swarm.all_know_all()


def rest(swarm: Swarm, count: int) -> None:
    before = swarm.look()
    time.sleep(REST_S)
    after = swarm.look()
    rates = [
        (said["sent_bytes"] - before[node]["sent_bytes"]) / (said["at"] - before[node]["at"])
        for node, said in after.items()
    ]
    links = max(said["links"] for said in after.values())
    print(f"{count}: at rest a node sends {sum(rates) / len(rates):.0f} B/s, the most {max(rates):.0f}; {links} links")


def death(swarm: Swarm, count: int) -> None:
    node = swarm.add()
    swarm.all_know_all()
    swarm.nodes.pop(node).kill()
    began = time.monotonic()
    swarm.until(lambda told: all(node not in said["known"] for said in told.values()), "a killed node is dead for all")
    dead = [at - began for at, _, whom, state in swarm.changes if whom == node and state == "DEAD"]
    print(f"{count}: a killed node is dead for the first after {min(dead):.1f} s, for the last after {max(dead):.1f} s")


def alarms(swarm: Swarm, count: int, busy_s: float) -> None:
    swarm.look()
    swarm.changes.clear()
    with burning(os.cpu_count() or 1):
        time.sleep(busy_s)
        swarm.look()
    seen = {state: {whom for _, _, whom, was in swarm.changes if was == state} for state in ("SUSPECT", "DEAD")}
    print(
        f"{count}: {busy_s:g} s with all cores busy: {len(seen['SUSPECT'])} were suspected, "
        f"{len(seen['DEAD'])} declared dead"
    )


@contextmanager
def burning(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as place:
        for _ in range(count):
            stack.enter_context(Child([sys.executable, "-c", BURN], cwd=Path(place)))
        yield


def real(counts: list[int], *, network: str, busy_s: float) -> None:
    """Measures swarms of these sizes in sequence."""
    print(f"{host()['cpu']}, preset {network}")
    for count in counts:
        measure(count, network=network, busy_s=busy_s)
