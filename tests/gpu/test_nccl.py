"""Chunks go from GPU to GPU over NCCL, between processes. On one GPU each passes for a host of its own."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import swarm
from swarm.transport import nccl

from .conftest import StartSource, is_right, joining
from .sources import MODEL, state

pytestmark = pytest.mark.gpu


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> list[nccl.NcclLane]:
    """Communicators that came about here."""
    made: list[nccl.NcclLane] = []

    class Counted(nccl.NcclLane):
        def __init__(self, *args: object, **named: object) -> None:
            super().__init__(*args, **named)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(nccl, "NcclLane", Counted)
    monkeypatch.setenv("NCCL_HOSTID", "newcomer")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    return made


def source(start: StartSource, number: int, **settings: str) -> object:
    environment = {"NCCL_HOSTID": f"source{number}", "NCCL_SOCKET_IFNAME": "lo"}
    return start(environment=environment, transports="nccl", **settings)


@pytest.mark.parametrize("sources", [1, 2, 3])
def test_a_newcomer_is_sent_chunks(
    start: StartSource, tmp_path: Path, lanes: list[nccl.NcclLane], sources: int
) -> None:
    settings = joining(tmp_path, *(source(start, n) for n in range(sources)), transports=("nccl",))  # type: ignore[arg-type]
    with swarm.fetch(MODEL, device="cuda", settings=settings, timeout_s=90) as weights:
        assert is_right(weights)
        assert weights.fetched.rejected_chunks == 0
    assert len(lanes) == sources


def test_a_source_dies_half_way(start: StartSource, tmp_path: Path, lanes: list[nccl.NcclLane]) -> None:
    first, second = (source(start, n, upload_limit="60MB/s") for n in range(2))
    settings = joining(tmp_path, first, second, transports=("nccl",), idle_timeout_s=2.0)  # type: ignore[arg-type]
    into = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    into["tied"] = into["layer0"]
    killer = threading.Timer(1.5, first.kill)  # type: ignore[attr-defined]
    killer.start()
    with swarm.fetch(MODEL, into=into, settings=settings, timeout_s=90):
        assert is_right(into)
    killer.join()
    assert len(lanes) >= 2
    assert torch.ones(8, device="cuda").sum().item() == 8  # the process lives on
