"""Server-sent events: a snapshot, patches, and browsers that do not keep up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sim import clock

from swarm.dashboard import sse
from swarm.dashboard.sse import EventStream


class Source:
    """A view that counts how often it was made, and whether its background runs."""

    def __init__(self) -> None:
        self.value = 0
        self.made = 0
        self.asking = False

    def view(self) -> dict[str, Any]:
        self.made += 1
        self.value += 1
        return {"value": self.value}

    async def background(self) -> None:
        self.asking = True
        try:
            await asyncio.Event().wait()
        finally:
            self.asking = False


def run(scenario: Callable[[EventStream, Source], Awaitable[None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "UPDATE_EVERY_S", 0.001)
    source = Source()

    async def in_virtual_time() -> None:
        await scenario(EventStream(source.view, source.background), source)

    clock.run(in_virtual_time(), limit_s=10)


def parsed(events: bytes) -> list[tuple[str, Any]]:
    found = []
    for event in events.decode().removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_comes_the_view_whole_and_then_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(feed_: EventStream, source: Source) -> None:
        events = feed_.watch()
        assert parsed(await anext(events)) == [("snapshot", {"value": 1})]
        assert parsed(await anext(events))[0] == ("patch", {"value": 2})
        await events.aclose()

    run(scenario, monkeypatch)


def test_costs_it_nothing_while_no_browser_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(feed_: EventStream, source: Source) -> None:
        assert source.made == 0
        events = feed_.watch()
        await anext(events)
        await anext(events)
        assert source.asking
        await events.aclose()
        await asyncio.sleep(0)
        made = source.made
        await asyncio.sleep(0.02)
        assert source.made == made
        assert not source.asking

    run(scenario, monkeypatch)


def test_gets_a_slow_browser_the_view_whole_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(feed_: EventStream, source: Source) -> None:
        slow, quick = feed_.watch(), feed_.watch()
        await anext(slow)
        await anext(quick)
        seen = 0
        while seen < 2 * sse.QUEUE_MAX:
            seen += len(parsed(await anext(quick)))
        ((name, whole),) = parsed(await anext(slow))
        assert name == "snapshot"
        assert whole["value"] > sse.QUEUE_MAX
        await slow.aclose()
        await quick.aclose()

    run(scenario, monkeypatch)
