"""A revision of a model that the agent fetches file by file, as programs ask for them.

Owns the queue of the files that are wanted. Fetches run one after the other, each of one batch: the files that were
asked for meanwhile, in order, up to BATCH_BYTES, or BATCH_FILES of any size. The first one brings the small files of
the model with it, which programs ask for one by one; they come before large files. A file counts when it has its final
name in the Hugging Face cache: it is whole and verified then, and its stamp says so as long as nothing changes it.

Must not know: HTTP, how a revision is found.
"""

from __future__ import annotations

import asyncio
import glob
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.agent.cache import Cache, key_of
from swarm.api import HUB_CACHE, fetch_on
from swarm.checkpoint.blob_check import content_name, is_hub_name
from swarm.content.manifest import FileEntry, ModelId
from swarm.content.selection import WEIGHTS, Selection
from swarm.errors import SettingsError, SourceChanged, StoreFull
from swarm.node.cold_start import Found
from swarm.node.fetch import Fetched
from swarm.node.node import Node
from swarm.settings import Settings
from swarm.store.directory import DirectoryStore
from swarm.store.stamp import Stamp

# The content of a file is hashed in order, its last part after it has come: the next file comes meanwhile.
BATCH_FILES = 4
BATCH_BYTES = 256 << 20  # large enough for the parts of a fetch that take a fixed time, about 0.1 s
TAKE_S = 2.0  # from the fetch until the programs that wait for it read it
ROOM_WAIT_S, ROOM_LOOK_S = 60.0, 0.1
ABANDON_S = 5.0  # without a holder, where the origin may have it: then it is looked for again
SMALL_BYTES, COMPANIONS_BYTES = 4 << 20, 32 << 20

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class VerifiedFile:
    """A file of the cache that holds the right bytes while it has this stamp."""

    place: Path
    stamp: Stamp

    def is_as_it_was(self) -> bool:
        """Whether it has the stamp, and so the bytes."""
        try:
            return Stamp.at(self.place) == self.stamp
        except SourceChanged:
            return False


class Artifact:
    """The artifact `found`, under the revision that was asked for. All methods run on the node's loop."""

    def __init__(
        self,
        node: Node,
        model_id: ModelId,
        found: Found,
        *,
        revision: str | None,
        settings: Settings,
        cache: Cache,
    ) -> None:
        self.model_id = model_id
        self.found = found
        self.commit = found.origin.commit if found.origin and found.origin.commit else found.manifest.digest[:40]
        self.key = key_of(model_id, self.commit)
        self.files: dict[str, VerifiedFile] = {}
        self.last: Fetched | None = None
        self._node = node
        self._revision = revision
        self._settings = settings
        self._cache = cache
        self._unproven: dict[str, str] = {}  # names that no fetch proves, by path
        self._entries = {file.path: file for file in found.manifest.files}
        self._waiting: dict[str, asyncio.Future[None]] = {}  # asked for, and not there yet
        self._queue: dict[str, None] = {}
        self._running: asyncio.Task[None] | None = None
        self._companions = True  # come with the first batch

    @property
    def entries(self) -> dict[str, FileEntry]:
        """Its files by path."""
        return self._entries

    def bind(self, names: Mapping[str, str]) -> None:
        """The hub lists its files with these names, by path.

        A fetch proves the names that the artifact's holders tell; others are compared here, before a file counts.
        """
        etags = self.found.origin.etags if self.found.origin else {}
        for path, name in names.items():
            if is_hub_name(name) and etags.get(path) != name and self._unproven.get(path) != name:
                self._unproven[path] = name
                self.files.pop(path, None)

    async def ensure(self, paths: Collection[str]) -> None:
        """Returns once these files are in the cache. Raises what the fetch raised; the next call tries again."""
        for path in paths:
            if path in self.files and not self.files[path].is_as_it_was():
                del self.files[path]  # another program removed or changed it
        lacking = [path for path in paths if path not in self.files]
        for path in lacking:
            if path not in self._waiting:
                self._waiting[path] = asyncio.get_running_loop().create_future()
                self._queue[path] = None
        if self._queue and self._running is None:
            self._running = self._node.spawn(self._run(), f"fetch files of {self.model_id}")
        waiting = [asyncio.shield(future) for path in lacking if (future := self._waiting.get(path))]
        await asyncio.gather(*waiting)
        self._cache.used(self.key)

    @property
    def busy(self) -> bool:
        """Whether files are on their way, or asked for."""
        return self._running is not None

    def forget(self) -> None:
        """Its files were removed."""
        self.files.clear()

    async def _run(self) -> None:
        try:
            while self._queue:
                batch = self._batch()
                for path in batch:
                    self._queue.pop(path, None)
                try:
                    await self._fetch(batch)
                except BaseException as error:
                    self._settle(batch, error)
                    if not isinstance(error, Exception):
                        raise
                else:
                    self._cache.hold(self.key, TAKE_S)
                    self._settle(batch, None)
        finally:
            self._running = None
            self._settle(list(self._queue), asyncio.CancelledError())
            self._queue.clear()

    def _settle(self, paths: Sequence[str], error: BaseException | None) -> None:
        for path in paths:
            if (future := self._waiting.pop(path, None)) and not future.done():
                if error is None:
                    future.set_result(None)
                elif isinstance(error, Exception):
                    future.set_exception(error)
                    future.exception()  # the program that asked may be gone
                else:
                    future.cancel()

    def _batch(self) -> list[str]:
        """The next files: those that were asked for first."""
        batch, size = list[str](), 0
        for path in self._queue:
            if len(batch) >= BATCH_FILES and size + self._entries[path].size > BATCH_BYTES:
                break
            batch.append(path)
            size += self._entries[path].size
        if not self._companions:
            return batch
        self._companions = False
        small = self._small(beside=batch)
        large = {path for path in batch if self._entries[path].size > SMALL_BYTES}
        if size <= COMPANIONS_BYTES or len(large) == len(batch) + len(small):
            return batch + small
        return [path for path in batch if path not in large] + small  # programs need them before the weights

    def _small(self, *, beside: Collection[str]) -> list[str]:
        chosen, left = [], COMPANIONS_BYTES
        for path, entry in self._entries.items():
            new = path not in beside and path not in self.files and not path.endswith(WEIGHTS)
            if new and entry.size <= min(SMALL_BYTES, left):
                chosen.append(path)
                left -= entry.size
        return chosen

    async def _fetch(self, batch: Sequence[str]) -> None:
        whole = len(batch) == len(self._entries)
        selection = None if whole else Selection(include=tuple(map(glob.escape, batch)))
        more = await self._make_room(batch)
        elsewhere = self.found.source is None and self._settings.origin != "none"
        try:
            fetched, store, snapshot = await fetch_on(
                self._node, self.model_id, out=HUB_CACHE,
                settings=self._settings, revision=self._revision, selection=selection, found=self.found,
                abandon_s=ABANDON_S if elsewhere else math.inf,
            )  # fmt: skip
        finally:
            self._cache.arrived(self.key, more)
        if not isinstance(store, DirectoryStore) or snapshot is None:
            raise SettingsError("out", "the Hugging Face cache is no directory")
        self.last = fetched
        stamps = store.stamps()
        made = {path: VerifiedFile(snapshot / path, stamps[path]) for path in batch}
        for path in made.keys() & self._unproven.keys():
            await asyncio.to_thread(_demand_name, made[path], self._unproven[path])
        self.files |= made

    async def _make_room(self, batch: Sequence[str]) -> int:
        """The bytes for which there is room now. Waits its turn, and while what is being read or arriving takes the
        room. Raises StoreFull ROOM_WAIT_S after its turn came, or at once if it could never fit."""
        async with self._cache.turn:
            deadline = self._node.now() + ROOM_WAIT_S
            while True:
                # Each time: while it waits, its own files may be evicted.
                more = sum(self._entries[path].size for path in batch if not self._here(path))
                try:
                    self._cache.room(self.key, more)
                except StoreFull:
                    if not self._cache.would_fit(self.key, more) or self._node.now() > deadline:
                        raise
                    await asyncio.sleep(ROOM_LOOK_S)
                else:
                    return more

    def _here(self, path: str) -> bool:
        """Whether the cache has a file of that name and size, which is hashed before it counts."""
        place = self._cache.root / f"models--{self.model_id.replace('/', '--')}" / "snapshots" / self.commit / path
        try:
            return place.stat().st_size == self._entries[path].size
        except OSError:
            return False

    def __repr__(self) -> str:
        return (
            f"<Artifact {self.key} {len(self.files)} of {len(self._entries)} files here | {len(self._queue)} wait"
            f"{' | fetching' if self._running else ''}>"
        )


def _demand_name(made: VerifiedFile, name: str) -> None:
    if content_name(made.place, like=name, size=made.stamp.size) != name or not made.is_as_it_was():
        raise SourceChanged(made.place, "its content does not have the name that the hub lists")
