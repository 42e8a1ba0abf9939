"""What an engine reads before its weights: config, tokenizer and the headers of safetensors files, as an artifact.

    stage      a checkpoint's small files and a description of it -> a directory
    source     such a directory -> what to serve as '<model id>#metadata'
    lay_out    such a directory, as it was fetched -> a model directory whose safetensors files are headers alone

Engines decide by headers, too: whether embeddings are tied, which dtype, which quantisation. Without them a newcomer
builds another model than the one that its weights are for, and answers differently without a word. A file that is its
header alone fails to load as loudly as a truncated one, so nobody can take it for weights.

The description names the checkpoint's digest: what is configured here can only be loaded with that content.

Must not know: nodes, engines.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from swarm.checkpoint import manifest_builder
from swarm.content import safetensors_header
from swarm.content.manifest import FILE_BYTES_MAX, Digest, Manifest, unsafe_path
from swarm.engines import cache_gc
from swarm.errors import ManifestInvalid, SourceChanged
from swarm.store.directory import DirectorySource
from swarm.store.disk import store_errors

DESCRIPTION = "swarm_checkpoint.json"
NAME = "swarm_model_id.txt"  # what a directory that was laid out is called among nodes
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".tflite")
SMALL_BYTES_MAX = 64 << 20  # the largest tokenizers are about 40 MB


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A safetensors file's whole size in bytes and its JSON header."""

    size: int
    text: str


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint without its bytes: `content` is its digest; headers of its safetensors files by path."""

    content: Digest
    headers: dict[str, Header]

    def tensor_names(self) -> set[str]:
        """Names of all tensors of the checkpoint."""
        return {tensor.name for path, header in self.headers.items() for tensor in _parse(path, header)}


_decoder = msgspec.json.Decoder(Description)


def describe(manifest: Manifest) -> Description:
    """What can be said of a checkpoint without its bytes."""
    return Description(
        manifest.digest, {file.path: Header(file.size, file.header) for file in manifest.files if file.header}
    )


def stage(cache: Path, root: Path, manifest: Manifest) -> Path:
    """A directory with what engines read of the checkpoint at `root` before its weights; made once for each content.

    Raises SourceChanged when a file is not the manifest's any more, StoreError when the disk fails.
    """
    place = _staged(cache, manifest.digest)
    small = tuple(file for file in manifest.files if not is_weights(file.path) and file.size <= SMALL_BYTES_MAX)

    def fill(fresh: Path) -> None:
        for file in small:
            _copy(root / file.path, fresh / file.path)
        few = Manifest(1, "checkpoint", "", manifest.scheme, manifest.chunk_bytes, small)
        if problems := manifest_builder.verify(fresh, few):
            raise SourceChanged(root, problems[0])
        (fresh / DESCRIPTION).write_bytes(msgspec.json.encode(describe(manifest), order="sorted"))

    return _make(place, fill)


def staged(cache: Path, content: str) -> Path | None:
    """The directory that `stage` made for this content, or that `adopt` brought from the swarm."""
    place = _staged(cache, content)
    if not (place / DESCRIPTION).is_file():
        return None
    cache_gc.hold(place)
    return place if (place / DESCRIPTION).is_file() else None


def source(cache: Path, place: Path) -> DirectorySource:
    """Serves a directory of `staged`, which is no checkpoint: it has an index without the files that this names.

    Raises what `manifest_builder.files` raises.
    """
    return manifest_builder.files(place, cache_dir=cache)


def adopt(cache: Path, fetched: Path) -> Path:
    """Moves a directory that was fetched to where `staged` finds it. Raises ManifestInvalid, StoreError."""
    content = read(fetched).content
    return _make(_staged(cache, content), lambda fresh: _copy_all(fetched, fresh))


def lay_out(cache: Path, model_id: str, fetched: Path) -> Path:
    """A model directory for an engine: the fetched files, and each safetensors file as its header alone.

    Raises ManifestInvalid when the description is not one, StoreError when the disk fails.
    """
    described = read(fetched)

    def fill(fresh: Path) -> None:
        _copy_all(fetched, fresh)
        (fresh / NAME).write_text(f"{model_id}\n", encoding="utf-8")
        for path, header in described.headers.items():
            text = header.text.encode()
            (fresh / path).parent.mkdir(parents=True, exist_ok=True)
            (fresh / path).write_bytes(len(text).to_bytes(safetensors_header.LENGTH_BYTES, "little") + text)

    name = hashlib.sha256(model_id.encode()).hexdigest()[:16]
    return _make(cache / "models" / f"{described.content[:16]}-{name}", fill)


def read(directory: Path) -> Description:
    """The description of the checkpoint that a directory is for, which a stranger may have written.

    Raises ManifestInvalid when there is none or it cannot be true, StoreError when it cannot be read.
    """
    place = directory / DESCRIPTION
    with store_errors(place):
        if not place.is_file():
            raise ManifestInvalid(str(directory), f"has no {DESCRIPTION}")
        data = place.read_bytes()
    try:
        found = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestInvalid(str(place), str(error)) from error
    for path, header in found.headers.items():
        if why := unsafe_path(path):
            raise ManifestInvalid(str(place), f"path {path!r} {why}")
        if not 0 <= header.size <= FILE_BYTES_MAX:
            raise ManifestInvalid(str(place), f"{path!r} cannot have {header.size} bytes")
        _parse(path, header)
    return found


def is_weights(path: str) -> bool:
    """Whether a file holds weights, by its name."""
    return path.endswith(WEIGHTS)


def is_whole(directory: Path) -> bool:
    """Whether a directory holds all files of its indexes, and each safetensors file is as long as its header says."""
    found = [path for path in directory.rglob("*") if is_weights(path.name) and path.is_file()]
    indexes = directory.rglob("*.safetensors.index.json")
    named = {path for index in indexes for path in _shards(index)}
    return bool(found) and named <= {*found} and all(_whole(path) for path in found if path.suffix == ".safetensors")


def _shards(index: Path) -> set[Path]:
    """Files that an index names; one that cannot be read names itself, which holds no weights."""
    try:
        return {index.parent / str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {index}


def _whole(path: Path) -> bool:
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            prefix = stream.read(safetensors_header.LENGTH_BYTES)
            end = safetensors_header.header_bytes(prefix, subject=str(path), file_bytes=size)
            safetensors_header.parse(stream.read(end - len(prefix)), subject=str(path), file_bytes=size)
    except ManifestInvalid:
        return False
    return True


def _parse(path: str, header: Header) -> list[safetensors_header.Tensor]:
    return safetensors_header.parse(header.text.encode(), subject=path, file_bytes=header.size)[0]


def _staged(cache: Path, content: str) -> Path:
    return cache / "metadata" / content[:16]


def _make(place: Path, fill: Callable[[Path], None]) -> Path:
    """`place`, filled aside and renamed when it is whole, unless it is there already; held. Raises StoreError."""
    cache_gc.hold(place)
    with store_errors(place):
        if place.is_dir():
            return place
        fresh = place.parent / f".new-{secrets.token_hex(8)}"
        fresh.mkdir(parents=True)
        try:
            fill(fresh)
            try:
                os.rename(fresh, place)
            except OSError:
                if not place.is_dir():  # else another process was faster, with the same
                    raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return place


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _copy_all(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        if path.is_file() and relative.parts[0] != ".swarm":
            _copy(path, target / relative)
