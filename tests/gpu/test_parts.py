"""Parts and casts on a GPU: only what is wanted arrives, and floats arrive as the type that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import swarm
from swarm.settings import Settings

pytestmark = pytest.mark.gpu

MODEL = "org/model"
STATE = {
    **{f"layers.{n}.w": torch.full((1000, 700), float(n), dtype=torch.bfloat16) for n in range(4)},
    **{f"layers.{n}.b": torch.arange(33, dtype=torch.float32) + n for n in range(4)},
    "ids": torch.arange(100_000),
}


@pytest.fixture(params=["cpu", "cuda"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a newcomer beside a seed with tensors of the CPU or of the GPU."""
    state = {name: tensor.to(request.param) for name, tensor in STATE.items()}
    here = Settings(name="seed", mdns=False, cache=tmp_path / "seed", chunk_bytes=1 << 18)
    with swarm.serve(state, model_id=MODEL, settings=here) as served:
        yield Settings(name="newcomer", mdns=False, cache=tmp_path / "newcomer", peers=(served.address,))


def same(found: Any, names: set[str], dtype: torch.dtype | None = None) -> bool:
    def expected(name: str) -> torch.Tensor:
        return STATE[name].to(dtype) if dtype and STATE[name].is_floating_point() else STATE[name]

    return set(found) == names and all(torch.equal(found[name].cpu(), expected(name)) for name in names)


@pytest.mark.parametrize("names", [{"layers.2.w"}, {"layers.0.b", "layers.3.b"}, {"ids", "layers.1.w", "layers.1.b"}])
def test_do_only_the_tensors_of_a_part_arrive(there: Settings, names: set[str]) -> None:
    with swarm.fetch(MODEL, device="cuda", tensors=names, settings=there) as weights:
        assert same(weights, names)
        assert all(tensor.is_cuda for tensor in weights.values())
        assert weights.fetched.bytes < sum(tensor.nbytes for tensor in STATE.values())
    with swarm.fetch(MODEL, device="cuda", settings=there) as weights:
        assert same(weights, set(STATE))


def test_are_given_tensors_of_a_part_filled_and_is_the_write_counted(there: Settings) -> None:
    mine = {name: torch.zeros_like(STATE[name], device="cuda") for name in STATE if name.startswith("layers.1")}
    before = {name: tensor._version for name, tensor in mine.items()}
    with swarm.fetch(MODEL, into=mine, tensors="layers.1.*", settings=there):
        assert same(mine, set(mine))
        assert all(mine[name]._version > before[name] for name in mine)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_are_floats_cast_on_the_gpu_with_little_memory_beside_them(there: Settings, dtype: torch.dtype) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with swarm.fetch(MODEL, device="cuda", dtype=dtype, settings=there) as weights:
        assert same(weights, set(STATE), dtype)
        size = sum(tensor.nbytes for tensor in weights.values())
        assert torch.cuda.max_memory_allocated() - before <= size + (64 << 20)


def test_is_a_module_on_the_gpu_filled(there: Settings) -> None:
    module = torch.nn.Module()
    layer = torch.nn.Module()
    weight = torch.nn.Parameter(torch.zeros(1000, 700, dtype=torch.bfloat16, device="cuda"))
    bias = torch.nn.Parameter(torch.zeros(33, device="cuda"))
    layer.register_parameter("w", weight)
    layer.register_parameter("b", bias)
    module.layers = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module(), layer])
    with swarm.fetch(MODEL, into=module, tensors="layers.2.*", settings=there):
        assert torch.equal(weight.cpu(), STATE["layers.2.w"])
        assert torch.equal(bias.cpu(), STATE["layers.2.b"])
