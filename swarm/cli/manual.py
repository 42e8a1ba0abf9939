"""The manual page of `swarm`, in the language of man(7), made from the parser of the command line.

Must not know: which commands and flags there are.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence

from swarm import errors

SHARED = 3  # commands
EXIT_CODES = {0: "success", 1: "a problem was found, or output was lost", 130: "interrupted"}


def page(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, argparse.ArgumentParser],
    groups: Mapping[str, Sequence[str]],
    *,
    version: str,
) -> str:
    """The source of swarm(1). `groups`: the names of commands, by the heading under which they come."""
    return "\n".join([*_lines(parser, commands, groups, version), ""])


def _lines(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, argparse.ArgumentParser],
    groups: Mapping[str, Sequence[str]],
    version: str,
) -> Iterator[str]:
    yield f'.TH SWARM 1 "" "swarm {version}" "User Commands"'
    yield from (".SH NAME", f"swarm \\- {_text((parser.description or '').rstrip('.').lower())}")
    yield from (".SH SYNOPSIS", ".B swarm", "\\fICOMMAND\\fR [\\fIargument\\fR ...]")
    shared: dict[str, argparse.Action] = {}
    titles = {names[0]: title for title, names in groups.items()}
    for name, command in commands.items():
        if name in titles:
            yield f".SH {_text(titles[name].upper())}"
        yield f".SS {_text(_usage(command))}"
        yield _text(_sentence(command.description or ""))
        for action in command._actions:
            if action.option_strings and _is_shared(action, commands):
                shared[action.option_strings[-1]] = action
            elif action.help:
                yield from _described(command, action)
    yield from (".SH OPTIONS", "These mean the same with every command that has them; `swarm help COMMAND` lists them.")
    for action in shared.values():
        yield from _described(parser, action)
    yield from (".SH ENVIRONMENT", "Every setting is also a variable, for example SWARM_LISTEN for \\-\\-listen,")
    yield "and a key of swarm.toml. Flags win over variables, variables over the file."
    yield ".SH EXIT STATUS"
    for code, meaning in sorted((EXIT_CODES | _failures()).items()):
        yield from (".TP", f".B {code}", _text(_sentence(meaning)))


def _failures() -> dict[int, str]:
    """The exit codes of errors, and what they mean by the first sentence of their classes."""
    found: dict[int, str] = {}
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.SwarmError) and "exit_code" in vars(error):
            found.setdefault(error.exit_code, (error.__doc__ or "").split("\n\n")[0].split(". ")[0])
    return {code: about for code, about in found.items() if code not in EXIT_CODES}


def _described(parser: argparse.ArgumentParser, action: argparse.Action) -> Iterator[str]:
    formatter = parser._get_formatter()
    value = "" if action.nargs == 0 else f" \\fI{_text(_value(action))}\\fR"
    names = ", ".join(f"\\fB{_text(flag)}\\fR" for flag in action.option_strings)
    yield from (".TP", names + value if names else value.strip(), _text(_sentence(formatter._expand_help(action))))


def _value(action: argparse.Action) -> str:
    return action.metavar if isinstance(action.metavar, str) else action.dest


def _is_shared(action: argparse.Action, commands: Mapping[str, argparse.ArgumentParser]) -> bool:
    """Whether a flag has the same help in several commands: it is described once."""
    flag, about = action.option_strings[-1], action.help
    actions = [each for command in commands.values() for each in command._actions]
    return sum(flag in each.option_strings and each.help == about for each in actions) >= SHARED


def _usage(command: argparse.ArgumentParser) -> str:
    """The command with its positional arguments; flags are described below it."""
    words = re.sub(r"\[(?:-[^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\s*", "", " ".join(command.format_usage().split()))
    last = command._actions[-1]
    rest = _value(last) if last.nargs == argparse.REMAINDER else "..."
    return re.sub(r" \.\.\.$", f" {rest}", words.removeprefix("usage: "))


def _sentence(text: str) -> str:
    words = " ".join(text.split())
    begun = words[:1].upper() + words[1:] if re.match(r"[a-z-]+[,;]? ", words) else words
    return f"{begun.rstrip('.')}." if words else ""


def _text(text: str) -> str:
    """Text in which man(7) sees neither escapes nor requests."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
