"""Notes that running nodes of this user leave, so that `swarm status` finds them without asking the network.

One file per node under the cache directory, named by process id and port. Whoever reads a note of a dead process
removes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def note(cache: Path, address: str) -> Iterator[None]:
    """Leaves a note while the block runs. A cache that cannot be written to means no note, not a failure."""
    path = _folder(cache) / f"{os.getpid()}-{address.rpartition(':')[2]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(address, encoding="utf-8")
    except OSError:
        pass
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def addresses(cache: Path) -> list[str]:
    """Addresses of running nodes, the youngest last."""
    found = []
    for path in sorted(_folder(cache).glob("*-*"), key=lambda path: path.stat().st_mtime):
        pid = path.name.partition("-")[0]
        if pid.isdigit() and _alive(int(pid)):
            found.append(path.read_text(encoding="utf-8").strip())
        else:
            path.unlink(missing_ok=True)
    return found


def _folder(cache: Path) -> Path:
    return cache / "running"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
