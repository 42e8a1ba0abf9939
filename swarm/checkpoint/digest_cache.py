"""Manifests kept in the cache directory: unchanged files are not hashed again, fetched directories are recognised.

    <cache>/manifests/<sha256 of path and chunk grid>.json    digests of hashed files, with their stamps
    <cache>/fetched/<sha256 of path>.json                     the manifest that a directory was fetched as
    <cache>/served/<sha256 of path>.json                      the manifest that it was hashed as last

A stamp (size, mtime, ctime, inode) is trusted only if the file was older than `RACY_NS` when it was hashed. A younger
file can be written again without a change of its times (git calls this racily clean). The age is that of the ctime, the
only time that a program cannot set.

Records that another user can have written are ignored: they could say anything of the files here.

Must not know: how files are hashed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from swarm.checkpoint.files import CheckpointFile
from swarm.content.manifest import MANIFEST_BYTES_MAX, Digest, FileEntry, HashScheme, Manifest, decode
from swarm.errors import ManifestError
from swarm.store.disk import Stamp, read_own, replacing, store_errors

RECORD_BYTES_MAX = 4 * MANIFEST_BYTES_MAX  # a manifest as a JSON string, and the stamps
RACY_NS = 2_000_000_000  # resolution of FAT, the coarsest in use

log = logging.getLogger("swarm")


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """A manifest, and the trusted stamps of its files by path."""

    digest: Digest
    manifest: str
    stamps: dict[str, Stamp]
    version: Literal[2] = 2


_decoder = msgspec.json.Decoder(_Record)


class DigestCache:
    """The cached entries of files below `path`, by path in `known`, for a chunk size and a scheme."""

    def __init__(
        self, cache_dir: Path, path: Path, files: Sequence[CheckpointFile], *, chunk_bytes: int, scheme: HashScheme
    ) -> None:
        self._began_ns = time.time_ns()
        self._record = _place(cache_dir / "manifests", path, f"\0{chunk_bytes}\0{scheme.name}\0{scheme.leaf_bytes}")
        self._last = _last(cache_dir, path)
        self._stamps = {file.path: file.stamp for file in files}
        self.known: dict[str, FileEntry] = {}
        manifest, stamps = _read(self._record) or (None, {})
        if manifest is not None and (manifest.chunk_bytes, manifest.scheme) == (chunk_bytes, scheme):
            for entry in manifest.files:
                stamp = stamps.get(entry.path)
                fresh = stamp and stamp == self._stamps.get(entry.path) and stamp.size == entry.size
                if fresh and len(entry.blake3) == len(entry.chunks):
                    self.known[entry.path] = entry

    def save(self, manifest: Manifest) -> None:
        """Writes the manifest of all files, unless all were known. A failure is logged only."""
        if len(self.known) == len(self._stamps):
            return
        racy_ns = self._began_ns - RACY_NS
        trusted = {
            path: stamp for path, stamp in self._stamps.items() if path in self.known or stamp.ctime_ns < racy_ns
        }
        try:
            _write(self._record, manifest, trusted)
            _write(self._last, manifest, {})
        except OSError as error:
            log.warning("%s: the manifest is not cached, files will be hashed again: %s", self._record, error.strerror)


def remember(cache_dir: Path, directory: Path, manifest: Manifest) -> None:
    """Records that `directory` was fetched as `manifest`, for `recall`. Raises StoreError."""
    with store_errors(cache_dir):
        _write(_place(cache_dir / "fetched", directory), manifest, {})


def recall(cache_dir: Path, directory: Path) -> Manifest | None:
    """The manifest of the last fetch into `directory`; None without a readable record."""
    record = _read(_place(cache_dir / "fetched", directory))
    return record[0] if record else None


def last_served(cache_dir: Path, directory: Path) -> Manifest | None:
    """The manifest that the files of `directory` had when they were last hashed to be served; None without a record."""
    record = _read(_last(cache_dir, directory))
    return record[0] if record else None


def _last(cache_dir: Path, directory: Path) -> Path:
    return _place(cache_dir / "served", directory)


def _place(folder: Path, path: Path, suffix: str = "") -> Path:
    return folder / f"{hashlib.sha256(os.fsencode(os.path.realpath(path) + suffix)).hexdigest()}.json"


def _read(file: Path) -> tuple[Manifest, dict[str, Stamp]] | None:
    try:
        record = _decoder.decode(read_own(file, bytes_max=RECORD_BYTES_MAX))
        return decode(record.manifest.encode(), digest=record.digest), record.stamps
    except FileNotFoundError:
        return None
    except (OSError, ValueError, msgspec.DecodeError, RecursionError, ManifestError) as error:
        log.warning("%s is ignored: %s", file, error)
        return None


def _write(file: Path, manifest: Manifest, stamps: dict[str, Stamp]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as draft:
        draft.touch(0o600)
        draft.write_bytes(msgspec.json.encode(_Record(manifest.digest, manifest.encoded.decode(), stamps)))
