"""Do real nodes know each other through gossip, link with few, and find what is held where no link leads?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from swarm import __version__
from swarm.content.manifest import ModelId
from swarm.errors import ManifestConflict
from swarm.journal import Left
from swarm.membership.config import lan
from swarm.membership.swim_events import MemberChanged
from swarm.node import resolve
from swarm.node.node import Node
from swarm.peers import selection
from swarm.protocol.packets import State

from . import scenarios
from .cluster import MODEL_ID, Cluster, Member, Report, Setup
from .content import BytesStore, Content

ORG_RARE = ModelId("org/rare")

QUIET = Setup(newcomers=0, chunks=8, limit_s=3000.0)
LONG_S = 300.0
CROWD = 40  # more than may all be linked with each other


def played(scenario: scenarios.Scenario, setup: Setup = QUIET) -> Report:
    print(setup.command)  # shown when the test fails
    return Cluster(setup).run(scenario)


async def crowd(cluster: Cluster, count: int, *, machine: str | None = None) -> list[Member]:
    """So many nodes that joined through the seed and neither serve nor fetch."""
    empty = Content.random(0, chunks=1, chunk_bytes=8)
    return [await cluster.open(f"member-{n}", BytesStore(empty.manifest), machine=machine) for n in range(count)]


def states(node: Node) -> dict[str, State]:
    return {record.name: record.state for record in node.members()}


def all_know(cluster: Cluster, count: int) -> Callable[[], bool]:
    """Whether every living node knows so many others as alive."""

    def know() -> bool:
        living = [member.node for member in cluster.members.values() if not member.killed]
        return all(list(states(node).values()).count(State.ALIVE) == count for node in living)

    return know


def test_do_all_know_all_through_one_member_and_link_with_few() -> None:
    async def scenario(cluster: Cluster) -> None:
        await crowd(cluster, CROWD)
        await cluster.until(all_know(cluster, CROWD), timeout_s=LONG_S)
        dialled = [len(member.node._connections.machine._dialled_links()) for member in cluster.members.values()]
        assert max(dialled) <= selection.LINKS_MOST

    played(scenario)


def test_are_few_all_linked_with_each_other() -> None:
    async def scenario(cluster: Cluster) -> None:
        await crowd(cluster, 8)
        await cluster.until(lambda: all(cluster.linked(name) == 8 for name in cluster.members))

    played(scenario)


@pytest.mark.parametrize("loss", [0.0, 0.2])
def test_is_found_what_is_held_where_no_link_leads(loss: float) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await crowd(cluster, CROWD)
        await cluster.until(all_know(cluster, CROWD), timeout_s=LONG_S)
        holder, other = members[3].node, Content.random(9, chunks=8, chunk_bytes=64)
        seeker = next(m.node for m in members if holder.id not in m.node.peers)
        holder.serve(ORG_RARE, BytesStore(other.manifest, other.files))
        manifest, _ = await resolve.resolve(seeker, ORG_RARE, digest=None, find_timeout_s=10.0)
        assert manifest.digest == other.manifest.digest
        fetched = await seeker.fetch(ORG_RARE, BytesStore(manifest))
        assert fetched.sources.keys() == {holder.name}

    played(scenario, Setup(newcomers=0, chunks=8, limit_s=3000.0, loss=loss))


def test_do_two_contents_of_one_name_conflict_though_no_link_leads_to_one_of_them() -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await crowd(cluster, CROWD)
        await cluster.until(all_know(cluster, CROWD), timeout_s=LONG_S)
        asker = members[-1].node
        (far, *_) = [m.node for m in members if m.node.id not in asker.peers]
        other = Content.random(9, chunks=8, chunk_bytes=64)
        far.serve(ModelId(MODEL_ID), BytesStore(other.manifest, other.files))
        await cluster.until(lambda: len(asker.holders(ModelId(MODEL_ID))) == 2)
        with pytest.raises(ManifestConflict, match=far.name):
            await resolve.resolve(asker, ModelId(MODEL_ID), digest=None, find_timeout_s=10.0)

    played(scenario)


@pytest.mark.parametrize("silent", [False, True])
def test_is_a_killed_member_dropped_and_forgotten(silent: bool) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await crowd(cluster, 6)
        await cluster.until(all_know(cluster, 6))
        gone = members[2].node.id
        await cluster.kill("member-2", silent=silent)
        living = [m.node for m in cluster.members.values() if not m.killed]
        await cluster.until(lambda: all(len(node.members()) == 5 for node in living), timeout_s=LONG_S)
        await cluster.until(lambda: all(gone not in node.peers for node in living))
        assert all_know(cluster, 5)()
        await asyncio.sleep(lan().dead_memory_s + 60.0)
        assert all(node._swim.machine and node._swim.machine.member(gone) is None for node in living)

    played(scenario)


def test_does_gossip_end_a_link_whose_other_end_is_dead() -> None:
    async def scenario(cluster: Cluster) -> None:
        (member,) = await crowd(cluster, 1)
        seed = cluster.members["seed-0"].node
        await cluster.until(lambda: bool(seed.peers) and bool(seed.members()))
        whys: list[str] = []
        seed.journal.subscribe(lambda entry: whys.append(entry.event.why) if isinstance(entry.event, Left) else None)
        cluster.fabric.hosts["member-0"].datagrams_pass = False  # its links stand all the same
        await cluster.until(lambda: not seed.members(), timeout_s=LONG_S)
        await cluster.until(lambda: bool(whys))
        assert whys[0] == "gossip says that it is dead"
        await cluster.until(lambda: member.node.id in seed.peers)  # and links alone are enough

    played(scenario)


def test_does_a_partition_heal() -> None:
    async def scenario(cluster: Cluster) -> None:
        await crowd(cluster, 9)
        await cluster.until(all_know(cluster, 9))
        cluster.fabric.partition([f"member-{n}" for n in range(4)])
        await cluster.until(lambda: len(cluster.members["member-0"].node.members()) == 3, timeout_s=LONG_S)
        cluster.fabric.heal()
        await cluster.until(all_know(cluster, 9), timeout_s=LONG_S)
        await cluster.until(lambda: all(cluster.linked(name) == 9 for name in cluster.members), timeout_s=LONG_S)

    played(scenario)


def test_is_a_process_that_comes_back_under_its_id_one_member() -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await crowd(cluster, 5)
        await cluster.until(all_know(cluster, 5))
        before = members[1].node.id
        await cluster.kill("member-1")
        again = await cluster.open("member-1", BytesStore(cluster.content.manifest))
        assert again.node.id == before
        await cluster.until(all_know(cluster, 5), timeout_s=LONG_S)
        await cluster.until(lambda: all(cluster.linked(name) == 5 for name in cluster.members), timeout_s=LONG_S)

    played(scenario)


def test_is_the_version_of_swarm_told_to_those_that_no_link_leads_to() -> None:
    async def scenario(cluster: Cluster) -> None:
        await crowd(cluster, 2)
        await cluster.until(all_know(cluster, 2))
        assert {record.profile.software for record in cluster.members["seed-0"].node.members()} == {__version__}

    played(scenario)


def test_are_two_nodes_of_one_host_told_to_be_near() -> None:
    async def scenario(cluster: Cluster) -> None:
        await crowd(cluster, 2, machine="m" * 12)
        await cluster.until(all_know(cluster, 2))
        hosts = {record.name: record.profile.host for record in cluster.members["seed-0"].node.members()}
        assert hosts == {"member-0": "m" * 12, "member-1": "m" * 12}

    played(scenario)


@pytest.mark.parametrize("skew_s", [3600.0, -3600.0])
def test_does_a_clock_that_jumps_blame_no_member(skew_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cluster: Cluster) -> None:
        members = await crowd(cluster, 5)
        await cluster.until(all_know(cluster, 5))
        blamed: list[object] = []
        for member in members:
            member.node.journal.subscribe(
                lambda entry: (
                    blamed.append(entry)
                    if isinstance(entry.event, MemberChanged) and entry.event.record.state is not State.ALIVE
                    else None
                )
            )
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(members[0].node._swim, "_clock", lambda: loop.time() + skew_s)
        await asyncio.sleep(60.0)
        assert not blamed

    played(scenario)


@pytest.mark.parametrize("blocked", ["everybody", "one"])
def test_do_links_do_where_datagrams_are_stopped(blocked: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        await crowd(cluster, 20)
        hosts = cluster.fabric.hosts
        for host in hosts.values() if blocked == "everybody" else [hosts["member-7"]]:
            host.datagrams_pass = False
        cluster.members["member-19"].node.serve(ORG_RARE, BytesStore(other.manifest, other.files))
        node = cluster.members["member-7"].node
        manifest, _ = await resolve.resolve(node, ORG_RARE, digest=None, find_timeout_s=30.0)
        assert manifest.digest == other.manifest.digest

    other = Content.random(9, chunks=8, chunk_bytes=64)
    played(scenario)


def test_does_a_crowd_of_newcomers_finish_over_few_links() -> None:
    setup = Setup(newcomers=24, chunks=32)
    report = Cluster(setup).run()
    assert len(report.finished_s) == 24
    assert not report.wrong
