"""Attacks on a running agent: by programs without a token, other users of the machine, and a hub that answers oddly."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, Model

from .processes import MODEL, Machine
from .test_agent import AgentMachine, answered
from .test_agent import files as files

pytestmark = pytest.mark.integration

TOKEN = "hf_secret"


def get(agent: AgentMachine, path: str, **headers: str) -> tuple[int, bytes | None]:
    return answered(urllib.request.Request(f"{agent.endpoint}{path}", headers=headers))


@pytest.mark.parametrize("kind", [{"gated": "files"}, {"gated": "all"}, {"private": True}])
def test_gets_a_program_without_a_token_a_model_that_the_hub_denies_it(
    kind: Mapping[str, Any], machine: Machine, files: Mapping[str, bytes], tmp_path: Path
) -> None:
    """The machine has the files: a program with a token has fetched them."""
    with Hub({MODEL: Model(dict(files), **kind), "org/odd": Model({"a.bin": b"x"})}, token=TOKEN) as hub:
        agent = AgentMachine(machine, hub)
        assert get(agent, f"/{MODEL}/resolve/main/config.json", Authorization=f"Bearer {TOKEN}")[0] == 200
        commit = hub.models[MODEL].commit
        for revision in ("main", commit):
            status, body = get(agent, f"/{MODEL}/resolve/{revision}/config.json")
            assert (status, body) in ((401, None), (404, None)), revision
        hub.fault = lambda asked: "nonsense" if "org%2Fodd" in asked.path or "org/odd" in asked.path else ""
