"""A model that goes on generating is fetched into another process's model of the same class, which says the same."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import swarm

from .conftest import StartSource, joining
from .sources import MODEL, generated, language_model

pytestmark = pytest.mark.gpu


def test_a_newcomer_generates_what_its_source_does(start: StartSource, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = start("model")
    model = language_model(2, f"cuda:{torch.cuda.device_count() - 1}")  # of another GPU where there is one
    before = generated(model)
    settings = joining(tmp_path, source)
    time.sleep(0.5)  # the source is in the middle of something
    with torch.no_grad(), swarm.fetch(MODEL, into=model.state_dict(), settings=settings, timeout_s=60):
        tokens = generated(model)
    out, _ = source.process.communicate()  # which ends its input
    rounds, *expected = (int(word) for word in out.split())
    assert tokens == expected != before
    assert rounds > 0
