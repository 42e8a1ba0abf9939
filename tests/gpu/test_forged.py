"""Forged chunks that reach GPU memory, over the host and over CUDA IPC: a pin refuses them there too."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from forgery import forging_source

import swarm
from swarm.api import serve_source
from swarm.content.manifest import ModelId
from swarm.settings import Settings

pytestmark = pytest.mark.gpu

MODEL = ModelId("org/model")


@pytest.mark.parametrize("source", ["cpu", "cuda"])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_is_a_forged_chunk_refused_where_the_fetch_is_pinned(tmp_path: Path, source: str, target: str) -> None:
    tensor = torch.randint(0, 256, (8 << 20,), dtype=torch.uint8, device=source)
    evil = forging_source(tensor)
    digest = evil.manifest.digest
    seed = Settings(mdns=False, cache=tmp_path / "cache", find_timeout_s=10, stall_timeout_s=2, upload_limit=1e12)
    with serve_source(MODEL, evil, None, settings=seed) as served:
        newcomer = dataclasses.replace(seed, peers=(served.address,), name="newcomer")
        with swarm.fetch(MODEL, device=target, settings=newcomer, timeout_s=60) as weights:
            assert not torch.equal(weights["w"].cpu(), tensor.cpu())  # this is why a pin checks BLAKE3
        with pytest.raises(swarm.Stalled, match="wrong chunk"):
            swarm.fetch(MODEL, device=target, settings=newcomer, timeout_s=60, digest=digest)
