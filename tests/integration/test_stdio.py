"""Standard output and standard error at their ends: closed, full, without some characters."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import swarm
from swarm.cli import stdio
from swarm.settings import Settings

pytestmark = pytest.mark.integration

SOURCE = str(Path(swarm.__file__).parent.parent)
TIMEOUT_S = 60.0


def run(script: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A shell script in which `$SWARM` is the command."""
    command = f"{sys.executable} -m swarm"
    before = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "PYTHON", "LANG"))}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}"],
        capture_output=True,
        timeout=TIMEOUT_S,
        env=before | {"SWARM": command, "PYTHONPATH": SOURCE, **environment},
        check=False,
    )


def test_a_reader_that_closes_the_pipe_is_no_failure() -> None:
    for script in ("$SWARM help | true", "$SWARM --version | true", "$SWARM simulate --newcomers 2 --json | head -c 1"):
        ended = run(script)
        assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_full_disk_behind_standard_output_is_said() -> None:
    ended = run("$SWARM help > /dev/full")
    assert ended.returncode == 1
    assert ended.stderr.decode() == "swarm: standard output: No space left on device; not everything was printed\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_closed_descriptor_is_no_failure(closed: str) -> None:
    ended = run(f"$SWARM help {closed}")
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_no_file_gets_the_number_of_a_closed_descriptor(tmp_path: Path) -> None:
    script = (
        "from swarm.cli import stdio\n"
        "with stdio.guarded():\n"
        f"    print(open({str(tmp_path / 'file')!r}, 'w').fileno() > 2, file=open({str(tmp_path / 'said')!r}, 'w'))"
    )
    run(f'{sys.executable} -c "{script}" >&- 2>&- <&-')
    assert (tmp_path / "said").read_text() == "True\n"


def test_a_character_that_the_encoding_lacks_is_replaced(tmp_path: Path) -> None:
    missing = tmp_path / "dö文"
    for environment in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        ended = run(f"$SWARM replay '{missing}'", **environment)
        assert ended.returncode == 5
        assert b"d??: cannot be read" in ended.stderr


def test_a_table_in_ascii(tmp_path: Path) -> None:
    ended = run("$SWARM simulate --newcomers 2", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert ended.stdout.isascii()


@pytest.fixture
def seed(tmp_path: Path) -> Iterator[str]:
    """The address of a running node with `org/model`."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "naïve.json").write_text("{}")
    settings = Settings(mdns=False, cache=tmp_path / "cache")
    with swarm.serve(tmp_path / "model", model_id="org/model", settings=settings) as served:
        yield served.address


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("| true", b""),
        ("> /dev/full", b"No space left"),
        (">&-", b""),
        ("--json | true", b""),
        ("2>&-", b""),
        (">&- 2>&-", b""),
        ("2>/dev/full", b""),
    ],
)
def test_a_complete_fetch_is_a_success_whatever_becomes_of_its_output(
    tmp_path: Path, seed: str, end: str, said: bytes
) -> None:
    ended = run(f"cd {tmp_path}; $SWARM fetch org/model --peer {seed} --no-mdns --no-seed --out out {end}")
    assert ended.returncode == 0
    assert said in ended.stderr
    assert b"Traceback" not in ended.stderr
    assert (tmp_path / "out" / "naïve.json").read_text() == "{}"


@pytest.mark.parametrize("end", ["> >(true)", "> /dev/full", ">&- 2>&-"])
def test_a_seed_goes_on_whatever_becomes_of_its_output(tmp_path: Path, end: str) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    own = f"export SWARM_CACHE={tmp_path / 'cache'} SWARM_MDNS=false"
    ended = run(
        f"cd {tmp_path}; {own}; (exec $SWARM serve m --model-id org/m --listen 127.0.0.1:{port} {end}) & seed=$!; "
        f"$SWARM fetch org/m --peer 127.0.0.1:{port} --wait --timeout {TIMEOUT_S / 2} --no-seed --out out; fetched=$?; "
        "kill $seed; wait $seed; echo fetch $fetched seed $?"
    )
    assert ended.stdout.endswith(b"fetch 0 seed 0\n"), ended
    assert b"Traceback" not in ended.stderr
    assert (tmp_path / "out" / "a.json").read_text() == "{}"


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"SWARM_CACHE": "/dev/null/cache"},
        {"SWARM_CACHE": "/proc/cache"},
    ],
)
def test_neither_locale_nor_cache_directory_costs_a_fetch(
    tmp_path: Path, seed: str, environment: dict[str, str]
) -> None:
    out = tmp_path / "dö文"
    script = f"cd {tmp_path}; $SWARM fetch org/model --peer {seed} --no-mdns --no-seed --out 'dö文'"
    ended = run(script, **environment)
    assert (ended.returncode, b"Traceback" in ended.stderr) == (0, False)
    assert (out / "naïve.json").read_text() == "{}"


def test_a_status_whose_reader_has_enough_ends(tmp_path: Path, seed: str) -> None:
    for options in ("", "--json", "--watch", "--watch --json"):
        ended = run(f"$SWARM status {options} --peer {seed} | head -c 1")
        assert (ended.returncode, ended.stderr) == (0, b"")


class _Full(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(28, "No space left on device")


def test_output_after_a_failure_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _Full())
    with stdio.guarded() as output:
        assert not stdio.ended()
        print("a")
        print("b")
        assert stdio.ended()
        assert output.error is not None
        assert stdio.complaint(output) == "standard output: No space left on device; not everything was printed"
