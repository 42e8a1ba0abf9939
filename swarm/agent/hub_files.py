"""Files of revisions, whole and verified, for the hub-compatible face.

    known        it was verified before, and has the stamp of then
    cached       the snapshot has it: its content is hashed once and compared with the hub's name
    fetched      it is a file of the artifact, from peers or the origin (`artifact`)
    beside       a README, a picture: it came with the artifact, or is read from the origin and hashed

Must not know: HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from swarm.agent.agent import Agent
from swarm.agent.artifact import VerifiedFile
from swarm.agent.cache import key_of
from swarm.agent.revisions import HubFile, Revision
from swarm.checkpoint import blob_check, hf_cache, kept
from swarm.checkpoint.blob_check import git_name, is_hub_name
from swarm.checkpoint.files import CheckpointFile
from swarm.checkpoint.hf_publish import CacheEntry
from swarm.content.manifest import Digest
from swarm.content.promise import ListedFile
from swarm.errors import OriginChanged, OriginNotFound, SourceChanged, Stalled, StoreFull
from swarm.origin import OriginReader
from swarm.store.file_errors import store_errors
from swarm.store.own_files import write_new
from swarm.store.stamp import Stamp
from swarm.transfer.origin_driver import on_daemon

READ_BYTES = 1 << 20
VERIFIED_MAX = 100_000

log = logging.getLogger("swarm")


class HubFiles:
    """All methods run on the node's loop."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._revisions = agent.revisions
        self._verified: dict[tuple[str, str], VerifiedFile] = {}  # by key of the model, and path; oldest first
        self._getting: dict[tuple[str, str], asyncio.Task[VerifiedFile]] = {}

    async def get(self, revision: Revision, file: HubFile) -> VerifiedFile:
        """The file, once it is in the cache and verified. Raises SwarmError."""
        key = key_of(revision.model_id, revision.commit), file.path
        known = self._verified.get(key)
        if known and known.is_as_it_was():
            return known
        return await self._shared(key, lambda: self._get(revision, file))

    async def _shared(self, key: tuple[str, str], get: Callable[[], Coroutine[Any, Any, VerifiedFile]]) -> VerifiedFile:
        if key not in self._getting:
            task = self._getting[key] = asyncio.create_task(get(), name=f"get {key[1]} of {key[0]}")
            task.add_done_callback(lambda done: self._got(key, done))
        return await asyncio.shield(self._getting[key])

    def _got(self, key: tuple[str, str], task: asyncio.Task[VerifiedFile]) -> None:
        self._getting.pop(key, None)
        if task.cancelled() or task.exception():
            return
        self._verified[key] = task.result()
        while len(self._verified) > VERIFIED_MAX:
            del self._verified[next(iter(self._verified))]

    async def _get(self, revision: Revision, file: HubFile) -> VerifiedFile:
        place = self._snapshot(revision) / file.path
        if is_hub_name(file.name) and (cached := await asyncio.to_thread(self._cached, revision, file, place)):
            return cached
        try:
            return await self._of_artifact(revision, file, place)
        except (SourceChanged, Stalled):
            self._revisions.give_up(revision)  # this node may have been the only holder
            if self._agent.settings.origin == "none":
                raise
        return await self._of_artifact(revision, file, place)

    async def _of_artifact(self, revision: Revision, file: HubFile, place: Path) -> VerifiedFile:
        found = await self._revisions.artifact_of(revision)
        if all(entry.path != file.path for entry in found.manifest.files):
            return await self._beside(revision, file)
        artifact = self._agent.artifact(revision.model_id, found, revision.asked, names=revision.names)
        await artifact.ensure([file.path])
        if made := artifact.files.get(file.path):
            return made
        raise SourceChanged(place, "it was evicted at once")

    def _cached(self, revision: Revision, file: HubFile, place: Path) -> VerifiedFile | None:
        """The file of the snapshot, if its content has the hub's name: hashed once, and remembered on the disk."""
        try:
            real = Path(os.path.realpath(place, strict=True))
            here = CheckpointFile(file.path, real, Stamp.at(real))
        except (OSError, SourceChanged):
            return None
        if here.stamp.size != file.size or not real.is_file():
            return None
        folder = hf_cache.model_folder(revision.model_id, root=self._agent.cache.root)
        cache_dir = self._agent.settings.cache
        try:
            wrong = blob_check.damaged([here], {file.path: file.name}, folder=folder, cache_dir=cache_dir)
        except (OSError, SourceChanged):
            return None
        return None if wrong else VerifiedFile(real, here.stamp)

    async def _beside(self, revision: Revision, file: HubFile) -> VerifiedFile:
        origin = revision.found.origin if revision.found else None
        data = origin.beside.get(file.path) if origin else None
        entry = CacheEntry(revision.model_id, root=self._agent.cache.root)
        draft = entry.draft(f"{secrets.token_hex(8)}-{file.name}")
        key = key_of(revision.model_id, revision.commit)
        self._agent.cache.room(key, file.size)
        try:
            if data is not None and git_name(data) == file.name:
                await asyncio.to_thread(write_new, draft, data)
            elif revision.listing and revision.reader:
                listed = next(each for each in revision.listing.files if each.path == file.path)
                reader, listing = revision.reader, revision.listing
                await on_daemon(lambda: _read(reader, listing, listed, draft, file.name))
            else:
                raise OriginNotFound("the swarm", f"{revision.model_id} has no {file.path} at {revision.commit[:12]}")
            place = await asyncio.to_thread(entry.add, revision.commit, file.path, name=file.name, draft=draft)
            digest = revision.found.manifest.digest if revision.found else Digest("0" * 64)
            kept.record(self._agent.settings.cache, revision.model_id, digest, place_of(place, file), wrote=entry.wrote)
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()
            self._agent.cache.arrived(key, file.size)
        cached = await asyncio.to_thread(self._cached, revision, file, place)
        if cached is None:
            raise SourceChanged(place, "it is not what was read")
        return cached

    def _snapshot(self, revision: Revision) -> Path:
        folder = hf_cache.model_folder(revision.model_id, root=self._agent.cache.root)
        return folder / "snapshots" / revision.commit


def place_of(place: Path, file: HubFile) -> Path:
    """The snapshot of a file's place."""
    return place.parents[file.path.count("/")]


def _read(reader: OriginReader, listing: Any, file: ListedFile, draft: Path, name: str) -> None:
    """Reads a whole file of the origin. Raises OriginChanged unless its content has the name."""
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    state = sha256 if len(name) == 64 else git
    free_bytes = shutil.disk_usage(draft.parent).free
    if file.size > free_bytes:
        raise StoreFull(draft.parent, need_bytes=file.size, free_bytes=free_bytes)
    with store_errors(draft), draft.open("xb") as out:
        if file.size:
            with contextlib.closing(reader.read(listing, file, 0, file.size)) as stream:
                buffer = memoryview(bytearray(min(READ_BYTES, file.size)))
                while count := stream.readinto(buffer):
                    state.update(buffer[:count])
                    out.write(buffer[:count])
    if state.hexdigest() != name:
        raise OriginChanged(reader.address, f"{file.path}: its content is not the listed one")
