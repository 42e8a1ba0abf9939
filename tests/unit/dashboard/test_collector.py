"""Asking members what they tell of themselves: so many questions, with deadlines, and what is no answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from swarm.content.manifest import Digest, ModelId
from swarm.dashboard.collector import ASK_PER_S, LOOK_EVERY_S, Collector
from swarm.dashboard.member_report import PATH, REPORT_BYTES_MAX, FetchSummary, MemberReport
from swarm.errors import PeerUnreachable, RemoteProtocolError
from swarm.protocol.messages import Address, NodeId
from swarm.protocol.packets import Profile, Record, State


def member(number: int) -> Record:
    return Record(
        NodeId(f"{number:016x}"), 1, State.ALIVE, 1, f"m{number}", (Address(f"127.0.0.1:{number}"),), Profile()
    )


def answer(number: int, *, running: bool = False) -> bytes:
    fetch = FetchSummary(ModelId("m"), Digest("d" * 64), 9, 1, 1, 1, None, 1.0, 1, running, None)
    return msgspec.json.encode(MemberReport(NodeId(f"{number:016x}"), "", "", (), (), (fetch,), (), ()))


class Swarm:
    """`count` members; `said` overrides what one of them says or raises. Time moves by hand."""

    def __init__(self, count: int) -> None:
        self.members = [member(number) for number in range(1, count + 1)]
        self.said: dict[int, bytes | Exception] = {}
        self.asked: list[int] = []
        self.now = 100.0
        self.collector = Collector(self.read, lambda: self.members, lambda: self.now)

    async def read(self, address: str, path: str, timeout_s: float, bytes_max: int) -> bytes:
        assert (path, bytes_max) == (PATH, REPORT_BYTES_MAX)
        number = int(address.rpartition(":")[2])
        self.asked.append(number)
        said = self.said.get(number, answer(number))
        if isinstance(said, Exception):
            raise said
        return said


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(10):
            await scenario()

    asyncio.run(within_deadline())


async def rounds(swarm: Swarm, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many looks of a collector that runs, LOOK_EVERY_S of its time apart."""
    left = [count]
    over = asyncio.Event()
    sleep = asyncio.sleep

    async def pause(_: float) -> None:
        for _ in range(3):
            await sleep(0)  # for those who were asked
        swarm.now += LOOK_EVERY_S
        left[0] -= 1
        if not left[0]:
            over.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(asyncio, "sleep", pause)
    task = asyncio.create_task(swarm.collector.run())
    await over.wait()
    swarm_answers = dict(swarm.collector.answers)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert swarm.collector.answers == {}  # nobody watches: nothing is kept
    swarm.collector.answers.update(swarm_answers)


def test_are_few_members_asked_once_a_second_each(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        swarm = Swarm(3)
        await rounds(swarm, 8, monkeypatch)
        assert sorted(swarm.asked) == [1, 1, 2, 2, 3, 3]
        assert all(answer.report for answer in swarm.collector.answers.values())

    run(scenario)


def test_is_who_lost_its_link_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        swarm = Swarm(3)
        await swarm.collector.ask_all(10)
        swarm.said[2] = PeerUnreachable("m2", "connection refused")
        swarm.collector.ask_next(member(2).node)
        swarm.collector.ask_next(member(9).node)  # nobody it knows
        await swarm.collector.ask_all(10)
        assert swarm.asked == [1, 2, 3, 2]
        assert swarm.collector.answers[member(2).node].silent

    run(scenario)


def test_are_many_members_asked_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        swarm = Swarm(200)
        seconds = 200 // ASK_PER_S + 1
        await rounds(swarm, round(seconds / LOOK_EVERY_S), monkeypatch)
        assert len(swarm.asked) <= ASK_PER_S * seconds
        assert set(swarm.asked) == set(range(1, 201))

    run(scenario)


def test_is_whoever_fetches_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        swarm = Swarm(100)
        swarm.said[77] = answer(77, running=True)
        await rounds(swarm, 40, monkeypatch)
        assert swarm.asked.count(77) > 2 * swarm.asked.count(1)

    run(scenario)


@pytest.mark.parametrize(
    ("said", "silent"),
    [
        (PeerUnreachable("m1", "connection refused"), True),
        (RemoteProtocolError("m1", "answers 403 Forbidden"), False),
        (b"{}", False),
        (answer(2), False),  # another node's
    ],
    ids=["nobody", "refused", "garbage", "somebody else"],
)
def test_what_is_no_answer(said: bytes | Exception, silent: bool) -> None:
    async def scenario() -> None:
        swarm = Swarm(1)
        swarm.said[1] = said
        await swarm.collector.ask_all(10)
        given = swarm.collector.answers[member(1).node]
        assert given.report is None
        assert given.failure
        assert given.silent is silent

    run(scenario)
