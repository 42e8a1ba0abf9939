"""Parts of an artifact: which files, tensors and chunks does a selection ask for?"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import ChunkEntry, FileEntry, HashScheme, Manifest, cut, units
from swarm.content.safetensors_header import compose
from swarm.content.selection import Part, Selection, part_id
from swarm.errors import SettingsError

CHUNK = 64


def safetensors(path: str, sizes: dict[str, int], *, unused: tuple[str, ...] = (), **metadata: str) -> FileEntry:
    header = compose([(name, "U8", (size,), size) for name, size in sizes.items()], metadata)
    whole = FileEntry(path, 8 + len(header) + sum(sizes.values()), header.decode(), (), unused)
    chunks = tuple(ChunkEntry(size, "0" * 32) for size in cut(units(whole.size, whole.tensors()), CHUNK))
    return FileEntry(path, whole.size, whole.header, chunks, unused)


def plain(path: str, size: int = 10) -> FileEntry:
    return FileEntry(path, size, "", tuple(ChunkEntry(n, "0" * 32) for n in cut([size], CHUNK)))


def manifest(*files: FileEntry) -> Manifest:
    made = Manifest(1, "checkpoint", "", HashScheme(), CHUNK, tuple(sorted(files, key=lambda file: file.path)))
    made.check()
    return made


MODEL = manifest(
    plain("config.json"),
    plain("original/params.json"),
    plain("pytorch_model.bin", 200),
    safetensors("model-1.safetensors", {"a.weight": 100, "b.weight": 40, "c.weight": 300}),
    safetensors("model-2.safetensors", {"d.weight": 10, "e.weight": 20}, tied="d.weight"),
)


def part(model: Manifest = MODEL, *, whole_files: bool = True, **arguments: Any) -> Part:
    selection = Selection.read(**arguments)
    assert selection is not None
    found = selection.part(model, whole_files=whole_files)
    assert found is not None
    return found


def paths_of(found: Part) -> set[str]:
    return {found.manifest.files[number].path for number in found.files}


def ranges(of: Part) -> set[tuple[str, int, int]]:
    """Path, start and end of the chunks."""
    chunks = [of.manifest.chunks[index] for index in of.chunks]
    return {(of.manifest.files[c.file].path, c.offset, c.offset + c.size) for c in chunks}


@pytest.mark.parametrize(
    ("include", "exclude", "paths"),
    [
        ("*.json", None, {"config.json", "original/params.json"}),
        (["*.json", "*.bin"], None, {"config.json", "original/params.json", "pytorch_model.bin"}),
        ("original/", None, {"original/params.json"}),
        (None, ["*.safetensors", "original/*"], {"config.json", "pytorch_model.bin"}),
        (["model-?.safetensors"], "*-2*", {"model-1.safetensors"}),
        ("config.json", (), {"config.json"}),
        (iter(["*.JSON", "config.json"]), None, {"config.json"}),
    ],
)
def test_are_files_chosen_as_the_hub_chooses_them(include: Any, exclude: Any, paths: set[str]) -> None:
    filtered = pytest.importorskip("huggingface_hub.utils").filter_repo_objects
    if not isinstance(include, type(iter([]))):
        theirs = filtered([file.path for file in MODEL.files], allow_patterns=include, ignore_patterns=exclude or None)
        assert set(theirs) == paths
    found = part(include=include, exclude=exclude)
    assert paths_of(found) == paths
    assert {path for path, *_ in ranges(found)} == paths
    assert found.size == sum(file.size for file in MODEL.files if file.path in paths)
    assert found.names is None


def test_is_everything_no_part() -> None:
    assert Selection.read() is None
    for everything in (Selection(("*",)), Selection(exclude=("*.gguf",)), Selection(("*",), tensors=("*",))):
        assert everything.part(MODEL, whole_files=False) is None


def test_do_chosen_tensors_come_with_the_files_that_hold_no_weights() -> None:
    found = part(tensors="e.weight")
    assert paths_of(found) == {"config.json", "original/params.json", "model-2.safetensors"}
    assert paths_of(part(tensors="e.weight", include="*.safetensors")) == {"model-2.safetensors"}
    assert "pytorch_model.bin" in paths_of(part(tensors="e.weight", include="*"))
    assert paths_of(part(tensors="e.weight", exclude="*.json")) == {"model-2.safetensors"}


def test_has_a_part_in_memory_only_the_chunks_that_its_tensors_lie_in() -> None:
    file = next(file for file in MODEL.files if file.path == "model-1.safetensors")
    wanted = {tensor.name: tensor for tensor in file.tensors()}["b.weight"]
    found = part(tensors=["b.weight"], exclude="*.json", whole_files=False)
    spans = sorted((start, end) for _, start, end in ranges(found))
    assert spans[0][0] <= wanted.offset
    assert spans[-1][1] >= wanted.offset + wanted.size
    assert all(start < wanted.offset + wanted.size and end > wanted.offset for start, end in spans)
    assert found.wants("b.weight")
    assert not found.wants("a.weight")
    assert found.size < part(tensors=["b.weight"], exclude="*.json").size == file.size


def test_has_a_tensor_that_straddles_chunks_all_of_them() -> None:
    found = part(tensors="c.*", exclude="*.json", whole_files=False)
    file = next(file for file in MODEL.files if file.path == "model-1.safetensors")
    wanted = {tensor.name: tensor for tensor in file.tensors()}["c.weight"]
    assert len(found.chunks) >= wanted.size // CHUNK
    covered = sorted((start, end) for _, start, end in ranges(found))
    assert all(one[1] == two[0] for one, two in itertools.pairwise(covered)), "no gap in it"


def test_is_a_predicate_asked_for_each_name() -> None:
    assert part(tensors=lambda name: name.startswith("d"), whole_files=False).names == frozenset({"d.weight"})


def test_does_a_tied_name_bring_the_tensor_that_it_is_tied_to() -> None:
    found = part(tensors="tied", whole_files=False)
    assert found.names == frozenset({"tied"})
    assert ranges(found) & {r for r in ranges(part(tensors="d.weight", whole_files=False)) if r[0].startswith("model")}


def test_is_a_second_copy_that_the_model_does_not_use_not_a_tensor_to_choose() -> None:
    model = manifest(
        safetensors("a.safetensors", {"x": 10, "twice": 10}),
        safetensors("b.safetensors", {"twice": 10, "y": 10}, unused=("twice",)),
        safetensors("beside.safetensors", {"z": 10}),
        FileEntry("consolidated.safetensors", 10, "", (ChunkEntry(10, "0" * 32),)),
    )
    assert paths_of(part(model, tensors="twice")) == {"a.safetensors"}
    assert "consolidated.safetensors" not in paths_of(part(model, tensors="*[xyz]"))


def test_is_a_tensor_without_bytes_no_chunk() -> None:
    model = manifest(safetensors("a.safetensors", {"empty": 0, "full": 100}), plain("config.json"))
    found = part(model, tensors="empty", exclude="*.json", whole_files=False)
    assert (len(found.chunks), found.files) == (0, (0,))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"include": "*.gguf"}, "include: matches no file: there are config.json, model-1"),
        ({"exclude": "*"}, "matches no file"),
        ({"include": []}, "matches no file"),
        ({"tensors": "a.wieght"}, "tensors: the model has no tensor 'a.wieght': near it: a.weight"),
        ({"tensors": ["a.weight", "nowhere"]}, "no tensor 'nowhere': there are a.weight, b.weight"),
        ({"tensors": "layers.*"}, "match no tensor: there are a.weight"),
        ({"tensors": lambda _: False}, "match no tensor"),
        ({"tensors": "a.weight", "include": "*.json"}, "no tensor 'a.weight': there is no tensor to choose from"),
        ({"include": 7}, "include: 7 is not a text"),
        ({"tensors": ["a", 7]}, "tensors: 7 is not a text"),
    ],
)
def test_does_a_selection_without_a_match_say_what_there_is(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingsError, match=why.replace("*", r"\*")):
        part(**arguments)


def test_do_equal_parts_have_equal_ids() -> None:
    one, same, other = (
        part_id(part(include=pattern).chunks) for pattern in ("*.json", ["config.json", "original/*"], "*.bin")
    )
    assert one == same != other
    assert len(one) == 16
    assert part_id(Bitfield.full(3)) == ""
