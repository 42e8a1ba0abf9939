"""Do two engines that start at once on machines with nothing load one copy from the hub, and answer alike?"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from hub import Hub, Model, read_files

from .engines import MODEL_ID, Engine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; .ci/run installs it"),
]

RATE = 2e6  # bytes per second of the hub: the first engine is not done when the second one begins


def test_do_two_engines_without_anything_split_one_download(engine: Callable[..., Engine], tmp_path: Path) -> None:
    from .models import bigger, write

    with Hub({MODEL_ID: Model(read_files(write(tmp_path / "original", bigger())))}, total=RATE) as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "ENGINE_DTYPE": "float32"}
        replicas = [engine(name, Path(MODEL_ID), nothing=True, environment=online) for name in ("a", "b")]
        tokens = [replica.tokens for replica in replicas]  # they find each other by multicast DNS
        assert tokens[0] == tokens[1]
        # Two processes begin some time after one another; simulations ask for 1.05.
        assert 0.9 < hub.copies(MODEL_ID) < 1.5
