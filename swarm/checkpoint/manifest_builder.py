"""Builds the manifests of model directories, other directories and tensors, and checks directories against manifests.

    walk -> stamps -> digest cache -> hash the other files in parallel -> compare the stamps -> source

Files are read, not mapped: a mapped file that another process truncates kills this process with SIGBUS.

Must not know: peers, transports.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from swarm.checkpoint import blob_check, hf_cache, weight_files, weight_index
from swarm.checkpoint.digest_cache import DigestCache, recall
from swarm.checkpoint.files import CheckpointFile, SkippedPath, walk
from swarm.content import safetensors_header
from swarm.content.manifest import (
    CHUNK_BYTES_MAX,
    CHUNKS_MAX,
    LEAF_BYTES_DEFAULT,
    LEAF_BYTES_MAX,
    LEAF_BYTES_MIN,
    LEAF_BYTES_STEP,
    Chunk,
    ChunkEntry,
    Digests,
    FileEntry,
    HashScheme,
    Manifest,
    Tier,
    cut,
    decode,
    default_chunk_bytes,
    units,
)
from swarm.errors import ManifestInvalid, SettingsError, SourceChanged
from swarm.hashing.cpu import ChunkHasher
from swarm.hashing.cpu import chunk_digests as digests_on_cpu
from swarm.hashing.cuda import GPU_LEAF_BYTES, chunk_digests
from swarm.store import DeviceView
from swarm.store.directory_source import DirectorySource
from swarm.store.file_errors import store_errors
from swarm.store.own_files import demand_there, open_regular
from swarm.store.stamp import Stamp
from swarm.store.tensor_source import VIRTUAL_PATH, TensorSource

if TYPE_CHECKING:
    import torch

JOB_BYTES = 16 << 20  # hashed by a thread at a time: hides the cost of a job, and a single file uses all threads
SCRATCH_BYTES = (
    512 << 10
)  # both hashes read it out of a core's cache: 2.98 GB/s of processor time; 1 MiB 2.72, 4 MiB 2.40

Progress = Callable[[int, int], None]
J = TypeVar("J")
T = TypeVar("T")


def checkpoint(
    path: Path,
    *,
    cache_dir: Path,
    chunk_bytes: int | None = None,
    leaf_bytes: int | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    without: Collection[str] = (),
) -> tuple[Manifest, DirectorySource, list[SkippedPath]]:
    """The manifest of a model directory or a safetensors file, a source that serves it, and the skipped paths.

    `without`: paths to leave out. `progress(done_bytes, total_bytes)` is called on this thread. `threads` defaults to
    the number of cores. Raises ManifestInvalid if the files cannot be an artifact, are incomplete (`weight_index`) or
    damaged (`blob_check`), SettingsError for sizes out of bounds, SourceChanged if a file changes meanwhile, StoreError
    if it cannot be read.
    """
    with store_errors(path):
        found, skipped = walk(path)
        found = [file for file in found if file.path not in without]
        grid = _grid(_size(found), chunk_bytes, leaf_bytes)
        maps = weight_index.indexes(found)
        names = hf_cache.hub_names(path)
        refuse_damaged(blob_check.damaged(found, names, folder=path.absolute().parent.parent, cache_dir=cache_dir))
        source = _hashed(path, found, grid, maps, cache_dir=cache_dir, progress=progress, threads=threads)
        if not names.keys() >= {file.path for file in found}:
            refuse_damaged(_changed_since_fetched(path, source.manifest, names, cache_dir=cache_dir))
    return source.manifest, source, skipped


def part(
    path: Path,
    found: Sequence[CheckpointFile],
    *,
    cache_dir: Path,
    chunk_bytes: int | None = None,
    leaf_bytes: int | None = None,
) -> DirectorySource:
    """A source of some files of a directory; shards of an index may be missing. Raises as `checkpoint` does."""
    with store_errors(path):
        grid = _grid(_size(found), chunk_bytes, leaf_bytes)
        return _hashed(path, found, grid, {}, cache_dir=cache_dir)


def files(path: Path, *, cache_dir: Path) -> DirectorySource:
    """A source of any directory; shards of an index may be missing. Raises as `checkpoint` does."""
    with store_errors(path):
        found, _ = walk(path)
        return _hashed(path, found, _grid(_size(found)), {}, cache_dir=cache_dir)


def known(
    path: Path,
    *,
    cache_dir: Path,
    chunk_bytes: int | None = None,
    leaf_bytes: int | None = None,
) -> Manifest | None:
    """The manifest that `checkpoint` would build, from the cache alone; None if a file is not cached.

    Raises as `checkpoint` does.
    """
    with store_errors(path):
        found, _ = walk(path)
        grid = _grid(_size(found), chunk_bytes, leaf_bytes)
        cache = DigestCache(cache_dir, path, found, chunk_bytes=grid.chunk_bytes, scheme=grid.scheme)
        maps = weight_index.indexes(found)
        _forget_other_tensors(cache.known, weight_index.no_tensors(found, maps))
    if len(cache.known) < len(found):
        return None
    return grid.manifest(_with_unused([cache.known[file.path] for file in found], maps))


def tensors(
    given: Mapping[str, torch.Tensor],
    *,
    chunk_bytes: int | None = None,
    leaf_bytes: int | None = None,
    threads: int | None = None,
    loaded_as: str | None = None,
) -> TensorSource:
    """A source that serves a state dict as a single safetensors file. Raises as TensorSource does.

    `loaded_as`: fingerprint of the layout that an engine loaded; None for tensors of a checkpoint.
    """
    source = TensorSource(given)
    if source.devices:
        leaf_bytes = GPU_LEAF_BYTES if leaf_bytes is None else leaf_bytes
        chunk_bytes = default_chunk_bytes(source.size, on_gpu=True) if chunk_bytes is None else chunk_bytes
    grid = _grid(source.size, chunk_bytes, leaf_bytes)
    sizes = cut(source.units(), grid.chunk_bytes)
    ranges = list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))
    digests = _hash_on_gpus(source, ranges, grid.scheme)
    rest = [part for part in ranges if part not in digests]
    digests |= _in_parallel(
        lambda part: digests_on_cpu(grid.scheme, source.read(*part), blake3=True), rest, threads=threads
    )
    file = _entry(VIRTUAL_PATH, source.size, source.header, sizes, [digests[part] for part in ranges])
    source.manifest = grid.manifest([file], loaded_as=loaded_as)
    decode(source.manifest.encoded, digest=source.manifest.digest)
    return source


def verify(directory: Path, manifest: Manifest) -> list[str]:
    """The problems of a directory's files, a line for each file; empty if they match the manifest.

    Other files are ignored. A file that cannot be read is a problem, not an exception.
    """
    problems: dict[str, str] = {}
    chunks = {file.path: list(parts) for file, parts in _by_file(manifest)}
    wrong: dict[str, list[int]] = {}  # offsets by path
    jobs: list[_Job] = []
    for file in manifest.files:
        if problem := _differs(directory / file.path, file):
            problems[file.path] = problem
        else:
            jobs += _jobs(directory / file.path, [chunk.size for chunk in file.chunks])
    hash_job = partial(_hash_or_problem, scheme=manifest.scheme, blake3=manifest.has_blake3)
    for job, hashed in _in_parallel(hash_job, jobs):
        path = job.path.relative_to(directory).as_posix()
        if isinstance(hashed, str):
            problems[path] = hashed
            continue
        for found in hashed:
            chunk = chunks[path].pop(0)
            if not chunk.has(found):
                wrong.setdefault(path, []).append(chunk.offset)
    for file in manifest.files:
        if file.path in wrong and file.path not in problems:
            problems[file.path] = (
                f"{len(wrong[file.path])} of {len(file.chunks)} chunks differ, the first is the one at byte "
                f"{wrong[file.path][0]}; remove the file and fetch again, the others are kept"
            )
    return [f"{path}: {problem}" for path, problem in sorted(problems.items())]


@dataclass(frozen=True, slots=True)
class _Grid:
    chunk_bytes: int
    scheme: HashScheme

    def manifest(self, entries: Iterable[FileEntry], *, loaded_as: str | None = None) -> Manifest:
        tier: Tier = "checkpoint" if loaded_as is None else "loaded"
        return Manifest(1, tier, loaded_as or "", self.scheme, self.chunk_bytes, tuple(entries))


@dataclass(frozen=True, slots=True)
class _Job:
    """Consecutive chunks of a file from `offset` on."""

    path: Path
    offset: int
    sizes: Sequence[int]
    stamp: Stamp | None = None


def _grid(total_bytes: int, chunk_bytes: int | None = None, leaf_bytes: int | None = None) -> _Grid:
    chunk_bytes = default_chunk_bytes(total_bytes) if chunk_bytes is None else chunk_bytes
    leaf_bytes = LEAF_BYTES_DEFAULT if leaf_bytes is None else leaf_bytes
    for name, value, least, most in (
        ("chunk_bytes", chunk_bytes, 1, CHUNK_BYTES_MAX),
        ("leaf_bytes", leaf_bytes, LEAF_BYTES_MIN, LEAF_BYTES_MAX),
    ):
        if not least <= value <= most:
            raise SettingsError(name, f"{value} is not between {least} and {most}")
    if leaf_bytes % LEAF_BYTES_STEP:
        raise SettingsError("leaf_bytes", f"{leaf_bytes} is not a multiple of {LEAF_BYTES_STEP}")
    return _Grid(chunk_bytes, HashScheme(leaf_bytes=leaf_bytes))


def _hash_on_gpus(
    source: TensorSource, ranges: Sequence[tuple[int, int]], scheme: HashScheme
) -> dict[tuple[int, int], Digests]:
    """Digests of the ranges (offset, size) that lie on a single GPU, by range."""
    on_gpu: dict[int, dict[tuple[int, int], list[DeviceView]]] = {device: {} for device in source.devices}
    for part in ranges if source.devices else ():
        views = list(source.device_read(*part))
        lent = [view for view in views if isinstance(view, DeviceView)]
        if len(lent) == len(views) and len({view.device for view in lent}) == 1:
            on_gpu[lent[0].device][part] = lent
    digests: dict[tuple[int, int], Digests] = {}
    for chunks in on_gpu.values():
        if chunks:
            digests |= zip(chunks, chunk_digests(scheme, list(chunks.values()), blake3=True), strict=True)
    return digests


def _hashed(
    path: Path,
    found: Sequence[CheckpointFile],
    grid: _Grid,
    maps: Mapping[str, Mapping[str, str]],
    *,
    cache_dir: Path,
    progress: Progress | None = None,
    threads: int | None = None,
) -> DirectorySource:
    """A source of the files, with tensors by the indexes `maps`; hashes files that are not cached."""
    cache = DigestCache(cache_dir, path, found, chunk_bytes=grid.chunk_bytes, scheme=grid.scheme)
    plain = weight_index.no_tensors(found, maps)
    _forget_other_tensors(cache.known, plain)
    described = _describe(found, cache.known, grid, plain, progress=progress, threads=threads)
    manifest = grid.manifest(_with_unused(described, maps))
    decode(manifest.encoded, digest=manifest.digest)  # a manifest that peers refuse must not be announced
    cache.save(manifest)
    return DirectorySource(path, manifest, paths=[f.real for f in found], stamps=[f.stamp for f in found])


def _describe(
    found: Sequence[CheckpointFile],
    known: Mapping[str, FileEntry],
    grid: _Grid,
    plain: set[str],
    *,
    progress: Progress | None,
    threads: int | None,
) -> list[FileEntry]:
    """Entries of all files in order; hashes files that are not known."""
    plans = [(file, *_plan(file, grid, plain)) for file in found if file.path not in known]
    chunks = sum(len(sizes) for *_, sizes in plans) + sum(len(entry.chunks) for entry in known.values())
    if chunks > CHUNKS_MAX:
        raise SettingsError(
            "chunk_bytes", f"{grid.chunk_bytes} makes {chunks} chunks; at most {CHUNKS_MAX} are allowed"
        )
    jobs = [job for file, _, sizes in plans for job in _jobs(file.real, sizes, file.stamp)]
    total_bytes = _size(found)
    done_bytes = total_bytes - _size([file for file, *_ in plans])
    if progress is not None:
        progress(done_bytes, total_bytes)
    hashed: list[Digests] = []
    for job, digests in _in_parallel(lambda job: _hash(job, scheme=grid.scheme, blake3=True), jobs, threads=threads):
        hashed += digests
        done_bytes += sum(job.sizes)
        if progress is not None:
            progress(done_bytes, total_bytes)
    rest = iter(hashed)  # in the order of the plans
    entries = dict(known)
    for file, header, sizes in plans:
        digests = list(itertools.islice(rest, len(sizes)))
        entries[file.path] = _entry(file.path, file.stamp.size, header, sizes, digests)
    return [entries[file.path] for file in found]


def _entry(path: str, size: int, header: str, sizes: Sequence[int], digests: Sequence[Digests]) -> FileEntry:
    chunks = tuple(ChunkEntry(*chunk) for chunk in zip(sizes, (found.xxh3.hex() for found in digests), strict=True))
    return FileEntry(path, size, header, chunks, blake3=tuple(found.blake3.hex() for found in digests))


def _forget_other_tensors(known: dict[str, FileEntry], plain: set[str]) -> None:
    """Drops entries that were made when the indexes said otherwise of their files."""
    for path, entry in list(known.items()):
        if bool(entry.header) != (path.endswith(".safetensors") and path not in plain):
            del known[path]


def _with_unused(entries: Sequence[FileEntry], maps: Mapping[str, Mapping[str, str]]) -> list[FileEntry]:
    headers = {e.path: {tensor.name for tensor in e.tensors()} for e in entries if e.header} if maps else {}
    unused = weight_index.unused(headers, maps)
    return [entry.with_unused(unused.get(entry.path, ())) for entry in entries]


def _plan(file: CheckpointFile, grid: _Grid, plain: set[str]) -> tuple[str, list[int]]:
    """The safetensors header of a file, '' for other files, and its chunk sizes. `plain`: files without tensors."""
    weight_files.refuse_broken(file)
    if not file.path.endswith(".safetensors") or file.path in plain:
        return "", cut([file.stamp.size], grid.chunk_bytes)
    with open_regular(file.real) as stream:
        header, tensors = safetensors_header.read(stream, subject=file.path, file_bytes=file.stamp.size)
    return header.decode(), cut(units(file.stamp.size, tensors), grid.chunk_bytes)


def _size(files: Sequence[CheckpointFile]) -> int:
    return sum(file.stamp.size for file in files)


def _jobs(path: Path, sizes: Sequence[int], stamp: Stamp | None = None) -> Iterator[_Job]:
    first, offset, size = 0, 0, 0
    for position, chunk_bytes in enumerate(sizes, 1):
        size += chunk_bytes
        if size >= JOB_BYTES or position == len(sizes):
            yield _Job(path, offset, sizes[first:position], stamp)
            first, offset, size = position, offset + size, 0


def _in_parallel(work: Callable[[J], T], jobs: Sequence[J], *, threads: int | None = None) -> Iterator[tuple[J, T]]:
    """Jobs with their results, in order. Raises the first failure and cancels jobs that have not begun."""
    pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="swarm-hash")
    try:
        yield from zip(jobs, pool.map(work, jobs), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _hash(job: _Job, *, scheme: HashScheme, blake3: bool) -> list[Digests]:
    """Digests of a job's chunks. Raises SourceChanged if the file does not match its stamp, before or after."""
    try:
        fd = os.open(job.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SourceChanged(job.path, "it is gone") from error
    try:
        if job.stamp is not None:
            job.stamp.check_open(job.path, fd)
            demand_there(job.path, fd)
        # The disk reads this run and the next, which another thread begins soon, while this one is hashed.
        os.posix_fadvise(fd, job.offset, 2 * sum(job.sizes), os.POSIX_FADV_WILLNEED)
        scratch = memoryview(bytearray(min(SCRATCH_BYTES, max(job.sizes))))
        offset, digests = job.offset, []
        for size in job.sizes:
            digests.append(
                _hash_chunk(fd, offset, size, hasher=ChunkHasher(scheme, blake3=blake3), scratch=scratch, path=job.path)
            )
            offset += size
        if job.stamp is not None:
            job.stamp.check(job.path, fd)
        return digests
    finally:
        os.close(fd)


def _hash_chunk(fd: int, offset: int, size: int, *, hasher: ChunkHasher, scratch: memoryview, path: Path) -> Digests:
    while size:
        filled = os.preadv(fd, [scratch[:size]], offset)
        if not filled:
            raise SourceChanged(path, f"it ends at byte {offset}")
        hasher.update(scratch[:filled])
        offset, size = offset + filled, size - filled
    return hasher.digests()


def _by_file(manifest: Manifest) -> Iterator[tuple[FileEntry, Iterator[Chunk]]]:
    """The files, each with its chunks. An iterator of chunks is good until the next file."""
    chunks = iter(manifest.chunks)
    return ((file, itertools.islice(chunks, len(file.chunks))) for file in manifest.files)


def refuse_damaged(paths: Sequence[str]) -> None:
    """Raises ManifestInvalid for files of the Hugging Face cache that have another content than their names say."""
    if paths:
        more = f" and {len(paths) - 1} more files" if len(paths) > 1 else ""
        raise ManifestInvalid(
            paths[0],
            f"is damaged{more}: its content is not the one of its name in the Hugging Face cache; "
            "a fetch of the model mends it, or remove the file and download it again",
        )


def _changed_since_fetched(path: Path, manifest: Manifest, names: Mapping[str, str], *, cache_dir: Path) -> list[str]:
    """Files without a hub name of a snapshot that swarm fetched, if they are not what was fetched."""
    fetched = recall(cache_dir, path) if hf_cache.model_id_of(path) else None
    if fetched is None or (fetched.scheme, fetched.chunk_bytes) != (manifest.scheme, manifest.chunk_bytes):
        return []
    before = {file.path: (file.size, file.chunks) for file in fetched.files}
    return [
        file.path
        for file in manifest.files
        if file.path in before and file.path not in names and before[file.path] != (file.size, file.chunks)
    ]


def _differs(path: Path, file: FileEntry) -> str | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return "is not a file"
    return None if status.st_size == file.size else f"has {status.st_size} bytes instead of {file.size}"


def _hash_or_problem(job: _Job, *, scheme: HashScheme, blake3: bool) -> list[Digests] | str:
    try:
        return _hash(job, scheme=scheme, blake3=blake3)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except SourceChanged as error:
        return f"changed while it was read: {error.why}"
