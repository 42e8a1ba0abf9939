"""Names of the tensors in the files of a listing, read from the origin before anything else is.

An index names them for all files of its folder; other safetensors files are asked for their header. What is read here
is not proven: it narrows what a fetch of some tensors asks for, and the files that it fetches are proven as ever.

Must not know: peers, stores, what a user selects.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection
from pathlib import PurePosixPath

from swarm.content import bounded_json, safetensors_header
from swarm.content.manifest import FileEntry
from swarm.content.promise import ListedFile, Listing
from swarm.errors import ManifestInvalid, OriginUnreachable
from swarm.origin import OriginReader

INDEX = ".safetensors.index.json"
INDEX_BYTES_MAX = 100 << 20
HEADERS_MAX = 256  # files without an index
FIRST_BYTES = 256 << 10  # hold most headers
TENSORS = ".safetensors"


def tensor_names(origin: OriginReader, listing: Listing, paths: Collection[str]) -> dict[str, set[str]]:
    """The names of the tensors in each safetensors file of `paths`; none in a file that its index leaves out.

    Blocks. Raises OriginError, and ManifestInvalid for a broken index or header, or more headers than are worth it.
    """
    files = {file.path: file for file in listing.files}
    found: dict[str, set[str]] = {path: set() for path in paths if path.endswith(TENSORS)}
    indexed = set()
    for path, file in files.items():
        if path.endswith(INDEX):
            folder = PurePosixPath(path).parent
            indexed.add(folder)
            for name, shard in _weight_map(origin, listing, file).items():
                found.get((folder / shard).as_posix(), set()).add(name)
    plain = [path for path in found if PurePosixPath(path).parent not in indexed]
    if len(plain) > HEADERS_MAX:
        raise ManifestInvalid(listing.source, f"has no index, and {len(plain)} headers of files are too many to read")
    for path in plain:
        found[path] = _names(origin, listing, files[path])
    return found


def _weight_map(origin: OriginReader, listing: Listing, file: ListedFile) -> dict[str, str]:
    if file.size > INDEX_BYTES_MAX:
        raise ManifestInvalid(file.path, f"an index of {file.size} bytes")
    try:
        table = bounded_json.loads(_read(origin, listing, file, 0, file.size))["weight_map"]
        return {str(name): str(shard) for name, shard in table.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ManifestInvalid(file.path, "is no index of tensors") from error


def _names(origin: OriginReader, listing: Listing, file: ListedFile) -> set[str]:
    head = _read(origin, listing, file, 0, min(FIRST_BYTES, file.size))
    prefix = head[: safetensors_header.LENGTH_BYTES]
    size = safetensors_header.header_bytes(prefix, subject=file.path, file_bytes=file.size)
    if size > len(head):
        head += _read(origin, listing, file, len(head), size - len(head))
    header, tensors = safetensors_header.read(io.BytesIO(head), subject=file.path, file_bytes=file.size)
    entry = FileEntry(file.path, file.size, header.decode(), ())
    return {tensor.name for tensor in tensors} | entry.aliases().keys()


def _read(origin: OriginReader, listing: Listing, file: ListedFile, offset: int, size: int) -> bytes:
    data = bytearray(size)
    rest = memoryview(data)
    if size:
        with contextlib.closing(origin.read(listing, file, offset, size)) as stream:
            while rest:
                if not (count := stream.readinto(rest)):
                    raise OriginUnreachable(origin.address, f"{file.path} ended early")
                rest = rest[count:]
    return bytes(data)
