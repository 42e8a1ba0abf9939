"""Checks files on a disk: a snapshot of the Hugging Face cache, a fetched directory, any directory of a model.

What a file is compared with, the first that there is:

    the hub's name of its content    sha256 or git's sha1: a snapshot, a directory of `hf download --local-dir`
    the manifest of its fetch        on this machine
    the manifest of its last serving on this machine

A directory without any of them is complete or not by its indexes, numbers and formats, and its digest says which it is.

Must not know: peers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from swarm.checkpoint import (
    blob_check,
    digest_cache,
    hf_cache,
    hub_tree,
    local_download,
    manifest_builder,
    weight_files,
    weight_index,
)
from swarm.checkpoint.files import CheckpointFile, bystander, walk
from swarm.content.manifest import Manifest
from swarm.errors import CheckpointIncomplete, ManifestInvalid
from swarm.store.file_errors import store_errors
from swarm.store.part import narrowed
from swarm.store.stamp import Stamp


@dataclass(frozen=True)
class Checked:
    """The result: a line for each problem, counts of files by what they were compared with, a note about the rest."""

    problems: list[str]
    files: int
    size: int
    compared: dict[str, int]
    note: str = ""


def model(path: Path, *, cache_dir: Path) -> Checked:
    """Checks a directory. Raises ManifestInvalid if there is no file to check, StoreError if it cannot be read."""
    with store_errors(path):
        lost: list[str] = []
        found, _ = walk(path, dangling=lost)
        problems = [f"{name}: is missing: a link to nowhere" for name in lost]
        fetched, part_of = digest_cache.recall_files(cache_dir, path) or (None, None)
        if fetched:
            gone = {file.path for file in fetched.files} - {file.path for file in found} - set(lost)
            problems += [f"{name}: is missing; fetch the model again" for name in gone]
        problems += _broken(found, whole=part_of is None)
        names = hf_cache.hub_names(path) or local_download.names(path)
        named = [*found, *_others(path, names, found)]
        hub = [file for file in named if file.path in names]
        wrong = set(
            blob_check.damaged(hub, names, folder=path.absolute().parent.parent, cache_dir=cache_dir, again=True)
        )
        problems += [f"{name}: its content is not that of its name at the hub; fetch the model again" for name in wrong]
        rest = {file.path for file in found if file.path not in names}
        compared = {"the hub's names": len(hub)}
        records = {
            "the manifest of its fetch": fetched,
            "the manifest of its last serving": digest_cache.last_served(cache_dir, path),
        }
        for what, manifest in records.items():
            known = rest & {file.path for file in manifest.files} if manifest else set()
            if manifest and known:
                problems += _differences(path, narrowed(manifest, known))
                compared[what] = len(known)
                rest -= known
    part = f"a part, {len(fetched.files)} of {part_of.files} files" if fetched and part_of else ""
    notes = [part or _listing_note(path), f"{len(rest)} without anything to compare with" if rest else ""]
    return Checked(
        sorted(problems),
        len(named),
        sum(file.stamp.size for file in named),
        {what: count for what, count in compared.items() if count},
        "; ".join(note for note in notes if note),
    )


def _broken(found: list[CheckpointFile], *, whole: bool) -> list[str]:
    """Problems of formats and, if the files were to be a whole model, of what is missing."""
    problems = []
    for file in found:
        try:
            weight_files.refuse_broken(file)
        except ManifestInvalid as error:
            problems.append(str(error))
    try:
        weight_index.indexes(found)
    except CheckpointIncomplete as error:
        problems += [str(error)] if whole else []
    except ManifestInvalid as error:
        problems.append(str(error))
    return problems


def _others(path: Path, names: Mapping[str, str], found: list[CheckpointFile]) -> list[CheckpointFile]:
    """Files with a hub name that are no part of a model: READMEs, licences."""
    known = {file.path for file in found}
    others = []
    for name in names.keys() - known:
        with contextlib.suppress(OSError):
            if (path / name).is_file():
                others.append(CheckpointFile(name, (path / name).resolve(), Stamp.of((path / name).stat())))
    return others


def _differences(path: Path, manifest: Manifest) -> list[str]:
    return manifest_builder.verify(path, manifest)


def _listing_note(path: Path) -> str:
    """How much of its commit a snapshot is, if the hub's listing is here."""
    place = Path(path).absolute()
    listed = hub_tree.read(place.parent.parent, place.name) if hf_cache.model_id_of(place) else None
    missing = [name for name in listed or () if not (place / name).exists() and not bystander(name)]
    if not listed or not missing:
        return ""
    return f"{len(missing)} of the {len(listed)} files of the commit are not here, such as {missing[0]}"
