"""The command in real shells, in a real terminal: what Tab completes, and what `q` ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .processes import Machine
from .terminal import Terminal

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]
SHELLS = {
    "bash": (
        "bash --norc --noprofile -i",
        r"bind 'set show-all-if-ambiguous on'; bind 'set completion-query-items 0'; eval $swarm_completion",
    ),
    "zsh": ("zsh -f -i", "autoload -Uz compinit && compinit -D; eval $swarm_completion"),
    "fish": ("fish --no-config -i", "eval $swarm_completion"),
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with the command in its `bin`, two cached models and a directory of one."""
    home = tmp_path / "home"
    for folder in ("bin", "hub/models--org--small", "hub/models--org--smaller", "modeldir"):
        (home / folder).mkdir(parents=True)
    (home / "modeldir" / "config.json").write_text("{}")
    command = home / "bin" / "swarm"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m swarm "$@"\n')
    command.chmod(0o755)
    return home


def shows(text: str) -> Callable[[str], bool]:
    return lambda screen: text.rstrip() in screen


@contextlib.contextmanager
def shell(name: str, home: Path) -> Iterator[Terminal]:
    start, setup = SHELLS[name]
    source = {"bash": '"$(swarm completion bash)"', "zsh": '"$(swarm completion zsh)"'}.get(
        name, "(swarm completion fish | string collect)"
    )
    environment = {
        "HOME": home,
        "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
        "HF_HUB_CACHE": home / "hub",
        "PS1": "> ",
        "PYTHONPATH": Path(__file__).parents[2],
        "XDG_CONFIG_HOME": home,
        "XDG_DATA_HOME": home,
    }
    given = shlex.join([f"{name}={value}" for name, value in environment.items()])
    terminal = Terminal(f"env {given} {start}", cwd=home)
    try:
        terminal.press(setup.replace("$swarm_completion", source), "Enter")
        terminal.press("echo set'-'up", "Enter")
        terminal.until(lambda shown: "\nset-up" in shown, "a shell that is set up")
        terminal.press("clear", "Enter")
        terminal.until(lambda shown: "set-up" not in shown, "an empty screen")
        yield terminal
    finally:
        terminal.close()


@pytest.mark.parametrize("name", SHELLS)
def test_what_does_tab_complete(name: str, home: Path) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    with shell(name, home) as terminal:
        for typed, completed in (
            ("swarm verif", "swarm verify "),
            ("swarm fetch --inc", "swarm fetch --include "),
            ("swarm fetch org/sm", "swarm fetch org/small"),
            ("swarm serve --trace modeld", "swarm serve --trace modeldir/"),
            ("swarm help keyg", "swarm help keygen "),
        ):
            terminal.press(typed, "Tab")
            terminal.until(shows(completed), completed)
            terminal.press("C-u")
        terminal.press("swarm status --", "Tab", "Tab")
        terminal.until(lambda shown: "--watch" in shown and "--key-file" in shown, "the flags of status")


def test_does_q_end_watching(machine: Machine, model: Path) -> None:
    seed = machine.serve(model)
    environment = shlex.join([f"SWARM_CACHE={machine.cache}", f"HOME={machine.root}"])
    command = shlex.join([sys.executable, "-m", "swarm", "status", "--watch", "--peer", seed.address])
    terminal = Terminal(f"env {environment} {command}; echo ended with $?; stty -a; sleep 60", cwd=machine.cwd)
    try:
        terminal.until(lambda shown: "100%" in shown, "the table")
        terminal.press("x", "q")
        shown = terminal.until(lambda shown: "ended with 0" in shown and "icanon" in shown, "the end")
        assert "-icanon" not in shown, "the terminal is as it was"
        assert "100%" in shown
    finally:
        terminal.close()
