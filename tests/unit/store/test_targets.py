"""The argument `into`: what is filled, what counts as a write, and which memory is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swarm.errors import SettingsError, StoreConflict
from swarm.store import process_memory
from swarm.store.process_memory import WritableMemory
from swarm.store.targets import count_writes, demand_writable, targets


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("cache", torch.ones(2), persistent=False)


class Extra(torch.nn.Linear):
    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        del state


def _copied(module: Any, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
    state["weight"] = state["weight"].clone()


class Packed(torch.nn.Linear):
    """Its state dict holds a copy."""

    def __init__(self) -> None:
        super().__init__(2, 2, bias=False)
        self._register_state_dict_hook(_copied)  # type: ignore[no-untyped-call]


def test_is_a_module_filled_by_the_names_of_its_state_dict() -> None:
    module = Tied()
    found = targets(module)
    assert set(found) == {"embed.weight", "head.weight", "scale"}
    assert found["embed.weight"] is found["head.weight"] is module.embed.weight
    assert set(targets(Extra(2, 2))) == {"weight", "bias"}
    assert targets({"a": module.scale}) == {"a": module.scale}


@pytest.mark.parametrize(
    ("into", "error", "why"),
    [
        (lambda: [torch.ones(1)], SettingsError, "into: is a list"),
        (lambda: torch.nn.LazyLinear(3), StoreConflict, "weight: is not initialised"),
        (lambda: torch.nn.Linear(2, 2, device="meta"), StoreConflict, "to_empty"),
        (Packed, StoreConflict, "made by a hook"),
    ],
)
def test_is_what_cannot_be_filled_refused(into: Callable[[], Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        targets(into())


def test_are_inference_tensors_written_to_only_where_torch_does_so() -> None:
    with torch.inference_mode():
        frozen = {"w": torch.ones(2)}
        assert targets(frozen) == frozen
    with pytest.raises(StoreConflict, match=r"torch\.inference_mode"):
        targets(frozen)


def test_is_memory_that_is_mapped_for_reading_refused(tmp_path: Path) -> None:
    np.arange(4096, dtype=np.float32).tofile(tmp_path / "data")
    for mode, shown in (("r", False), ("c", True), ("r+", True)):
        mapped = np.memmap(tmp_path / "data", np.float32, mode=mode)  # type: ignore[call-overload]
        tensor = torch.frombuffer(mapped, dtype=torch.float32) if shown else _unwarned(mapped)
        if shown:
            demand_writable({"w": tensor})
        else:
            with pytest.raises(StoreConflict, match="w: is in memory that is mapped for reading"):
                demand_writable({"w": tensor[::2]})
    demand_writable({"w": torch.ones(3), "empty": torch.ones(0)})


def _unwarned(array: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def test_which_addresses_may_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "1000-2000 rw-p 0 0:0 0\n2000-3000 rw-s 0 0:0 0 /f\n3000-4000 r--p 0 0:0 0\n5000-6000 -w-p 0 0:0 0\n"
    )
    monkeypatch.setattr(process_memory, "MAPS", maps)
    memory = WritableMemory.read()
    assert memory is not None
    assert (0x1000, 0x3000) in memory
    for span in ((0x0, 0x1001), (0x2FFF, 0x3001), (0x4000, 0x4001), (0x5000, 0x6001)):
        assert span not in memory
    assert (0x5FFF, 0x6000) in memory
    monkeypatch.setattr(process_memory, "MAPS", tmp_path / "nothing")
    assert WritableMemory.read() is None
    demand_writable({"w": torch.ones(1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0,)])
def test_is_a_write_counted_that_changes_nothing(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape).to(dtype)
    before, version = tensor.clone(), tensor._version
    count_writes([tensor])
    assert tensor._version > version
    assert torch.equal(before.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_does_autograd_notice_as_of_a_write_without_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    count_writes([weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]
    assert weight.requires_grad
    assert weight.is_leaf
