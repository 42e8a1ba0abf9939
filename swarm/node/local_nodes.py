"""Notes that the running nodes of this user leave, so that `swarm status` finds them without the network.

    <cache>/running/<space>.<pid>-<port>    contains the address

`space` stands for the boot of the machine and the PID namespace: containers and machines that share a home directory
share the notes, and a process id means nothing in another space. A reader removes the notes of dead processes of its
own space. The address of any other note counts if it takes connections; the note stays.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from swarm.errors import SettingsError
from swarm.settings import split_address
from swarm.store.own_files import read_regular, replacing

ELSEWHERE_MAX = 32  # notes of other spaces that are tried, the youngest; a killed container leaves its notes
CONNECT_TIMEOUT_S = 0.5
NOTE_BYTES_MAX = 4096


@contextlib.contextmanager
def note(cache: Path, address: str) -> Iterator[None]:
    """Leaves a note while the block runs. A cache that cannot be written to means no note, not a failure."""
    path = _folder(cache) / f"{process()}-{address.rpartition(':')[2]}"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:  # follows no link that lies in its place
            draft.write_text(address, encoding="utf-8")
    try:
        yield
    finally:
        _remove(path)


def addresses(cache: Path) -> list[str]:
    """Addresses of running nodes: of other spaces first, of this space last, each the youngest last."""
    here: list[tuple[int, str]] = []
    elsewhere: list[tuple[int, str]] = []
    for path in _folder(cache).glob("*-*"):
        name = path.name.partition("-")[0]
        if dead(name):
            _remove(path)
            continue
        # A node may write or remove its note at this very moment.
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if address := read_regular(path, bytes_max=NOTE_BYTES_MAX).decode().strip():
                known = here if name.startswith(f"{_space()}.") else elsewhere
                known.append((path.stat().st_mtime_ns, address))
    own = [address for _, address in sorted(here)]
    others = [address for _, address in sorted(elsewhere)[-ELSEWHERE_MAX:] if address not in own]
    if others:
        with ThreadPoolExecutor(len(others)) as pool:
            others = [address for address, up in zip(others, pool.map(_connects, others), strict=True) if up]
    return [*others, *own]


def process() -> str:
    """A name of this process, among all processes that share the cache directory."""
    return f"{_space()}.{os.getpid()}"


def dead(name: str) -> bool:
    """Whether the process that gave this name with `process` is known to have ended; False for another space."""
    space, _, pid = name.partition(".")
    return space == _space() and pid.isdigit() and not alive(int(pid))


def alive(pid: int) -> bool:
    """Whether there is such a process in this PID namespace, of any user."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _space() -> str:
    return _space_of(os.getpid())


@functools.lru_cache(maxsize=1)
def _space_of(_: int) -> str:
    """Of this process, which a fork may have put into another namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot, namespace = socket.gethostname(), ""
    return hashlib.sha256(f"{boot}\n{namespace}".encode()).hexdigest()[:12]


def _connects(address: str) -> bool:
    try:
        with socket.create_connection(split_address("note", address), timeout=CONNECT_TIMEOUT_S):
            return True
    except (OSError, SettingsError):
        return False


def _folder(cache: Path) -> Path:
    return cache / "running"


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
