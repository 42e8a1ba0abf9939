"""Child processes to measure. Every wait has a deadline; CPU time and memory come from the kernel; all are ended.

The process that imports this must stay small: a child's `ru_maxrss` begins with its parent's at the fork. So work that
needs much memory (tensors) runs in a process of its own, see workers.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("swarm-weights", "torch", "aiohttp", "numpy", "xxhash", "msgspec", "zeroconf")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STOP_TIMEOUT_S = 10.0

_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ran:
    """A command that ended well. `cpu_s` is user and system time; `peak_rss_bytes` the most memory it ever had."""

    seconds: float
    cpu_s: float
    peak_rss_bytes: int
    out: str


class Child:
    """A process that answers on standard output, line by line."""

    def __init__(self, argv: Sequence[str], *, cwd: Path, environment: dict[str, str] | None = None) -> None:
        self.argv = list(argv)
        self._complaints = cwd / "complaints.log"
        with self._complaints.open("ab") as stderr:
            self._popen = subprocess.Popen(
                self.argv,
                cwd=cwd,
                env=environment or clean_environment(cwd),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                preexec_fn=_die_with_parent,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def line(self, timeout_s: float) -> str:
        """Its next line. Raises RuntimeError when it ends first or the time is over."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise RuntimeError(f"{self.argv}: silent for {timeout_s:g} s") from None
        if line is None:
            raise RuntimeError(f"{self.argv}: ended with {self._popen.wait()}: {self._complaints.read_text()[-500:]}")
        return line

    def told(self, *, timeout_s: float) -> dict[str, Any]:
        """Its next line, decoded from JSON."""
        answer = json.loads(self.line(timeout_s))
        if not isinstance(answer, dict):
            raise TypeError(f"{self.argv}: answered {answer!r}")
        return answer

    def ask(self, question: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Sends a JSON line, returns the answer."""
        if self._popen.stdin is None:
            raise RuntimeError("no pipe")
        print(json.dumps(question), file=self._popen.stdin, flush=True)
        return self.told(timeout_s=timeout_s)

    def kill(self) -> None:
        """Ends it as `kill -9` does."""
        self._popen.kill()
        self.close()

    def cpu_s(self) -> float:
        """User and system seconds of all its threads so far."""
        fields = Path(f"/proc/{self._popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def close(self) -> None:
        """Ends it, by force if it does not listen."""
        self._popen.send_signal(signal.SIGTERM)
        try:
            self._popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._reader.join()
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):  # a question that it did not live to read
                    pipe.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        if self._popen.stdout:
            for line in self._popen.stdout:
                self._lines.put(line)
        self._lines.put(None)


def run(argv: Sequence[str], *, cwd: Path, timeout_s: float, environment: dict[str, str] | None = None) -> Ran:
    """Runs a command to its end. Raises RuntimeError when it fails or is not done in time."""
    began = time.perf_counter()
    with subprocess.Popen(
        argv,
        cwd=cwd,
        env=environment or clean_environment(cwd),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_die_with_parent,
    ) as popen:
        alarm = threading.Timer(timeout_s, popen.kill)
        alarm.start()
        try:
            complaints: list[bytes] = []
            reader = threading.Thread(target=lambda: complaints.append(popen.stderr.read() if popen.stderr else b""))
            reader.start()
            out = popen.stdout.read().decode() if popen.stdout else ""
            reader.join()
            _, status, usage = os.wait4(popen.pid, 0)
            seconds = time.perf_counter() - began
            popen.returncode = os.waitstatus_to_exitcode(status)
        finally:
            alarm.cancel()
            if popen.returncode is None:
                popen.kill()
    if popen.returncode:
        raise RuntimeError(f"{list(argv)} ended with {popen.returncode}: {b''.join(complaints).decode()[-500:]}")
    return Ran(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10, out)


def swarm(*arguments: str) -> list[str]:
    """The `swarm` command line with these arguments."""
    return [sys.executable, "-m", "swarm", *arguments]


def clean_environment(cwd: Path, **settings: str) -> dict[str, str]:
    """This environment without the user's settings for `swarm`, and with a cache of its own below `cwd`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    ours = {
        "SWARM_CACHE": str(cwd / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    return kept | ours | {f"SWARM_{name.upper()}": value for name, value in settings.items()}


def isolate(congestion: str) -> str:
    """Moves this process and its children to come into a network of their own, loopback only, with this congestion
    control for every connection. Returns the congestion control in force, in words: without root nothing changes.
    """
    default = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        return f"{default} (the machine's own: {os.strerror(ctypes.get_errno())} for a network namespace)"
    # A route's congestion control needs no permission beyond the namespace; the sysctl of a namespace would.
    for command in (
        "ip link set lo up",
        f"ip route replace local 127.0.0.0/8 dev lo scope host src 127.0.0.1 table local congctl {congestion}",
        "ip route del local 127.0.0.1 dev lo table local",
        "ip route add 224.0.0.0/4 dev lo",
    ):
        subprocess.run(command.split(), check=True, timeout=STOP_TIMEOUT_S)
    return f"{congestion} for everything (a network namespace of its own; the machine's default is {default})"


def host() -> dict[str, Any]:
    """The machine that the numbers were measured on."""
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    memory = Path("/proc/meminfo").read_text().split()[1]
    return {
        "cpu": f"{cpu[0] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "memory_bytes": int(memory) << 10,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": dict(_versions()),
    }


def sync(place: Path) -> None:
    """Waits until nothing is left to be written to the file system that holds `place`."""
    subprocess.run(["sync", "-f", str(place)], check=True, timeout=600)


def available_bytes() -> int:
    """Memory that can be used without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield package, metadata.version(package)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
