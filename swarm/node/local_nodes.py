"""Notes that running nodes of this user leave, so that `swarm status` finds them without asking the network.

One file per node under the cache directory, named by process id and port. Whoever reads a note of a dead process
removes it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def note(cache: Path, address: str) -> Iterator[None]:
    """Leaves a note while the block runs. A cache that cannot be written to means no note, not a failure."""
    path = _folder(cache) / f"{os.getpid()}-{address.rpartition(':')[2]}"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(address, encoding="utf-8")
    try:
        yield
    finally:
        _remove(path)


def addresses(cache: Path) -> list[str]:
    """Addresses of running nodes, the youngest last."""
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
    """Whether there is such a process, be it somebody else's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
