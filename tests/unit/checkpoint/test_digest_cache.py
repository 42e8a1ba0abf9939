"""Records of hashed files and of fetched directories. Hashing with a cache: test_manifest_builder."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from swarm.checkpoint import digest_cache
from swarm.checkpoint.digest_cache import DigestCache, PartOf
from swarm.checkpoint.files import walk
from swarm.content.manifest import ChunkEntry, Digest, FileEntry, HashScheme, Manifest
from swarm.errors import StoreError
from swarm.store.part import narrowed

SCHEME = HashScheme(leaf_bytes=1024)
CHUNK = 8192


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(name.encode())
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def aged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a test are as old as they are, and trusted."""
    monkeypatch.setattr(digest_cache, "RACY_NS", 0)


@pytest.fixture
def manifest() -> Manifest:
    files = [
        FileEntry(name, 1, "", (ChunkEntry(1, number * 16),), blake3=(number * 32,))
        for name, number in (("a", "00"), ("b", "ff"))
    ]
    return Manifest(1, "checkpoint", "", SCHEME, CHUNK, tuple(files))


def opened(cache: Path, model: Path, *, chunk_bytes: int = CHUNK) -> DigestCache:
    return DigestCache(cache, model, walk(model)[0], chunk_bytes=chunk_bytes, scheme=SCHEME)


def test_are_entries_of_unchanged_files_known(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert opened(cache, model).known == {}
    opened(cache, model).save(manifest)
    assert opened(cache, model).known == {file.path: file for file in manifest.files}
    assert opened(cache, model, chunk_bytes=2 * CHUNK).known == {}
    os.utime(model / "b", (1, 1))
    assert opened(cache, model).known.keys() == {"a"}


def test_are_entries_without_blake3_hashed_again(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    entries = tuple(msgspec.structs.replace(file, blake3=()) for file in manifest.files)
    opened(tmp_path / "cache", model).save(msgspec.structs.replace(manifest, files=entries))
    assert opened(tmp_path / "cache", model).known == {}


@pytest.mark.parametrize("write", ["in place", "renamed"])
def test_is_other_content_under_the_old_time_and_size_not_taken_for_the_old(
    model: Path, manifest: Manifest, tmp_path: Path, write: str
) -> None:
    """rsync, cp -p and tar set the time of modification; a block device restores it."""
    opened(tmp_path / "cache", model).save(manifest)
    before = (model / "b").stat()
    (model / "new").write_bytes(b"x")
    if write == "in place":
        (model / "b").write_bytes((model / "new").read_bytes())
    else:
        (model / "new").replace(model / "b")
    (model / "new").unlink(missing_ok=True)
    os.utime(model / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert opened(tmp_path / "cache", model).known.keys() == {"a"}


def test_is_a_stamp_of_a_young_file_not_trusted(
    model: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest_cache, "RACY_NS", 2_000_000_000)
    os.utime(model / "a", (1, 1))  # a time of modification that the user set makes no file older
    opened(tmp_path / "cache", model).save(manifest)
    assert opened(tmp_path / "cache", model).known.keys() == set()


def test_is_nothing_written_when_all_is_known(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    opened(cache, model).save(manifest)
    (record,) = (cache / "manifests").iterdir()
    before = record.stat()
    opened(cache, model).save(manifest)
    assert record.stat() == before
    assert before.st_mode & 0o777 == 0o600


def test_is_what_was_fetched_remembered(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert digest_cache.recall(cache, model) is None
    digest_cache.remember(cache, model, manifest)
    (tmp_path / "link").symlink_to(model)
    assert digest_cache.recall(cache, tmp_path / "link") == manifest
    (kept,) = (cache / "fetched").iterdir()
    kept.write_bytes(b"damaged")
    assert digest_cache.recall(cache, model) is None


def test_are_fetched_parts_of_one_artifact_remembered_together(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    cache, paths = tmp_path / "cache", [file.path for file in manifest.files]
    of = PartOf(Digest("d" * 64), len(paths))
    assert len(paths) > 1
    digest_cache.remember_part(cache, model, narrowed(manifest, {paths[0]}), of=PartOf(Digest("e" * 64), 9))
    for count in range(1, len(paths)):
        digest_cache.remember_part(cache, model, narrowed(manifest, {paths[count - 1]}), of=of)
        assert digest_cache.recall_files(cache, model) == (narrowed(manifest, set(paths[:count])), of)
        assert digest_cache.recall(cache, model) is None
    for part in (paths[-1], paths[0]):
        digest_cache.remember_part(cache, model, narrowed(manifest, {part}), of=of)
        assert digest_cache.recall_files(cache, model) == (manifest, None)
        assert digest_cache.recall(cache, model) == manifest


def test_does_remembering_say_when_it_cannot(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StoreError):
        digest_cache.remember(tmp_path / "cache", model, manifest)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_is_a_record_that_others_can_write_ignored(
    model: Path, manifest: Manifest, tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    opened(cache, model).save(manifest)
    (record,) = (cache / "manifests").iterdir()
    record.chmod(mode)
    assert opened(cache, model).known == {}
    assert "another user can have written it" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="files of other users need root")
def test_is_a_record_of_another_user_ignored(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    digest_cache.remember(tmp_path, model, manifest)
    (record,) = (tmp_path / "fetched").iterdir()
    os.chown(record, 12345, 12345)
    assert digest_cache.recall(tmp_path, model) is None


def test_is_a_record_that_is_a_link_or_no_file_ignored(model: Path, manifest: Manifest, tmp_path: Path) -> None:
    digest_cache.remember(tmp_path, model, manifest)
    (record,) = (tmp_path / "fetched").iterdir()
    record.rename(tmp_path / "elsewhere")
    record.symlink_to(tmp_path / "elsewhere")
    assert digest_cache.recall(tmp_path, model) is None
    record.unlink()
    os.mkfifo(record)
    assert digest_cache.recall(tmp_path, model) is None
