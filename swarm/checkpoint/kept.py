"""What swarm wrote into the Hugging Face cache, and its removal.

    <cache>/kept/<sha256 of the snapshot's path>.json    the files that fetches wrote for a snapshot

Other programs use the same cache. `remove` removes only files that a record names and that are as they were written;
a blob stays as long as any snapshot links to it.

Must not know: nodes, whether a node serves the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from swarm.checkpoint import hf_cache
from swarm.content.manifest import Digest, ModelId, unsafe_path
from swarm.store.file_lock import open_locked
from swarm.store.own_files import read_own, read_regular, remove_if_empty, replacing
from swarm.store.partial_directory import PARTIAL

RECORD_BYTES_MAX = 64 << 20
FOLDER = "kept"

log = logging.getLogger("swarm")


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The files that swarm wrote for a snapshot: size in bytes by path in the folder of the model. Links have 0."""

    model_id: ModelId
    digest: Digest
    snapshot: str
    files: dict[str, int]
    version: Literal[1] = 1

    @property
    def place(self) -> Path:
        """The snapshot."""
        return Path(self.snapshot)

    @property
    def commit(self) -> str:
        """The commit of the snapshot."""
        return self.place.name

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        return self.place.parent.parent

    @property
    def size(self) -> int:
        """Bytes of the files that are still there."""
        return sum(size for path, size in self.files.items() if os.path.lexists(self.folder / path))


_decoder = msgspec.json.Decoder(Kept)


def record(cache_dir: Path, model_id: str, digest: Digest, snapshot: Path, *, wrote: Iterable[Path]) -> None:
    """Notes what a fetch wrote for a snapshot, beside what earlier fetches wrote. A failure is logged only."""
    snapshot = Path(os.path.abspath(snapshot))
    folder = snapshot.parent.parent
    place = _place(cache_dir, snapshot)
    files = known.files if (known := _read(place)) else {}
    for path in wrote:
        with contextlib.suppress(OSError, ValueError):
            status = os.lstat(path)
            files[Path(os.path.abspath(path)).relative_to(folder).as_posix()] = (
                0 if path.is_symlink() else status.st_size
            )
    if not files:
        return
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as draft:
            draft.touch(0o600)
            draft.write_bytes(msgspec.json.encode(Kept(ModelId(model_id), digest, str(snapshot), files)))
    except OSError as error:
        log.warning("%s: %s; `swarm rm %s` will not know of this fetch", place, error.strerror, model_id)


def all_kept(cache_dir: Path) -> list[Kept]:
    """What is kept of every snapshot that is still there, by model id and commit."""
    found = [kept for place in (cache_dir / FOLDER).glob("*.json") if (kept := _read(place))]
    return sorted((k for k in found if Path(k.snapshot).is_dir()), key=lambda kept: (kept.model_id, kept.commit))


def unfinished(model_id: str) -> dict[Path, int]:
    """Directories of interrupted fetches of a model into the cache of this environment, with their bytes on disk."""
    if not hf_cache.is_model_id(model_id):
        return {}
    staged = hf_cache.model_folder(model_id) / hf_cache.INCOMING
    return {place: _disk_bytes(place) for place in sorted(staged.glob("*")) if place.is_dir()}


def remove(cache_dir: Path, kept: Kept) -> int:
    """Removes what swarm wrote for a snapshot; returns the bytes freed. Raises OSError."""
    folder, snapshot = kept.folder, Path(kept.snapshot)
    names = [path for path in kept.files if path.startswith("snapshots/")]
    freed = sum(_remove(folder, path, kept.files[path]) for path in names)
    linked = _linked(folder)
    blobs = [path for path in kept.files if path.startswith("blobs/")]
    freed += sum(_remove(folder, path, kept.files[path]) for path in blobs if (folder / path).name not in linked)
    for parent, _, _ in os.walk(snapshot, topdown=False):
        remove_if_empty(Path(parent))
    if not snapshot.exists():
        _forget_refs(folder, kept.commit)
    _remove_if_nothing_is_left(folder)
    _place(cache_dir, snapshot).unlink(missing_ok=True)
    return freed


def remove_unfinished(place: Path) -> bool:
    """Removes the directory of an interrupted fetch; False while a fetch uses it. Raises OSError."""
    lock = place / PARTIAL / "lock"
    lock.parent.mkdir(exist_ok=True)
    try:
        held = open_locked(lock, timeout_s=0)
    except BlockingIOError:
        return False
    try:
        shutil.rmtree(place)
    finally:
        os.close(held)
    _remove_if_nothing_is_left(place.parent.parent)
    return True


def _remove_if_nothing_is_left(folder: Path) -> None:
    """Removes a model's folder without files. The hub's tools call one without `snapshots` corrupted."""
    for place in ("blobs", hf_cache.INCOMING):
        remove_if_empty(folder / place)
    if {entry.name for entry in folder.iterdir()} <= {"snapshots"}:
        remove_if_empty(folder / "snapshots")
        remove_if_empty(folder)


def _remove(folder: Path, path: str, size: int) -> int:
    """Removes a file that is as it was written; returns its bytes."""
    place = folder / path
    if unsafe_path(path) or not os.path.lexists(place):
        return 0
    is_own = place.is_symlink() if size == 0 and place.is_symlink() else _is_file_of(place, size)
    if not is_own:
        log.warning("%s stays: it is not what swarm wrote there", place)
        return 0
    place.unlink()
    return size


def _is_file_of(place: Path, size: int) -> bool:
    return not place.is_symlink() and place.is_file() and place.stat().st_size == size


def _linked(folder: Path) -> set[str]:
    """Names of the blobs to which snapshots link."""
    links = (path for path in (folder / "snapshots").rglob("*") if path.is_symlink())
    return {os.path.basename(os.readlink(path)) for path in links}


def _forget_refs(folder: Path, commit: str) -> None:
    """Removes the names of a commit that is gone: the hub's tools call a cache with such a name corrupted."""
    for ref in sorted((folder / "refs").rglob("*"), reverse=True):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if ref.is_dir():
                remove_if_empty(ref)
            elif read_regular(ref, bytes_max=hf_cache.REF_BYTES_MAX).decode() == commit:
                ref.unlink()
    remove_if_empty(folder / "refs")


def _disk_bytes(place: Path) -> int:
    return sum(os.lstat(path).st_blocks * 512 for path in place.rglob("*") if path.is_file())


def _place(cache_dir: Path, snapshot: Path) -> Path:
    return cache_dir / FOLDER / f"{hashlib.sha256(os.fsencode(snapshot)).hexdigest()}.json"


def _read(place: Path) -> Kept | None:
    try:
        return _decoder.decode(read_own(place, bytes_max=RECORD_BYTES_MAX))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s is ignored: %s", place, error)
        return None


def chosen(kept: Sequence[Kept], model_id: str, revision: str | None) -> list[Kept]:
    """Those of a model id, or of a digest by its first 6 or more digits; of a revision, if there is one."""
    found = [k for k in kept if k.model_id == model_id] or [k for k in kept if _begins(k.digest, model_id)]
    return [k for k in found if revision is None or _snapshot(k, revision) == k.place]


def _snapshot(kept: Kept, revision: str) -> Path | None:
    return hf_cache.snapshot(kept.model_id, root=kept.folder.parent, revision=revision)


def _begins(digest: str, text: str) -> bool:
    return len(text) >= 6 and digest.startswith(text)
