"""Is the simulation itself right: its clock, its network, and what it makes of a failure?"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Coroutine
from typing import Any

import pytest

from swarm.errors import LocalProtocolError, PeerTimeout, PeerUnreachable
from swarm.net.link import Link
from swarm.protocol.messages import Address, Cancel, NodeId
from swarm.transfer.download import Download

from . import clock, cluster, network
from .cluster import Cluster, Setup
from .content import BytesStore, Content, Liar
from .network import Fabric, MemoryLink, SimulatedEnvironment


def play(main: Coroutine[Any, Any, None], *, limit_s: float = 100.0) -> None:
    clock.run(main, limit_s=limit_s)


# The clock


def test_a_long_sleep_takes_virtual_time_only() -> None:
    async def main() -> float:
        await asyncio.sleep(86_400 * 365)
        return asyncio.get_running_loop().time()

    assert clock.run(main(), limit_s=1e9) == pytest.approx(86_400 * 365)


def test_timers_fire_in_order_of_their_times() -> None:
    order = []

    async def wait(seconds: float) -> None:
        await asyncio.sleep(seconds)
        order.append((seconds, asyncio.get_running_loop().time()))

    async def main() -> None:
        await asyncio.gather(wait(3.0), wait(1.0), wait(2.0))

    play(main())
    assert order == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]


def test_work_for_threads_runs_inline_and_its_errors_come_out() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(None, lambda: 1 // 0)
        assert loop.time() == 0.0

    play(main())


def test_a_deadlock_names_who_waits() -> None:
    async def main() -> None:
        await asyncio.create_task(asyncio.Event().wait(), name="the one that waits")

    with pytest.raises(clock.Stuck, match=r"deadlock.*the one that waits in wait") as caught:
        play(main())
    assert caught.value.at_s == 0.0


def test_a_run_ends_at_its_limit() -> None:
    async def main() -> None:
        await asyncio.sleep(10.5)

    with pytest.raises(clock.Stuck, match="not over within 10 virtual seconds"):
        play(main(), limit_s=10.0)


def test_callbacks_that_go_round_without_time_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        for _ in range(1000):
            await asyncio.sleep(0)

    monkeypatch.setattr(clock, "ROUNDS_MAX", 100)
    with pytest.raises(clock.Stuck, match="100 rounds of the loop without time passing"):
        play(main())


# The network


class Net:
    """Hosts of 1000 bytes/s, 0.1 s apart, with one open world each."""

    def __init__(self, *names: str) -> None:
        self.fabric = Fabric(slice_bytes=100)
        self.names = names
        self.worlds: dict[str, SimulatedEnvironment] = {}
        self.incoming: list[Link] = []
        self.heard: list[tuple[str, bytes]] = []

    async def __aenter__(self) -> Net:
        for name in self.names:
            environment = self.fabric.add(name, up_bytes_per_s=1000.0, down_bytes_per_s=1000.0, delay_s=0.05, known=())
            self.worlds[name] = environment
            await environment.open(NodeId(name), self._accept, lambda address, lasting: None, self._heard)
        return self

    async def __aexit__(self, *_: object) -> None:
        for environment in self.worlds.values():
            await environment.close()

    async def _accept(self, link: Link) -> None:
        self.incoming.append(link)

    def _heard(self, source: str, datagram: bytes) -> None:
        self.heard.append((source, datagram))

    async def link(self, one: str, other: str) -> tuple[Link, Link]:
        near = await self.worlds[one].dial([Address(other)])
        await asyncio.sleep(0.01)
        return near, self.incoming.pop()

    async def send(self, one: str, other: str, *, slices: int) -> float:
        """When the last of these slices arrives."""
        source, target = (self.worlds[name].transports[0].address for name in (one, other))
        for _ in range(slices):
            await self.fabric.line(source, target, 100)
        return asyncio.get_running_loop().time()


def test_a_stream_pays_the_delay_once() -> None:
    async def main() -> None:
        async with Net("a", "b") as net:
            assert await net.send("a", "b", slices=20) == pytest.approx(20 * 0.1 + 0.1)
            assert net.fabric.hosts["a"].sent_bytes == net.fabric.hosts["b"].received_bytes == 2000

    play(main())


def test_two_streams_share_an_uplink_by_turns() -> None:
    async def main() -> None:
        async with Net("a", "b", "c") as net:
            ends = await asyncio.gather(net.send("a", "b", slices=10), net.send("a", "c", slices=10))
            assert list(ends) == pytest.approx([1.9 + 0.1, 2.0 + 0.1])

    play(main())


def test_two_streams_share_a_downlink_by_turns() -> None:
    async def main() -> None:
        async with Net("a", "b", "c") as net:
            ends = await asyncio.gather(net.send("a", "c", slices=10), net.send("b", "c", slices=10))
            assert max(ends) == pytest.approx(2.0 + 0.1)

    play(main())


def test_a_link_keeps_the_order_of_messages_and_counts_their_bytes() -> None:
    async def main() -> None:
        async with Net("a", "b") as net:
            near, far = await net.link("a", "b")
            began = asyncio.get_running_loop().time()
            for number in range(3):
                await near.send(Cancel(number))
            heard = [await far.receive() for _ in range(3)]
            assert heard == [Cancel(0), Cancel(1), Cancel(2)]
            assert asyncio.get_running_loop().time() - began == pytest.approx(0.1)
            assert net.fabric.hosts["a"].control_bytes == 3 * len(b'{"type":"Cancel","transfer":0}')

    play(main())


def test_a_datagram_takes_the_way_or_is_lost() -> None:
    async def main() -> None:
        async with Net("a", "b") as net:
            net.worlds["a"].send("b", b"hello")
            net.worlds["a"].send("nobody", b"hello")
            await asyncio.sleep(0.09)
            assert net.heard == []
            await asyncio.sleep(0.02)
            assert net.heard == [("a", b"hello")]
            net.fabric.partition(["a"])
            net.worlds["a"].send("b", b"into the void")
            await asyncio.sleep(0.2)
            net.fabric.heal()
            net.fabric.hosts["b"].datagrams_pass = False
            net.worlds["a"].send("b", b"against a wall")
            await asyncio.sleep(0.2)
            net.fabric.hosts["b"].datagrams_pass = True
            net.fabric.loss = 1.0
            net.worlds["a"].send("b", b"lost")
            await asyncio.sleep(0.2)
            assert len(net.heard) == 1

    play(main())


def test_what_the_wire_cannot_say_does_not_get_through() -> None:
    async def main() -> None:
        async with Net("a", "b") as net:
            near, far = await net.link("a", "b")
            await near.send(Cancel(-1))
            with pytest.raises(Exception, match="invalid message"):
                await far.receive()

    play(main())


def test_the_last_words_arrive_before_the_end() -> None:
    async def main() -> None:
        async with Net("a", "b") as net:
            near, far = await net.link("a", "b")
            await near.send(Cancel(1))
            await near.close()
            assert await far.receive() == Cancel(1)
            with pytest.raises(PeerUnreachable, match="closed the link"):
                await far.receive()
            with pytest.raises(PeerUnreachable):
                await near.send(Cancel(2))

    play(main())


def test_a_short_partition_delays_messages_and_breaks_nothing() -> None:
    async def main() -> None:
        async with Net("a", "b") as net:
            near, far = await net.link("a", "b")
            net.fabric.partition(["a"])
            await near.send(Cancel(1))
            await asyncio.sleep(network.HEARTBEAT_MISSED_S / 2)
            net.fabric.heal()
            assert await far.receive() == Cancel(1)
            await asyncio.sleep(network.HEARTBEAT_MISSED_S)
            await far.send(Cancel(2))
            assert await near.receive() == Cancel(2)

    play(main())


def test_a_long_partition_breaks_links_by_their_heartbeat() -> None:
    async def main() -> None:
        async with Net("a", "b") as net:
            near, _ = await net.link("a", "b")
            net.fabric.partition(["a"])
            began = asyncio.get_running_loop().time()
            with pytest.raises(PeerUnreachable, match="answered no ping"):
                await near.receive()
            assert asyncio.get_running_loop().time() - began == pytest.approx(network.HEARTBEAT_MISSED_S)

    play(main())


@pytest.mark.parametrize(("silent", "error"), [(False, PeerUnreachable), (True, PeerTimeout)])
def test_a_dead_host_refuses_and_a_silent_one_does_not_answer(silent: bool, error: type[Exception]) -> None:
    async def main() -> None:
        async with Net("a", "b") as net:
            near, _ = await net.link("a", "b")
            net.fabric.kill("b", silent=silent)
            with pytest.raises(error):
                await net.worlds["a"].dial([Address("b")])
            assert isinstance(near, MemoryLink)
            if not silent:
                with pytest.raises(PeerUnreachable, match="reset"):
                    await near.receive()

    play(main())


def test_a_liar_changes_every_third_chunk_and_nothing_in_its_store() -> None:
    content = Content.random(1, chunks=6, chunk_bytes=64)
    store = BytesStore(content.manifest, content.files)
    liar, truth = Liar(store, every=3), BytesStore(content.manifest, content.files)
    wrong = [
        c.index for c in content.manifest.chunks if [*map(_bytes, liar.spans(c))] != [*map(_bytes, truth.spans(c))]
    ]
    assert wrong == [0, 3]
    assert store.files == truth.files


def _bytes(span: object) -> bytes:
    assert isinstance(span, memoryview)
    return bytes(span)


# The cluster


def test_two_runs_of_one_seed_are_one_trace_and_another_seed_is_another() -> None:
    first, again, other = (Cluster(Setup(seed=seed, newcomers=3, chunks=16)).run() for seed in (5, 5, 6))
    assert first.trace_hash == again.trace_hash
    assert str(first) == str(again)
    assert first.trace_hash != other.trace_hash


def test_the_command_of_a_run_replays_it(capsys: pytest.CaptureFixture[str]) -> None:
    setup = Setup(seed=11, newcomers=2, chunks=8, known="all", scenario="newcomer_is_late")
    report = Cluster(setup).run()
    prefix, command = "python -m tests.sim.cluster ", report.command
    assert command.startswith(prefix)
    assert cluster.main(shlex.split(command.removeprefix(prefix))) == 0
    assert capsys.readouterr().out == f"{report}\n"


def test_a_broken_invariant_fails_the_run_and_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Download) -> None:
        raise LocalProtocolError("the invariant of the day")

    monkeypatch.setattr(Download, "check", broken)
    with pytest.raises(LocalProtocolError, match="the invariant of the day") as caught:
        Cluster(Setup(seed=3, newcomers=1, chunks=4)).run()
    assert caught.value.__notes__ == ["replay: python -m tests.sim.cluster --seed 3 --newcomers 1 --chunks 4"]


def test_a_task_that_fails_unseen_fails_the_run() -> None:
    async def scenario(running: Cluster) -> None:
        async def fail() -> None:
            raise RuntimeError("nobody looks at me")

        running.members["seed-0"].node.spawn(fail(), "bad task")

    with pytest.raises(LocalProtocolError, match="nobody looks at me"):
        Cluster(Setup(newcomers=1, chunks=4)).run(scenario)


def test_a_condition_that_never_comes_true_is_an_error() -> None:
    async def scenario(running: Cluster) -> None:
        await running.until(lambda: False, timeout_s=1.0)

    with pytest.raises(TimeoutError):
        Cluster(Setup(newcomers=1, chunks=4)).run(scenario)
