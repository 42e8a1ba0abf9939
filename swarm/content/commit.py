"""Parts of one commit as one artifact: manifests of some of its files become the manifest of all of them.

Nodes hold different files of a commit: engines download what they read, and an interrupted download leaves half. Each
builds a manifest of what it has. `whole` is a function of these manifests only, so nodes that know the same manifests
agree on the artifact that all of them hold parts of.

Must not know: commits, nodes, files on a disk. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from swarm.content.manifest import CHUNKS_MAX, FILES_MAX, FileEntry, Manifest, ModelId

PART = "#part"  # ends the model id under which a node announces what is no whole model

_INDEX = ".index.json"


def part_name(model_id: ModelId) -> ModelId:
    """The id of parts of a model. A fetch of the model does not find them."""
    return ModelId(model_id + PART)


def covers(whole: Manifest, part: Manifest) -> bool:
    """Whether every file of `part` is in `whole`, as far as the manifests tell."""
    files = {file.path: file for file in whole.files}
    return all(file.path in files and not _contradict(files[file.path], file) for file in part.files)


def whole(manifests: Sequence[Manifest]) -> Manifest | None:
    """The manifest of all files of these manifests: one of them if it covers the others, else their union.

    None if they contradict each other, or are no checkpoints that one manifest can describe.
    """
    ordered = sorted(manifests, key=lambda manifest: manifest.digest)
    if found := next((m for m in ordered if all(covers(m, other) for other in ordered)), None):
        return found
    first = ordered[0]
    if any((m.version, m.tier, m.fingerprint, m.scheme) != _kind(first) for m in ordered) or first.tier != "checkpoint":
        return None
    files: dict[str, tuple[tuple[bool, bytes], FileEntry]] = {}
    for manifest in ordered:
        indexed = {_folder(file.path) for file in manifest.files if file.path.endswith(_INDEX)}
        for file in manifest.files:
            # A manifest with the index knows which tensors of the file the model uses.
            ranked = (_folder(file.path) not in indexed, msgspec.json.encode(file)), file
            known = files.setdefault(file.path, ranked)
            if _contradict(known[1], file):
                return None
            files[file.path] = min(known, ranked, key=lambda entry: entry[0])
    entries = tuple(file for _, (_, file) in sorted(files.items()))
    if len(entries) > FILES_MAX or sum(len(file.chunks) for file in entries) > CHUNKS_MAX:
        return None
    return msgspec.structs.replace(first, files=entries, chunk_bytes=max(m.chunk_bytes for m in ordered))


def lacking(whole: Manifest, paths: Iterable[str]) -> list[str]:
    """The files of `whole` that are not among `paths`."""
    here = set(paths)
    return [file.path for file in whole.files if file.path not in here]


def _kind(manifest: Manifest) -> tuple[object, ...]:
    return manifest.version, manifest.tier, manifest.fingerprint, manifest.scheme


def _contradict(one: FileEntry, other: FileEntry) -> bool:
    """Whether two descriptions of a file are of different contents. Different cuts tell sizes only."""
    if one.size != other.size:
        return True
    if [chunk.size for chunk in one.chunks] != [chunk.size for chunk in other.chunks]:
        return False
    return one.chunks != other.chunks or (one.blake3 != other.blake3 and bool(one.blake3 and other.blake3))


def _folder(path: str) -> str:
    return path.rpartition("/")[0]
