"""Server-sent events for whoever watches: the view whole at first, then what changed.

    event: snapshot        data: the view
    event: patch           data: a JSON merge patch (RFC 7396) to the view before

While nobody watches nothing is computed. A browser that does not keep up has its queue thrown away and gets the view
whole again, so that it costs no more memory than any other.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeAlias

from swarm.dashboard.swarm_view import Json, patch

UPDATE_EVERY_S = 0.5  # twice a second is as fast as numbers can be read
QUEUE_MAX = 8  # patches that a browser may be behind
ALIVE_EVERY_S = 5.0  # with nothing to say, a comment shows both ends that the other is there

Background: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


class _Watcher:
    def __init__(self) -> None:
        self.queue: deque[bytes] = deque()
        self.behind = True  # it needs the view whole
        self.news = asyncio.Event()


class EventStream:
    """`view` makes the view of this moment; `background` runs while somebody watches."""

    def __init__(self, view: Callable[[], Json], background: Background) -> None:
        self._view = view
        self._background = background
        self._shown: Json = {}
        self._whole: bytes | None = None  # `_shown` as an event, once somebody has asked for it
        self._watchers: set[_Watcher] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def watch(self) -> AsyncGenerator[bytes]:
        """Events for one browser, until it is closed."""
        watcher = _Watcher()
        self._watchers.add(watcher)
        if not self._tasks:
            self._shown, self._whole = self._view(), None
            self._tasks = [
                asyncio.create_task(self._update(), name="swarm: update watchers"),
                asyncio.create_task(self._background(), name="swarm: ask members"),
            ]
        try:
            while True:
                yield self._next(watcher)
                watcher.news.clear()
                if watcher.behind or watcher.queue:
                    continue
                try:
                    async with asyncio.timeout(ALIVE_EVERY_S):
                        await watcher.news.wait()
                except TimeoutError:
                    continue
        finally:
            self._watchers.discard(watcher)
            if not self._watchers:
                for task in self._tasks:
                    task.cancel()
                self._tasks = []

    async def _update(self) -> None:
        while True:
            await asyncio.sleep(UPDATE_EVERY_S)
            view = self._view()
            changes = patch(self._shown, view)
            self._shown = view
            if not changes:
                continue
            self._whole = None
            news = event("patch", changes)
            for watcher in self._watchers:
                if len(watcher.queue) >= QUEUE_MAX:
                    watcher.queue.clear()
                    watcher.behind = True
                elif not watcher.behind:
                    watcher.queue.append(news)
                watcher.news.set()

    def _next(self, watcher: _Watcher) -> bytes:
        """What a watcher gets now."""
        if watcher.behind:
            watcher.behind = False
            self._whole = self._whole or event("snapshot", self._shown)
            return self._whole
        if watcher.queue:
            events = b"".join(watcher.queue)
            watcher.queue.clear()
            return events
        return b": alive\n\n"

    def __repr__(self) -> str:
        return f"<EventStream {len(self._watchers)} watch>"


def event(name: str, data: Json) -> bytes:
    """One of them, as it goes out."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'), ensure_ascii=False)}\n\n".encode()
