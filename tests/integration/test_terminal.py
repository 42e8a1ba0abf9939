"""`swarm status --watch` in a real terminal, tmux's, beside a swarm in which things go wrong.

With `SWARM_SCREENSHOTS=docs/pictures` what it shows is kept for the documents.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .stage import SLOW, Stage, staged
from .terminal import Terminal

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(170),
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]
KILLED = 2


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path, size=160_000_000, rate="5MB/s") as found:
        yield found


@pytest.fixture
def terminal(stage: Stage, tmp_path: Path) -> Iterator[Terminal]:
    """Watches the seed; what it exits with is its last line."""
    unset = ("env", "-u", "LINES", "-u", "COLUMNS")  # pytest's readline sets them, and they would hold for any window
    command = [*unset, sys.executable, "-m", "swarm", "status", "--watch", "--peer", stage.seed.address]
    made = Terminal(f"{shlex.join(command)}; echo ended with $?; sleep 60", cwd=stage.machine.cwd)
    yield made
    made.close()


def whole(shown: str) -> bool:
    """Whether nothing of a screen is missing: a table that has a beginning has an end."""
    return shown.count("┏") == shown.count("└") > 0


def test_does_watching_show_what_happens_and_survive_it(stage: Stage, terminal: Terminal) -> None:
    terminal.until(lambda shown: re.search(r"replica-3 .* [2-9]\d%", shown), "progress")
    terminal.until(lambda shown: f"replica-{SLOW} is slow" in shown, "the slow replica")
    stage.replicas[KILLED].kill()
    wide = terminal.until(
        lambda shown: (
            re.search(r"✗ Liar sent \d+ wrong chunks to .*(which has|of them) banned it", shown)
            and re.search(r"│ Liar .*│ wrong chunks", shown)
            and re.search(rf"│ replica-{SLOW} .*│ alive, slow", shown)
            and f"replica-{KILLED} is dead" in shown
            and whole(shown)
        ),
        "who lies, who is slow and who is dead",
    )
    assert re.search(r"│ replica-3 +│ org/model │ ━.*│ +\d+% │ +[\d.]+ [kM]B/s │ +\d+ s │", wide)

    terminal.resize(80, 24)
    small = terminal.until(lambda shown: "not shown: " in shown and whole(shown), "a small screen")
    lines = small.splitlines()
    assert len(lines) <= 24
    assert lines[1].startswith("✗ Liar sent")
    assert lines[-1].startswith("not shown: ")

    stage.seed.kill()
    terminal.resize(132, 44)
    gone = terminal.until(
        lambda shown: re.match("replica-", shown) and re.search("seed-0 is (lost|dead)", shown) and whole(shown),
        "what another member sees",
    )
    terminal.press("C-c")
    terminal.until(lambda shown: "ended with 1" in shown and "┏" in shown, "the last of it, left behind")
    if folder := os.environ.get("SWARM_SCREENSHOTS"):
        titles = (
            "132 columns, 44 rows",
            "80 columns, 24 rows",
            "the node that was asked is killed: another one is asked",
        )
        kept = (f"# {title}\n\n{shown}\n" for title, shown in zip(titles, (wide, small, gone), strict=True))
        Path(folder, "status.txt").write_text("\n".join(kept))
