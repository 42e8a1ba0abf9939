"""Server-sent events for browsers: a snapshot of the view, then patches.

    event: snapshot        data: the view
    event: patch           data: a JSON merge patch (RFC 7396) to the view before

Without a browser no view is computed. A browser that is `QUEUE_MAX` patches behind gets a snapshot instead of its
queue, which bounds the memory it takes.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeAlias

from swarm.dashboard.swarm_view import Json, patch

UPDATE_EVERY_S = 0.5  # a person cannot read numbers that change faster
QUEUE_MAX = 8  # patches that a browser may be behind
ALIVE_EVERY_S = 5.0  # without patches, a comment keeps the connection open

Background: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


class _Watcher:
    def __init__(self) -> None:
        self.queue: deque[bytes] = deque()
        self.behind = True  # needs a snapshot
        self.changed = asyncio.Event()


class EventStream:
    """`view` makes the present view; `background` runs while a browser is connected."""

    def __init__(self, view: Callable[[], Json], background: Background) -> None:
        self._view = view
        self._background = background
        self._shown: Json = {}
        self._snapshot: bytes | None = None  # `_shown` as an event, made for the first browser that needs it
        self._watchers: set[_Watcher] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def watch(self) -> AsyncGenerator[bytes]:
        """Events for one browser, until the generator is closed."""
        watcher = _Watcher()
        self._watchers.add(watcher)
        if not self._tasks:
            self._shown, self._snapshot = self._view(), None
            self._tasks = [
                asyncio.create_task(self._update(), name="swarm: update watchers"),
                asyncio.create_task(self._background(), name="swarm: ask members"),
            ]
        try:
            while True:
                yield self._next(watcher)
                watcher.changed.clear()
                if watcher.behind or watcher.queue:
                    continue
                try:
                    async with asyncio.timeout(ALIVE_EVERY_S):
                        await watcher.changed.wait()
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
            self._snapshot = None
            changed = event("patch", changes)
            for watcher in self._watchers:
                if len(watcher.queue) >= QUEUE_MAX:
                    watcher.queue.clear()
                    watcher.behind = True
                elif not watcher.behind:
                    watcher.queue.append(changed)
                watcher.changed.set()

    def _next(self, watcher: _Watcher) -> bytes:
        if watcher.behind:
            watcher.behind = False
            self._snapshot = self._snapshot or event("snapshot", self._shown)
            return self._snapshot
        if watcher.queue:
            events = b"".join(watcher.queue)
            watcher.queue.clear()
            return events
        return b": alive\n\n"

    def __repr__(self) -> str:
        return f"<EventStream {len(self._watchers)} watch>"


def event(name: str, data: Json) -> bytes:
    """A server-sent event as bytes."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'), ensure_ascii=False)}\n\n".encode()
