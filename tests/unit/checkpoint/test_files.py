"""Which files of a directory are served, and the reasons for the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swarm.checkpoint import files
from swarm.errors import ManifestInvalid
from swarm.store.stamp import Stamp


def fill(root: Path, contents: dict[str, bytes]) -> Path:
    for path, data in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


@pytest.fixture
def model(tmp_path: Path) -> Path:
    names = ("config.json", "model.safetensors", "onnx/model.onnx", "empty")
    return fill(tmp_path / "model", {name: name.encode() for name in names})


def paths(path: Path) -> tuple[list[str], dict[str, str]]:
    served, skipped = files.walk(path)
    return [file.path for file in served], {item.path: item.why for item in skipped}


def test_have_files_their_real_place_and_stamp(model: Path) -> None:
    (model / "alias.json").symlink_to("config.json")
    served, _ = files.walk(model)
    assert served[0] == files.CheckpointFile("alias.json", model / "config.json", Stamp.at(model / "config.json"))


def test_are_more_files_than_a_manifest_may_name_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FILES_MAX", 3)
    with pytest.raises(ManifestInvalid, match="holds more than 3 files"):
        paths(model)


def test_can_one_safetensors_file_be_served_alone(model: Path) -> None:
    assert paths(model / "model.safetensors") == (["model.safetensors"], {})


def test_is_what_belongs_to_others_left_out(model: Path) -> None:
    fill(model, {".git/HEAD": b"x", ".swarm/x/y": b"x", ".cache/huggingface/x": b"x", "onnx/.git/y": b"x"})
    fill(model, {".gitattributes": b"x", "bad\\name": b"x", "control\x01": b"x"})
    os.mkfifo(model / "pipe")
    (model / os.fsdecode(b"latin\xe9")).write_bytes(b"x")
    served, skipped = paths(model)
    assert served == ["config.json", "empty", "model.safetensors", "onnx/model.onnx"]
    assert skipped.keys() == {
        ".git", ".gitattributes", ".swarm", ".cache", "onnx/.git", "bad\\name", "control\x01", "pipe", "latin\\xe9",
    }  # fmt: skip
    assert "UTF-8" in skipped["latin\\xe9"]


def test_are_links_within_followed_and_others_not(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (model / "alias.json").symlink_to("config.json")
    (model / "also").symlink_to("onnx")
    (model / "loop").symlink_to(".")
    (model / "onnx" / "up").symlink_to("..")
    (model / "outside").symlink_to(tmp_path / "elsewhere")
    served, skipped = paths(model)
    assert served == [
        "alias.json", "also/model.onnx", "config.json", "empty", "model.safetensors", "onnx/model.onnx",
    ]  # fmt: skip
    assert skipped.keys() == {"also/up", "loop", "onnx/up", "outside"}


def test_do_directories_that_link_to_each_other_end(tmp_path: Path) -> None:
    root = fill(tmp_path / "model", {f"{name}/file": b"x" for name in "abcd"})
    for name in "abcd":
        for other in "abcd":
            (root / name / f"to-{other}").symlink_to(f"../{other}")
    served, _ = paths(root)
    assert len(served) == 4 + 4 * 3


@pytest.mark.parametrize("target", ["../secret", "/etc/hostname", "nowhere", "bad.bin"])
def test_is_a_file_link_that_leads_out_an_error(model: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    (model / "bad.bin").symlink_to(target)
    with pytest.raises(ManifestInvalid, match=r"^bad\.bin: is a link"):
        paths(model)


def hub_snapshot(tmp_path: Path) -> Path:
    repository = tmp_path / "hub" / "models--org--name"
    fill(repository, {"blobs/aaa": b"weights", "blobs/bbb": b"{}"})
    snapshot = repository / "snapshots" / ("0" * 40)
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/aaa")
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/bbb")
    return snapshot


def test_is_a_hub_snapshot_taken_as_it_stands(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    assert paths(snapshot) == (["model.safetensors", "sub/config.json"], {})
    assert paths(snapshot / "model.safetensors") == (["model.safetensors"], {})
    (tmp_path / "link").symlink_to(snapshot)
    assert paths(tmp_path / "link")[0] == ["model.safetensors", "sub/config.json"]


def test_is_another_repositorys_blob_out_of_bounds(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    fill(tmp_path / "hub" / "models--org--other", {"blobs/ccc": b"x"})
    (snapshot / "bad").symlink_to("../../../models--org--other/blobs/ccc")
    with pytest.raises(ManifestInvalid, match="bad: is a link out"):
        paths(snapshot)


def test_is_a_blob_that_the_caches_models_share_served(tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path)
    fill(tmp_path / "hub" / "blobs", {"dd/ddd": b"shared"})
    (tmp_path / "hub" / "models--org--name" / "blobs" / "eee").symlink_to("../../blobs/dd/ddd")
    (snapshot / "more.safetensors").symlink_to("../../blobs/eee")
    served, _ = files.walk(snapshot)
    assert [f.real for f in served if f.path == "more.safetensors"] == [tmp_path / "hub" / "blobs" / "dd" / "ddd"]
    fill(tmp_path, {"elsewhere/fff": b"x"})
    (tmp_path / "hub" / "models--org--name" / "blobs" / "ggg").symlink_to("../../../elsewhere/fff")
    (snapshot / "out.safetensors").symlink_to("../../blobs/ggg")
    with pytest.raises(ManifestInvalid, match=r"out\.safetensors: is a link out"):
        paths(snapshot)


def test_is_nothing_to_serve_an_error(tmp_path: Path) -> None:
    fill(tmp_path / "only-git", {".git/HEAD": b"x"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    for path in ("only-git", "empty", "text.txt", "missing"):
        with pytest.raises(ManifestInvalid, match=path):
            paths(tmp_path / path)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("config.json", True), ("model-00001-of-00002.safetensors", True), ("modeling_x.py", True),
        ("original/params.json", True), ("license.json", True), ("notice.py", True), ("readme.safetensors", True),
        ("security/check.py", True), ("readmes.txt", True), ("x.txt", True),
        ("lock.json", True), ("model.png.safetensors", True), ("chat_template.jinja", True),
        ("README.md", False), ("readme", False), ("sub/README_zh.md", False), ("LICENSE", False),
        ("LICENCE.txt", False), ("LICENSE-MODEL", False),
        ("USE_POLICY.md", False), ("NOTICE", False), ("fig/plot.PNG", False),
        (".gitattributes", False), (".gitignore", False), (".git/HEAD", False), ("x/.git", False), (".hg/store", False),
        ("__pycache__/m.cpython-311.pyc", False), ("m.pyc", False), (".config.json.swp", False),
        ("config.json~", False), (".#config.json", False), ("#config.json#", False), (".DS_Store", False),
        (".idea/x.xml", False), ("SECURITY.md", False), ("docs/usage.rst", False), ("config.json.orig", False),
        (".nfs00000000012a", False), (".nfs.json", True), ("lost+found/x", False), (".huggingface/x", False),
        (".venv/pyvenv.cfg", False), ("md", True), ("x.md.json", True),
        ("model.safetensors.lock", False), ("blob.incomplete", False), (".cache/huggingface/x.metadata", False),
    ],
)  # fmt: skip
def test_are_bystanders_told_from_parts_of_a_model(path: str, part: bool) -> None:
    assert (files.bystander(path) is None) == part


def test_are_bystanders_left_out_in_folders_and_behind_links(model: Path, tmp_path: Path) -> None:
    before = paths(model)[0]
    fill(model, {"README.md": b"x", "onnx/fig.png": b"x", "__pycache__/m.pyc": b"x"})
    (model / "LICENSE").symlink_to(tmp_path / "gone")
    (model / "notice").mkdir()
    (model / "notice" / "code.py").write_bytes(b"x")
    served, skipped = paths(model)
    assert served == sorted([*before, "notice/code.py"])
    assert skipped.keys() == {"README.md", "onnx/fig.png", "__pycache__", "LICENSE"}
