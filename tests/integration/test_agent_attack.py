"""Attacks on a running agent: by programs without a token, other users of the machine, and a hub that answers oddly."""

from __future__ import annotations

import contextlib
import hashlib
import os
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


def test_does_the_agent_go_on_beside_pipes_and_endless_files_in_the_cache(machine: Machine) -> None:
    """Other users may write to a cache that they share."""
    environment = {**machine.environment}
    root = Path(environment["HF_HOME"]) / "hub"
    for number, name in enumerate(("pipe", "endless", "listing", "whole")):
        folder = root / f"models--org--{name}"
        snapshot = folder / "snapshots" / (str(number) * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "trees").mkdir()
        (snapshot / "model.bin").write_bytes(b"x" * 1000)
        (folder / "refs" / "main").write_text(snapshot.name)
    os.unlink(root / "models--org--pipe" / "refs" / "main")
    os.mkfifo(root / "models--org--pipe" / "refs" / "main")
    os.unlink(root / "models--org--endless" / "refs" / "main")
    os.symlink("/dev/zero", root / "models--org--endless" / "refs" / "main")
    os.symlink("/dev/zero", root / "models--org--listing" / "trees" / f"{'2' * 40}.json")
    (root / "models--org--whole" / "snapshots" / ("3" * 40) / "model.bin").unlink()
    blob = root / "models--org--whole" / "blobs" / hashlib.sha256(b"whole").hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(b"whole")
    (root / "models--org--whole" / "snapshots" / ("3" * 40) / "model.bin").symlink_to(f"../../blobs/{blob.name}")
    agent = AgentMachine(machine, None)
    for name in ("pipe", "endless", "listing"):
        get(agent, f"/org/{name}/resolve/main/model.bin")
        with contextlib.suppress(Exception):
            agent.swarm("pull", f"org/{name}")
    assert get(agent, "/org/whole/resolve/main/model.bin") == (200, b"whole")


def test_writes_a_fetch_through_the_agent_through_no_link(machine: Machine, tmp_path: Path) -> None:
    """The output directory is one that other users may write to."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for place in (out, elsewhere):
        place.mkdir()
    (out / "sub").symlink_to(elsewhere)
    with Hub({MODEL: Model({"sub/model.bin": b"x" * 5000, "config.json": b"{}"})}) as hub:
        agent = AgentMachine(machine, hub)
        ended = machine.start("fetch", MODEL, "--out", out, "--no-seed", environment=agent.environment).end()
    assert "is a link or no directory" in ended.error(5)
    assert not list(elsewhere.iterdir())
    assert {path.name for path in out.iterdir()} <= {"sub", "config.json"}
