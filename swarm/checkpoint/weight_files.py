"""Whether a file of weights is there as a whole, by its own format: git-lfs pointers, empty and truncated files.

Interrupted downloads leave such files under their final names. A loader finds out when it loads; a swarm would copy the
file to every machine first.

    .safetensors   its header says its size: `content.safetensors_header`
    .gguf          the ends of its tensors; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    .bin .pt .pth  zip archives (torch >= 1.6) end with a directory of their members

Must not know: indexes, hashes.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from typing import BinaryIO

from swarm.checkpoint.files import CheckpointFile
from swarm.errors import ManifestInvalid
from swarm.store.own_files import open_regular

POINTER_BYTES_MAX = 1024  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
PAGE_BYTES = 256  # of the beginning
GGUF_HEADER_BYTES_MAX = 256 << 20  # a vocabulary of a million tokens takes 30 MB
ARRAYS_DEEP_MAX = 8  # of arrays in arrays; models have arrays of numbers and of texts

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_OTHER_WEIGHTS = (".ckpt", ".h5", ".msgpack", ".onnx", ".tflite", ".npz", ".ot", ".nemo", ".pdparams", ".mlmodel")

_POINTER = b"version https://git-lfs.github.com/spec/v1"
_ZIP, _ZIP_END, _ZIP_TAIL_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22 + (1 << 16)  # the longest comment
_GGUF = b"GGUF"
_PAGES = b"<!doctype html", b"<html"  # what a download leaves that was answered by a login or an error
_DEMAND = "finish the download, then serve its directory again"


def is_weights(path: str) -> bool:
    """Whether a path names weights of any format."""
    return path.endswith((*WEIGHTS, *_OTHER_WEIGHTS))


def refuse_broken(file: CheckpointFile) -> None:
    """Raises ManifestInvalid for a git-lfs pointer, and for weights that are empty, truncated or a web page."""
    refuse_pointer(file)
    if not file.path.endswith(WEIGHTS):
        return
    if not file.stamp.size:
        raise ManifestInvalid(file.path, f"is empty; {_DEMAND}")
    with open_regular(file.real) as stream:
        if stream.read(PAGE_BYTES).lstrip().lower().startswith(_PAGES):
            raise ManifestInvalid(file.path, "is a web page in place of weights; download the file again")
        stream.seek(0)
        magic = stream.read(4)
        if magic == _ZIP and file.path.endswith((".bin", ".pt", ".pth")):
            stream.seek(max(0, file.stamp.size - _ZIP_TAIL_BYTES))
            if _ZIP_END not in stream.read():
                raise ManifestInvalid(
                    file.path, f"is truncated: {file.stamp.size} bytes without an end of its archive; {_DEMAND}"
                )
        if magic == _GGUF and file.path.endswith(".gguf"):
            least = _Gguf(stream).least_bytes()
            if least > file.stamp.size:
                raise ManifestInvalid(
                    file.path, f"is truncated: {file.stamp.size} bytes of at least {least}; {_DEMAND}"
                )


def refuse_pointer(file: CheckpointFile) -> None:
    """Raises ManifestInvalid for a git-lfs pointer, which stands in a clone without git-lfs in place of a file."""
    if not len(_POINTER) <= file.stamp.size < POINTER_BYTES_MAX:
        return
    with open_regular(file.real) as stream:
        text = stream.read(POINTER_BYTES_MAX)
    if text.startswith(_POINTER):
        size = re.search(rb"^size (\d+)\r?$", text, re.MULTILINE)
        what = f"the file of {int(size[1])} bytes" if size else "the file"
        raise ManifestInvalid(
            file.path, f"is a git-lfs pointer in place of {what}; run `git lfs pull` in {file.real.parent}, serve again"
        )


class _Unknown(Exception):
    """The file does not follow the format as it is known here."""


# Elements of a block, and its bytes, by ggml type.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_ALIGNMENT = b"general.alignment"


class _Gguf:
    """The header of a GGUF file, version 2 or 3, behind its magic."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._alignment = 32

    def least_bytes(self) -> int:
        """The size that the tensors need; 0 if the header is of another version or broken, which loaders report."""
        if self._stream.read(4) not in (b"\2\0\0\0", b"\3\0\0\0"):
            return 0
        try:
            return self._least_bytes()
        except EOFError:
            return self._stream.tell() + 1
        except _Unknown:
            return 0

    def _least_bytes(self) -> int:
        tensors, pairs = self._unpack("<QQ")
        for _ in range(pairs):
            self._skip_pair()
        ends = [self._tensor_end() for _ in range(tensors)]
        start = -(-self._stream.tell() // self._alignment) * self._alignment
        return start + max(ends) if ends else self._stream.tell()

    def _skip_pair(self) -> None:
        key = self._read(self._unpack("<Q")[0])
        (kind,) = self._unpack("<I")
        if key == _ALIGNMENT and kind == _UINT32:
            self._alignment = max(1, self._unpack("<I")[0])
        else:
            self._skip_value(kind)

    def _skip_value(self, kind: int, *, depth: int = 0) -> None:
        if kind == _STRING:
            self._skip(self._unpack("<Q")[0])
        elif kind == _ARRAY and depth < ARRAYS_DEEP_MAX:
            kind, count = self._unpack("<IQ")
            if kind in _VALUE_BYTES:
                self._skip(count * _VALUE_BYTES[kind])
            else:
                for _ in range(count):
                    self._skip_value(kind, depth=depth + 1)
        elif kind in _VALUE_BYTES:
            self._skip(_VALUE_BYTES[kind])
        else:
            raise _Unknown

    def _tensor_end(self) -> int:
        self._skip(self._unpack("<Q")[0])
        (dimensions,) = self._unpack("<I")
        if dimensions > 8:
            raise _Unknown
        shape = self._unpack(f"<{dimensions}Q")
        kind, offset = self._unpack("<IQ")
        elements, block_bytes = _BLOCKS.get(kind, (1, 0))  # an unknown type takes no room here
        return int(offset) + _product(shape) // elements * block_bytes

    def _unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._read(struct.calcsize(layout)))

    def _read(self, size: int) -> bytes:
        self._demand_room(size)
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def _skip(self, size: int) -> None:
        self._demand_room(size)
        self._stream.seek(size, os.SEEK_CUR)

    def _demand_room(self, size: int) -> None:
        if self._stream.tell() + size > GGUF_HEADER_BYTES_MAX:
            raise _Unknown


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
