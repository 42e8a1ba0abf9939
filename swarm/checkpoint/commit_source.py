"""A snapshot of the Hugging Face cache, or a download to a directory, as a source: a model, or a part of its commit.

A snapshot has the files that some program wanted: an interrupted download lacks shards, an engine leaves `.bin` files
and pictures out. Other members may have the rest. `part_of` describes the files as a part of a larger artifact.

Must not know: peers, which members there are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from swarm.checkpoint import blob_check, hf_cache, hub_tree, local_download, manifest_builder, weight_index
from swarm.checkpoint.files import CheckpointFile, SkippedPath, walk
from swarm.content.manifest import Chunk, FileEntry, Manifest
from swarm.errors import CheckpointIncomplete, ManifestInvalid, SourceChanged
from swarm.protocol.messages import Origin
from swarm.store import FileSpan, IsRight
from swarm.store.directory_source import DirectorySource
from swarm.store.file_errors import store_errors
from swarm.store.part import PartSource, narrowed
from swarm.store.stamp import Stamp

log = logging.getLogger("swarm")


class CommitSource:
    """The files of a snapshot. `missing` says which files of the model are not here; empty for a whole model."""

    def __init__(self, source: DirectorySource, found: Sequence[CheckpointFile], *, missing: str) -> None:
        self.manifest = source.manifest
        self.missing = missing
        self._source = source
        self._found = {file.path: file for file in found}

    def spans(self, chunk: Chunk) -> Iterator[FileSpan]:
        """See Source."""
        return self._source.spans(chunk)

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """The chunk's bytes; a view is valid until the next."""
        return self._source.read(chunk)

    def demand_unchanged(self, is_right: IsRight) -> None:
        """See WatchedSource."""
        self._source.demand_unchanged(is_right)

    def close(self) -> None:
        """See Source."""
        self._source.close()

    def promised(self, promise: Manifest) -> DirectorySource | None:
        """The files as a source of a promise; None if that has other paths or sizes."""
        return self._source.promised(promise)

    def would_be_whole(self, paths: Iterable[str]) -> bool:
        """Whether the model would lack nothing with files at all these paths, as far as its files here say."""
        try:
            return weight_index.would_be_whole(paths, list(self._found.values()))
        except OSError:  # an index is gone, or cannot be read now
            return False

    def part_of(self, whole: Manifest) -> PartSource | None:
        """Its files as a part of `whole`; None if they have other contents there. Blocks while they are hashed."""
        entries = {file.path: file for file in whole.files}
        own = {file.path: file for file in self.manifest.files}
        if not own.keys() <= entries.keys():
            return None
        cut_otherwise = {path for path, file in own.items() if not _same(entries[path], file)}
        if manifest_builder.verify(self._source.root, narrowed(whole, cut_otherwise)):
            return None
        part = narrowed(whole, set(own))
        here = [self._found[file.path] for file in part.files]
        try:
            source = DirectorySource(
                self._source.root, part, paths=[file.real for file in here], stamps=[file.stamp for file in here]
            )
        except SourceChanged:  # another size
            return None
        return PartSource(whole, source)

    def __repr__(self) -> str:
        return f"<CommitSource {self._source!r}{', a part' if self.missing else ''}>"


def fetched(path: Path, manifest: Manifest, stamps: Mapping[str, Stamp]) -> CommitSource | None:
    """A source of all files of a fetch, which are at `path` now. `stamps`: of the files when they were verified.

    None if they changed since, or have an index that is none.
    """
    found = [
        CheckpointFile(file.path, Path(os.path.realpath(path / file.path)), stamps[file.path])
        for file in manifest.files
    ]
    try:
        weight_index.indexes(found)
        source = DirectorySource(path, manifest, paths=[file.real for file in found], stamps=[f.stamp for f in found])
    except (ManifestInvalid, SourceChanged, OSError) as error:
        log.debug("%s: is no part of its commit: %s", path, error)
        return None
    return CommitSource(source, found, missing="")


def downloaded(
    path: Path, *, cache_dir: Path, grid: Mapping[str, Any]
) -> tuple[CommitSource, list[SkippedPath], Origin] | None:
    """A source of a directory huggingface_hub filled with `local_dir`, and its provenance (`local_origin`); else None.

    Raises as `snapshot` does.
    """
    origin = local_origin(path, cache_dir=cache_dir)
    return None if origin is None else (*snapshot(path, cache_dir=cache_dir, grid=grid), origin)


def local_origin(path: Path, *, cache_dir: Path) -> Origin | None:
    """The provenance of a directory that huggingface_hub filled with `local_dir`.

    None for other directories, and if its files are not as they came, or not of one commit. Blocks while they are
    hashed. Raises ManifestInvalid, SourceChanged and StoreError.
    """
    with store_errors(path):
        names = local_download.names(path)
        if not names:
            return None
        found, _ = walk(path)
        commit = local_download.commit(path, found, cache_dir=cache_dir)
        if commit is None:
            return None
        beside = hf_cache.beside(path, names)
    etags = {file.path: names[file.path] for file in found}
    return Origin(commit, etags, (), {file: data for file, data in beside.items() if file in names})


def snapshot(path: Path, *, cache_dir: Path, grid: Mapping[str, Any]) -> tuple[CommitSource, list[SkippedPath]]:
    """A source of a snapshot directory, and the skipped paths. `grid`: as for `manifest_builder.checkpoint`.

    Damaged files and links to missing blobs count as missing; with the hub's listing, other files are left out. Raises
    as `manifest_builder.checkpoint` does, except CheckpointIncomplete.
    """
    with store_errors(path):
        lost: list[str] = []
        found, skipped = walk(path, dangling=lost)
        names = hf_cache.hub_names(path)
        damaged = blob_check.damaged(found, names, folder=path.absolute().parent.parent, cache_dir=cache_dir)
        listed = hub_tree.read(path.parent.parent, path.name) if hf_cache.model_id_of(path) else None
        added = [file.path for file in found if listed is not None and file.path not in listed]
        damaged += [f.path for f in found if listed and f.path in listed and f.stamp.size != listed[f.path].size]
        skipped += [SkippedPath(added_path, "is no file of the commit") for added_path in added]
        found = [file for file in found if file.path not in damaged and file.path not in added]
        missing = _named(damaged, "damaged") or _named(lost, "missing")
        try:
            weight_index.indexes(found)
        except CheckpointIncomplete as error:
            missing = missing or str(error)
        if missing and not found:
            raise CheckpointIncomplete(str(path), f"nothing to serve: {missing}")
        if missing:
            source = manifest_builder.part(path, found, cache_dir=cache_dir, **grid)
        else:
            _, source, _ = manifest_builder.checkpoint(path, cache_dir=cache_dir, **grid, without=added)
    return CommitSource(source, found, missing=missing), skipped


def _same(one: FileEntry, other: FileEntry) -> bool:
    return (one.size, one.chunks, one.blake3) == (other.size, other.chunks, other.blake3)


def _named(paths: Sequence[str], what: str) -> str:
    if not paths:
        return ""
    more = f" and {len(paths) - 1} more files" if len(paths) > 1 else ""
    return f"{paths[0]}{more}: {what} in the Hugging Face cache"
