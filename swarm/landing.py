"""Where received chunks land: hashed on the way in, and never written over one another.

A chunk has one place. The first transfer that brings it writes there; a second copy of the same chunk (the endgame
asks for some) lands in memory of its own, because it must not touch bytes that may be verified already. If the second
copy turns out right first, it is put in place once the first one has let go.

Runs on the transports' worker threads; tells what happened through `report`. Knows stores and hashes, no peers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from swarm.bitfield import Bitfield
from swarm.errors import LocalProtocolError, SourceChanged
from swarm.hashing.cpu import LeafHasher
from swarm.manifest import Chunk, Manifest
from swarm.store import FileSpan, Source, Span, Store


@dataclass(frozen=True)
class Landed:
    """A chunk of a transfer has arrived. `spare`: its right bytes, not in place yet, because another copy was
    landing."""

    chunk: Chunk
    correct: bool
    spare: bytearray | None = None


NOBODY = -1


class Landings:
    """The landings of one fetch, over all its transfers. `held`: chunks that were here, and right, before it."""

    def __init__(self, manifest: Manifest, store: Store, held: Bitfield) -> None:
        self._manifest = manifest
        self._store = store
        self._lock = threading.Lock()
        # Which transfer may write to a chunk's place. It stays once it is right; what was right before is nobody's.
        self._claimed: dict[int, int] = dict.fromkeys(held, NOBODY)

    def views(
        self, transfer: int, chunks: Sequence[int], report: Callable[[Landed], None]
    ) -> Generator[memoryview, None, None]:
        """The views that a transfer of these chunks fills, in order. Reports every chunk as its last byte is in."""
        for index in chunks:
            yield from self._chunk_views(transfer, self._manifest.chunks[index], report)

    def settle(self, spare: Landed, transfer: int) -> bool:
        """Puts a spare copy in place, if its chunk's place is free. Blocks; raises StoreError."""
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

    def holder(self, chunk: int) -> int | None:
        """The transfer whose copy of a chunk is in place or on its way there."""
        return self._claimed.get(chunk)

    def _chunk_views(
        self, transfer: int, chunk: Chunk, report: Callable[[Landed], None]
    ) -> Generator[memoryview, None, None]:
        hasher = LeafHasher(self._manifest.scheme)
        spare = None if self._claim(chunk, transfer) else bytearray(chunk.size)
        correct = False
        try:
            for view in self._store.landing(chunk) if spare is None else [memoryview(spare)]:
                yield view
                hasher.update(view)
            correct = hasher.digest() == chunk.digest
        finally:
            if spare is None and not correct:
                self._release(chunk)
        report(Landed(chunk, correct, spare))

    def _claim(self, chunk: Chunk, transfer: int) -> bool:
        with self._lock:
            return self._claimed.setdefault(chunk.index, transfer) == transfer

    def _release(self, chunk: Chunk) -> None:
        with self._lock:
            del self._claimed[chunk.index]


def copy(source: Source, store: Store, held: Bitfield) -> int:
    """Fills a store from a source of the same manifest in this process; returns the bytes copied.

    Blocks. Chunks in `held` are left alone, the others are added to it. Raises StoreError, and SourceChanged when the
    source's bytes are not the manifest's.
    """
    landings, copied = Landings(store.manifest, store, held), 0
    landed: list[Landed] = []
    for chunk in store.manifest.chunks:
        if chunk.index in held:
            continue
        views = landings.views(0, [chunk.index], landed.append)
        _pour(source.spans(chunk), views)
        if not landed[-1].correct:
            raise SourceChanged(store.manifest.files[chunk.file].path, "its bytes do not have the right digest")
        held.add(chunk.index)
        copied += chunk.size
    return copied


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
                step = os.preadv(span.fd, [view[:step]], span.offset + done)
                if not step:
                    raise SourceChanged(f"file {span.fd}", "it became shorter")
            else:
                view[:step] = span[done : done + step]
            view, done = view[step:], done + step
    if view.nbytes or next(views, nothing).nbytes:  # which also reports the chunk as landed
        raise LocalProtocolError("a source gives less bytes than its chunk has")
