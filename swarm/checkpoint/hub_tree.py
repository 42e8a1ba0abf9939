"""The hub's listing of a commit, which huggingface_hub 2 keeps: path, size and name of every file.

    <model's folder>/trees/<commit>.json               beside snapshots
    <directory>/.cache/huggingface/trees/<commit>.json    of a download with `local_dir`

The listing says which files a commit has: without it, a part of a commit looks like the whole.

Must not know: snapshots, blobs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from swarm.checkpoint.blob_check import is_hub_name
from swarm.content import bounded_json
from swarm.content.manifest import FILES_MAX
from swarm.store.own_files import read_regular

LISTING_BYTES_MAX = 64 << 20  # FILES_MAX files at some 300 bytes are half of it
_FORMAT = 1

log = logging.getLogger("swarm")


@dataclass(frozen=True, slots=True)
class Listed:
    """A file of a commit: its size in bytes and the hub's name of its content."""

    size: int
    name: str


def place(folder: Path, commit: str) -> Path:
    """The file of the listing. `folder`: of the model in the cache, or `.cache/huggingface` of a directory."""
    return folder / "trees" / f"{commit}.json"


def read(folder: Path, commit: str) -> dict[str, Listed] | None:
    """The listing of a commit by path; None without one, or with one of another format."""
    file = place(folder, commit)
    try:
        data = bounded_json.loads(read_regular(file, bytes_max=LISTING_BYTES_MAX))
        if data["format_version"] != _FORMAT:
            return None
        found = {path: _listed(entry) for path, entry in data["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is ignored: %s", file, error)
        return None
    return found if len(found) <= FILES_MAX else None


def _listed(entry: dict[str, object]) -> Listed:
    large = entry.get("lfs_sha256")
    size, name = (entry.get("lfs_size") or entry["size"], large) if large else (entry["size"], entry["blob_id"])
    if not isinstance(size, int) or not isinstance(name, str) or not is_hub_name(name):
        raise ValueError("an entry has no size or no name")
    return Listed(size, name)
