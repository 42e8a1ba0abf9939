"""Where the bytes of a fetch go: a store for each kind of target, its waits, and what follows the last byte.

A refused artifact leaves nothing behind. Must not know: how an artifact is found.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from swarm.api.handles import HubCache
from swarm.checkpoint import commit_source, digest_cache, hf_publish, kept, signature_file
from swarm.checkpoint.blob_check import git_name
from swarm.checkpoint.promised import described
from swarm.content import promise
from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Digest, Digests, Manifest, ModelId
from swarm.content.selection import Part, Selection
from swarm.errors import FetchTimeout, ManifestInvalid, NotOfCommit, OriginError, StoreConflict, StoreError
from swarm.node import commit_parts
from swarm.node.cold_start import Found
from swarm.node.fetch import Fetched
from swarm.node.node import Node
from swarm.origin.tensor_names import tensor_names
from swarm.protocol.messages import Origin
from swarm.settings import Settings
from swarm.store import Store
from swarm.store.casting import casts
from swarm.store.directory import DirectoryStore
from swarm.store.file_errors import store_errors
from swarm.store.memory import PromisedSource
from swarm.store.memory_store import MemoryStore
from swarm.store.part import narrowed
from swarm.store.partial_directory import Claimed, discard
from swarm.store.tensors import CastStore, GpuStore, IntoStore
from swarm.transfer.commit_proof import PinnedCommit
from swarm.transfer.origin_driver import on_daemon
from swarm.transfer.verify import copy, is_right

if TYPE_CHECKING:
    import torch

NAMES_TIMEOUT_S = 60.0  # for names of tensors, which spare reads and are not needed
TURN_S = 0.1  # between two looks at a place that another fetch fills

T = TypeVar("T")

log = logging.getLogger("swarm")


class FetchTarget:
    """Where the bytes of a fetch go, and how."""

    def __init__(
        self,
        node: Node,
        left: Deadline,
        *,
        out: str | Path | HubCache | None,
        into: Mapping[str, Any] | None,
        device: str,
        settings: Settings,
        selection: Selection | None,
        dtype: torch.dtype | None,
        revision: str | None,
        abandon_s: float,
        blake3: bool,
    ) -> None:
        self._node = node
        self._left = left
        self._out = out
        self._into = into
        self._device = device
        self._settings = settings
        self._selection = selection
        self._dtype = dtype
        self._revision = revision
        self._abandon_s = abandon_s
        self._blake3 = blake3

    async def land(
        self, found: Found, commit: PinnedCommit | None, resolved: Callable[[Digest, int], object] | None
    ) -> tuple[Fetched, Store, Path | None]:
        """Fetches the artifact, or the selected part; a refused one leaves nothing behind."""
        manifest, origin, node, out = found.manifest, found.origin, self._node, self._out
        part = None
        if (selection := await self._narrowed(found)) is not None:
            part = part_of(selection, manifest, whole_files=out is not None or manifest.promised)
        if resolved:
            resolved(manifest.digest, manifest.size if part is None else part.size)
        if manifest.promised and out is None:
            return await self._promised_in_memory(found, commit, part)
        if isinstance(out, HubCache):
            return await self._to_hub_cache(found, commit, part)
        store, path = await self._opened(manifest, part)
        try:
            fetched = await self._filled(store, found, commit, part)
        except NotOfCommit:
            if path is not None:
                await asyncio.to_thread(discard, path, manifest)
            raise
        if path is not None:
            cache, kept_as = self._settings.cache, path
            await _finished(node, fetched, lambda: _remember(node, cache, kept_as, manifest, origin, part))
            self._join_commit(store, path, origin, part)
        return fetched, store, path

    async def _to_hub_cache(
        self, found: Found, commit: PinnedCommit | None, part: Part | None
    ) -> tuple[Fetched, Store, Path]:
        manifest, origin, node, cache = found.manifest, found.origin, self._node, self._settings.cache
        entry = hf_publish.CacheEntry(self._left.model_id)
        lock = await _claimed(self._left, entry, manifest)
        try:
            await asyncio.get_running_loop().run_in_executor(None, entry.reuse, manifest, origin, part)
            store, _ = await self._opened(manifest, part)
            try:
                fetched = await self._filled(store, found, commit, part)
            except NotOfCommit:
                await asyncio.to_thread(entry.discard, manifest)
                raise
            stamps = store.stamps() if isinstance(store, DirectoryStore) else {}
            if by_listing := bool(commit and fetched.proven):
                origin = _vouched(commit, origin) if commit else origin
            snapshot = await _finished(
                node,
                fetched,
                lambda: entry.publish(manifest, origin, self._revision, stamps=stamps, part=part, proven=by_listing),
            )
            kept.record(cache, self._left.model_id, manifest.digest, snapshot, wrote=entry.wrote)
            await _finished(node, fetched, lambda: _remember(node, cache, snapshot, manifest, origin, part))
            if isinstance(store, DirectoryStore):
                store.moved(snapshot)
            self._join_commit(store, snapshot, origin, part)
        finally:
            entry.unclaim(manifest, lock)
        return fetched, store, snapshot

    def _join_commit(self, store: Store, path: Path, origin: Origin | None, part: Part | None) -> None:
        """Serves the fetched files as a part of their commit too, of which other nodes may have more files."""
        if part is not None or not isinstance(store, DirectoryStore) or store.manifest.promised:
            return
        if origin and origin.commit and (source := commit_source.fetched(path, store.manifest, store.stamps())):
            model_id = ModelId(self._left.model_id)
            commit_parts.join(self._node, model_id, source, origin=origin, trusted=self._settings.trusted)

    async def _opened(self, manifest: Manifest, part: Part | None) -> tuple[Store, Path | None]:
        """The store. Waits while another fetch writes the same artifact there; its files then count as fetched."""
        waiting = False
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(None, self._store, manifest, part)
            except Claimed as error:
                if not waiting:
                    log.info(
                        "%s: %s is being filled by another fetch; waiting for it", self._left.model_id, error.where
                    )
                    waiting = True
                await self._left.turn()

    async def _narrowed(self, found: Found) -> Selection | None:
        """The selection; of a promise, without tensors yet, as the files that hold them, if the origin tells."""
        selection, source = self._selection, found.source
        if selection is None or selection.tensors is None or not found.manifest.promised or source is None:
            return selection
        paths = [file.path for file in found.manifest.files]
        candidates = selection.files(paths)
        try:
            async with asyncio.timeout(min(NAMES_TIMEOUT_S, self._left.left_s() or NAMES_TIMEOUT_S)):
                names = await on_daemon(lambda: tensor_names(source.origin, source.listing, candidates))
        except (OriginError, ManifestInvalid, TimeoutError) as error:
            why = str(error) or "no names of tensors in time"
            log.info("%s: %s; all files are read that may hold the tensors", self._left.model_id, why)
            return selection
        return selection.with_names(names, paths)

    async def _promised_in_memory(
        self, found: Found, commit: PinnedCommit | None, files: Part | None
    ) -> tuple[Fetched, Store, None]:
        """Fetches a promise into tensors. Host memory holds its bytes until they are proven; only then they move on.

        New tensors on the CPU share that memory.
        """
        promised, selection, node, dtype = found.manifest, self._selection, self._node, self._dtype
        store = await asyncio.get_running_loop().run_in_executor(None, MemoryStore, promised, files)
        fetched = await self._filled(store, found, commit, files)

        def place() -> Store:
            numbers = range(len(promised.files)) if files is None else files.files
            manifest = described(store, _digests(node, promised), numbers)
            part = None if selection is None else selection.part(manifest, whole_files=False)
            if self._into is None and self._device == "cpu" and not (dtype is not None and casts(manifest, dtype)):
                store.describe(manifest, part)
                return store
            target, _ = self._store(manifest, part)
            length = len(manifest.chunks)
            chunks = Bitfield.full(length) if part is None else part.chunks
            copy(store, target, Bitfield(length), chunks=chunks, blake3=True)
            target.seal(lambda chunk: is_right(target, chunk, blake3=True))
            return target

        target = await _finished(node, fetched, place)
        if target is not store and selection is None and not isinstance(target, CastStore):
            node.replace_source(fetched.digest, PromisedSource(promised, target))
        return fetched, target, None

    async def _filled(self, store: Store, found: Found, commit: PinnedCommit | None, part: Part | None) -> Fetched:
        promised_in_memory = found.manifest.promised and self._out is None
        try:
            return await self._node.fetch(
                ModelId(self._left.model_id),
                store,
                origin=found.origin,
                timeout_s=self._left.left_s(),
                abandon_s=math.inf if promised_in_memory else self._abandon_s,
                pinned=self._blake3 or promised_in_memory,
                wanted=None if part is None else part.chunks,
                source=found.source,
                commit=commit,
            )
        except FetchTimeout as error:
            timeout_s = self._left.timeout_s or error.timeout_s
            model_id, fraction = self._left.model_id, error.fraction
            raise FetchTimeout(model_id, timeout_s=timeout_s, fraction=fraction, why=error.why) from error

    def _store(self, manifest: Manifest, part: Part | None) -> tuple[Store, Path | None]:
        dtype, device, out = self._dtype, self._device, self._out
        if dtype is not None and casts(manifest, dtype):
            return CastStore(manifest, dtype, device=device, tensors=self._into, part=part), None
        if self._into is not None:
            return IntoStore(manifest, self._into, part), None
        if out is None:
            return MemoryStore(manifest, part) if device == "cpu" else GpuStore(manifest, device, part), None
        path = hf_publish.CacheEntry(self._left.model_id).staging(manifest) if isinstance(out, HubCache) else Path(out)
        with store_errors(path):
            is_taken = path.exists() and not path.is_dir()
        if is_taken:
            raise StoreConflict(path, "is not a directory; fetch to another place")
        return DirectoryStore(path, manifest, fsync=self._settings.fsync, part=part), path


@dataclass(frozen=True)
class Deadline:
    """The time that a fetch has left, from its call on."""

    node: Node
    model_id: str
    timeout_s: float | None
    began: float

    def left_s(self) -> float | None:
        """Seconds; None without a deadline."""
        return None if self.timeout_s is None else max(0.1, self.timeout_s - (self.node.now() - self.began))

    async def turn(self) -> None:
        """Sleeps until the next attempt. Raises FetchTimeout after the deadline."""
        if self.timeout_s is not None and self.node.now() - self.began > self.timeout_s:
            raise FetchTimeout(self.model_id, timeout_s=self.timeout_s, fraction=0.0)
        await asyncio.sleep(TURN_S)


async def _claimed(left: Deadline, entry: hf_publish.CacheEntry, manifest: Manifest) -> int:
    """The lock of the artifact in the hub cache."""
    waiting = False
    while (lock := entry.claim(manifest)) is None:
        if not waiting:
            log.info("%s: another fetch puts it into the Hugging Face cache; waiting for it", left.model_id)
            waiting = True
        await left.turn()
    return lock


def part_of(selection: Selection, manifest: Manifest, *, whole_files: bool) -> Part | None:
    """The part of an artifact. A promise has no tensors yet: all files come in which they may be.

    `FetchTarget` narrows the selection before, where the origin tells the names.
    """
    if manifest.promised:
        selection = dataclasses.replace(selection, tensors=None)
    return selection.part(manifest, whole_files=whole_files)


def _digests(node: Node, manifest: Manifest) -> list[Digests]:
    """The digests of a promise's chunks; zeros of chunks that are not here."""
    unknown = Digests(bytes(16), bytes(32))
    return [node.known(chunk, manifest.digest) or unknown for chunk in manifest.chunks]


def _proven(node: Node, manifest: Manifest) -> Manifest:
    """The manifest that a promise has become; any other one is what it is."""
    if not manifest.promised:
        return manifest
    return promise.proven(manifest, _digests(node, manifest), headers={}, unused={})


async def _finished(node: Node, fetched: Fetched, work: Callable[[], T]) -> T:
    """The last step of a fetch, on a thread; if it fails, the artifact is not served."""
    try:
        return await asyncio.get_running_loop().run_in_executor(None, work)
    except BaseException:
        node.release(fetched.digest)
        raise


def _remember(
    node: Node, cache: Path, path: Path, manifest: Manifest, origin: Origin | None, part: Part | None
) -> None:
    try:
        proven = _proven(node, manifest)
        if part is not None:
            of = digest_cache.PartOf(manifest.digest, len(manifest.files))
            here = narrowed(proven, {manifest.files[number].path for number in part.files})
            digest_cache.remember_part(cache, path, here, of=of)
            return
        if origin and origin.signatures:
            signature_file.add(path, proven.digest, origin.signatures)
        digest_cache.remember(cache, path, proven)
    except StoreError as error:
        log.warning("%s; the fetch is complete, but `swarm verify %s` will know nothing of it", error, path)


def _vouched(commit: PinnedCommit, origin: Origin | None) -> Origin:
    """The provenance of proven files: what the listing says in place of what a member says."""
    listing = commit.lister.listing
    listed = {file.path: file.content for file in listing.files} if listing else {}
    origin = origin or Origin(commit.commit, {})
    beside = {
        path: data for path, data in origin.beside.items() if listed.get(path) == promise.GIT_SHA1 + git_name(data)
    }
    etags = {path: name.partition(":")[2] for path, name in listed.items() if not name.startswith(promise.ETAG)}
    return origin.proven(commit.commit, etags=etags, beside=beside)
