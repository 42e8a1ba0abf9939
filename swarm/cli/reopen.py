"""Opens the files of a seed again after they changed.

A program may still write them: a copy of 100 GB takes minutes. So a source counts only if its files did not change
while they were hashed, nor for `QUIET_S` afterwards. An error that stays the same for `GIVE_UP_S` is final.

Must not know: nodes, settings.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from swarm.errors import SwarmError
from swarm.protocol.messages import Origin
from swarm.store import Source, WatchedSource
from swarm.transfer.verify import is_right

T = TypeVar("T")

QUIET_S = 1.0
GIVE_UP_S = 30.0  # of a directory that is removed and copied again


async def reopened(
    open_: Callable[[], tuple[T, Source, Origin | None]],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> tuple[T, Source, Origin | None]:
    """The result of `open_`, called on a thread, once the files are complete and quiet.

    Raises the SwarmError that `open_` has raised for `GIVE_UP_S`.
    """
    known, since = "", clock()
    while True:
        await sleep(QUIET_S)
        try:
            opened = await asyncio.to_thread(open_)
        except SwarmError as error:
            if str(error) != known:
                known, since = str(error), clock()
            if clock() - since > GIVE_UP_S:
                raise
            continue
        await sleep(QUIET_S)
        try:
            await asyncio.to_thread(_demand_unchanged, opened[1])
        except SwarmError:
            opened[1].close()
            continue
        return opened


def _demand_unchanged(source: Source) -> None:
    if isinstance(source, WatchedSource):
        source.demand_unchanged(lambda chunk: is_right(source, chunk))
