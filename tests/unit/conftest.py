"""What the unit tests of engines share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def write(path: Path, *files: tuple[str, str, tuple[int, ...]]) -> Path:
    """A model directory with a config and, for each (file, tensor, shape), a safetensors file of random numbers."""
    import numpy as np

    from swarm.cli.demo import write_made_up

    path.mkdir()
    for number, (file, tensor, shape) in enumerate(files, 1):
        write_made_up(path / file, [(tensor, shape)], rng=np.random.default_rng(number))
    (path / "config.json").write_text('{"tie_word_embeddings": true}')
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory with one tensor of 60 kB and a config."""
    return write(tmp_path / "model", ("model.safetensors", "a.weight", (300, 100)))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model directory with three tensors in three shards, their index and a config."""
    files = {f"{name}.weight": f"model-{number:05}-of-00003.safetensors" for number, name in enumerate("abc", 1)}
    path = write(tmp_path / "sharded", *((file, tensor, (300, 10)) for tensor, file in files.items()))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return path
