"""Checks of files on a disk: with what are they compared, and which problems are found?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from swarm.checkpoint import check, digest_cache, local_download, manifest_builder
from swarm.errors import ManifestInvalid

from .test_hub_names import FILES, hub_name, lay_out, list_

README = {"README.md": b"# model"}


def plain(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def damage(path: Path) -> None:
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def checked(path: Path, tmp_path: Path) -> check.Checked:
    return check.model(path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("layout", ["links", "plain with a listing", "local_dir"])
@pytest.mark.parametrize("path", [*FILES, *README])
def test_is_every_file_with_a_hub_name_compared_with_it(tmp_path: Path, layout: str, path: str) -> None:
    files = FILES | README
    if layout == "local_dir":
        place = plain(tmp_path / "m", files)
        notes = {f"{p}.metadata": f"{'c' * 40}\n{hub_name(p, d)}\n1.0\n".encode() for p, d in files.items()}
        plain(place / local_download.NOTES, notes)
    else:
        place = lay_out(tmp_path / "hub", files, plain=layout != "links")
        list_(tmp_path / "hub", files)
    for _ in range(2):
        found = checked(place, tmp_path)
        assert (found.problems, found.compared, found.note) == ([], {"the hub's names": 4}, "")
        assert (found.files, found.size) == (4, sum(len(data) for data in files.values()))
    damage(place / path)
    (problem,) = checked(place, tmp_path).problems
    assert problem.startswith(f"{path}: its content is not that of its name at the hub")


def test_is_a_directory_compared_with_what_was_served_from_it(tmp_path: Path) -> None:
    place = plain(tmp_path / "m", FILES | README)
    found = checked(place, tmp_path)
    assert (found.problems, found.compared, found.note) == ([], {}, "3 without anything to compare with")
    manifest, source, _ = manifest_builder.checkpoint(place, cache_dir=tmp_path / "cache")
    source.close()
    assert checked(place, tmp_path).compared == {"the manifest of its last serving": 3}
    damage(place / "model.bin")
    (problem,) = checked(place, tmp_path).problems
    assert "model.bin: 1 of 1 chunks differ" in problem
    digest_cache.remember(tmp_path / "cache", place, manifest)
    assert checked(place, tmp_path).compared == {"the manifest of its fetch": 3}


def test_are_missing_and_broken_files_problems(tmp_path: Path) -> None:
    place = lay_out(tmp_path / "hub", FILES | {"model-00001-of-00002.bin": b"x", "empty.bin": b""})
    (place / "config.json").resolve().unlink()
    assert [problem.partition(": ")[0] for problem in checked(place, tmp_path).problems] == [
        "config.json", "empty.bin", "model-*-of-00002.bin",
    ]  # fmt: skip
    with pytest.raises(ManifestInvalid, match="no file to serve"):
        checked(plain(tmp_path / "empty", README), tmp_path)


def test_does_a_part_of_a_commit_say_so(tmp_path: Path) -> None:
    place = lay_out(tmp_path / "hub", FILES)
    list_(tmp_path / "hub", FILES | README | {"onnx/model.onnx": b"o"})
    found = checked(place, tmp_path)
    assert found.problems == []
    assert found.note == "1 of the 5 files of the commit are not here, such as onnx/model.onnx"
