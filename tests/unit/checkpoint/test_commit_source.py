"""Snapshots that lack files: what is missing, and are the files a part of a larger artifact?"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from swarm.api import open_source
from swarm.checkpoint import local_download, manifest_builder
from swarm.checkpoint.commit_source import CommitSource, downloaded, snapshot
from swarm.content.manifest import Manifest
from swarm.errors import CheckpointIncomplete, ManifestInvalid
from swarm.settings import Settings
from swarm.store import FileSpan
from swarm.store.part import narrowed

from .test_hub_names import COMMIT, hub_name, lay_out, list_

SHARDS = [f"model-0000{number}-of-00003.bin" for number in (1, 2, 3)]
FILES = {
    "config.json": b'{"architectures": ["X"]}',
    "pytorch_model.bin.index.json": json.dumps({"weight_map": dict(zip("abc", SHARDS, strict=True))}).encode(),
    **{path: path.encode() * 3000 for path in SHARDS},
}


def opened(root: Path, paths: Iterable[str], **grid: int) -> CommitSource:
    place = lay_out(root / "hub", {path: FILES[path] for path in paths})
    return snapshot(place, cache_dir=root / "cache", grid=grid)[0]


def whole(tmp_path: Path, **grid: int) -> Manifest:
    with closing(opened(tmp_path / "whole", FILES, **grid)) as source:
        assert source.missing == ""
        return source.manifest


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        (
            SHARDS[1:],
            r"^pytorch_model\.bin\.index\.json: 2 of the files it names are missing: model-00002",
        ),
        (
            ["pytorch_model.bin.index.json", SHARDS[0]],
            r"1 of the numbered files are missing: model-00001-of",
        ),
        (["pytorch_model.bin.index.json", *SHARDS], r"^config\.json: is of X, and no weights lie beside it"),
    ],
)
def test_does_a_part_say_what_the_model_lacks(tmp_path: Path, lacks: list[str], says: str) -> None:
    with closing(opened(tmp_path, FILES.keys() - set(lacks))) as source:
        assert re.search(says, source.missing)
        assert {file.path for file in source.manifest.files} == FILES.keys() - set(lacks)
        assert source.would_be_whole(FILES)
        assert not source.would_be_whole(FILES.keys() - set(lacks))
        assert not source.would_be_whole(FILES.keys() - {SHARDS[2]})


@pytest.mark.parametrize("grid", [{}, {"chunk_bytes": 8192}])
def test_are_the_files_a_part_of_the_whole_in_any_grid(tmp_path: Path, grid: dict[str, int]) -> None:
    with closing(opened(tmp_path, ["config.json", SHARDS[0]], chunk_bytes=12345)) as source:
        manifest = whole(tmp_path, **grid)
        part = source.part_of(manifest)
        assert part is not None
        with closing(part):
            assert part.manifest == manifest
            held = [chunk for chunk in manifest.chunks if chunk.index in part.held]
            assert {manifest.files[chunk.file].path for chunk in held} == {"config.json", SHARDS[0]}
            spans = [span for chunk in held for span in part.spans(chunk) if isinstance(span, FileSpan)]
            read = b"".join(os.pread(span.fd, span.size, span.offset) for span in spans)
            assert read == FILES["config.json"] + FILES[SHARDS[0]]


@pytest.mark.parametrize("grid", [{}, {"chunk_bytes": 8192}])
@pytest.mark.parametrize("other", [b"{}", b'{"architectures": ["Y"]}'])
def test_are_files_with_other_contents_no_part(tmp_path: Path, other: bytes, grid: dict[str, int]) -> None:
    manifest = whole(tmp_path, **grid)
    with closing(opened(tmp_path, ["config.json", SHARDS[0]])) as source:
        fewer = narrowed(manifest, {SHARDS[0]})
        assert source.part_of(fewer) is None
    place = lay_out(tmp_path / "other", {"config.json": other, SHARDS[0]: FILES[SHARDS[0]]})
    with closing(snapshot(place, cache_dir=tmp_path / "cache", grid={})[0]) as source:
        assert source.part_of(manifest) is None


def test_is_a_damaged_file_or_a_lost_blob_as_a_missing_one(tmp_path: Path) -> None:
    place = lay_out(tmp_path / "hub", FILES)
    (place / SHARDS[1]).write_bytes(b"damaged")
    with closing(snapshot(place, cache_dir=tmp_path / "cache", grid={})[0]) as source:
        assert source.missing == f"{SHARDS[1]}: damaged in the Hugging Face cache"
        assert {file.path for file in source.manifest.files} == FILES.keys() - {SHARDS[1]}
    (place / SHARDS[0]).resolve().unlink()
    (place / "config.json").resolve().unlink()
    with closing(snapshot(place, cache_dir=tmp_path / "cache", grid={})[0]) as source:
        assert {file.path for file in source.manifest.files} == {SHARDS[2], "pytorch_model.bin.index.json"}
    with pytest.raises(ManifestInvalid, match="is a link to nowhere"):
        manifest_builder.checkpoint(place, cache_dir=tmp_path / "cache")
    (place / SHARDS[2]).write_bytes(b"damaged")
    (place / "pytorch_model.bin.index.json").write_bytes(b"{}")
    with pytest.raises(CheckpointIncomplete, match="nothing to serve: model-00002-of-00003"):
        snapshot(place, cache_dir=tmp_path / "cache", grid={})
    for path in FILES:
        (place / path).resolve().unlink(missing_ok=True)
    with pytest.raises(ManifestInvalid, match="holds no file to serve"):
        snapshot(place, cache_dir=tmp_path / "cache", grid={})


DOWNLOADED = {**FILES, "README.md": b"# model"}


def local(root: Path, files: Mapping[str, bytes] = DOWNLOADED) -> Path:
    """A directory as `hf download --local-dir` leaves it."""
    for path, data in files.items():
        for place, content in (
            (root / path, data),
            (root / local_download.NOTES / f"{path}.metadata", f"{COMMIT}\n{hub_name(path, data)}\n1.5\n".encode()),
        ):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    return root


def test_has_a_download_to_a_directory_the_identity_of_its_commit(tmp_path: Path) -> None:
    found = downloaded(local(tmp_path / "m"), cache_dir=tmp_path / "cache", grid={})
    assert found is not None
    source, _, origin = found
    with closing(source):
        assert source.missing == ""
        assert source.manifest == whole(tmp_path)
        assert origin.commit == COMMIT
        assert origin.etags == {path: hub_name(path, data) for path, data in FILES.items()}
        assert origin.beside == {"README.md": b"# model"}


def test_is_a_download_without_some_shards_a_part_of_its_commit(tmp_path: Path) -> None:
    place = local(tmp_path / "m", {path: data for path, data in DOWNLOADED.items() if path != SHARDS[1]})
    found = downloaded(place, cache_dir=tmp_path / "cache", grid={})
    assert found is not None
    with closing(found[0]) as source:
        assert source.missing.startswith("pytorch_model.bin.index.json: 1 of the files it names are missing")
        assert source.part_of(whole(tmp_path)) is not None


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("config.json", b'{"architectures": ["Y"]}'),  # changed by the user
        ("mine.json", b"{}"),  # added
        (f"{local_download.NOTES}/config.json.metadata", f"{'d' * 40}\n{'0' * 40}\n1\n".encode()),  # renewed
        (f"{local_download.NOTES}/config.json.metadata", b"\xff\n\n"),
    ],
)
def test_has_a_changed_download_no_commit(tmp_path: Path, path: str, content: bytes) -> None:
    place = local(tmp_path / "m")
    (place / path).write_bytes(content)
    assert downloaded(place, cache_dir=tmp_path / "cache", grid={}) is None
    name, source, origin = open_source(place, model_id=None, settings=Settings(cache=tmp_path / "cache"))
    source.close()
    assert (name, origin) == ("m", None)


def test_does_a_changed_bystander_not_come_along(tmp_path: Path) -> None:
    place = local(tmp_path / "m")
    (place / "README.md").write_bytes(b"# mine!")
    found = downloaded(place, cache_dir=tmp_path / "cache", grid={})
    assert found is not None
    found[0].close()
    assert found[2].beside == {}


def test_does_the_listing_of_a_commit_say_which_files_are_of_it(tmp_path: Path) -> None:
    place = lay_out(tmp_path / "hub", FILES, plain=True)
    list_(tmp_path / "hub", {path: data for path, data in FILES.items() if path != SHARDS[1]} | {SHARDS[1]: b"longer"})
    (place / "mine.json").write_bytes(b"{}")
    source, skipped = snapshot(place, cache_dir=tmp_path / "cache", grid={})
    with closing(source):
        assert {file.path for file in source.manifest.files} == FILES.keys() - {SHARDS[1]}
        assert source.missing == f"{SHARDS[1]}: damaged in the Hugging Face cache"
    assert [(path.path, path.why) for path in skipped] == [("mine.json", "is no file of the commit")]
    list_(tmp_path / "hub", FILES)
    source, _ = snapshot(place, cache_dir=tmp_path / "cache", grid={})
    with closing(source):
        assert source.manifest == whole(tmp_path)
