"""The stable API: names, signatures, and the tree of errors."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import TypeGuard

import pytest
from imports import nodes_of, tree_of

import swarm
from swarm import errors

PACKAGE = Path(swarm.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

NAMES = {
    "CheckpointIncomplete",
    "HUB_CACHE", "FetchError", "FetchTimeout", "ManifestConflict", "ManifestError", "ManifestInvalid",
    "ManifestNotFound", "OriginError", "Progress", "RevisionNotFound", "Served", "Settings", "SettingsError",
    "SourceChanged", "Stalled", "StoreConflict", "StoreError", "StoreFull", "SwarmError", "Unpinnable", "Unsigned",
    "Weights", "__version__", "fetch", "fetch_async", "serve", "transformers",
}  # fmt: skip

FETCH = {
    "model_id": inspect.Parameter.empty,
    "out": None,
    "into": None,
    "device": "cpu",
    "digest": None,
    "timeout_s": None,
    "settings": None,
    "revision": None,
    "include": None,
    "exclude": None,
    "tensors": None,
    "progress": None,
    "dtype": None,
}

EXIT_CODES = {
    "SwarmError": 1, "SettingsError": 2, "ManifestError": 3, "ManifestNotFound": 3,
    "RevisionNotFound": 3,
    "CheckpointIncomplete": 3, "NotOfCommit": 3, "Unpinnable": 3, "Unsigned": 3, "ManifestInvalid": 3,
    "ManifestConflict": 3, "FetchError": 4, "Stalled": 4, "FetchTimeout": 4, "StoreError": 5, "StoreFull": 5,
    "StoreConflict": 5, "SourceChanged": 5, "PeerError": 6, "PeerUnreachable": 6, "PeerTimeout": 6, "NotAdmitted": 6,
    "NotSwarm": 6,
    "RemoteProtocolError": 6, "VersionSkew": 6, "TransportError": 1, "AgentError": 1,
    "OriginBusy": 7, "OriginError": 7, "OriginUnreachable": 7, "OriginUnusable": 7,
    "OriginDenied": 7, "OriginNotFound": 7, "OriginChanged": 7,
    "LocalProtocolError": 70,
}  # fmt: skip


def test_which_names_are_public() -> None:
    assert set(swarm.__all__) == NAMES
    for name in NAMES:
        assert getattr(swarm, name) is not None


def test_does_dir_list_the_names_that_load_on_first_use() -> None:
    script = "import swarm; print(*dir(swarm))"
    package = str(Path(swarm.__file__).parent.parent)
    listed = subprocess.run([sys.executable, "-c", script], cwd=package, capture_output=True, text=True, check=True)
    assert set(listed.stdout.split()) >= {*NAMES, "__doc__", "__file__"}
    assert set(dir(swarm)) >= NAMES


def test_is_an_unknown_name_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ftech'"):
        swarm.ftech  # noqa: B018


@pytest.mark.parametrize("function", [swarm.fetch, swarm.fetch_async])
def test_how_is_fetch_called(function: object) -> None:
    assert callable(function)
    parameters = inspect.signature(function).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == FETCH
    assert [p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters.values()] == [False] + [True] * (
        len(FETCH) - 1
    )
    assert inspect.iscoroutinefunction(function) == (function is swarm.fetch_async)


def test_how_is_serve_called() -> None:
    parameters = inspect.signature(swarm.serve).parameters
    assert list(parameters) == ["what", "model_id", "settings", "revision"]
    assert [p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters.values()] == [False, True, True, True]


def test_what_do_errors_exit_with() -> None:
    found = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.SwarmError)
    }
    assert found == EXIT_CODES


def test_is_an_error_one_line_with_fields() -> None:
    stalled = errors.Stalled("m", missing=1, total=2, waited_s=30, tried=["a: busy"])
    assert (stalled.missing, stalled.total, stalled.tried) == (1, 2, ("a: busy",))
    assert str(stalled) == (
        "'m' stalled: 1 of 2 chunks are missing and nothing arrived for 30 s (a: busy); "
        "run the same fetch again to resume"
    )
    skew = errors.VersionSkew("p", theirs=1, ours=2, software="0.1")
    assert str(skew).endswith("upgrade it")
    assert str(errors.VersionSkew("p", theirs=3, ours=2, software="0.1")).endswith("upgrade this node")


def test_is_the_version_the_one_that_was_installed() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", swarm.__version__)
    try:
        installed = importlib.metadata.version("swarm-weights")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed, run from its sources")
    assert installed == swarm.__version__


def test_does_import_swarm_load_no_third_party_package() -> None:
    script = "import sys; before = set(sys.modules); import swarm; print(*sorted(set(sys.modules) - before))"
    package = str(Path(swarm.__file__).parent.parent)
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=package, capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {name.partition(".")[0] for name in found.stdout.split()}
    assert "swarm" in loaded
    assert loaded - {"swarm"} <= sys.stdlib_module_names


# Messages, and events of machines, that have the same word in the field. Code names their module: `upload.Grant`.
TWINS = {
    "Tick": "the time event of each machine",
    "PeerLeft": "the event of the download and of the upload machine",
    "Announce": "the message, and the action of the download machine that sends Have",
    "Cancel": "the message, and the action of the download machine that sends it",
    "Grant": "the message, and the action of the upload machine that sends it",
    "Refuse": "the message, and the action of the upload machine that sends it",
}


def is_public_class(node: ast.AST) -> TypeGuard[ast.ClassDef]:
    return isinstance(node, ast.ClassDef) and not node.name.startswith("_")


def test_has_everything_public_a_docstring() -> None:
    missing = []
    for path in SOURCES:
        classes = filter(is_public_class, nodes_of(path))
        missing += [f"{path.name}: {node.name}" for node in classes if not ast.get_docstring(node)]
    assert missing == []


@functools.cache
def homes_of_classes() -> dict[str, list[str]]:
    """By name of a public class, the modules that define it."""
    homes: dict[str, list[str]] = {}
    for path in SOURCES:
        module = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
        for node in filter(is_public_class, tree_of(path).body):
            homes.setdefault(node.name, []).append(module)
    return homes


def test_do_no_two_public_classes_share_a_name() -> None:
    assert {name for name, modules in homes_of_classes().items() if len(modules) > 1} == set(TWINS)


@pytest.mark.parametrize("name", TWINS)
def test_is_a_class_with_a_twin_named_with_its_module(name: str) -> None:
    """No module imports the bare name from two modules."""
    homes = homes_of_classes()[name]
    assert len(homes) > 1
    for path in SOURCES:
        imports = [node for node in nodes_of(path) if isinstance(node, ast.ImportFrom)]
        bare = {n.module for n in imports if n.module in homes and any(alias.name == name for alias in n.names)}
        assert len(bare) <= 1, path


def test_is_the_package_marked_as_typed() -> None:
    assert (Path(swarm.__file__).parent / "py.typed").is_file()
