"""The Store contract as a program: every store passes `check_store`.

It fills a store with a small checkpoint in the ways that a fetch does: chunks out of order, on several threads, broken
off and brought again, read while others land, sealed, read again.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from swarm.content import safetensors_header
from swarm.content.manifest import Chunk, ChunkEntry, FileEntry, HashScheme, Manifest, cut, units
from swarm.errors import StoreError
from swarm.hashing.cpu import chunk_digest
from swarm.store import FileSpan, Source, Store

CHUNK_BYTES = 16 << 10

# The tensors of `sample`, for whoever has to bring some.
KINDS_OF_SAMPLE = {
    "embed": (torch.float32, (100, 100)),
    "nothing": (torch.float32, (0, 8)),
    "bias": (torch.bfloat16, (7,)),
    "head": (torch.uint8, (30_001,)),
}
MakeStore = Callable[[Manifest], Store]


def check_store(make: MakeStore, *, persistent: bool = False) -> None:
    """Raises AssertionError, or whatever the store raises, unless the stores that `make` makes keep the contract.

    `make` is called several times, each time for another artifact; for a persistent store also again for the same one,
    after `close`, and must then find what landed before.
    """
    _check_filling(make, *sample(1))
    _check_broken_off(make, *sample(2))
    _check_threads(make, *sample(3))
    if persistent:
        _check_resuming(make, *sample(4))


def sample(seed: int) -> tuple[Manifest, dict[str, bytes]]:
    """A small checkpoint: a safetensors file with an empty tensor in it, and a file of another kind."""
    dice = np.random.default_rng(seed)
    entries = [
        ("embed", "F32", (100, 100), 40_000),
        ("nothing", "F32", (0, 8), 0),
        ("bias", "BF16", (7,), 14),
        ("head", "U8", (30_001,), 30_001),
    ]
    header = safetensors_header.compose(entries)
    data = len(header).to_bytes(8, "little") + header + dice.bytes(sum(size for *_, size in entries))
    return describe({"config.json": dice.bytes(300), "model.safetensors": data})


def describe(contents: Mapping[str, bytes], *, chunk_bytes: int = CHUNK_BYTES) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of files with these contents, and the contents."""
    scheme = HashScheme(leaf_bytes=4096)
    files = []
    for path, data in sorted(contents.items()):
        header = data[8 : 8 + int.from_bytes(data[:8], "little")] if path.endswith(".safetensors") else b""
        tensors = FileEntry(path, len(data), header.decode(), ()).tensors()
        ends = list(itertools.accumulate(cut(units(len(data), tensors), chunk_bytes), initial=0))
        parts = [data[start:end] for start, end in itertools.pairwise(ends)]
        chunks = tuple(ChunkEntry(len(part), chunk_digest(scheme, [part]).hex()) for part in parts)
        files.append(FileEntry(path, len(data), header.decode(), chunks))
    manifest = Manifest(1, "checkpoint", "", scheme, chunk_bytes, tuple(files))
    manifest.check()
    return manifest, dict(contents)


def content(manifest: Manifest, contents: Mapping[str, bytes], chunk: Chunk) -> bytes:
    """What the chunk should hold."""
    return contents[manifest.files[chunk.file].path][chunk.offset : chunk.offset + chunk.size]


def land(store: Store, chunk: Chunk, data: bytes) -> None:
    """Puts bytes in a chunk's place."""
    position = 0
    for view in store.landing(chunk):
        assert len(view) > 0, "an empty view"
        assert not view.readonly
        view[:] = data[position : position + len(view)]
        position += len(view)
    assert position == chunk.size, f"views of {position} bytes for {chunk}"


def stored(source: Source, chunk: Chunk) -> bytes:
    """What a source says that a chunk holds."""
    return b"".join(
        os.pread(span.fd, span.size, span.offset) if isinstance(span, FileSpan) else bytes(span)
        for span in source.spans(chunk)
    )


def is_right(source: Source, chunk: Chunk) -> bool:
    """Whether a chunk reads as the manifest says."""
    return chunk_digest(source.manifest.scheme, [stored(source, chunk)]) == chunk.digest


def _check_filling(make: MakeStore, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    store = make(manifest)
    try:
        assert store.manifest == manifest
        assert not [chunk for chunk in store.present() if is_right(store, chunk)], "a new store holds something"
        for chunk in reversed(manifest.chunks):
            land(store, chunk, content(manifest, contents, chunk))
            assert is_right(store, chunk), f"{chunk} is not served while others are missing"
        _demand_all(store)
        store.seal()
        _demand_all(store)
    finally:
        store.close()


def _check_broken_off(make: MakeStore, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    store = make(manifest)
    try:
        for chunk in manifest.chunks:
            views = iter(store.landing(chunk))
            next(views)[:1] = b"?"
            views.close()  # type: ignore[attr-defined]  # landings are generators: a broken transfer closes them
            wrong = bytes(byte ^ 0xFF for byte in content(manifest, contents, chunk))
            land(store, chunk, wrong)
            assert stored(store, chunk) == wrong
            land(store, chunk, content(manifest, contents, chunk))
        _demand_all(store)
        store.seal()
        _demand_all(store)
    finally:
        store.close()


def _check_threads(make: MakeStore, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    store = make(manifest)

    def bring(chunk: Chunk) -> bool:
        land(store, chunk, content(manifest, contents, chunk))
        return is_right(store, chunk)

    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(bring, manifest.chunks))
            assert all(pool.map(lambda chunk: is_right(store, chunk), manifest.chunks))
        store.seal()
        _demand_all(store)
    finally:
        store.close()


def _check_resuming(make: MakeStore, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    early, late = manifest.chunks[::2], manifest.chunks[1::2]
    store = make(manifest)
    with pytest.raises(StoreError):
        make(manifest).close()  # two fetches into one place at once
    _land_all(store, early, contents)
    store.close()
    store = make(manifest)
    try:
        resumed = [chunk for chunk in store.present() if is_right(store, chunk)]
        assert resumed == list(early)
        _land_all(store, late, contents)
        store.seal()
        _demand_all(store)
    finally:
        store.close()
    store = make(manifest)
    try:
        assert [chunk for chunk in store.present() if is_right(store, chunk)] == list(manifest.chunks)
        store.seal()
        _demand_all(store)
    finally:
        store.close()


def _land_all(store: Store, chunks: Iterable[Chunk], contents: Mapping[str, bytes]) -> None:
    for chunk in chunks:
        land(store, chunk, content(store.manifest, contents, chunk))


def _demand_all(store: Store) -> None:
    wrong = [chunk.index for chunk in store.manifest.chunks if not is_right(store, chunk)]
    assert not wrong, f"chunks {wrong} do not read as they were written"
