"""The manifest: the immutable description of one artifact, and the artifact's identity.

Owns the format, its canonical bytes, its validation and the rule that cuts files into chunks. A manifest describes
content only, never where it lies or what it is called: two nodes that hold the same bytes build the same manifest.

    identity        = sha256(canonical bytes)
    canonical bytes = JSON, fields in the order of the classes below, no white space
    chunk digest    = hash(leaf digests, big-endian, in order)
    leaf digest     = hash(leaf bytes)
    hash            = XXH3-128, 16 bytes, which finds accidents; or BLAKE3, 32 bytes, which finds lies too

Chunks never cross files. A safetensors file carries its header here, so that a newcomer knows every tensor before the
first byte of it arrives; the header's bytes are part of the file's chunks all the same.

Must not know: disks, sockets, hash functions. Bytes from a peer become a `Manifest` only through `decode`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, NoReturn

import msgspec

from swarm.content import safetensors_header
from swarm.content.safetensors_header import Tensor
from swarm.errors import ManifestInvalid

VERSION = 1

# Limits on what a peer may make this node believe or allocate. Each is far above any published model.
MANIFEST_BYTES_MAX = 64 << 20  # the headers of a 100,000-tensor model are about 12 MB
FILES_MAX = 100_000
PATH_BYTES_MAX = 1024
FILE_BYTES_MAX = 1 << 48  # 256 TiB
CHUNK_BYTES_MAX = 64 << 20  # one chunk is held in memory by some stores
CHUNKS_MAX = 1 << 20  # a bitfield of 128 KiB
LEAF_BYTES_MIN, LEAF_BYTES_MAX = 1024, CHUNK_BYTES_MAX

# Chosen by bench/chunk_sweep.py, see ARCHITECTURE.md: small enough that a burst of newcomers can pipeline a small
# model, large enough that the fixed cost of a chunk disappears.
CHUNK_BYTES_SMALLEST, CHUNK_BYTES_LARGEST, CHUNKS_WANTED = 256 << 10, 16 << 20, 1024
GPU_CHUNKS_WANTED = 128
# Above 65,536 bytes xxhash releases the GIL; 128 KiB is still hot in the core's own cache when it is hashed.
LEAF_BYTES_DEFAULT = 128 << 10

ChunkHash = Literal["xxh3-128", "blake3"]
DIGEST_BYTES: dict[ChunkHash, int] = {"xxh3-128": 16, "blake3": 32}

Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
ChunkDigest = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32}|[0-9a-f]{64})\Z")]
Tier = Literal["checkpoint", "loaded", "cache"]


class HashScheme(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How chunk digests are made. Leaves of `leaf_bytes`, the last one of a chunk may be shorter."""

    name: ChunkHash = "xxh3-128"
    leaf_bytes: Annotated[int, msgspec.Meta(ge=LEAF_BYTES_MIN, le=LEAF_BYTES_MAX)] = LEAF_BYTES_DEFAULT

    @property
    def digest_bytes(self) -> int:
        """Of a leaf's digest, and of a chunk's."""
        return DIGEST_BYTES[self.name]


class ChunkEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Size in bytes and digest in hexadecimal of one chunk."""

    size: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES_MAX)]
    digest: ChunkDigest


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the artifact. `header` is a safetensors file's JSON header, empty for other files."""

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=PATH_BYTES_MAX)]
    size: Annotated[int, msgspec.Meta(ge=0, le=FILE_BYTES_MAX)]
    header: str
    chunks: tuple[ChunkEntry, ...]

    def tensors(self) -> list[Tensor]:
        """Tensors of a safetensors file by offset; none for other files. Raises ManifestInvalid."""
        return self._parsed()[0]

    def aliases(self) -> dict[str, str]:
        """Tied tensors: alias -> the name that holds the bytes (the convention of `safetensors.torch.save_model`)."""
        tensors, metadata = self._parsed()
        names = {tensor.name for tensor in tensors}
        return {alias: name for alias, name in metadata.items() if name in names and alias not in names}

    def _parsed(self) -> tuple[list[Tensor], dict[str, str]]:
        if not self.header:
            return [], {}
        return safetensors_header.parse(self.header.encode(), subject=self.path, file_bytes=self.size)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk: `index` in the artifact, and the byte range `[offset, offset + size)` of file number `file`."""

    index: int
    file: int
    offset: int
    size: int
    digest: bytes


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """One artifact. Build it with `Manifest(...)` and `check()`, or read it with `decode`."""

    version: Literal[1]
    tier: Tier
    fingerprint: Annotated[str, msgspec.Meta(max_length=4096)]  # tells layouts of one model apart; '' for checkpoints
    scheme: HashScheme
    chunk_bytes: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES_MAX)]
    files: Annotated[tuple[FileEntry, ...], msgspec.Meta(max_length=FILES_MAX)]

    @cached_property
    def encoded(self) -> bytes:
        """The canonical bytes."""
        return msgspec.json.encode(self)

    @cached_property
    def digest(self) -> str:
        """The artifact's identity: sha256 of the canonical bytes, in hexadecimal."""
        return hashlib.sha256(self.encoded).hexdigest()

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks, file after file."""
        return tuple(self._cut())

    @cached_property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    def _cut(self) -> Iterator[Chunk]:
        index = itertools.count()
        for number, file in enumerate(self.files):
            offset = 0
            for entry in file.chunks:
                yield Chunk(next(index), number, offset, entry.size, bytes.fromhex(entry.digest))
                offset += entry.size

    def check(self) -> None:
        """Raises ManifestInvalid unless paths are confined and unique, and chunks cover every file exactly."""
        paths = [file.path for file in self.files]
        if paths != sorted(paths):
            self._invalid("files are not in order of their paths")
        for path, following in itertools.pairwise(paths):
            if path == following:
                self._invalid(f"path given twice: {path!r}")
        known = set(paths)
        total = 0
        for file in self.files:
            if why := unsafe_path(file.path):
                self._invalid(f"path {file.path!r} {why}")
            for parent in _parents(file.path):
                if parent in known:
                    self._invalid(f"{parent!r} is both a file and a directory")
            if sum(chunk.size for chunk in file.chunks) != file.size:
                self._invalid(f"chunks of {file.path!r} do not add up to its {file.size} bytes")
            if any(chunk.size > self.chunk_bytes for chunk in file.chunks):
                self._invalid(f"a chunk of {file.path!r} is larger than chunk_bytes = {self.chunk_bytes}")
            if any(len(chunk.digest) != 2 * self.scheme.digest_bytes for chunk in file.chunks):
                self._invalid(f"a chunk of {file.path!r} has a digest that is none of {self.scheme.name}")
            total += len(file.chunks)
            file.tensors()
        if total > CHUNKS_MAX:
            self._invalid(f"{total} chunks; at most {CHUNKS_MAX} are allowed")

    def _invalid(self, why: str) -> NoReturn:
        raise ManifestInvalid("manifest", why)

    def __repr__(self) -> str:
        return f"<Manifest {self.digest[:12]} {len(self.files)} files, {len(self.chunks)} chunks, {self.size} bytes>"


# Decoders are made where their types are: what msgspec knows of a type is incomplete while the first decoder is made,
# and another thread that decodes meanwhile ends the process.
_decoder = msgspec.json.Decoder(Manifest)


def decode(data: bytes, *, digest: str) -> Manifest:
    """The manifest with this identity. Raises ManifestInvalid for anything but its exact canonical bytes."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise ManifestInvalid("manifest", f"{len(data)} bytes; at most {MANIFEST_BYTES_MAX} are allowed")
    if hashlib.sha256(data).hexdigest() != digest:
        raise ManifestInvalid("manifest", f"its bytes do not have the digest {digest[:16]}…: a peer altered it")
    try:
        manifest = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestInvalid("manifest", str(error)) from error
    if manifest.encoded != data:
        raise ManifestInvalid("manifest", "not in canonical form")
    manifest.check()
    return manifest


def unsafe_path(path: str) -> str | None:
    """Why a relative path from a stranger may not be written to, or None when it may."""
    if path.startswith("/"):
        return "is absolute"
    if len(path.encode("utf-8", "replace")) > PATH_BYTES_MAX:
        return f"has more than {PATH_BYTES_MAX} bytes"
    if "\0" in path or "\\" in path or any(ord(c) < 32 for c in path):
        return "holds a backslash or a control character"
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "leaves its directory or is not in its shortest form"
    if any(len(part.encode("utf-8", "replace")) > 255 for part in parts):
        return "has a component of more than 255 bytes"
    if parts[0] == ".swarm":
        return "names swarm's own directory"
    return None


def _parents(path: str) -> Iterator[str]:
    parts = path.split("/")[:-1]
    return itertools.accumulate(parts, lambda a, b: f"{a}/{b}")


def default_chunk_bytes(total_bytes: int, *, on_gpu: bool = False) -> int:
    """`chunk_bytes` for an artifact of this size: a power of two near a `CHUNKS_WANTED`th of it, within bounds.

    In GPU memory a 128th: there a chunk's fixed cost is that of copying tens of megabytes.
    """
    wanted = max(1, total_bytes // (GPU_CHUNKS_WANTED if on_gpu else CHUNKS_WANTED))
    largest = CHUNK_BYTES_MAX if on_gpu else CHUNK_BYTES_LARGEST
    return min(max(1 << (wanted - 1).bit_length(), CHUNK_BYTES_SMALLEST), largest)


def cut(units: Iterable[int], chunk_bytes: int) -> list[int]:
    """Chunk sizes for consecutive units (tensors, or a whole file) of these sizes in bytes.

    A unit above `chunk_bytes` is sharded, starting a chunk of its own; its rest and small neighbours share chunks.
    """
    sizes: list[int] = []
    room = 0  # what still fits into the last chunk
    for unit in units:
        if unit > room:
            whole, rest = divmod(unit, chunk_bytes)
            sizes += [chunk_bytes] * whole
            if rest:
                sizes.append(rest)
            room = chunk_bytes - rest if rest else 0
        elif unit:
            sizes[-1] += unit
            room -= unit
    return sizes


def units(size: int, tensors: Sequence[Tensor]) -> list[int]:
    """What `cut` cuts a file into: its header and its tensors, or the file as a whole."""
    if not tensors:
        return [size]
    return [tensors[0].offset, *(tensor.size for tensor in tensors)]
