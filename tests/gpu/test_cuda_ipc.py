"""Newcomers read the GPU memory of other processes: from several at once, from dying ones, from lying ones."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import swarm
from swarm.store import cuda

from .conftest import StartSource, is_right, joining
from .sources import MODEL, state

pytestmark = pytest.mark.gpu


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Handles that were opened."""
    handles: list[bytes] = []
    real = cuda.Gpu.open

    def spy(gpu: cuda.Gpu, handle: bytes) -> int:
        handles.append(handle)
        return real(gpu, handle)

    monkeypatch.setattr(cuda.Gpu, "open", spy)
    return handles


@pytest.mark.parametrize("sources", [1, 2, 3])
def test_a_newcomer_reads_its_sources_memory(
    start: StartSource, tmp_path: Path, opened: list[bytes], sources: int
) -> None:
    settings = joining(tmp_path, *(start() for _ in range(sources)))
    with swarm.fetch(MODEL, device="cuda", settings=settings, timeout_s=60) as weights:
        assert is_right(weights)
        assert weights.fetched.rejected_chunks == 0
    assert opened


def test_a_source_dies_half_way(start: StartSource, tmp_path: Path, opened: list[bytes]) -> None:
    first, second = start(upload_limit="100MB/s"), start(upload_limit="100MB/s")
    settings = joining(tmp_path, first, second)
    into = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    into["tied"] = into["layer0"]
    killer = threading.Timer(1.0, first.kill)
    killer.start()
    with swarm.fetch(MODEL, into=into, settings=settings, timeout_s=90):
        assert is_right(into)
    killer.join()
    assert opened


def test_a_source_dies_while_the_newcomer_captures_a_graph(
    start: StartSource, tmp_path: Path, opened: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing its memory in another thread must not spoil the capture."""
    source, closed = start(), threading.Semaphore(0)
    errors: list[Exception] = []
    real = cuda.Gpu.close

    def close(gpu: cuda.Gpu, address: int) -> None:
        try:
            real(gpu, address)
        except cuda.CudaError as error:
            errors.append(error)
        finally:
            closed.release()

    monkeypatch.setattr(cuda.Gpu, "close", close)
    with swarm.fetch(MODEL, device="cuda", settings=joining(tmp_path, source), timeout_s=60) as weights:
        assert is_right(weights)
        x, graph = torch.ones(16, device="cuda"), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2
            source.kill()
            for _ in set(opened):
                assert closed.acquire(timeout=30)
            z = y + 1
        graph.replay()
        torch.cuda.synchronize()
    assert not errors
    assert z.tolist() == [3.0] * 16


def test_a_corrupted_source_is_banned(start: StartSource, tmp_path: Path) -> None:
    settings = joining(tmp_path, start("corrupt"), start(upload_limit="300MB/s"))
    with swarm.fetch(MODEL, device="cuda", settings=settings, timeout_s=60) as weights:
        assert is_right(weights)
        assert weights.fetched.rejected_chunks


def test_memory_that_cannot_be_shared_is_sent(start: StartSource, tmp_path: Path, opened: list[bytes]) -> None:
    environment = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    settings = joining(tmp_path, start(environment=environment))
    with swarm.fetch(MODEL, device="cuda", settings=settings, timeout_s=60) as weights:
        assert is_right(weights)
    assert not opened


def test_a_handle_that_cannot_be_opened_is_no_end(
    start: StartSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(gpu: cuda.Gpu, handle: bytes) -> int:
        raise cuda.CudaError("this container may not")

    monkeypatch.setattr(cuda.Gpu, "open", refuse)
    settings = joining(tmp_path, start())
    with swarm.fetch(MODEL, device="cuda", settings=settings, timeout_s=60) as weights:
        assert is_right(weights)
