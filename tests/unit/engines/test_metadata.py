from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from swarm.checkpoint import manifest_builder
from swarm.engines import metadata
from swarm.errors import ManifestInvalid, SourceChanged

from .models import hashed


@pytest.fixture
def model(model: Path) -> Path:
    (model / "tokenizer").mkdir()
    (model / "tokenizer" / "vocab.txt").write_text("a b c")
    (model / "training.pt").write_bytes(b"w" * 1000)
    return model


def names(path: Path) -> set[str]:
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


def test_is_what_an_engine_reads_first_staged_and_laid_out(model: Path, tmp_path: Path) -> None:
    manifest = hashed(model, tmp_path / "a")
    staged = metadata.stage(tmp_path / "a", model, manifest)
    assert names(staged) == {"config.json", "tokenizer/vocab.txt", metadata.DESCRIPTION}
    assert metadata.staged(tmp_path / "a", manifest.digest) == staged
    adopted = metadata.adopt(tmp_path / "b", staged)
    out = metadata.lay_out(tmp_path / "b", "org/model", adopted)
    assert names(out) == {*names(staged), "model.safetensors", metadata.NAME}
    assert metadata.read(out).content == manifest.digest
    assert metadata.read(out).tensor_names() == {"a.weight"}
    assert (out / metadata.NAME).read_text() == "org/model\n"
    whole = (model / "model.safetensors").read_bytes()
    header = (out / "model.safetensors").read_bytes()
    assert whole.startswith(header)
    assert len(header) == len(whole) - 300 * 100 * 2


def test_are_headers_alone_not_taken_for_weights(model: Path, tmp_path: Path) -> None:
    manifest = hashed(model, tmp_path)
    out = metadata.lay_out(tmp_path, "org/model", metadata.stage(tmp_path, model, manifest))
    assert metadata.is_whole(model)
    assert not metadata.is_whole(out)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1])
    assert not metadata.is_whole(model)


def test_is_a_directory_without_weights_not_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not metadata.is_whole(tmp_path)


def test_is_the_same_content_staged_the_same_everywhere(model: Path, tmp_path: Path) -> None:
    digests = set()
    for machine in ("a", "b"):
        manifest = hashed(model, tmp_path / machine)
        staged = manifest_builder.files(metadata.stage(tmp_path / machine, model, manifest), cache_dir=tmp_path / "c")
        staged.close()
        digests.add(staged.manifest.digest)
    assert len(digests) == 1


def test_is_an_index_served_and_laid_out_without_its_shards(sharded: Path, tmp_path: Path) -> None:
    manifest = hashed(sharded, tmp_path / "a")
    staged = metadata.stage(tmp_path / "a", sharded, manifest)
    served = manifest_builder.files(staged, cache_dir=tmp_path / "a")
    served.close()
    index = "model.safetensors.index.json"
    assert {file.path for file in served.manifest.files} == {"config.json", index, metadata.DESCRIPTION}
    with pytest.raises(ManifestInvalid, match="3 of the files it names are missing"):
        manifest_builder.checkpoint(staged, cache_dir=tmp_path / "a")  # which it is not
    out = metadata.lay_out(tmp_path / "b", "org/model", metadata.adopt(tmp_path / "b", staged))
    assert names(out) == {*names(sharded), metadata.DESCRIPTION, metadata.NAME}
    assert (out / index).read_bytes() == (sharded / index).read_bytes()
    assert metadata.read(out).tensor_names() == {"a.weight", "b.weight", "c.weight"}
    assert not metadata.is_whole(out)
    assert metadata.is_whole(sharded)


def test_are_files_that_changed_since_they_were_hashed_not_staged(model: Path, tmp_path: Path) -> None:
    manifest = hashed(model, tmp_path)
    (model / "config.json").write_text('{"tie_word_embeddings": nope}')
    with pytest.raises(SourceChanged, match="config"):
        metadata.stage(tmp_path, model, manifest)
    assert metadata.staged(tmp_path, manifest.digest) is None
    assert not [path for path in (tmp_path / "metadata").iterdir() if path.is_dir()]


GOOD = {"content": "a" * 64, "headers": {"m.safetensors": {"size": 10, "text": "{}"}}}


@pytest.mark.parametrize(
    "said",
    [
        "nonsense",
        {**GOOD, "content": "short"},
        {**GOOD, "headers": {"../m.safetensors": {"size": 10, "text": "{}"}}},
        {**GOOD, "headers": {"m.safetensors": {"size": 10, "text": "{"}}},
        {**GOOD, "headers": {"m.safetensors": {"size": -1, "text": "{}"}}},
        {**GOOD, "headers": {"m.safetensors": {"size": 99, "text": "{}"}}},
        {**GOOD, "more": 1},
    ],
)
def test_is_a_description_that_cannot_be_true_refused(said: object, tmp_path: Path) -> None:
    (tmp_path / metadata.DESCRIPTION).write_text(said if isinstance(said, str) else json.dumps(said))
    with pytest.raises(ManifestInvalid):
        metadata.read(tmp_path)


def test_is_a_description_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / metadata.DESCRIPTION).write_text(json.dumps(GOOD))
    assert msgspec.to_builtins(metadata.read(tmp_path)) == GOOD


@pytest.mark.parametrize("kind", ["pipe", "endless", "large"])
def test_is_a_description_within_its_bound(kind: str, tmp_path: Path) -> None:
    place = tmp_path / metadata.DESCRIPTION
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "endless":
        place.symlink_to("/dev/zero")
    else:
        with place.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(ManifestInvalid, match=r"has no|has more than"):
        metadata.read(tmp_path)


def test_is_a_directory_without_one_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestInvalid, match="has no"):
        metadata.read(tmp_path)
