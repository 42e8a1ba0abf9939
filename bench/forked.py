"""`swarm` commands as real processes that start within milliseconds, for programs that start thousands of them.

A server process that has imported everything forks them (`multiprocessing`'s forkserver). From then on each is the
command as a shell starts it: a process and output files of its own, and real signals.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

_context = get_context("forkserver")
_context.set_forkserver_preload(
    ["swarm.cli.main", "swarm.api", "swarm.runtime", "swarm.node.local_nodes", "aiohttp.web"]
)

STOP_TIMEOUT_S = 20.0  # a node says goodbye within seconds; a busy machine takes its time


class Command:
    """A running `swarm` command. `out` and `err`: its output so far."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], *, place: Path, name: str) -> None:
        self.name = name
        self._out, self._err = place / f"{name}.out", place / f"{name}.err"
        paths = (str(place), str(self._out), str(self._err))
        self._process = _context.Process(target=_main, args=(list(arguments), dict(environment), *paths), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    @property
    def out(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    @property
    def exit_code(self) -> int | None:
        """None while it runs, negative for a signal."""
        return self._process.exitcode

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if it still runs."""
        if self.exit_code is None:
            os.kill(self.pid, number)

    def stop(self) -> bool:
        """Asks it to end, and ends it; whether it listened in time."""
        self.send(signal.SIGTERM)
        self._process.join(STOP_TIMEOUT_S)
        listened = self.exit_code is not None
        self._process.kill()
        self._process.join()
        return listened

    def wait_for(self, words: str, *, timeout_s: float) -> str:
        """Its output, once that contains these words. Raises RuntimeError when it ends first or takes too long."""
        deadline = time.monotonic() + timeout_s
        while words not in (said := self.out):
            if self.exit_code is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: no {words!r}, exit code {self.exit_code}: {self.err[-500:]}")
            time.sleep(0.01)
        return said


def _main(arguments: list[str], environment: dict[str, str], place: str, out: str, err: str) -> None:
    """In the new process."""
    from swarm.cli import main

    for number, path in ((1, out), (2, err)):
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, number)
        os.close(target)
    for name in [name for name in os.environ if name.startswith("SWARM_")]:
        del os.environ[name]
    os.environ |= environment
    os.chdir(place)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main.main(arguments))
