"""Do processes know of each other by datagrams, and do without them where nothing passes but TCP?"""

from __future__ import annotations

import signal
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from swarm.errors import PeerUnreachable
from swarm.node import status_client

from .processes import Machine, Process, contents, wait_until, write_model

pytestmark = pytest.mark.integration


def members(address: str) -> dict[str, dict[str, Any]]:
    """What the node at an address says of each of its members, by name."""
    try:
        return {member["name"]: member for member in status_client.ask(address)["members"]}
    except PeerUnreachable:  # busy
        return {}


def knows(address: str, names: set[str]) -> bool:
    """Whether gossip told the node at an address of exactly these."""
    found = members(address).items()
    return {name for name, member in found if member["state"] == "alive" and member["host"]} == names


def is_dead(address: str, name: str) -> bool:
    return bool(members(address).get(name, {}).get("state") == "dead")


def serve(machine: Machine, root: Path, number: int, *flags: str) -> Process:
    model = write_model(root / f"model-{number}", size=10_000, seed=number)
    return machine.serve(model, "--name", f"n{number}", *flags, model_id=f"org/model-{number}")


def test_do_processes_know_each_other_through_one_and_who_is_killed(machine: Machine, tmp_path: Path) -> None:
    nodes = [serve(machine, tmp_path, 0)]
    nodes += [serve(machine, tmp_path, number, "--peer", nodes[0].address) for number in range(1, 5)]
    names = {f"n{number}" for number in range(5)}
    for number, node in enumerate(nodes):
        wait_until(partial(knows, node.address, names - {f"n{number}"}), f"n{number} to hear of all")
    seen = [members(node.address) for node in nodes]
    assert len({member["host"] for view in seen for member in view.values() if member["host"]}) == 1
    nodes[3].kill()
    for node in (nodes[0], nodes[1], nodes[4]):
        wait_until(partial(is_dead, node.address, "n3"), "n3 to be declared dead")
        assert "n3" not in {name for a in status_client.ask(node.address)["artifacts"] for name in a["members"]}


def test_is_a_goodbye_told(machine: Machine, tmp_path: Path) -> None:
    one = serve(machine, tmp_path, 0)
    other = serve(machine, tmp_path, 1, "--peer", one.address)
    wait_until(lambda: knows(one.address, {"n1"}), "n0 to hear of n1")
    other.send(signal.SIGTERM)
    wait_until(lambda: members(one.address)["n1"]["state"] == "left", "n1 to have left")


def test_is_a_taken_udp_port_an_error_that_names_it(machine: Machine, model: Path) -> None:
    with socket.socket() as free, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        free.bind(("127.0.0.1", 0))  # a port that no TCP socket of another process has
        port = free.getsockname()[1]
        taken.bind(("127.0.0.1", port))
        free.close()
        line = machine.run("serve", model, "--no-mdns", "--listen", f"127.0.0.1:{port}").error(2)
        assert f"UDP port {port} on 127.0.0.1 cannot be had" in line


def test_do_links_do_where_no_datagram_passes(
    machine: Machine, model: Path, out: Path, without_udp: Sequence[str]
) -> None:
    one = machine.start("serve", model, "--model-id", "org/a", "--no-mdns", wrapper=without_udp)
    one.wait_for(" ready: ")
    other = write_model(model.parent / "other", size=10_000, seed=7)
    command = ("serve", other, "--model-id", "org/b", "--no-mdns", "--peer", one.address)
    two = machine.start(*command, wrapper=without_udp)
    two.wait_for(" ready: ")
    flags = ("--json", "--no-seed", "--no-mdns", "--peer", one.address)
    ended = machine.start("fetch", "org/b", "--out", out, *flags, wrapper=without_udp).end()
    assert ended.report["model_id"] == "org/b", "found through a member that does not serve it"
    assert contents(out) == contents(other)
    status = machine.start("status", "--json", "--peer", two.address, wrapper=without_udp).end().report
    assert not any(member["gossip"] for member in status["members"]), "gossip was heard"


def test_is_it_warned_where_a_node_does_not_hear_itself_by_multicast(
    machine: Machine, model: Path, without_mdns: Sequence[str]
) -> None:
    node = machine.start("serve", model, "--model-id", "org/a", wrapper=without_mdns)
    node.wait_for(" ready: ")

    def warned() -> list[str]:
        status = machine.start("status", "--json", "--peer", node.address, wrapper=without_mdns).end().report
        return [warning["what"] for warning in status["warnings"] if warning["code"] == "mdns"]

    (what,) = wait_until(warned, "the warning")
    assert what.endswith("hears nothing by multicast DNS, not even itself")
