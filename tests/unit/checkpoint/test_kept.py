"""What swarm wrote into the Hugging Face cache: is exactly that removed?"""

from __future__ import annotations

import os
from pathlib import Path

import huggingface_hub
import pytest

from swarm.checkpoint import hf_cache, kept, manifest_builder
from swarm.checkpoint.hf_publish import CacheEntry
from swarm.content.manifest import Manifest
from swarm.protocol.messages import Origin
from swarm.store.partial_directory import PARTIAL

from .test_hf_cache import tree
from .test_hub_names import COMMIT, FILES, MODEL, hub_name, lay_out

OTHER = "d" * 40


def fetched(tmp_path: Path, files: dict[str, bytes], commit: str | None, *, revision: str | None = None) -> Path:
    """What a fetch into the cache leaves."""
    plain = tmp_path / "plain" / str(commit)
    for path, data in files.items():
        (plain / path).parent.mkdir(parents=True, exist_ok=True)
        (plain / path).write_bytes(data)
    manifest, source, _ = manifest_builder.checkpoint(plain, cache_dir=tmp_path / "cache")
    source.close()
    entry = CacheEntry(MODEL, root=tmp_path / "hub")
    origin = Origin(commit, {p: hub_name(p, d) for p, d in files.items()}, (), {"README.md": b"r"}) if commit else None
    staged = entry.staging(manifest)
    entry.reuse(manifest, origin)
    for path, data in files.items():
        (staged / path).parent.mkdir(exist_ok=True)
        if not (staged / path).exists():
            (staged / path).write_bytes(data)
    snapshot = entry.publish(manifest, origin, revision)
    kept.record(tmp_path / "cache", MODEL, manifest.digest, snapshot, wrote=entry.wrote)
    return snapshot


def remove(tmp_path: Path, revision: str | None = None) -> int:
    found = kept.chosen(kept.all_kept(tmp_path / "cache"), MODEL, revision)
    assert found
    return sum(kept.remove(tmp_path / "cache", one) for one in found)


@pytest.mark.parametrize("commit", [COMMIT, None])
def test_is_a_fetched_model_gone_without_a_trace(tmp_path: Path, commit: str | None) -> None:
    snapshot = fetched(tmp_path, FILES, commit)
    (one,) = kept.all_kept(tmp_path / "cache")
    size = sum(len(data) for data in FILES.values()) + (1 if commit else 0)
    assert (one.model_id, one.commit, one.size) == (MODEL, snapshot.name, size)
    assert remove(tmp_path) == size
    assert list((tmp_path / "hub").iterdir()) == []
    assert kept.all_kept(tmp_path / "cache") == []


def test_do_files_of_the_hubs_tools_stay(tmp_path: Path) -> None:
    lay_out(tmp_path / "hub", {"config.json": FILES["config.json"], "tokenizer.json": b"[]"})
    before = tree(tmp_path / "hub")
    fetched(tmp_path, FILES, COMMIT)
    fetched(tmp_path, FILES | {"config.json": b"[1]"}, OTHER, revision="v2")
    assert remove(tmp_path, "v2") == 3
    assert not huggingface_hub.scan_cache_dir(tmp_path / "hub").warnings
    assert hf_cache.snapshot(MODEL, root=tmp_path / "hub", revision="v2") is None
    snapshot = hf_cache.snapshot(MODEL, root=tmp_path / "hub")
    assert snapshot is not None
    assert {path: (snapshot / path).read_bytes() for path in FILES} == FILES
    remove(tmp_path)
    assert tree(tmp_path / "hub") == before
    assert not huggingface_hub.scan_cache_dir(tmp_path / "hub").warnings


def test_does_a_blob_stay_that_another_snapshot_links_to(tmp_path: Path) -> None:
    snapshot = fetched(tmp_path, FILES, COMMIT)
    other = snapshot.parent / OTHER / "config.json"
    other.parent.mkdir()
    other.symlink_to(os.readlink(snapshot / "config.json"))
    remove(tmp_path)
    assert other.read_bytes() == FILES["config.json"]
    assert not huggingface_hub.scan_cache_dir(tmp_path / "hub").warnings
    other.unlink()
    other.parent.rmdir()
    assert not huggingface_hub.scan_cache_dir(tmp_path / "hub").warnings


def test_does_a_file_stay_that_is_not_what_swarm_wrote(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot = fetched(tmp_path, FILES, COMMIT)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_bytes(b"the user's own")
    remove(tmp_path)
    assert [path.name for path in snapshot.iterdir()] == ["config.json"]
    assert "it is not what swarm wrote there" in caplog.text


def test_are_plain_files_of_a_cache_without_links_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    fetched(tmp_path, FILES, COMMIT)
    assert remove(tmp_path) == sum(len(data) for data in FILES.values()) + 1
    assert list((tmp_path / "hub").iterdir()) == []


def test_is_an_unfinished_fetch_removed_unless_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    manifest, source, _ = manifest_builder.checkpoint(fetched(tmp_path, FILES, COMMIT), cache_dir=tmp_path / "cache")
    source.close()
    remove(tmp_path)
    entry = CacheEntry(MODEL)
    held = entry.claim(manifest)
    assert held is not None
    (place,) = kept.unfinished(MODEL)
    assert not kept.remove_unfinished(place)
    entry.unclaim(manifest, held)
    (place / PARTIAL).mkdir(exist_ok=True)
    (place / PARTIAL / "part").write_bytes(b"x" * 5000)
    assert kept.unfinished(MODEL)[place] > 0
    assert kept.remove_unfinished(place)
    assert list((tmp_path / "hub").iterdir()) == []
    assert kept.unfinished("not/a/model") == {}


def test_is_a_record_that_was_changed_no_way_out_of_the_cache(tmp_path: Path) -> None:
    snapshot = fetched(tmp_path, FILES, COMMIT)
    (tmp_path / "precious").write_bytes(b"12")
    (place,) = (tmp_path / "cache" / kept.FOLDER).iterdir()
    place.write_bytes(place.read_bytes().replace(b'"blobs/', b'"blobs/../../../'))
    for name in ("precious", *(path.name for path in (snapshot.parent.parent / "blobs").iterdir())):
        (tmp_path / name).write_bytes(b"12")
    remove(tmp_path)
    assert (tmp_path / "precious").exists()
    place.write_bytes(b"damaged")
    assert kept.all_kept(tmp_path / "cache") == []


def test_is_a_model_chosen_by_id_revision_or_digits(tmp_path: Path) -> None:
    fetched(tmp_path, FILES, COMMIT)
    fetched(tmp_path, FILES | {"config.json": b"[]"}, OTHER, revision="v2/beta")
    found = kept.all_kept(tmp_path / "cache")
    by_commit = {one.commit: one for one in found}

    def commits(what: str, revision: str | None = None) -> list[str]:
        return [one.commit for one in kept.chosen(found, what, revision)]

    assert commits(MODEL) == [COMMIT, OTHER]
    assert commits(MODEL, "v2/beta") == commits(MODEL, OTHER[:8]) == commits(by_commit[OTHER].digest[:6]) == [OTHER]
    assert commits(MODEL, "main") == [COMMIT]
    assert commits(MODEL, "v3") == commits("org/other") == commits(by_commit[OTHER].digest[:5]) == []


def manifest_of(path: Path, tmp_path: Path) -> Manifest:
    manifest, source, _ = manifest_builder.checkpoint(path, cache_dir=tmp_path / "cache")
    source.close()
    return manifest
