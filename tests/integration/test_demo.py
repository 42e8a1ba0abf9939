"""`swarm demo` as a user runs it: real processes on loopback."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from swarm.demo import differences, write_made_up
from swarm.walk import walk

pytestmark = pytest.mark.integration

DEADLINE_S = 90


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Big enough that the capped seed needs a moment for it."""
    path = tmp_path / "tiny"
    path.mkdir()
    rng = np.random.default_rng(1)
    write_made_up(path / "a.safetensors", [("a.weight", (1024, 4096)), ("a.bias", (4096,))], rng=rng)
    write_made_up(path / "b.safetensors", [("b.weight", (2048, 4096))], rng=rng)
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where the demo puts its temporary files."""
    path = tmp_path / "scratch"
    path.mkdir()
    return path


@contextmanager
def running_demo(path: Path, scratch: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "swarm.cli", "demo", str(path)],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def nodes(scratch: Path, count: int) -> list[int]:
    """Process ids of the demo's nodes, once there are so many."""
    deadline = time.monotonic() + DEADLINE_S
    while len(notes := list(scratch.glob("swarm-demo-*/cache/running/*-*"))) < count:
        if time.monotonic() > deadline:
            pytest.fail(f"only {len(notes)} nodes after {DEADLINE_S} s")
        time.sleep(0.01)
    return [int(note.name.partition("-")[0]) for note in notes]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_do_three_newcomers_get_equal_copies_and_is_nothing_left_behind(model: Path, scratch: Path) -> None:
    with running_demo(model, scratch) as process:
        out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, out + err
    for name in ("newcomer-1", "newcomer-2", "newcomer-3"):
        assert f"{name} is complete" in out
    assert out.count("equal") == 3
    assert "capped at 100MB/s" in out
    assert "made up" not in out
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_does_an_interrupted_demo_end_its_processes_and_clean_up(
    model: Path, scratch: Path, number: signal.Signals
) -> None:
    with running_demo(model, scratch) as process:
        pids = nodes(scratch, 1)
        process.send_signal(number)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert [pid for pid in pids if alive(pid)] == []
    assert list(scratch.iterdir()) == []


def test_does_a_directory_without_files_end_with_one_line(tmp_path: Path, scratch: Path) -> None:
    (tmp_path / "empty").mkdir()
    with running_demo(tmp_path / "empty", scratch) as process:
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 3
    assert len(err.splitlines()) == 1
    assert list(scratch.iterdir()) == []


def test_is_every_kind_of_difference_found(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    found, _ = walk(model)
    assert differences(found, copy) == []
    with (copy / "a.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    (copy / "b.safetensors").unlink()
    (copy / "left-over").touch()
    assert differences(found, copy) == [
        "a.safetensors is different",
        "b.safetensors is missing",
        "left-over is not in the source",
    ]
