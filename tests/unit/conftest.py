"""What unit tests share: models of engines, short waits, and torch on one thread: more spin while tiny models run."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


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
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for nodes that may still be heard of are short: all nodes of the test are there before it asks."""
    for module, waits in {
        "swarm.node.agreement": {"NOTHING_FOUND_S": 0.3, "OTHER_REVISION_S": 0.3, "PARTS_S": 1.0},
        "swarm.node.cold_start": {"ASK_AFTER_S": 0.05, "READ_AFTER_S": 0.1, "READ_LATEST_S": 0.5},
        "swarm.transfer.origin_driver": {"ALONE_S": 0.3, "GATHER_S": 0.05, "PAUSE_FIRST_S": 0.1},
        "swarm.api.bring": {"LINGER_S": 0.3},
    }.items():
        for name, seconds in waits.items():
            monkeypatch.setattr(importlib.import_module(module), name, seconds)


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
