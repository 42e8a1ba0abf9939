"""Tensors of a GPU: stores keep their contract, and models travel between GPU and CPU in every direction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from conformance.sample_tensors import KINDS_OF_SAMPLE

import swarm
from swarm.checkpoint import manifest_builder
from swarm.content.manifest import Manifest
from swarm.errors import SourceChanged, StoreConflict
from swarm.hashing.cpu import chunk_digests
from swarm.settings import Settings
from swarm.store import DeviceView
from swarm.store.tensors import GpuStore, IntoStore
from swarm.testing import check_store

pytestmark = pytest.mark.gpu

MODEL = "org/model"
Make = Callable[[torch.dtype, tuple[int, ...]], torch.Tensor]


def plain(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def strided(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty((*shape, 2), dtype=dtype, device="cuda")[..., 0]


def slices(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(torch.Size(shape).numel() + 1, dtype=dtype, device="cuda")[1:].reshape(shape)


def half_on_the_cpu(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu" if len(shape) == 2 else "cuda")


@pytest.mark.parametrize("make", [plain, strided, slices, half_on_the_cpu])
def test_given_tensors_keep_the_contract(make: Make) -> None:
    check_store(lambda manifest: IntoStore(manifest, {name: make(*kind) for name, kind in KINDS_OF_SAMPLE.items()}))


def test_new_tensors_keep_the_contract() -> None:
    def make(manifest: Manifest) -> GpuStore:
        return GpuStore(manifest, "cuda")

    check_store(make)


def state(device: str = "cuda") -> dict[str, torch.Tensor]:
    """Wide, strided, tied, empty and odd tensors, about 40 MB."""
    torch.manual_seed(1)
    wide = torch.randn(1024, 4096, device=device)
    return {
        "wide": wide,
        "turned": torch.randn(300, 200, device=device).t(),
        "tied": wide,
        "nothing": torch.empty(0, 7, device=device),
        "half": torch.randn(3_000_001, device=device).to(torch.bfloat16),
        "bytes": torch.randint(0, 256, (10_001,), dtype=torch.uint8, device=device),
        **{f"norm{n}": torch.randn(64 + n, device=device) for n in range(40)},
    }


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)


def test_the_manifest_is_the_one_that_the_cpu_would_make() -> None:
    tensors = state()
    on_the_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    on_the_cpu["tied"] = on_the_cpu["wide"]
    on_gpu, on_cpu = (
        manifest_builder.tensors(given, leaf_bytes=4096, chunk_bytes=300_000) for given in (tensors, on_the_cpu)
    )
    assert on_gpu.manifest.digest == on_cpu.manifest.digest
    scheme = on_gpu.manifest.scheme
    assert all(chunk_digests(scheme, on_gpu.spans(chunk)).xxh3 == chunk.digest for chunk in on_gpu.manifest.chunks)


def test_chunks_are_ranges_of_the_tensors_own_memory() -> None:
    tensors = state()
    source = manifest_builder.tensors(tensors)
    lent = [span for chunk in source.manifest.chunks for span in source.device_spans(chunk)]
    addresses = {view.address for view in lent if isinstance(view, DeviceView)}
    assert {tensors["wide"].data_ptr(), tensors["half"].data_ptr()} <= addresses
    assert sum(span.nbytes for span in lent if isinstance(span, memoryview)) < 10_000  # the header alone


@pytest.mark.parametrize("how", ["written", "moved"])
def test_a_change_while_served_is_noticed(how: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(64, device="cuda"))
    source = manifest_builder.tensors({"w": parameter})
    if how == "written":
        with torch.no_grad():
            parameter.mul_(2)
    else:
        parameter.data = torch.ones(64, device="cuda")
    with pytest.raises(SourceChanged, match=f"w changed .*{how}"):
        list(source.device_spans(source.manifest.chunks[-1]))


def test_freed_memory_is_noticed() -> None:
    tensor = torch.ones(1 << 20, device="cuda")
    source = manifest_builder.tensors({"w": tensor})
    tensor.untyped_storage().resize_(0)
    with pytest.raises(SourceChanged, match=r"w changed .*moved"):
        list(source.spans(source.manifest.chunks[-1]))


def test_overlaps_are_refused() -> None:
    source = manifest_builder.tensors({"a": torch.ones(4), "b": torch.ones(4)})
    flat = torch.zeros(6, device="cuda")
    with pytest.raises(StoreConflict, match="b: overlaps 'a'"):
        IntoStore(source.manifest, {"a": flat[:4], "b": flat[2:]})


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    return Settings(mdns=False, cache=tmp_path / "cache", find_timeout_s=10, chunk_bytes=1 << 20)


@pytest.fixture
def there(here: Settings) -> Callable[[swarm.Served], Settings]:
    """Settings of another node, which the first one's neighbour is."""

    def settings(served: swarm.Served) -> Settings:
        return dataclasses.replace(here, peers=(served.address,), upload_limit=1e12)  # a limit rules out 'inproc'

    return settings


Other = Callable[[swarm.Served], Settings]


@pytest.mark.parametrize("source", ["cpu", "cuda"])
@pytest.mark.parametrize("target", ["cpu", "cuda", "cuda:0"])
def test_models_travel_between_devices(here: Settings, there: Other, source: str, target: str) -> None:
    given = state(source)
    seed = dataclasses.replace(here, upload_limit=1e12)
    with (
        swarm.serve(given, model_id=MODEL, settings=seed) as served,
        swarm.fetch(MODEL, device=target, settings=there(served), timeout_s=60) as weights,
    ):
        assert equal(weights, given)
        assert {tensor.device.type for tensor in weights.values()} == {target.partition(":")[0]}


def test_a_model_of_the_gpu_is_fetched_into_tensors_of_both(here: Settings, there: Other) -> None:
    given = state("cuda")
    into = {
        name: torch.zeros_like(tensor, device="cpu" if "norm" in name else "cuda") for name, tensor in given.items()
    }
    into["tied"] = into["wide"]
    with (
        swarm.serve(given, model_id=MODEL, settings=here) as served,
        swarm.fetch(MODEL, into=into, settings=there(served), timeout_s=60),
    ):
        assert equal(into, given)


def test_tensors_are_made_on_the_current_gpu_of_whoever_asks(here: Settings, there: Other) -> None:
    seed = dataclasses.replace(here, upload_limit=1e12)
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last), swarm.serve(state(f"cuda:{last}"), model_id=MODEL, settings=seed) as served:
        for number in range(last + 1):
            with (
                torch.cuda.device(number),
                swarm.fetch(MODEL, device="cuda", settings=there(served), timeout_s=60) as weights,
            ):
                assert {tensor.device.index for tensor in weights.values()} == {number}
                assert torch.cuda.current_device() == number
