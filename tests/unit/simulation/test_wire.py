"""The wire of a simulated crowd: shares, delays, windows, trunks, and what ends early."""

from __future__ import annotations

import math

import pytest

from swarm.simulation.wire import SLICES, ChunkFlow, Clock, Domain, Nic, Trunk, Wire

RATE, SIZE, DELAY_S = 100.0, 48, 0.001


class Net:
    """A wire, and when what landed."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.wire = Wire(self.clock, delay_s=DELAY_S)
        self.landed: list[tuple[str, int, float]] = []
        self.ended: dict[str, float] = {}

    def send(self, name: str, source: Nic, target: Nic, chunks: int = 1) -> ChunkFlow:
        flow = ChunkFlow(
            source,
            target,
            [SIZE] * chunks,
            landed=lambda number: self.landed.append((name, number, self.clock.now)),
            ended=lambda: self.ended.update({name: self.clock.now}),
        )
        self.wire.send(flow)
        return flow

    def run(self) -> None:
        assert not self.clock.run(lambda: False, limit_s=1000.0)


@pytest.fixture
def net() -> Net:
    return Net()


def host(*domains: Domain | None, rate: float = RATE) -> Nic:
    return Nic(rate, rate, domains)


def test_do_calls_come_in_order_of_time_and_then_of_asking() -> None:
    clock, called = Clock(), list[str]()
    for when, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (9.0, "never")):
        clock.at(when, called.append, name)
    assert not clock.run(lambda: False, limit_s=5.0)
    assert (called, clock.now) == (["a", "b", "c"], 2.0)


def test_does_a_clock_stop_when_it_is_so() -> None:
    clock, called = Clock(), list[str]()
    clock.after(1.0, called.append, "a")
    clock.after(2.0, called.append, "b")
    assert clock.run(lambda: "a" in called, limit_s=5.0)
    assert (called, clock.now) == (["a"], 1.0)


def test_does_one_flow_have_the_whole_rate(net: Net) -> None:
    net.send("a", host(), host(), chunks=10)
    net.run()
    assert [number for _, number, _ in net.landed] == list(range(10))
    assert net.ended["a"] == pytest.approx(10 * SIZE / RATE, rel=0.05)


def test_has_a_flow_of_nothing_ended_at_once(net: Net) -> None:
    net.send("a", host(), host(), chunks=0)
    assert (net.ended, net.landed) == ({"a": 0.0}, [])


@pytest.mark.parametrize("common", ["source", "target"])
def test_do_flows_share_an_end_fairly(common: str, net: Net) -> None:
    shared = host()
    for name in "abcd":
        source, target = (shared, host()) if common == "source" else (host(), shared)
        net.send(name, source, target, chunks=5)
    net.run()
    assert min(net.ended.values()) >= 0.9 * max(net.ended.values())
    assert max(net.ended.values()) == pytest.approx(20 * SIZE / RATE, rel=0.05)


def test_does_a_busy_receiver_hold_up_no_other(net: Net) -> None:
    source, slow = host(), host(rate=RATE / 100)
    net.send("slow", source, slow, chunks=5)
    net.send("fast", source, host(), chunks=5)
    net.run()
    assert net.ended["fast"] <= 1.6 * 5 * SIZE / RATE
    assert net.ended["slow"] == pytest.approx(100 * 5 * SIZE / RATE, rel=0.05)


def test_does_nothing_land_of_a_flow_that_is_cancelled(net: Net) -> None:
    source = host()
    flow = net.send("a", source, host(), chunks=4)
    net.send("b", source, host(), chunks=4)
    net.clock.after(1.5 * SIZE / RATE, net.wire.cancel, flow)
    net.run()
    assert "a" not in net.ended
    assert net.ended["b"] == pytest.approx(4.75 * SIZE / RATE, rel=0.1)  # the rest of the link is its own


@pytest.mark.parametrize("dies", ["source", "target"])
def test_does_nothing_land_from_or_at_a_host_that_is_dead(dies: str, net: Net) -> None:
    ends = {"source": host(), "target": host()}
    net.send("a", ends["source"], ends["target"], chunks=4)
    net.clock.after(1.5 * SIZE / RATE, net.wire.kill, ends[dies])
    net.run()
    assert net.ended == {}
    assert [number for _, number, _ in net.landed] == [0]
    assert ends["source"].sent_bytes < 4 * SIZE


def test_do_members_of_a_machine_share_its_way_in_but_not_their_own_way(net: Net) -> None:
    machine = Domain(Trunk(RATE), Trunk(RATE))
    one, other = (host(machine, rate=10 * RATE) for _ in range(2))
    for name, target in (("one", one), ("other", other)):
        net.send(name, host(None, rate=10 * RATE), target, chunks=4)
    net.run()
    assert max(net.ended.values()) == pytest.approx(8 * SIZE / RATE, rel=0.1)
    assert (machine.into.sent_bytes, machine.out.sent_bytes) == (8 * SIZE, 0.0)
    began = net.clock.now
    net.send("within", one, other, chunks=4)
    net.run()
    assert net.ended["within"] - began == pytest.approx(4 * SIZE / (10 * RATE), rel=0.2)
    assert machine.into.sent_bytes == 8 * SIZE


def test_does_a_rack_count_what_leaves_it_once(net: Net) -> None:
    here, there = (Domain(Trunk(RATE), Trunk(RATE)) for _ in range(2))
    net.send("out", host(None, here), host(None, there), chunks=3)
    net.send("within", host(None, here), host(None, here), chunks=3)
    net.run()
    assert (here.out.sent_bytes, there.into.sent_bytes, here.into.sent_bytes) == (3 * SIZE, 3 * SIZE, 0.0)


def test_has_a_flow_a_window_that_covers_the_delay(net: Net) -> None:
    slice_s = SIZE / SLICES / RATE
    net.wire.delay_s = 10 * slice_s
    flow = net.send("a", host(), host(), chunks=20)
    assert flow.window >= 20
    net.run()
    assert net.ended["a"] == pytest.approx(20 * SIZE / RATE + net.wire.delay_s, rel=0.05)
    assert math.isfinite(net.ended["a"])
