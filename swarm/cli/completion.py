"""Completion in shells: `swarm completion SHELL` prints a script, which asks `swarm completion SHELL -- WORDS`.

WORDS are those after `swarm`, the last of them the word that is being typed. The answer has a line for each word that
may stand there, with its help after a tab, and the line `FILES` where the shell completes names of files. Everything
comes from the parser of the command line: a new flag completes by itself.

Must not know: which commands and flags there are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence

FILES = ":files"  # a line that is no word of the command line
_PATHS = ("PATH", "FILE", "DIR", "DEST")  # in metavars
_IDS = "MODEL_ID"


def answer(parsers: Mapping[str, argparse.ArgumentParser], words: Sequence[str], ids: Iterable[str]) -> list[str]:
    """The lines for these words. `parsers`: of each command, by name; `ids`: models of this machine."""
    before, typed = list(words[:-1]), words[-1] if words else ""
    if not before:
        found = {name: parser.description or "" for name, parser in parsers.items()}
    elif before[0] in parsers:
        found = dict(_after(parsers[before[0]], before[1:], typed, ids))
    else:
        found = {}
    return [f"{word}\t{about}".rstrip("\t") for word, about in found.items() if word.startswith(typed) or word == FILES]


def _after(
    parser: argparse.ArgumentParser, before: Sequence[str], typed: str, ids: Iterable[str]
) -> Iterator[tuple[str, str]]:
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    places = [action for action in parser._actions if not action.option_strings]
    used: set[argparse.Action] = set()
    value_of: argparse.Action | None = None
    for word in before:
        if value_of is not None:
            value_of = None
        elif word == "--" or (places and places[0].nargs == argparse.REMAINDER and not word.startswith("-")):
            yield FILES, ""  # the rest belongs to another program
            return
        elif word.startswith("-"):
            action = flags.get(word.partition("=")[0])
            used |= {action} if action else set()
            value_of = action if action and action.nargs != 0 and "=" not in word else None
        elif places and places[0].nargs not in ("*", "+"):
            places.pop(0)
    if value_of is not None:
        yield from _values(value_of, ids)
        return
    if places and not typed.startswith("-"):
        yield from _values(places[0], ids)
    if typed.startswith("-") or not places:
        for action in parser._actions:
            if action.option_strings and (action not in used or isinstance(action, argparse._AppendAction)):
                shown = action.option_strings if typed.startswith("-") else action.option_strings[-1:]
                for flag in shown:
                    yield flag, _help(parser, action)


def _values(action: argparse.Action, ids: Iterable[str]) -> Iterator[tuple[str, str]]:
    metavar = " ".join([action.metavar] if isinstance(action.metavar, str) else action.metavar or ())
    for choice in action.choices or ():
        yield str(choice), ""
    if _IDS in metavar:
        yield from ((each, "") for each in ids)
    if any(each in metavar for each in _PATHS):
        yield FILES, ""


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return " ".join(parser._get_formatter()._expand_help(action).split()) if action.help else ""


SCRIPTS = {
    "bash": r"""_swarm() {
    local line typed=${COMP_WORDS[COMP_CWORD]} IFS=$'\n'
    COMPREPLY=()
    for line in $(swarm completion bash -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2> /dev/null); do
        if [[ $line == :files ]]; then
            compopt -o filenames
            COMPREPLY+=($(compgen -f -- "$typed"))
        else
            COMPREPLY+=("${line%%$'\t'*}")
        fi
    done
}
complete -F _swarm swarm
""",
    "zsh": r"""#compdef swarm
_swarm() {
    local line files
    local -a found
    for line in "${(@f)$(swarm completion zsh -- "${(@)words[2,CURRENT]}" 2> /dev/null)}"; do
        if [[ $line == :files ]]; then
            files=1
        elif [[ -n $line ]]; then
            found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
        fi
    done
    (( $#found )) && _describe -V swarm found
    [[ -n $files ]] && _files
}
if [[ $funcstack[1] == _swarm ]]; then
    _swarm "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
    compdef _swarm swarm
fi
""",
    "fish": r"""function __swarm_words
    set -l words (commandline -opc)
    set -l typed (commandline -ct)
    for line in (swarm completion fish -- $words[2..] "$typed" 2> /dev/null)
        if test "$line" = :files
            __fish_complete_path "$typed"
        else
            echo $line
        end
    end
end
complete -c swarm -f -a '(__swarm_words)'
""",
}
