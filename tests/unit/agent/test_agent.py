"""The agent: what changes while it runs?"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swarm.agent.agent import Agent
from swarm.content.manifest import ModelId
from swarm.errors import AgentError
from swarm.node.cold_start import Found
from swarm.settings import Settings


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Agent:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    node: Any = SimpleNamespace(holdings=dict, now=lambda: 0.0)
    records: Any = SimpleNamespace(records={})
    return Agent(node, records, Settings(cache=tmp_path / "cache", hub_limit_gb=1.0))


def test_is_the_limit_of_the_cache_read_again(agent: Agent) -> None:
    assert agent.cache.policy.limit_bytes == 1e9
    assert agent.reload(agent.settings) == []
    assert agent.reload(Settings(hub_limit_gb=0.5)) == ["limit of the cache 500 MB"]
    assert agent.reload(Settings()) == ["no limit of the cache"]
    assert agent.cache.policy.limit_bytes == math.inf


def test_is_an_artifact_read_with_the_token_that_opened_it_last(agent: Agent) -> None:
    manifest: Any = SimpleNamespace(digest="d" * 64, files=())
    sources: list[Any] = [object(), object(), None]
    with_token = [Found(manifest, None, source) for source in sources]
    for found, read_with in zip(with_token, (0, 1, 1), strict=True):
        artifact = agent.artifact(ModelId("org/m"), found, "main")
        assert artifact.found is with_token[read_with]


def test_a_model_that_the_cache_lacks_is_refused_with_the_command_that_fetches_it(agent: Agent) -> None:
    with pytest.raises(
        AgentError, match=r"org/model is not in .*, which has no model; `swarm pull org/model`"
    ) as refused:
        agent._chosen("org/model", None)
    assert refused.value.exit_code == 3
