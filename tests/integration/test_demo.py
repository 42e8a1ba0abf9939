"""`swarm demo` as a user runs it: real processes on loopback."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from swarm.checkpoint.files import walk
from swarm.cli.demo import differences, write_made_up

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


@contextlib.contextmanager
def running_demo(path: Path, scratch: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "swarm", "demo", str(path)],
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_nodes(scratch: Path, count: int) -> None:
    """Returns once so many of the demo's nodes run."""
    deadline = time.monotonic() + DEADLINE_S
    while len(notes := list(scratch.glob("swarm-demo-*/cache/running/*-*"))) < count:
        if time.monotonic() > deadline:
            pytest.fail(f"only {len(notes)} nodes after {DEADLINE_S} s")
        time.sleep(0.01)


def processes_in(scratch: Path) -> list[str]:
    """Command lines of processes that were given a path below `scratch`, or a working directory there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended just now
            words = (process / "cmdline").read_text()
            if str(scratch) in words or str(scratch) in str((process / "cwd").readlink()):
                found.append(words)
    return found


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
@pytest.mark.parametrize("count", [1, 2, 4])
def test_does_an_interrupted_demo_end_its_processes_and_clean_up(
    model: Path, scratch: Path, number: signal.Signals, count: int
) -> None:
    with running_demo(model, scratch) as process:
        wait_for_nodes(scratch, count)  # with one, the newcomers are being started just now
        process.send_signal(number)
        process.send_signal(number)  # an impatient user
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert processes_in(scratch) == []
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
    damaged = bytearray((copy / "a.safetensors").read_bytes())
    damaged[-1] ^= 1
    (copy / "a.safetensors").write_bytes(damaged)
    (copy / "b.safetensors").unlink()
    (copy / "left-over").touch()
    assert differences(found, copy) == [
        "a.safetensors is different",
        "b.safetensors is missing",
        "left-over is not in the source",
    ]
