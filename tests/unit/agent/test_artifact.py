"""An artifact's files: which are fetched together, and which come first?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from swarm.agent.artifact import BATCH_BYTES, Artifact
from swarm.content.manifest import FileEntry, ModelId
from swarm.settings import Settings

MB = 1 << 20


def artifact(sizes: dict[str, int]) -> Artifact:
    files = tuple(FileEntry(path, size, "", ()) for path, size in sizes.items())
    found: Any = SimpleNamespace(origin=None, manifest=SimpleNamespace(digest="d" * 64, files=files))
    nothing: Any = None
    return Artifact(nothing, ModelId("org/m"), found, revision=None, settings=Settings(), cache=nothing)


@pytest.mark.parametrize(
    ("sizes", "asked", "batches"),
    [
        # A program that asks for the weights first still gets the small files soon.
        (
            {"a.safetensors": 2000 * MB, "config.json": 1000, "merges.txt": MB},
            ["a.safetensors"],
            [["config.json", "merges.txt"], ["a.safetensors"]],
        ),
        (
            {"a.bin": 2000 * MB, "b.bin": 10 * MB, "config.json": 1000},
            ["config.json", "a.bin", "b.bin"],
            [["config.json"], ["a.bin", "b.bin"]],
        ),
        # A small model comes in one piece.
        ({"a.safetensors": 20 * MB, "config.json": 1000}, ["a.safetensors"], [["a.safetensors", "config.json"]]),
        # Four large files are on their way together: one is still hashed while the next one comes.
        (dict.fromkeys("abcdef", BATCH_BYTES), list("abcdef"), [list("abcd"), list("ef")]),
        (dict.fromkeys("abcdefgh", BATCH_BYTES // 6), list("abcdefgh"), [list("abcdef"), list("gh")]),
    ],
)
def test_which_files_are_a_batch(sizes: dict[str, int], asked: list[str], batches: list[list[str]]) -> None:
    made = artifact(sizes)
    made._queue.update(dict.fromkeys(asked))
    found = []
    while made._queue:
        found.append(made._batch())
        for path in found[-1]:
            made._queue.pop(path, None)
    assert found == batches
