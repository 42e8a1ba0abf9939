"""The Hugging Face cache and directories where another user, or the publisher of a model, has put what is no model."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from swarm.checkpoint import (
    blob_check,
    hf_cache,
    hf_publish,
    hub_tree,
    kept,
    local_download,
    manifest_builder,
    signature_file,
    weight_index,
)
from swarm.checkpoint.files import CheckpointFile
from swarm.checkpoint.weight_files import refuse_broken
from swarm.content.manifest import Digest
from swarm.errors import ManifestInvalid, SourceChanged
from swarm.protocol.messages import Origin
from swarm.store.own_files import open_regular, write_new
from swarm.store.stamp import Stamp

COMMIT = "c" * 40
SHA1 = "a" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the model org/m, with a snapshot."""
    folder = tmp_path / "models--org--m"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "trees").mkdir()
    (folder / "blobs").mkdir()
    (snapshot / "model.bin").write_bytes(b"x" * 100)
    return folder


def pipe(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/zero")


def large(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(1 << 40)


planted = pytest.mark.parametrize("plant", [pipe, endless, large])


@planted
def test_is_a_name_of_a_commit_a_small_file(plant: Callable[[Path], None], folder: Path) -> None:
    plant(folder / "refs" / "main")
    assert hf_cache.snapshot("org/m", root=folder.parent) is None
    assert hf_cache.revisions("org/m", root=folder.parent) == {COMMIT: []}
    kept._forget_refs(folder, COMMIT)
    assert os.path.lexists(folder / "refs" / "main")


@planted
def test_is_a_listing_a_file_within_its_bound(plant: Callable[[Path], None], folder: Path) -> None:
    plant(hub_tree.place(folder, COMMIT))
    assert hub_tree.read(folder, COMMIT) is None


@planted
def test_is_a_note_of_a_download_a_small_file(plant: Callable[[Path], None], tmp_path: Path) -> None:
    plant(tmp_path / local_download.NOTES / "model.bin.metadata")
    assert local_download.names(tmp_path) == {}


@planted
def test_are_signatures_beside_a_model_a_small_file(plant: Callable[[Path], None], tmp_path: Path) -> None:
    plant(signature_file.beside(tmp_path))
    assert signature_file.read(tmp_path, Digest("d" * 64)) == ()


def test_is_a_pipe_that_took_the_place_of_a_file_not_waited_for(tmp_path: Path) -> None:
    """A rename between the listing and the reading."""
    place = tmp_path / "config.json"
    place.write_bytes(b"{}")
    file = CheckpointFile("config.json", place, Stamp.at(place))
    place.unlink()
    os.mkfifo(place)
    for read in (
        lambda: weight_index.indexes([file]),
        lambda: refuse_broken(CheckpointFile("model.bin", place, Stamp(1000, 0, 0, 0))),
        lambda: blob_check.damaged([file], {"config.json": SHA1}, folder=tmp_path, cache_dir=tmp_path),
        lambda: blob_check.content_name(place, like=SHA1, size=2),
        lambda: open_regular(place),
    ):
        with pytest.raises(OSError, match=r"it is no|it is not"):
            read()


NAMES = [b"a\nb", b"\xff\xfe", "\u202egnp".encode(), b"x" * 200 + b"/" + b"y" * 200, b"\x1b[2J"]


@pytest.mark.parametrize("name", NAMES)
def test_is_what_a_node_says_of_a_snapshot_readable_by_others(name: bytes, folder: Path) -> None:
    """Other members end the link of a node that says more: it serves nothing then."""
    ref = os.fsencode(folder / "refs") + b"/" + name
    os.makedirs(os.path.dirname(ref), exist_ok=True)
    Path(os.fsdecode(ref)).write_text(COMMIT)
    (folder / "refs" / "v1").write_text(COMMIT)
    (folder / "blobs" / SHA1).write_bytes(b"x")
    snapshot = folder / "snapshots" / COMMIT
    (snapshot / "right.bin").symlink_to(f"../../blobs/{SHA1}")
    link = os.fsencode(snapshot) + b"/" + name.replace(b"/", b"-")[:255]
    os.symlink(f"../../blobs/{SHA1}", link)
    said = hf_cache.named_origin(snapshot)
    assert said is not None
    assert said.revisions == ("v1",)
    assert "right.bin" in said.etags
    assert msgspec.json.decode(msgspec.json.encode(said), type=Origin) == said


def gguf(depth: int) -> bytes:
    """A GGUF file whose only value is an array of arrays of arrays ... of numbers."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)
    return head + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)


@pytest.mark.parametrize("depth", [0, 5, 5000])
def test_do_arrays_in_arrays_of_a_gguf_file_end(depth: int, tmp_path: Path) -> None:
    place = tmp_path / "model.gguf"
    place.write_bytes(gguf(depth))
    refuse_broken(CheckpointFile("model.gguf", place, Stamp.at(place)))


MANY = 3 << 20
HEAVY = {
    "deep": '{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "lists": '{"weight_map": {}, "x": [' + "[]," * MANY + "[]]}",
    "names": '{"weight_map": {' + '"":"",' * MANY + '"":""}}',
}


@pytest.mark.parametrize("kind", list(HEAVY))
def test_is_an_index_refused_that_takes_many_times_its_size(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "model.safetensors.index.json"
    place.write_text(HEAVY[kind])
    file = CheckpointFile(place.name, place, Stamp.at(place))
    with pytest.raises(ManifestInvalid, match="is not JSON"):
        weight_index.indexes([file])


@pytest.mark.parametrize("kind", list(HEAVY))
def test_is_a_listing_ignored_that_takes_many_times_its_size(kind: str, folder: Path) -> None:
    hub_tree.place(folder, COMMIT).write_text(HEAVY[kind])
    assert hub_tree.read(folder, COMMIT) is None


def test_is_a_draft_of_a_file_beside_a_model_written_through_no_link(tmp_path: Path) -> None:
    """Another user can put links where drafts are made, if the cache is shared."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    name = blob_check.git_name(b"read me")
    entry = hf_publish.CacheEntry("org/m", root=tmp_path)
    (entry.folder / ".swarm-incoming").mkdir(parents=True)
    (entry.folder / ".swarm-incoming" / f"beside-{name}").symlink_to(victim)
    target = entry.folder / "snapshots" / COMMIT
    target.mkdir(parents=True)
    entry._place_beside(Origin(COMMIT, {}, beside={"README.md": b"read me"}), target)
    assert victim.read_bytes() == b"mine"
    assert (target / "README.md").read_bytes() == b"read me"
    with pytest.raises(FileExistsError):
        write_new(entry.folder / ".swarm-incoming" / f"beside-{name}", b"")


def test_is_a_link_to_a_file_of_the_user_not_told_beside_a_model(folder: Path, tmp_path: Path) -> None:
    """It has the size of a licence, and the name of one."""
    (tmp_path / "id_rsa").write_bytes(b"a private key")
    snapshot = folder / "snapshots" / COMMIT
    (snapshot / "README.md").symlink_to(tmp_path / "id_rsa")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "LICENSE").write_bytes(b"a private file")
    (snapshot / "docs").symlink_to(tmp_path / "home")
    (folder / "blobs" / "readme").write_bytes(b"a blob")
    (snapshot / "NOTICE").symlink_to("../../blobs/readme")
    (snapshot / "LICENSE").write_bytes(b"mine")
    said = hf_cache.named_origin(snapshot)
    beside = said.beside if said else hf_cache.beside(snapshot, {})
    assert beside == {"NOTICE": b"a blob", "LICENSE": b"mine"}


def test_is_a_directory_that_is_exchanged_for_a_link_while_it_is_listed_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user does so again and again, until it is between two looks."""
    home, root = tmp_path / "home", tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    home.mkdir()
    (home / "a.bin").write_bytes(b"a private file")
    for place in (root, root / "sub"):
        (place / "a.bin").write_bytes(b"weights")
    scan = os.scandir

    def scandir(path: str) -> Any:
        if path == str(root / "sub") and not (root / "sub").is_symlink():
            (root / "sub").rename(tmp_path / "aside")
            (root / "sub").symlink_to(home)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SourceChanged, match=f"it is {home}/a.bin now"):
        manifest_builder.checkpoint(root, cache_dir=tmp_path / "cache")
