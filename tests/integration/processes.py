"""The `swarm` command as real processes on a machine of their own: own home, own caches, own working directory.

Output goes to files, so that nothing blocks and whatever a process said is there when a test fails. Every wait has a
deadline; when a test ends, so has everything that it started.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from swarm.cli.demo import write_made_up

T = TypeVar("T")

DEADLINE_S = 30.0
LOOK_EVERY_S = 0.01
MODEL = "org/model"
QUICK = {"SWARM_FIND_TIMEOUT_S": "2", "SWARM_IDLE_TIMEOUT_S": "1", "SWARM_STALL_TIMEOUT_S": "3"}


def free_ports() -> Iterator[int]:
    """Ports for nodes that must know each other's before they start.

    They lie below those that the kernel gives out by itself, and are others in each process of a test run.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20000 + worker % 8 * 1500
    for port in itertools.cycle(range(first, first + 1500)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


PORTS = free_ports()


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """What `--json` printed."""
        assert self.code == 0, self.err
        return dict(json.loads(self.out))

    def error(self, code: int) -> str:
        """The one line that says what went wrong, in a process that exited with this code."""
        lines = [line for line in self.err.splitlines() if line.startswith("swarm: ")]
        assert self.code == code, f"exit code {self.code}\n{self.out}{self.err}"
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0]
        assert "Traceback" not in self.err
        return lines[0]


class Process:
    """One command that runs."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, logs: Path, cwd: Path) -> None:
        self._command = command
        self._out, self._err = logs.with_suffix(".out"), logs.with_suffix(".err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._popen = subprocess.Popen(
                command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def handles(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self._popen.pid}/fd"))

    @property
    def memory_bytes(self) -> int:
        """What it has in memory and no file backs."""
        status = Path(f"/proc/{self._popen.pid}/status").read_text()
        (kilobytes,) = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
        return int(kilobytes) << 10

    @property
    def address(self) -> str:
        """Of a seed that is ready."""
        return self.out.split()[0]

    @property
    def digest(self) -> str:
        """Of what a seed that is ready serves."""
        return self.out.partition(" digest ")[2].rstrip()

    def wait_for(self, words: str) -> None:
        """Returns once the process has said this; fails when it ends first."""

        def said() -> bool:
            if words in self.out + self.err:
                return True
            assert self.running, f"{self!r} ended without {words!r}:\n{self.out}{self.err}"
            return False

        wait_until(said, f"{words!r} from {self!r}")

    def end(self) -> Ended:
        """How it ends, of its own accord and in time."""
        try:
            code = self._popen.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self!r} still runs after {DEADLINE_S:g} s:\n{self.out}{self.err}")
        return Ended(code, self.out, self.err)

    def wait_to_end(self, timeout_s: float) -> bool:
        """Whether it ends within this time."""
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """As `kill -9` does."""
        self._popen.kill()
        self._popen.wait(DEADLINE_S)

    def __repr__(self) -> str:
        return f"<{' '.join(self._command[3:])}>"


class Machine:
    """Where commands run. `environment` is what each of them gets, on top of a test's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cwd = root / "cwd"
        self.cwd.mkdir()
        self._logs = root / "logs"
        self._logs.mkdir()
        self._started: list[Process] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SWARM_", "HF_"))}
        self.cache = root / "cache"
        self.environment = {
            **kept,
            "HOME": str(root / "home"),
            "XDG_CACHE_HOME": str(root / "home" / ".cache"),
            "HF_HOME": str(root / "home" / "huggingface"),
            "HF_ENDPOINT": "http://127.0.0.1:9",  # no test asks the real hub
            "SWARM_CACHE": str(self.cache),
            "PYTHONWARNINGS": "error",
        }

    def start(
        self, *arguments: str | Path, environment: Mapping[str, str] | None = None, wrapper: Sequence[str] = ()
    ) -> Process:
        """Starts `swarm ARGUMENTS`; a `wrapper` is a command that runs another one."""
        command = [*wrapper, sys.executable, "-m", "swarm", *map(str, arguments)]
        logs = self._logs / f"{len(self._started)}-{arguments[0]}"
        process = Process(command, {**self.environment, **(environment or {})}, logs=logs, cwd=self.cwd)
        self._started.append(process)
        return process

    def run(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> Ended:
        """Runs `swarm ARGUMENTS` to its end."""
        return self.start(*arguments, environment=environment).end()

    def serve(
        self, path: str | Path, *flags: str, model_id: str = MODEL, environment: Mapping[str, str] | None = None
    ) -> Process:
        """A seed that is ready."""
        process = self.start("serve", path, "--model-id", model_id, "--no-mdns", *flags, environment=environment)
        process.wait_for(" ready: ")
        return process

    def fetch(
        self,
        out: Path,
        *flags: str,
        peers: Sequence[str],
        model_id: str = MODEL,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """A newcomer, just started, that exits when it is done."""
        named = [word for peer in peers for word in ("--peer", peer)]
        common = ("--json", "--no-seed", "--no-mdns")
        return self.start(
            "fetch", model_id, "--out", out, *common, *named, *flags, environment={**QUICK, **(environment or {})}
        )

    def close(self) -> None:
        for process in self._started:
            process.kill()


def wait_until(true: Callable[[], T], what: str, *, deadline_s: float = DEADLINE_S) -> T:
    """What `true` returns once that is true; fails when it does not come true in time."""
    deadline = time.monotonic() + deadline_s
    while not (found := true()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {deadline_s:g} s for {what}")
        time.sleep(LOOK_EVERY_S)
    return found


def write_model(path: Path, *, size: int, seed: int = 1) -> Path:
    """A model directory of two safetensors files, together about `size` bytes, and a configuration."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    count = size // 4
    write_made_up(path / "a.safetensors", [("a.weight", (count,)), ("a.bias", (7,))], rng=rng)
    write_made_up(path / "b.safetensors", [("b.weight", (count,))], rng=rng)
    (path / "sub").mkdir()
    (path / "sub" / "config.json").write_text(json.dumps({"seed": seed}))
    return path


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a directory; unfinished fetches are no files."""
    if not path.exists():
        return {}
    names = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in names.items() if "/.swarm/" not in f"/{name}"}
