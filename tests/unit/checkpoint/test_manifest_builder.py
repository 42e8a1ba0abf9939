from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from swarm.checkpoint import digest_cache, manifest_builder
from swarm.content import safetensors_header
from swarm.content.manifest import Manifest
from swarm.errors import ManifestInvalid, SettingsError, SourceChanged, StoreError
from swarm.hashing.cpu import chunk_digests

CHUNK = 8192
LEAF = 1024
LONG_AGO_S = 1_000_000_000


def safetensors(seed: int = 0, *, metadata: dict[str, str] | None = None) -> bytes:
    entries = [("embed", "F32", (50, 100), 20_000), ("bias", "BF16", (9,), 18), ("head", "U8", (9_999,), 9_999)]
    header = safetensors_header.compose(entries, metadata)
    data = np.random.default_rng(seed).bytes(sum(size for *_, size in entries))
    return len(header).to_bytes(8, "little") + header + data


def fill(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
        settle(root / path)
    return root


def settle(path: Path, at_s: int = LONG_AGO_S) -> None:
    os.utime(path, (at_s, at_s))


@pytest.fixture(autouse=True)
def aged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a test are trusted though they are young."""
    monkeypatch.setattr(digest_cache, "RACY_NS", 0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    files = {"config.json": b"{}", "model.safetensors": safetensors(), "onnx/model.onnx": b"o" * 20_000, "empty": b""}
    return fill(tmp_path / "model", files)


class Hashed:
    """Counts the bytes that are hashed."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done: int | None = None

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if self._done is not None:
            self.bytes += done_bytes - self._done
        self._done = done_bytes


def hashed(path: Path, cache: Path, *, chunk_bytes: int = CHUNK, leaf_bytes: int = LEAF) -> tuple[Manifest, int]:
    count = Hashed()
    manifest, source, _ = manifest_builder.checkpoint(
        path, cache_dir=cache, chunk_bytes=chunk_bytes, leaf_bytes=leaf_bytes, progress=count
    )
    source.close()
    return manifest, count.bytes


def paths(path: Path, cache: Path) -> tuple[list[str], dict[str, str]]:
    manifest, source, skipped = manifest_builder.checkpoint(path, cache_dir=cache)
    source.close()
    return [file.path for file in manifest.files], {item.path: item.why for item in skipped}


def test_does_the_manifest_describe_the_files(model: Path, tmp_path: Path) -> None:
    manifest, source, skipped = manifest_builder.checkpoint(
        model, cache_dir=tmp_path / "cache", chunk_bytes=CHUNK, leaf_bytes=LEAF
    )
    manifest.check()
    assert [file.path for file in manifest.files] == ["config.json", "empty", "model.safetensors", "onnx/model.onnx"]
    assert [tensor.name for tensor in manifest.files[2].tensors()] == ["embed", "bias", "head"]
    assert skipped == []
    with closing(source):
        for chunk in manifest.chunks:
            data = (model / manifest.files[chunk.file].path).read_bytes()[chunk.offset : chunk.offset + chunk.size]
            assert chunk_digests(manifest.scheme, [data]).xxh3 == chunk.digest
            assert b"".join(bytes(view) for view in source.read(chunk)) == data


def test_do_two_copies_have_one_identity(model: Path, tmp_path: Path) -> None:
    copy = fill(tmp_path / "copy", {str(p.relative_to(model)): p.read_bytes() for p in model.rglob("*") if p.is_file()})
    assert hashed(model, tmp_path / "cache")[0].digest == hashed(copy, tmp_path / "cache")[0].digest


@pytest.mark.parametrize("threads", [1, 3])
def test_is_a_file_of_many_jobs_hashed_in_order(tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_builder, "JOB_BYTES", 2 * CHUNK)
    data = np.random.default_rng(1).bytes(11 * CHUNK + 100)
    root = fill(tmp_path / "model", {"a": data, "b": data[::-1]})
    manifest, source, _ = manifest_builder.checkpoint(
        root, cache_dir=tmp_path / "cache", chunk_bytes=CHUNK, threads=threads
    )
    source.close()
    for file, content in zip(manifest.files, (data, data[::-1]), strict=True):
        assert [chunk.digest for chunk in file.chunks] == [
            chunk_digests(manifest.scheme, [content[start : start + CHUNK]]).xxh3.hex()
            for start in range(0, len(content), CHUNK)
        ]


def test_are_skipped_paths_returned_and_not_described(model: Path, tmp_path: Path) -> None:
    fill(model, {".git/HEAD": b"x", "bad\\name": b"x"})
    served, skipped = paths(model, tmp_path / "cache")
    assert served == ["config.json", "empty", "model.safetensors", "onnx/model.onnx"]
    assert skipped.keys() == {".git", "bad\\name"}
    assert paths(model / "model.safetensors", tmp_path / "cache") == (["model.safetensors"], {})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 8,
        (10).to_bytes(8, "little") + b'{"a": "\xff"',
        safetensors()[:-1],
        safetensors() + b"x",
    ],
)
def test_is_a_broken_safetensors_file_an_error(model: Path, tmp_path: Path, content: bytes) -> None:
    fill(model, {"broken.safetensors": content})
    with pytest.raises(ManifestInvalid, match=r"broken\.safetensors"):
        paths(model, tmp_path / "cache")


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ({"weight_map": {"a": "model.safetensors", "b": "gone-1.safetensors"}}, "missing: gone-1.safetensors"),
        ({"weight_map": {str(n): f"gone-{n}.safetensors" for n in range(9)}}, "9 of the files"),
        ({"weight_map": {"a": "../model/model.safetensors"}}, "missing"),
        ({"weight_map": ["model.safetensors"]}, "no weight_map"),
        ([], "no weight_map"),
        ("{", "not JSON"),
    ],
)
def test_is_an_index_that_names_missing_files_an_error(model: Path, tmp_path: Path, index: object, why: str) -> None:
    text = index if isinstance(index, str) else json.dumps(index)
    fill(model, {"model.safetensors.index.json": text.encode()})
    with pytest.raises(ManifestInvalid, match=rf"model\.safetensors\.index\.json.*{why}"):
        paths(model, tmp_path / "cache")


def test_does_a_complete_index_pass(model: Path, tmp_path: Path) -> None:
    fill(model, {"sub/x.safetensors": safetensors(1)})
    for folder, shard in (("", "model.safetensors"), ("sub/", "x.safetensors")):
        index = json.dumps({"metadata": {}, "weight_map": {"embed": shard}}).encode()
        fill(model, {f"{folder}model.safetensors.index.json": index})
    assert "sub/model.safetensors.index.json" in paths(model, tmp_path / "cache")[0]


@pytest.mark.parametrize("sizes", [{"chunk_bytes": 0}, {"chunk_bytes": 1 << 30}, {"leaf_bytes": 1}])
def test_are_sizes_out_of_bounds_refused(model: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match=next(iter(sizes))):
        hashed(model, tmp_path / "cache", **sizes)


def test_are_unchanged_files_hashed_once(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, first_bytes = hashed(model, cache)
    again, again_bytes = hashed(model, cache)
    assert (first_bytes, again_bytes) == (first.size, 0)
    assert again == first
    assert hashed(model, cache, chunk_bytes=2 * CHUNK)[1] == first.size
    assert hashed(model, cache, leaf_bytes=2 * LEAF)[1] == first.size


def test_is_only_what_changed_hashed_again(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, _ = hashed(model, cache)
    fill(model, {"onnx/model.onnx": b"O" * 20_000, "new": b"n" * 10})
    settle(model / "onnx/model.onnx", LONG_AGO_S + 1)
    (model / "config.json").unlink()
    changed, changed_bytes = hashed(model, cache)
    assert changed_bytes == 20_010
    assert [file.path for file in changed.files] == ["empty", "model.safetensors", "new", "onnx/model.onnx"]
    assert changed.files[3] != first.files[3]
    assert manifest_builder.verify(model, changed) == []
    assert hashed(model, cache) == (changed, 0)


def test_are_fresh_files_hashed_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "RACY_NS", 60_000_000_000)
    manifest, _ = hashed(model, tmp_path / "cache")
    assert hashed(model, tmp_path / "cache") == (manifest, manifest.size)


def test_is_a_file_with_the_same_time_and_size_but_another_inode_hashed_again(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    before, _ = hashed(model, cache)
    (model / "config.json").rename(model / "onnx" / "old")
    fill(model, {"config.json": b"[]"})
    (model / "onnx" / "old").unlink()
    after, count = hashed(model, cache)
    assert count == 2
    assert after.digest != before.digest


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-20], lambda data: b"[]", lambda data: data.replace(b"empty", b"tempy")],
)
def test_is_a_damaged_cache_ignored_and_written_again(
    model: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    cache = tmp_path / "cache"
    first, _ = hashed(model, cache)
    (kept,) = (cache / "manifests").iterdir()
    kept.write_bytes(damage(kept.read_bytes()))
    assert hashed(model, cache) == (first, first.size)
    assert hashed(model, cache) == (first, 0)


def test_is_serving_possible_without_a_cache(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    assert hashed(model, tmp_path / "cache")[1] > 0
    assert "not cached" in caplog.text


def test_is_a_file_that_changes_while_it_is_hashed_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, lock = os.preadv, threading.Lock()

    def change_behind(fd: int, buffers: list[memoryview], offset: int) -> int:
        with lock:  # no file is read before the change, and every file is planned by then
            settle(model / "onnx" / "model.onnx", LONG_AGO_S + 5)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", change_behind)
    with pytest.raises(SourceChanged, match=r"model\.onnx"):
        hashed(model, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_is_the_source_held_to_the_moment_of_hashing(model: Path, tmp_path: Path) -> None:
    manifest, source, _ = manifest_builder.checkpoint(model, cache_dir=tmp_path / "cache")
    with closing(source):
        (model / "config.json").write_bytes(b"[]")
        with pytest.raises(SourceChanged, match=r"config\.json"):
            list(source.spans(manifest.chunks[0]))


def test_does_an_unreadable_file_say_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StoreError, match="Input/output error"):
        hashed(model, tmp_path / "cache")


def test_does_verify_name_every_problem(model: Path, tmp_path: Path) -> None:
    manifest, _ = hashed(model, tmp_path / "cache")
    assert manifest_builder.verify(model, manifest) == []
    data = bytearray((model / "onnx/model.onnx").read_bytes())
    data[CHUNK] ^= 1
    data[-1] ^= 1
    (model / "onnx/model.onnx").write_bytes(data)
    (model / "config.json").unlink()
    (model / "empty").write_bytes(b"x")
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    assert manifest_builder.verify(model, manifest) == [
        "config.json: is missing",
        "empty: has 1 bytes instead of 0",
        "model.safetensors: is not a file",
        "onnx/model.onnx: 2 of 3 chunks differ, the first is the one at byte 8192; "
        "remove the file and fetch again, the others are kept",
    ]
