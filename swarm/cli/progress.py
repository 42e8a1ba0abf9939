"""Progress of a fetch for whoever waits for it: a bar on a terminal, quiet lines elsewhere."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from swarm.observe.node_report import FetchReport, Picture
from swarm.observe.units import count, size_text

REDRAW_S = 0.1
LINE_EVERY_S = 10.0

log = logging.getLogger("swarm")


@asynccontextmanager
async def progress(picture: Picture, clock: Callable[[], float], *, quiet: bool = False) -> AsyncIterator[None]:
    """Shows the fetches in `picture` on standard error while the block runs."""
    show = _bar if sys.stderr.isatty() and not quiet else _lines
    task = asyncio.create_task(show(picture, clock))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _bar(picture: Picture, clock: Callable[[], float]) -> None:
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
            for digest, fetch in picture.fetches.items():
                if digest not in tasks:
                    tasks[digest] = bars.add_task(fetch.model_id, total=fetch.size, words="")
                bars.update(tasks[digest], completed=fetch.done_bytes, words=_words(fetch, clock()))
            bars.refresh()
            await asyncio.sleep(REDRAW_S)


async def _lines(picture: Picture, clock: Callable[[], float]) -> None:
    while True:
        await asyncio.sleep(LINE_EVERY_S)
        for fetch in picture.fetches.values():
            done = fetch.done_bytes / max(1, fetch.size)
            log.info("%s: %.0f %%, %s", fetch.model_id, 100 * done, _words(fetch, clock()))


def _words(fetch: FetchReport, now: float) -> str:
    eta_s = fetch.eta_s(now)
    left = "waiting for sources" if eta_s is None else f"{eta_s:.0f} s left"
    return f"{size_text(fetch.rate.at(now))}/s, {left}, {count(len(fetch.sources), 'source')}"
