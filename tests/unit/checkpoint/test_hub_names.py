"""Contents of the Hugging Face cache against their names, bystanders of a commit, listings of huggingface_hub 2."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import _tree_cache
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

from swarm.checkpoint import blob_check, digest_cache, hf_cache, hub_tree, manifest_builder
from swarm.checkpoint.files import walk
from swarm.checkpoint.hf_publish import CacheEntry
from swarm.content.manifest import Manifest
from swarm.errors import ManifestInvalid
from swarm.protocol.messages import BESIDE_BYTES_MAX, Origin

MODEL = "org/model"
COMMIT = "c0ffee" + "0" * 34
FILES = {"config.json": b"{}", "model.bin": b"m" * 3000, "sub/vocab.txt": b"a\nb"}
BESIDE = {".gitattributes": b"* lfs", "LICENSE.txt": b"free", "README.md": b"# model", "sub/picture.PNG": b"png"}


def hub_name(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if path.endswith(".bin") else blob_check.git_name(data)


def lay_out(root: Path, files: dict[str, bytes], *, plain: bool = False) -> Path:
    """A snapshot as huggingface_hub writes it, of links or of plain files."""
    folder = hf_cache.model_folder(MODEL, root=root)
    for path, data in files.items():
        place = folder / "snapshots" / COMMIT / path
        place.parent.mkdir(parents=True, exist_ok=True)
        blob = place if plain else folder / "blobs" / hub_name(path, data)
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(data)
        if not plain:
            place.symlink_to(os.path.relpath(blob, place.parent))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def list_(root: Path, files: dict[str, bytes], *, root_of: str = MODEL) -> None:
    """The listing of the commit, as huggingface_hub writes it."""
    entries = {}
    for path, data in files.items():
        sha256, size = (hub_name(path, data), len(data)) if path.endswith(".bin") else (None, None)
        entries[path] = TreeCacheEntry(len(data), blob_check.git_name(data), sha256, size)
    write_tree_cache(str(hf_cache.model_folder(root_of, root=root)), COMMIT, entries)


def served(path: Path, cache: Path) -> Manifest:
    manifest, source, _ = manifest_builder.checkpoint(path, cache_dir=cache)
    source.close()
    return manifest


def published(root: Path, origin: Origin | None, *, cache: Path) -> Path:
    """What a fetch of FILES leaves."""
    entry = CacheEntry(MODEL, root=root)
    (cache / "plain").mkdir(parents=True, exist_ok=True)
    for path, data in FILES.items():
        (cache / "plain" / path).parent.mkdir(exist_ok=True)
        (cache / "plain" / path).write_bytes(data)
    manifest = served(cache / "plain", cache)
    staged = entry.staging(manifest)
    entry.reuse(manifest, origin)
    for path, data in FILES.items():
        (staged / path).parent.mkdir(exist_ok=True)
        if not (staged / path).exists():
            (staged / path).write_bytes(data)
    snapshot = entry.publish(manifest, origin)
    digest_cache.remember(cache, snapshot, manifest)
    return snapshot


@pytest.mark.parametrize("layout", ["links", "plain with a listing"])
@pytest.mark.parametrize("path", FILES)
def test_is_a_damaged_file_never_served(tmp_path: Path, layout: str, path: str) -> None:
    snapshot = lay_out(tmp_path / "hub", FILES, plain=layout != "links")
    if layout != "links":
        list_(tmp_path / "hub", FILES)
    assert [file.path for file in served(snapshot, tmp_path / "cache").files] == sorted(FILES)
    before = (snapshot / path).stat()
    (snapshot / path).write_bytes(FILES[path].swapcase()[:-1] + b"?")
    os.utime(snapshot / path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ManifestInvalid, match=rf"^{path}: is damaged: .*; a fetch of the model mends it"):
        served(snapshot, tmp_path / "cache")


def test_is_a_damaged_file_without_a_hub_name_never_served(tmp_path: Path) -> None:
    snapshot = published(tmp_path / "hub", None, cache=tmp_path / "cache")
    assert len(served(snapshot, tmp_path / "cache").files) == 3
    (snapshot / "model.bin").write_bytes(b"?" * 3000)
    with pytest.raises(ManifestInvalid, match=r"^model\.bin: is damaged"):
        served(snapshot, tmp_path / "cache")


def test_is_a_single_file_of_a_snapshot_checked_too(tmp_path: Path) -> None:
    data = b"GGUF of a later version"
    snapshot = lay_out(tmp_path / "hub", {"m.gguf": data})
    assert served(snapshot / "m.gguf", tmp_path / "cache").files[0].size == len(data)
    (snapshot / "m.gguf").write_bytes(b"GGUF of another version")
    with pytest.raises(ManifestInvalid, match=r"^m\.gguf: is damaged"):
        served(snapshot / "m.gguf", tmp_path / "cache")


def test_are_contents_hashed_once_against_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "RACY_NS", 0)
    snapshot = lay_out(tmp_path / "hub", FILES)
    names, found = hf_cache.hub_names(snapshot), walk(snapshot)[0]
    read: list[str] = []

    def reading(fd: int, *, like: str, size: int) -> str:
        read.append(like)
        return like

    def check() -> list[str]:
        return blob_check.damaged(walk(snapshot)[0], names, folder=snapshot.parent.parent, cache_dir=tmp_path / "cache")

    assert len(found) == 3
    assert check() == []
    monkeypatch.setattr(blob_check, "_name", reading)
    assert check() == []
    assert read == []
    (snapshot / "config.json").write_bytes(b"[]")
    assert check() == []
    assert read == [names["config.json"]]
    (record,) = (tmp_path / "cache" / "names").iterdir()
    record.write_bytes(b"damaged")
    assert check() == []
    assert len(read) == 1 + 3


def test_do_small_bystanders_of_a_commit_travel_beside_it(tmp_path: Path) -> None:
    files = FILES | BESIDE | {"large.jpg": b"j" * BESIDE_BYTES_MAX, "x.lock": b"no"}
    origin = hf_cache.named_origin(lay_out(tmp_path / "theirs", files))
    assert origin is not None
    assert origin.beside == BESIDE
    snapshot = published(tmp_path / "ours", origin, cache=tmp_path / "cache")
    for path, data in BESIDE.items():
        assert (snapshot / path).read_bytes() == data
        assert os.path.basename(os.readlink(snapshot / path)) == hub_name(path, data)
    assert (
        served(snapshot, tmp_path / "cache").digest == served(tmp_path / "cache" / "plain", tmp_path / "cache").digest
    )
    assert not huggingface_hub.scan_cache_dir(tmp_path / "ours").warnings
    again = hf_cache.named_origin(snapshot)
    assert again is not None
    assert again.beside == BESIDE


@pytest.mark.parametrize(
    "path",
    ["modeling.py", "__pycache__/README.md", "../README.md", ".git/README.md", "config.json", "README.md", "x.pyc"],
)
def test_is_nothing_else_taken_from_beside(tmp_path: Path, path: str) -> None:
    lay_out(tmp_path, {"README.md": b"ours"})
    origin = Origin(COMMIT, {p: hub_name(p, data) for p, data in FILES.items()}, (), {path: b"theirs"})
    snapshot = published(tmp_path, origin, cache=tmp_path / "cache")
    assert {f.relative_to(snapshot).as_posix() for f in snapshot.rglob("*") if f.is_file()} == {*FILES, "README.md"}
    assert (snapshot / "README.md").read_bytes() == b"ours"
    assert not any(b"theirs" in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


def downloaded(root: Path) -> Path:
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    return Path(huggingface_hub.snapshot_download(MODEL, cache_dir=root, local_files_only=True))


def test_is_a_snapshot_with_a_listing_complete_to_the_hubs_tools(tmp_path: Path) -> None:
    files = FILES | BESIDE
    origin = hf_cache.named_origin(lay_out(tmp_path / "theirs", files))
    list_(tmp_path / "ours", files)
    snapshot = published(tmp_path / "ours", origin, cache=tmp_path / "cache")
    assert downloaded(tmp_path / "ours") == snapshot
    assert hub_tree.place(snapshot.parent.parent, COMMIT).exists()


@pytest.mark.parametrize("lost", [b"# model", b"# of another name"])
def test_is_a_lost_bystander_mended_if_it_has_its_name(tmp_path: Path, lost: bytes) -> None:
    origin = hf_cache.named_origin(lay_out(tmp_path / "theirs", FILES | BESIDE))
    snapshot = lay_out(tmp_path / "ours", {"README.md": lost})
    (snapshot / "README.md").resolve().unlink()
    assert published(tmp_path / "ours", origin, cache=tmp_path / "cache") == snapshot
    assert (snapshot / "README.md").exists() == (lost == BESIDE["README.md"])


def test_is_a_snapshot_complete_whose_bystanders_are_nowhere(tmp_path: Path) -> None:
    origin = hf_cache.named_origin(lay_out(tmp_path / "theirs", FILES))
    list_(tmp_path / "ours", FILES | BESIDE)
    snapshot = published(tmp_path / "ours", origin, cache=tmp_path / "cache")
    assert downloaded(tmp_path / "ours") == snapshot


def test_is_a_bystander_of_another_content_than_the_listing_says_left_out(tmp_path: Path) -> None:
    origin = hf_cache.named_origin(lay_out(tmp_path / "theirs", FILES | {"README.md": b"forged"}))
    list_(tmp_path / "ours", FILES | BESIDE)
    snapshot = published(tmp_path / "ours", origin, cache=tmp_path / "cache")
    assert not (snapshot / "README.md").exists()


def test_does_a_missing_file_of_the_model_stay_missing_to_the_hubs_tools(tmp_path: Path) -> None:
    origin = hf_cache.named_origin(lay_out(tmp_path / "theirs", FILES))
    list_(tmp_path / "ours", FILES | {"more.bin": b"more"})
    published(tmp_path / "ours", origin, cache=tmp_path / "cache")
    with pytest.raises(huggingface_hub.errors.IncompleteSnapshotError):
        downloaded(tmp_path / "ours")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"format_version": 2, "files": {}}', '{"format_version": 1, "files": []}',
        '{"format_version": 1, "files": {"a": {"size": "x", "blob_id": "y"}}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_is_a_strange_listing_no_listing(tmp_path: Path, text: str) -> None:
    place = hub_tree.place(tmp_path, COMMIT)
    place.parent.mkdir()
    place.write_text(text)
    assert hub_tree.read(tmp_path, COMMIT) is None


def test_is_the_listing_that_of_the_hub(tmp_path: Path) -> None:
    list_(tmp_path, FILES)
    folder = hf_cache.model_folder(MODEL, root=tmp_path)
    found = hub_tree.read(folder, COMMIT)
    assert found == {path: hub_tree.Listed(len(data), hub_name(path, data)) for path, data in FILES.items()}
    assert json.loads(hub_tree.place(folder, COMMIT).read_bytes())["format_version"] == 1
