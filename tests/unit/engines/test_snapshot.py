"""Loaded tensors before and after processing: which of them are served where the engine uses them?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from swarm.engines.snapshot import Snapshot, named_tensors
from swarm.errors import SourceChanged


class UnquantizedLinearMethod:
    """Named as vLLM's."""


class Fp8LinearMethod:
    """Named as vLLM's."""


def model(device: str = "cpu") -> Any:
    torch.manual_seed(1)
    made: Any = nn.ModuleDict({"plain": nn.Linear(8, 8), "packed": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}).to(device)
    made["head"] = nn.Linear(8, 8, device=device)
    made["head"].weight = made["plain"].weight  # tied
    made["plain"].quant_method = UnquantizedLinearMethod()
    made["packed"].quant_method = Fp8LinearMethod()
    return made


def as_loaded(made: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named_tensors(made).items()}


def check(made: nn.Module, served: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor], changed: set[str]) -> None:
    live = named_tensors(made)
    assert served.keys() == loaded.keys()
    assert all(torch.equal(served[name].cpu(), loaded[name].cpu()) for name in loaded)
    assert {name for name in loaded if served[name].data_ptr() != live[name].data_ptr()} == changed
    assert served["head.weight"] is served["plain.weight"]


def test_are_unchanged_tensors_served_where_the_engine_uses_them() -> None:
    made = model()
    loaded, snapshot = as_loaded(made), Snapshot(made)
    check(made, snapshot.servable(named_tensors(made)), loaded, set())
    assert snapshot.changed == 0


def test_is_a_changed_tensor_served_as_it_was_loaded() -> None:
    made = model()
    loaded, snapshot = as_loaded(made), Snapshot(made)
    with torch.no_grad():
        made["packed"].weight.mul_(2)
    made["packed"].bias = None  # moved into a handle of the kernel
    served = snapshot.servable(named_tensors(made))
    assert torch.equal(served["packed.weight"], loaded["packed.weight"])
    assert torch.equal(served["packed.bias"], loaded["packed.bias"])
    assert served["plain.weight"].data_ptr() == made["plain"].weight.data_ptr()
    assert snapshot.changed == 2


def test_are_copies_that_exist_used() -> None:
    made = model()
    loaded = as_loaded(made)
    loaded["head.weight"] = loaded["plain.weight"]
    snapshot = Snapshot(made, loaded)
    with torch.no_grad():
        made["norm"].weight.zero_()
    assert snapshot.servable(named_tensors(made))["norm.weight"].data_ptr() == loaded["norm.weight"].data_ptr()


def test_is_a_change_without_a_copy_an_error() -> None:
    made = model()
    snapshot = Snapshot(made)
    for entry in snapshot._loaded:  # as on a GPU, where modules of known methods are hashed alone
        if "norm.weight" in entry.names:
            entry.copy = None
    with torch.no_grad():
        made["norm"].weight.zero_()
    with pytest.raises(SourceChanged, match=r"norm\.weight"):
        snapshot.servable(named_tensors(made))
