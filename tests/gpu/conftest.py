"""These tests need an NVIDIA GPU: `pytest -m gpu tests/gpu`. Elsewhere each is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from swarm.settings import Settings

from .sources import state


@pytest.fixture(autouse=True)
def _on_a_gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    current = torch.cuda.current_device()
    yield
    assert torch.cuda.current_device() == current, "the caller's current device was changed"


class Source:
    """A child process that serves."""

    def __init__(self, kind: str, settings: Mapping[str, str], environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "gpu.sources", kind, *(f"{name}={value}" for name, value in settings.items())]
        paths = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, **environment},
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, "the source did not start"

    def hear(self, timeout_s: float) -> str:
        """The next line it says. Raises TimeoutError."""
        assert self.process.stdout is not None
        return ThreadPoolExecutor(1).submit(self.process.stdout.readline).result(timeout_s).strip()

    def trim(self, timeout_s: float) -> None:
        """Its allocator keeps nothing any more. Raises TimeoutError."""
        assert self.process.stdin is not None
        self.process.stdin.write("trim\n")
        self.process.stdin.flush()
        assert self.hear(timeout_s) == "trimmed"

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


StartSource = Callable[..., Source]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartSource]:
    started: list[Source] = []

    def start(kind: str = "good", environment: Mapping[str, str] | None = None, **settings: str) -> Source:
        given = {"cache": str(tmp_path / f"cache{len(started)}"), **settings}
        started.append(Source(kind, given, environment or {}))
        return started[-1]

    yield start
    for source in started:
        source.kill()


def joining(tmp_path: Path, *sources: Source, **given: Any) -> Settings:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return Settings(mdns=False, cache=tmp_path / "own", peers=tuple(source.address for source in sources), **given)


def is_right(weights: Mapping[str, torch.Tensor]) -> bool:
    expected = state()
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
