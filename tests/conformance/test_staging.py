"""Is memory that cannot be touched directly filled and read in order, through buffers that are never used too early?"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Manifest
from swarm.errors import SourceChanged, TransportError
from swarm.hashing import cuda as hashing_cuda
from swarm.store import DeviceView, View, cuda, staging, tensor_source, tensors
from swarm.store.staging import LANDING_BYTES, PART_BYTES, incoming, outgoing
from swarm.store.tensor_source import TensorSource, flat_bytes
from swarm.store.tensors import IntoStore
from swarm.testing.stores import check_store, content, sample
from swarm.transfer.verify import LandedChunk, Verifier

from .fake_gpu import FakeGpu, on_gpu
from .sample_tensors import KINDS_OF_SAMPLE


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """CPU tensors pass for a GPU's."""
    gpu = FakeGpu()
    monkeypatch.setattr(cuda, "gpu", lambda index: gpu)
    monkeypatch.setattr(staging, "_idle", {})
    for module in (tensors, tensor_source):
        monkeypatch.setattr(module, "bytes_of", lambda tensor: on_gpu(flat_bytes(tensor)))
    monkeypatch.setattr(hashing_cuda, "_kernels", lambda device: None)
    return gpu


@pytest.mark.parametrize("size", [0, 1, LANDING_BYTES, LANDING_BYTES + 1, PART_BYTES, 5 * PART_BYTES + 3])
def test_do_bytes_go_out_and_in_in_order(size: int) -> None:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8)
    target = torch.zeros(size, dtype=torch.uint8)
    parts = [bytes(view) for view in outgoing(on_gpu(source))]
    assert all(len(part) == PART_BYTES for part in parts[:-1])
    rest = b"".join(parts)
    for room in incoming(on_gpu(target)):
        assert len(room) == min(len(rest), LANDING_BYTES)
        room[:], rest = rest[: len(room)], rest[len(room) :]
    assert not rest
    assert torch.equal(source, target)


def test_is_the_next_part_copied_while_one_is_used(gpu: FakeGpu) -> None:
    views = outgoing(on_gpu(torch.zeros(3 * PART_BYTES, dtype=torch.uint8)))
    next(views)
    gpu.side.synchronize()
    before = len(staging._idle.get(0, ()))
    next(views)
    assert len(gpu.side.work) <= 1
    assert before == 0


def test_are_buffers_used_again() -> None:
    for _ in range(3):
        assert list(outgoing(on_gpu(torch.zeros(2 * PART_BYTES, dtype=torch.uint8))))
    assert len(staging._idle[0]) == 1


def test_does_a_transfer_that_breaks_off_give_its_buffers_back() -> None:
    target = torch.zeros(3 * PART_BYTES, dtype=torch.uint8)
    views = incoming(on_gpu(target))
    for _ in range(PART_BYTES // LANDING_BYTES):
        next(views)[:] = b"x" * LANDING_BYTES
    next(views)
    views.close()  # type: ignore[attr-defined]
    assert len(staging._idle[0]) == 1
    assert bytes(target[:PART_BYTES].numpy()) == b"x" * PART_BYTES


def make(manifest: Manifest) -> IntoStore:
    return IntoStore(
        manifest, {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in KINDS_OF_SAMPLE.items()}
    )


def test_do_staged_tensors_keep_the_contract() -> None:
    check_store(make)


def land(views: Iterator[View], data: bytes, gpu: FakeGpu) -> None:
    """Fills views as a transport does that moves GPU memory: later than it says."""
    for view in views:
        part, data = data[: view.nbytes], data[view.nbytes :]
        if isinstance(view, DeviceView):
            held = ctypes.create_string_buffer(part, len(part))
            gpu.side.work.append(lambda view=view, held=held: ctypes.memmove(view.address, held, view.nbytes))  # type: ignore[misc]
        else:
            view[:] = part


def test_are_chunks_reported_once_their_bytes_are_there(gpu: FakeGpu) -> None:
    manifest, contents = sample(7)
    store, landed = make(manifest), list[LandedChunk]()
    indices = range(len(manifest.chunks))
    data = b"".join(content(manifest, contents, chunk) for chunk in manifest.chunks)
    verifier = Verifier(manifest, store, Bitfield(len(manifest.chunks)))
    land(verifier.device_views(1, indices, landed.extend), data, gpu)
    assert sorted(one.chunk.index for one in landed) == list(indices)
    assert all(one.correct and one.spare is None for one in landed)
    assert all(verifier.holder(index) == 1 for index in indices)


def test_is_a_wrong_chunk_let_go_and_a_second_copy_kept_aside(gpu: FakeGpu) -> None:
    manifest, contents = sample(8)
    store, landed = make(manifest), list[LandedChunk]()
    verifier = Verifier(manifest, store, Bitfield(len(manifest.chunks)))
    chunk = manifest.chunks[1]
    right = content(manifest, contents, chunk)
    land(verifier.device_views(1, [1], landed.extend), bytes(byte ^ 1 for byte in right), gpu)
    assert not landed[0].correct
    assert verifier.holder(1) is None
    slow = verifier.device_views(2, [1], landed.extend)
    next(slow)
    land(verifier.device_views(3, [1], landed.extend), right, gpu)
    assert landed[1].correct
    assert bytes(landed[1].spare or b"") == right
    slow.close()
    assert verifier.settle(landed[1], 3)
    assert verifier.holder(1) == 3


def test_is_a_chunk_that_is_never_filled_given_up(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, contents = sample(9)
    monkeypatch.setattr("swarm.transfer.verify.FILLED_TIMEOUT_S", 0.01)
    monkeypatch.setattr(gpu.side, "query", lambda: False)
    verifier = Verifier(manifest, make(manifest), Bitfield(len(manifest.chunks)))
    chunks = [2, 0]  # the second is on the host, read by the CPU once all requested bytes are there
    data = b"".join(content(manifest, contents, manifest.chunks[index]) for index in chunks)
    with pytest.raises(TransportError, match=r"not filled within 0\.01 s"):
        land(verifier.device_views(1, chunks, lambda landed: None), data, gpu)
    assert all(verifier.holder(index) is None for index in chunks)


def test_is_a_served_tensor_that_moved_named() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    source = TensorSource({"w": parameter})
    parameter.data = torch.ones(4)
    with pytest.raises(SourceChanged, match="w changed"):
        list(source.device_read(source.size - 16, 16))
