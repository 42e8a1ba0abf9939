"""Measures the imports of a tree of `swarm`, so that two commits can be compared.

    python tests/imports.py [TREE...]      # a checkout; this one by default
    git worktree add /tmp/before COMMIT && python tests/imports.py /tmp/before .

The level of a module is the length of its longest import chain: 0 imports no other module of the package. Modules of a
circle share a level. An arrow up leads to a lower row of the tree's own table (ROWS in its tests/test_layers.py), or
from a folder to another folder of its circle. Imports inside functions count, those for type checkers alone do not.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "swarm"


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file, parsed once for all rules that read it."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of that tree, as `ast.walk` yields them."""
    return tuple(ast.walk(tree_of(path)))


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package at `root` by its name within it; '' is the package."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that can run; blocks for type checkers are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from statements(child)


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names of all imports; `from a import b` gives `a.b`."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(names: set[str], known: Mapping[str, Path]) -> set[str]:
    """Modules of the package among dotted names: `from swarm.errors import SwarmError` names a module and its class."""
    own = {name.partition(".")[2] for name in names if name.partition(".")[0] == PACKAGE}
    return {name if name in known else name.rpartition(".")[0] for name in own - {"__version__"}}


def graph(root: Path) -> dict[str, set[str]]:
    """Each module with the modules that it imports. The package itself is left out: it loads its names on first use."""
    known = modules(root)
    trees = {name: tree_of(path) for name, path in known.items()}
    return {name: within(imported(statements(tree)), known) - {name, ""} for name, tree in trees.items() if name}


def circles(arrows: Mapping[str, set[str]]) -> list[set[str]]:
    """Sets of two or more nodes that all reach each other."""
    reached = {node: _reach(arrows, node) for node in arrows}
    found = {frozenset(other for other in reached[node] if node in reached[other]) for node in arrows}
    return [set(circle) for circle in found if len(circle) > 1]


def levels(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """The length of each node's longest chain of arrows; nodes of a circle share it."""
    circle_of = {node: circle for circle in circles(arrows) for node in circle}
    found: dict[str, int] = {}

    def level(node: str) -> int:
        if node not in found:
            here = circle_of.get(node, {node})
            beyond = set[str]().union(*(arrows.get(member, set()) for member in here)) - here
            found.update(dict.fromkeys(here, 1 + max(map(level, sorted(beyond)), default=-1)))
        return found[node]

    for node in sorted(arrows):
        level(node)
    return found


def folders(arrows: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same graph between folders; a flat module is a folder of its own."""
    found: dict[str, set[str]] = {}
    for module, others in arrows.items():
        here = module.partition(".")[0]
        found.setdefault(here, set()).update({other.partition(".")[0] for other in others} - {here})
    return found


def rows(tree: Path) -> dict[str, int]:
    """The row of each module, counted from the top, by the ROWS table of a tree's own tests; {} without that table."""
    path = tree / "tests" / "test_layers.py"
    body = tree_of(path).body if path.exists() else []
    for node in body:
        if isinstance(node, ast.AnnAssign) and node.value and ast.unparse(node.target) == "ROWS":
            table = ast.literal_eval(node.value)
            return {module: number for number, row in enumerate(table.values()) for module in row}
    return {}


def _reach(arrows: Mapping[str, set[str]], start: str) -> set[str]:
    seen, waiting = set[str](), [start]
    while waiting:
        fresh = arrows.get(waiting.pop(), set()) - seen
        seen |= fresh
        waiting += fresh
    return seen


def report(tree: Path) -> str:
    """The measurements of one tree as text."""
    root = tree / PACKAGE
    arrows = graph(root)
    between = folders(arrows)
    by_level, row_of = levels(arrows), rows(tree)
    flat = [module for module in arrows if "." not in module and not (root / module).is_dir()]
    lines = [
        f"{len(arrows)} modules, {len(flat)} of them flat, {len(between) - len(flat)} folders",
        f"{sum(map(len, arrows.values()))} imports between modules, {sum(map(len, between.values()))} between folders",
        f"{1 + max(by_level.values())} levels of modules, {1 + max(levels(between).values())} of folders",
    ]
    for number in range(1 + max(by_level.values())):
        here = " ".join(sorted(module for module in by_level if by_level[module] == number))
        lines += [f"  {number:2} {here}"]
    for kind, found in (("modules", circles(arrows)), ("folders", circles(between))):
        lines.append(f"{len(found)} circles of {kind}")
        lines += [f"  {' '.join(sorted(circle))}" for circle in sorted(found, key=sorted)]
    circle_of = {folder: number for number, circle in enumerate(circles(between)) for folder in circle}
    up = []
    for module, other in sorted((module, other) for module, others in arrows.items() for other in others):
        ours, theirs = module.partition(".")[0], other.partition(".")[0]
        around = ours != theirs and ours in circle_of and circle_of[ours] == circle_of.get(theirs)
        if around or row_of.get(module, 0) < row_of.get(other, 0):
            up.append(f"  {module} -> {other}")
    return "\n".join([*lines, f"{len(up)} arrows up", *up])


if __name__ == "__main__":
    for name in sys.argv[1:] or [str(Path(__file__).parent.parent)]:
        print(f"{name}\n{report(Path(name))}")
