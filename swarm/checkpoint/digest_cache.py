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
from swarm.store.file_errors import store_errors
from swarm.store.own_files import read_own, replacing
from swarm.store.stamp import Stamp

RECORD_BYTES_MAX = 4 * MANIFEST_BYTES_MAX  # a manifest as a JSON string, and the stamps
RACY_NS = 2_000_000_000  # resolution of FAT, the coarsest in use

log = logging.getLogger("swarm")


class PartOf(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What some files are a part of: the digest of the artifact (or promise) that was fetched, and its files."""

    digest: Digest
    files: int


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """A manifest, and the trusted stamps of its files by path. `part_of`: the manifest has fetched files alone."""

    digest: Digest
    manifest: str
    stamps: dict[str, Stamp]
    version: Literal[2] = 2
    part_of: PartOf | None = None


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
        record = _read(self._record)
        if record and (record[0].chunk_bytes, record[0].scheme) == (chunk_bytes, scheme):
            manifest, of = record
            for entry in manifest.files:
                stamp = of.stamps.get(entry.path)
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


def remember_part(cache_dir: Path, directory: Path, fetched: Manifest, *, of: PartOf) -> None:
    """Records that the files of `fetched` were fetched into `directory`, beside those of earlier fetches of the same.

    Raises StoreError.
    """
    place = _place(cache_dir / "fetched", directory)
    files = {file.path: file for file in fetched.files}
    if known := _read(place):
        manifest, record = known
        if record.part_of is None and files.items() <= {file.path: file for file in manifest.files}.items():
            return  # they were there
        if record.part_of == of:
            files = {file.path: file for file in manifest.files} | files
    whole = len(files) == of.files
    entries = tuple(file for _, file in sorted(files.items()))
    with store_errors(cache_dir):
        _write(place, msgspec.structs.replace(fetched, files=entries), {}, part_of=None if whole else of)


def recall(cache_dir: Path, directory: Path) -> Manifest | None:
    """The manifest of the last fetch into `directory`; None without a readable record, and for a part."""
    record = _read(_place(cache_dir / "fetched", directory))
    return record[0] if record and record[1].part_of is None else None


def recall_files(cache_dir: Path, directory: Path) -> tuple[Manifest, PartOf | None] | None:
    """The manifest of the files that were fetched into `directory`, and what they are a part of; None without one."""
    record = _read(_place(cache_dir / "fetched", directory))
    return (record[0], record[1].part_of) if record else None


def last_served(cache_dir: Path, directory: Path) -> Manifest | None:
    """The manifest that the files of `directory` had when they were last hashed to be served; None without a record."""
    record = _read(_last(cache_dir, directory))
    return record[0] if record else None


def _last(cache_dir: Path, directory: Path) -> Path:
    return _place(cache_dir / "served", directory)


def _place(folder: Path, path: Path, suffix: str = "") -> Path:
    return folder / f"{hashlib.sha256(os.fsencode(os.path.realpath(path) + suffix)).hexdigest()}.json"


def _read(file: Path) -> tuple[Manifest, _Record] | None:
    try:
        record = _decoder.decode(read_own(file, bytes_max=RECORD_BYTES_MAX))
        return decode(record.manifest.encode(), digest=record.digest), record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, ManifestError) as error:
        log.warning("%s is ignored: %s", file, error)
        return None


def _write(file: Path, manifest: Manifest, stamps: dict[str, Stamp], *, part_of: PartOf | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as draft:
        draft.touch(0o600)
        record = _Record(manifest.digest, manifest.encoded.decode(), stamps, part_of=part_of)
        draft.write_bytes(msgspec.json.encode(record))
