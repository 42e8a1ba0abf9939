"""A real terminal, tmux's, with one command in it."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .processes import wait_until

SHOWN_S = 60.0


class Terminal:
    """One command in a terminal of its own."""

    def __init__(self, command: str, *, cwd: Path) -> None:
        self._server = f"swarm-{secrets.token_hex(4)}"
        self._tmux("new-session", "-d", "-s", "it", "-c", str(cwd), command)
        self.resize(132, 44)

    def resize(self, width: int, height: int) -> None:
        self._tmux("resize-window", "-t", "it", "-x", str(width), "-y", str(height))

    def press(self, *keys: str) -> None:
        """Keys by tmux's names (`Tab`, `C-c`); other words are typed as they are."""
        self._tmux("send-keys", "-t", "it", *keys)

    @property
    def screen(self) -> str:
        return "\n".join(line.rstrip() for line in self._tmux("capture-pane", "-p", "-t", "it").rstrip().splitlines())

    def until(self, true: Callable[[str], object], what: str) -> str:
        """The screen once that is true of it."""

        def found() -> str | None:
            return shown if true(shown := self.screen) else None

        try:
            return wait_until(found, what, deadline_s=SHOWN_S) or ""
        except pytest.fail.Exception as failure:
            pytest.fail(f"{failure} in a terminal that shows:\n{self.screen}")

    def close(self) -> None:
        self._tmux("kill-server")

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-u", "-f", os.devnull, "-L", self._server, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
