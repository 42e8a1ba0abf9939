"""A seed that appears while others read its model from an origin: does it serve them, and only what is right?"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from swarm.content.manifest import ChunkEntry, FileEntry, HashScheme, Manifest
from swarm.content.promise import ListedFile, Listing, promise
from swarm.hashing.cpu import chunk_digests
from swarm.node import promised_seed
from swarm.store.directory_source import DirectorySource
from swarm.store.memory_store import MemoryStore

from .test_promised_fetch import DATA, MemoryOrigin, MemoryStream, contents, listing_of, source_of
from .test_resolve import MODEL, Street, run, until

CHUNK_BYTES = 300_000  # not the grid of the promise


def served(root: Path, data: dict[str, bytes]) -> DirectorySource:
    """Files as `swarm serve` serves them."""
    scheme, entries = HashScheme(), []
    for path, content in sorted(data.items()):
        (root / path).write_bytes(content)
        parts = [content[at : at + CHUNK_BYTES] for at in range(0, len(content), CHUNK_BYTES)]
        chunks = tuple(ChunkEntry(len(part), chunk_digests(scheme, [part]).xxh3.hex()) for part in parts)
        entries.append(FileEntry(path, len(content), "", chunks))
    manifest = Manifest(1, "checkpoint", "", scheme, CHUNK_BYTES, tuple(entries))
    return DirectorySource(root, manifest, paths=[root / entry.path for entry in entries])


@dataclass
class SlowOrigin(MemoryOrigin):
    """An origin that gives its first bytes, and the rest never before `over`."""

    over: threading.Event = field(default_factory=threading.Event)

    def read(self, listing: Listing, file: ListedFile, offset: int, size: int) -> SlowStream:  # type: ignore[override]
        return SlowStream(self, super().read(listing, file, offset, size))


@dataclass
class SlowStream:
    """A range of it."""

    origin: SlowOrigin
    stream: MemoryStream

    def readinto(self, view: memoryview, /) -> int:
        if self.origin.read_bytes > 1 << 18:
            self.origin.over.wait(30)
            return 0
        return self.stream.readinto(view)

    def close(self) -> None:
        self.origin.over.set()


def test_does_a_late_seed_serve_what_the_origin_still_lacks(tmp_path: Path) -> None:
    async def scenario() -> None:
        street, origin = Street(), SlowOrigin(DATA)
        async with street.node("one") as one, street.node("seed", knows=["one"]) as seed:
            await until(lambda: bool(one.peers))
            store = MemoryStore(promise(listing_of(DATA)))
            fetching = asyncio.ensure_future(one.fetch(MODEL, store, source=source_of(origin)))
            await until(lambda: origin.read_bytes > 1 << 18)
            source = served(tmp_path, DATA)
            seed.serve(MODEL, source)
            promised_seed.follow(seed, MODEL, source)
            fetched = await asyncio.wait_for(fetching, 20)
            assert contents(store) == DATA
            assert fetched.sources["seed"] > fetched.bytes // 2
            seed.release(source.manifest.digest)
            await until(lambda: store.manifest.digest not in seed.holdings())

    run(scenario)


@pytest.mark.parametrize("what", ["content", "size", "path"])
def test_does_a_seed_of_other_files_stay_away(tmp_path: Path, what: str) -> None:
    others = {
        "content": {**DATA, "b.bin": DATA["b.bin"][:-1] + b"!"},
        "size": {**DATA, "b.bin": DATA["b.bin"] + b"!"},
        "path": {**DATA, "e": b"!"},
    }

    async def scenario() -> None:
        street, origin = Street(), MemoryOrigin(DATA)
        async with street.node("one") as one, street.node("seed", knows=["one"]) as seed:
            await until(lambda: bool(one.peers))
            source = served(tmp_path, others[what])
            seed.serve(MODEL, source)
            follower = promised_seed.PromisedSeed(seed, MODEL, source)
            seed.spawn(follower.run(), "promises")
            store = MemoryStore(promise(listing_of(DATA)))
            await one.fetch(MODEL, store, source=source_of(origin))
            await until(lambda: store.manifest.digest in follower.tried)
            held = seed.holdings().get(store.manifest.digest, ())
            wrong = {chunk.index for chunk in store.manifest.chunks if store.manifest.files[chunk.file].path == "b.bin"}
            assert not wrong & set(held)
            assert contents(store) == DATA

    run(scenario)
