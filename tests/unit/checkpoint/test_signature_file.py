"""Signatures beside a model: kept by digest, never trusted to be well-formed, no part of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.checkpoint import signature_file
from swarm.checkpoint.files import bystander
from swarm.content.manifest import Digest, ModelId
from swarm.protocol.messages import SIGNATURES_MAX, Signature

FIRST, SECOND = Digest("01" * 32), Digest("02" * 32)


def signature(revision: str) -> Signature:
    return Signature(ModelId("org/model"), revision, "00" * 32, "00" * 64)


@pytest.mark.parametrize("single", [False, True])
def test_are_signatures_kept_by_digest(tmp_path: Path, single: bool) -> None:
    model = tmp_path / "model.safetensors" if single else tmp_path
    if single:
        model.touch()
    assert signature_file.read(model, FIRST) == ()
    place = signature_file.add(model, FIRST, [signature("a")])
    assert place is not None
    assert bystander(place.name)
    assert signature_file.add(model, FIRST, [signature("a")]) is None
    signature_file.add(model, SECOND, [signature("b")])
    signature_file.add(model, FIRST, [signature("c"), signature("a")])
    assert signature_file.read(model, FIRST) == (signature("a"), signature("c"))
    assert signature_file.read(model, SECOND) == (signature("b"),)


def test_are_the_newest_kept(tmp_path: Path) -> None:
    signature_file.add(tmp_path, FIRST, [signature(str(n)) for n in range(SIGNATURES_MAX)])
    signature_file.add(tmp_path, FIRST, [signature("new")])
    kept = signature_file.read(tmp_path, FIRST)
    assert (len(kept), kept[-1]) == (SIGNATURES_MAX, signature("new"))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"signatures": {"x": []}}', b"[" * 100_000, b" " * (2 << 20)])
def test_is_a_file_that_is_none_ignored(tmp_path: Path, content: bytes) -> None:
    (tmp_path / signature_file.FILE_NAME).write_bytes(content)
    assert signature_file.read(tmp_path, FIRST) == ()
