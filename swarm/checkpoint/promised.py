"""The manifest of a promise that is complete in memory: its tensors, as the files and indexes say.

Must not know: origins, peers, claims.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from swarm.checkpoint import weight_index
from swarm.checkpoint.files import CheckpointFile
from swarm.content import promise, safetensors_header
from swarm.content.manifest import Digests, Manifest
from swarm.store import Store
from swarm.store.stamp import Stamp


def described(store: Store, digests: Sequence[Digests], files: Collection[int]) -> Manifest:
    """The manifest of a promise whose `files` in `store` are proven, with these digests of its chunks.

    Raises ManifestInvalid for an incomplete model or a broken header, and StoreError.
    """
    manifest = store.manifest
    with tempfile.TemporaryDirectory(prefix="swarm-index-") as folder:
        found = []
        for number, file in enumerate(manifest.files):
            if number not in files:
                continue
            real = Path(folder, str(number))
            if file.path.endswith(".json") and file.size <= weight_index.INDEX_BYTES_MAX:
                real.write_bytes(b"".join(_views(store, number)))
            found.append(CheckpointFile(file.path, real, Stamp(file.size, 0, 0, 0)))
        maps = weight_index.indexes(found) if len(files) == len(manifest.files) else {}
    plain = weight_index.no_tensors(found, maps)
    headers, names = {}, {}
    for number, file in enumerate(manifest.files):
        if number in files and file.path.endswith(".safetensors") and file.path not in plain:
            head = io.BytesIO(_head(store, number))
            header, tensors = safetensors_header.read(head, subject=file.path, file_bytes=file.size)
            headers[file.path], names[file.path] = header.decode(), {tensor.name for tensor in tensors}
    unused = weight_index.unused(names, maps) if maps else {}
    return promise.proven(manifest, digests, headers=headers, unused=unused)


def _head(store: Store, number: int) -> bytes:
    """The beginning of a safetensors file, with its header."""
    file, views = store.manifest.files[number], _views(store, number)
    head = next(views, b"")
    prefix = head[: safetensors_header.LENGTH_BYTES]
    size = safetensors_header.header_bytes(prefix, subject=file.path, file_bytes=file.size)
    while len(head) < size and (view := next(views, b"")):
        head += view
    return head


def _views(store: Store, number: int) -> Iterator[bytes]:
    first, end = store.manifest.first_chunks[number : number + 2]
    chunks = itertools.islice(store.manifest.chunks, first, end)
    return (bytes(view) for chunk in chunks for view in store.read(chunk))
