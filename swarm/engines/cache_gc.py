"""Eviction of the directories that engines fetch into the cache: least recently used first, never in use.

    hold(place)               keeps it until this process ends; marks it as used now
    prune(cache, keep_bytes)  removes unheld directories until the rest fits

A hold is a shared `flock` of `.use-NAME` beside the directory, which the kernel releases when its process dies; a
pruner takes the exclusive lock. That file's mtime is the time of the last use.

Must not know: the content of these directories.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from swarm.store.file_lock import open_locked

FOLDERS = ("checkpoints", "metadata", "models", "compiled")  # of the cache directory; each entry is evicted as a whole
USE = ".use-"
STALE_S = 3600.0  # age at which an unfinished directory counts as left by a dead process
BLOCK_BYTES = 512  # unit of st_blocks

log = logging.getLogger("swarm")
_held: dict[Path, int] = {}  # open locks of this process
_lock = threading.Lock()


def hold(place: Path, *, through_exec: bool = False) -> None:
    """Keeps a directory, which need not exist yet, until this process ends or calls `release`.

    `through_exec`: also for the program that this process becomes. Where no lock can be made, nothing can be removed
    either, so that failure is only logged.
    """
    place = place.absolute()
    with _lock:
        try:
            if place not in _held:
                place.parent.mkdir(parents=True, exist_ok=True)
                _held[place] = open_locked(_lock_of(place), shared=True)
            os.utime(_held[place])
            os.set_inheritable(_held[place], through_exec or os.get_inheritable(_held[place]))
        except OSError as error:
            log.debug("%s is not held: %s", place, error)


def release(place: Path) -> None:
    """Ends this process's hold, if any."""
    with _lock:
        if (fd := _held.pop(place.absolute(), None)) is not None:
            os.close(fd)


def is_kept(place: Path, cache: Path) -> bool:
    """Whether `prune` may remove a directory."""
    return place.absolute().parent in {cache.absolute() / folder for folder in FOLDERS}


def prune(cache: Path, keep_bytes: float, *, need_bytes: int = 0) -> list[Path]:
    """Removes unheld directories until the rest and `need_bytes` more take at most `keep_bytes` and fit on the disk.

    Returns the removed directories. Never raises: a directory that cannot be removed stays.
    """
    removed: list[Path] = []
    with contextlib.suppress(OSError):
        entries = sorted((_last_use(place), place, size_bytes(place)) for place in _entries(cache))
        total_bytes = sum(size for *_, size in entries)
        for used, place, size in entries:
            free_bytes = shutil.disk_usage(cache).free
            if total_bytes + need_bytes <= keep_bytes and need_bytes <= free_bytes:
                break
            if _remove(place):
                total_bytes -= size
                removed.append(place)
                days = (time.time() - used) / 86400
                log.info("%s is removed: %.2f GB, not used for %.1f days", place, size / 1e9, days)
    return removed


def size_bytes(place: Path) -> int:
    """Bytes of disk that a directory takes; holes in files take none."""
    found = 0
    for parent, _, files in os.walk(place):
        for file in files:
            with contextlib.suppress(OSError):  # removed since the listing
                found += os.lstat(os.path.join(parent, file)).st_blocks * BLOCK_BYTES
    return found


def _entries(cache: Path) -> Iterator[Path]:
    """The evictable directories. Removes unfinished directories of dead processes, and stray locks."""
    for folder in FOLDERS:
        for path in (cache / folder).glob("*"):
            with contextlib.suppress(OSError):
                status = path.lstat()
                if path.name.startswith(USE):
                    if not (locked := path.with_name(path.name.removeprefix(USE))).is_dir():
                        _remove(locked)
                elif not stat.S_ISDIR(status.st_mode):
                    continue
                elif not path.name.startswith("."):
                    yield path
                elif abs(time.time() - status.st_mtime) > STALE_S:  # of the future: made before the clock was set back
                    shutil.rmtree(path, ignore_errors=True)


def _last_use(place: Path) -> float:
    for path in (_lock_of(place), place):
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_mtime
    return 0.0


def _remove(place: Path) -> bool:
    """Whether the directory is gone; False while a process holds it."""
    try:
        fd = open_locked(_lock_of(place), timeout_s=0)
    except OSError:
        return False
    try:
        aside = place.with_name(f".gone-{secrets.token_hex(8)}")  # a rename is atomic, an rmtree is not
        with contextlib.suppress(FileNotFoundError):
            os.rename(place, aside)
        shutil.rmtree(aside, ignore_errors=True)
        _lock_of(place).unlink(missing_ok=True)
        place.with_name(f".lock-{place.name}").unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", place, error.strerror or error)
        return False
    finally:
        os.close(fd)
    return True


def _lock_of(place: Path) -> Path:
    return place.with_name(f"{USE}{place.name}")
