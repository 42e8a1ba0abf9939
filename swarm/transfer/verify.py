"""Verification of received chunks: each is hashed as it lands, and never written over a verified copy.

Each chunk has a place in the store. The first transfer that brings a chunk claims the place. A second copy, from the
endgame, lands in a spare buffer, because it must not touch bytes that may be verified already. If the spare is verified
first, it is put in place as soon as the first transfer has let go.

A chunk is checked against its XXH3 digest, and where the fetch is pinned against its BLAKE3 digest too. In host memory
a chunk is hashed view by view as it arrives. In GPU memory chunks are hashed in batches while the next chunks arrive,
so a chunk is reported some time after its last byte.

Runs on the threads of transports and calls `report` there. Must not know: peers, messages.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Chunk, Digests, Manifest
from swarm.errors import LocalProtocolError, SourceChanged, StoreError, TransportError
from swarm.hashing.cpu import ChunkHasher
from swarm.hashing.cpu import chunk_digests as digests_on_cpu
from swarm.hashing.cuda import BATCH_BYTES, Batch, chunk_digests, hashes_on, prepare, start
from swarm.store import DeviceStore, DeviceView, FileSpan, Source, Span, Store, View, WatchedSource, cuda


@dataclass(frozen=True)
class LandedChunk:
    """A chunk that a transfer has brought. `spare`: its right bytes, while another transfer holds its place."""

    chunk: Chunk
    correct: bool
    spare: bytearray | None = None
    digests: Digests | None = None  # of its bytes


# Called with chunks whose last bytes are in; chunks of one GPU batch come together.
ReportChunks: TypeAlias = Callable[[Sequence[LandedChunk]], object]

# Whether a transfer brought the right bytes of a chunk, by their digests. Called on the threads of transports.
Judge: TypeAlias = Callable[[int, Chunk, Digests], bool]

HELD = -1  # claims the places of chunks that were verified before the fetch

# From this size of leaves on, a CPU hashes what it received, out of its cache: a GPU hashes a leaf in sequence, which
# takes it 1.5 ms for 512 KiB, and a chunk has few such leaves.
CPU_LEAF_BYTES_MIN = 128 << 10

BATCHES_MAX = 4  # GPU batches that are hashed at once
FILLED_TIMEOUT_S = 30.0  # for a chunk on several GPUs, after its last byte was requested
LOOK_EVERY_S = 50e-6  # at that

# Yielded after the last view while chunks are still being hashed.
_NOT_YET: View = memoryview(b"")


class Verifier:
    """Lends places for the chunks of a fetch and hashes them. `held`: chunks that were verified before.

    `blake3`: chunks must have their BLAKE3 digests too. `judge`: in place of the digests in the manifest.
    """

    def __init__(
        self,
        manifest: Manifest,
        store: Store,
        held: Bitfield,
        *,
        blake3: bool = False,
        judge: Judge = lambda _, chunk, found: chunk.has(found),
    ) -> None:
        self._manifest = manifest
        self._blake3 = blake3
        self._judge = judge
        self._store = store
        # Looked at once: `isinstance` of a protocol costs as much as hashing a chunk.
        self._device_store = store if isinstance(store, DeviceStore) else None
        self._lock = threading.Lock()
        # By chunk, the transfer that may write to its place; a verified chunk keeps its claim.
        self._claimed: dict[int, int] = dict.fromkeys(held, HELD)
        self._streams: dict[int, cuda.CudaStream] = {}  # by GPU

    def views(self, transfer: int, chunks: Iterable[int], report: ReportChunks) -> Generator[memoryview, None, None]:
        """The views that a transfer of these chunks fills, in order. Reports each chunk after its last byte."""
        for index in chunks:
            yield from self._chunk_views(transfer, self._manifest.chunks[index], report)

    def device_views(self, transfer: int, chunks: Sequence[int], report: ReportChunks) -> Generator[View, None, None]:
        """As `views`, with views of GPU memory if the store has any.

        Yields empty views after the last until all chunks are hashed, so that the caller can do other work meanwhile.
        """
        if self._device_store is None:
            yield from self.views(transfer, chunks, report)
            return
        batches = _DeviceBatches(
            self._manifest,
            self._device_store,
            blake3=self._blake3,
            judge=lambda chunk, found: self._judge(transfer, chunk, found),
            release=self._release,
            report=report,
        )
        try:
            for index in chunks:
                chunk = self._manifest.chunks[index]
                if self._claim(chunk, transfer):
                    yield from batches.fill(chunk)
                else:
                    yield from self._chunk_views(transfer, chunk, report)
            yield from batches.finish()
        finally:
            batches.abandon()

    def prepare(self) -> None:
        """Prepares GPUs for hashing, before the first `device_views`. Blocks; raises CudaError."""
        if self._device_store:
            for device in self._device_store.devices:
                prepare(device)

    def settle(self, spare: LandedChunk, transfer: int) -> bool:
        """Puts a spare copy in place and returns True, if the place is free. Blocks; raises StoreError."""
        if spare.spare is None or not self._claim(spare.chunk, transfer):
            return False
        rest = memoryview(spare.spare)
        try:
            for view in self._store.landing(spare.chunk):
                view[:] = rest[: len(view)]
                rest = rest[len(view) :]
        except BaseException:
            self._release(spare.chunk)
            raise
        return True

    def reclaim(self, chunk: int, transfer: int) -> None:
        """Gives the place of a verified chunk to a transfer that brings it again."""
        with self._lock:
            self._claimed[chunk] = transfer

    def holder(self, chunk: int) -> int | None:
        """The transfer that claims the place of a chunk."""
        return self._claimed.get(chunk)

    def _chunk_views(self, transfer: int, chunk: Chunk, report: ReportChunks) -> Generator[memoryview, None, None]:
        hasher = ChunkHasher(self._manifest.scheme, blake3=self._blake3)
        spare = None if self._claim(chunk, transfer) else bytearray(chunk.size)
        on_gpu = self._gpu_views(chunk) if spare is None else []
        correct = False
        try:
            for view in self._store.landing(chunk) if spare is None else [memoryview(spare)]:
                yield view
                if not on_gpu:
                    hasher.update(view)
            digests = self._gpu_digests(on_gpu) if on_gpu else hasher.digests()
            correct = self._judge(transfer, chunk, digests)
        finally:
            if spare is None and not correct:
                self._release(chunk)
        report([LandedChunk(chunk, correct, spare, digests)])

    def _gpu_views(self, chunk: Chunk) -> list[View]:
        """The views of a chunk's place, if it is on one GPU that hashes it sooner than a CPU; else []."""
        if self._device_store is None or not self._device_store.devices:
            return []
        if self._manifest.scheme.leaf_bytes >= CPU_LEAF_BYTES_MIN and not self._blake3:
            return []
        views = list(self._device_store.device_landing(chunk))
        devices = {view.device for view in views if isinstance(view, DeviceView)}
        return views if len(devices) == 1 and hashes_on(devices.pop()) else []

    def _gpu_digests(self, views: list[View]) -> Digests:
        """The digests of a chunk that host memory was copied to."""
        with cuda.moving(self._streams):  # waits for no kernel of the tensors' owner
            return chunk_digests(self._manifest.scheme, [views], blake3=self._blake3)[0]

    def _claim(self, chunk: Chunk, transfer: int) -> bool:
        with self._lock:
            return self._claimed.setdefault(chunk.index, transfer) == transfer

    def _release(self, chunk: Chunk) -> None:
        with self._lock:
            del self._claimed[chunk.index]


class _DeviceBatches:
    """The chunks of a transfer that land in GPU memory: filled, hashed in batches, then reported.

    Hashing never delays filling, so that a GPU always has its next copies queued. The CPU hashes a chunk that lies on
    several GPUs or on none.
    """

    def __init__(
        self,
        manifest: Manifest,
        store: DeviceStore,
        *,
        blake3: bool,
        judge: Callable[[Chunk, Digests], bool],
        release: Callable[[Chunk], None],
        report: ReportChunks,
    ) -> None:
        self._scheme = manifest.scheme
        self._blake3 = blake3
        self._judge = judge
        self._store = store
        self._release = release
        self._report = report
        self._unproven: dict[int, Chunk] = {}
        self._filled: list[tuple[Chunk, list[View]]] = []
        self._filled_bytes = 0
        self._filled_on = 0  # the GPU
        self._hashing: list[tuple[list[Chunk], Batch]] = []
        self._movers: list[cuda.CudaStream] = []  # the streams that may still fill views

    def fill(self, chunk: Chunk) -> Generator[View, None, None]:
        """The views of a chunk that this transfer has claimed."""
        self._unproven[chunk.index] = chunk
        views: list[View] = []
        for view in self._store.device_landing(chunk):
            if self._filled_bytes >= BATCH_BYTES and not cuda.puts_off():
                self._hash()
            views.append(view)
            if isinstance(view, DeviceView):
                self._remember_mover(view.device)
            yield view
        devices = {view.device for view in views if isinstance(view, DeviceView)}
        if len(devices) != 1:
            cuda.flush()
            self._await_movers()
            found = digests_on_cpu(self._scheme, self._store.read(chunk), blake3=self._blake3)
            self._report([self._settled(chunk, found)])
            return
        if not devices & {self._filled_on}:
            self._hash()
        (self._filled_on,) = devices
        self._filled.append((chunk, views))
        self._filled_bytes += chunk.size
        while self._hashing and (len(self._hashing) > BATCHES_MAX or self._hashing[0][1].ready()):
            self._collect()

    def finish(self) -> Iterator[View]:
        """Hashes and reports all filled chunks; yields empty views while it waits."""
        self._hash()
        while self._hashing:
            if self._hashing[0][1].ready():
                self._collect()
            else:
                yield _NOT_YET

    def abandon(self) -> None:
        """Releases the places of unverified chunks, when no copy writes there any more."""
        if self._unproven:
            self._drain()
        for _, batch in self._hashing:  # it may still copy into its own buffers
            with contextlib.suppress(StoreError):
                batch.collect()
        for chunk in list(self._unproven.values()):
            self._release(chunk)
        self._unproven.clear()

    def _hash(self) -> None:
        if self._filled:
            cuda.flush()
            batch = start(self._scheme, [views for _, views in self._filled], blake3=self._blake3)
            self._hashing.append(([chunk for chunk, _ in self._filled], batch))
            self._filled, self._filled_bytes = [], 0

    def _collect(self) -> None:
        chunks, batch = self._hashing.pop(0)
        self._report([self._settled(*hashed) for hashed in zip(chunks, batch.collect(), strict=True)])

    def _settled(self, chunk: Chunk, found: Digests) -> LandedChunk:
        del self._unproven[chunk.index]
        if not (correct := self._judge(chunk, found)):
            self._release(chunk)
        return LandedChunk(chunk, correct, digests=found)

    def _remember_mover(self, device: int) -> None:
        stream = cuda.gpu(device).current()
        if stream not in self._movers:
            self._movers.append(stream)

    def _await_movers(self) -> None:
        """Waits until the views are filled. Raises TransportError when a copy waits for a peer for too long."""
        deadline = time.monotonic() + FILLED_TIMEOUT_S
        with cuda.beside_captures():
            for stream in self._movers:
                while not stream.query():
                    if time.monotonic() > deadline:
                        raise TransportError(f"a chunk was not filled within {FILLED_TIMEOUT_S:g} s")
                    time.sleep(LOOK_EVERY_S)

    def _drain(self) -> None:
        with cuda.beside_captures():
            for stream in self._movers:
                stream.synchronize()


class SourceFailed(StoreError):
    """The source of a copy, not its target, has failed: `error` says how."""

    def __init__(self, error: StoreError) -> None:
        super().__init__(str(error))
        self.error = error


def is_right(
    source: Store | WatchedSource, chunk: Chunk, *, blake3: bool = False, known: Digests | None = None
) -> bool:
    """Reads a chunk that may lie in a store and hashes it. `known`: its digests, of a promise. Raises StoreError."""
    found = digests_on_cpu(source.manifest.scheme, source.read(chunk), blake3=blake3 or known is not None)
    return chunk.has(found) if known is None else found == known


def copy(
    source: Source,
    store: Store,
    held: Bitfield,
    *,
    chunks: Bitfield,
    blake3: bool = False,
    digests: Callable[[int], Digests] | None = None,
) -> int:
    """Fills a store with `chunks` from a source in this process with the same chunks; returns the bytes copied.

    `digests`: those of the chunks of a promise.

    Blocks. Skips the chunks in `held` and adds the others to it. Raises StoreError, and SourceFailed where the source
    cannot be read or a chunk of it has the wrong digest.
    """

    def judge(_: int, chunk: Chunk, found: Digests) -> bool:
        return chunk.has(found) if digests is None else found == digests(chunk.index)

    verifier, copied = Verifier(store.manifest, store, held, blake3=blake3 or digests is not None, judge=judge), 0
    landed: list[LandedChunk] = []
    for index in chunks.minus(held):
        chunk = store.manifest.chunks[index]
        views = verifier.views(0, [chunk.index], landed.extend)
        _pour(_spans(source, chunk), views)
        if not landed[-1].correct:
            path = store.manifest.files[chunk.file].path
            raise SourceFailed(SourceChanged(path, "its bytes do not have the right digest"))
        held.add(chunk.index)
        copied += chunk.size
    return copied


def _spans(source: Source, chunk: Chunk) -> Iterator[Span]:
    try:
        yield from source.spans(chunk)
    except StoreError as error:
        raise SourceFailed(error) from error
    except OSError as error:  # it was closed meanwhile
        raise SourceFailed(StoreError(f"its files: {error.strerror}")) from error


def _pour(spans: Iterator[Span], views: Iterator[memoryview]) -> None:
    nothing = memoryview(b"")
    view = next(views, nothing)
    for span in spans:
        done, size = 0, span.size if isinstance(span, FileSpan) else span.nbytes
        while done < size:
            if not view.nbytes and not (view := next(views, nothing)).nbytes:
                raise LocalProtocolError("a source gives more bytes than its chunk has")
            step = min(view.nbytes, size - done)
            if isinstance(span, FileSpan):
                step = _read(span, view[:step], done)
            else:
                view[:step] = span[done : done + step]
            view, done = view[step:], done + step
    if view.nbytes or next(views, nothing).nbytes:  # `next` also reports the chunk
        raise LocalProtocolError("a source gives less bytes than its chunk has")


def _read(span: FileSpan, view: memoryview, done: int) -> int:
    where = f"file {span.fd}"
    try:
        count = os.preadv(span.fd, [view], span.offset + done)
    except OSError as error:
        raise SourceFailed(StoreError(f"{where}: cannot be read at {span.offset + done}: {error.strerror}")) from error
    if not count:
        raise SourceFailed(SourceChanged(where, "it became shorter"))
    return count
