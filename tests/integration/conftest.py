"""What the integration tests share: a machine to run commands on, and a small model."""

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from .processes import Machine, write_model


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    root = tmp_path / "machine"
    root.mkdir()
    made = Machine(root)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """2 MB, eight chunks."""
    return write_model(tmp_path / "model", size=2_000_000)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def without_udp() -> Iterator[Sequence[str]]:
    """What runs a command in a network of its own, where no datagram gets anywhere."""
    with network_of_its_own(
        "ip rule add pref 100 table local", "ip rule del pref 0", "ip rule add pref 10 ipproto udp blackhole"
    ) as wrapper:
        yield wrapper


@pytest.fixture
def without_mdns() -> Iterator[Sequence[str]]:
    """What runs a command in a network of its own, where a firewall lets no multicast DNS in."""
    with network_of_its_own("iptables -A INPUT -p udp --dport 5353 -j DROP") as wrapper:
        yield wrapper


@pytest.fixture
def two_hosts() -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """What runs a command on each of two hosts, network namespaces with a cable between them: 10.78.0.1 and .2."""
    with network_of_its_own() as one, network_of_its_own() as other:
        cable = ("ip", "link", "add", "eth0", "netns", one[-1], "type", "veth", "peer", "name", "eth0")
        subprocess.run([*cable, "netns", other[-1]], check=True, timeout=10)
        for number, host in enumerate((one, other), 1):
            for rule in (f"ip addr add 10.78.0.{number}/24 dev eth0", "ip link set eth0 up"):
                subprocess.run([*host, *rule.split()], check=True, timeout=10)
        yield one, other


@contextlib.contextmanager
def network_of_its_own(*rules: str) -> Iterator[Sequence[str]]:
    """What runs a command in a network namespace with a loopback device, after these commands have run there."""
    tools = {"ip", *(rule.split()[0] for rule in rules)}
    if os.geteuid() != 0 or not all(map(shutil.which, tools)):
        pytest.skip(f"needs root and {', '.join(sorted(tools))}")
    name = f"swarm-{secrets.token_hex(4)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False, timeout=10)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    wrapper = ("ip", "netns", "exec", name)
    try:
        for rule in ("ip link set lo up", *rules):
            subprocess.run([*wrapper, *rule.split()], check=True, timeout=10)
        yield wrapper
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=10)
