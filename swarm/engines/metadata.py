"""The metadata artifact: config, tokenizer and safetensors headers, which an engine reads before its weights.

    stage      a checkpoint's small files and its description -> a directory, served as '<model id>#metadata'
    lay_out    a fetched directory -> a model directory with safetensors headers in place of the files

Engines also decide by headers: tied embeddings, dtype, quantisation. Without them a newcomer may build a model that the
weights do not fit, and generate different tokens without an error. A file of a header alone fails to load like a
truncated file, so no loader mistakes it for weights.

The description holds the checkpoint's digest: an engine configured from it may load that content only.

Must not know: nodes, engines.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from swarm.checkpoint import manifest_builder
from swarm.content import bounded_json, safetensors_header
from swarm.content.manifest import FILE_BYTES_MAX, MANIFEST_BYTES_MAX, Digest, FileEntry, Manifest, unsafe_path
from swarm.engines import cache_gc
from swarm.errors import ManifestInvalid, SourceChanged
from swarm.store.file_errors import store_errors
from swarm.store.own_files import demand_own, open_regular

DESCRIPTION = "swarm_checkpoint.json"
NAME = "swarm_model_id.txt"  # holds the model id of a directory that `lay_out` made
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".tflite")
SMALL_BYTES_MAX = 64 << 20  # the largest tokenizers are about 40 MB


class FileHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A safetensors file's size in bytes and its JSON header."""

    size: int
    text: str


class CheckpointDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint's digest and the headers of its safetensors files by path."""

    content: Digest
    headers: dict[str, FileHeader]

    def tensor_names(self) -> set[str]:
        """Names of all tensors of the checkpoint."""
        return {tensor.name for path, header in self.headers.items() for tensor in _parse(path, header)}


_decoder = msgspec.json.Decoder(CheckpointDescription)


def describe(manifest: Manifest) -> CheckpointDescription:
    """The description of a manifest's checkpoint."""
    headers = {file.path: FileHeader(file.size, file.header) for file in manifest.files if file.header}
    return CheckpointDescription(manifest.digest, headers)


def stage(cache: Path, root: Path, manifest: Manifest) -> Path:
    """A directory with the small files and the description of the checkpoint at `root`; made once for each content.

    Raises SourceChanged for a file that is not the manifest's any more, StoreError when the disk fails.
    """
    small = _small(manifest)

    def fill(fresh: Path) -> None:
        for file in small:
            (fresh / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file.path, fresh / file.path)
        if problems := manifest_builder.verify(fresh, _part(manifest, small)):
            raise SourceChanged(root, problems[0])
        (fresh / DESCRIPTION).write_bytes(msgspec.json.encode(describe(manifest), order="sorted"))

    return _make(_staged(cache, manifest.digest), fill)


def staged(cache: Path, content: str) -> Path | None:
    """The directory of this content that `stage` or `adopt` made."""
    place = _staged(cache, content)
    if not (place / DESCRIPTION).is_file():
        return None
    cache_gc.hold(place)
    demand_own(place)
    return place if (place / DESCRIPTION).is_file() else None


def adopt(cache: Path, fetched: Path, *, proven: bool = False) -> Path:
    """Copies a fetched directory to where `staged` finds it. Raises ManifestInvalid, StoreError.

    `proven`: what lies there of an earlier fetch has to be the same, or is replaced.
    """
    return _make(_staged(cache, read(fetched).content), lambda fresh: _copy_all(fetched, fresh), again=proven)


def demand(directory: Path, manifest: Manifest) -> None:
    """Raises ManifestInvalid unless a directory has small files, headers and digest of this checkpoint alone."""
    said, small = read(directory), _small(manifest)
    there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    there = {path for path in there if not path.startswith(".swarm/")}
    if said != describe(manifest) or there != {file.path for file in small} | {DESCRIPTION}:
        raise ManifestInvalid(str(directory), f"does not describe the checkpoint {manifest.digest[:16]}…")
    if problems := manifest_builder.verify(directory, _part(manifest, small)):
        raise ManifestInvalid(str(directory), f"is not of the checkpoint {manifest.digest[:16]}…: {problems[0]}")


def _small(manifest: Manifest) -> tuple[FileEntry, ...]:
    return tuple(file for file in manifest.files if not is_weights(file.path) and file.size <= SMALL_BYTES_MAX)


def _part(manifest: Manifest, files: tuple[FileEntry, ...]) -> Manifest:
    return Manifest(1, "checkpoint", "", manifest.scheme, manifest.chunk_bytes, files)


def lay_out(cache: Path, model_id: str, fetched: Path, *, proven: bool = False) -> Path:
    """A model directory for an engine: the fetched files, and each safetensors file as its header alone.

    `proven`: as in `adopt`.

    Raises ManifestInvalid for a wrong description, StoreError when the disk fails.
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
    return _make(cache / "models" / f"{described.content[:16]}-{name}", fill, again=proven)


def read(directory: Path) -> CheckpointDescription:
    """The description in a directory, which is untrusted input.

    Raises ManifestInvalid when it is missing or wrong, StoreError when it cannot be read.
    """
    place = directory / DESCRIPTION
    with store_errors(place):
        if not place.is_file():
            raise ManifestInvalid(str(directory), f"has no {DESCRIPTION}")
        with open_regular(place) as file:
            data = file.read(MANIFEST_BYTES_MAX + 1)
    if len(data) > MANIFEST_BYTES_MAX:  # it has the headers of a manifest, and less beside them
        raise ManifestInvalid(str(place), f"has more than {MANIFEST_BYTES_MAX} bytes")
    try:
        found = _decoder.decode(data)
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(str(place), str(error)) from error
    for path, header in found.headers.items():
        if why := unsafe_path(path):
            raise ManifestInvalid(str(place), f"path {path!r} {why}")
        if not 0 <= header.size <= FILE_BYTES_MAX:
            raise ManifestInvalid(str(place), f"{path!r} cannot have {header.size} bytes")
        _parse(path, header)
    return found


def is_weights(path: str) -> bool:
    """Whether a file holds weights, judged by its name."""
    return path.endswith(WEIGHTS)


def is_whole(directory: Path) -> bool:
    """Whether a directory has all files of its indexes, and each safetensors file has the size of its header."""
    found = [path for path in directory.rglob("*") if is_weights(path.name) and path.is_file()]
    indexes = directory.rglob("*.safetensors.index.json")
    named = {path for index in indexes for path in _shards(index)}
    return bool(found) and named <= {*found} and all(_whole(path) for path in found if path.suffix == ".safetensors")


def _shards(index: Path) -> set[Path]:
    """The files that an index names. An unreadable index names itself, so that the directory is not whole."""
    try:
        return {index.parent / str(name) for name in bounded_json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {index}


def _whole(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            safetensors_header.read(stream, subject=str(path), file_bytes=path.stat().st_size)
    except ManifestInvalid:
        return False
    return True


def _parse(path: str, header: FileHeader) -> list[safetensors_header.Tensor]:
    return safetensors_header.parse(header.text.encode(), subject=path, file_bytes=header.size)[0]


def _staged(cache: Path, content: str) -> Path:
    return cache / "metadata" / content[:16]


def _make(place: Path, fill: Callable[[Path], None], *, again: bool = False) -> Path:
    """`place`, held; if missing, it is filled aside and renamed when complete. Raises StoreError.

    `again`: it is filled in any case, and replaced if something else lies there.
    """
    cache_gc.hold(place)
    with store_errors(place):
        if place.is_dir() and not again:
            demand_own(place)
            return place
        fresh = place.parent / f".new-{secrets.token_hex(8)}"
        fresh.mkdir(parents=True)
        try:
            fill(fresh)
            if again and place.is_dir() and not _same(fresh, place):
                shutil.rmtree(place)
            try:
                os.rename(fresh, place)
            except OSError:
                if not place.is_dir():  # else another process made the same directory first
                    raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return place


def _same(one: Path, other: Path) -> bool:
    """Whether two directories have the same files with the same bytes."""

    def files(of: Path) -> set[str]:
        return {path.relative_to(of).as_posix() for path in of.rglob("*") if not path.is_dir()}

    names = files(one)
    return names == files(other) and not any(filecmp.cmpfiles(one, other, sorted(names), shallow=False)[1:])


def _copy_all(source: Path, target: Path) -> None:
    skipped = shutil.ignore_patterns(".swarm")
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=skipped, copy_function=shutil.copyfile)
