"""The judge of the layout is `huggingface_hub` itself."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from hypothesis import example, given
from hypothesis import strategies as st

from swarm.checkpoint import hf_cache, manifest_builder
from swarm.checkpoint.hf_publish import CacheEntry
from swarm.content.manifest import ChunkEntry, FileEntry, HashScheme, Manifest
from swarm.errors import SettingsError, StoreConflict, StoreError
from swarm.protocol.messages import Origin
from swarm.store.stamp import Stamp

MODEL = "org/model"
COMMIT = "c0ffee" + "0" * 34
FILES = {
    "config.json": b'{"model_type": "toy"}',
    "empty": b"",
    "model.safetensors": bytes(range(256)) * 8192,  # above one read of 1 MiB
    "nested/dir/tokenizer.json": b"{}",
}


def manifest_of(files: dict[str, bytes]) -> Manifest:
    """Chunk digests are made up, but differ as contents differ."""
    entries = tuple(
        FileEntry(
            path=path,
            size=len(data),
            header="",
            chunks=(ChunkEntry(len(data), hashlib.md5(data).hexdigest()),) if data else (),
        )
        for path, data in sorted(files.items())
    )
    manifest = Manifest(1, "checkpoint", "", HashScheme(), 64 << 20, entries)
    manifest.check()
    return manifest


def git_etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def origin_of(files: dict[str, bytes], *, commit: str = COMMIT) -> Origin:
    """As the hub does: weights by sha256, small files by git's sha1."""
    large = {path: hashlib.sha256(data).hexdigest() for path, data in files.items() if "model" in path}
    return Origin(commit=commit, etags={path: git_etag(data) for path, data in files.items()} | large)


def stage(entry: CacheEntry, files: dict[str, bytes]) -> Manifest:
    manifest = manifest_of(files)
    staged = entry.staging(manifest)
    for path, data in files.items():
        (staged / path).parent.mkdir(parents=True, exist_ok=True)
        (staged / path).write_bytes(data)
    return manifest


def publish(root: Path, files: dict[str, bytes], origin: Origin | None, *, model_id: str = MODEL) -> Path:
    entry = CacheEntry(model_id, root=root)
    return entry.publish(stage(entry, files), origin)


def tree(root: Path) -> dict[str, str]:
    """Everything below a directory: links by target, files by content."""
    return {
        path.relative_to(root).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes().hex()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def judge(root: Path, files: dict[str, bytes], commit: str) -> None:
    """The hub's own tools find every file by the plain id, offline, and see nothing wrong."""
    folder = huggingface_hub.snapshot_download(MODEL, cache_dir=root, local_files_only=True)
    assert Path(folder).name == commit
    for path, data in files.items():
        one = huggingface_hub.hf_hub_download(MODEL, path, cache_dir=root, local_files_only=True)
        assert Path(one).read_bytes() == data
        assert huggingface_hub.try_to_load_from_cache(MODEL, path, cache_dir=root) == one
    report = huggingface_hub.scan_cache_dir(root)
    assert not report.warnings
    (repo,) = report.repos
    assert (repo.repo_id, repo.repo_type) == (MODEL, "model")
    (revision,) = [revision for revision in repo.revisions if "main" in revision.refs]
    assert revision.commit_hash == commit
    assert {file.file_path.relative_to(folder).as_posix() for file in revision.files} >= set(files)


def test_hub_tools_find_a_publication_with_its_hub_names(tmp_path: Path) -> None:
    origin = origin_of(FILES)
    target = publish(tmp_path, FILES, origin)
    judge(tmp_path, FILES, COMMIT)
    assert target == hf_cache.snapshot(MODEL, root=tmp_path) == hf_cache.snapshot(MODEL, root=tmp_path, revision=COMMIT)
    assert hf_cache.origin(target) == origin
    assert hf_cache.model_id_of(target) == MODEL


def test_hub_tools_find_a_publication_without_hub_names(tmp_path: Path) -> None:
    target = publish(tmp_path, FILES, None)
    judge(tmp_path, FILES, manifest_of(FILES).digest[:40])
    assert hf_cache.snapshot(MODEL, root=tmp_path) == target


def test_names_that_the_hub_did_not_give_are_never_passed_on(tmp_path: Path) -> None:
    assert hf_cache.origin(publish(tmp_path, FILES, None)) is None
    some = Origin(commit=COMMIT, etags={"config.json": git_etag(FILES["config.json"]), "unknown": "0" * 40})
    target = publish(tmp_path, FILES, some)
    judge(tmp_path, FILES, COMMIT)
    assert hf_cache.origin(target) == Origin(commit=COMMIT, etags={"config.json": git_etag(FILES["config.json"])})


def test_publication_leaves_nothing_of_its_own_behind(tmp_path: Path) -> None:
    publish(tmp_path, FILES, origin_of(FILES))
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"blobs", "refs", "snapshots"}
    links = [path for path in (folder / "snapshots").rglob("*") if path.is_symlink()]
    assert len(links) == len(FILES)
    assert not any(os.path.isabs(os.readlink(link)) for link in links)


def test_interrupted_fetch_is_found_again_and_is_no_corruption(tmp_path: Path) -> None:
    entry = CacheEntry(MODEL, root=tmp_path)
    manifest = stage(entry, FILES)
    assert (CacheEntry(MODEL, root=tmp_path).staging(manifest) / "config.json").read_bytes() == FILES["config.json"]
    assert not huggingface_hub.scan_cache_dir(tmp_path).warnings
    assert hf_cache.snapshot(MODEL, root=tmp_path) is None
    publish(tmp_path, {"config.json": b"other"}, None)
    assert entry.staging(manifest).joinpath("config.json").exists()
    assert not huggingface_hub.scan_cache_dir(tmp_path).warnings


@pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
def test_content_that_is_not_what_its_etag_says_is_refused_before_anything_moves(tmp_path: Path, path: str) -> None:
    publish(tmp_path, {"config.json": b"old"}, None)
    before = tree(tmp_path)
    lie = origin_of({**FILES, path: FILES[path] + b"?"})
    with pytest.raises(StoreConflict, match=path):
        publish(tmp_path, FILES, lie)
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all("/.swarm-incoming/" in name for name in after.keys() - before.keys())


def test_loading_by_id_gives_what_was_fetched_last(tmp_path: Path) -> None:
    publish(tmp_path, FILES, origin_of(FILES))
    newer = {**FILES, "config.json": b"newer"}
    target = publish(tmp_path, newer, None)
    judge(tmp_path, newer, target.name)
    assert hf_cache.snapshot(MODEL, root=tmp_path, revision=COMMIT) is not None


def test_publishing_twice_changes_nothing(tmp_path: Path) -> None:
    publish(tmp_path, FILES, origin_of(FILES))
    before = tree(tmp_path)
    blobs = {path: path.stat().st_ino for path in tmp_path.glob("*/blobs/*")}
    publish(tmp_path, FILES, origin_of(FILES))
    assert tree(tmp_path) == before
    assert {path: path.stat().st_ino for path in tmp_path.glob("*/blobs/*")} == blobs


def test_equal_files_share_a_blob(tmp_path: Path) -> None:
    files = {"a.json": b"same", "b.json": b"same"}
    publish(tmp_path, files, origin_of(files))
    judge(tmp_path, files, COMMIT)
    assert len(list(tmp_path.glob("*/blobs/*"))) == 1


def test_blob_of_another_size_under_the_right_name_is_replaced(tmp_path: Path) -> None:
    target = publish(tmp_path, FILES, origin_of(FILES))
    (target / "model.safetensors").resolve().write_bytes(b"cut off")
    publish(tmp_path, FILES, origin_of(FILES))
    judge(tmp_path, FILES, COMMIT)


def test_dangling_link_is_replaced(tmp_path: Path) -> None:
    target = publish(tmp_path, FILES, origin_of(FILES))
    (target / "config.json").unlink()
    (target / "config.json").symlink_to("../../blobs/gone")
    publish(tmp_path, FILES, origin_of(FILES))
    judge(tmp_path, FILES, COMMIT)


def test_regular_file_in_a_snapshot_is_never_overwritten(tmp_path: Path) -> None:
    target = publish(tmp_path, FILES, origin_of(FILES))
    (target / "config.json").unlink()
    (target / "config.json").write_bytes(b"mine")
    with pytest.raises(StoreConflict, match=r"config\.json"):
        publish(tmp_path, FILES, origin_of(FILES))
    assert (target / "config.json").read_bytes() == b"mine"


def test_claimed_commit_never_changes_what_the_cache_says_of_it(tmp_path: Path) -> None:
    target = publish(tmp_path, FILES, origin_of(FILES))
    forged = {**FILES, "config.json": b"forged"}
    with pytest.raises(StoreConflict, match="another content"):
        publish(tmp_path, forged, origin_of(forged))
    assert (target / "config.json").read_bytes() == FILES["config.json"]


def test_same_content_gets_its_hub_name_once_that_is_known(tmp_path: Path) -> None:
    publish(tmp_path, FILES, Origin(commit=COMMIT, etags={}))
    target = publish(tmp_path, FILES, origin_of(FILES))
    assert hf_cache.origin(target) == origin_of(FILES)


def test_open_files_are_served_on_while_they_are_published(tmp_path: Path) -> None:
    entry = CacheEntry(MODEL, root=tmp_path)
    manifest = stage(entry, FILES)
    with (entry.staging(manifest) / "model.safetensors").open("rb") as file:
        entry.publish(manifest, origin_of(FILES))
        assert file.read() == FILES["model.safetensors"]


def test_incomplete_staging_is_a_store_error(tmp_path: Path) -> None:
    entry = CacheEntry(MODEL, root=tmp_path)
    manifest = stage(entry, FILES)
    (entry.staging(manifest) / "config.json").write_bytes(b"{")
    with pytest.raises(StoreError, match=r"config\.json has 1 bytes"):
        entry.publish(manifest, None)
    (entry.staging(manifest) / "config.json").unlink()
    with pytest.raises(StoreError, match=r"config\.json"):
        entry.publish(manifest, None)
    assert not list(tmp_path.glob("*/blobs"))


def test_unwritable_place_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "models--org--model").write_text("a file")
    with pytest.raises(StoreError, match="models--org--model"):
        CacheEntry(MODEL, root=tmp_path).staging(manifest_of(FILES))


@pytest.mark.parametrize("text", ["", "..", "../x", "a/../b", "/abs", "a/b/c", "a--b", "x.git", "a\n", "é"])
def test_text_that_is_no_model_id_never_becomes_a_directory(tmp_path: Path, text: str) -> None:
    assert hf_cache.snapshot(text, root=tmp_path) is None
    with pytest.raises(SettingsError):
        CacheEntry(text, root=tmp_path)


@given(st.text(alphabet="ab9._-/é ", max_size=12) | st.text(max_size=8))
@example("a" * 96 + "/" + "b" * 96)
@example("a" * 97)
@example("gpt2")
def test_model_ids_are_those_of_the_hub(text: str) -> None:
    try:
        validate_repo_id(text)
    except HFValidationError:
        assert not hf_cache.is_model_id(text)
    else:
        assert hf_cache.is_model_id(text)


@pytest.mark.parametrize("revision", ["", "..", "../main", "/main", "refs/../main", "0" * 40, "missing", "main\0"])
def test_revision_that_is_not_there_or_leaves_the_cache_is_none(tmp_path: Path, revision: str) -> None:
    publish(tmp_path, FILES, origin_of(FILES))
    assert hf_cache.snapshot(MODEL, root=tmp_path, revision=revision) is None


@pytest.mark.parametrize("content", ["../..", "", "main", COMMIT + "\n"])
def test_ref_with_anything_but_a_commit_is_none(tmp_path: Path, content: str) -> None:
    target = publish(tmp_path, FILES, origin_of(FILES))
    (target.parent.parent / "refs" / "main").write_text(content)
    assert hf_cache.snapshot(MODEL, root=tmp_path) is None


def test_directories_outside_a_cache_have_no_origin(tmp_path: Path) -> None:
    plain = tmp_path / "snapshots" / COMMIT
    plain.mkdir(parents=True)
    (plain / "config.json").symlink_to(f"../../blobs/{'0' * 40}")
    assert hf_cache.origin(plain) is None
    assert hf_cache.model_id_of(plain) is None


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"XDG_CACHE_HOME": "/xdg"},
        {"XDG_CACHE_HOME": ""},
        {"XDG_CACHE_HOME": "/xdg", "HF_HOME": "~/hf"},
        {"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/legacy"},
        {"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/legacy", "HF_HUB_CACHE": "$HOME/new"},
    ],
)
def test_cache_is_where_the_hub_tools_have_it(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("XDG_CACHE_HOME", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    program = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert str(hf_cache.cache_root()) == said.stdout.strip()


def test_revisions_are_branches_tags_and_short_commits(tmp_path: Path) -> None:
    target = publish(tmp_path, FILES, origin_of(FILES))
    entry = CacheEntry(MODEL, root=tmp_path)
    other = entry.publish(stage(entry, FILES), origin_of(FILES, commit="c0ffee1" + "0" * 33), "feature/x")
    for name in (other.name, other.name[:9]):
        (other.parent.parent / "refs" / name).write_text(other.name)
    assert hf_cache.revisions(MODEL, root=tmp_path) == {COMMIT: ["main"], other.name: ["feature/x"]}
    for revision, place in (("main", target), ("feature/x", other), ("c0ffee0", target), ("c0ffee10", other)):
        assert hf_cache.snapshot(MODEL, root=tmp_path, revision=revision) == place
    for revision in ("c0ffee", "x", "feature"):
        assert hf_cache.snapshot(MODEL, root=tmp_path, revision=revision) is None
    named = hf_cache.named_origin(other)
    assert named == Origin(other.name, origin_of(FILES).etags, ("feature/x",))
    hub = huggingface_hub.snapshot_download(MODEL, revision="feature/x", cache_dir=tmp_path, local_files_only=True)
    assert Path(hub) == other
    assert hf_cache.snapshot(MODEL, root=tmp_path) == target


def built(tmp_path: Path, files: dict[str, bytes]) -> Manifest:
    """A manifest with the digests of its chunks."""
    plain = tmp_path / "plain"
    shutil.rmtree(plain, ignore_errors=True)
    for path, data in files.items():
        (plain / path).parent.mkdir(parents=True, exist_ok=True)
        (plain / path).write_bytes(data)
    manifest, source, _ = manifest_builder.checkpoint(plain, cache_dir=tmp_path / "digests")
    source.close()
    return manifest


def reused(entry: CacheEntry, manifest: Manifest, origin: Origin) -> Path:
    """The staging directory of a fetch as it starts."""
    staged = entry.staging(manifest)
    entry.reuse(manifest, origin)
    return staged


WEIGHTS = {"config.json": b"{}", "pytorch_model.bin": bytes(range(256)) * 8192}
LAYOUTS = ["links", "shared", "copies", "swarm"]


def lay_out(root: Path, files: dict[str, bytes], layout: str, *, ref: str = "main") -> Path:
    """A cache as huggingface_hub writes it ('links', 2.x 'shared', 'copies' without links), or as swarm does."""
    if layout == "swarm":
        return publish(root, files, None)
    folder = root / "models--org--model"
    snapshot = folder / "snapshots" / COMMIT
    for path, data in files.items():
        place, blob = snapshot / path, folder / "blobs" / origin_of(files).etags[path]
        place.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(parents=True, exist_ok=True)
        if layout == "copies":
            place.write_bytes(data)
            continue
        if layout == "shared" and "model" in path:
            shared = root / "blobs" / blob.name[:2] / blob.name
            shared.parent.mkdir(parents=True)
            shared.write_bytes(data)
            shared.chmod(0o400)
            (root / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
            blob.symlink_to(os.path.relpath(shared, blob.parent))
        else:
            blob.write_bytes(data)
        place.symlink_to(os.path.relpath(blob, place.parent))
    (folder / "refs" / ref).parent.mkdir(parents=True)
    (folder / "refs" / ref).write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fetch_starts_with_what_the_cache_has_in_every_layout(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "hub"
    lay_out(root, WEIGHTS, layout)
    before, manifest = tree(root), built(tmp_path, WEIGHTS)
    entry = CacheEntry(MODEL, root=root)
    staged = reused(entry, manifest, origin_of(WEIGHTS))
    assert manifest_builder.verify(staged, manifest) == []
    entry.publish(manifest, origin_of(WEIGHTS))
    judge(root, WEIGHTS, COMMIT)
    if layout != "swarm":
        assert tree(root) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_revision_that_differs_in_one_file_lacks_that_file_only(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "hub"
    lay_out(root, WEIGHTS, layout)
    newer = WEIGHTS | {"config.json": b"[]"}
    manifest = built(tmp_path, newer)
    entry, origin = CacheEntry(MODEL, root=root), origin_of(newer, commit="d" * 40)
    staged = reused(entry, manifest, origin)
    assert set(tree(staged)) == {"pytorch_model.bin"}
    (staged / "config.json").write_bytes(b"[]")
    entry.publish(manifest, origin)
    judge(root, newer, "d" * 40)


@pytest.mark.parametrize("layout", ["links", "shared"])
def test_a_damaged_blob_of_the_right_size_is_fetched_again_and_mended(tmp_path: Path, layout: str) -> None:
    root = tmp_path / "hub"
    snapshot = lay_out(root, WEIGHTS, layout)
    real = (snapshot / "pytorch_model.bin").resolve()
    real.chmod(0o600)
    real.write_bytes(b"?" + WEIGHTS["pytorch_model.bin"][1:])
    manifest, entry = built(tmp_path, WEIGHTS), CacheEntry(MODEL, root=root)
    staged = reused(entry, manifest, origin_of(WEIGHTS))
    assert set(tree(staged)) == {"config.json"}
    (staged / "pytorch_model.bin").write_bytes(WEIGHTS["pytorch_model.bin"])
    entry.publish(manifest, origin_of(WEIGHTS))
    judge(root, WEIGHTS, COMMIT)
    if layout == "shared":
        assert real.read_bytes() == WEIGHTS["pytorch_model.bin"]  # models that come later link to it
        assert (snapshot / "pytorch_model.bin").resolve() == real


def test_a_staged_name_of_a_blob_that_was_damaged_since_is_dropped(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    snapshot = lay_out(root, WEIGHTS, "links")
    manifest, entry = built(tmp_path, WEIGHTS), CacheEntry(MODEL, root=root)
    reused(entry, manifest, origin_of(WEIGHTS))
    (snapshot / "config.json").write_bytes(b"()")
    assert set(tree(reused(entry, manifest, origin_of(WEIGHTS)))) == {"pytorch_model.bin"}


@pytest.mark.parametrize("how", ["refused", "disabled"])
def test_a_cache_without_symbolic_links_gets_plain_files(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if how == "refused":
        monkeypatch.setattr(os, "symlink", refuse)
    else:
        monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    for commit in (COMMIT, "d" * 40):
        target = publish(tmp_path, FILES, origin_of(FILES, commit=commit))
        assert {p: bytes.fromhex(data) for p, data in tree(target).items()} == FILES
        found = huggingface_hub.snapshot_download(MODEL, cache_dir=tmp_path, local_files_only=True)
        assert Path(found) == target
        assert publish(tmp_path, FILES, origin_of(FILES, commit=commit)) == target


@pytest.mark.parametrize("origin", [None, origin_of(FILES)])
def test_is_a_file_that_was_changed_after_it_was_verified_not_published(tmp_path: Path, origin: Origin | None) -> None:
    entry = CacheEntry(MODEL, root=tmp_path)
    manifest = stage(entry, FILES)
    staged = entry.staging(manifest)
    stamps = {path: Stamp.at(staged / path) for path in FILES}
    changed = staged / "model.safetensors"
    before = changed.stat()
    changed.write_bytes(bytes(before.st_size))
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(StoreError):
        entry.publish(manifest, origin, stamps=stamps)
    assert not (entry.folder / "blobs").exists()
    changed.write_bytes(FILES["model.safetensors"])
    judge_of = entry.publish(manifest, origin, stamps={path: Stamp.at(staged / path) for path in FILES})
    assert {path: (judge_of / path).read_bytes() for path in FILES} == FILES


def test_are_files_of_one_content_published_with_their_stamps(tmp_path: Path) -> None:
    twins = {"a.bin": b"same", "b.bin": b"same"}
    publish(tmp_path, {"a.bin": b"same"}, None)
    entry = CacheEntry(MODEL, root=tmp_path)
    manifest = manifest_of(twins)
    blob = next((entry.folder / "blobs").iterdir())
    staged = entry.staging(manifest)
    for path in twins:
        os.link(blob, staged / path)
    target = entry.publish(manifest, None, stamps={path: Stamp.at(staged / path) for path in twins})
    assert {path: (target / path).read_bytes() for path in twins} == twins
