"""What the integration tests share: a machine to run commands on, and a small model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .processes import Machine, write_model


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    root = tmp_path / "machine"
    root.mkdir()
    made = Machine(root)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """2 MB, eight chunks."""
    return write_model(tmp_path / "model", size=2_000_000)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
