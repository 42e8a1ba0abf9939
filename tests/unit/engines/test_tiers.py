from __future__ import annotations

from dataclasses import replace

import pytest

from swarm.content.manifest import ChunkEntry, Digest, FileEntry, HashScheme, Manifest
from swarm.engines.layout import FieldDifference, TensorLayout
from swarm.engines.tiers import Availability, OtherLayout, choose

NEWCOMER = Availability(content=Digest("c" * 64), local="headers", twins=2, holders=3)


def wanted(available: Availability) -> list[str]:
    return [choice.tier for choice in choose(available) if choice.wanted]


def why(available: Availability, tier: str) -> str:
    (choice,) = [choice for choice in choose(available) if choice.tier == tier]
    return choice.why


def test_are_all_tiers_tried_in_order_with_a_reason_each() -> None:
    assert wanted(NEWCOMER) == ["loaded", "checkpoint", "disk"]
    assert [choice.why for choice in choose(NEWCOMER)] == [
        "2 twins of this very layout", "3 nodes with these files", "hub or disk, as without swarm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "tiers", "tier", "words"),
    [
        ({"twins": 0}, ["checkpoint", "disk"], "loaded", "no twin"),
        ({"holders": 0}, ["loaded", "disk"], "checkpoint", "no peer serves the files"),
        ({"unsafe": "experts move"}, ["checkpoint", "disk"], "loaded", "experts move"),
        ({"unread": "no headers"}, ["loaded", "disk"], "checkpoint", "no headers"),
        ({"local": "whole"}, ["loaded", "disk"], "checkpoint", "on this machine already"),
        ({"content": None}, ["disk"], "checkpoint", "its content is not known"),
        ({"content": None, "local": "whole"}, ["disk"], "loaded", "never hashed"),
        ({"version": "v1"}, ["loaded"], "checkpoint", "no files hold weight version 'v1'"),
        ({"version": "v1", "local": "whole", "twins": 0}, [], "disk", "no files hold weight version 'v1'"),
        ({"barred": frozenset({"loaded"})}, ["checkpoint", "disk"], "loaded", "turned off"),
        ({"barred": frozenset({"loaded", "checkpoint"})}, ["disk"], "checkpoint", "turned off"),
    ],
)
def test_is_a_tier_left_for_a_reason(change: dict[str, object], tiers: list[str], tier: str, words: str) -> None:
    available = replace(NEWCOMER, **change)  # type: ignore[arg-type]
    assert wanted(available) == tiers
    assert words in why(available, tier)


def test_is_it_said_in_which_fields_others_differ() -> None:
    differences = [FieldDifference("vllm", "0.32.0", "0.33.0"), *(FieldDifference(f"f{n}", "a", "b") for n in range(4))]
    available = replace(NEWCOMER, twins=0, others=[OtherLayout("node-7", differences)])
    said = why(available, "loaded")
    assert "node-7 differs: vllm is 0.32.0 here and 0.33.0 there" in said
    assert said.endswith("and 2 more")


def test_are_others_with_other_content_named_and_refused() -> None:
    available = replace(NEWCOMER, twins=0, holders=0, strangers=["node-3 (1.2.3.4:5) dddd"])
    assert wanted(available) == ["disk"]
    for tier in ("loaded", "checkpoint"):
        assert "other content under the same name is refused: node-3 (1.2.3.4:5) dddd" in why(available, tier)


LAYOUT = TensorLayout({"a": ("F32", (2, 2)), "b": ("BF16", (4,))}, {"tied": "a"})


def test_is_a_layout_like_itself() -> None:
    assert LAYOUT.differences(TensorLayout(dict(LAYOUT.tensors), dict(LAYOUT.aliases))) == []


@pytest.mark.parametrize(
    ("tensors", "aliases", "said"),
    [
        ({"a": ("F32", (2, 2))}, {"tied": "a"}, ["1 missing there: b"]),
        ({**LAYOUT.tensors, "c": ("F32", (1,))}, {"tied": "a"}, ["1 missing here: c"]),
        ({**LAYOUT.tensors, "b": ("F16", (4,))}, {"tied": "a"}, ["1 different: b (BF16 [4] here, F16 [4] there)"]),
        (
            {**LAYOUT.tensors, "a": ("F32", (4, 1))},
            {"tied": "a"},
            ["1 different: a (F32 [2, 2] here, F32 [4, 1] there)"],
        ),
        (LAYOUT.tensors, {}, ["1 tied differently: tied"]),
        (LAYOUT.tensors, {"tied": "b"}, ["1 tied differently: tied"]),
    ],
)
def test_is_every_difference_of_layouts_named(
    tensors: dict[str, tuple[str, tuple[int, ...]]], aliases: dict[str, str], said: list[str]
) -> None:
    assert LAYOUT.differences(TensorLayout(tensors, aliases)) == said


def test_is_a_layout_what_the_manifest_describes() -> None:
    header = (
        '{"__metadata__":{"tied":"a","format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
        '"b":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]}}'
    )
    size = 8 + len(header) + 24
    file = FileEntry("model.safetensors", size, header, (ChunkEntry(size, "0" * 32),))
    manifest = Manifest(1, "loaded", "{}", HashScheme(), 1 << 20, (file,))
    assert LAYOUT.differences(TensorLayout.of_files(manifest.files)) == []
