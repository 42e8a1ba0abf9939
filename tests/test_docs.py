"""Settings, errors, messages, modules, commands and API are documented, and the documents are true."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import shlex
import tomllib
import typing
from pathlib import Path

import pytest

import swarm
from swarm import errors
from swarm.cli.main import _parser, main
from swarm.protocol import messages
from swarm.settings import Settings
from swarm.simulation.setup import Burst, flag_of
from swarm.transport import tcp

ROOT = Path(swarm.__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for where in ("*.md", "docs/**/*.md", "bench/*.md") for path in ROOT.glob(where)
)
INTERNAL = {"TransportError"}  # never leaves a node: the chunk is asked for elsewhere
ERRORS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.SwarmError) and name in {*swarm.__all__, "PeerError"}
}

MODULES = sorted(
    ".".join(path.relative_to(ROOT / "swarm").with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "swarm").rglob("*.py")
    if path.relative_to(ROOT / "swarm").as_posix() != "__init__.py"
)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def table(name: str, head: str) -> list[list[str]]:
    """The cells of the table whose first heading is `head`."""
    lines = text(name).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def quoted(name: str) -> set[str]:
    """Everything in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text(name)))


def test_has_every_setting_a_row_and_every_row_a_setting() -> None:
    described = {row[0].strip("`") for row in table("docs/operations.md", "setting")}
    assert described == {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_says_the_row_of_a_setting_what_its_help_says(field: dataclasses.Field[object]) -> None:
    (row,) = [row for row in table("docs/operations.md", "setting") if row[0] == f"`{field.name}`"]
    assert row[-1] == field.metadata["help"]
    assert bool(row[2]) == field.metadata["flag"]


def test_says_the_row_of_a_flag_of_the_simulation_what_its_help_says() -> None:
    described = {row[0].strip("`"): row[-1] for row in table("docs/simulation.md", "flag")}
    helps = {f"--{flag_of(field)}": field.metadata["help"] for field in dataclasses.fields(Burst)}
    assert {flag: words for flag, words in described.items() if flag in helps} == helps
    assert described.keys() - helps.keys() == {"--runs", "--json", "--trace", "--plot"}


def test_does_the_first_command_of_the_simulation_document_print_what_it_shows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run is a function of its flags, on every machine."""
    command, *shown = text("docs/simulation.md").partition("```\n$ swarm ")[2].partition("\n```")[0].splitlines()
    assert main(shlex.split(command)) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown


@pytest.mark.parametrize("message", typing.get_args(messages.AnyMessage), ids=lambda message: message.__name__)
def test_is_every_message_described(message: type[messages.Message]) -> None:
    assert message.__name__ in quoted("docs/protocol.md")


def test_are_the_versions_of_the_protocol_the_present_ones() -> None:
    described = {row[0]: row[1] for row in table("docs/protocol.md", "where")}
    assert described["`protocol` of `Hello`"] == str(messages.PROTOCOL)
    assert described["preamble of a session"] == str(tcp.VERSION)
    assert f"version: u8 = {tcp.VERSION}" in text("docs/protocol.md")


@pytest.mark.parametrize("name", sorted(ERRORS - INTERNAL))
def test_is_every_error_described(name: str) -> None:
    assert name in quoted("docs/operations.md") | {"SwarmError"}


@pytest.mark.parametrize("module", MODULES)
def test_is_every_module_in_the_tree(module: str) -> None:
    folder, _, name = module.rpartition(".")
    if not folder and (ROOT / "swarm" / module).is_dir():
        folder, name = module, ""
    ((purpose, names),) = re.findall(rf"^    {folder or 'swarm'}/ +(.+?): (.+)$", text("ARCHITECTURE.md"), re.MULTILINE)
    assert name in {"", *names.split()}
    assert len(purpose.split()) > 1


def test_is_every_module_in_the_tree_there() -> None:
    lines = re.findall(r"^    (\w+)/ +.+?: (.+)$", text("ARCHITECTURE.md"), re.MULTILINE)
    named = {
        f"{folder}.{name}".removeprefix("swarm.") for folder, names in lines for name in names.split() if name != "|"
    }
    packages = {path.parent.name for path in (ROOT / "swarm").glob("*/__init__.py")}
    assert named == set(MODULES) - packages


def test_is_the_architecture_one_page() -> None:
    assert len(text("ARCHITECTURE.md").splitlines()) <= 80


def test_is_every_decision_in_the_list() -> None:
    listed = re.findall(r"\]\((\d{4}-[a-z0-9-]+\.md)\)", text("docs/decisions/README.md"))
    assert listed == sorted(path.name for path in (ROOT / "docs/decisions").glob("[0-9]*.md"))


def test_has_every_exit_code_its_row() -> None:
    codes = {int(row[0]) for row in table("docs/operations.md", "exit code")}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SwarmError)]
    assert {kind.exit_code for kind in kinds} - {errors.SwarmError.exit_code} <= codes


@pytest.mark.parametrize("program", sorted(path.stem for path in (ROOT / "bench").glob("*.py")))
def test_is_every_benchmark_listed(program: str) -> None:
    assert program in " ".join(quoted("bench/README.md")).replace("/", " ").replace(".", " ").split()


@pytest.mark.parametrize("row", table("docs/operations.md", "you see"), ids=lambda row: row[0])
def test_does_a_symptom_quote_the_message_that_is_logged(row: list[str]) -> None:
    sources = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "swarm").rglob("*.py"))
    for quote in re.findall(r"`([^`]*\.\.\.[^`]*)`", row[0]):
        for piece in quote.split("..."):
            assert piece.strip() in sources, piece


@pytest.mark.parametrize("row", table("docs/limits.md", "limit"), ids=lambda row: row[0].strip("`"))
def test_is_a_limit_what_the_document_says(row: list[str]) -> None:
    module, _, name = row[0].strip("`").rpartition(".")
    assert getattr(importlib.import_module(f"swarm.{module}"), name) == ast.literal_eval(row[1])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_does_every_link_between_documents_lead_somewhere(name: str) -> None:
    for target, _, section in re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?\)", text(name)):
        if "://" not in target:
            path = (ROOT / name).parent.joinpath(target) if target else ROOT / name
            assert path.exists(), target
            if section:
                assert section in anchors(path.read_text(encoding="utf-8")), f"{target}#{section}"


@pytest.mark.parametrize("name", sorted(set(DOCUMENTS) - {"CHANGELOG.md"}))
def test_is_every_path_that_is_named_there(name: str) -> None:
    """But for the folder that CONTRIBUTING.md announces."""
    folders = ("swarm/", "tests/", "bench/", "docs/", "examples/", ".ci/")
    paths = {said for said in quoted(name) if said.startswith(folders) and re.fullmatch(r"[\w./-]+", said)}
    assert {path for path in paths if not (ROOT / path).exists()} <= {"swarm/origin/"}


def anchors(document: str) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", document, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(name: str, language: str) -> list[str]:
    """The contents of a document's fenced blocks in one language; "" is a shell."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text(name), re.MULTILINE | re.DOTALL)
    return [block for said, block in blocks if said == language]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_does_every_python_block_compile(name: str) -> None:
    for block in code(name, "python"):
        compile(block, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_can_every_command_be_parsed(name: str) -> None:
    for block in code(name, ""):
        for line in block.splitlines():
            if line.startswith("swarm "):
                _parser().parse_args(shlex.split(line, comments=True)[1:])


def test_are_the_commands_of_readme_those_that_ci_runs() -> None:
    (passes,) = [block.strip() for block in code("README.md", "") if "pytest" in block]
    assert passes in text(".ci/run").splitlines()


@pytest.mark.parametrize("name", swarm.__all__)
def test_is_every_public_name_described(name: str) -> None:
    headings = re.findall(r"^## `?([\w]+)`?$", text("docs/python.md"), re.MULTILINE)
    assert name in {*headings, *(row[0].strip("`") for row in table("docs/python.md", "error"))}


@pytest.mark.parametrize("row", table("docs/python.md", "error"), ids=lambda row: row[0].strip("`"))
def test_has_an_error_the_fields_that_are_described(row: list[str]) -> None:
    tree = ast.parse(text("swarm/errors.py"))
    (kind,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == row[0].strip("`"))
    stored = (node for node in ast.walk(kind) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    assigned = {node.attr for node in stored}
    assert set(re.findall(r"`(\w+)`", row[2])) == assigned | ({"exit_code"} if kind.name == "SwarmError" else set())


@pytest.mark.parametrize("row", table("docs/python.md", "argument"), ids=lambda row: row[0].strip("`"))
def test_has_fetch_the_argument_that_is_described(row: list[str]) -> None:
    default = inspect.signature(swarm.fetch).parameters[row[0].strip("`")].default
    assert row[1] == ("" if default is inspect.Parameter.empty else f"`{json.dumps(default)}`".replace("null", "None"))


def test_are_the_oldest_versions_that_are_tested_those_that_are_allowed() -> None:
    project = tomllib.loads(text("pyproject.toml"))["project"]
    allowed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    floors = dict(each.split(">=") for each in allowed if ">=" in each)
    tested = dict(line.split("==") for line in text(".ci/oldest.txt").splitlines() if not line.startswith("#"))
    assert tested.keys() >= {each.split(">=")[0] for each in project["dependencies"]}
    for name, version in tested.items():
        assert version.startswith(floors[name]), name
