"""Which headers are a file's, and does anything but ManifestInvalid come out of those that are not?"""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st

from swarm.content import safetensors_header
from swarm.content.bounded_json import VALUES_MAX
from swarm.content.safetensors_header import (
    DTYPE_BITS,
    HEADER_BYTES_MAX,
    LENGTH_BYTES,
    RANK_MAX,
    Tensor,
    compose,
    header_bytes,
    parse,
)
from swarm.errors import ManifestInvalid

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")
# Four times as many elements as drawn: a whole number of bytes in the 4- and 6-bit types as well.
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(lambda shape: [*shape, 4])
TENSORS = st.lists(st.tuples(NAMES, st.sampled_from(sorted(DTYPE_BITS)), SHAPES), unique_by=lambda t: t[0], max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def sized(dtype: str, shape: list[int]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * DTYPE_BITS[dtype] // 8


def parsed(table: Any, *, data_bytes: int = 0) -> tuple[list[Tensor], dict[str, str]]:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    return parse(header, subject="file", file_bytes=LENGTH_BYTES + len(header) + data_bytes)


def entry(start: int, end: int, **changed: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]} | changed


def test_where_do_tensors_lie() -> None:
    tensors, metadata = parsed(
        {"b": entry(4, 6), "a": entry(0, 4, dtype="F32", shape=[]), "__metadata__": {"format": "pt"}}, data_bytes=6
    )
    start = tensors[0].offset
    assert tensors == [Tensor("a", "F32", (), start, 4), Tensor("b", "U8", (2,), start + 4, 2)]
    assert metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"__metadata__": {}},
        {"__metadata__": None},
        {"empty": entry(0, 0)},
        {"none": entry(0, 0), "also": entry(0, 0, shape=[3, 0, 5])},
    ],
)
def test_is_a_file_without_data_fine(table: Any) -> None:
    assert sum(tensor.size for tensor in parsed(table)[0]) == 0


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"{}garbage", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"1" * 5000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        ({"__metadata__": {"n": 1}}, "__metadata__"),
        ({"__metadata__": []}, "__metadata__"),
        ({"__metadata__": 0}, "__metadata__"),
        ({"__metadata__": "pt"}, "__metadata__"),
        (b'{"a":{},"a":{}}', "given twice: 'a'"),
        (b'{"a":{"dtype":"U8","dtype":"U8"}}', "given twice: 'dtype'"),
        ({"a": 1}, "exactly dtype"),
        ({"a": {}}, "exactly dtype"),
        ({"a": entry(0, 0, more=1)}, "exactly dtype"),
        ({"a": entry(0, 0, dtype="F17")}, "unknown dtype"),
        ({"a": entry(0, 0, dtype=[])}, "unknown dtype"),
        ({"a": entry(0, 0, dtype={})}, "unknown dtype"),
        ({"a": entry(0, 0, dtype=None)}, "unknown dtype"),
        ({"a": entry(0, 0, shape=0)}, "shape"),
        ({"a": entry(0, 0, shape=[-1])}, "shape"),
        ({"a": entry(0, 1, shape=[True])}, "shape"),
        ({"a": entry(0, 1, shape=[1.0])}, "shape"),
        ({"a": entry(0, 0, shape=[1 << 60])}, "shape"),
        ({"a": entry(0, 0, shape=[0] * (RANK_MAX + 1))}, "shape"),
        ({"a": entry(0, 0, data_offsets=[0])}, "data_offsets"),
        ({"a": entry(0, 0, data_offsets=[1, 0])}, "data_offsets"),
        ({"a": entry(0, 0, data_offsets=["0", "0"])}, "data_offsets"),
        ({"a": entry(0, 4, dtype="F32", shape=[2])}, "does not fill"),
        ({"a": entry(0, 1, dtype="F4", shape=[1])}, "does not fill"),
        ({"a": entry(0, 1, shape=[(1 << 60) - 1] * RANK_MAX)}, "does not fill"),
        ({"a": entry(0, 4), "b": entry(3, 6)}, "overlaps"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, "overlaps"),
        ({"a": entry(0, 2), "b": entry(3, 6)}, "leaves a gap"),
        ({"a": entry(1, 6)}, "leaves a gap"),
        ({"a": entry(0, 5)}, "end at byte"),
        ({"a": entry(0, 7)}, "end at byte"),
    ],
)
def test_is_a_broken_header_refused(table: Any, says: str) -> None:
    with pytest.raises(ManifestInvalid, match=says) as caught:
        parsed(table, data_bytes=6)
    assert caught.value.subject == "file"


def test_is_a_name_given_twice_found_without_quadratic_work() -> None:
    names = [f'"{number}":0' for number in range(200_000)]
    with pytest.raises(ManifestInvalid, match="given twice: '199999'"):
        parsed(f"{{{','.join([*names, names[-1]])}}}".encode())


@pytest.mark.parametrize(
    ("prefix", "file_bytes", "says"),
    [
        (b"", 0, "truncated"),
        (b"\2\0\0\0\0\0\0", 7, "truncated"),
        ((1 << 60).to_bytes(8, "little"), 1 << 61, "at most"),
        ((HEADER_BYTES_MAX + 1).to_bytes(8, "little"), 1 << 40, "at most"),
        ((3).to_bytes(8, "little"), 10, "truncated"),
    ],
)
def test_is_an_impossible_length_refused(prefix: bytes, file_bytes: int, says: str) -> None:
    with pytest.raises(ManifestInvalid, match=says):
        header_bytes(prefix, subject="file", file_bytes=file_bytes)


def test_is_the_largest_length_accepted() -> None:
    prefix = HEADER_BYTES_MAX.to_bytes(8, "little")
    assert header_bytes(prefix, subject="file", file_bytes=8 + HEADER_BYTES_MAX) == 8 + HEADER_BYTES_MAX


@given(TENSORS, st.dictionaries(NAMES, NAMES, max_size=3))
def test_is_what_was_composed_parsed(given_tensors: list[tuple[str, str, list[int]]], metadata: dict[str, str]) -> None:
    wanted = [(name, dtype, shape, sized(dtype, shape)) for name, dtype, shape in given_tensors]
    header = compose(wanted, metadata)
    assert len(header) % 8 == 0
    tensors, told = parsed(header, data_bytes=sum(size for *_, size in wanted))
    assert told == metadata
    # Tensors without bytes may lie anywhere among the others.
    assert {(t.name, t.dtype, t.shape, t.size) for t in tensors} == {(n, d, tuple(s), b) for n, d, s, b in wanted}


@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(["uint8", "float32", "int64", "bool"]), SHAPES), max_size=5))
def test_do_we_agree_with_the_reference_implementation(kinds: dict[str, tuple[str, list[int]]]) -> None:
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in kinds.items()}
    theirs = safetensors.numpy.save(arrays)
    end = header_bytes(theirs, subject="file", file_bytes=len(theirs))
    tensors, _ = parse(theirs[LENGTH_BYTES:end], subject="file", file_bytes=len(theirs))
    assert {tensor.name: (tensor.shape, tensor.size) for tensor in tensors} == {
        name: (array.shape, array.nbytes) for name, array in arrays.items()
    }
    ours = compose([(tensor.name, tensor.dtype, tensor.shape, tensor.size) for tensor in tensors])
    data = theirs[end:]
    assert safetensors.numpy.load(len(ours).to_bytes(8, "little") + ours + data).keys() == arrays.keys()


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_does_garbage_only_ever_raise_manifest_invalid(header: bytes) -> None:
    try:
        parse(header, subject="file", file_bytes=LENGTH_BYTES + len(header))
    except ManifestInvalid:
        return
    assert isinstance(json.loads(header), dict)


@given(st.fixed_dictionaries({"dtype": JSON | st.just("U8"), "shape": JSON, "data_offsets": JSON}))
def test_does_a_garbled_entry_only_ever_raise_manifest_invalid(garbled: dict[str, Any]) -> None:
    try:
        tensors, _ = parsed({"a": garbled})
    except ManifestInvalid:
        return
    assert [tensor.size for tensor in tensors] == [0]


def outcome(header: bytes, data_bytes: int) -> Any:
    try:
        return parse(header, subject="file", file_bytes=LENGTH_BYTES + len(header) + data_bytes)
    except ManifestInvalid:
        return "refused"


def text_of(pairs: list[tuple[str, Any]]) -> str:
    """A JSON object, in which a name may be given twice."""
    members = (f"{json.dumps(name, ensure_ascii=False)}:{json.dumps(value)}" for name, value in pairs)
    return "{" + ",".join(members) + "}"


ODD_NAMES = st.sampled_from(["a", "b", "__metadata__", "data_offsets", "dtype", "\\", '"', "é"])
ODD_ENTRIES = st.one_of(
    st.builds(entry, st.integers(0, 2), st.integers(0, 3)),
    st.builds(entry, st.just(0), st.just(2), dtype=st.sampled_from(["F16", "U8", "F17", 1])),
    st.dictionaries(ODD_NAMES, st.text(max_size=2) | st.integers(), max_size=2),
    st.none() | st.lists(st.integers(), max_size=1),
)


@given(st.lists(st.tuples(ODD_NAMES, ODD_ENTRIES), max_size=4), st.integers(0, 4))
@example([("a", {}), ("a", entry(0, 0))], 0)
@example([("a", []), ("a", entry(0, 0))], 0)
def test_does_the_quick_way_find_what_the_thorough_way_finds(pairs: list[tuple[str, Any]], data_bytes: int) -> None:
    header = text_of(pairs).encode()
    quick = outcome(header, data_bytes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(safetensors_header, "_parse_quickly", lambda *_: None)
        assert quick == outcome(header, data_bytes)


FIELDS = ("dtype", "shape", "data_offsets")


@given(TENSORS)
def test_is_what_the_reference_library_writes_parsed_quickly(drawn: list[tuple[str, str, list[int]]]) -> None:
    tensors = [(name, dtype, shape, sized(dtype, shape)) for name, dtype, shape in drawn if "\\" not in name]
    header = compose(tensors, {"format": "pt"})
    if b"\\" not in header and not any(name in FIELDS or ":" in name for name, *_ in tensors):
        assert safetensors_header._parse_quickly(header, LENGTH_BYTES + len(header)) is not None


def test_are_values_counted_before_they_are_made() -> None:
    """A header of 8 MB made of empty lists would take 200 MB while it is parsed."""
    header = b'{"t":[' + b"[]," * (VALUES_MAX + 1) + b"[]]}"
    tracemalloc.start()
    try:
        with pytest.raises(ManifestInvalid, match="more than 2097152 values"):
            parse(header, subject="file", file_bytes=8 + len(header))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
