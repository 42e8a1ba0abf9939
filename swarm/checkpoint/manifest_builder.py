"""Builds manifests of a checkpoint, of files that are none, and of tensors; checks directories against manifests.

Owns how files are hashed in parallel, and the cache that spares hashing them again:

    walk -> stamps -> cache: a file that still has its stamp is not read again -> hash the others -> stamps once more

The cache trusts size, modification time and inode, and only of files that had been left alone for `RACY_NS` when they
were hashed: a file system's clock may be so coarse that a file is written again without its time changing.

Files are read, not mapped: a mapped file that somebody truncates kills the process with SIGBUS.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec

from swarm.checkpoint.files import CheckpointFile, SkippedPath, walk
from swarm.content import safetensors_header
from swarm.content.manifest import (
    CHUNK_BYTES_MAX,
    CHUNKS_MAX,
    LEAF_BYTES_DEFAULT,
    LEAF_BYTES_MAX,
    LEAF_BYTES_MIN,
    ChunkEntry,
    ChunkHash,
    Digest,
    FileEntry,
    HashScheme,
    Manifest,
    Tier,
    cut,
    decode,
    default_chunk_bytes,
    units,
)
from swarm.errors import ManifestError, ManifestInvalid, SettingsError, SourceChanged
from swarm.hashing.cpu import LeafHasher, chunk_digest, demand
from swarm.hashing.cuda import GPU_LEAF_BYTES, chunk_digests
from swarm.store import DeviceView
from swarm.store.directory import DirectorySource
from swarm.store.disk import Stamp, replacing, store_errors
from swarm.store.tensors import VIRTUAL_PATH, TensorSource

if TYPE_CHECKING:
    import torch

JOB_BYTES = 16 << 20  # hashed by one thread at a time: hides a job's fixed cost, and one big file uses all threads
SCRATCH_BYTES = 1 << 20
INDEX_BYTES_MAX = 100 << 20  # an index of 100,000 tensors is about 10 MB
RACY_NS = 2_000_000_000  # the coarsest clock in use, FAT's
NAMES_SHOWN = 3

Progress = Callable[[int, int], None]
T = TypeVar("T")

log = logging.getLogger("swarm")


def checkpoint(
    path: Path,
    *,
    cache_dir: Path,
    chunk_bytes: int | None = None,
    leaf_bytes: int | None = None,
    chunk_hash: ChunkHash = "xxh3-128",
    progress: Progress | None = None,
    threads: int | None = None,
) -> tuple[Manifest, DirectorySource, list[SkippedPath]]:
    """The manifest of a model directory, or of one safetensors file; a source that serves it; and what was left out.

    `progress(done, total)` is told bytes, on the calling thread. `threads` None is one per core. Raises ManifestInvalid
    when the files cannot be an artifact, or are not all that an index names, SettingsError for sizes out of bounds,
    SourceChanged when a file changes meanwhile, StoreError when one cannot be read.
    """
    with store_errors(path):
        found, skipped = walk(path)
        grid = _grid(chunk_bytes, leaf_bytes, chunk_hash, total_bytes=sum(file.stamp.size for file in found))
        _check_indexes(found)
        source = _hashed(path, found, grid, cache_dir=cache_dir, progress=progress, threads=threads)
    return source.manifest, source, skipped


def files(path: Path, *, cache_dir: Path) -> DirectorySource:
    """A source of the files of a directory that is no checkpoint: what an index names need not be there.

    Raises as `checkpoint` does.
    """
    with store_errors(path):
        found, _ = walk(path)
        grid = _grid(None, None, total_bytes=sum(file.stamp.size for file in found))
        return _hashed(path, found, grid, cache_dir=cache_dir)


def known(
    path: Path,
    *,
    cache_dir: Path,
    chunk_bytes: int | None = None,
    leaf_bytes: int | None = None,
    chunk_hash: ChunkHash = "xxh3-128",
) -> Manifest | None:
    """The manifest that `checkpoint` would build, if no byte has to be read for it; None when a file is not known.

    Raises as `checkpoint` does.
    """
    with store_errors(path):
        found, _ = walk(path)
        grid = _grid(chunk_bytes, leaf_bytes, chunk_hash, total_bytes=sum(file.stamp.size for file in found))
        entries = _Cache(cache_dir, path, grid).load(found)
    if len(entries) < len(found):
        return None
    return Manifest(1, "checkpoint", "", grid.scheme, grid.chunk_bytes, tuple(entries[f.path] for f in found))


def tensors(
    given: Mapping[str, torch.Tensor],
    *,
    chunk_bytes: int | None = None,
    leaf_bytes: int | None = None,
    chunk_hash: ChunkHash = "xxh3-128",
    threads: int | None = None,
    loaded_as: str | None = None,
) -> TensorSource:
    """A source that serves a state dict as one safetensors file. Raises what TensorSource does.

    `loaded_as` is the fingerprint of the layout that an engine loaded them in; None: they are a checkpoint's.
    """
    source = TensorSource(given)
    if source.devices:
        if chunk_hash != "xxh3-128":
            raise SettingsError("chunk_hash", f"{chunk_hash} is for the CPU; tensors of a GPU are hashed with xxh3-128")
        leaf_bytes = GPU_LEAF_BYTES if leaf_bytes is None else leaf_bytes
        chunk_bytes = default_chunk_bytes(source.size, on_gpu=True) if chunk_bytes is None else chunk_bytes
    grid = _grid(chunk_bytes, leaf_bytes, chunk_hash, total_bytes=source.size)
    sizes = cut(source.units(), grid.chunk_bytes)
    ranges = list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))
    digests = _hash_on_gpus(source, ranges, grid.scheme)
    rest = [part for part in ranges if part not in digests]
    with ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="swarm-hash") as pool:
        hashed = pool.map(lambda part: chunk_digest(grid.scheme, source.read(*part)), rest)
        digests |= zip(rest, hashed, strict=True)
    chunks = tuple(ChunkEntry(size, digests[at, size].hex()) for at, size in ranges)
    file = FileEntry(VIRTUAL_PATH, source.size, source.header, chunks)
    tier: Tier = "checkpoint" if loaded_as is None else "loaded"
    source.manifest = Manifest(1, tier, loaded_as or "", grid.scheme, grid.chunk_bytes, (file,))
    decode(source.manifest.encoded, digest=source.manifest.digest)
    return source


def verify(directory: Path, manifest: Manifest, *, threads: int | None = None) -> list[str]:
    """What is wrong with the files of a directory, a line for each file; empty when they are the manifest's.

    Files that the manifest does not name are not looked at. What cannot be read is a problem, not an exception.
    """
    problems: dict[str, str] = {}
    jobs: list[_Job] = []
    for file in manifest.files:
        if problem := _differs(directory / file.path, file):
            problems[file.path] = problem
        else:
            jobs += _jobs(directory / file.path, [chunk.size for chunk in file.chunks])
    digests: dict[Path, list[bytes]] = {}
    for job, hashed in _in_parallel(lambda job: _hash_or_problem(job, manifest.scheme), jobs, threads=threads):
        if isinstance(hashed, str):
            problems[job.path.relative_to(directory).as_posix()] = hashed
        else:
            digests.setdefault(job.path, []).extend(hashed)
    for file in manifest.files:
        hexadecimal = [digest.hex() for digest in digests.get(directory / file.path, [])]
        if file.path not in problems and (problem := _mismatch(file, hexadecimal)):
            problems[file.path] = problem
    return [f"{path}: {problem}" for path, problem in sorted(problems.items())]


def remember(cache_dir: Path, directory: Path, manifest: Manifest) -> None:
    """Notes that `directory` was fetched as `manifest`, for `recall`. Raises StoreError."""
    with store_errors(cache_dir):
        _write(_fetched(cache_dir, directory), _Kept(manifest.digest, manifest.encoded.decode(), {}))


def recall(cache_dir: Path, directory: Path) -> Manifest | None:
    """The manifest that `directory` was last fetched as; None when it never was, or the note is unreadable."""
    kept = _load(_fetched(cache_dir, directory))
    return kept[0] if kept else None


@dataclass(frozen=True, slots=True)
class _Grid:
    chunk_bytes: int
    scheme: HashScheme


@dataclass(frozen=True, slots=True)
class _Job:
    """Consecutive chunks of one file, from `offset` on."""

    path: Path
    offset: int
    sizes: Sequence[int]
    stamp: Stamp | None = None


class _Kept(msgspec.Struct, forbid_unknown_fields=True):
    """A manifest on the disk, and the stamps (size, mtime_ns, inode) of those of its files that had settled."""

    digest: Digest
    manifest: str
    stamps: dict[str, tuple[int, int, int]]
    version: Literal[1] = 1


_kept_decoder = msgspec.json.Decoder(_Kept)


def _grid(
    chunk_bytes: int | None, leaf_bytes: int | None, chunk_hash: ChunkHash = "xxh3-128", *, total_bytes: int
) -> _Grid:
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(total_bytes)
    if leaf_bytes is None:
        leaf_bytes = LEAF_BYTES_DEFAULT
    for name, value, least, most in (
        ("chunk_bytes", chunk_bytes, 1, CHUNK_BYTES_MAX),
        ("leaf_bytes", leaf_bytes, LEAF_BYTES_MIN, LEAF_BYTES_MAX),
    ):
        if not least <= value <= most:
            raise SettingsError(name, f"{value} is not between {least} and {most}")
    scheme = HashScheme(chunk_hash, leaf_bytes)
    demand(scheme)
    return _Grid(chunk_bytes, scheme)


def _hash_on_gpus(
    source: TensorSource, ranges: Sequence[tuple[int, int]], scheme: HashScheme
) -> dict[tuple[int, int], bytes]:
    """Digests of those ranges (offset, size) that lie on one GPU, by range."""
    on_gpu: dict[int, dict[tuple[int, int], list[DeviceView]]] = {device: {} for device in source.devices}
    for part in ranges if source.devices else ():
        views = list(source.device_read(*part))
        lent = [view for view in views if isinstance(view, DeviceView)]
        if len(lent) == len(views) and len({view.device for view in lent}) == 1:
            on_gpu[lent[0].device][part] = lent
    digests: dict[tuple[int, int], bytes] = {}
    for chunks in on_gpu.values():
        if chunks:
            digests |= zip(chunks, chunk_digests(scheme, list(chunks.values())), strict=True)
    return digests


def _hashed(
    path: Path,
    found: Sequence[CheckpointFile],
    grid: _Grid,
    *,
    cache_dir: Path,
    progress: Progress | None = None,
    threads: int | None = None,
) -> DirectorySource:
    """A source of these files, hashing those that the cache does not know."""
    began_ns = time.time_ns()
    cache = _Cache(cache_dir, path, grid)
    known = cache.load(found)
    entries = _describe(found, known, grid, progress=progress, threads=threads)
    manifest = Manifest(1, "checkpoint", "", grid.scheme, grid.chunk_bytes, tuple(entries))
    decode(manifest.encoded, digest=manifest.digest)  # what no peer would accept must not be announced
    settled = [file for file in found if file.path in known or file.stamp.mtime_ns < began_ns - RACY_NS]
    if len(known) < len(found):
        cache.save(manifest, settled)
    return DirectorySource(path, manifest, paths=[f.real for f in found], stamps=[f.stamp for f in found])


def _check_indexes(found: Sequence[CheckpointFile]) -> None:
    """Raises ManifestInvalid unless every shard that a safetensors index names is there."""
    here = {file.path for file in found}
    for file in found:
        if file.path.endswith(".safetensors.index.json"):
            folder = PurePosixPath(file.path).parent
            missing = sorted(name for name in _shards(file) if str(folder / name) not in here)
            if missing:
                shown = ", ".join(missing[:NAMES_SHOWN]) + (", …" if len(missing) > NAMES_SHOWN else "")
                raise ManifestInvalid(file.path, f"{len(missing)} of the files it names are missing: {shown}")


def _shards(index: CheckpointFile) -> set[str]:
    if index.stamp.size > INDEX_BYTES_MAX:
        raise ManifestInvalid(index.path, f"{index.stamp.size} bytes; an index has at most {INDEX_BYTES_MAX}")
    try:
        table = json.loads(index.real.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(index.path, f"is not JSON ({error})") from error
    shards = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ManifestInvalid(index.path, "holds no weight_map from tensor names to file names")
    return set(shards.values())


def _describe(
    found: Sequence[CheckpointFile],
    known: dict[str, FileEntry],
    grid: _Grid,
    *,
    progress: Progress | None,
    threads: int | None,
) -> list[FileEntry]:
    """Entries for all files, hashing those that are not known."""
    plans = {file.path: _plan(file, grid) for file in found if file.path not in known}
    chunks = sum(len(sizes) for _, sizes in plans.values()) + sum(len(entry.chunks) for entry in known.values())
    if chunks > CHUNKS_MAX:
        raise SettingsError(
            "chunk_bytes", f"{grid.chunk_bytes} makes {chunks} chunks; at most {CHUNKS_MAX} are allowed"
        )
    jobs = [job for file in found if file.path in plans for job in _jobs(file.real, plans[file.path][1], file.stamp)]
    total_bytes = sum(file.stamp.size for file in found)
    done_bytes = total_bytes - sum(sum(job.sizes) for job in jobs)
    if progress is not None:
        progress(done_bytes, total_bytes)
    hashed: list[ChunkEntry] = []
    for job, digests in _in_parallel(lambda job: _hash(job, grid.scheme), jobs, threads=threads):
        hashed += [ChunkEntry(size, digest.hex()) for size, digest in zip(job.sizes, digests, strict=True)]
        done_bytes += sum(job.sizes)
        if progress is not None:
            progress(done_bytes, total_bytes)
    rest = iter(hashed)  # jobs came back in the order of the files
    entries = []
    for file in found:
        entry = known.get(file.path)
        if entry is None:
            header, sizes = plans[file.path]
            entry = FileEntry(file.path, file.stamp.size, header, tuple(next(rest) for _ in sizes))
        entries.append(entry)
    return entries


def _plan(file: CheckpointFile, grid: _Grid) -> tuple[str, list[int]]:
    """A file's safetensors header, '' for other files, and the sizes of its chunks."""
    if not file.path.endswith(".safetensors"):
        return "", cut([file.stamp.size], grid.chunk_bytes)
    with file.real.open("rb") as stream:
        header, tensors = safetensors_header.read(stream, subject=file.path, file_bytes=file.stamp.size)
    return header.decode(), cut(units(file.stamp.size, tensors), grid.chunk_bytes)


def _jobs(path: Path, sizes: Sequence[int], stamp: Stamp | None = None) -> Iterator[_Job]:
    first, offset, size = 0, 0, 0
    for position, chunk_bytes in enumerate(sizes, 1):
        size += chunk_bytes
        if size >= JOB_BYTES or position == len(sizes):
            yield _Job(path, offset, sizes[first:position], stamp)
            first, offset, size = position, offset + size, 0


def _in_parallel(work: Callable[[_Job], T], jobs: Sequence[_Job], *, threads: int | None) -> Iterator[tuple[_Job, T]]:
    """Jobs and their results, in order. The first failure is raised, and drops the jobs that have not begun."""
    pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="swarm-hash")
    try:
        yield from zip(jobs, pool.map(work, jobs), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _hash(job: _Job, scheme: HashScheme) -> list[bytes]:
    """Digests of a job's chunks. Raises SourceChanged when the file is not, or no longer, what its stamp says."""
    try:
        fd = os.open(job.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SourceChanged(job.path, "it is gone") from error
    try:
        if job.stamp is not None:
            job.stamp.check_open(job.path, fd)
        scratch = memoryview(bytearray(min(SCRATCH_BYTES, max(job.sizes))))
        offset, digests = job.offset, []
        for size in job.sizes:
            digests.append(_hash_chunk(fd, offset, size, scheme=scheme, scratch=scratch, path=job.path))
            offset += size
        if job.stamp is not None:
            job.stamp.check(job.path, fd)
        return digests
    finally:
        os.close(fd)


def _hash_chunk(fd: int, offset: int, size: int, *, scheme: HashScheme, scratch: memoryview, path: Path) -> bytes:
    hasher = LeafHasher(scheme)
    while size:
        filled = os.preadv(fd, [scratch[:size]], offset)
        if not filled:
            raise SourceChanged(path, f"it ends at byte {offset}")
        hasher.update(scratch[:filled])
        offset, size = offset + filled, size - filled
    return hasher.digest()


def _differs(path: Path, file: FileEntry) -> str | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    return None if status.st_size == file.size else f"has {status.st_size} bytes instead of {file.size}"


def _hash_or_problem(job: _Job, scheme: HashScheme) -> list[bytes] | str:
    try:
        return _hash(job, scheme)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except SourceChanged as error:
        return f"changed while it was read: {error.why}"


def _mismatch(file: FileEntry, digests: Sequence[str]) -> str | None:
    offset, wrong, first = 0, 0, 0
    for chunk, digest in zip(file.chunks, digests, strict=True):
        if digest != chunk.digest:
            first = offset if not wrong else first
            wrong += 1
        offset += chunk.size
    if not wrong:
        return None
    where = f"{wrong} of {len(file.chunks)} chunks differ, the first is the one at byte {first}"
    return f"{where}; remove the file and fetch again, the others are kept"


class _Cache:
    """What is known of the files below one path from the last time they were hashed on this grid."""

    def __init__(self, cache_dir: Path, path: Path, grid: _Grid) -> None:
        key = f"{os.path.realpath(path)}\0{grid.chunk_bytes}\0{grid.scheme.name}\0{grid.scheme.leaf_bytes}"
        self._place = cache_dir / "manifests" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()}.json"
        self._grid = grid

    def load(self, found: Sequence[CheckpointFile]) -> dict[str, FileEntry]:
        """Entries of those files that still have the stamps they had. Nothing when the cache is unreadable."""
        kept = _load(self._place)
        if kept is None or (kept[0].chunk_bytes, kept[0].scheme) != (self._grid.chunk_bytes, self._grid.scheme):
            return {}
        entries = {entry.path: entry for entry in kept[0].files}
        stamps = {path: Stamp(*stamp) for path, stamp in kept[1].items()}
        return {
            file.path: entries[file.path]
            for file in found
            if file.path in entries
            and stamps.get(file.path) == file.stamp
            and entries[file.path].size == file.stamp.size
        }

    def save(self, manifest: Manifest, settled: Sequence[CheckpointFile]) -> None:
        """Keeps the manifest, and the stamps of files that had settled. Failing is logged: serving goes on without."""
        stamps = {file.path: (file.stamp.size, file.stamp.mtime_ns, file.stamp.inode) for file in settled}
        try:
            _write(self._place, _Kept(manifest.digest, manifest.encoded.decode(), stamps))
        except OSError as error:
            log.warning("%s: the manifest is not cached, files will be hashed again: %s", self._place, error.strerror)


def _fetched(cache_dir: Path, directory: Path) -> Path:
    return cache_dir / "fetched" / f"{hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()}.json"


def _load(place: Path) -> tuple[Manifest, dict[str, tuple[int, int, int]]] | None:
    try:
        kept = _kept_decoder.decode(place.read_bytes())
        return decode(kept.manifest.encode(), digest=kept.digest), kept.stamps
    except FileNotFoundError:
        return None
    except (OSError, ValueError, msgspec.DecodeError, RecursionError, ManifestError) as error:
        log.warning("%s is ignored: %s", place, error)
        return None


def _write(place: Path, kept: _Kept) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as draft:
        draft.touch(0o600)
        draft.write_bytes(msgspec.json.encode(kept))
