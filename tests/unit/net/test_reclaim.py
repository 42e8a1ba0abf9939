"""When is memory given back to the system, and is it?"""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from swarm.net import reclaim
from swarm.net.reclaim import Reclaimer

DEADLINE_S = 10.0


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """The calls of `reclaim`, soon after each other."""
    made: list[None] = []
    monkeypatch.setattr(reclaim, "REST_S", 0.01)
    monkeypatch.setattr(reclaim, "reclaim", lambda: made.append(None))
    return made


def test_is_memory_given_back_after_many_connections_and_once_more(calls: list[None]) -> None:
    async def scenario() -> None:
        reclaimer = Reclaimer()
        for _ in range(reclaim.CLOSED_LEAST):
            reclaimer.count()
        while len(calls) < 2 or reclaimer._timer:  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0)
        assert len(calls) == 2

    run(scenario)


def test_is_nothing_done_after_a_few(calls: list[None]) -> None:
    async def scenario() -> None:
        reclaimer = Reclaimer()
        for _ in range(3):
            reclaimer.count()
            while reclaimer._timer:  # noqa: ASYNC110 - what it waits for has no event
                await asyncio.sleep(0)
        assert not calls
        reclaimer.count()
        reclaimer.close()

    run(scenario)


def test_are_circles_collected() -> None:
    class Circle:
        def __init__(self) -> None:
            self.me = self

    gc.disable()
    try:
        gone = weakref.ref(Circle())
        assert gone() is not None
        reclaim.reclaim()
        assert gone() is None
    finally:
        gc.enable()
