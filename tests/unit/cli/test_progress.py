"""What does somebody who waits for a fetch see?"""

from __future__ import annotations

import asyncio
import io
import logging
import sys
from collections.abc import Callable

import pytest

from swarm.cli import progress as progresses
from swarm.cli.progress import progress
from swarm.content.manifest import Digest, ModelId
from swarm.journal import Entry, FetchStarted, Received
from swarm.observe.fetch_record import FetchRecords
from swarm.observe.units import size_text
from swarm.protocol.messages import NodeId

DEADLINE_S = 20.0
DIGEST = Digest("ab" * 32)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (999, "999 B"), (999.7, "1 kB"), (1000, "1 kB"), (1500, "1.5 kB"), (999_499, "999 kB"),
        (999_600, "1 MB"), (123_456_789, "123 MB"), (999_999_999, "1 GB"), (15.2e9, "15.2 GB"), (2.5e12, "2.5 TB"),
    ],
)  # fmt: skip
def test_how_large_is_that(size: float, text: str) -> None:
    assert size_text(size) == text


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is shown is no event; the scenario's deadline ends this
        await asyncio.sleep(0.001)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def fetches() -> FetchRecords:
    made = FetchRecords()
    made.apply(Entry(0, "node", FetchStarted(ModelId("org/model"), DIGEST, 4_000_000, 1_000_000)))
    return made


def test_are_there_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progresses, "LINE_EVERY_S", 0.001)
    caplog.set_level(logging.INFO, "swarm")

    async def scenario() -> None:
        shown = fetches()
        async with asyncio.timeout(DEADLINE_S), progress(shown, lambda: 1.0, quiet=True):
            await until(lambda: bool(caplog.messages))
            caplog.clear()
            shown.apply(Entry(0, "node", Received(NodeId("n1"), DIGEST, 0, 1_000_000)))
            await until(lambda: bool(caplog.messages))

    asyncio.run(scenario())
    assert caplog.messages[-1] == "org/model: 50 %, 1 MB/s, 2 s left, 1 source"


def test_does_it_say_that_no_source_is_there(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progresses, "LINE_EVERY_S", 0.001)
    caplog.set_level(logging.INFO, "swarm")

    async def scenario() -> None:
        async with asyncio.timeout(DEADLINE_S), progress(fetches(), lambda: 1.0, quiet=True):
            await until(lambda: bool(caplog.messages))

    asyncio.run(scenario())
    assert caplog.messages[0] == "org/model: 25 %, 0 B/s, waiting for sources, 0 sources"


def test_is_there_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progresses, "REDRAW_S", 0.001)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")

    async def scenario() -> None:
        async with asyncio.timeout(DEADLINE_S), progress(fetches(), lambda: 1.0):
            await until(lambda: "waiting for sources" in terminal.getvalue())

    asyncio.run(scenario())
    assert "org/model" in terminal.getvalue()
    assert "1.0/4.0 MB" in terminal.getvalue()


def test_does_an_error_of_the_block_come_out() -> None:
    async def scenario() -> None:
        async with progress(FetchRecords(), lambda: 0.0, quiet=True):
            raise LookupError("of the block")

    with pytest.raises(LookupError, match="of the block"):
        asyncio.run(scenario())
