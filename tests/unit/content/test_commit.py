"""Parts of a commit as one artifact: which manifest describes the files of several."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.content.commit import covers, lacking, part_name, whole
from swarm.content.manifest import ChunkEntry, FileEntry, HashScheme, Manifest, ModelId

SCHEME = HashScheme(leaf_bytes=1024)
FILES = {"config.json": "{}", "a.safetensors": "aaaa", "b.safetensors": "bbbbbb", "model.safetensors.index.json": "i"}


def entry(path: str, text: str, *, chunk_bytes: int = 100) -> FileEntry:
    parts = [text[at : at + chunk_bytes] for at in range(0, len(text), chunk_bytes)]
    chunks = tuple(ChunkEntry(len(part), hashlib.md5(part.encode()).hexdigest()) for part in parts)
    return FileEntry(path, len(text), "", chunks)


def manifest(*paths: str, chunk_bytes: int = 100, scheme: HashScheme = SCHEME, **changed: str) -> Manifest:
    texts = {path: FILES[path] for path in paths} | {path.replace("_", "."): text for path, text in changed.items()}
    entries = tuple(entry(path, text, chunk_bytes=chunk_bytes) for path, text in sorted(texts.items()))
    made = Manifest(1, "checkpoint", "", scheme, chunk_bytes, entries)
    made.check()
    return made


ALL = manifest(*FILES)


def test_is_the_whole_the_artifact_that_has_all_files_of_the_others() -> None:
    assert whole([manifest("config.json"), ALL, manifest("a.safetensors", chunk_bytes=3)]) is ALL
    assert whole([ALL]) is ALL


def test_do_two_halves_make_the_artifact_that_one_holder_of_all_would_have() -> None:
    halves = manifest("config.json", "a.safetensors"), manifest("b.safetensors", "model.safetensors.index.json")
    assert whole(halves) == ALL
    assert all(covers(ALL, half) and not covers(half, ALL) for half in halves)
    assert lacking(ALL, {file.path for file in halves[0].files}) == ["b.safetensors", "model.safetensors.index.json"]


@given(
    st.lists(
        st.tuples(st.sets(st.sampled_from(sorted(FILES)), min_size=1), st.sampled_from([2, 3, 100])),
        min_size=1,
        max_size=4,
    )
)
def test_do_all_nodes_agree_in_whatever_order_they_learn_of_parts(parts: list[tuple[set[str], int]]) -> None:
    manifests = [manifest(*paths, chunk_bytes=size) for paths, size in parts]
    found = whole(manifests)
    assert found is not None
    found.check()
    assert {file.path for file in found.files} == set().union(*(paths for paths, _ in parts))
    for order in itertools.permutations(manifests):
        assert whole(order) == found
    assert whole([*manifests, found]) == found


def test_does_the_manifest_with_the_index_say_what_is_used_of_a_file() -> None:
    plain, header = entry("c.safetensors", "cc"), FileEntry("c.safetensors", 2, "h", entry("c", "c" * 2).chunks)
    with_index = Manifest(1, "checkpoint", "", SCHEME, 100, (plain, entry("model.safetensors.index.json", "i")))
    without = Manifest(1, "checkpoint", "", SCHEME, 100, (entry("a.bin", "a"), header))
    for order in ([with_index, without], [without, with_index]):
        found = whole(order)
        assert found is not None
        assert [file for file in found.files if file.path == "c.safetensors"] == [plain]


@pytest.mark.parametrize(
    "other",
    [
        manifest("b.safetensors", config_json="[]"),
        manifest("b.safetensors", config_json="{ }"),
        manifest("b.safetensors", scheme=HashScheme(leaf_bytes=2048)),
        Manifest(1, "loaded", "f", SCHEME, 100, (entry("b.safetensors", "b"),)),
    ],
    ids=["content", "size", "scheme", "tensors of an engine"],
)
def test_is_there_no_whole_of_what_is_not_of_one_commit(other: Manifest) -> None:
    assert whole([manifest("config.json", "a.safetensors"), other]) is None
    assert whole([other, manifest("config.json", "a.safetensors")]) is None


def test_is_a_part_announced_where_a_fetch_does_not_look() -> None:
    assert part_name(ModelId("org/model")) == "org/model#part"
