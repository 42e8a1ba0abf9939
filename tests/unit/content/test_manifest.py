"""What is a manifest, how are files cut, and what does a stranger's manifest get away with?"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.content import manifest as manifests
from swarm.content import safetensors_header
from swarm.content.manifest import (
    CHUNK_BYTES_LARGEST,
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_SMALLEST,
    PATH_BYTES_MAX,
    ChunkEntry,
    Digest,
    Digests,
    FileEntry,
    HashScheme,
    Manifest,
    cut,
    decode,
    default_chunk_bytes,
    unsafe_path,
)
from swarm.errors import ManifestInvalid

HASH = "01" * 16
GOLDEN = (
    b'{"version":1,"tier":"checkpoint","fingerprint":"","scheme":{"name":"xxh3-128","leaf_bytes":524288},'
    b'"chunk_bytes":4,"files":[{"path":"config.json","size":2,"header":"","chunks":[[2,"' + HASH.encode() + b'"]]}]}'
)
GOLDEN_DIGEST = Digest("7b6a4c3aae16539e58bf9a1160e291b8173143637cf75ee73b2c41237c4da25f")


def file(path: str = "config.json", *sizes: int, header: str = "") -> FileEntry:
    return FileEntry(path, sum(sizes), header, tuple(ChunkEntry(size, HASH) for size in sizes))


def manifest_of(*files: FileEntry, chunk_bytes: int = 4) -> Manifest:
    return Manifest(1, "checkpoint", "", HashScheme(), chunk_bytes, files)


def received(data: bytes) -> Manifest:
    return decode(data, digest=Digest(hashlib.sha256(data).hexdigest()))


def slow_cut(units: list[int], chunk_bytes: int) -> list[int]:
    """The rule of `cut`, byte by byte."""
    sizes: list[int] = []
    for unit in units:
        fits = bool(sizes) and unit <= chunk_bytes - sizes[-1]
        for byte in range(unit):
            if not sizes or sizes[-1] == chunk_bytes or (byte == 0 and not fits):
                sizes.append(0)
            sizes[-1] += 1
    return sizes


@pytest.mark.parametrize(
    ("units", "sizes"),
    [
        ([], []),
        ([0], []),
        ([0, 0], []),
        ([3], [3]),
        ([10], [10]),
        ([11], [10, 1]),
        ([30], [10, 10, 10]),
        ([4, 5], [9]),
        ([4, 6], [10]),
        ([4, 7], [4, 7]),
        ([4, 0, 6], [10]),
        ([4, 25], [4, 10, 10, 5]),
        ([25, 5], [10, 10, 10]),
        ([25, 6], [10, 10, 5, 6]),
        ([10, 1], [10, 1]),
    ],
)
def test_how_are_units_cut(units: list[int], sizes: list[int]) -> None:
    assert cut(units, 10) == sizes


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 16))
def test_is_the_cut_that_of_the_rule(units: list[int], chunk_bytes: int) -> None:
    sizes = cut(units, chunk_bytes)
    assert sizes == slow_cut(units, chunk_bytes)
    assert sum(sizes) == sum(units)
    assert all(0 < size <= chunk_bytes for size in sizes)


@pytest.mark.parametrize(
    ("total_bytes", "chunk_bytes"),
    [
        (0, CHUNK_BYTES_SMALLEST),
        (256 << 20, 256 << 10),
        ((256 << 20) + 1024, 512 << 10),
        (1 << 30, 1 << 20),
        (16 << 30, 16 << 20),
        (1 << 50, CHUNK_BYTES_LARGEST),
    ],
)
def test_how_large_are_chunks_by_default(total_bytes: int, chunk_bytes: int) -> None:
    assert default_chunk_bytes(total_bytes) == chunk_bytes


def test_do_identity_and_canonical_bytes_stay_what_they_were() -> None:
    manifest = manifest_of(file("config.json", 2))
    assert manifest.encoded == GOLDEN
    assert manifest.digest == GOLDEN_DIGEST
    assert decode(GOLDEN, digest=GOLDEN_DIGEST) == manifest


def test_where_do_chunks_lie() -> None:
    manifest = manifest_of(file("a", 4, 1), file("b"), file("c", 3))
    assert [(c.index, c.file, c.offset, c.size) for c in manifest.chunks] == [(0, 0, 0, 4), (1, 0, 4, 1), (2, 2, 0, 3)]
    assert manifest.size == 8
    assert manifest.chunks[0].digest == b"\1" * 16
    assert "3 files, 3 chunks, 8 bytes" in repr(manifest)


def test_is_a_manifest_with_another_digest_refused() -> None:
    with pytest.raises(ManifestInvalid, match="a peer altered it"):
        decode(GOLDEN, digest=Digest("0" * 64))


def test_is_one_content_in_another_form_refused() -> None:
    assert received(GOLDEN)
    spaced = GOLDEN.replace(b":", b": ", 1)
    with pytest.raises(ManifestInvalid, match="canonical"):
        received(spaced)


def test_is_a_huge_manifest_refused_before_it_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "MANIFEST_BYTES_MAX", len(GOLDEN))
    assert received(GOLDEN)
    with pytest.raises(ManifestInvalid, match="at most"):
        decode(GOLDEN + b" ", digest=Digest("not looked at"))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"tier": "hoard"},
        {"fingerprint": "x" * 4097},
        {"chunk_bytes": 0},
        {"chunk_bytes": CHUNK_BYTES_MAX + 1},
        {"unknown": 1},
        {"scheme": {"name": "md5", "leaf_bytes": 131072}},
        {"scheme": {"name": "blake3", "leaf_bytes": 131072}},  # whose digests are longer
        {"scheme": {"name": "xxh3-128", "leaf_bytes": 1023}},
        {"scheme": {"name": "xxh3-128", "leaf_bytes": CHUNK_BYTES_MAX + 1}},
        {"files": [{"path": "", "size": 0, "header": "", "chunks": []}]},
        {"files": [{"path": "a", "size": -1, "header": "", "chunks": []}]},
        {"files": [{"path": "a", "size": (1 << 48) + 1, "header": "", "chunks": []}]},
        {"files": [{"path": "a", "size": 0, "header": "", "chunks": [[0, HASH]]}]},
        {"files": [{"path": "a", "size": 1, "header": "", "chunks": [[1, HASH[1:]]]}]},
        {"files": [{"path": "a", "size": 1, "header": "", "chunks": [[1, HASH + "\n"]]}]},
        {"files": [{"path": "a", "size": 1, "header": "", "chunks": [[1, HASH.replace("0", "A")]]}]},
        {"files": [{"path": "a", "size": 1, "header": "", "chunks": [[1, HASH, 1]]}]},
        {"files": [{"path": "a", "size": 1, "header": "", "chunks": [[1, HASH]], "mode": 0o777}]},
    ],
)
def test_is_a_value_out_of_bounds_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ManifestInvalid):
        received(msgspec.json.encode(msgspec.json.decode(GOLDEN) | changes))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"version":1}'])
def test_is_garbage_with_the_right_digest_refused(data: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        received(data)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([file("b", 1), file("a", 1)], "not in order"),
        ([file("a", 1), file("a", 1)], "given twice"),
        ([file("a", 1), file("a/b", 1)], "both a file and a directory"),
        ([file("a", 1), file("a-", 1), file("a/b/c", 1)], "both a file and a directory"),
        ([file("../a", 1)], "leaves its directory"),
        ([FileEntry("a", 2, "", (ChunkEntry(1, HASH),))], "do not add up"),
        ([FileEntry("a", 0, "", (ChunkEntry(1, HASH),))], "do not add up"),
        ([FileEntry("a", 1, "", (ChunkEntry(1, HASH),), blake3=("0" * 64,) * 2)], "1 chunks and 2 BLAKE3 digests"),
        ([file("a", 5)], "larger than chunk_bytes"),
        ([file("a", 1, header="{")], "broken safetensors header"),
    ],
)
def test_is_a_manifest_that_contradicts_itself_refused(files: list[FileEntry], says: str) -> None:
    manifest = manifest_of(*files)
    with pytest.raises(ManifestInvalid, match=says):
        manifest.check()
    with pytest.raises(ManifestInvalid, match=says):
        received(manifest.encoded)


def test_are_too_many_chunks_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "CHUNKS_MAX", 2)
    manifest_of(file("a", 1, 1)).check()
    with pytest.raises(ManifestInvalid, match="3 chunks; at most 2"):
        manifest_of(file("a", 1, 1, 1)).check()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "..", "../a", "a/../b", "a/..", ".", "./a", "a/.", "a//b", "a/", "", "a\0b", "a\\b", "a\nb",
        "\x1b[2J", ".swarm", ".swarm/x", "x" * 256, "é" * 128, "/".join(["x" * 200] * 6), "/".join(["é" * 100] * 6),
    ],
)  # fmt: skip
def test_is_an_unsafe_path_refused(path: str) -> None:
    assert unsafe_path(path)
    if path:
        with pytest.raises(ManifestInvalid):
            received(manifest_of(file(path, 1)).encoded)


@pytest.mark.parametrize("path", ["a", "a/b", "..a", "a..", "...", ".gitignore", "a/.swarm", "x" * 255, "é/ü", "a b"])
def test_is_a_harmless_path_accepted(path: str) -> None:
    assert unsafe_path(path) is None
    assert received(manifest_of(file(path, 1)).encoded).files[0].path == path


def test_is_a_path_of_exactly_the_limit_accepted() -> None:
    path = "/".join(["x" * 204] * 5)
    assert len(path) == PATH_BYTES_MAX
    assert unsafe_path(path) is None
    assert unsafe_path(path + "x")


def pinnable(*digests: int) -> FileEntry:
    """A file of two chunks with this many BLAKE3 digests."""
    return FileEntry("a", 2, "", (ChunkEntry(1, HASH),) * 2, blake3=tuple(f"{n:064x}" for n in digests))


def test_do_manifests_say_whether_they_can_be_pinned() -> None:
    made = received(manifest_of(pinnable(1, 2), file("empty")).encoded)
    assert made.has_blake3
    assert [chunk.blake3[-1] for chunk in made.chunks] == [1, 2]
    assert not manifest_of(pinnable(1, 2), file("b", 1)).has_blake3
    assert manifest_of(pinnable()).chunks[0].blake3 == b""


def test_has_a_chunk_both_digests_or_is_it_another() -> None:
    chunk = manifest_of(pinnable(1, 2)).chunks[0]
    assert chunk.has(Digests(chunk.digest))
    assert chunk.has(Digests(chunk.digest, chunk.blake3))
    assert not chunk.has(Digests(chunk.digest, bytes(32)))
    assert not chunk.has(Digests(bytes(16), chunk.blake3))


def test_which_names_are_tied() -> None:
    header = safetensors_header.compose(
        [("a", "U8", (1,), 1), ("b", "U8", (1,), 1)], {"tied": "a", "b": "a", "lost": "c", "format": "pt"}
    ).decode()
    size = 8 + len(header) + 2
    entry = FileEntry("model.safetensors", size, header, (ChunkEntry(size, HASH),))
    assert entry.aliases() == {"tied": "a"}
    assert [tensor.name for tensor in entry.tensors()] == ["a", "b"]
    assert manifests.units(size, entry.tensors()) == [8 + len(header), 1, 1]
    assert manifests.units(7, file("config.json", 7).tensors()) == [7]
    assert file().aliases() == {}


def test_may_threads_read_the_first_manifests_at_once() -> None:
    first = f"""
import sys, threading
from swarm.content import manifest
sys.setswitchinterval(1e-6)
together = threading.Barrier(8)
def read():
    together.wait()
    manifest.decode({GOLDEN!r}, digest={GOLDEN_DIGEST!r})
threads = [threading.Thread(target=read) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    assert [subprocess.run([sys.executable, "-c", first], timeout=60).returncode for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("unused", [("absent",), ("b", "a"), ("a", "a")])
def test_unused_tensors_are_those_of_the_file_in_order(unused: tuple[str, ...]) -> None:
    header = safetensors_header.compose([("a", "U8", (1,), 1), ("b", "U8", (1,), 1)])
    size = 8 + len(header) + 2
    file = FileEntry("m.safetensors", size, header.decode(), (ChunkEntry(size, "0" * 32),), unused)
    with pytest.raises(ManifestInvalid, match="unused"):
        Manifest(1, "checkpoint", "", HashScheme(), 64 << 20, (file,)).check()


def test_has_a_manifest_as_few_directories_as_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 files with paths of 1,024 bytes would make 50 million directories."""
    deepest = "/".join("d" * manifests.DEPTH_MAX)
    assert manifests.unsafe_path(f"{deepest}/f") is None
    assert manifests.unsafe_path(f"{deepest}/d/f") == "is more than 32 directories deep"
    monkeypatch.setattr(manifests, "DIRECTORIES_MAX", 10)
    for count, fine in ((5, True), (6, False)):
        files = tuple(FileEntry(f"{n}/d/f", 0, "", ()) for n in range(count))
        made = Manifest(1, "checkpoint", "", HashScheme(), 1, files)
        if fine:
            made.check()
        else:
            with pytest.raises(ManifestInvalid, match="more than 10 directories"):
                made.check()
