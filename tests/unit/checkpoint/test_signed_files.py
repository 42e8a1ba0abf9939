"""Which files differ from those that a signer named?"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from swarm.checkpoint.signed_files import problems
from swarm.errors import ManifestInvalid

FILES = {"config.json": b"{}", "sub/model.bin": b"weights", "README.md": b"read me"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(content)
    (tmp_path / "m" / "model.sig").write_bytes(b"signature")
    return tmp_path / "m"


def found(model: Path, **others: str) -> list[str]:
    signed = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    return problems(model, {**signed, **others}, signature="model.sig")


def test_are_the_signed_files_right(model: Path) -> None:
    assert found(model) == []


def test_may_a_bystander_be_missing(model: Path) -> None:
    (model / "README.md").unlink()
    assert found(model) == []


def test_what_differs(model: Path) -> None:
    (model / "config.json").write_bytes(b"[]")
    (model / "sub" / "model.bin").unlink()
    (model / "evil.py").write_bytes(b"import os")
    assert found(model) == [
        "config.json: is not as signed",
        "evil.py: is not signed",
        "sub/model.bin: is signed, and missing",
    ]


def test_is_a_directory_that_is_gone_an_error(tmp_path: Path) -> None:
    with pytest.raises(ManifestInvalid, match="no such directory"):
        problems(tmp_path / "no", {}, signature="model.sig")
