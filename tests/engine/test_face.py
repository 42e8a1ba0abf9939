"""Does a vLLM that knows nothing of swarm load its model through the agent's face?"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub import Hub, Model, read_files

from .engines import MODEL_ID, ROOT, Engine

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; .ci/run installs it"),
]


@pytest.fixture
def hub(models: Callable[[str], Path]) -> Iterator[Hub]:
    with Hub({MODEL_ID: Model(read_files(models("dense-fp32")))}) as made:
        yield made


@pytest.fixture
def face(hub: Hub, tmp_path: Path) -> Iterator[str]:
    """The address of an agent's face, whose origin is the hub."""
    log = tmp_path / "agent.log"
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "SWARM_CACHE": str(tmp_path / "agent")}
    environment = {**os.environ, **own, "SWARM_MDNS": "0", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as out:
        command = [sys.executable, "-m", "swarm", "agent", "--hub-listen", "127.0.0.1:0"]
        agent = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"HF_ENDPOINT=(\S+)", log.read_text())):
            assert agent.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield found[1]
    finally:
        agent.terminate()
        agent.wait(30)


def test_does_an_engine_load_through_the_face(
    hub: Hub, face: str, models: Callable[[str], Path], engine: Callable[..., Engine], tmp_path: Path
) -> None:
    plain = {"HF_ENDPOINT": face, "HF_HUB_OFFLINE": "0", "ENGINE_FORMAT": "auto", "ENGINE_DTYPE": "float32"}
    assert engine("a", Path(MODEL_ID), environment=plain).tokens
    (snapshot,) = (tmp_path / "cache-a").glob("hf/hub/models--*/snapshots/*")
    got, sent = read_files(snapshot), read_files(models("dense-fp32"))
    assert got == {path: sent[path] for path in got}
    assert any(path.endswith(".safetensors") for path in got)
    assert hub.copies(MODEL_ID) <= 1.0
