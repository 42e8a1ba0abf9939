"""Notes that the running nodes of this user leave, so that `swarm status` finds them without the network.

A note is a file under the cache directory, named by process id and port. A reader removes the notes of dead processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def note(cache: Path, address: str) -> Iterator[None]:
    """Leaves a note while the block runs, unless the cache is not writable."""
    path = _folder(cache) / f"{os.getpid()}-{address.rpartition(':')[2]}"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(address, encoding="utf-8")
    try:
        yield
    finally:
        _remove(path)


def addresses(cache: Path) -> list[str]:
    """Addresses of running nodes, the latest last."""
    found = []
    for path in _folder(cache).glob("*-*"):
        pid = path.name.partition("-")[0]
        if not pid.isdigit() or not alive(int(pid)):
            _remove(path)
            continue
        # A node may write or remove its note at this very moment.
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if address := path.read_text(encoding="utf-8").strip():
                found.append((path.stat().st_mtime_ns, address))
    return [address for _, address in sorted(found)]


def _folder(cache: Path) -> Path:
    return cache / "running"


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def alive(pid: int) -> bool:
    """Whether there is a process with this id, of any user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
