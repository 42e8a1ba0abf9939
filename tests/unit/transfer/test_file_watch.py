"""The watch over served files: which failures of a source lose its share, and does any of them end the watch?"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from swarm.content.manifest import Digest
from swarm.errors import SourceChanged, StoreError
from swarm.transfer import file_watch

DIGEST = Digest("d" * 64)
BAD = OSError(errno.EBADF, "Bad file descriptor")


class Watched:
    """A source that fails as a test says. `meanwhile` happens while a thread looks at it."""

    manifest: Any = None

    def __init__(self, failure: Exception, meanwhile: Callable[[], object] = lambda: None) -> None:
        self._failure = failure
        self._meanwhile = meanwhile
        self.looks = 0

    def demand_unchanged(self, _: object) -> None:
        self.looks += 1
        self._meanwhile()
        raise self._failure

    def spans(self, _: object) -> Any:
        return iter(())

    read = spans

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("failure", "meanwhile", "lost"),
    [
        (SourceChanged("a.bin", "it was written to"), "nothing", "it was written to"),
        (BAD, "nothing", "Bad file descriptor"),
        (BAD, "withdrawn", None),
        (StoreError("it is not served any more"), "withdrawn", None),
        (StoreError("it is not served any more"), "replaced", None),
    ],
)
def test_what_is_lost_and_the_watch_goes_on(
    failure: Exception, meanwhile: str, lost: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_watch, "WATCH_EVERY_S", 0.0)
    share: Any = SimpleNamespace(settled=asyncio.Event(), source=None, known=lambda _: None)
    share.settled.set()
    said: list[StoreError] = []
    shares: Any = SimpleNamespace(shares={DIGEST: share}, lose=lambda _, failure: said.append(failure))

    def happens() -> None:
        if meanwhile == "withdrawn":
            shares.shares = {}
        elif meanwhile == "replaced":
            share.source = object()

    share.source = source = Watched(failure, happens)

    async def scenario() -> None:
        async with asyncio.timeout(10):
            watch = asyncio.create_task(file_watch.watch_files(shares))
            while not source.looks or (lost and not said):  # noqa: ASYNC110 - a thread ends it
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not watch.done(), "it goes on"
            watch.cancel()

    asyncio.run(scenario())
    assert bool(said) == bool(lost)
    assert not lost or lost in str(said[0])
