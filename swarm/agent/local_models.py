"""Serves the models of the Hugging Face cache to peers, one after the other, as they are hashed.

A scan reads directories alone. Hashing takes a core for a second a gigabyte, so one model at a time is hashed, the most
recently changed first, and for as long as hashing took nothing is hashed afterwards (at most REST_MAX_S); digests are
remembered across restarts. A model that a program asks for comes first. What vanishes or changes is withdrawn, and
looked at again with the next scan.

Must not know: HTTP, limits of the cache.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path

from swarm.agent.cache import CachedModel, snapshots
from swarm.api import open_source
from swarm.content.manifest import Digest
from swarm.errors import SwarmError
from swarm.node import commit_parts
from swarm.node.node import Node
from swarm.protocol.messages import ANNOUNCED_MAX
from swarm.settings import Settings

SCAN_EVERY_S = 30.0
REST_MAX_S = 60.0
SERVED_MAX = ANNOUNCED_MAX  # a message announces no more

log = logging.getLogger("swarm")


class LocalModels:
    """`fetched()`: keys of models that the node shares because it fetched them."""

    def __init__(self, node: Node, root: Path, *, settings: Settings, fetched: Callable[[], Collection[str]]) -> None:
        self.served: dict[str, Digest] = {}  # by key
        self.refused: dict[str, tuple[float, str]] = {}  # by key: time of change, and why it cannot be served
        self._node = node
        self._root = root
        self._settings = settings
        self._fetched = fetched
        self._hashing = asyncio.Lock()

    async def run(self) -> None:
        """Serves all models, and looks again every SCAN_EVERY_S."""
        while True:
            for each in await asyncio.to_thread(self._scan):
                began = time.monotonic()
                try:
                    if await self.serve(each):
                        await asyncio.sleep(min(REST_MAX_S, time.monotonic() - began))
                except SwarmError:
                    pass  # it is refused
                except Exception as error:  # of files that nothing was prepared for: the others are served
                    self.refused[each.key] = _changed_at(each), f"a bug in swarm: {error!r}"
                    log.exception("%s is not served to peers", each.key)
            await asyncio.sleep(SCAN_EVERY_S)

    async def serve(self, each: CachedModel) -> bool:
        """Hashes and serves a snapshot; False if the node shares it already, or no more can be. Raises SwarmError."""
        self._forget_lost()
        async with self._hashing:
            if each.key in self.served or each.key in self._fetched():
                return False
            if len(self._node.holdings()) >= SERVED_MAX:
                self.refused[each.key] = _changed_at(each), f"the agent serves {SERVED_MAX} models already"
                return False
            try:
                work = asyncio.to_thread(open_source, str(each.place), model_id=None, settings=self._settings)
                name, source, origin = await work
                digest = source.manifest.digest
                if digest in self._node.holdings():  # another snapshot with the same content
                    await asyncio.to_thread(source.close)
                else:
                    commit_parts.serve(self._node, name, source, origin=origin, trusted=self._settings.trusted)
            except SwarmError as error:
                self.refused[each.key] = _changed_at(each), str(error)
                log.info("%s is not served to peers: %s", each.key, error)
                raise
            self.served[each.key] = digest
            log.info("%s is served to peers, digest %s", each.key, digest)
            return True

    def withdraw(self, key: str) -> None:
        """Serves a snapshot no more."""
        if digest := self.served.pop(key, None):
            self._node.withdraw(digest, "its files are removed")

    def _forget_lost(self) -> None:
        """Files of a cache come and go: a model that the node has lost is one to look at again, no failure."""
        lost = {each.digest for each in self._node.lost}
        for key, digest in list(self.served.items()):
            if digest in lost or digest not in self._node.holdings():
                del self.served[key]
                self._node.release(digest)

    def _scan(self) -> list[CachedModel]:
        """The snapshots that are not served yet, and may be, the latest changed first."""
        found = [(_changed_at(each), each) for each in snapshots(self._root) if each.key not in self.served]
        todo = [(at, each) for at, each in found if self.refused.get(each.key, (None, ""))[0] != at]
        return [each for _, each in sorted(todo, key=lambda pair: (-pair[0], pair[1].key))]


def _changed_at(each: CachedModel) -> float:
    try:
        return each.place.stat().st_mtime
    except OSError:
        return 0.0
