"""Revisions: what is a program told while the origin rests after a failure?"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from swarm.agent import revisions as module
from swarm.agent.revisions import Revisions
from swarm.content.manifest import ModelId
from swarm.errors import ManifestNotFound, OriginUnreachable
from swarm.settings import Settings


class DeadOrigin:
    """An origin that never answers, and counts."""

    scheme, address = "hf", "hub"
    asked = 0

    def __init__(self, _environment: object) -> None:
        pass

    def listing(self, _model: str, _revision: str | None) -> None:
        DeadOrigin.asked += 1
        raise OriginUnreachable("hub", "does not answer")


def test_is_no_model_called_missing_while_the_origin_rests(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def nowhere(*_: object, **__: object) -> None:
        raise ManifestNotFound("org/m", tried=[], waited_s=1.0)

    monkeypatch.setattr(module, "HubOrigin", DeadOrigin)
    monkeypatch.setattr(module, "find_on", nowhere)
    monkeypatch.setattr("swarm.checkpoint.hf_cache.snapshot", lambda *_, **__: None)
    monkeypatch.setattr(DeadOrigin, "asked", 0)
    node: Any = SimpleNamespace(now=lambda: 0.0, holders=lambda _: ())

    async def scenario() -> None:
        revisions = Revisions(node, Settings())
        for model_id in ("org/a", "org/b", "org/a"):
            with pytest.raises(OriginUnreachable, match="does not answer"):
                await revisions.get(ModelId(model_id), "main", None)

    asyncio.run(scenario())
    assert DeadOrigin.asked == 1
    assert caplog.text.count("peers alone are asked for the next 30 s") == 1
