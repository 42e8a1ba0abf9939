"""The allowed imports: rows and folders of ARCHITECTURE.md, as data.

A module imports from its own row and from rows above it. A folder imports the folders that its line names, and there is
no circle. Imports inside functions count, those for type checkers alone do not.
"""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import imports
import pytest
from imports import imported, modules, statements

import swarm

ROOT = Path(swarm.__file__).parent

# Each row imports from itself and from rows above it.
ROWS: dict[str, set[str]] = {
    "words": {"errors", "settings"},
    "nouns": {
        "content", "content.bitfield", "content.bounded_json", "content.commit", "content.manifest", "content.promise",
        "content.safetensors_header", "content.selection", "journal", "membership.config",
        "protocol", "protocol.agent_messages", "protocol.messages", "protocol.packets",
    },
    "policy": {"transfer.scheduler", "peers.selection", "net.addresses", "net.no_answer", "net.timetable"},
    "machines": {
        "agent.eviction",
        "transfer.claims", "transfer.download", "transfer.download_events", "transfer.offers", "transfer.origin_reads",
        "transfer.origin_rate", "transfer.upload", "transfer.superseed",
        "peers.connections", "membership.swim", "membership.swim_events",
        "membership.member_table", "membership.probes", "security.datagram_seal", "security.rate_limit",
    },
    "world": {
        "checkpoint.blob_check", "checkpoint.digest_cache", "checkpoint.files", "checkpoint.hf_cache",
        "checkpoint.hub_tree", "checkpoint.local_download", "checkpoint.proven", "checkpoint.signature_file",
        "checkpoint.signed_files",
        "checkpoint.weight_files", "checkpoint.weight_index",
        "hashing", "hashing.cpu", "hashing.cuda",
        "hashing.kernels", "net", "net.cards", "net.dialling", "net.discovery", "net.environment", "net.http_pages",
        "net.http_server", "net.link",
        "net.listener", "net.pausing_loop", "net.probe_listener", "net.reclaim", "net.udp", "net.websocket",
        "origin", "origin.files", "origin.hf", "origin.http", "origin.objects", "origin.registry",
        "origin.tensor_names", "origin.web", "origin.xet",
        "security",
        "security.certificates", "security.cluster_key", "security.record_seal", "security.signatures",
        "security.model_signature",
        "security.tls_handshake", "store", "store.cuda",
        "store.clone", "store.directory", "store.directory_source", "store.joined", "store.lease",
        "store.confined_directory", "store.file_errors", "store.file_lock", "store.open_files", "store.own_files",
        "store.stamp", "store.writeback",
        "store.partial_directory",
        "store.memory", "store.part",
        "store.casting", "store.process_memory", "store.staging", "store.targets", "store.tensor_layout",
        "store.torch_types",
        "store.memory_store", "store.tensor_source", "store.tensors",
        "transport",
        "transport.admission", "transport.byte_stream", "transport.cuda_ipc", "transport.inproc", "transport.nccl",
        "transport.pace", "transport.paired", "transport.registry", "transport.sealed_stream", "transport.sink",
        "transport.streams",
        "transport.tcp", "transport.tcp_inbound", "transport.tcp_outbound", "transport.tcp_session",
        "transport.tls_stream", "transport.torch_distributed",
    },
    "drivers": {
        "checkpoint", "checkpoint.check", "checkpoint.commit_source", "checkpoint.hf_publish", "checkpoint.kept",
        "checkpoint.manifest_builder",
        "checkpoint.promised", "membership", "node.cold_start", "transfer.origin_driver", "transfer.promise_driver",
        "transfer.proof", "transfer.commit_proof",
        "membership.swim_driver", "net.host_environment", "net.peer_names", "net.port_pair", "node",
        "node.commit_parts", "node.fetch", "node.holders", "node.node", "node.promised_seed",
        "node.agreement", "node.manifest_answers", "node.resolve", "node.trust", "peers",
        "peers.connections_driver", "peers.host", "peers.manifest_requests", "peers.peer", "transfer",
        "transfer.download_driver", "transfer.file_watch", "transfer.shares",
        "transfer.upload_driver", "transfer.verify",
    },
    "faces": {
        "", "__main__", "agent", "agent.agent", "agent.artifact", "agent.cache", "agent.control", "agent.face",
        "agent.hub_api", "agent.hub_files", "agent.local_models", "agent.revisions", "api", "api.bring", "api.calls",
        "api.fetching", "api.handles", "api.landing", "api.serving", "api.through_agent", "api.want", "cli",
        "cli.agent", "cli.commands", "cli.completion", "cli.daemon", "cli.demo", "cli.kept", "cli.main", "cli.manual",
        "cli.next_step", "cli.origin_seed",
        "cli.progress", "cli.replay",
        "cli.reopen", "cli.signals", "cli.simulate", "cli.status_json", "cli.stdio", "cli.status_table",
        "cli.status_watch", "cli.storage", "cli.verify",
        "dashboard", "dashboard.collector", "dashboard.disk_room", "dashboard.member_report",
        "dashboard.recording", "dashboard.replay_server", "dashboard.server", "dashboard.sse",
        "dashboard.swarm_view", "dashboard.warnings", "doctor", "doctor.checks", "doctor.examine",
        "doctor.facts", "doctor.show", "engines", "engines.cache_files", "engines.cache_gc",
        "engines.cache_start", "engines.checkpoint_files",
        "engines.compile_caches", "engines.hooks", "engines.launch", "engines.layout", "engines.load",
        "engines.metadata", "engines.pin", "engines.rank", "engines.serve_loaded", "engines.sglang",
        "engines.sglang_loader", "engines.snapshot", "engines.start_log", "engines.tiers", "engines.transformers",
        "engines.ray", "engines.ray_serve", "engines.vllm", "engines.vllm_loader", "engines.vllm_modelinfos",
        "node.agent_client", "node.agent_reach", "node.local_nodes", "node.status_client",
        "observe",
        "observe.budget", "observe.fetch_record", "observe.node_report", "observe.progress", "observe.opentelemetry",
        "observe.origin_record", "observe.prometheus", "observe.rate", "observe.trace",
        "observe.units", "runtime", "simulation", "simulation.claims", "simulation.crowd", "simulation.origin",
        "simulation.plot", "simulation.report", "simulation.setup", "simulation.wire",
    },
    "testing": {
        "testing", "testing.origins", "testing.require", "testing.stores", "testing.transport_pairs",
        "testing.transports",
    },
}  # fmt: skip
PURE = ["words", "nouns", "policy", "machines"]

# Imports of each folder and flat module, beside its own modules. All may import those in COMMON.
FOLDERS: dict[str, set[str]] = {
    "content": set(),
    "protocol": {"content"},
    "journal": {"content", "protocol"},
    "security": {"content", "protocol"},
    "store": {"content"},
    "hashing": {"content", "store"},
    "transport": {"protocol", "security", "store"},
    "net": {"protocol", "security", "transport"},
    "membership": {"journal", "net", "protocol", "security"},
    "checkpoint": {"content", "hashing", "protocol", "store"},
    "origin": {"checkpoint", "content"},
    "peers": {"content", "journal", "net", "protocol", "security", "transport"},
    "transfer": {"content", "hashing", "journal", "peers", "protocol", "store", "transport", "origin"},
    "node": {
        "checkpoint", "content", "hashing", "journal", "membership", "net", "origin", "peers", "protocol", "security",
        "store", "transfer", "transport",
    },
    "observe": {"content", "journal", "membership", "protocol", "transfer"},
    "dashboard": {"content", "journal", "net", "observe", "protocol", "transfer"},
    "runtime": {"checkpoint", "dashboard", "membership", "net", "node", "observe"},
    "api": {
        "checkpoint", "content", "node", "observe", "origin", "protocol", "runtime", "security", "store", "transfer",
    },
    "agent": {
        "api", "checkpoint", "content", "net", "node", "observe", "origin", "protocol", "store", "transfer",
    },
    "engines": {"api", "checkpoint", "content", "hashing", "node", "observe", "protocol", "runtime", "store"},
    "doctor": {
        "checkpoint", "content", "engines", "journal", "net", "node", "observe", "protocol", "runtime", "security",
    },
    "simulation": {"content", "node", "peers", "protocol", "transfer"},
    "": {"api", "engines"},  # the package itself, which imports these two on first use of their names
    "cli": {
        "", "agent", "api", "checkpoint", "content", "dashboard", "doctor", "engines", "journal", "net", "node",
        "observe", "origin", "protocol", "runtime", "security", "simulation", "store", "transfer",
    },
    "__main__": {"cli"},
    "testing": {"content", "hashing", "net", "origin", "store", "transport"},
}  # fmt: skip
COMMON = {"errors", "settings"}
FLAT = {"", "__main__", "errors", "journal", "runtime", "settings"}
VERSION_ONLY = {
    "origin.http",
    "doctor.examine",
    "node.agent_reach",
    "node.node",
    "runtime",
}  # may import `__version__` from the package itself

# The modules that may import each third-party package.
HOMES: dict[str, set[str]] = {
    "aiohttp": {"net.websocket", "net.link", "net.http_pages", "net.http_server", "net.probe_listener", "agent.face"},
    "ifaddr": {"net.cards"},
    "cryptography": {
        "security.datagram_seal",
        "security.cluster_key",
        "security.certificates",
        "security.signatures",
        "security.model_signature",
    },
    "zeroconf": {"net.discovery"},
    "xxhash": {"hashing.cpu", "hashing.cuda"},
    "blake3": {"hashing.cpu"},
    "torch": {
        "api.want",
        "store.cuda",
        "engines.compile_caches",
        "engines.snapshot",
        "engines.sglang_loader",
        "engines.vllm_loader",
        "hashing.cuda",
        "store.casting",
        "store.targets",
        "store.tensor_layout",
        "store.memory_store",
        "store.tensor_source",
        "store.tensors",
        "store.torch_types",
        "transport.nccl",
        "transport.torch_distributed",
    },
    "transformers": {"engines.transformers"},
    "ray": {"engines.ray", "engines.ray_serve"},
    "vllm": {"engines.vllm", "engines.vllm_loader"},
    "sglang": {"engines.sglang", "engines.sglang_loader"},
    "prometheus_client": {"observe.prometheus"},
    "rich": {
        "cli.agent",
        "cli.kept",
        "doctor.show",
        "cli.replay",
        "cli.status_table",
        "cli.status_watch",
        "cli.verify",
        "cli.progress",
        "cli.demo",
        "cli.simulate",
    },
    "matplotlib": {"simulation.plot"},
    "obstore": {"origin.objects"},
    "hf_xet": {"origin.xet"},
    "numpy": {
        "content.bitfield",
        "security.record_seal",
        "transfer.origin_rate",
        "transfer.origin_reads",
        "transfer.scheduler",
        "transfer.superseed",
        "store.cuda",
        "transfer.download",
        "hashing.cuda",
        "store.tensor_layout",
        "transport.torch_distributed",
        "cli.demo",
    },
    "msgspec": {
        "agent.cache",
        "agent.face",
        "protocol.agent_messages",
        "checkpoint.blob_check",
        "checkpoint.kept",
        "checkpoint.proven",
        "content.commit",
        "content.manifest",
        "store.part",
        "content.safetensors_header",
        "protocol.messages",
        "protocol.packets",
        "security.model_signature",
        "checkpoint.digest_cache",
        "checkpoint.signature_file",
        "engines.cache_start",
        "engines.checkpoint_files",
        "engines.compile_caches",
        "engines.metadata",
        "engines.start_log",
        "dashboard.server",
        "dashboard.member_report",
        "observe.budget",
        "observe.trace",
    },
}
LAZY = {
    "hf_xet",
    "matplotlib",
    "obstore",
    "prometheus_client",
    "ray",
    "sglang",
    "torch",
    "transformers",
    "vllm",
    "zeroconf",
}  # never at a module's top
INSIDE = {
    "engines.snapshot",
    "engines.sglang_loader",
    "engines.vllm_loader",
    "engines.ray_serve",
}  # imported by an engine, which has imported these packages
WORLDLY = {"asyncio", "socket", "threading", "time", "os", "subprocess", "concurrent", "secrets", "http", "select"}
TIME_OF_DAY = {
    "agent.cache", "cli.agent",
    "checkpoint.blob_check", "checkpoint.digest_cache", "engines.cache_gc", "net.host_environment",
    "observe.opentelemetry",
    "origin.xet", "security.certificates",
}  # fmt: skip
ALLOWED_ANYWAY = {("settings", "os")}  # the environment is one of its sources


MODULES = modules(ROOT)
ROW_OF = {module: row for row, members in ROWS.items() for module in members}
FOLDER_OF = {module: module.partition(".")[0] for module in MODULES}


def tree_of(module: str) -> ast.Module:
    return imports.tree_of(MODULES[module])


def nodes_of(module: str) -> tuple[ast.AST, ...]:
    return imports.nodes_of(MODULES[module])


@functools.cache
def imports_of(module: str) -> set[str]:
    """Dotted names of all imports of a module."""
    return imported(statements(tree_of(module)))


def own_imports(module: str) -> set[str]:
    """Modules of the package that a module imports."""
    found = set()
    for name in imports_of(module):
        package, _, rest = name.partition(".")
        if package != "swarm" or (rest == "__version__" and module in VERSION_ONLY):
            continue
        # `from swarm.errors import SwarmError` names a module and its class.
        found.add(rest if rest in MODULES else rest.rpartition(".")[0])
    return found - {module}


def packages(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_is_every_module_in_the_table() -> None:
    assert set(ROW_OF) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_does_a_module_import_from_rows_above_only(module: str) -> None:
    """Rows above its own, or its own row."""
    order = list(ROWS)
    above = {other for other, row in ROW_OF.items() if order.index(row) < order.index(ROW_OF[module])}
    level = {other for other, row in ROW_OF.items() if row == ROW_OF[module]}
    assert own_imports(module) <= above | level


def test_which_folders_does_a_folder_import() -> None:
    found: dict[str, set[str]] = {folder: set() for folder in FOLDERS}
    for module in MODULES:
        if FOLDER_OF[module] not in COMMON:
            others = {FOLDER_OF[other] for other in own_imports(module)}
            found[FOLDER_OF[module]] |= others - {FOLDER_OF[module]} - COMMON
    assert found == FOLDERS


def test_does_no_folder_import_another_in_a_circle() -> None:
    """The table is written in an order in which each line needs only lines before it."""
    before = set[str]()
    for folder, needs in FOLDERS.items():
        assert needs <= before, folder
        before.add(folder)


def test_what_is_flat() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert {module for module in MODULES if "." not in module} - folders == FLAT


def test_are_there_no_circles() -> None:
    open_, done = list[str](), set[str]()

    def visit(module: str) -> None:
        assert module not in open_, f"{' -> '.join(open_)} -> {module}"
        if module not in done:
            open_.append(module)
            for other in sorted(own_imports(module) - {""}):  # the package imports `api` on first use
                visit(other)
            done.add(open_.pop())

    for module in MODULES:
        visit(module)


@pytest.mark.parametrize("module", MODULES)
def test_does_each_third_party_package_live_in_one_room(module: str) -> None:
    outside = packages(imports_of(module)) - sys.stdlib_module_names - {"swarm"}
    assert outside <= {package for package, homes in HOMES.items() if module in homes}


@pytest.mark.parametrize("package", sorted(LAZY))
def test_are_heavy_packages_imported_when_they_are_needed_only(package: str) -> None:
    for module in HOMES[package] - INSIDE:
        top = (node for node in tree_of(module).body if isinstance(node, ast.Import | ast.ImportFrom))
        assert package not in packages(imported(iter(top)))
        assert package in packages(imports_of(module))


@pytest.mark.parametrize("module", [module for row in PURE for module in sorted(ROWS[row])])
def test_is_the_core_pure(module: str) -> None:
    tree = tree_of(module)
    worldly = packages(imports_of(module)) & WORLDLY
    assert worldly <= {package for owner, package in ALLOWED_ANYWAY if owner == module}
    assert randomness(tree) <= {"Random"}  # a type for the generator that is passed in
    assert not [node for node in nodes_of(module) if isinstance(node, ast.Call) and randomness(node.func)]
    assert not [node for node in nodes_of(module) if isinstance(node, ast.Await | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("module", MODULES)
def test_does_nothing_depend_on_global_randomness_or_on_the_time_of_day(module: str) -> None:
    tree = tree_of(module)
    assert randomness(tree) <= {"Random", "SystemRandom"}
    if ROW_OF[module] not in ("world", "drivers", "faces"):
        assert "time" not in packages(imports_of(module))
    # manifest_builder and cache_gc compare times of files with the clock that made them; certificates, seals and spans
    # carry the time of day, as tokens of xet do
    if module not in TIME_OF_DAY:
        assert not {"time", "time_ns"} & used(tree, "time")
    if module.startswith("simulation"):
        assert not {"time", "secrets"} & packages(imports_of(module))


def used(tree: ast.AST, name: str) -> set[str]:
    """Every attribute that is taken of `name`."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == name}


def randomness(tree: ast.AST) -> set[str]:
    """The names used of the `random` module."""
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "random"]
    return used(tree, "random")


@pytest.mark.parametrize("module", MODULES)
def test_does_a_module_say_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(tree_of(module))


@pytest.mark.parametrize("module", MODULES)
def test_does_an_assert_do_no_work(module: str) -> None:
    asserts = [node for node in nodes_of(module) if isinstance(node, ast.Assert)]
    assert not [call for node in asserts for call in ast.walk(node) if isinstance(call, ast.Call | ast.NamedExpr)]


@pytest.mark.parametrize("module", MODULES)
def test_is_there_no_pickle_and_no_drawer_for_everything(module: str) -> None:
    assert not {"pickle", "marshal", "shelve", "dill"} & packages(imports_of(module))
    assert module.rpartition(".")[2] not in {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("module", MODULES)
def test_is_every_decoder_made_with_its_module(module: str) -> None:
    """A decoder made on first use crashes a second thread: msgspec's types are half made meanwhile."""
    calls = [node for node in nodes_of(module) if isinstance(node, ast.Call)]
    decoding = [call for call in calls if ast.unparse(call.func) in ("msgspec.json.decode", "msgspec.msgpack.decode")]
    types = {ast.unparse(word.value) for call in decoding for word in call.keywords if word.arg == "type"}
    assert types <= {"dict[str, Any]"}
    made = {call for call in calls if ast.unparse(call.func).endswith(("json.Decoder", "msgpack.Decoder"))}
    functions = [node for node in nodes_of(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not [call for function in functions for call in ast.walk(function) if call in made]
