"""The loop's clock leaves out the time in which the process stood still."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from swarm.net import pausing_loop
from swarm.net.pausing_loop import PAUSE_S, PausingLoop

PAUSE = 40.0


class SystemClock:
    """The clocks of the system; `jump` is a pause of the process, `suspend` one that only the boot's clock counts."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.suspended_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def clock_gettime(self, _: int) -> float:
        return self.monotonic() + self.suspended_s

    def jump(self, seconds: float = PAUSE) -> None:
        self.ahead_s += seconds


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> SystemClock:
    clock = SystemClock()
    fake = SimpleNamespace(
        monotonic=clock.monotonic, clock_gettime=clock.clock_gettime, CLOCK_BOOTTIME=time.CLOCK_BOOTTIME
    )
    monkeypatch.setattr(pausing_loop, "time", fake)
    return clock


def run(scenario: Coroutine[Any, Any, None]) -> PausingLoop:
    with asyncio.Runner(loop_factory=PausingLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, PausingLoop)
        runner.run(scenario)
        return loop


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0.001)


def test_a_pause_within_a_callback_does_not_count(system: SystemClock) -> None:
    async def scenario() -> None:
        before = asyncio.get_running_loop().time()
        async with asyncio.timeout(PAUSE / 2):
            await turns()
            system.jump()
            assert asyncio.get_running_loop().time() - before < PAUSE / 2
            await turns()

    assert PAUSE <= run(scenario()).paused_s < PAUSE + PAUSE / 2


def test_a_pause_while_the_loop_waits_does_not_count(system: SystemClock) -> None:
    async def scenario() -> None:
        before = asyncio.get_running_loop().time()
        timer = threading.Timer(0.02, system.jump)
        timer.start()
        async with asyncio.timeout(PAUSE / 2):
            await asyncio.sleep(0.1)
            await turns()
        timer.join()
        assert asyncio.get_running_loop().time() - before < PAUSE / 2

    assert PAUSE / 2 < run(scenario()).paused_s < PAUSE + PAUSE / 2


def test_each_timer_keeps_the_rest_of_its_time(system: SystemClock) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        fired: list[str] = []
        loop.call_later(PAUSE / 2, fired.append, "too early")
        loop.call_later(0.05, fired.append, "in time")
        await turns()
        system.jump()
        async with asyncio.timeout(PAUSE / 4):
            await asyncio.sleep(0.1)
        assert fired == ["in time"]

    run(scenario())


def test_short_steps_count(system: SystemClock) -> None:
    async def scenario() -> None:
        before = asyncio.get_running_loop().time()
        for _ in range(4):
            system.jump(PAUSE_S / 2)
            await asyncio.sleep(0)
        assert asyncio.get_running_loop().time() - before >= 2 * PAUSE_S

    assert run(scenario()).paused_s == pytest.approx(0.0, abs=0.01)


def test_a_wait_that_input_ends_early_counts(system: SystemClock) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        before, input_ = loop.time(), asyncio.Event()

        def end_the_wait() -> None:
            system.jump(3.0)
            loop.call_soon_threadsafe(input_.set)

        thread = threading.Timer(0.02, end_the_wait)
        async with asyncio.timeout(PAUSE):  # the loop asks for so long
            thread.start()
            await input_.wait()
        thread.join()
        assert loop.time() - before >= 3.0

    assert run(scenario()).paused_s == pytest.approx(0.0, abs=0.01)


def test_another_thread_does_not_hide_that_the_loop_stood_still(system: SystemClock) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        await turns()
        before = loop.time()
        for _ in range(4):
            system.jump(PAUSE_S * 0.9)
            reader = threading.Thread(target=loop.time)
            reader.start()
            reader.join()
        assert loop.time() - before < PAUSE_S

    run(scenario())


def test_a_suspended_machine_is_a_pause(system: SystemClock) -> None:
    async def scenario() -> None:
        before = asyncio.get_running_loop().time()
        system.suspended_s += PAUSE
        await turns()
        assert asyncio.get_running_loop().time() - before < PAUSE / 2

    assert run(scenario()).paused_s == pytest.approx(PAUSE, abs=0.5)
