"""What the engine tests share. They need vLLM, which lives in a virtual environment of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of a kind, made once."""
    from .models import KINDS

    root = tmp_path_factory.mktemp("models")

    def model(kind: str) -> Path:
        path = root / kind
        return path if path.exists() else KINDS[kind](path)

    return model


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts engines; all of them are killed at the end."""
    from .engines import Engine

    started: list[Engine] = []

    def start(name: str, model: Path, **options: Any) -> Engine:
        made = Engine(model, tmp_path / f"cache-{name}", tmp_path / f"{name}.log", **options)
        started.append(made)
        return made

    yield start
    for one in started:
        one.kill()
