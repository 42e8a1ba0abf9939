"""A directory that huggingface_hub filled with `local_dir`: commit and names of its files, from its notes.

    <directory>/.cache/huggingface/download/<path>.metadata    three lines: commit, the hub's name of the content, time

The notes are about a download. Files may have been changed, added or renewed since: a directory has a commit only while
all its files are noted for that commit and have the contents of their names.

Must not know: the layout of the Hugging Face cache, peers.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from swarm.checkpoint import blob_check
from swarm.checkpoint.files import CheckpointFile
from swarm.store.own_files import read_regular

NOTES = ".cache/huggingface/download"
NOTE_BYTES_MAX = 4096

_COMMIT = re.compile(r"[0-9a-f]{40}")

log = logging.getLogger("swarm")


def names(path: Path) -> dict[str, str]:
    """The hub's names of the noted files, by path; empty for a directory without notes."""
    return {file: name for file, (_, name) in _notes(path).items()}


def commit(path: Path, found: Sequence[CheckpointFile], *, cache_dir: Path) -> str | None:
    """The commit of the files of a directory, which are compared with their names; None if they have none.

    Raises SourceChanged for a file that changes meanwhile, and OSError.
    """
    notes = _notes(path)
    if not notes:
        return None
    commits = {notes[file.path][0] for file in found if file.path in notes}
    added = [file.path for file in found if file.path not in notes]
    known = {file: name for file, (_, name) in notes.items()}
    why = ""
    if added:
        why = f"{added[0]} is not of the download"
    elif len(commits) != 1:
        why = "its files were downloaded from several commits"
    elif changed := blob_check.damaged(found, known, folder=path.absolute(), cache_dir=cache_dir):
        why = f"{changed[0]} was changed since its download"
    if why:
        log.warning("%s: is served without its commit: %s", path, why)
        return None
    return commits.pop()


def _notes(path: Path) -> dict[str, tuple[str, str]]:
    """Commit and name by path."""
    found = {}
    for file in (path / NOTES).rglob("*.metadata"):
        with contextlib.suppress(OSError, ValueError):
            noted, name, *_ = read_regular(file, bytes_max=NOTE_BYTES_MAX).decode().splitlines()
            if blob_check.is_hub_name(name) and _COMMIT.fullmatch(noted):
                found[file.relative_to(path / NOTES).as_posix().removesuffix(".metadata")] = (noted, name)
    return found
