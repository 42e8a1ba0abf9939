"""Files of a seed that changed are served again once they are complete and quiet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from sim.content import BytesStore, Content

from swarm.cli.reopen import GIVE_UP_S, QUIET_S, reopened
from swarm.errors import ManifestInvalid, SourceChanged, SwarmError
from swarm.store import IsRight

CONTENT = Content.random(0, chunks=4, chunk_bytes=64)


class Files(BytesStore):
    """A source whose files change again, or not."""

    def __init__(self, error: SwarmError | None = None) -> None:
        super().__init__(CONTENT.manifest, CONTENT.files)
        self.closed = False
        self._error = error

    def demand_unchanged(self, _: IsRight) -> None:
        if self._error:
            raise self._error

    def close(self) -> None:
        self.closed = True


class Clock:
    """Time that passes by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def run(open_: Callable[[], Files]) -> tuple[Files, float]:
    clock = Clock()
    _, source, _ = asyncio.run(reopened(lambda: ("org/model", open_(), None), clock=clock, sleep=clock.sleep))
    assert isinstance(source, Files)
    return source, clock.now


def test_a_source_counts_only_if_it_stays_unchanged() -> None:
    tries = iter([Files(SourceChanged("a", "it was written to")), Files(SourceChanged("a", "it is gone")), Files()])
    opened: list[Files] = []

    def open_() -> Files:
        opened.append(next(tries))
        return opened[-1]

    source, seconds = run(open_)
    assert source is opened[2]
    assert [files.closed for files in opened] == [True, True, False]
    assert seconds == 6 * QUIET_S


def test_errors_that_change_are_waited_out() -> None:
    errors = iter([ManifestInvalid("a", f"has {number} bytes") for number in range(int(2 * GIVE_UP_S))])

    def open_() -> Files:
        if error := next(errors, None):
            raise error
        return Files()

    source, seconds = run(open_)
    assert not source.closed
    assert seconds > GIVE_UP_S


def test_an_error_that_stays_is_final() -> None:
    def open_() -> Files:
        raise ManifestInvalid("m", "holds no file to serve")

    with pytest.raises(ManifestInvalid, match="holds no file"):
        run(open_)
