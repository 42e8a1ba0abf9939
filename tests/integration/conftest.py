"""What the integration tests share: a machine to run commands on, and a small model."""

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
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    name = f"swarm-{secrets.token_hex(4)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False, timeout=10)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        for rule in (
            "link set lo up",
            "rule add pref 100 table local",
            "rule del pref 0",
            "rule add pref 10 ipproto udp blackhole",
        ):
            subprocess.run(["ip", "-n", name, *rule.split()], check=True, timeout=10)
        yield ("ip", "netns", "exec", name)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=10)
