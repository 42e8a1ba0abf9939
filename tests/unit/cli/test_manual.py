"""The manual page: every command and every flag is in it, and the formatter finds nothing to complain about."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from swarm import errors
from swarm.cli.main import GROUPS, _commands, _parser, main


@pytest.fixture
def page(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["help", "--man"]) == 0
    return capsys.readouterr().out


def test_is_every_command_and_flag_described(page: str) -> None:
    text = page.replace("\\-", "-")
    for name, command in _commands(_parser()).items():
        assert f"\n.SS swarm {name}" in text
        for action in command._actions:
            for flag in action.option_strings:
                assert f"\\fB{flag}\\fR" in text, flag
    assert all(f"\n.SH {title.upper()}\n" in text for title in GROUPS)
    assert text.count("\\fB--log-json\\fR") == 1, "flags of all commands are described once"
    codes = {error.exit_code for error in vars(errors).values() if hasattr(error, "exit_code")}
    assert codes < {int(code) for code in re.findall(r"^\.B (\d+)$", text, re.MULTILINE)}


@pytest.mark.skipif(shutil.which("groff") is None, reason="no groff")
def test_does_the_formatter_accept_it(page: str) -> None:
    command = ["groff", "-man", "-Tutf8", "-ww", "-P-c"]
    ran = subprocess.run(command, input=page, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stderr == ""
    shown = re.sub(".\b", "", ran.stdout)
    assert re.search(r"swarm fetch MODEL_ID\n +Fetch a model from peers,", shown)
    assert re.search(r"\n +--out DIR\n +Directory to fill", shown)
