"""The files of a rank's checkpoint: their content and place on this host, how they are fetched, and how served.

The ranks of a host share one directory of fetched files; the first rank that needs it fetches, under a lock. The
first rank of each host serves files and metadata.

Files are served under the digest of the loaded content only. So mtimes and sizes are taken before loading and compared
after hashing: if a file changed meanwhile, the loaded content is unknown and nothing is served.

Must not know: engines, tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from swarm.api import fetch_on, is_proven
from swarm.checkpoint import commit_source, digest_cache, hf_cache, manifest_builder
from swarm.content.manifest import Digest, Manifest
from swarm.engines import cache_gc, metadata
from swarm.engines.layout import metadata_id
from swarm.engines.pin import VARIABLE, EnginePin
from swarm.engines.rank import RankNode
from swarm.engines.tiers import Local
from swarm.errors import ManifestInvalid, NotOfCommit, SettingsError, StoreConflict, StoreError
from swarm.protocol.messages import REVISIONS_MAX, Origin
from swarm.runtime import runtime
from swarm.store.directory_source import DirectorySource
from swarm.store.file_errors import store_errors
from swarm.store.file_lock import open_locked
from swarm.store.own_files import demand_own
from swarm.store.stamp import Stamp

LOCK_TIMEOUT_S = 3600.0  # while another rank of this host fetches or hashes the same files

log = logging.getLogger("swarm")


class CheckpointFiles:
    """The checkpoint that a rank loads; `model`: the directory or model id that the engine was given.

    `revision`: that of the engine's command, None if it names none. Files and metadata are served under it.

    `content`: its digest, None while unknown. `description`: its headers, if known. `local`: the part on this machine.
    `hash_unknown`: reads files that were not hashed before. Raises ManifestInvalid, and StoreError, also for
    files on this machine that are not those of the pin.
    """

    def __init__(self, node: RankNode, model: str, revision: str | None, *, hash_unknown: bool, pin: EnginePin) -> None:
        self.revision = revision
        self._pin = pin
        self.content: Digest | None = None
        self.description: metadata.CheckpointDescription | None = None
        self.local: Local = "config"
        self.grid: dict[str, Any] = {name: getattr(node.settings, name) for name in ("chunk_bytes", "leaf_bytes")}
        self._node = node
        self._cache = node.settings.cache
        self._directory: Path | None = None  # holds all files
        self._stamps: dict[str, Stamp] = {}  # of the weights' files, from before loading
        self._manifest: Manifest | None = None  # of these files, once hashed
        self.is_directory = Path(model).is_dir()
        self._locate = functools.partial(directory_of, model, revision)
        if (directory := self._locate()) is None:
            return
        if cache_gc.is_kept(directory, self._cache):
            cache_gc.hold(directory)
        if metadata.is_whole(directory):
            self.local = "whole"
            self._use(directory)
            known = manifest_builder.known(directory, cache_dir=self._cache, **self.grid)
            if known is None and hash_unknown:
                with contextlib.closing(self._hash(directory)) as source:
                    known = source.manifest
            self.content = known.digest if known else None
            if known:
                pin.demand(known.digest, directory)
        elif (directory / metadata.DESCRIPTION).is_file():
            self.description = metadata.read(directory)
            self.local, self.content = "headers", self.description.content
            pin.demand(self.content, directory)

    def look_again(self) -> None:
        """The engine's own loader brought files that were not on this machine, such as a download from the hub.

        The content is unknown until they are hashed: peers may serve another revision under the same model id.
        """
        self.content = self._directory = None
        with contextlib.suppress(OSError):  # the engine has started; then it serves nothing
            for directory in (self._locate(), hf_cache.snapshot(self._node.model_id)):
                if directory is not None and metadata.is_whole(directory):
                    self._use(directory)
                    return

    def demand_pinned(self) -> None:
        """Raises StoreConflict unless the files that the engine's own loader reads have the digest of the pin."""
        if self._pin.digest is None or (self.local == "whole" and self.content == self._pin.digest):
            return
        directory = self._locate()
        if directory is None or not metadata.is_whole(directory):
            raise StoreConflict(
                self._node.model_id,
                f"is not on this machine with the digest {self._pin.digest[:16]}… that {VARIABLE} pins, and what the "
                "engine downloads by itself has no digest: serve it on a node that this one reaches",
            )
        with contextlib.closing(self._hash(directory)) as source:
            self._pin.demand(source.manifest.digest, directory)

    def _use(self, directory: Path) -> None:
        self._directory, self._stamps = directory, _stamps(directory)

    def fetch(self, *, abandon_s: float) -> Path:
        """The directory with all files, fetched unless another rank of this host has done so.

        Raises StoreError when another rank takes too long, ManifestInvalid for files other than those that this engine
        was configured by, and the errors of `swarm.fetch`.
        """
        if self.content is None:
            raise SettingsError("content", "is not known, so no files can be the right ones")
        place = self._cache / "checkpoints" / self.content[:16]
        cache_gc.hold(place)
        size = sum(header.size for header in self.description.headers.values()) if self.description else 0
        missing_bytes = max(0, size - cache_gc.size_bytes(place))
        cache_gc.prune(self._cache, self._node.settings.cache_limit_bytes, need_bytes=missing_bytes)
        with _locked(place):
            commit, settings = self._pin.commit_of(), self._node.settings
            if not self._complete(place) or (commit and not is_proven(commit, self.content, settings)):
                runtime().run(self._fetch(place, self.content, abandon_s))
            manifest = digest_cache.recall(self._cache, place)
            if manifest is None:
                raise StoreError(f"{place}: the manifest of this fetch was not kept; is {self._cache} writable?")
        if self.description and metadata.describe(manifest).headers != self.description.headers:
            raise ManifestInvalid(self._node.model_id, "its headers are not those that this engine was configured by")
        self._directory = place
        return place

    def _complete(self, place: Path) -> bool:
        manifest = digest_cache.recall(self._cache, place)
        if os.path.lexists(place):
            demand_own(place)
        return (
            manifest is not None
            and manifest.digest == self.content
            and all((place / f.path).is_file() and (place / f.path).stat().st_size == f.size for f in manifest.files)
        )

    async def _fetch(self, place: Path, content: Digest, abandon_s: float) -> None:
        settings = self._node.settings
        try:
            fetched, _, _ = await fetch_on(
                await self._node.open(), self._node.model_id, out=place, digest=content,
                timeout_s=settings.timeout_s, settings=settings, abandon_s=abandon_s, commit=self._pin.commit_of(),
            )  # fmt: skip
        except NotOfCommit:
            await asyncio.to_thread(
                shutil.rmtree, place, ignore_errors=True
            )  # of an earlier fetch, which pinned nothing
            raise
        self._node.log_fetch(fetched)

    def serve(self) -> None:
        """Hashes the files, if they are here, and serves them if this is the first rank of its host."""
        if self._directory is None:
            return
        try:
            source = self._hash(self._directory)
        except Exception:
            self._demand_loaded(self._directory)
            raise
        try:
            self._demand_loaded(self._directory, source.manifest)
            self.content, self._manifest = source.manifest.digest, source.manifest
        except BaseException:
            source.close()
            raise
        if not self._node.rank.first_of_host:
            source.close()
            return
        self._node.serve(self._node.model_id, source, self._origin())
        log.info("%s: serves the files at %s, digest %s", self._node, self._directory, self.content)

    def serve_metadata(self) -> None:
        """Serves config, tokenizer and headers if this is the first rank of its host."""
        if not self._node.rank.first_of_host or self.content is None:
            return
        if self._directory is not None and self._manifest is not None:
            metadata.stage(self._cache, self._directory, self._manifest)
        if place := metadata.staged(self._cache, self.content):
            source = manifest_builder.files(place, cache_dir=self._cache)  # its index names files that it lacks
            origin = self._origin()
            named = (
                Origin(origin.commit, {}, origin.revisions) if origin else None
            )  # its files are not those of a commit
            self._node.serve(metadata_id(self._node.model_id), source, named)

    def _origin(self) -> Origin | None:
        """Commit and revisions of the files, that of the engine's command included."""
        found = None
        if self._directory:
            local = commit_source.local_origin(self._directory, cache_dir=self._cache)
            found = local or hf_cache.named_origin(self._directory)
        if self.revision is None or (found and found.is_revision(self.revision)):
            return found
        found = found or Origin("", {})
        return msgspec.structs.replace(found, revisions=(*found.revisions[: REVISIONS_MAX - 1], self.revision))

    def _hash(self, directory: Path) -> DirectorySource:
        with _locked(self._cache / "checkpoints" / f"hash-{directory.name}"):
            return manifest_builder.checkpoint(directory, cache_dir=self._cache, **self.grid)[1]

    def _demand_loaded(self, files: Path, manifest: Manifest | None = None) -> None:
        """Raises StoreConflict, and forgets the content, if the files were changed since the weights were loaded."""
        if self.content in (None, manifest.digest if manifest else self.content) and self._unchanged(files):
            return
        self.content = None
        raise StoreConflict(files, "holds other files than were loaded from it; restart to serve them")

    def _unchanged(self, files: Path) -> bool:
        try:
            return not self._stamps or self._stamps == _stamps(files)
        except OSError:
            return False


def model_id_of(model: str) -> str:
    """The model id of an engine's model argument, as `swarm serve` and `swarm run` derive it."""
    path = Path(model)
    if not path.is_dir():
        return model
    if (path / metadata.NAME).is_file():
        return (path / metadata.NAME).read_text(encoding="utf-8").strip()
    return hf_cache.model_id_of(path) or path.resolve().name


def directory_of(model: str, revision: str | None) -> Path | None:
    """The directory of an engine's model argument on this machine, None if there is none."""
    return Path(model) if Path(model).is_dir() else hf_cache.snapshot(model, revision=revision or "main")


def _stamps(directory: Path) -> dict[str, Stamp]:
    return {str(path): Stamp.at(path) for path in directory.rglob("*") if metadata.is_weights(path.name)}


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Excludes other processes of this host from the same place. Raises StoreError after LOCK_TIMEOUT_S."""
    lock = place.with_name(f".lock-{place.name}")
    with store_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = open_locked(lock, timeout_s=LOCK_TIMEOUT_S)
        except BlockingIOError:
            raise StoreError(f"{place}: another process has held it for {LOCK_TIMEOUT_S:.0f} s") from None
    try:
        yield
    finally:
        os.close(fd)
