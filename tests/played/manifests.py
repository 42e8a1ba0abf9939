"""Renders the manifests of deploy/ with the real tools."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES, CHART = DEPLOY / "kubernetes", DEPLOY / "helm"
OVERLAYS = ("vllm", "lws", "server", "kserve")

Object = dict[str, Any]


def tool(name: str) -> str | None:
    """Where a program is: beside the interpreter, where .ci/kubectl puts it, or on the PATH."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def lacking(*names: str) -> str | None:
    """Why manifests cannot be rendered here, or None."""
    try:
        import yaml  # noqa: F401
    except ImportError:
        return "needs PyYAML (pip install -e '.[deploy]')"
    missing = [name for name in names if tool(name) is None]
    return f"needs {', '.join(missing)} (.ci/kubectl installs them)" if missing else None


def run(name: str, *words: str | Path) -> str:
    """What a program prints."""
    command = [tool(name) or name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def parsed(text: str) -> list[Object]:
    """The objects of a stream of YAML documents."""
    import yaml

    return [each for each in yaml.safe_load_all(text) if each]


def chart(*flags: str) -> list[Object]:
    """The objects of the chart, with flags such as --set."""
    return parsed(run("helm", "template", "swarm-weights", CHART, "--namespace", "swarm", *flags))


def with_key(directory: Path) -> Path:
    """A copy of deploy/kubernetes with a fresh cluster key, as a user makes it."""
    copy = directory / "kubernetes"
    shutil.copytree(KUBERNETES, copy, ignore=shutil.ignore_patterns("swarm.key"))
    subprocess.run(
        [sys.executable, "-m", "swarm", "keygen", str(copy / "base" / "swarm.key")],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return copy


def kustomized(directory: Path) -> list[Object]:
    """The objects of a kustomization."""
    return parsed(run("kubectl", "kustomize", directory))


def pod_specs(objects: Sequence[Object]) -> list[tuple[str, Object]]:
    """The pod templates of workloads, by the names of these."""
    found = []
    for each in objects:
        spec = each.get("spec", {})
        name = f"{each['kind']}/{each['metadata']['name']}"
        if "template" in spec:
            found.append((name, spec["template"]))
        if group := spec.get("leaderWorkerTemplate"):
            found += [(f"{name} {part}", group[part]) for part in ("leaderTemplate", "workerTemplate")]
    return found
