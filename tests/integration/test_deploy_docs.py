"""The commands of docs/deploy.md in a row, as a reader types them, on one machine and without a hub."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from .processes import Machine, contents, write_model

pytestmark = pytest.mark.integration

PAGE = (Path(__file__).parents[2] / "docs/deploy.md").read_text()


def section(title: str) -> str:
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return str(text)


def commands(title: str) -> list[list[str]]:
    """The arguments of the commands of a section."""
    blocks = re.findall(r"^```\n(.*?)^```$", section(title), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("swarm ")]
    return [shlex.split(line)[1:] for line in lines]


def test_does_a_model_get_to_machines_without_a_hub(machine: Machine, tmp_path: Path) -> None:
    """The first machine's disk stands for the hub that only it reaches."""
    original = write_model(tmp_path / "original", size=2_000_000)
    fetch, verify, serve, fetch_behind = commands("Air-gapped")
    assert machine.run("keygen", machine.cwd / "swarm.key").code == 0
    fetch[1] = f"file://{original}"
    brought = machine.run(*fetch, "--no-mdns")
    assert brought.code == 0, brought.err
    assert machine.run(*verify).code == 0
    serve[serve.index("--listen") + 1] = "127.0.0.1:0"
    carrier = machine.start(*serve, "--no-mdns")
    carrier.wait_for(" ready: ")
    fetch_behind[fetch_behind.index("--peer") + 1] = carrier.address
    behind = machine.run(*fetch_behind, "--no-mdns", "--no-seed", "--out", tmp_path / "behind")
    assert behind.code == 0, behind.err
    assert contents(tmp_path / "behind") == contents(original)


def test_does_an_agent_of_many_machines_fetch_and_report(machine: Machine, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", size=2_000_000)
    keygen, first, later, status = commands("Many machines")
    assert machine.run(*keygen).code == 0
    key = ["--key-file", first[first.index("--key-file") + 1]]
    seed = machine.serve(model, *key, "--listen", "127.0.0.1:0", environment={"SWARM_CACHE": str(tmp_path / "seed")})
    assert first[:3] == later[:3] == ["agent", "--hold", "org/model"]
    later[later.index("--listen") + 1] = "127.0.0.1:0"
    later[later.index("--peer") + 1] = seed.address
    agent = machine.start(*later, "--no-mdns", "--hub-listen", "127.0.0.1:0", "--origin", "none")
    agent.wait_for("org/model is here, and stays")
    status[status.index("--peer") + 1] = seed.address
    shown = machine.run(*status)
    assert "org/model" in shown.out, shown.err


def test_is_every_file_there_that_the_page_names() -> None:
    root = Path(__file__).parents[2]
    named = set(re.findall(r"(?:deploy|examples|tests)/[\w./-]+", PAGE))
    assert {path for path in named if not (root / path.rstrip(".")).exists()} <= {"deploy/kubernetes/base/swarm.key"}
    overlays = {path.name for path in (root / "deploy/kubernetes/overlays").iterdir()}
    assert overlays <= set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
