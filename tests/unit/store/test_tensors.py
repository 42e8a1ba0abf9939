"""Tensors as a store and as a source: bits, memory, ties and everything that must be refused."""

from __future__ import annotations

import gc
import json
import mmap
import os
import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.checkpoint import manifest_builder
from swarm.content import manifest as manifests
from swarm.content import safetensors_header
from swarm.content.manifest import Chunk, ChunkEntry, FileEntry, HashScheme, Manifest
from swarm.errors import LocalProtocolError, ManifestInvalid, SettingsError, SourceChanged, StoreConflict, StoreFull
from swarm.store.memory_store import MemoryStore
from swarm.store.staging import LANDING_BYTES
from swarm.store.tensor_source import VIRTUAL_PATH, TensorSource
from swarm.store.tensors import IntoStore

CHUNK_BYTES = 64  # small, so that chunks straddle headers and tensors

TORCH_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float4_e2m1fn_x2,
]  # fmt: skip

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
kinds_of_tensors = st.lists(
    st.tuples(st.sampled_from(TORCH_DTYPES), shapes).filter(lambda kind: kind != (torch.float4_e2m1fn_x2, ())),
    max_size=6,
)


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits that the type allows; not NaN-free on purpose."""
    count = torch.Size(shape).numel() * dtype.itemsize
    limit = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, limit, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def all_bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: bits(tensor) for name, tensor in tensors.items()}


def file_entry(path: str, data: bytes, chunk_bytes: int = CHUNK_BYTES) -> FileEntry:
    header = ""
    if path.endswith(".safetensors"):
        end = safetensors_header.header_bytes(data[:8], subject=path, file_bytes=len(data))
        header = data[8:end].decode()
    sizes = manifests.cut([len(data)], chunk_bytes)
    return FileEntry(path, len(data), header, tuple(ChunkEntry(size, "0" * 32) for size in sizes))


def manifest_of(files: Mapping[str, bytes], chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    entries = tuple(file_entry(path, data, chunk_bytes) for path, data in sorted(files.items()))
    made = Manifest(1, "checkpoint", "", HashScheme(), chunk_bytes, entries)
    made.check()
    return made


def never_asked(chunk: Chunk) -> bool:
    raise AssertionError(f"memory is this process's own, and {chunk} is hashed again")


def fill(store: MemoryStore | IntoStore, files: Mapping[str, bytes]) -> None:
    """Lands every chunk, last first, and seals."""
    for chunk in reversed(store.manifest.chunks):
        data = memoryview(files[store.manifest.files[chunk.file].path])[chunk.offset : chunk.offset + chunk.size]
        for view in store.landing(chunk):
            view[:] = data[: len(view)]
            data = data[len(view) :]
        assert not data
    store.seal(never_asked)


def contents(store: MemoryStore | IntoStore | TensorSource) -> list[bytes]:
    """What others would get, file by file."""
    files = [b""] * len(store.manifest.files)
    for chunk in store.manifest.chunks:
        spans = list(store.spans(chunk))
        assert all(spans)
        got = b"".join(spans)
        assert len(got) == chunk.size
        files[chunk.file] += got
    return files


def served(tensors: Mapping[str, torch.Tensor], chunk_bytes: int = CHUNK_BYTES) -> TensorSource:
    """A source with its manifest, as its builder makes it but for the digests."""
    source = TensorSource(tensors)
    sizes = manifests.cut(source.units(), chunk_bytes)
    entry = FileEntry(VIRTUAL_PATH, source.size, source.header, tuple(ChunkEntry(n, "0" * 32) for n in sizes))
    source.manifest = Manifest(1, "checkpoint", "", HashScheme(), chunk_bytes, (entry,))
    source.manifest.check()
    return source


def file_of(source: TensorSource) -> bytes:
    return b"".join(source.read(0, source.size))


def composed(tensors: Iterable[tuple[str, str, list[int], bytes]], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of raw bytes, for types and layouts that the library would not write."""
    given_ = list(tensors)
    header = safetensors_header.compose([(n, d, shape, len(data)) for n, d, shape, data in given_], metadata)
    return len(header).to_bytes(8, "little") + header + b"".join(data for *_, data in given_)


def stored(tensors: Mapping[str, torch.Tensor], *, chunk_bytes: int = CHUNK_BYTES) -> tuple[dict[str, bytes], Manifest]:
    files = {VIRTUAL_PATH: file_of(TensorSource(tensors))}
    return files, manifest_of(files, chunk_bytes)


# MemoryStore


@settings(max_examples=60)
@given(kinds_of_tensors, st.integers(0, 1 << 30))
def test_memory_holds_what_the_reference_library_saved(kinds: list[Any], seed: int) -> None:
    tensors = {f"t{n}": filled(dtype, shape, seed + n) for n, (dtype, shape) in enumerate(kinds)}
    files = {"m.safetensors": safetensors.torch.save(tensors), "config.json": b"{}", "empty": b""}
    store = MemoryStore(manifest_of(files))
    fill(store, files)
    assert all_bits(store.tensors()) == all_bits(tensors)
    assert {path: bytes(view) for path, view in store.files().items()} == {"config.json": b"{}", "empty": b""}
    assert contents(store) == [files[path] for path in sorted(files)]


def test_landing_is_the_tensors_own_memory() -> None:
    files, manifest = stored({"w": torch.arange(64.0)})
    store = MemoryStore(manifest)
    fill(store, files)
    tensor = store.tensors()["w"]
    last = manifest.chunks[-1]
    for view in store.landing(last):
        view[-4:] = b"\0\0\0\0"
    assert tensor[-1] == 0
    assert store.tensors()["w"] is tensor


def test_views_to_land_in_are_small_enough_to_hash_hot() -> None:
    data = bytes(3 * LANDING_BYTES + 5)
    store = MemoryStore(manifest_of({"blob": data}, chunk_bytes=8 << 20))
    (chunk,) = store.manifest.chunks
    assert [len(view) for view in store.landing(chunk)] == [LANDING_BYTES] * 3 + [5]
    assert list(store.present()) == []


def test_tensors_outlive_the_store_and_then_free_its_memory() -> None:
    files, manifest = stored({"a": torch.arange(1 << 20), "b": torch.ones(4)})
    store = MemoryStore(manifest)
    fill(store, files)
    mapped = weakref.ref(next(store.landing(manifest.chunks[0])).obj)
    assert isinstance(mapped(), mmap.mmap)
    tensors = store.tensors()
    store.close()
    del store
    gc.collect()
    assert torch.equal(tensors["a"], torch.arange(1 << 20))
    tensors["a"].add_(1)
    del tensors
    gc.collect()
    assert mapped() is None


def test_aliases_are_the_same_tensor_object() -> None:
    data = composed([("embed", "F32", [2], bytes(8))], {"head": "embed", "format": "pt"})
    store = MemoryStore(manifest_of({"m.safetensors": data}))
    fill(store, {"m.safetensors": data})
    tensors = store.tensors()
    assert sorted(tensors) == ["embed", "head"]
    assert tensors["head"] is tensors["embed"]


def test_misaligned_tensor_is_copied_with_its_bits() -> None:
    value = torch.tensor([1.5, -2.0], dtype=torch.float64)
    data = composed([("odd", "U8", [3], b"abc"), ("wide", "F64", [2], bits(value)[2])])
    store = MemoryStore(manifest_of({"m.safetensors": data}))
    fill(store, {"m.safetensors": data})
    tensors = store.tensors()
    assert torch.equal(tensors["wide"], value)
    assert tensors["wide"].data_ptr() % 8 == 0
    assert contents(store) == [data]


def test_four_bit_elements_lie_two_a_byte() -> None:
    data = composed([("w", "F4", [2, 6], b"abcdef")])
    store = MemoryStore(manifest_of({"m.safetensors": data}))
    fill(store, {"m.safetensors": data})
    assert bits(store.tensors()["w"]) == (torch.float4_e2m1fn_x2, (2, 3), b"abcdef")


@pytest.mark.parametrize(("dtype", "shape"), [("F6_E2M3", [4]), ("F6_E3M2", [8]), ("F4", [2, 3])])
def test_what_torch_cannot_hold_is_refused_before_anything_is_fetched(dtype: str, shape: list[int]) -> None:
    data = composed([("w", dtype, shape, bytes(6 if dtype.startswith("F6") and shape == [8] else 3))])
    with pytest.raises(StoreConflict, match=f"w: torch cannot hold {dtype}"):
        MemoryStore(manifest_of({"m.safetensors": data}))


def test_type_newer_than_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = composed([("w", "F8_E8M0", [1], b"x")])
    store = MemoryStore(manifest_of({"m.safetensors": data}))
    fill(store, {"m.safetensors": data})
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    with pytest.raises(StoreConflict, match="F8_E8M0"):
        store.tensors()


def test_without_torch_only_tensors_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    data = composed([("w", "U8", [1], b"x")])
    files = {"m.safetensors": data, "config.json": b"{}"}
    monkeypatch.setitem(sys.modules, "torch", None)
    store = MemoryStore(manifest_of(files))
    fill(store, files)
    assert bytes(store.files()["config.json"]) == b"{}"
    assert contents(store) == [b"{}", data]
    with pytest.raises(SettingsError, match="torch"):
        store.tensors()


@pytest.mark.parametrize("second", [{"b": "x"}, {"a": None}])
def test_one_name_in_two_files_is_an_error(second: dict[str, str | None]) -> None:
    ((name, alias_of),) = second.items()
    one = composed([("a", "U8", [1], b"1"), ("c", "U8", [1], b"1")], {"b": "c"})
    two = composed([("x" if alias_of else name, "U8", [1], b"2")], {"b": "x"} if alias_of else None)
    with pytest.raises(ManifestInvalid, match=f"'{name}'"):
        MemoryStore(manifest_of({"1.safetensors": one, "2.safetensors": two}))


def test_more_than_the_memory_is_refused() -> None:
    huge = Manifest(1, "checkpoint", "", HashScheme(), 1, (FileEntry("blob", 1 << 47, "", ()),))
    with pytest.raises(StoreFull) as caught:
        MemoryStore(huge)
    assert caught.value.need_bytes == 1 << 47
    assert caught.value.free_bytes > 0


def test_nothing_is_handed_out_before_the_seal_or_after_the_close() -> None:
    files, manifest = stored({"w": torch.ones(3)})
    store = MemoryStore(manifest)
    for attempt in (store.tensors, store.files):
        with pytest.raises(LocalProtocolError):
            attempt()
    fill(store, files)
    store.close()
    with pytest.raises(LocalProtocolError):
        store.tensors()
    with pytest.raises(SourceChanged, match="closed"):
        next(store.spans(manifest.chunks[0]))


def test_writing_to_a_fetched_tensor_withdraws_its_chunks_only() -> None:
    files, manifest = stored({"a": torch.ones(64), "b": torch.ones(64)})
    store = MemoryStore(manifest)
    fill(store, files)
    tensors = store.tensors()
    with torch.no_grad():
        torch.nn.Parameter(tensors["b"]).mul_(2)
    assert b"".join(store.spans(manifest.chunks[0]))
    with pytest.raises(SourceChanged, match="b changed"):
        list(store.spans(manifest.chunks[-1]))


def test_giving_a_fetched_tensor_other_memory_is_no_change() -> None:
    files, manifest = stored({"a": torch.ones(64)})
    store = MemoryStore(manifest)
    fill(store, files)
    store.tensors()["a"].data = torch.zeros(64)
    assert contents(store) == [files[VIRTUAL_PATH]]


def test_a_tensor_counts_more_than_another_files_metadata() -> None:
    one = composed([("x", "U8", [1], b"\1")], {"head": "x"})
    two = composed([("head", "U8", [1], b"\2")])
    files = {"1.safetensors": one, "2.safetensors": two}
    store = MemoryStore(manifest_of(files))
    fill(store, files)
    assert {name: int(tensor) for name, tensor in store.tensors().items()} == {"x": 1, "head": 2}


def test_spans_cannot_be_written_to() -> None:
    files, manifest = stored({"w": torch.ones(3)})
    store = MemoryStore(manifest)
    fill(store, files)
    assert next(store.spans(manifest.chunks[0])).readonly


# IntoStore


@settings(max_examples=60)
@given(kinds_of_tensors, st.integers(0, 1 << 30))
def test_given_tensors_end_up_with_the_models_bits(kinds: list[Any], seed: int) -> None:
    tensors = {f"t{n}": filled(dtype, shape, seed + n) for n, (dtype, shape) in enumerate(kinds)}
    files, _ = stored(tensors)
    files["config.json"] = b"{}" * 50
    targets = {name: filled(t.dtype, tuple(t.shape), seed + 100) for name, t in tensors.items()}
    places = {name: t.data_ptr() for name, t in targets.items()}
    store = IntoStore(manifest_of(files), targets)
    fill(store, files)
    assert all_bits(targets) == all_bits(tensors)
    assert {name: t.data_ptr() for name, t in targets.items()} == places
    assert contents(store) == [files[path] for path in sorted(files)]


def test_tensors_land_where_they_are() -> None:
    files, manifest = stored({"w": torch.arange(64.0)})
    target = torch.zeros(64)
    store = IntoStore(manifest, {"w": target})
    for view in store.landing(manifest.chunks[-1]):
        view[:] = files[VIRTUAL_PATH][-len(view) :]
    assert target[-1] == 63


def test_strided_tensors_are_filled_at_the_seal() -> None:
    value = torch.arange(12.0).reshape(3, 4)
    files, manifest = stored({"left": value[:, :2].clone(), "right": value[:, 2:].clone(), "turned": value.clone()})
    base, turned = torch.zeros(3, 4), torch.zeros(4, 3)
    store = IntoStore(manifest, {"left": base[:, :2], "right": base[:, 2:], "turned": turned.t()})
    fill(store, files)
    assert torch.equal(base, value)
    assert torch.equal(turned, value.t())
    assert contents(store) == [files[VIRTUAL_PATH]]


def test_ties_are_seen_whatever_stride_a_dimension_of_one_element_has() -> None:
    base = torch.zeros(1, 4)
    files, manifest = stored({"a": torch.ones(1, 4), "b": torch.ones(1, 4)})
    fill(IntoStore(manifest, {"a": base, "b": base.as_strided((1, 4), (9, 1))}), files)
    assert torch.equal(base, torch.ones(1, 4))


def test_copying_to_one_view_does_not_withdraw_its_sibling() -> None:
    files, manifest = stored({"a": torch.ones(4), "b": torch.ones(2)})
    base = torch.zeros(8)
    store = IntoStore(manifest, {"a": base[:4], "b": base[4::2]})
    fill(store, files)
    assert contents(store) == [files[VIRTUAL_PATH]]


def test_modules_and_inference_tensors_are_filled() -> None:
    source = torch.nn.Linear(4, 3)
    files, manifest = stored(source.state_dict())
    module = torch.nn.Linear(4, 3)
    fill(IntoStore(manifest, dict(module.named_parameters())), files)
    assert all_bits(module.state_dict()) == all_bits(source.state_dict())
    with torch.inference_mode():
        frozen = {"weight": torch.zeros(4, 3).t(), "bias": torch.zeros(3)}
    store = IntoStore(manifest, frozen)
    fill(store, files)
    assert all_bits(frozen) == all_bits(source.state_dict())
    assert contents(store) == [files[VIRTUAL_PATH]]


def test_mismatches_are_all_named() -> None:
    _, manifest = stored({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2), "d": torch.ones(2)})
    with pytest.raises(StoreConflict) as caught:
        IntoStore(
            manifest,
            {"b": torch.ones(3), "c": torch.ones(2, dtype=torch.float64), "d": torch.ones(2), "z": torch.ones(1)},
        )
    why = caught.value.why
    assert "1 missing: 'a'" in why
    assert "1 unexpected: 'z'" in why
    assert "1 of another shape: 'b' is [3] and not [2]" in why
    assert "1 of another dtype: 'c' is torch.float64 and not torch.float32" in why


@pytest.mark.parametrize("names", [["embed", "head"], ["head", "other"], ["head"], ["embed"]])
def test_a_tied_model_may_be_spelled_in_every_way(names: list[str]) -> None:
    value = torch.arange(8.0)
    files, manifest = stored({"embed": value, "head": value})
    target = torch.zeros(8)
    fill(IntoStore(manifest, dict.fromkeys(names, target)), files)
    assert torch.equal(target, value)


def test_an_alias_with_memory_of_its_own_is_filled_too() -> None:
    value = torch.arange(8.0)
    files, manifest = stored({"embed": value, "head": value})
    targets = {"embed": torch.zeros(8), "head": torch.zeros(8)}
    fill(IntoStore(manifest, targets), files)
    assert torch.equal(targets["embed"], value)
    assert torch.equal(targets["head"], value)


def test_tensors_tied_by_the_caller_alone_must_be_equal() -> None:
    target = torch.zeros(8)
    files, manifest = stored({"embed": torch.arange(8.0), "head": torch.arange(8.0)})
    store = IntoStore(manifest, {"embed": target, "head": target})
    fill(store, files)
    assert torch.equal(target, torch.arange(8.0))
    assert contents(store) == [files[VIRTUAL_PATH]]
    files, manifest = stored({"embed": torch.arange(8.0), "head": torch.ones(8)})
    with pytest.raises(StoreConflict, match="head: is tied"):
        fill(IntoStore(manifest, {"embed": target, "head": target}), files)


def test_a_refused_seal_changes_no_other_tensor() -> None:
    files, manifest = stored({"a": torch.ones(2, 2), "embed": torch.zeros(2), "head": torch.ones(2)})
    tied, strided = torch.full((2,), 7.0), torch.full((2, 2), 7.0)
    with pytest.raises(StoreConflict):
        fill(IntoStore(manifest, {"a": strided.t(), "embed": tied, "head": tied}), files)
    assert torch.equal(strided, torch.full((2, 2), 7.0))


def test_a_fetch_counts_as_a_write_of_torch_when_it_begins_and_when_it_ends() -> None:
    files, manifest = stored({"w": torch.ones(4), "strided": torch.ones(2, 3)})
    weight, strided = torch.nn.Parameter(torch.zeros(4)), torch.zeros(3, 2)
    before = weight._version
    loss = (weight * weight).sum()
    store = IntoStore(manifest, {"w": weight, "strided": strided.t()})
    begun = weight._version
    assert begun > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]
    later = (weight * weight).sum()
    fill(store, files)
    assert weight._version > begun
    assert strided._version > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()  # type: ignore[no-untyped-call]
    assert contents(store) == [files[VIRTUAL_PATH]], "its own writes withdraw nothing"


def test_memory_that_is_mapped_for_reading_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    _, manifest = stored({"w": torch.ones(4)})
    (tmp_path / "data").write_bytes(bytes(16))
    mapped = mmap.mmap(os.open(tmp_path / "data", os.O_RDONLY), 16, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frozen = torch.frombuffer(mapped, dtype=torch.float32)
    with pytest.raises(StoreConflict, match="mapped for reading"):
        IntoStore(manifest, {"w": frozen})


def test_overlapping_tensors_are_refused() -> None:
    _, manifest = stored({"a": torch.ones(4), "b": torch.ones(4)})
    flat, wide = torch.zeros(6), torch.zeros(16)
    for a, b in [(flat[:4], flat[2:]), (wide[::4], wide[4:8])]:
        with pytest.raises(StoreConflict, match="b: overlaps 'a'"):
            IntoStore(manifest, {"a": a, "b": b})
    with pytest.raises(StoreConflict, match="expanded"):
        IntoStore(manifest, {"a": torch.zeros(4), "b": torch.zeros(1).expand(4)})


def test_a_caller_that_writes_meanwhile_is_told() -> None:
    files, manifest = stored({"w": torch.ones(4)})
    target = torch.zeros(4)
    store = IntoStore(manifest, {"w": target})
    target.fill_(3)
    with pytest.raises(SourceChanged, match="w changed"):
        fill(store, files)


def test_a_filled_tensor_is_withdrawn_when_it_is_trained_on() -> None:
    files, manifest = stored({"w": torch.ones(4)})
    target = torch.zeros(4)
    store = IntoStore(manifest, {"w": target})
    fill(store, files)
    assert contents(store) == [files[VIRTUAL_PATH]]
    target.add_(1)
    with pytest.raises(SourceChanged):
        contents(store)
    store.close()


# refused by both ends


class Wrapper(torch.Tensor):
    """A tensor whose bytes are not its own."""

    @staticmethod
    def __new__(cls: type[Wrapper]) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, (2,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(func)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (torch.ones(2, device="meta"), "meta; only tensors of the CPU"),
        (torch.ones(2).to_sparse(), "plain bytes"),
        (torch.ones(2, dtype=torch.complex64).conj(), "plain bytes"),
        (Wrapper(), "plain bytes"),
    ],
)
def test_tensors_without_plain_memory_are_refused(value: torch.Tensor, why: str) -> None:
    _, manifest = stored({"w": torch.ones(2)})
    with pytest.raises(StoreConflict, match=f"w: .*{why}"):
        TensorSource({"w": value})
    with pytest.raises(StoreConflict, match=f"w: .*{why}"):
        IntoStore(manifest, {"w": value})


@pytest.mark.parametrize(("name", "value"), [("step", 3), ("__metadata__", torch.ones(1)), (7, torch.ones(1))])
def test_what_is_no_tensor_is_named(name: Any, value: Any) -> None:
    with pytest.raises(SettingsError, match=str(name)):
        TensorSource({"w": torch.ones(1), name: value})


@pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.complex128), filled(torch.float4_e2m1fn_x2, (), 0)])
def test_type_without_a_safetensors_name_is_named(value: torch.Tensor) -> None:
    with pytest.raises(SettingsError, match=f"w: {value.dtype}"):
        TensorSource({"w": value})


# TensorSource


@settings(max_examples=60)
@given(kinds_of_tensors, st.integers(0, 1 << 30))
def test_the_virtual_file_is_what_the_reference_library_reads(kinds: list[Any], seed: int) -> None:
    tensors = {f"t{n}": filled(dtype, shape, seed + n) for n, (dtype, shape) in enumerate(kinds)}
    source = served(tensors)
    data = file_of(source)
    entries = source.manifest.files[0].tensors()
    assert contents(source) == [data]
    assert sum(source.units()) == source.size == len(data)
    assert [e for e in entries if e.offset % tensors[e.name].element_size()] == []
    known = {n: t for n, t in tensors.items() if t.dtype not in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2)}
    if len(known) == len(tensors):  # its reader of bytes does not know the two; its reader of files does, see below
        assert all_bits(safetensors.torch.load(data)) == all_bits(tensors)


def test_the_virtual_file_is_a_valid_file(tmp_path: Path) -> None:
    tensors = {str(dtype): filled(dtype, (2, 4), n) for n, dtype in enumerate(TORCH_DTYPES)}
    tensors["scalar"] = torch.tensor(3.5)
    tensors["nothing"] = torch.empty(0, 3, dtype=torch.int64)
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_of(TensorSource(tensors)))
    assert all_bits(safetensors.torch.load_file(path)) == all_bits(tensors)
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_an_empty_state_dict_is_a_valid_file(tmp_path: Path) -> None:
    source = served({})
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_of(source))
    assert safetensors.torch.load_file(path) == {}
    assert contents(source) == [path.read_bytes()]


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def test_ties_are_stored_once_and_load_into_a_tied_model(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    source = served(model.state_dict())
    assert [t.name for t in source.manifest.files[0].tensors()] == ["embed.weight"]
    assert source.manifest.files[0].aliases() == {"head.weight": "embed.weight"}
    path = tmp_path / "m.safetensors"
    path.write_bytes(file_of(source))
    missing, unexpected = safetensors.torch.load_model(other, path)
    assert not missing
    assert not unexpected
    assert torch.equal(other.head.weight, model.head.weight)


def test_a_file_saved_by_the_reference_library_is_read_with_its_ties(tmp_path: Path) -> None:
    model = Tied()
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_model(model, str(path))
    files = {"m.safetensors": path.read_bytes()}
    store = MemoryStore(manifest_of(files))
    fill(store, files)
    assert all_bits(store.tensors()) == all_bits(model.state_dict())


def test_a_tensor_named_like_the_format_makes_no_false_tie() -> None:
    source = served({"pt": torch.ones(2)})
    assert source.manifest.files[0].aliases() == {}


def test_tensors_are_read_where_they_lie() -> None:
    tensor = torch.zeros(16, dtype=torch.uint8)
    source = served({"w": tensor})
    tensor.numpy()[:] = 7  # not counted by torch, so it shows that nothing was copied
    assert file_of(source)[-16:] == b"\7" * 16


def test_overlapping_and_strided_tensors_are_stored_one_by_one() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": base, "rows": base[1:], "turned": base.t(), "flat": base.view(-1)}
    assert all_bits(safetensors.torch.load(file_of(TensorSource(tensors)))) == all_bits(tensors)


def test_zero_size_tensors_are_not_tied() -> None:
    source = served({"a": torch.empty(0), "b": torch.empty(0)})
    assert [t.name for t in source.manifest.files[0].tensors()] == ["a", "b"]


@pytest.mark.parametrize("how", ["written", "moved"])
def test_a_change_while_served_is_noticed(how: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(64))
    source = served({"w": parameter, "x": torch.ones(1, dtype=torch.uint8)})
    assert contents(source)
    if how == "written":
        with torch.no_grad():
            parameter.mul_(2)
    else:
        parameter.data = torch.ones(64)
    assert b"".join(source.read(0, 8))
    with pytest.raises(SourceChanged, match=f"w changed .*{how}"):
        contents(source)


def test_a_change_while_a_span_is_sent_is_noticed() -> None:
    tensor = torch.ones(4)
    source = served({"w": tensor})
    spans = source.spans(source.manifest.chunks[-1])
    assert next(spans)
    tensor.zero_()
    with pytest.raises(SourceChanged, match="w changed"):
        list(spans)


def test_inference_tensors_can_be_served() -> None:
    with torch.inference_mode():
        tensors = {"w": torch.arange(4.0), "t": torch.ones(2, 3).t()}
    assert all_bits(safetensors.torch.load(file_of(TensorSource(tensors)))) == all_bits(tensors)


def test_a_closed_source_serves_nothing() -> None:
    source = served({"w": torch.ones(2)})
    source.close()
    with pytest.raises(SourceChanged, match="closed"):
        contents(source)


def test_do_bytes_of_an_unused_tensor_stay_in_their_file(tmp_path: Path) -> None:
    first = {"a": torch.arange(4, dtype=torch.uint8), "x": torch.full((4,), 2, dtype=torch.uint8)}
    second = {"x": torch.full((4,), 3, dtype=torch.uint8)}
    (tmp_path / "m").mkdir()
    safetensors.torch.save_file(first, tmp_path / "m" / "1.safetensors")
    safetensors.torch.save_file(second, tmp_path / "m" / "2.safetensors")
    weight_map = {"a": "1.safetensors", "x": "2.safetensors"}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    manifest, source, _ = manifest_builder.checkpoint(tmp_path / "m", cache_dir=tmp_path / "cache")
    into = {"a": torch.zeros(4, dtype=torch.uint8), "x": torch.zeros(4, dtype=torch.uint8)}
    memory = MemoryStore(manifest)
    for store in (memory, IntoStore(manifest, into)):
        for chunk in manifest.chunks:
            data = b"".join(bytes(view) for view in source.read(chunk))
            for view in store.landing(chunk):
                view[:], data = data[: len(view)], data[len(view) :]
        store.seal(never_asked)
        tensors = store.tensors() if isinstance(store, MemoryStore) else into
        assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [0, 1, 2, 3], "x": [3, 3, 3, 3]}
        for chunk in manifest.chunks:  # served on, with the tensor that the model does not use
            assert b"".join(map(bytes, store.read(chunk))) == b"".join(map(bytes, source.read(chunk)))
    source.close()
