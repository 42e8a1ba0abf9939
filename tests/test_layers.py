"""Who may import whom: ARCHITECTURE.md's table of rooms, as data.

A module imports only from rows above its own, and from those siblings that are named beside it. Imports inside
functions count, those for type checkers alone do not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import swarm

ROOT = Path(swarm.__file__).parent

# Row by row, from what knows nothing to what knows everything; each module with the siblings that it may import.
ROWS: dict[str, dict[str, set[str]]] = {
    "words": {"errors": set(), "settings": {"errors"}, "tuning": set()},
    "nouns": {
        "safetensors_header": set(),
        "manifest": {"safetensors_header"},
        "bitfield": set(),
        "messages": {"manifest"},
        "journal": {"messages"},
        "rumours": {"manifest", "messages"},
    },
    "policy": {"schedule": set(), "mesh": set()},
    "protocols": {
        "download": set(),
        "upload": set(),
        "gifts": set(),
        "membership": set(),
        "roster": set(),
        "probing": set(),
        "gossip": {"probing", "roster"},
        "sealing": set(),
        "floods": set(),
    },
    "world": {
        "cuda": set(),
        "hashing": set(),
        "hashing.cpu": set(),
        "hashing.cuda": {"cuda", "hashing.cpu", "hashing.kernels", "store", "store.staging"},
        "hashing.kernels": set(),
        "store": set(),
        "store.disk": set(),
        "store.directory": {"store", "store.disk"},
        "store.staging": {"cuda", "store"},
        "store.memory": {"store", "store.staging"},
        "store.tensors": {"cuda", "store", "store.memory"},
        "keys": set(),
        "identity": {"keys"},
        "handshake": {"identity"},
        "pages": set(),
        "link": {"handshake", "identity", "pages"},
        "listener": set(),
        "datagrams": set(),
        "discovery": set(),
        "hub": set(),
        "walk": {"store.disk"},
        "transport": {"store"},
        "transport.ends": {"store", "transport"},
        "transport.pace": set(),
        "transport.stream": set(),
        "transport.tls": {"handshake", "identity", "transport.stream"},
        "transport.inproc": {"store", "transport", "transport.ends"},
        "transport.tcp_session": {"store", "transport", "transport.ends", "transport.stream"},
        "transport.tcp": {
            "identity",
            "transport",
            "transport.stream",
            "transport.tcp_session",
            "transport.tls",
        },
        "transport.two_sided": {
            "cuda",
            "store",
            "transport",
            "transport.ends",
            "transport.stream",
            "transport.tcp_session",
        },
        "transport.nccl": {
            "cuda",
            "store",
            "transport.ends",
            "transport.stream",
            "transport.tcp",
            "transport.tcp_session",
            "transport.two_sided",
        },
        "transport.torchdist": {
            "store",
            "transport",
            "transport.ends",
            "transport.stream",
            "transport.tcp",
            "transport.tcp_session",
            "transport.two_sided",
        },
        "transport.cuda_ipc": {
            "cuda",
            "store",
            "store.staging",
            "transport",
            "transport.ends",
            "transport.stream",
            "transport.tcp",
            "transport.tcp_session",
        },
    },
    "driver": {
        "landing": set(),
        "peer": set(),
        "inquiries": {"peer"},
        "fetching": {"landing", "peer"},
        "serving": {"fetching", "peer"},
        "world": set(),
        "linking": {"fetching", "peer", "world"},
        "sharing": {"fetching", "peer"},
        "gathering": {"world"},
        "node": {
            "fetching",
            "gathering",
            "inquiries",
            "landing",
            "linking",
            "peer",
            "serving",
            "sharing",
            "world",
        },
        "resolving": {"node", "peer"},
        "build": set(),
    },
    "faces": {
        "": {"api", "engines.transformers"},  # `import swarm` itself
        "status": set(),
        "status.picture": set(),
        "status.progress": {"status.picture"},
        "status.client": set(),
        "status.seen": set(),
        "status.table": {"status.progress"},
        "status.watching": {"status.client", "status.seen", "status.table"},
        "status.running": set(),
        "status.history": set(),
        "status.own": {"status.history", "status.picture"},
        "status.collecting": {"status.own"},
        "status.warnings": {"status.progress"},
        "status.view": {"status.collecting", "status.own", "status.warnings"},
        "status.feed": {"status.view"},
        "status.dashboard": {
            "status.collecting",
            "status.feed",
            "status.history",
            "status.own",
            "status.picture",
            "status.view",
        },
        "status.metrics": set(),
        "status.trace": set(),
        "status.spans": set(),
        "status.replay": set(),
        "status.replaying": {"status.progress", "status.replay", "status.trace"},
        "status.recorded": {"status.history", "status.own", "status.picture", "status.trace", "status.view"},
        "status.screening": {
            "status.dashboard",
            "status.feed",
            "status.recorded",
            "status.trace",
            "status.view",
        },
        "runtime": {
            "status.client",
            "status.dashboard",
            "status.history",
            "status.metrics",
            "status.picture",
            "status.spans",
        },
        "api": {"runtime"},
        "engines": set(),
        "engines.fingerprint": set(),
        "engines.caches": {"api", "engines.fingerprint", "engines.pruning", "runtime", "status.running"},
        "engines.joining": {
            "api",
            "engines.fingerprint",
            "engines.metadata",
            "engines.offering",
            "engines.pruning",
            "engines.starts",
            "engines.tiers",
            "runtime",
            "status.running",
        },
        "engines.launch": {"api", "engines.fingerprint", "engines.metadata", "engines.pruning"},
        "engines.metadata": {"engines.pruning"},
        "engines.offering": {"engines.fingerprint"},
        "engines.plugging": set(),
        "engines.pruning": set(),
        "engines.starts": set(),
        "engines.tiers": {"engines.fingerprint"},
        "engines.vllm": {"engines.plugging", "engines.vllm_loader"},
        "engines.vllm_loader": {
            "engines.caches",
            "engines.fingerprint",
            "engines.handover",
            "engines.joining",
            "engines.metadata",
            "engines.offering",
        },
        "engines.handover": {"engines.fingerprint", "engines.joining", "engines.metadata"},
        "engines.sglang": {"engines.plugging", "engines.sglang_loader"},
        "engines.sglang_loader": {"engines.fingerprint", "engines.handover", "engines.joining"},
        "engines.transformers": {"api"},
        "cli": {
            "",
            "api",
            "demo",
            "doctor.checks",
            "doctor.examine",
            "doctor.show",
            "engines.launch",
            "runtime",
            "simulate",
            "simulation.setup",
            "status.progress",
            "status.running",
            "status.seen",
            "status.replaying",
            "status.screening",
            "status.table",
            "status.trace",
            "status.watching",
        },
        "doctor": set(),
        "doctor.facts": {"engines.fingerprint", "engines.starts"},
        "doctor.checks": {"doctor.facts", "engines.fingerprint", "engines.starts"},
        "doctor.examine": {
            "doctor.facts",
            "engines.fingerprint",
            "engines.starts",
            "runtime",
            "status.client",
            "status.running",
        },
        "doctor.show": {"doctor.checks"},
        "demo": {"", "status.client", "status.progress", "status.running"},
        "simulation": set(),
        "simulation.clock": set(),
        "simulation.gossip": set(),
        "simulation.network": set(),
        "simulation.scenarios": set(),
        "simulation.content": set(),
        "simulation.wire": set(),
        "simulation.setup": set(),
        "simulation.report": {"simulation.setup"},
        "simulation.crowd": {"simulation.report", "simulation.setup", "simulation.wire"},
        "simulation.plot": {"simulation.crowd", "simulation.report"},
        "simulate": {
            "simulation.crowd",
            "simulation.plot",
            "simulation.report",
            "simulation.setup",
            "status.progress",
        },
        "simulation.cluster": {
            "simulation.clock",
            "simulation.content",
            "simulation.network",
            "simulation.scenarios",
        },
    },
}
PURE = ["words", "nouns", "policy", "protocols"]
VERSION_ONLY = {
    "doctor.examine",
    "node",
    "runtime",
}  # may import `__version__` from the package itself, which is no more than a word

# Where each third-party package lives.
HOMES: dict[str, set[str]] = {
    "aiohttp": {"link", "pages"},
    "cryptography": {"sealing", "keys", "identity"},
    "zeroconf": {"discovery"},
    "xxhash": {"hashing.cpu", "hashing.cuda"},
    "blake3": {"hashing.cpu"},
    "torch": {
        "api",
        "cuda",
        "engines.caches",
        "engines.transformers",
        "engines.handover",
        "engines.sglang_loader",
        "engines.vllm_loader",
        "hashing.cuda",
        "store.tensors",
        "transport.nccl",
        "transport.torchdist",
    },
    "transformers": {"engines.transformers"},
    "vllm": {"engines.vllm", "engines.vllm_loader"},
    "sglang": {"engines.sglang", "engines.sglang_loader"},
    "triton": {"hashing.kernels"},  # which is imported when there is a batch to hash
    "prometheus_client": {"status.metrics"},
    "opentelemetry": {"status.spans"},
    "rich": {
        "doctor.show",
        "status.replaying",
        "status.table",
        "status.watching",
        "status.progress",
        "cli",
        "demo",
        "simulate",
    },
    "matplotlib": {"simulation.plot"},
    "numpy": {
        "bitfield",
        "schedule",
        "gifts",
        "cuda",
        "download",
        "hashing.cuda",
        "store.tensors",
        "transport.torchdist",
        "simulation.cluster",
        "simulation.content",
        "demo",
    },
    "msgspec": {
        "manifest",
        "messages",
        "rumours",
        "build",
        "engines.caches",
        "engines.metadata",
        "engines.starts",
        "status.dashboard",
        "status.own",
        "status.trace",
    },
}
LAZY = {
    "matplotlib",
    "opentelemetry",
    "prometheus_client",
    "sglang",
    "torch",
    "transformers",
    "vllm",
    "zeroconf",
}  # never at a module's top
INSIDE = {
    "engines.handover",
    "engines.sglang_loader",
    "engines.vllm_loader",
}  # imported by an engine, which has all of it already
WORLDLY = {"asyncio", "socket", "threading", "time", "os", "subprocess", "concurrent", "secrets", "http", "select"}
ALLOWED_ANYWAY = {("settings", "os")}  # the environment is one of its sources


def modules() -> dict[str, Path]:
    """Every module of the package by its name within it; '' is the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
ROW_OF = {module: row for row, members in ROWS.items() for module in members}


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that can run; not what is for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from statements(child)


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names of what is imported; `from a import b` gives `a.b`."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(module: str) -> set[str]:
    """Modules of the package that a module imports."""
    found = set()
    for name in imported(statements(tree_of(module))):
        package, _, rest = name.partition(".")
        if package != "swarm" or (rest == "__version__" and module in VERSION_ONLY):
            continue
        # `from swarm.errors import SwarmError` names a module and something in it.
        found.add(rest if rest in MODULES else rest.rpartition(".")[0])
    return found - {module}


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_is_every_module_in_the_table() -> None:
    assert set(ROW_OF) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_does_a_module_import_from_rows_above_only(module: str) -> None:
    order = list(ROWS)
    row = ROW_OF[module]
    above = {other for other, its in ROW_OF.items() if order.index(its) < order.index(row)}
    assert own_imports(module) <= above | ROWS[row][module]


def test_is_every_sibling_in_the_table_needed() -> None:
    unused = {
        (module, sibling)
        for members in ROWS.values()
        for module, siblings in members.items()
        for sibling in siblings - own_imports(module)
    }
    assert unused == set()


def test_are_there_no_circles() -> None:
    open_, done = list[str](), set[str]()

    def visit(module: str) -> None:
        assert module not in open_, f"{' -> '.join(open_)} -> {module}"
        if module not in done:
            open_.append(module)
            for other in sorted(own_imports(module) - {""}):  # the package imports `api` when it is asked for it only
                visit(other)
            done.add(open_.pop())

    for module in MODULES:
        visit(module)


@pytest.mark.parametrize("module", MODULES)
def test_does_each_third_party_package_live_in_one_room(module: str) -> None:
    outside = packages(imported(statements(tree_of(module)))) - sys.stdlib_module_names - {"swarm"}
    assert outside <= {package for package, homes in HOMES.items() if module in homes}


@pytest.mark.parametrize("package", LAZY)
def test_are_heavy_packages_imported_when_they_are_needed_only(package: str) -> None:
    for module in HOMES[package] - INSIDE:
        top = (node for node in tree_of(module).body if isinstance(node, ast.Import | ast.ImportFrom))
        assert package not in packages(imported(iter(top)))
        assert package in packages(imported(statements(tree_of(module))))


@pytest.mark.parametrize("module", [module for row in PURE for module in ROWS[row]])
def test_is_the_core_pure(module: str) -> None:
    tree = tree_of(module)
    worldly = packages(imported(statements(tree))) & WORLDLY
    assert worldly <= {package for owner, package in ALLOWED_ANYWAY if owner == module}
    assert dice(tree) <= {"Random"}  # a type for the dice that others hand it
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Call) and dice(node.func)]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Await | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("module", MODULES)
def test_does_nothing_depend_on_global_dice_or_on_the_time_of_day(module: str) -> None:
    tree = tree_of(module)
    assert dice(tree) <= {"Random", "SystemRandom"}
    if ROW_OF[module] not in ("world", "driver", "faces"):
        assert "time" not in packages(imported(statements(tree)))
    # build and pruning compare the times of files with the clock that gave them; certificates, seals and spans carry
    # the time of day
    if module not in ("build", "engines.pruning", "world", "identity", "status.spans"):
        assert not {"time", "time_ns"} & used(tree, "time")
    if module.startswith("simulation"):
        assert not {"time", "secrets"} & packages(imported(statements(tree)))


def used(tree: ast.AST, name: str) -> set[str]:
    """Every `something` in `name.something`."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == name}


def dice(tree: ast.AST) -> set[str]:
    """What is used of the `random` module."""
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "random"]
    return used(tree, "random")


@pytest.mark.parametrize("module", MODULES)
def test_does_a_module_say_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(tree_of(module))


@pytest.mark.parametrize("module", MODULES)
def test_does_an_assert_do_no_work(module: str) -> None:
    asserts = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Assert)]
    assert not [call for node in asserts for call in ast.walk(node) if isinstance(call, ast.Call | ast.NamedExpr)]


@pytest.mark.parametrize("module", MODULES)
def test_is_there_no_pickle_and_no_drawer_for_everything(module: str) -> None:
    assert not {"pickle", "marshal", "shelve", "dill"} & packages(imported(statements(tree_of(module))))
    assert module.rpartition(".")[2] not in {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("module", MODULES)
def test_is_every_decoder_made_with_its_module(module: str) -> None:
    """Made by the first thread that decodes, it crashes the second: msgspec's types are half made meanwhile."""
    tree = tree_of(module)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    decoding = [call for call in calls if ast.unparse(call.func) in ("msgspec.json.decode", "msgspec.msgpack.decode")]
    types = {ast.unparse(word.value) for call in decoding for word in call.keywords if word.arg == "type"}
    assert types <= {"dict[str, Any]"}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = [call for function in functions for call in ast.walk(function) if call in calls]
    assert not [call for call in late if ast.unparse(call.func).endswith(("json.Decoder", "msgpack.Decoder"))]
