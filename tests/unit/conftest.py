"""What the unit tests of engines share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory with one tensor of 60 kB and a config."""
    import numpy as np

    from swarm.cli.demo import write_made_up

    path = tmp_path / "model"
    path.mkdir()
    write_made_up(path / "model.safetensors", [("a.weight", (300, 100))], rng=np.random.default_rng(1))
    (path / "config.json").write_text('{"tie_word_embeddings": true}')
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model directory with three tensors in three shards, their index and a config."""
    import json

    import numpy as np

    from swarm.cli.demo import write_made_up

    path = tmp_path / "sharded"
    path.mkdir()
    names = {name: f"model-{number:05}-of-00003.safetensors" for number, name in enumerate(("a", "b", "c"), 1)}
    for number, (name, file) in enumerate(names.items(), 1):
        write_made_up(path / file, [(f"{name}.weight", (300, 10))], rng=np.random.default_rng(number))
    index = {"metadata": {}, "weight_map": {f"{name}.weight": file for name, file in names.items()}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"tie_word_embeddings": true}')
    return path
