"""The contract of `swarm.store.Store` as a program.

`check_store` fills stores with a small checkpoint in the ways of a fetch: chunks out of order, on several threads, cut
off and brought again, read while others land, sealed, and read again.

An implementer provides a function that makes an empty store for a manifest. Stores that place bytes in given tensors
find the names, types and shapes of these tensors in SAMPLE_TENSORS.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from swarm.content import safetensors_header
from swarm.content.manifest import Chunk, ChunkEntry, FileEntry, HashScheme, Manifest, cut, units
from swarm.errors import StoreError
from swarm.hashing.cpu import chunk_digests
from swarm.store import FileSpan, Source, Store
from swarm.testing.require import require

CHUNK_BYTES = 16 << 10

# The tensors of `sample`: safetensors' type, bytes an element, shape.
SAMPLE_TENSORS: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "embed": ("F32", 4, (100, 100)),
    "nothing": ("F32", 4, (0, 8)),
    "bias": ("BF16", 2, (7,)),
    "head": ("U8", 1, (30_001,)),
}
MakeStore: TypeAlias = Callable[[Manifest], Store]


def check_store(make: MakeStore, *, persistent: bool = False) -> None:
    """Raises AssertionError, or the error of a store, unless the stores that `make` makes keep the contract.

    Each call of `make` is for another artifact. A persistent store is also made again for the same artifact, after
    `close`, and must find the chunks that landed before; while it is open, a second store for it raises StoreError.
    """
    _check_filling(make, *sample(1))
    _check_cut_off(make, *sample(2))
    _check_threads(make, *sample(3))
    if persistent:
        _check_resuming(make, *sample(4))


def sample(seed: int) -> tuple[Manifest, dict[str, bytes]]:
    """A small checkpoint, with its contents by file: safetensors, an empty tensor among them, and a file of JSON."""
    rng = random.Random(seed)  # noqa: S311 - contents, not secrets
    sizes = {name: width * math.prod(shape) for name, (_, width, shape) in SAMPLE_TENSORS.items()}
    header = safetensors_header.compose(
        [(name, dtype, shape, sizes[name]) for name, (dtype, _, shape) in SAMPLE_TENSORS.items()]
    )
    data = len(header).to_bytes(8, "little") + header + rng.randbytes(sum(sizes.values()))
    return describe({"config.json": rng.randbytes(300), "model.safetensors": data})


def describe(contents: Mapping[str, bytes]) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of files with these contents, and the contents."""
    scheme = HashScheme(leaf_bytes=4096)
    files = []
    for path, data in sorted(contents.items()):
        header = data[8 : 8 + int.from_bytes(data[:8], "little")] if path.endswith(".safetensors") else b""
        tensors = FileEntry(path, len(data), header.decode(), ()).tensors()
        ends = list(itertools.accumulate(cut(units(len(data), tensors), CHUNK_BYTES), initial=0))
        parts = [data[start:end] for start, end in itertools.pairwise(ends)]
        chunks = tuple(ChunkEntry(len(part), chunk_digests(scheme, [part]).xxh3.hex()) for part in parts)
        files.append(FileEntry(path, len(data), header.decode(), chunks))
    manifest = Manifest(1, "checkpoint", "", scheme, CHUNK_BYTES, tuple(files))
    manifest.check()
    return manifest, dict(contents)


def content(manifest: Manifest, contents: Mapping[str, bytes], chunk: Chunk) -> bytes:
    """The bytes of a chunk by the contents of its file."""
    return contents[manifest.files[chunk.file].path][chunk.offset : chunk.offset + chunk.size]


def land(store: Store, chunk: Chunk, data: bytes) -> None:
    """Writes bytes to a chunk's place."""
    position = 0
    for view in store.landing(chunk):
        require(len(view) > 0, "`landing` yields an empty view")
        require(not view.readonly, "`landing` yields a view that cannot be written to")
        view[:] = data[position : position + len(view)]
        position += len(view)
    require(position == chunk.size, f"`landing` yields views of {position} bytes for {chunk}")


def stored(source: Source, chunk: Chunk) -> bytes:
    """The bytes that a source lends for a chunk."""
    return b"".join(
        os.pread(span.fd, span.size, span.offset) if isinstance(span, FileSpan) else bytes(span)
        for span in source.spans(chunk)
    )


def is_right(source: Source, chunk: Chunk) -> bool:
    """Whether a chunk has the digest that the manifest names."""
    return chunk.has(chunk_digests(source.manifest.scheme, [stored(source, chunk)]))


def _check_filling(make: MakeStore, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    with contextlib.closing(make(manifest)) as store:
        require(store.manifest == manifest, "the store has another manifest")
        require(not _right(store), "a new store holds right chunks")
        for chunk in reversed(manifest.chunks):
            land(store, chunk, content(manifest, contents, chunk))
            require(is_right(store, chunk), f"{chunk} is not served while others are missing")
        _require_sealed(store)


def _check_cut_off(make: MakeStore, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    with contextlib.closing(make(manifest)) as store:
        for chunk in manifest.chunks:
            views = iter(store.landing(chunk))
            next(views)[:1] = b"?"
            views.close()  # type: ignore[attr-defined]  # landings are generators: a broken transfer closes them
            wrong = bytes(byte ^ 0xFF for byte in content(manifest, contents, chunk))
            land(store, chunk, wrong)
            require(stored(store, chunk) == wrong, f"{chunk} does not hold the bytes written last")
            land(store, chunk, content(manifest, contents, chunk))
        _require_sealed(store)


def _check_threads(make: MakeStore, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    with contextlib.closing(make(manifest)) as store, ThreadPoolExecutor(4) as pool:

        def bring(chunk: Chunk) -> bool:
            land(store, chunk, content(manifest, contents, chunk))
            return is_right(store, chunk)

        require(all(pool.map(bring, manifest.chunks)), "chunks that land on several threads are wrong")
        right = pool.map(lambda chunk: is_right(store, chunk), manifest.chunks)
        require(all(right), "chunks that are read on several threads are wrong")
        _require_sealed(store)


def _check_resuming(make: MakeStore, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    early, late = manifest.chunks[::2], manifest.chunks[1::2]
    with contextlib.closing(make(manifest)) as store:
        try:
            make(manifest).close()
        except StoreError:
            pass
        else:
            raise AssertionError("two stores are open for one place at once")
        _land_all(store, early, contents)
    with contextlib.closing(make(manifest)) as store:
        require(_right(store) == list(early), "a store that is opened again does not hold the chunks that landed")
        _land_all(store, late, contents)
        _require_sealed(store)
    with contextlib.closing(make(manifest)) as store:
        require(_right(store) == list(manifest.chunks), "a sealed store that is opened again lacks chunks")
        _require_sealed(store)


def _land_all(store: Store, chunks: Iterable[Chunk], contents: Mapping[str, bytes]) -> None:
    for chunk in chunks:
        land(store, chunk, content(store.manifest, contents, chunk))


def _right(store: Store) -> list[Chunk]:
    return [chunk for chunk in store.present() if is_right(store, chunk)]


def _require_sealed(store: Store) -> None:
    """Seals a store, whose chunks must be right before and after."""
    _require_all_right(store)
    store.seal(lambda chunk: is_right(store, chunk))
    _require_all_right(store)


def _require_all_right(store: Store) -> None:
    wrong = [chunk.index for chunk in store.manifest.chunks if not is_right(store, chunk)]
    require(not wrong, f"chunks {wrong} do not read as they were written")
