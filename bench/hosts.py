"""Many hosts on one machine: a network namespace each, its own address, and a link shaped in both directions.

    host a            switch namespace               host b
    eth0 ---veth--- p0  [ bridge rack0 ]  p1 ---veth--- eth0
     ^ up           ^ down                 ^ down         ^ up        each a tc tbf of the same rate

With several racks there is a bridge for each. Links between these bridges are shaped to a fraction of the rate that a
rack's hosts have together. The switch is a namespace too: the machine's own network stays untouched, and deleting the
namespaces deletes all of it. Routes ask for cubic, because the sysctl of a namespace may be read-only, and a machine's
default may be bbr, which suits a shaper of this kind less.

Needs root. Must not know: the programs that run on the hosts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUBNET = "10.77.0.0/16"
CONGESTION = "cubic"
QUEUE_MS = 50  # the most that a shaper delays; packets that would wait longer are dropped
BURST_S = 0.004  # bytes that a shaper may send at once: a tick of the slowest kernel clock in use
BURST_BYTES_MIN = 64 << 10  # a packet before segmentation
COMMAND_TIMEOUT_S = 20.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kmg])bit")
_SCALE = {"k": 10**3, "m": 10**6, "g": 10**9}


def rate_bits_per_s(text: str) -> int:
    """`100mbit` as a number. Raises ValueError."""
    match = _RATE.fullmatch(text)
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r} is not a rate such as 100mbit or 1.5gbit")
    return int(float(match[1]) * _SCALE[match[2]])


def lacking() -> str | None:
    """Why there can be no hosts here, or None."""
    if os.geteuid():
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    return f"{', '.join(missing)} not installed (iproute2)" if missing else None


@dataclass(frozen=True)
class Host:
    """A host. `namespace` is its name; `port` the switch's end of its link; `rack` its label, "" if there is one."""

    namespace: str
    address: str
    port: str
    rack: str

    def inside(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on this host."""
        return ["ip", "netns", "exec", self.namespace, *argv]


class Network:
    """`with Network(...) as network:` has hosts with the given link rate; all of it is gone afterwards, processes too.

    `size` hosts are expected in all, spread over the racks in turn; each rack reaches the others at
    `1 / oversubscribed` of the rate that its hosts have together.
    """

    def __init__(self, *, bits_per_s: int, size: int, racks: int = 1, oversubscribed: float = 4.0) -> None:
        self.bits_per_s = bits_per_s
        self.rack_bits_per_s = int(bits_per_s * -(-size // racks) / oversubscribed) if racks > 1 else None
        self._racks = racks
        self._prefix = f"swarm-bench-{os.getpid()}-"
        self._switch = f"{self._prefix}switch"
        self._namespaces: list[str] = []
        self._hosts: list[Host] = []

    def __enter__(self) -> Network:
        try:
            self._add_namespace(self._switch)
            for rack in range(self._racks):
                self._ip(self._switch, f"link add rack{rack} type bridge", f"link set rack{rack} up")
            if self.rack_bits_per_s:
                self._join_racks(self.rack_bits_per_s)
        except BaseException:
            self._delete()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._delete()

    def host(self) -> Host:
        """Connects another host."""
        number = len(self._hosts)
        name, port, rack = f"{self._prefix}h{number}", f"p{number}", number % self._racks
        label = f"rack{rack}" if self._racks > 1 else ""
        host = Host(name, f"10.77.{number // 250}.{number % 250 + 1}", port, label)
        self._add_namespace(name)
        self._ip(
            self._switch,
            f"link add {port} type veth peer name eth0 netns {name}",
            f"link set {port} master rack{rack} up",
        )
        self._ip(
            name,
            "link set lo up",
            "link set eth0 up",
            f"addr add {host.address}/16 dev eth0 noprefixroute",
            f"route add {SUBNET} dev eth0 src {host.address} congctl {CONGESTION}",
        )
        self._shape(name, "eth0", self.bits_per_s)
        self._shape(self._switch, port, self.bits_per_s)
        self._hosts.append(host)
        return host

    def sent_bytes(self, host: Host) -> int:
        """Bytes sent so far, with headers (a header for each packet before segmentation)."""
        return self._received_bytes(host.port)

    def crossed_bytes(self) -> int:
        """Bytes that left a rack for another so far."""
        return sum(self._received_bytes(f"core{rack}") for rack in range(self._racks)) if self._racks > 1 else 0

    def cpu_s(self) -> float:
        """User and system seconds of every process on the hosts so far, of their ended children too.

        Interrupts that carry their packets belong to no process, and are left out.
        """
        return sum(_cpu_s(pid) for host in self._hosts for pid in _pids(host.namespace))

    def cut(self, host: Host) -> None:
        """Loss of power: the link goes down first, so that no goodbye gets out."""
        self._ip(self._switch, f"link set {host.port} down")
        _kill(host.namespace)

    def _join_racks(self, bits_per_s: int) -> None:
        self._ip(self._switch, "link add core type bridge", "link set core up")
        for rack in range(self._racks):
            self._ip(
                self._switch,
                f"link add up{rack} type veth peer name core{rack}",
                f"link set up{rack} master rack{rack} up",
                f"link set core{rack} master core up",
            )
            self._shape(self._switch, f"up{rack}", bits_per_s)
            self._shape(self._switch, f"core{rack}", bits_per_s)

    def _add_namespace(self, name: str) -> None:
        _run(["ip", "netns", "add", name])
        self._namespaces.append(name)

    def _ip(self, namespace: str, *commands: str) -> None:
        _run(["ip", "-n", namespace, "-batch", "-"], given="\n".join(commands) + "\n")

    def _shape(self, namespace: str, device: str, bits_per_s: int) -> None:
        burst = max(BURST_BYTES_MIN, int(bits_per_s / 8 * BURST_S))
        shaper = f"tbf rate {bits_per_s}bit burst {burst}b latency {QUEUE_MS}ms"
        _run(["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *shaper.split()])

    def _received_bytes(self, device: str) -> int:
        shown = json.loads(_run(["ip", "-n", self._switch, "-j", "-s", "link", "show", "dev", device]))
        return int(shown[0]["stats64"]["rx"]["bytes"])

    def _delete(self) -> None:
        """Goes on after failures, then raises the first."""
        with contextlib.ExitStack() as failing:
            for name in self._namespaces:
                failing.callback(_run, ["ip", "netns", "del", name])
                failing.callback(_kill, name)
        self._namespaces.clear()


def _kill(namespace: str) -> None:
    """Ends every process there; only ours can be, since the namespace is."""
    for pid in _pids(namespace):
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.kill(pid, signal.SIGKILL)


def _pids(namespace: str) -> list[int]:
    return [int(pid) for pid in _run(["ip", "netns", "pids", namespace]).split()]


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # it ended by itself
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS_PER_S


def _run(argv: Sequence[str], *, given: str = "") -> str:
    """Its output. Raises RuntimeError when it fails or hangs."""
    try:
        ran = subprocess.run(argv, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(argv)}: {error.stderr.strip()} {given}") from error
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(argv)}: not done after {error.timeout:g} s") from error
    return ran.stdout
