"""What engine starts decided: one small file for each, which `swarm doctor` reads.

An engine that starts tries tiers in order, and each try ends in one step: taken, or left and why. The record says so
after the process has gone, whose log may be anywhere. The newest KEPT stay.

Must not know: engines, nodes. Failing to write is logged and nothing else: no start fails because of its record.
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

FOLDER = "starts"
KEPT = 64
FILE_BYTES_MAX = 1 << 20

Words = Annotated[str, msgspec.Meta(max_length=4096)]

log = logging.getLogger("swarm")
_numbers = itertools.count()  # two files may be of one tick of the file system's clock


class Step(msgspec.Struct, frozen=True):
    """One tier that was tried: 'loaded', 'checkpoint', 'disk'. `why` it was taken, or left, after `seconds`."""

    tier: Words
    taken: bool
    why: Words
    seconds: float = 0.0


class Start(msgspec.Struct, frozen=True):
    """One start of one rank of an engine, such as 'vllm 0.33.0'.

    `fingerprint` is that of the layout which it wanted, field by field; empty when it never got so far.
    """

    engine: Words
    model_id: Words
    rank: Words
    fingerprint: dict[str, str]
    steps: tuple[Step, ...]

    @property
    def taken(self) -> Step | None:
        """The step that brought the weights."""
        return next((step for step in self.steps if step.taken), None)


_decoder = msgspec.json.Decoder(Start)


def record(cache: Path, start: Start) -> None:
    """Keeps a start under the cache directory; never raises."""
    folder = cache / FOLDER
    temporary = folder / f".new-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.encode(start))
        os.replace(temporary, folder / f"{os.getpid()}-{next(_numbers):06}-{secrets.token_hex(4)}.json")
        for _, stale in _newest_first(folder)[KEPT:]:
            stale.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: what this start decided is not kept: %s", folder, error.strerror or error)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def recall(cache: Path) -> list[tuple[float, Start]]:
    """Starts that were kept, the newest first, each with the time of its end in seconds since 1970."""
    found = []
    for mtime_ns, path in _newest_first(cache / FOLDER):
        try:
            with path.open("rb") as file:
                found.append((mtime_ns / 1e9, _decoder.decode(file.read(FILE_BYTES_MAX))))
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            log.warning("%s is ignored: %s", path, error)
    return found


def _newest_first(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError):  # removed meanwhile
            found.append((path.stat().st_mtime_ns, path))
    return sorted(found, reverse=True)
