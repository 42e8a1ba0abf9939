"""A model that goes on generating is fetched into another process's model of the same class, which says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import swarm

from .conftest import StartSource, joining
from .sources import MODEL, empty_model, generated

pytestmark = pytest.mark.gpu


def test_a_newcomer_generates_what_its_source_does(start: StartSource, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = start("model")
    model = empty_model(f"cuda:{torch.cuda.device_count() - 1}")  # of another GPU where there is one
    before = generated(model)
    settings = joining(tmp_path, source)
    assert source.hear(60) == "generating"
    with torch.no_grad(), swarm.fetch(MODEL, into=model.state_dict(), settings=settings, timeout_s=60):
        tokens = generated(model)
    out, _ = source.process.communicate()  # which ends its input
    rounds, *expected = (int(word) for word in out.split())
    assert tokens == expected != before
    assert rounds > 1
