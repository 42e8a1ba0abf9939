"""What the unit tests of engines share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory with one tensor of 60 kB and a config."""
    import numpy as np

    from swarm.demo import write_made_up

    path = tmp_path / "model"
    path.mkdir()
    write_made_up(path / "model.safetensors", [("a.weight", (300, 100))], rng=np.random.default_rng(1))
    (path / "config.json").write_text('{"tie_word_embeddings": true}')
    return path
