"""On a GPU loaded tensors are hashed before and after processing, and copied only where processing may change them."""

from __future__ import annotations

import pytest
import torch
from unit.engines.test_snapshot import as_loaded, check, model

from swarm.engines.snapshot import Snapshot, named_tensors
from swarm.errors import SourceChanged

pytestmark = pytest.mark.gpu


def test_which_tensors_are_copied() -> None:
    made = model("cuda")
    snapshot = Snapshot(made)
    copied = {name for entry in snapshot._loaded if entry.copy is not None for name in entry.names}
    assert copied == {"packed.weight", "packed.bias"}
    assert all(entry.copy.is_cuda for entry in snapshot._loaded if entry.copy is not None)


def test_is_a_changed_tensor_served_as_it_was_loaded() -> None:
    made = model("cuda")
    loaded, snapshot = as_loaded(made), Snapshot(made)
    with torch.no_grad():
        made["packed"].weight.mul_(2)
    served = snapshot.servable(named_tensors(made))
    check(made, served, loaded, {"packed.weight"})
    assert not served["packed.weight"].is_cuda  # the GPU's memory is the engine's
    assert snapshot.changed == 1


def test_is_a_change_that_was_not_expected_an_error() -> None:
    made = model("cuda")
    snapshot = Snapshot(made)
    with torch.no_grad():
        made["plain"].weight[0, 0] += 1
    with pytest.raises(SourceChanged, match="processing changed it"):
        snapshot.servable(named_tensors(made))
