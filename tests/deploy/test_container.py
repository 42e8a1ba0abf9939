"""The Containerfile: what an image has is what the manifests rely on."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from swarm import __version__
from swarm.cli.main import _parser
from swarm.settings import DEFAULT_PORT

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy/Containerfile"


def instructions() -> list[tuple[str, str]]:
    """Name and rest of each instruction."""
    joined = FILE.read_text().replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def only(name: str) -> str:
    (found,) = [rest for each, rest in instructions() if each == name]
    return found


def test_has_an_image_the_entry_point_user_and_ports_of_the_manifests() -> None:
    values = (ROOT / "deploy/helm/values.yaml").read_text()
    (user,) = re.findall(r"^user: (\d+)$", values, re.MULTILINE)
    (metrics_port,) = re.findall(r"^metricsPort: (\d+)$", values, re.MULTILINE)
    assert only("ENTRYPOINT") == '["swarm"]'
    assert only("USER") == f"{user}:{user}"
    assert only("EXPOSE").split() == [f"{DEFAULT_PORT}/tcp", f"{DEFAULT_PORT}/udp", f"{metrics_port}/tcp"]


def test_are_the_versions_those_of_the_package() -> None:
    chart = (ROOT / "deploy/helm/Chart.yaml").read_text()
    assert f"\nappVersion: {__version__}\n" in chart
    images = re.findall(r"swarm-weights(?:-vllm)?:([0-9.]+)", (ROOT / "deploy/helm/values.yaml").read_text())
    assert set(images) == {__version__}


def test_gets_the_container_of_the_page_a_key_that_its_user_can_read() -> None:
    (line,) = re.findall(r"^ +podman run (.*)$", (ROOT / "docs/deploy.md").read_text(), re.MULTILINE)
    words = shlex.split(line)
    name, user, mode = words[words.index("--secret") + 1].split(",")
    assert (f"{user.removeprefix('uid=')}:{user.removeprefix('uid=')}", mode) == (only("USER"), "mode=0400")
    (image,) = (word for word in words if word.startswith("swarm-weights:"))
    options = _parser().parse_args(words[words.index(image) + 1 :])
    assert options.key_file == f"/run/secrets/{name}"


def test_is_everything_copied_that_the_build_needs() -> None:
    copied = [word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    kept = {line.removeprefix("!") for line in (ROOT / ".containerignore").read_text().splitlines() if line[0] == "!"}
    assert set(copied) == kept
    needed = {
        "pyproject.toml",
        *re.findall(r'^(?:readme = |license-files = \[)"(\w+(?:\.md)?)"', project(), re.MULTILINE),
    }
    assert needed <= kept


def project() -> str:
    return (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint")
def test_has_hadolint_nothing_to_complain_of() -> None:
    done = subprocess.run(["hadolint", FILE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
