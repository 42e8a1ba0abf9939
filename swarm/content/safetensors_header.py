"""Parser and strict validator of safetensors headers from untrusted files.

    0        8                8 + N                                  size
    | N: u64 | JSON, N bytes  | tensor data, without holes or overlap |

Owns the rules of the format (https://github.com/huggingface/safetensors, 'Format'). Opens no files.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, BinaryIO, NoReturn

import msgspec

from swarm.content import bounded_json
from swarm.errors import ManifestInvalid

LENGTH_BYTES = 8
HEADER_BYTES_MAX = 100_000_000  # limit of the reference implementation
RANK_MAX = 64  # limit of torch
NATURAL_MAX = 1 << 60

# In bits: elements of the 4- and 6-bit types share bytes.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


class Tensor(msgspec.Struct, frozen=True):
    """`shape` in elements; `offset` from the start of the file and `size` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


_Natural = Annotated[int, msgspec.Meta(ge=0, lt=NATURAL_MAX)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[_Natural, ...], msgspec.Meta(max_length=RANK_MAX)]
    data_offsets: tuple[_Natural, _Natural]


_table_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_entries_decoder = msgspec.json.Decoder(list[_Entry])


def header_bytes(prefix: bytes, *, subject: str, file_bytes: int) -> int:
    """Size of header and length field in bytes, read from the first 8 bytes of a file.

    Raises ManifestInvalid if a file of `file_bytes` cannot hold them; allocates nothing.
    """
    if len(prefix) < LENGTH_BYTES:
        raise ManifestInvalid(subject, f"truncated safetensors file: {len(prefix)} bytes, not even a header length")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > HEADER_BYTES_MAX:
        raise ManifestInvalid(subject, f"safetensors header claims {length} bytes; at most {HEADER_BYTES_MAX} allowed")
    if LENGTH_BYTES + length > file_bytes:
        raise ManifestInvalid(subject, f"safetensors header claims {length} bytes in a file of {file_bytes}: truncated")
    return LENGTH_BYTES + length


def read(stream: BinaryIO, *, subject: str, file_bytes: int) -> tuple[bytes, list[Tensor]]:
    """The header's JSON text and tensors, from a file that is open at its start. Raises ManifestInvalid."""
    prefix = stream.read(LENGTH_BYTES)
    header = stream.read(header_bytes(prefix, subject=subject, file_bytes=file_bytes) - len(prefix))
    return header, parse(header, subject=subject, file_bytes=file_bytes)[0]


def parse(header: bytes, *, subject: str, file_bytes: int) -> tuple[list[Tensor], dict[str, str]]:
    """Tensors sorted by offset, and the `__metadata__` of the file.

    `header` is the JSON text without the length field. Raises ManifestInvalid with `subject` in its text.
    """

    def broken(why: str) -> NoReturn:
        raise ManifestInvalid(subject, f"broken safetensors header: {why}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
            broken(f"name given twice: {name!r}")
        return table

    if bounded_json.has_too_many_values(header):
        broken(f"more than {bounded_json.VALUES_MAX} values")
    start = LENGTH_BYTES + len(header)
    quick = _parse_quickly(header, start)
    if quick is not None:
        tensors, metadata = quick
        _demand_consecutive(tensors, start, file_bytes, broken)
        return tensors, metadata
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        broken(f"not JSON ({error})")
    if not isinstance(table, dict):
        broken("not a JSON object")
    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # the reference implementation accepts null
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        broken("__metadata__ does not map text to text")

    tensors = [_tensor(name, entry, start, broken) for name, entry in table.items()]
    tensors.sort(key=_place)
    _demand_consecutive(tensors, start, file_bytes, broken)
    return tensors, metadata


def _parse_quickly(header: bytes, start: int) -> tuple[list[Tensor], dict[str, str]] | None:
    """Tensors sorted by offset, and metadata; None for a header that may break a rule, which `parse` then names.

    It checks every rule of an entry. A decoder keeps the last of two values of a name: a name that is given twice shows
    in the count of colons, of which an entry has four, and a field that is given twice in the count of its name.
    """
    if b"\\" in header:
        return None
    try:
        table = _table_decoder.decode(header)
        raw = table.pop("__metadata__", None)
        metadata = {} if raw is None else json.loads(bytes(raw), object_pairs_hook=_unique)
        entries = _entries_decoder.decode(b"[" + b",".join(table.values()) + b"]")
    except (ValueError, RecursionError):
        return None
    colons = 4 * len(entries) + (0 if raw is None else 1 + bytes(raw).count(b":"))
    if header.count(b":") != colons:
        return None
    if any(header.count(f'"{field}"'.encode()) != len(entries) for field in _Entry.__struct_fields__):
        return None
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        return None
    if header.count(b'"__metadata__"') > 1:
        return None
    tensors = []
    for name, entry in zip(table, entries, strict=True):
        first, last = entry.data_offsets
        if entry.dtype not in DTYPE_BITS or math.prod(entry.shape) * DTYPE_BITS[entry.dtype] != 8 * (last - first):
            return None
        tensors.append(Tensor(name, entry.dtype, entry.shape, start + first, last - first))
    tensors.sort(key=_place)
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("name given twice")
    return table


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.offset, tensor.size


def _demand_consecutive(tensors: Sequence[Tensor], start: int, file_bytes: int, broken: Any) -> None:
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            relation = "overlaps" if tensor.offset < end else "leaves a gap after"
            broken(f"tensor {tensor.name!r} {relation} its neighbour")
        end = tensor.offset + tensor.size
    if end != file_bytes:
        broken(f"tensors end at byte {end} but the file has {file_bytes}")


def _tensor(name: str, entry: Any, start: int, broken: Any) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        broken(f"tensor {name!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        broken(f"tensor {name!r} has unknown dtype {dtype!r}")
    if not _naturals(shape) or len(shape) > RANK_MAX:
        broken(f"tensor {name!r} has shape {shape!r}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        broken(f"tensor {name!r} has data_offsets {offsets!r}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        broken(f"tensor {name!r} of {dtype} {shape} does not fill its {offsets[1] - offsets[0]} bytes")
    return Tensor(name, dtype, tuple(shape), start + offsets[0], offsets[1] - offsets[0])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < NATURAL_MAX for n in value)


def compose(tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None) -> bytes:
    """The JSON header of a file with these consecutive tensors `(name, dtype, shape, size in bytes)`.

    Padded with spaces to a multiple of 8 bytes, as the format recommends.
    """
    ends = itertools.accumulate(size for *_, size in tensors)
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for (name, dtype, shape, size), end in zip(tensors, ends, strict=True):
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end - size, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)
