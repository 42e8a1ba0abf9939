"""Signals: a command ends soon, whatever its threads do, and with the right exit code."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import swarm
from swarm.checkpoint.digest_cache import remember
from swarm.content.manifest import ChunkEntry, FileEntry, HashScheme, Manifest

pytestmark = pytest.mark.integration

END_S = 10.0  # `signals` has a deadline of 2; a machine that runs other tests beside needs longer
START_S = 60.0
LARGE = 200 << 30  # bytes, sparse: minutes of hashing
CHUNK = 16 << 20
ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
ENDING = [signal.SIGINT, signal.SIGTERM]  # a seed


@pytest.fixture
def large(tmp_path: Path) -> Path:
    (tmp_path / "large").mkdir()
    with (tmp_path / "large" / "model.gguf").open("wb") as file:
        file.truncate(LARGE)
    return tmp_path / "large"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{}")
    return tmp_path / "small"


def start(
    tmp_path: Path,
    *arguments: str,
    before: Callable[[], object] | None = None,
    inherited: tuple[int, ...] = (),
    output: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": str(Path(swarm.__file__).parent.parent),
        "SWARM_CACHE": str(tmp_path / "cache"),
        "SWARM_MDNS": "false",
    }
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "swarm", *arguments],
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=tmp_path,
        preexec_fn=before,
        pass_fds=inherited,
    )


def stopped(process: subprocess.Popen[str], number: signal.Signals) -> int:
    began = time.monotonic()
    process.send_signal(number)
    try:
        return process.wait(timeout=START_S)
    finally:
        process.kill()
        assert time.monotonic() - began < END_S


def until_line(process: subprocess.Popen[str], part: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if part in line:
            return
    pytest.fail(f"it ended without {part!r}")


def until_open(process: subprocess.Popen[str], path: Path) -> None:
    """Returns when the process has opened the file."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for descriptor in os.listdir(f"/proc/{process.pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.readlink(f"/proc/{process.pid}/fd/{descriptor}") == str(path):
                    return
        time.sleep(0.01)
    pytest.fail(f"{path} was not opened within {START_S:g} s")


@pytest.mark.parametrize("number", ENDING)
def test_serving_stops_while_files_are_hashed(tmp_path: Path, large: Path, number: signal.Signals) -> None:
    with start(tmp_path, "serve", str(large)) as process:
        until_open(process, large / "model.gguf")  # hashing has begun
        assert stopped(process, number) == 0


@pytest.mark.parametrize("number", ENDING)
def test_serving_stops_without_a_traceback(tmp_path: Path, small: Path, number: signal.Signals) -> None:
    with start(tmp_path, "serve", str(small)) as process:
        until_line(process, "only from this machine")
        assert stopped(process, number) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""


def test_a_hangup_makes_a_seed_read_its_settings_again(tmp_path: Path, small: Path) -> None:
    with start(tmp_path, "serve", str(small), before=os.setsid) as process:  # a daemon has no terminal
        until_line(process, "fetch it with")
        for text, said in (
            ("upload_limit = '5MB/s'", "settings are read again: upload limit 5 MB/s"),
            ("upload_limit = '5MB/s'", "settings are read again: nothing has changed"),
            ("upload_limit = 'fast'", "the settings of before stay"),
            ("", "settings are read again: no upload limit"),
        ):
            (tmp_path / "swarm.toml").write_text(text)
            process.send_signal(signal.SIGHUP)
            until_line(process, said)
        assert stopped(process, signal.SIGTERM) == 0


def test_a_hangup_while_files_are_hashed_does_not_end_a_seed(tmp_path: Path, large: Path) -> None:
    with start(tmp_path, "serve", str(large), before=os.setsid) as process:
        until_open(process, large / "model.gguf")
        process.send_signal(signal.SIGHUP)
        until_line(process, "settings are read again")
        assert stopped(process, signal.SIGTERM) == 0


def test_a_seed_ends_when_its_terminal_is_closed(tmp_path: Path, small: Path) -> None:
    ours, theirs = os.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    with start(tmp_path, "serve", str(small), before=take_terminal, inherited=(theirs,)) as process:
        os.close(theirs)
        until_line(process, "fetch it with")
        os.kill(process.pid, signal.SIGHUP)
        until_line(process, "settings are read again")  # its terminal is there
        os.close(ours)  # the kernel sends SIGHUP
        assert process.wait(timeout=START_S) == 0


def test_a_hangup_that_is_ignored_at_the_start_stays_ignored(tmp_path: Path, small: Path) -> None:
    with start(tmp_path, "serve", str(small), before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        until_line(process, "fetch it with")
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        assert stopped(process, signal.SIGTERM) == 0


@pytest.mark.parametrize("number", ALL)
def test_a_fetch_that_is_interrupted_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    with start(tmp_path, "fetch", "org/missing") as process:
        until_line(process, "no cluster key")
        assert stopped(process, number) == 130
        assert process.stdout is not None
        assert process.stdout.read().endswith("run the same command again to resume\n")


@pytest.mark.parametrize("number", ALL)
def test_a_verification_stops(tmp_path: Path, large: Path, number: signal.Signals) -> None:
    chunks = (ChunkEntry(CHUNK, "0" * 32),) * (LARGE // CHUNK)
    manifest = Manifest(1, "checkpoint", "", HashScheme(), CHUNK, (FileEntry("model.gguf", LARGE, "", chunks),))
    remember(tmp_path / "cache", large, manifest)
    with start(tmp_path, "verify", str(large)) as process:
        deadline = time.monotonic() + START_S
        while len(os.listdir(f"/proc/{process.pid}/task")) == 1:
            assert time.monotonic() < deadline, "it does not hash"
            time.sleep(0.05)
        assert stopped(process, number) == 130


@contextlib.contextmanager
def seed_of(tmp_path: Path, path: Path, *flags: str) -> Iterator[str]:
    """The address of a seed."""
    with start(tmp_path, "serve", str(path), *flags) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if " ready: " in line)
        yield line.split()[0]
        assert stopped(process, signal.SIGTERM) == 0


@pytest.mark.parametrize("number", ALL)
def test_a_newcomer_that_serves_on_is_a_seed(tmp_path: Path, small: Path, number: signal.Signals) -> None:
    out = str(tmp_path / "out")
    with (
        seed_of(tmp_path, small) as address,
        start(tmp_path, "fetch", "small", "--peer", address, "--out", out, before=os.setsid) as process,
    ):
        until_line(process, "serving it on at")
        if number == signal.SIGHUP:
            process.send_signal(number)
            until_line(process, "settings are read again: nothing has changed")
            number = signal.SIGTERM
        assert stopped(process, number) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""


@pytest.mark.parametrize("number", ALL)
def test_a_replay_on_the_web_stops(tmp_path: Path, small: Path, number: signal.Signals) -> None:
    with seed_of(tmp_path, small, "--trace", str(tmp_path / "trace")):
        pass
    with start(tmp_path, "replay", str(tmp_path / "trace"), "--web") as process:
        until_line(process, "shows it again")
        assert stopped(process, number) == 0


def test_a_watched_status_ends_as_its_last_answer(tmp_path: Path, small: Path) -> None:
    """In a terminal and in a pipe."""
    with seed_of(tmp_path, small) as address:
        watching = []
        for number in ALL:
            ours, theirs = os.openpty()
            process = start(tmp_path, "status", "--watch", "--peer", address, output=theirs)
            os.close(theirs)
            watching.append((number, process, ours))
        for number, process, ours in watching:
            with process:
                deadline = time.monotonic() + START_S
                said = b""
                while b"small" not in said:
                    assert time.monotonic() < deadline
                    said += os.read(ours, 4096)
                assert stopped(process, number) == 0
            os.close(ours)
        with start(tmp_path, "status", "--watch", "--peer", address) as process:
            until_line(process, "1 member")
            assert stopped(process, signal.SIGTERM) == 0
