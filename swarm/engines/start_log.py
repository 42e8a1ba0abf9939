"""The record of engine starts: a small file for each, which `swarm doctor` reads.

An engine tries tiers in order, and each attempt is recorded: taken, or skipped for a reason. The record
outlives the process and needs no access to its log. The newest KEPT files stay.

Must not know: engines, nodes. A failing write is logged; it never fails a start.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
from pathlib import Path
from typing import Annotated

import msgspec

from swarm.store.own_files import read_regular, replacing

FOLDER = "starts"
KEPT = 64
FILE_BYTES_MAX = 1 << 20
REASON_MAX = 4096

Text = Annotated[str, msgspec.Meta(max_length=REASON_MAX)]

log = logging.getLogger("swarm")
_numbers = itertools.count()  # two files may have equal mtimes


class TierAttempt(msgspec.Struct, frozen=True):
    """The attempt of a tier ('loaded', 'checkpoint', 'disk'): why it was taken or skipped, or how it `failed`."""

    tier: Text
    taken: bool
    why: Text
    seconds: float = 0.0
    failed: bool = False


class EngineStart(msgspec.Struct, frozen=True):
    """One start of a rank of an engine, such as 'vllm 0.33.0'.

    `fingerprint`: fields of the layout that the rank wanted; empty if the start ended before they were known. `peers`:
    nodes that served the model, in any layout or content; None if the rank did not look for peers.
    """

    engine: Text
    model_id: Text
    rank: Text
    fingerprint: dict[str, str]
    attempts: tuple[TierAttempt, ...]
    peers: int | None = None

    @property
    def taken(self) -> TierAttempt | None:
        """The attempt that brought the weights."""
        return next((attempt for attempt in self.attempts if attempt.taken), None)


_decoder = msgspec.json.Decoder(EngineStart)


def record(cache: Path, start: EngineStart) -> None:
    """Writes a start below the cache directory; never raises."""
    folder = cache / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{os.getpid()}-{next(_numbers):06}-{secrets.token_hex(4)}.json") as draft:
            draft.write_bytes(msgspec.json.encode(start))
        for _, stale in _newest_first(folder)[KEPT:]:
            stale.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: the record of this start is not kept: %s", folder, error.strerror or error)


def recall(cache: Path) -> list[tuple[float, EngineStart]]:
    """The recorded starts, newest first, each with its time in seconds since 1970."""
    found = []
    for mtime_ns, path in _newest_first(cache / FOLDER):
        try:
            found.append((mtime_ns / 1e9, _decoder.decode(read_regular(path, bytes_max=FILE_BYTES_MAX))))
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s is ignored: %s", path, error)
    return found


def _newest_first(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError):  # removed since the listing
            found.append((path.stat().st_mtime_ns, path))
    return sorted(found, reverse=True)
