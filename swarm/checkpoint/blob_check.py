"""Content of the Hugging Face cache against the hub's names: sha256, or git's sha1 for small files.

    <cache>/names/<sha256 of the model's folder>.json    checked files: stamp and name by real path

A disk, a copy or a program may have damaged a blob since it was downloaded. A node that serves a snapshot hashes each
file once; a file with the stamp of its last check is not hashed again. As in `digest_cache`, a stamp younger than
`RACY_NS` when its file was hashed is not trusted.

Must not know: manifests, the layout of the cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import msgspec

from swarm.checkpoint import digest_cache
from swarm.checkpoint.files import CheckpointFile
from swarm.store.own_files import open_regular, read_own, replacing
from swarm.store.stamp import Stamp

READ_BYTES = 1 << 20
HASH_THREADS_MAX = 8  # sha256 runs at 1.6 GB/s a thread; more threads would outrun the disk

GIT_SHA1 = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger("swarm")


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of the hub's names of contents."""
    return GIT_SHA1.fullmatch(text) is not None or SHA256.fullmatch(text) is not None


def content_name(path: Path, *, like: str, size: int) -> str:
    """The hub's name of a file's content: its sha256 if `like` is one (large files), else its git blob sha1.

    Raises OSError.
    """
    with open_regular(path, buffering=0) as file:
        return _name(file.fileno(), like=like, size=size)


def git_name(data: bytes) -> str:
    """git's blob sha1 of a content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def damaged(
    found: Sequence[CheckpointFile], names: Mapping[str, str], *, folder: Path, cache_dir: Path, again: bool = False
) -> list[str]:
    """Paths of the files whose content does not have its name of `names`; a file without a name counts as right.

    `folder`: of the model in the hub's cache, which has one record. `again`: hashes files with a record too. Raises
    SourceChanged for a file that changes meanwhile, and OSError for one that cannot be read.
    """
    record = _Record.of(cache_dir, folder)
    began_ns = time.time_ns()
    todo = [file for file in found if (name := names.get(file.path)) and (again or not record.knows(file, name))]
    workers = min(HASH_THREADS_MAX, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers, thread_name_prefix="swarm-names") as pool:
        right = list(pool.map(lambda file: _has_name(file, names[file.path]), todo))
    record.save([(f, names[f.path]) for f, is_right in zip(todo, right, strict=True) if is_right], began_ns=began_ns)
    return [file.path for file, is_right in zip(todo, right, strict=True) if not is_right]


def _has_name(file: CheckpointFile, name: str) -> bool:
    with open_regular(file.real, buffering=0) as stream:
        found = _name(stream.fileno(), like=name, size=file.stamp.size)
        file.stamp.check_open(file.real, stream.fileno())
    return found == name


def _name(fd: int, *, like: str, size: int) -> str:
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    state = hashlib.sha256() if SHA256.fullmatch(like) else git
    buffer = memoryview(bytearray(READ_BYTES))
    offset = 0
    while count := os.preadv(fd, [buffer], offset):
        state.update(buffer[:count])
        offset += count
    return state.hexdigest()


class _Checked(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    stamp: Stamp
    name: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    checked: dict[str, _Checked]
    version: Literal[1] = 1


_decoder = msgspec.json.Decoder(_File)


class _Record:
    """The checked files of a model. A record that cannot be read or written only costs hashing again."""

    def __init__(self, place: Path, checked: Mapping[str, _Checked]) -> None:
        self._place = place
        self._checked = checked

    @classmethod
    def of(cls, cache_dir: Path, folder: Path) -> _Record:
        place = cache_dir / "names" / f"{hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()}.json"
        try:
            return cls(place, _decoder.decode(read_own(place, bytes_max=digest_cache.RECORD_BYTES_MAX)).checked)
        except FileNotFoundError:
            return cls(place, {})
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s is ignored: %s", place, error)
            return cls(place, {})

    def knows(self, file: CheckpointFile, name: str) -> bool:
        return self._checked.get(str(file.real)) == _Checked(file.stamp, name)

    def save(self, right: Sequence[tuple[CheckpointFile, str]], *, began_ns: int) -> None:
        young_ns = began_ns - digest_cache.RACY_NS
        new = {str(file.real): _Checked(file.stamp, name) for file, name in right if file.stamp.ctime_ns < young_ns}
        if not new:
            return
        kept = {path: checked for path, checked in self._checked.items() if os.path.exists(path)}
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._place) as draft:
                draft.touch(0o600)
                draft.write_bytes(msgspec.json.encode(_File(kept | new)))
        except OSError as error:
            log.warning("%s: blobs will be checked again: %s", self._place, error.strerror)
