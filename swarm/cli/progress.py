"""Progress of running fetches on standard error: a bar on a terminal, else a log line every 10 s."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from swarm.errors import clean
from swarm.observe.fetch_record import FetchRecord, FetchRecords
from swarm.observe.units import count, size_text

REDRAW_S = 0.1
LINE_EVERY_S = 10.0

log = logging.getLogger("swarm")


@asynccontextmanager
async def progress(fetches: FetchRecords, clock: Callable[[], float], *, quiet: bool = False) -> AsyncIterator[None]:
    """Shows the running fetches while the block runs; `quiet` shows no bar."""
    show = _bar if sys.stderr.isatty() and not quiet else _lines
    task = asyncio.create_task(show(fetches, clock))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _bar(fetches: FetchRecords, clock: Callable[[], float]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bars:
        tasks = {}
        while True:
            for digest, fetch in fetches.running.items():
                if digest not in tasks:
                    tasks[digest] = bars.add_task(fetch.model_id, total=fetch.size, words="")
                bars.update(tasks[digest], completed=fetch.done_bytes, words=_words(fetch, clock()))
            bars.refresh()
            await asyncio.sleep(REDRAW_S)


async def _lines(fetches: FetchRecords, clock: Callable[[], float]) -> None:
    while True:
        await asyncio.sleep(LINE_EVERY_S)
        for fetch in fetches.running.values():
            done = fetch.done_bytes / max(1, fetch.size)
            log.info("%s: %.0f %%, %s", fetch.model_id, 100 * done, _words(fetch, clock()))


def _words(fetch: FetchRecord, now: float) -> str:
    eta_s = fetch.eta_s(now)
    left = "waiting for sources" if eta_s is None else f"{eta_s:.0f} s left"
    sent = [source for source in fetch.sources.values() if source.linked and source.chunks > 0]
    origins = [clean(source.name) for source in sent if source.origin]
    sources = ", ".join([*origins, count(len(sent) - len(origins), "source" if not origins else "peer")])
    return f"{size_text(fetch.rate.at(now))}/s, {left}, {sources}"
