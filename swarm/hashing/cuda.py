"""Chunk digests of GPU memory: kernels hash all chunks of a batch in place.

    mover's stream   | fill chunk 0 | fill chunk 1 | ... | fill next batch ...
    hash stream                                      | hash leaves | digests to the host |      collect()

`start` returns at once and `collect` waits, so a batch is hashed while the next batch is filled. Host memory of a chunk
(a header among small tensors) is copied to the GPU. A leaf that straddles views, as where small tensors share a chunk,
is gathered first. The xxhash library hashes leaves of at most 240 bytes, for which XXH3 has other rules, and the leaf
digests. BLAKE3 has no leaves of ours: its kernels take the same bytes, in blocks of 1 KiB, and give the digest of the
chunk. Where the kernels cannot be loaded, all memory is copied to the host.

Must not know: the origin of the bytes, their expected digest.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from swarm.content.manifest import Digests, HashScheme
from swarm.hashing.cpu import chunk_digests as on_the_cpu
from swarm.hashing.kernels import (
    BLAKE3_BLOCK_BYTES,
    BLAKE3_VALUE_BYTES,
    GROUP_BLOCKS,
    GROUPS_WORDS,
    PIECE_WORDS,
    ROW_WORDS,
    RUN_WORDS,
    Kernels,
    kernels,
)
from swarm.store import DeviceView, View, cuda
from swarm.store.staging import outgoing

LONG_BYTES_MIN = 241  # XXH3's long form, which the kernel computes, begins here
DIGEST_BYTES = 16
GPU_LEAF_BYTES = 16 << 10  # enough leaves in a batch to keep every multiprocessor busy (docs/decisions/0020)

# Bytes that a launch hashes: enough leaves for a whole GPU. The host's part of a launch (0.3 ms) is a tenth of the time
# that they take to arrive over NVLink, and few bytes are left to hash after the last arrival.
BATCH_BYTES = 1 << 30

SCRATCH_BYTES = 1 << 20  # of an allocation for leaves that straddle views
PIECE_BYTES_MAX = 64 << 10  # that a thread block copies

log = logging.getLogger("swarm")


class Batch(Protocol):
    """Chunks that are being hashed."""

    def ready(self) -> bool:
        """Whether `collect` need not wait for the GPU."""

    def collect(self) -> list[Digests]:
        """The digests of the chunks, in order. Waits for them; raises CudaError."""


def start(scheme: HashScheme, chunks: Sequence[Sequence[View]], *, blake3: bool = False) -> Batch:
    """Starts to hash chunks, each given as its views in order, behind all work enqueued so far on the current stream.

    At least one view is GPU memory, and all GPU views are of the same GPU. Raises CudaError.
    """
    if loaded := _kernels(next(_devices(chunks))):
        return _KernelBatch(scheme, chunks, loaded, blake3=blake3)
    return _HostBatch(scheme, chunks, blake3=blake3)


def hashes_on(device: int) -> bool:
    """Whether this GPU hashes chunks itself, instead of copying them to the host."""
    return _kernels(device) is not None


def chunk_digests(scheme: HashScheme, chunks: Sequence[Sequence[View]], *, blake3: bool = False) -> list[Digests]:
    """The digests of chunks. Blocks; raises CudaError."""
    digests: list[Digests] = []
    some: list[Sequence[View]] = []
    for views in chunks:
        some.append(views)
        if sum(view.nbytes for views in some for view in views) >= BATCH_BYTES:
            digests += start(scheme, some, blake3=blake3).collect()
            some = []
    return digests + (start(scheme, some, blake3=blake3).collect() if some else [])


@functools.cache
def prepare(device: int) -> None:
    """Loads the kernels and runs each once. Blocks; raises CudaError.

    Loading may wait until the GPU is idle. The first batch must not wait for that, because the thread that starts it
    also keeps the deadlines of its peer.
    """
    if not _kernels(device):
        return
    with cuda.torch_errors(f"hashing on GPU {device}"):
        import torch

        memory = torch.zeros(1024, dtype=torch.uint8, device=f"cuda:{device}")
    leaf = DeviceView(device, memory.data_ptr(), memory.numel(), memory)
    for chunk in ([leaf], [leaf[1:]], [leaf[:512], leaf[512:]]):
        chunk_digests(HashScheme(leaf_bytes=leaf.nbytes), [chunk], blake3=True)


@functools.cache
def _kernels(device: int) -> Kernels | None:
    try:
        return kernels(device)
    except cuda.CudaError as error:
        log.warning("GPU %d: its memory is copied to the host to be hashed, which is slow: %s", device, error)
        return None


@dataclass(frozen=True, slots=True)
class _Run:
    """`count` adjacent leaves of `size` bytes each."""

    address: int
    size: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.size * self.count


class _HostBatch:
    def __init__(self, scheme: HashScheme, chunks: Sequence[Sequence[View]], *, blake3: bool) -> None:
        self._scheme = scheme
        self._chunks = chunks
        self._blake3 = blake3
        self._streams = {device: cuda.gpu(device).current() for device in _devices(chunks)}

    def ready(self) -> bool:
        return True  # `collect` does all the work

    def collect(self) -> list[Digests]:
        with cuda.beside_captures():
            for stream in self._streams.values():
                stream.synchronize()
        return [on_the_cpu(self._scheme, _host(views), blake3=self._blake3) for views in self._chunks]


class _KernelBatch:
    def __init__(self, scheme: HashScheme, chunks: Sequence[Sequence[View]], loaded: Kernels, *, blake3: bool) -> None:
        import torch

        self._counts = [-(-sum(view.nbytes for view in views) // scheme.leaf_bytes) for views in chunks]
        self._keep: list[object] = [chunks]  # memory that the GPU may still read
        self._pieces: list[tuple[int, int, int]] = []  # to be gathered: target, source, size
        self._room = self._room_at = 0  # of the memory for gathered leaves: bytes left, and their address
        self._gpu = cuda.gpu(next(_devices(chunks)))
        self._kernels = loaded
        self._stream = stream = _hash_stream(self._gpu.index)
        before = self._gpu.current()  # asked for here: below, the current stream is the hash stream
        with self._errors(), torch.cuda.device(self._gpu.index), torch.cuda.stream(stream):  # type: ignore[arg-type]
            stream.wait_stream(before)
            by_chunk = [list(self._cut(views, scheme.leaf_bytes)) for views in chunks]
            self._runs = [run for runs in by_chunk for run in runs]
            short = [run for run in self._runs if run.size < LONG_BYTES_MIN]
            self._short = [cuda.Pinned(LONG_BYTES_MIN) for _ in short]
            self._hashed = self._xxh3([run for run in self._runs if run.size >= LONG_BYTES_MIN])
            self._strong = self._blake3(by_chunk) if blake3 else memoryview(bytes(0))
            for run, pinned in zip(short, self._short, strict=True):
                self._copy(pinned.address, run.address, run.size)
            self._done = stream.record_event()  # type: ignore[attr-defined]

    def ready(self) -> bool:
        with self._errors():
            return bool(self._done.query())

    def collect(self) -> list[Digests]:
        with self._errors():
            self._done.synchronize()
        hashed: memoryview | bytes = self._hashed
        if self._short:
            hashed = b"".join(self._in_order(hashed))
        self._keep.clear()
        ends = (np.cumsum(self._counts) * DIGEST_BYTES).tolist()
        xxh3 = [xxhash.xxh3_128_digest(hashed[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        return [
            Digests(digest, bytes(self._strong[at : at + BLAKE3_VALUE_BYTES]))
            for digest, at in zip(xxh3, itertools.count(0, BLAKE3_VALUE_BYTES), strict=False)
        ]

    def _in_order(self, hashed: memoryview | bytes) -> Iterator[memoryview | bytes]:
        """The digests of all runs: `hashed`, with those of short leaves in between."""
        position, short = 0, iter(self._short)
        for run in self._runs:
            if run.size < LONG_BYTES_MIN:
                yield xxhash.xxh3_128_digest(next(short).view[: run.size])
            else:
                yield hashed[position : position + run.count * DIGEST_BYTES]
                position += run.count * DIGEST_BYTES

    def _cut(self, views: Sequence[View], leaf_bytes: int) -> Iterator[_Run]:
        """A chunk's leaves, in order. One that straddles two views is copied together."""
        left = sum(view.nbytes for view in views)
        gathered, gathered_bytes = 0, 0  # where the leaf that straddles is, and how much of it
        for view in map(self._on_gpu, views):
            used = 0
            while used < view.nbytes:
                leaf = min(leaf_bytes, left + gathered_bytes)
                whole = 0 if gathered_bytes else (view.nbytes - used) // leaf
                step = whole * leaf or min(leaf - gathered_bytes, view.nbytes - used)
                if whole:
                    yield _Run(view.address + used, leaf, whole)
                else:
                    gathered = gathered if gathered_bytes else self._scratch(leaf)
                    self._gather(gathered + gathered_bytes, view.address + used, step)
                    gathered_bytes += step
                    if gathered_bytes == leaf:
                        yield _Run(gathered, leaf, 1)
                        gathered_bytes = 0
                used += step
                left -= step

    def _on_gpu(self, view: View) -> DeviceView:
        if isinstance(view, DeviceView):
            return view
        pinned, address = cuda.Pinned(view.nbytes), self._scratch(view.nbytes)
        pinned.view[:] = view.cast("B")
        self._copy(address, pinned.address, view.nbytes)
        self._keep.append(pinned)
        return DeviceView(self._gpu.index, address, view.nbytes, None)

    def _scratch(self, size: int) -> int:
        import torch

        if self._room < size:
            self._room = max(size, SCRATCH_BYTES)
            memory = torch.empty(self._room, dtype=torch.uint8, device=f"cuda:{self._gpu.index}")
            self._keep.append(memory)
            self._room_at = memory.data_ptr()
        address, taken = self._room_at, -(-size // 16) * 16
        self._room, self._room_at = self._room - taken, self._room_at + taken
        return address

    def _gather(self, target: int, source: int, size: int) -> None:
        for start in range(0, size, PIECE_BYTES_MAX):
            self._pieces.append((target + start, source + start, min(PIECE_BYTES_MAX, size - start)))

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return cuda.torch_errors(f"hashing on GPU {self._gpu.index}")

    def _copy(self, target: int, source: int, size: int) -> None:
        self._gpu.copy(target, source, size, stream=self._stream.cuda_stream)

    def _xxh3(self, runs: Sequence[_Run]) -> memoryview:
        """The digests of these leaves, in pinned memory, once the stream has got there. Gathers first."""
        table = np.array([(run.address, run.size, run.count, 0) for run in runs], np.int64).reshape(-1, RUN_WORDS)
        table[1:, 3] = np.cumsum(table[:-1, 2])
        count = int(table[:, 2].sum())
        digests = cuda.Pinned(count * DIGEST_BYTES)
        stream = self._stream.cuda_stream
        if self._pieces:
            pieces = self._words(np.array(self._pieces, np.int64).reshape(-1, PIECE_WORDS))
            self._kernels.gather(pieces, len(self._pieces), stream=stream)
        if runs:
            aligned = not int(np.bitwise_or.reduce(table[:, :2], axis=None) & 15)
            address = self._words(table)
            self._kernels.xxh3(address, len(runs), digests.address, count, aligned=aligned, stream=stream)
        self._keep.append(digests)
        return digests.view

    def _blake3(self, chunks: Sequence[Sequence[_Run]]) -> memoryview:
        """The BLAKE3 digests of these chunks, in pinned memory, once the stream has got there."""
        rows: list[tuple[int, int, int, int, int]] = []
        spans: list[tuple[int, int]] = []  # of groups: first, count
        groups = 0
        for runs in chunks:
            total, counter = -(-sum(run.nbytes for run in runs) // BLAKE3_BLOCK_BYTES), 0
            for run in runs:
                rows.append((run.address, run.nbytes, groups * GROUP_BLOCKS + counter, counter, total))
                counter += run.nbytes // BLAKE3_BLOCK_BYTES
            spans.append((groups, -(-total // GROUP_BLOCKS)))
            groups += spans[-1][1]
        table = np.array(rows, np.int64).reshape(-1, ROW_WORDS)
        aligned = not int(np.bitwise_or.reduce(table[:, 0]) & 15)
        values, stream = self._scratch(groups * BLAKE3_VALUE_BYTES), self._stream.cuda_stream
        self._kernels.blake3_groups(self._words(table), len(rows), values, groups, aligned=aligned, stream=stream)
        digests = cuda.Pinned(len(chunks) * BLAKE3_VALUE_BYTES)
        chunk_rows = self._words(np.array(spans, np.int64).reshape(-1, GROUPS_WORDS))
        self._kernels.blake3_chunks(chunk_rows, len(spans), values, digests.address, stream=stream)
        self._keep.append(digests)
        return digests.view

    def _words(self, table: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> int:
        """The address of a copy of the table in GPU memory."""
        pinned, address = cuda.Pinned(table.nbytes), self._scratch(table.nbytes)
        pinned.view[:] = table.ravel().data.cast("B")
        self._copy(address, pinned.address, table.nbytes)
        self._keep.append(pinned)
        return address


@functools.cache
def _hash_stream(device: int) -> cuda.CudaStream:
    return cuda.new_stream(device)


def _devices(chunks: Sequence[Sequence[View]]) -> Iterator[int]:
    return (view.device for views in chunks for view in views if isinstance(view, DeviceView))


def _host(views: Sequence[View]) -> Iterator[memoryview]:
    for view in views:
        if isinstance(view, DeviceView):
            yield from outgoing(view)
        else:
            yield view
