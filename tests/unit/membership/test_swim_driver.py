"""The driver of gossip: is the machine fed, are its words sent, and does the one timer go on?"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from sim import clock
from sim.network import Fabric

from swarm.content.manifest import Digest, ModelId
from swarm.membership import config, swim_driver
from swarm.membership.swim_driver import SwimDriver
from swarm.protocol import packets
from swarm.protocol.messages import Address, NodeId
from swarm.protocol.packets import Gossip, Holding, Profile, Record, State, Sync

ONE, THREE, TWO = Address("one"), Address("three"), Address("two")

T = config.lan()
PROFILE = Profile(
    (Holding(ModelId("org/model"), Digest("ab" * 32), "checkpoint", 4, 4, True),), 0, ("tcp",), "h", "r", 0, 8
)


def play(main: Coroutine[Any, Any, None], *, limit_s: float = 600.0) -> None:
    clock.run(main, limit_s=limit_s)


class Members:
    """Gatherings on a simulated network, without nodes."""

    def __init__(self) -> None:
        self.fabric = Fabric(slice_bytes=100)
        self.changed: list[tuple[str, str, State]] = []
        self.skew_s: dict[str, float] = {}
        self._happened = asyncio.Event()

    async def add(
        self, name: str, *contacts: str, profile: Profile | None = None, node: str | None = None
    ) -> SwimDriver:
        environment = self.fabric.add(name, up_bytes_per_s=1e6, down_bytes_per_s=1e6, delay_s=0.001, known=())
        self.skew_s[name] = 0.0
        loop = asyncio.get_running_loop()

        def changed(record: Record) -> None:
            self.changed.append((name, record.name, record.state))
            self._happened.set()

        dice = random.Random(name)
        one = SwimDriver(
            environment, config=T, rng=dice, clock=lambda: loop.time() + self.skew_s[name], changed=changed
        )
        for contact in contacts:
            one.found(Address(contact))
        await environment.open(NodeId("0" * 16), self._accept, lambda address, lasting: None, one.receive)
        one.open(NodeId(node or f"{dice.getrandbits(64):016x}"), (Address(name),), name, profile or Profile())
        return one

    async def _accept(self, link: object) -> None:
        """Nobody dials."""

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._happened.clear()
            await self._happened.wait()


def test_does_a_profile_reach_all_members_through_one_contact() -> None:
    async def main() -> None:
        members = Members()
        one = await members.add("one", profile=PROFILE)
        two, three = await members.add("two", "one"), await members.add("three", "one")
        await members.until(lambda: all(len(g.members()) == 2 for g in (one, two, three)))
        assert {m.name: m.profile for m in three.members()}["one"] == PROFILE
        assert [two.joining, three.joining] == [False, False]
        changed = Profile(PROFILE.artifacts, 0, ("tcp",), "h", "r", 8, 8)
        one.announce(changed)
        one.announce(changed)
        await members.until(lambda: {m.name: m.profile for m in three.members()}["one"] == changed)

    play(main())


def test_is_a_death_noticed_and_a_goodbye_believed() -> None:
    async def main() -> None:
        members = Members()
        one = await members.add("one")
        two = await members.add("two", "one")
        await members.add("three", "one")
        await members.until(lambda: len(one.members()) == 2 and len(two.members()) == 2)
        two.close()
        await members.until(lambda: ("one", "two", State.LEFT) in members.changed)
        members.fabric.kill("three", silent=True)
        await members.until(lambda: ("one", "three", State.DEAD) in members.changed)
        assert one.members() == []

    play(main())


@pytest.mark.parametrize("skew_s", [3600.0, -3600.0])
def test_does_a_clock_that_jumps_blame_no_member(skew_s: float) -> None:
    async def main() -> None:
        members = Members()
        all_ = [await members.add(f"m{number}", *(["m0"] if number else [])) for number in range(4)]
        await members.until(lambda: all(len(g.members()) == 3 for g in all_))
        members.changed.clear()
        members.skew_s["m1"] = skew_s
        await asyncio.sleep(60.0)
        assert [change for change in members.changed if change[2] is not State.ALIVE] == []

    play(main())


def test_is_what_is_no_gossip_counted_and_dropped() -> None:
    async def main() -> None:
        members = Members()
        one = await members.add("one")
        for garbage in (b"", b"SWG\x01", b"\x00" * 2000, b"SWG\x02\x93"):
            one.receive(TWO, garbage)
        assert one.unreadable == 4
        assert one.members() == []

    play(main())


def test_does_a_twin_warn(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        members = Members()
        one = await members.add("one", node="a" * 16)
        twin = Record(NodeId("a" * 16), 0, State.ALIVE, 0, "twin", (TWO,), PROFILE)
        for incarnation in range(1, 10):
            record = packets.replace(twin, incarnation=10 * incarnation)
            one.receive(THREE, packets.encode(Gossip(NodeId("b" * 16), (record,))))

    with caplog.at_level(logging.WARNING):
        play(main())
    (warning,) = caplog.messages
    assert "two uses this node's id" in warning


def test_are_datagrams_read_before_time_is_told() -> None:
    """A loop that stalled must not blame others for answers that lie in its socket."""

    async def main() -> None:
        order: list[str] = []

        class Environment:
            def reached(self, claimed: tuple[Address, ...]) -> tuple[Address, ...]:
                return claimed

            def send(self, address: str, datagram: bytes) -> None:
                order.append(type(packets.decode(datagram)).__name__)

            def drain(self) -> None:
                order.append("drain")

        loop = asyncio.get_running_loop()
        one = SwimDriver(Environment(), config=T, rng=random.Random(1), clock=loop.time, changed=lambda _: None)  # type: ignore[arg-type]
        assert not one.joining
        one.found(TWO)
        assert not one.joining, "nobody was asked yet"
        one.open(NodeId("a" * 16), (ONE,), "one", Profile())
        assert one.joining
        assert order == ["Sync"]
        await asyncio.sleep(3 * T.probe_interval_s)
        assert order[order.index("Sync", 1) - 1] == "drain"
        assert not one.joining, "nobody answers"
        one.close()
        said = len(order)
        await asyncio.sleep(10.0)
        assert len(order) == said

    play(main())


def test_does_a_failure_not_stop_the_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        members = Members()
        one = await members.add("one", "two")
        with monkeypatch.context() as patched:
            patched.setattr(packets, "encode", lambda packet: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                one.found(THREE)
        two = await members.add("two")
        await members.until(lambda: len(one.members()) == 1 and len(two.members()) == 1)

    play(main())


def test_are_contacts_bounded_before_there_is_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swim_driver, "CONTACTS_WAITING_MAX", 2)

    async def main() -> None:
        asked: list[str] = []

        class Environment:
            def reached(self, claimed: tuple[Address, ...]) -> tuple[Address, ...]:
                return claimed

            def send(self, address: str, datagram: bytes) -> None:
                assert isinstance(packets.decode(datagram), Sync)
                asked.append(address)

        loop = asyncio.get_running_loop()
        one = SwimDriver(Environment(), config=T, rng=random.Random(1), clock=loop.time, changed=lambda _: None)  # type: ignore[arg-type]
        for number in range(5):
            one.found(Address(f"m{number}"))
        one.open(NodeId("a" * 16), (ONE,), "one", Profile())
        assert set(asked) <= {"m0", "m1"}
        one.close()

    play(main())
