"""Tensors that are cast as they arrive: which, to what, from bytes in any order, and what can be read afterwards."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swarm.content.bitfield import Bitfield
from swarm.content.safetensors_header import Tensor
from swarm.errors import LocalProtocolError, SettingsError, StoreConflict
from swarm.store.casting import Caster, cast_dtype, casts, is_cast, kept_chunks
from swarm.store.tensors import CastStore

from .test_tensors import never_asked, stored

KINDS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
STATE = {
    "single": torch.linspace(-3, 3, 101),
    "double": torch.linspace(-3, 3, 55, dtype=torch.float64).reshape(5, 11),
    "half": torch.linspace(-3, 3, 33, dtype=torch.bfloat16),
    "scaled": torch.arange(40, dtype=torch.uint8).view(torch.float8_e4m3fn),
    "whole": torch.arange(70),
    "empty": torch.ones(0),
}


def fill(store: CastStore, files: Any, *, seed: int = 0) -> None:
    chunks = list(store.manifest.chunks)
    random.Random(seed).shuffle(chunks)  # as peers send them
    data = list(files.values())
    for chunk in chunks:
        rest = memoryview(data[chunk.file])[chunk.offset : chunk.offset + chunk.size]
        for view in store.landing(chunk):
            view[:] = rest[: len(view)]
            rest = rest[len(view) :]
    store.seal(never_asked)


@given(
    kind=st.sampled_from(sorted(KINDS)),
    to=st.sampled_from(sorted(KINDS)),
    cuts=st.lists(st.integers(0, 400), max_size=8),
    seed=st.integers(0, 2**32),
)
def test_are_pieces_in_any_order_cast_as_the_whole_is(kind: str, to: str, cuts: list[int], seed: int) -> None:
    source = torch.randn(50, generator=torch.Generator().manual_seed(seed)).to(KINDS[kind])
    data = source.view(torch.uint8).numpy().tobytes()
    target = torch.zeros(50, dtype=KINDS[to])
    caster = Caster(target, Tensor("t", kind, (50,), 0, len(data)))
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = list(itertools.pairwise(edges))
    random.Random(seed).shuffle(pieces)
    for begin, end in pieces:
        caster.put(begin, memoryview(bytearray(end - begin)))  # a wrong copy comes first
    for begin, end in pieces:
        caster.put(begin, memoryview(bytearray(data[begin:end])))
    assert torch.equal(target, source.to(KINDS[to]))


@pytest.mark.parametrize("dtype", KINDS.values())
@pytest.mark.parametrize("chunk_bytes", [64, 61])
def test_are_floats_cast_and_others_left_as_they_are(dtype: torch.dtype, chunk_bytes: int) -> None:
    files, manifest = stored(STATE, chunk_bytes=chunk_bytes)
    store = CastStore(manifest, dtype)
    fill(store, files)
    found = store.tensors()
    for name, tensor in STATE.items():
        expected = tensor if name in ("scaled", "whole") else tensor.to(dtype)
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name].view(torch.uint8), expected.view(torch.uint8))


def test_can_only_chunks_without_a_cast_tensor_be_read() -> None:
    files, manifest = stored(STATE)
    store = CastStore(manifest, torch.float16)
    fill(store, files)
    data = next(iter(files.values()))
    assert 0 < len(store.kept) < len(manifest.chunks)
    for chunk in manifest.chunks:
        if chunk.index in store.kept:
            assert b"".join(store.spans(chunk)) == data[chunk.offset : chunk.offset + chunk.size]
    (cast, *_) = Bitfield.full(len(manifest.chunks)).minus(store.kept)
    with pytest.raises(LocalProtocolError, match="cast as they arrived"):
        list(store.spans(manifest.chunks[cast]))
    assert kept_chunks(manifest, None, torch.float64).covers(Bitfield(len(manifest.chunks)))


def test_are_tensors_of_the_caller_filled_that_have_the_dtype() -> None:
    files, manifest = stored({"w": torch.arange(8.0), "tied": torch.arange(8.0), "n": torch.arange(3)})
    mine = {"w": torch.zeros(8, dtype=torch.float16), "n": torch.zeros(3, dtype=torch.int64)}
    mine["tied"] = torch.zeros(4, 4, dtype=torch.float16)[:2].reshape(8)
    store = CastStore(manifest, torch.float16, tensors=mine)
    fill(store, files)
    assert torch.equal(mine["w"], torch.arange(8, dtype=torch.float16))
    assert store.tensors() == {}
    with pytest.raises(StoreConflict, match=r"1 of another dtype: 'w' is torch.float32 and not torch.float16"):
        CastStore(manifest, torch.float16, tensors={**mine, "w": torch.zeros(8)})


def test_which_dtypes_are_there() -> None:
    assert cast_dtype("bfloat16") == cast_dtype("torch.bfloat16") == cast_dtype(torch.bfloat16) == torch.bfloat16
    for wrong in ("int8", torch.int8, torch.float8_e4m3fn, "auto", 16):
        with pytest.raises(SettingsError, match="dtype"):
            cast_dtype(wrong)
    assert is_cast(Tensor("t", "F32", (), 0, 4), torch.float16)
    for kind in ("F16", "F8_E4M3", "I64"):
        assert not is_cast(Tensor("t", kind, (), 0, 2), torch.float16)
    assert not casts(stored({"n": torch.arange(3)})[1], torch.float16)
