"""Looks whether the files that a node serves are still those that were hashed, also while no peer requests them.

A seed whose files changed would look well and serve nothing. So the stamps of all files are compared every
`WATCH_EVERY_S`; a file is hashed again only if its time of change alone moved (`WatchedSource`).

Must not know: uploads, links, what a user does about it.
"""

from __future__ import annotations

import asyncio
from functools import partial

from swarm.content.manifest import Chunk
from swarm.errors import StoreError
from swarm.store import WatchedSource
from swarm.transfer.shares import Share, Shares
from swarm.transfer.verify import is_right

WATCH_EVERY_S = 2.0  # to compare the stamps of 1,000 files takes 2 ms


def _is_right(share: Share, source: WatchedSource, chunk: Chunk) -> bool:
    return is_right(source, chunk, known=share.known(chunk))


async def watch_files(shares: Shares) -> None:
    """Loses every share whose files changed. Runs until it is cancelled."""
    while True:
        await asyncio.sleep(WATCH_EVERY_S)
        for digest, share in list(shares.shares.items()):
            source = share.source
            if not share.settled.is_set() or not isinstance(source, WatchedSource):
                continue
            try:
                await asyncio.to_thread(source.demand_unchanged, partial(_is_right, share, source))
            except (StoreError, OSError) as error:
                # A source that was closed meanwhile cannot be read, nor its descriptors.
                if shares.shares.get(digest) is share and share.source is source:
                    failure = error if isinstance(error, StoreError) else StoreError(f"its files: {error.strerror}")
                    shares.lose(digest, failure)
