"""Many gossip machines under a virtual network: do they know each other, and what do they make of faults?"""

from __future__ import annotations

import pytest

from swarm.content.manifest import Digest, ModelId
from swarm.membership import config
from swarm.protocol.packets import Holding, Profile, State

from .swim_group import SwimGroup

T = config.lan()
LIMIT_S = 120.0


def flock(members: int, *, seed: int = 1, loss: float = 0.0, checked: bool = True) -> SwimGroup:
    """Members `m0`, `m1`, ... that joined through m0 at once and agree."""
    found = SwimGroup(seed=seed, config=T, loss=loss, checked=checked)
    found.add("m0")
    for number in range(1, members):
        found.add(f"m{number}", contacts=("m0",))
    found.until(found.agreed, limit_s=LIMIT_S)
    return found


def seen(found: SwimGroup, *states: State) -> list[tuple[str, str]]:
    """Who saw whom in one of these states."""
    return [(seen.by, seen.whom) for seen in found.seen if seen.state in states]


def profile(chunks: int) -> Profile:
    return Profile((Holding(ModelId("org/model"), Digest("a" * 64), "checkpoint", chunks, 80, chunks == 80),))


def test_does_a_newcomer_know_all_of_32_at_once_through_any_member() -> None:
    found = flock(32)
    found.add("late", contacts=("m17",))
    assert found.until(lambda: found.knows("late") == 32, limit_s=LIMIT_S) < 1.0
    assert found.until(found.agreed, limit_s=LIMIT_S) < 5.0


@pytest.mark.parametrize("loss", [0.0, 0.1, 0.3])
def test_does_a_burst_come_to_agree(loss: float) -> None:
    found = SwimGroup(seed=3, config=T, loss=loss)
    for number in range(24):
        found.add(f"m{number}", contacts=("m0",) if number else ())
    found.until(lambda: all(found.knows(name) == 23 for name in found.hosts), limit_s=LIMIT_S)


def test_is_a_quiet_flock_quiet() -> None:
    found = flock(16)
    found.seen.clear()
    found.run(120.0)
    assert not found.seen
    assert found.agreed()


@pytest.mark.parametrize("members", [2, 3, 8, pytest.param(32, marks=pytest.mark.integration)])
def test_does_everyone_notice_a_death(members: int) -> None:
    found = flock(members)
    found.kill("m1")
    limit_s = 2 * members * T.probe_interval_s + T.suspicion_s(members) + 5.0
    found.until(found.agreed, limit_s=limit_s)
    found.run(T.dead_memory_s + 30.0)
    assert found.agreed()


def test_is_a_goodbye_heard_at_once_and_without_suspicion() -> None:
    found = flock(16)
    found.leave("m3")
    assert found.until(found.agreed, limit_s=LIMIT_S) < 5.0
    found.run(30.0)
    assert {whom for _, whom in seen(found, State.LEFT)} == {"m3"}
    assert not seen(found, State.SUSPECT, State.DEAD)


@pytest.mark.parametrize("seed", range(3))
def test_does_lost_traffic_kill_no_member(seed: int) -> None:
    found = flock(24, seed=seed, loss=0.1)
    found.run(120.0)
    assert not seen(found, State.DEAD)


@pytest.mark.parametrize("seed", range(5))
def test_does_a_partition_heal(seed: int) -> None:
    found = flock(16, seed=seed)
    apart = {f"m{number}" for number in range(6)}
    found.partition(apart)
    found.run(60.0)
    assert found.knows("m0") == 5
    assert found.knows("m15") == 9
    found.heal()
    found.until(found.agreed, limit_s=LIMIT_S)
    found.seen.clear()
    found.run(60.0)
    assert not seen(found, State.DEAD)


def test_does_a_partition_heal_after_all_is_forgotten_if_discovery_named_the_other_side() -> None:
    found = flock(8)  # all but m0 were told of m0
    found.partition({"m0", "m1"})
    found.run(T.dead_memory_s + 60.0)
    assert found.knows("m7") == 5
    found.heal()
    found.until(found.agreed, limit_s=LIMIT_S)


@pytest.mark.parametrize("pause_s", [0.0, 2.0, 60.0])
def test_is_a_process_that_comes_back_under_its_id_one_member(pause_s: float) -> None:
    found = flock(8)
    node = found.hosts["m3"].machine.own.node
    found.kill("m3")
    found.run(pause_s)
    found.add("m3-again", node=node, contacts=("m5",))
    found.until(found.agreed, limit_s=LIMIT_S)
    address = {host.machine.member(node) for host in found.living() if host.address != "m3-again"}
    assert {known.address for known in address if known} == {"m3-again"}
    assert not found.conflicts


def test_is_a_new_process_on_an_old_port_another_member() -> None:
    found = flock(8)
    old = found.hosts["m3"].machine.own.node
    found.kill("m3")
    found.add("m3", contacts=("m0",))
    found.until(found.agreed, limit_s=LIMIT_S)
    known = found.hosts["m7"].machine.member(old)
    assert known
    assert known.state is State.DEAD


def test_are_two_nodes_with_one_id_told() -> None:
    found = flock(4)
    found.add("twin", node=found.hosts["m2"].machine.own.node, contacts=("m0",))
    found.until(lambda: bool(found.conflicts), limit_s=LIMIT_S)


@pytest.mark.parametrize("skew_s", [0.0, 3600.0, -3600.0])
def test_does_a_clock_that_jumps_hurt_no_member(skew_s: float) -> None:
    found = flock(12)
    found.seen.clear()
    found.wake("m4", skew_s=skew_s)
    found.run(60.0)
    assert not seen(found, State.SUSPECT, State.DEAD)
    assert found.agreed()


def test_is_a_laptop_that_slept_welcome_back_without_blaming_anybody() -> None:
    found = flock(12)
    found.kill("m4")
    found.run(300.0)
    assert found.knows("m0") == 10
    found.wake("m4")
    found.until(found.agreed, limit_s=LIMIT_S)
    found.run(60.0)
    assert "m4" not in {by for by, _ in seen(found, State.SUSPECT, State.DEAD)}
    assert found.agreed()


def test_does_everyone_hear_how_far_a_fetch_has_come() -> None:
    found = flock(16)
    for chunks in range(81):
        found.tell("m5", profile(chunks))
        found.run(0.2)
    node = found.hosts["m5"].machine.own.node

    def told() -> bool:
        views = [host.machine.member(node) for host in found.hosts.values() if host.address != "m5"]
        return all(view and view.profile == profile(80) for view in views)

    found.until(told, limit_s=LIMIT_S)


def test_does_a_member_cost_the_same_however_many_there_are() -> None:
    def bytes_per_s(members: int) -> float:
        """Sent by one member while all of them fetch."""
        found = flock(members, checked=False)

        def fetch(steps: int) -> int:
            for step in range(steps):
                for name in found.hosts:
                    found.tell(name, profile(10 * (step % 9)))
                found.run(2.0)
            return sum(host.sent_bytes for host in found.hosts.values())

        before, began = fetch(4), found.now
        return (fetch(5) - before) / (found.now - began) / members

    assert bytes_per_s(64) < 2 * bytes_per_s(16)


def test_is_a_run_a_function_of_its_seed() -> None:
    def trace(seed: int) -> list[object]:
        found = flock(8, seed=seed, loss=0.2)
        found.kill("m2")
        found.run(30.0)
        return [*found.seen, *(host.sent_bytes for host in found.hosts.values())]

    assert trace(5) == trace(5)
    assert trace(5) != trace(6)
