"""Standard output and standard error at their ends: closed, full, without some characters."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import swarm
from swarm.cli import stdio

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
