"""Where do received chunks land, and can one copy of a chunk ever spoil another?"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from forgery import forged

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Chunk, ChunkEntry, FileEntry, HashScheme, Manifest
from swarm.errors import LocalProtocolError, StoreFull
from swarm.hashing.cpu import chunk_digests
from swarm.store import FileSpan, Span
from swarm.store.memory_store import MemoryStore
from swarm.transfer.verify import LandedChunk, SourceFailed, Verifier, copy

DATA = bytes(range(30))
SCHEME = HashScheme(leaf_bytes=1024)


def manifest() -> Manifest:
    parts = [DATA[start : start + 10] for start in range(0, 30, 10)]
    chunks = tuple(ChunkEntry(10, chunk_digests(SCHEME, [part]).xxh3.hex()) for part in parts)
    return Manifest(1, "checkpoint", "", SCHEME, 10, (FileEntry("data", 30, "", chunks),))


class Holder:
    """A source out of a list of spans a chunk."""

    def __init__(self, *spans: Span) -> None:
        self.manifest = manifest()
        self._spans = spans

    def spans(self, chunk: Chunk) -> Iterator[Span]:
        for span in self._spans:
            if isinstance(span, FileSpan):
                yield FileSpan(span.fd, span.offset + chunk.offset, 10)
            else:
                yield span[chunk.offset : chunk.offset + 10]

    def close(self) -> None:
        """Nothing to close."""


class Failing(MemoryStore):
    """Its disk is full, `times` times."""

    times = 1

    def landing(self, chunk: Chunk) -> Iterator[memoryview]:
        yield memoryview(bytearray(4))
        if self.times:
            self.times -= 1
            raise StoreFull("disk", need_bytes=6, free_bytes=0)
        yield memoryview(bytearray(6))


class Transfer:
    """One transfer that fills the views of its chunks when it is told to."""

    def __init__(self, verifier: Verifier, number: int, *chunks: int) -> None:
        self.landed: list[LandedChunk] = []
        self._views = verifier.views(number, chunks, self.landed.extend)
        self._view = next(self._views)

    def fill(self, data: bytes) -> Transfer:
        """The next view's bytes arrive."""
        self._view[:] = data
        self._view = next(self._views, memoryview(b""))
        return self

    def stop(self) -> None:
        self._views.close()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(manifest())


@pytest.fixture
def verifier(store: MemoryStore) -> Verifier:
    return Verifier(store.manifest, store, Bitfield(len(store.manifest.chunks)))


def never_asked(chunk: Chunk) -> bool:
    raise AssertionError(f"memory is this process's own, and {chunk} is hashed again")


def contents(store: MemoryStore) -> bytes:
    store.seal(never_asked)
    return bytes(store.files()["data"])


def test_do_chunks_land_in_their_places(store: MemoryStore, verifier: Verifier) -> None:
    transfer = Transfer(verifier, 1, 2, 0).fill(DATA[20:]).fill(DATA[:10])
    assert [(landed.chunk.index, landed.correct, landed.spare) for landed in transfer.landed] == [
        (2, True, None),
        (0, True, None),
    ]
    assert contents(store) == DATA[:10] + bytes(10) + DATA[20:]
    assert (verifier.holder(0), verifier.holder(1)) == (1, None)


def test_is_a_wrong_chunk_reported_and_its_place_free_again(store: MemoryStore, verifier: Verifier) -> None:
    assert not Transfer(verifier, 1, 0).fill(b"x" * 10).landed[0].correct
    assert verifier.holder(0) is None
    (landed,) = Transfer(verifier, 2, 0).fill(DATA[:10]).landed
    assert (landed.correct, landed.spare, verifier.holder(0)) == (True, None, 2)
    assert contents(store)[:10] == DATA[:10]


def test_does_a_second_copy_land_beside_the_first(store: MemoryStore, verifier: Verifier) -> None:
    first = Transfer(verifier, 1, 0)
    (landed,) = Transfer(verifier, 2, 0).fill(DATA[:10]).landed
    assert (landed.correct, landed.spare, verifier.holder(0)) == (True, bytearray(DATA[:10]), 1)
    assert not verifier.settle(landed, 2)
    first.fill(DATA[:10])
    assert first.landed[0].spare is None
    assert not verifier.settle(landed, 2)
    assert contents(store)[:10] == DATA[:10]


def test_does_a_wrong_second_copy_leave_a_right_first_alone(store: MemoryStore, verifier: Verifier) -> None:
    Transfer(verifier, 1, 0).fill(DATA[:10])
    (landed,) = Transfer(verifier, 2, 0).fill(b"x" * 10).landed
    assert not landed.correct
    assert verifier.holder(0) == 1
    assert contents(store)[:10] == DATA[:10]


def test_is_a_spare_put_in_place_once_the_first_has_let_go(store: MemoryStore, verifier: Verifier) -> None:
    first = Transfer(verifier, 1, 0)
    (landed,) = Transfer(verifier, 2, 0).fill(DATA[:10]).landed
    first.stop()
    assert verifier.settle(landed, 2)
    assert verifier.holder(0) == 2
    assert contents(store)[:10] == DATA[:10]
    assert not verifier.settle(landed, 3)


def test_is_a_spare_put_in_place_after_a_wrong_first(store: MemoryStore, verifier: Verifier) -> None:
    first = Transfer(verifier, 1, 0)
    (landed,) = Transfer(verifier, 2, 0).fill(DATA[:10]).landed
    first.fill(b"x" * 10)
    assert verifier.settle(landed, 2)
    assert contents(store)[:10] == DATA[:10]


@pytest.mark.parametrize("blake3", [False, True])
def test_are_forged_bytes_wrong_where_blake3_is_checked(blake3: bool) -> None:
    data, scheme = random.Random(1).randbytes(5000), HashScheme(leaf_bytes=8192)
    found = chunk_digests(scheme, [data], blake3=True)
    entry = FileEntry("data", 5000, "", (ChunkEntry(5000, found.xxh3.hex()),), blake3=(found.blake3.hex(),))
    made = Manifest(1, "checkpoint", "", scheme, 8192, (entry,))
    landed = []
    for sent in (forged(data), data):
        verifier = Verifier(made, MemoryStore(made), Bitfield(1), blake3=blake3)
        landed += [chunk.correct for chunk in Transfer(verifier, 1, 0).fill(sent).landed]
    assert landed == [not blake3, True]


def test_is_there_nothing_to_settle_about_a_chunk_in_place(verifier: Verifier) -> None:
    (landed,) = Transfer(verifier, 1, 0).fill(DATA[:10]).landed
    assert not verifier.settle(landed, 1)


def test_does_a_full_disk_free_the_place() -> None:
    store = Failing(manifest())
    verifier = Verifier(store.manifest, store, Bitfield(len(store.manifest.chunks)))
    views = verifier.views(1, [0], list[LandedChunk]().extend)
    next(views)
    with pytest.raises(StoreFull):
        next(views)
    assert verifier.holder(0) is None


def test_does_a_disk_that_is_full_at_settling_free_the_place() -> None:
    store = Failing(manifest())
    verifier = Verifier(store.manifest, store, Bitfield(len(store.manifest.chunks)))
    first = Transfer(verifier, 1, 0)
    (landed,) = Transfer(verifier, 2, 0).fill(DATA[:10]).landed
    first.stop()
    with pytest.raises(StoreFull):
        verifier.settle(landed, 2)
    assert verifier.holder(0) is None
    assert verifier.settle(landed, 2)


ALL = Bitfield.full(3)


def test_is_only_what_is_asked_for_copied(store: MemoryStore) -> None:
    held = Bitfield(3, [2])
    assert copy(Holder(memoryview(DATA)), store, held, chunks=Bitfield(3, [1, 2])) == 10
    assert list(held) == [1, 2]
    assert contents(store) == bytes(10) + DATA[10:20] + bytes(10)


def test_is_memory_copied(store: MemoryStore) -> None:
    held = Bitfield(3, [1])
    assert copy(Holder(memoryview(DATA)), store, held, chunks=ALL) == 20
    assert held.complete
    assert contents(store) == DATA[:10] + bytes(10) + DATA[20:]


def test_are_files_copied(tmp_path: Path, store: MemoryStore) -> None:
    (tmp_path / "data").write_bytes(b"head" + DATA)
    with (tmp_path / "data").open("rb") as file:
        assert copy(Holder(FileSpan(file.fileno(), 4, 30)), store, Bitfield(3), chunks=ALL) == 30
    assert contents(store) == DATA


def test_is_a_file_that_became_shorter_refused(tmp_path: Path, store: MemoryStore) -> None:
    (tmp_path / "data").write_bytes(DATA[:15])
    held = Bitfield(3)
    with (tmp_path / "data").open("rb") as file, pytest.raises(SourceFailed, match="shorter"):
        copy(Holder(FileSpan(file.fileno(), 0, 30)), store, held, chunks=ALL)
    assert list(held) == [0]


def test_is_a_source_with_other_bytes_refused(store: MemoryStore) -> None:
    held = Bitfield(3)
    with pytest.raises(SourceFailed, match="digest"):
        copy(Holder(memoryview(DATA[:10] + os.urandom(20))), store, held, chunks=ALL)
    assert list(held) == [0]


@pytest.mark.parametrize("spans", [(), (memoryview(DATA), memoryview(DATA))], ids=["nothing", "too much"])
def test_is_a_source_of_another_size_a_bug(store: MemoryStore, spans: tuple[Span, ...]) -> None:
    with pytest.raises(LocalProtocolError):
        copy(Holder(*spans), store, Bitfield(3), chunks=ALL)


def test_is_what_was_right_before_never_written_over(store: MemoryStore) -> None:
    for view, data in zip(store.landing(store.manifest.chunks[0]), [DATA[:10]], strict=True):
        view[:] = data
    verifier = Verifier(store.manifest, store, Bitfield.full(len(store.manifest.chunks)))
    transfer = Transfer(verifier, 1, 0).fill(bytes(10))
    assert [(landed.correct, landed.spare is None) for landed in transfer.landed] == [(False, False)]
    assert contents(store)[:10] == DATA[:10]
