"""The prose of docstrings, comments, help texts and documents says the field's nouns.

    python tests/test_prose.py [PATH...]      # vague words by file, worst first; swarm/ by default

A vague word stands where the field's noun (peer, seed, newcomer, member, caller, chunk) says more. Their part of all
words was 4.2 % before they were counted; h11 has 0.4 %, memberlist 0.3 %.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from imports import nodes_of

ROOT = Path(__file__).parent.parent
VAGUE = re.compile(
    r"\b(who|whom|whose|whoever|what|whatever|one|ones|somebody|nobody|everybody|anybody)\b", re.IGNORECASE
)
VAGUE_PART_MAX = 0.01
FORBIDDEN = re.compile(r"\b(whoever|somebody|nobody|everybody)\b", re.IGNORECASE)
SHOWN = 40


@dataclass(frozen=True)
class Count:
    """The words of one file, and those of them that are vague or forbidden."""

    path: Path
    words: int
    vague: int
    forbidden: int

    @property
    def part(self) -> float:
        """Vague words over all words."""
        return self.vague / max(1, self.words)


def prose_of(path: Path) -> str:
    """Docstrings and comments of one Python file."""
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found += [ast.get_docstring(node) or "" for node in nodes_of(path) if isinstance(node, described)]
    return "\n".join(found)


def counts(paths: Iterable[Path]) -> list[Count]:
    """A count for each Python file at or below `paths`, worst first."""
    files = sorted(file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py")))
    return sorted(map(count_of, files), key=lambda count: (-count.part, count.path))


@functools.cache
def count_of(file: Path) -> Count:
    """The count of one Python file."""
    text = prose_of(file)
    words, vague, forbidden = (len(re.findall(kind, text)) for kind in (r"[A-Za-z']+", VAGUE, FORBIDDEN))
    return Count(file, words, vague, forbidden)


def help_texts() -> Iterator[tuple[str, str]]:
    """Name and help text of every setting, of every flag of the simulation, and of every option and command."""
    from swarm.cli.main import _parser
    from swarm.settings import Settings
    from swarm.simulation.setup import Burst

    for kind in (Settings, Burst):
        for field in dataclasses.fields(kind):
            yield field.name, field.metadata["help"]
    waiting = [_parser()]
    while waiting:
        parser = waiting.pop()
        yield parser.prog, parser.description or ""
        for action in parser._actions:
            yield f"{parser.prog} {action.dest}", action.help or ""
            if isinstance(action, argparse._SubParsersAction):
                yield from ((f"{parser.prog} {choice.dest}", choice.help or "") for choice in action._choices_actions)
                waiting += action.choices.values()


def documents() -> list[Path]:
    """The Markdown that users and contributors read; the changelog quotes what was."""
    names = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")
    return [*(ROOT / name for name in names), *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    """Prints the worst files, and all forbidden words of documents and help texts."""
    found = counts([Path(argument) for argument in sys.argv[1:]] or [ROOT / "swarm"])
    for count in found[:SHOWN]:
        where = count.path.resolve()
        shown = where.relative_to(ROOT) if where.is_relative_to(ROOT) else where
        print(f"{count.part:6.1%} {count.vague:4} of {count.words:5}  {shown}")
    words, vague, forbidden = (sum(getattr(count, kind) for count in found) for kind in ("words", "vague", "forbidden"))
    print(f"{vague / max(1, words):.2%} of {words} words are vague, {forbidden} forbidden")
    texts = [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in documents()]
    for name, text in (*texts, *help_texts()):
        if said := FORBIDDEN.findall(text):
            print(f"{name}: {' '.join(said)}")
    return 0


def test_are_few_words_of_the_package_vague() -> None:
    found = counts([ROOT / "swarm"])
    part = sum(count.vague for count in found) / sum(count.words for count in found)
    assert part < VAGUE_PART_MAX, "\n".join(
        f"{count.part:.1%} {count.path.relative_to(ROOT)}" for count in found[:SHOWN]
    )


def test_has_no_docstring_or_comment_a_forbidden_word() -> None:
    assert [count.path for count in counts([ROOT / "swarm"]) if count.forbidden] == []


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_has_no_document_a_forbidden_word(path: Path) -> None:
    assert FORBIDDEN.findall(path.read_text(encoding="utf-8")) == []


def test_has_no_help_text_a_forbidden_word() -> None:
    assert {name: text for name, text in help_texts() if FORBIDDEN.search(text)} == {}


if __name__ == "__main__":
    sys.exit(main())
