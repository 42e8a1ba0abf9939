"""Commits that were proven on this machine: an artifact with this digest has the files of that commit.

    <cache>/proven/<sha256 of origin, commit and digest>.json

The digest pins the bytes by BLAKE3, so the next fetch of both needs neither the origin's listing nor its hashes.
Records that another user can have written are ignored. Must not know: how a commit is proven.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec

from swarm.content.manifest import Digest
from swarm.store.own_files import read_own, replacing

RECORD_BYTES_MAX = 4096

log = logging.getLogger("swarm")


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was proven. `origin`: the address of the model there."""

    origin: str
    commit: str
    digest: Digest


_decoder = msgspec.json.Decoder(_Record)


def remember(cache: Path, origin: str, commit: str, digest: Digest) -> None:
    """Records that the artifact is the commit's. A failure is logged only."""
    record = _Record(origin, commit, digest)
    try:
        place = _place(cache, record)
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as draft:
            draft.touch(0o600)
            draft.write_bytes(msgspec.json.encode(record))
    except OSError as error:
        log.warning("%s: commit %s is proven again by the next fetch: %s", cache, commit[:12], error.strerror)


def known(cache: Path, origin: str, commit: str, digest: Digest) -> bool:
    """Whether that is recorded."""
    record = _Record(origin, commit, digest)
    try:
        return _decoder.decode(read_own(_place(cache, record), bytes_max=RECORD_BYTES_MAX)) == record
    except (OSError, ValueError, RecursionError):
        return False


def _place(cache: Path, record: _Record) -> Path:
    name = hashlib.sha256(msgspec.json.encode(record)).hexdigest()
    return cache / "proven" / f"{name}.json"
