"""The manifest: the immutable description of one artifact, and the artifact's identity.

Owns the format, its canonical bytes, its validation and the rule that cuts files into chunks. A manifest contains
neither locations nor model ids: two nodes with the same files build the same manifest.

    identity        = sha256(canonical bytes)
    canonical bytes = JSON, fields in the order of the classes below, no white space
    chunk digest    = XXH3-128(leaf digests, big-endian, in order)    detects corruption
    leaf digest     = XXH3-128(leaf bytes)
    BLAKE3          = BLAKE3(chunk bytes)                             also detects forgery

A chunk digest costs next to nothing, so every node checks it; XXH3 is no obstacle for a forger. A node that pins the
content also checks BLAKE3, which has no leaves of ours: it is a tree by itself.

A promise (tier "promised", see `content.promise`) is a manifest without chunk digests.

A chunk belongs to exactly one file. The manifest contains the header of every safetensors file, so that a newcomer
knows all tensors before the first chunk arrives; the chunks of the file contain the header too.

Must not know disks, sockets or hash functions. Bytes from a peer become a `Manifest` only through `decode`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, NamedTuple, NewType, NoReturn

import msgspec

from swarm.content import safetensors_header
from swarm.content.safetensors_header import Tensor
from swarm.errors import ManifestInvalid

VERSION = 1

# Limits on the memory and disk that a manifest of a peer can make this node use. All published models are far below.
MANIFEST_BYTES_MAX = 64 << 20  # the headers of 100,000 tensors take about 12 MB
FILES_MAX = 100_000
PATH_BYTES_MAX = 1024
DEPTH_MAX = 32  # directories above a file
DIRECTORIES_MAX = 100_000  # with long paths, 100,000 files would make 50 million
FILE_BYTES_MAX = 1 << 48  # 256 TiB
CHUNK_BYTES_MAX = 64 << 20  # some stores hold a chunk in memory
CHUNKS_MAX = 1 << 20  # a bitfield of 128 KiB
LEAF_BYTES_MIN, LEAF_BYTES_MAX = 1024, CHUNK_BYTES_MAX

# Measured by bench/chunk_sweep.py: a chunk has a fixed cost of 0.15 ms, and a burst of newcomers needs many chunks.
CHUNK_BYTES_SMALLEST, CHUNK_BYTES_LARGEST, CHUNKS_WANTED = 256 << 10, 16 << 20, 1024
GPU_CHUNKS_WANTED = 128
# With many streams, threads queue for the GIL once a leaf, so leaves are large; 512 KiB fit into a core's L2 cache.
LEAF_BYTES_DEFAULT = 512 << 10
LEAF_BYTES_STEP = 1024  # a block of BLAKE3, so that the bytes of a leaf are whole blocks


PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*\Z"  # no control characters, because texts are printed to terminals
ModelId = NewType("ModelId", Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=PRINTABLE)])
Digest = NewType("Digest", Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")])  # of a manifest
ChunkDigest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Blake3Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Tier = Literal["checkpoint", "loaded", "cache", "promised"]
# What an origin says of a file's content: sha256, git's blob sha1, or an ETag, which identifies it at its origin only.
Content = Annotated[
    str,
    msgspec.Meta(pattern=r"^(|sha256:[0-9a-f]{64}|git-sha1:[0-9a-f]{40}|etag:[^\x00-\x1f\x7f-\x9f]{1,512})\Z"),
]


class HashScheme(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hash function of the chunk digests, and the size of a leaf. The last leaf of a chunk may be shorter."""

    name: Literal["xxh3-128"] = "xxh3-128"
    leaf_bytes: Annotated[int, msgspec.Meta(ge=LEAF_BYTES_MIN, le=LEAF_BYTES_MAX, multiple_of=LEAF_BYTES_STEP)] = (
        LEAF_BYTES_DEFAULT
    )


class Digests(NamedTuple):
    """Digests of the bytes of a chunk: 16 bytes, and 32 bytes, which are empty where only the first was computed."""

    xxh3: bytes
    blake3: bytes = b""


class ChunkEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Size in bytes and hexadecimal digest of a chunk."""

    size: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES_MAX)]
    digest: ChunkDigest


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, dict=True):
    """A file of the artifact.

    `header` is the JSON header of a safetensors file that holds tensors of the model, empty for other files. `unused`
    names tensors of it that the model takes from another file, as its index says. `blake3` has a digest for each chunk;
    it is empty in manifests that cannot be pinned. `content` is set in promises only.
    """

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=PATH_BYTES_MAX)]
    size: Annotated[int, msgspec.Meta(ge=0, le=FILE_BYTES_MAX)]
    header: str
    chunks: tuple[ChunkEntry, ...]
    unused: tuple[str, ...] = ()
    blake3: tuple[Blake3Digest, ...] = ()
    content: Content = ""

    def tensors(self) -> list[Tensor]:
        """Tensors of a safetensors file by offset, unused ones too; empty for other files. Raises ManifestInvalid."""
        return self._parsed[0]

    def aliases(self) -> dict[str, str]:
        """Tied tensors, as `safetensors.torch.save_model` stores them: alias -> name of the stored tensor."""
        tensors, metadata = self._parsed
        if not metadata:
            return {}
        names = {tensor.name for tensor in tensors}
        return {alias: name for alias, name in metadata.items() if name in names and alias not in names}

    def with_unused(self, names: tuple[str, ...]) -> FileEntry:
        """The entry with these as the tensors that the model takes from other files."""
        return msgspec.structs.replace(self, unused=names)

    @cached_property
    def _parsed(self) -> tuple[list[Tensor], dict[str, str]]:
        if not self.header:
            return [], {}
        return safetensors_header.parse(self.header.encode(), subject=self.path, file_bytes=self.size)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Chunk `index` of the artifact: the byte range `[offset, offset + size)` of file number `file`."""

    index: int
    file: int
    offset: int
    size: int
    digest: bytes
    blake3: bytes = b""

    @property
    def digests(self) -> Digests:
        """Its digests."""
        return Digests(self.digest, self.blake3)

    def has(self, found: Digests) -> bool:
        """Whether bytes with these digests are the chunk. Where BLAKE3 was computed, both must be right."""
        return found.xxh3 == self.digest and (not found.blake3 or found.blake3 == self.blake3)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """The description of an artifact. Build it with `Manifest(...)` and `check()`, or read it with `decode`."""

    version: Literal[1]
    tier: Tier
    fingerprint: Annotated[str, msgspec.Meta(max_length=4096)]  # layout of a loaded model; '' for checkpoints
    scheme: HashScheme
    chunk_bytes: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES_MAX)]
    files: Annotated[tuple[FileEntry, ...], msgspec.Meta(max_length=FILES_MAX)]

    @cached_property
    def encoded(self) -> bytes:
        """Canonical bytes."""
        return msgspec.json.encode(self)

    @cached_property
    def digest(self) -> Digest:
        """Identity of the artifact: sha256 of the canonical bytes, in hexadecimal."""
        return Digest(hashlib.sha256(self.encoded).hexdigest())

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """All chunks in the order of the files."""
        return tuple(self._cut())

    @cached_property
    def has_blake3(self) -> bool:
        """Whether a fetch of this artifact can be pinned."""
        return all(len(file.blake3) == len(file.chunks) for file in self.files)

    @cached_property
    def size(self) -> int:
        """Sum of the file sizes in bytes."""
        return sum(file.size for file in self.files)

    @property
    def promised(self) -> bool:
        """Whether this is a promise: files by the hashes of their origin, without chunk digests."""
        return self.tier == "promised"

    @cached_property
    def first_chunks(self) -> tuple[int, ...]:
        """For each file the index of its first chunk, and the number of all chunks at the end."""
        counts = [0] * len(self.files)
        for chunk in self.chunks:
            counts[chunk.file] += 1
        return tuple(itertools.accumulate(counts, initial=0))

    def chunks_of(self, file: int) -> tuple[Chunk, ...]:
        """The chunks of a file, by number."""
        first, end = self.first_chunks[file : file + 2]
        return self.chunks[first:end]

    def _cut(self) -> Iterator[Chunk]:
        if self.promised:
            yield from self._cut_promised()
            return
        index = itertools.count()
        for number, file in enumerate(self.files):
            offset = 0
            for entry, strong in zip(file.chunks, file.blake3 or itertools.repeat(""), strict=False):
                yield Chunk(next(index), number, offset, entry.size, bytes.fromhex(entry.digest), bytes.fromhex(strong))
                offset += entry.size

    def _cut_promised(self) -> Iterator[Chunk]:
        index = itertools.count()
        for number, file in enumerate(self.files):
            offset = 0
            for size in cut([file.size], self.chunk_bytes):
                yield Chunk(next(index), number, offset, size, b"")
                offset += size

    def check(self) -> None:
        """Raises ManifestInvalid unless paths are relative, sorted and unique, and chunks cover every file exactly."""
        self._check_paths([file.path for file in self.files])
        total = 0
        for file in self.files:
            if bool(file.content) != self.promised:
                self._invalid(f"content of {file.path!r} is for the files of a promise, and for all of them")
            if self.promised:
                if file.header or file.chunks or file.unused or file.blake3:
                    self._invalid(f"{file.path!r} is promised, and has chunks or a header")
                total += -(-file.size // self.chunk_bytes)
                continue
            if sum(chunk.size for chunk in file.chunks) != file.size:
                self._invalid(f"chunks of {file.path!r} do not add up to its {file.size} bytes")
            if any(chunk.size > self.chunk_bytes for chunk in file.chunks):
                self._invalid(f"a chunk of {file.path!r} is larger than chunk_bytes = {self.chunk_bytes}")
            if len(file.blake3) not in (0, len(file.chunks)):
                self._invalid(f"{file.path!r} has {len(file.chunks)} chunks and {len(file.blake3)} BLAKE3 digests")
            total += len(file.chunks)
            names = {tensor.name for tensor in file.tensors()}
            if list(file.unused) != sorted(names.intersection(file.unused)):
                self._invalid(f"unused tensors of {file.path!r} are not in order, or not in the file")
        if total > CHUNKS_MAX:
            self._invalid(f"{total} chunks; at most {CHUNKS_MAX} are allowed")

    def _check_paths(self, paths: list[str]) -> None:
        if paths != sorted(paths):
            self._invalid("files are not in order of their paths")
        for path, following in itertools.pairwise(paths):
            if path == following:
                self._invalid(f"path given twice: {path!r}")
        known = set(paths)
        directories: set[str] = set()
        for path in paths:
            if why := unsafe_path(path):
                self._invalid(f"path {path!r} {why}")
            for parent in _parents(path):
                if parent in known:
                    self._invalid(f"{parent!r} is both a file and a directory")
                directories.add(parent)
            if len(directories) > DIRECTORIES_MAX:
                self._invalid(f"more than {DIRECTORIES_MAX} directories")

    def _invalid(self, why: str) -> NoReturn:
        raise ManifestInvalid("manifest", why)

    def __repr__(self) -> str:
        return f"<Manifest {self.digest[:12]} {len(self.files)} files, {len(self.chunks)} chunks, {self.size} bytes>"


# Module level: msgspec fills its type information while the first decoder is created, and a second thread that decodes
# at that time crashes the process.
_decoder = msgspec.json.Decoder(Manifest)


def decode(data: bytes, *, digest: Digest) -> Manifest:
    """The manifest with this digest. Raises ManifestInvalid unless `data` is its canonical form."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise ManifestInvalid("manifest", f"{len(data)} bytes; at most {MANIFEST_BYTES_MAX} are allowed")
    if hashlib.sha256(data).hexdigest() != digest:
        raise ManifestInvalid("manifest", f"its bytes do not match the digest {digest[:16]}…: a peer altered it")
    try:
        manifest = _decoder.decode(data)
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid("manifest", str(error)) from error
    if manifest.encoded != data:
        raise ManifestInvalid("manifest", "not in canonical form")
    manifest.check()
    return manifest


def unsafe_path(path: str) -> str | None:
    """The reason to refuse a relative path of a manifest, or None if it is safe to write to."""
    if path.startswith("/"):
        return "is absolute"
    if len(path.encode("utf-8", "replace")) > PATH_BYTES_MAX:
        return f"has more than {PATH_BYTES_MAX} bytes"
    if "\0" in path or "\\" in path or any(ord(c) < 32 or "\ud800" <= c <= "\udfff" for c in path):
        return "holds a backslash, a control character or half a character"
    parts = path.split("/")
    if len(parts) > DEPTH_MAX + 1:
        return f"is more than {DEPTH_MAX} directories deep"
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
    """A power of two near `total_bytes / CHUNKS_WANTED`, 256 KiB to 16 MiB.

    In GPU memory near `total_bytes / GPU_CHUNKS_WANTED`, up to 64 MiB: copying tens of MB takes as long as the fixed
    cost of a chunk.
    """
    wanted = max(1, total_bytes // (GPU_CHUNKS_WANTED if on_gpu else CHUNKS_WANTED))
    largest = CHUNK_BYTES_MAX if on_gpu else CHUNK_BYTES_LARGEST
    return min(max(1 << (wanted - 1).bit_length(), CHUNK_BYTES_SMALLEST), largest)


def cut(units: Iterable[int], chunk_bytes: int) -> list[int]:
    """Chunk sizes in bytes for consecutive units (tensors, or a whole file) of these sizes in bytes.

    A unit larger than `chunk_bytes` starts a new chunk and is split; its remainder shares a chunk with small units.
    """
    sizes: list[int] = []
    room = 0  # free bytes of the last chunk
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
    """The units of a file for `cut`: header and tensors, or the whole file if it has no tensors."""
    if not tensors:
        return [size]
    return [tensors[0].offset, *(tensor.size for tensor in tensors)]
