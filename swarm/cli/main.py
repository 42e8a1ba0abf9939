"""The `swarm` command: flags, log format and exit codes. Flags of settings are made from the fields of `Settings`.

An error prints one line and exits with its `exit_code`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import json
import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from swarm import __version__
from swarm.cli import commands, completion, manual, signals, stdio
from swarm.errors import LINE_CHARS_MAX, SwarmError, clean
from swarm.settings import NEAR, Settings
from swarm.simulation.setup import Burst, flag_of

OUTPUT_LOST = 1
USAGE = 2  # exit code of a wrong command line
GROUPS = {
    "get models": ("fetch", "pull", "run", "storage"),
    "serve models": ("serve", "agent"),
    "look at a swarm": ("status", "ls", "verify", "doctor", "replay"),
    "keep and sign": ("pin", "rm", "keygen", "sign"),
    "try out": ("demo", "simulate"),
    "shell": ("completion", "help"),
}
METAVARS = {
    "advertise": "ADDRESS[:PORT]",
    "key_file": "PATH",
    "listen": "HOST[:PORT]",
    "metrics_listen": "HOST:PORT",
    "origin_limit": "RATE",
    "signed_by": "KEY",
    "upload_limit": "RATE",
    "timeout_s": "SECONDS",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code. Without `argv` the command owns the process."""
    if argv is None:
        stdio.ensure_utf8_names()
    with stdio.guarded() as output:
        arguments = sys.argv[1:] if argv is None else list(argv)
        parser = _parser()
        _refuse_unknown(parser, arguments)
        options, unknown = parser.parse_known_args(arguments)
        if unknown:  # argparse would show the usage of `swarm` instead of the command's
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_JsonLines() if options.log_json else _Lines())
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        logging.getLogger("swarm").setLevel(_level(options))
        code = _run(options)
        output.flush()
        if lost := stdio.complaint(output):
            print(f"swarm: {lost}", file=sys.stderr)
            if options.run not in (commands.fetch, commands.serve):  # their work is not the text
                code = code or OUTPUT_LOST
    if argv is not None:
        signals.disarm()
    return code


def _level(options: argparse.Namespace) -> int:
    return logging.DEBUG if options.verbose else logging.WARNING if options.quiet else logging.INFO


def _run(options: argparse.Namespace) -> int:
    try:
        with signals.interrupting():
            return int(options.run(options) or 0)
    except SwarmError as error:
        print(f"swarm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(signals.INTERRUPTED_LINE, file=sys.stderr)
        return signals.INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line on one line, and where its help is."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {clean(message, chars_max=LINE_CHARS_MAX)}\nsee `{self.prog} --help`", file=sys.stderr)
        sys.exit(USAGE)


def _refuse_unknown(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Exits with a line that names an unknown command, or the first unknown flag of a command.

    argparse lists all commands, and names missing arguments first.
    """
    names = _commands(parser)
    for word in arguments[: 2 if arguments[:1] == ["help"] else 1]:
        if not word.startswith("-") and word not in names:
            parser.error(f"no command {word!r}{_meant(word, names)}")
    command = names.get(arguments[0]) if arguments else None
    if command is None or arguments[0] == "run":  # the rest of `run` belongs to the engine
        return
    flags = [flag for action in command._actions for flag in action.option_strings]
    for argument in arguments[1:]:
        flag = argument.partition("=")[0]
        if flag == "--":
            return
        if flag.startswith("--") and not any(known.startswith(flag) for known in flags):
            command.error(f"unrecognized arguments: {flag}{_meant(flag, flags)}")


def _meant(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, 1, NEAR)
    return f"; did you mean {near[0]}?" if near else ""


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command by name, in the order of `GROUPS`."""
    found = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return {name: found.choices[name] for name in itertools.chain(*GROUPS.values()) if name in found.choices}


def _listed(abouts: Mapping[str, str]) -> str:
    """The commands by groups, each with its help."""
    width = max(map(len, abouts)) + 2
    groups = (
        "\n".join([f"{title}:", *(f"  {name:{width}}{abouts[name]}" for name in names)])
        for title, names in GROUPS.items()
    )
    return "\n\n".join([*groups, "`swarm help COMMAND` shows the help of a command."])


def _path(text: str) -> Path:
    """A path of the command line; an empty one, of a shell variable without a value, is not the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; say . for the working directory")
    return Path(text)


class _Lines(logging.Formatter):
    """The message on one line, and a traceback on its own."""

    def __init__(self) -> None:
        super().__init__("%(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name of logging
        return clean(record.message, chars_max=LINE_CHARS_MAX)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the name of logging
        return "\n".join(clean(line, chars_max=LINE_CHARS_MAX) for line in super().formatException(ei).splitlines())


class _JsonLines(logging.Formatter):
    """A JSON object a line: `time` (UTC), `level`, `logger`, `message`, and `error` with a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": clean(record.getMessage(), chars_max=LINE_CHARS_MAX),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def _parser() -> _Parser:
    parser = _Parser(
        "swarm",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="Peer-to-peer distribution of model weights.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"swarm {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="store_true", help="log in detail")
    common.add_argument("-q", "--quiet", action="store_true", help="log warnings only, and show no progress")
    common.add_argument("--log-json", action="store_true", help="log JSON objects, one a line")
    traced = _Parser(add_help=False)
    traced.add_argument("--trace", type=_path, metavar="FILE", help="write the journal of the node as JSON lines")
    subparsers = parser.add_subparsers(required=True, prog="swarm", metavar="COMMAND", help=argparse.SUPPRESS)
    abouts: dict[str, str] = {}

    def command(
        run: Callable[[argparse.Namespace], int | None], about: str, *parents: _Parser, name: str = ""
    ) -> argparse.ArgumentParser:
        name = name or run.__name__
        abouts[name] = about
        made = subparsers.add_parser(name, parents=[common, *parents], description=_sentence(about))
        made.set_defaults(run=run, parser=made)
        return made

    serve = command(commands.serve, "serve a model to peers", traced)
    serve.add_argument(
        "model",
        nargs="?",
        metavar="PATH|MODEL_ID",
        help="model directory, or model of the Hugging Face cache; with --origin the directory to fill",
    )
    serve.add_argument(
        "--origin",
        dest="source",
        metavar="ADDRESS",
        help="read the model from there: org/model, hf://, https://, s3://, gs://, az://, file:///",
    )
    serve.add_argument(
        "--model-id", metavar="ID", help="id in the swarm; by default the hub's id or the directory name"
    )
    serve.add_argument("--revision", metavar="R", help="revision of the cached model, or a label for a directory")
    _add_settings(serve, without={"timeout_s", "wait", "origin"})

    fetch = command(commands.fetch, "fetch a model from peers, or from its origin where none has it", traced)
    fetch.add_argument(
        "model_id",
        metavar="MODEL_ID",
        help="model id, also MODEL_ID@REVISION, or an address: https://HOST/DIR/, file:///DIR",
    )
    fetch.add_argument("--out", type=_path, metavar="DIR", help="directory to fill; by default the Hugging Face cache")
    fetch.add_argument("--digest", metavar="D", help="accept only the artifact with this digest")
    fetch.add_argument("--revision", metavar="R", help="branch, tag, label or commit; also MODEL_ID@R")
    fetch.add_argument(
        "--include", action="append", metavar="PATTERN", help="fetch only files that match, for example '*.json'"
    )
    fetch.add_argument("--exclude", action="append", metavar="PATTERN", help="fetch no files that match")
    fetch.add_argument(
        "--tensors",
        action="append",
        metavar="PATTERN",
        help="of the files with tensors, fetch only those that hold a tensor that matches",
    )
    fetch.add_argument("--json", action="store_true", help="print one JSON object at completion")
    fetch.add_argument("--no-seed", action="store_true", help="exit at completion instead of serving the model")
    _add_settings(fetch)

    storage = command(commands.storage, "fill directories before a server starts, as KServe's storage initializer")
    storage.add_argument(
        "pairs",
        nargs="+",
        metavar="SRC DEST",
        help="hf://org/model[:REVISION], org/model, s3://, gs://, az://, https://, file:// or a path; and a directory",
    )
    _add_settings(storage)

    run = command(commands.run, "start an engine that loads its model from peers")
    run.add_argument("--model-id", metavar="ID", help="id in the swarm; by default the name in the command")
    _add_settings(run, without={"wait"})
    run.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="for example: -- vllm serve org/model"
    )

    agent = command(commands.agent, "run the agent of this machine: one node for all its programs", traced)
    agent.add_argument(
        "--hold", action="append", metavar="ID", help="model to fetch at the start and to keep, also ID@REVISION"
    )
    agent.add_argument(
        "--hub-listen", metavar="HOST:PORT", help="where to answer as the Hugging Face hub; by default 127.0.0.1:7080"
    )
    agent.add_argument("--hub-limit-gb", metavar="GB", help="maximum size of the models that it keeps; unset: no limit")
    agent.set_defaults(further=("hold", "hub_listen", "hub_limit_gb"))
    _add_settings(agent, without={"timeout_s", "wait"})

    pull = command(commands.pull, "have the agent of this machine fetch a model")
    pull.add_argument("model_id", metavar="MODEL_ID", help="model id, also MODEL_ID@REVISION")
    pull.add_argument("--revision", metavar="R", help="branch, tag, label or commit; also MODEL_ID@R")
    pull.add_argument("--digest", metavar="D", help="accept only the artifact with this digest")
    pull.add_argument(
        "--include", action="append", metavar="PATTERN", help="fetch only files that match, for example '*.json'"
    )
    pull.add_argument("--exclude", action="append", metavar="PATTERN", help="fetch no files that match")
    pull.add_argument("--pin", action="store_true", help="keep it whatever else comes")
    pull.add_argument("--timeout", type=float, metavar="SECONDS", help="maximum seconds; unset: unlimited")
    pull.add_argument("--json", action="store_true", help="print one JSON object at completion")

    pin = command(commands.pin, "keep a model in the cache of the agent whatever else comes")
    pin.add_argument("model_id", metavar="MODEL_ID", help="model id, also MODEL_ID@REVISION")
    pin.add_argument("--revision", metavar="R", help="only this revision")
    pin.add_argument("--remove", action="store_true", help="keep it no longer: it may be evicted")

    status = command(commands.status, "show the swarm as a running node sees it")
    status.add_argument(
        "--peer", metavar="HOST[:PORT]", help="node to ask; by default a node of this machine, else one found by mDNS"
    )
    status.add_argument("--key-file", metavar="PATH", help="cluster key, to ask nodes of other machines")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.add_argument("--watch", action="store_true", help="redraw every second, until q or Ctrl-C")

    replay = command(commands.replay, "show the phases and sources of a traced fetch")
    replay.add_argument("trace", type=_path, metavar="FILE", help="file written by --trace")
    replay.add_argument("--json", action="store_true", help="print one JSON object")
    replay.add_argument("--web", action="store_true", help="serve the trace as a dashboard on this machine")
    replay.add_argument(
        "--port", type=_port, default=0, metavar="PORT", help="port of the dashboard; by default a free one"
    )

    doctor = command(commands.doctor, "diagnose why an engine did not load from peers")
    doctor.add_argument("model_id", nargs="?", metavar="MODEL_ID", help="model to look for")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    _add_settings(doctor, without={"timeout_s", "upload_limit", "wait"})

    verify = command(commands.verify, "hash a directory or a cached model again")
    verify.add_argument("what", metavar="PATH|MODEL_ID", help="model directory, or model of the Hugging Face cache")
    verify.add_argument(
        "--model-signature",
        type=_path,
        metavar="KEY",
        help="check model.sig (OpenSSF Model Signing) with this public key",
    )
    verify.add_argument("--digest", metavar="D", help="digest that it must have, or the first digits of it")
    verify.add_argument("--revision", metavar="R", help="revision of the cached model; also MODEL_ID@R")

    ls = command(commands.ls, "list models: in the swarm, and what swarm keeps on this machine")
    ls.add_argument(
        "model_id",
        nargs="?",
        metavar="MODEL_ID",
        help="only this model, also MODEL_ID@REVISION; or the digits of a digest",
    )
    ls.add_argument("--peer", metavar="HOST[:PORT]", help="node to ask; by default a node of this machine")
    ls.add_argument("--key-file", metavar="PATH", help="cluster key, to ask nodes of other machines")
    ls.add_argument("--json", action="store_true", help="print one JSON object")

    rm = command(commands.rm, "remove what swarm wrote into the Hugging Face cache and its own")
    rm.add_argument("model_id", metavar="MODEL_ID", help="model id, also MODEL_ID@REVISION, or the digits of a digest")
    rm.add_argument("--revision", metavar="R", help="only this revision")
    rm.add_argument("--yes", action="store_true", help="do not ask")
    rm.add_argument("--force", action="store_true", help="with --yes: also a model that is pinned")

    keygen = command(commands.keygen, "make a cluster key, which admits nodes to a swarm")
    keygen.add_argument(
        "path", nargs="?", type=_path, default=Path("swarm.key"), metavar="PATH", help="by default %(default)s"
    )

    keygen.add_argument("--publisher", action="store_true", help="make a key for `swarm sign` instead")

    sign = command(commands.sign, "sign a model as its publisher")
    sign.add_argument("model", metavar="PATH|MODEL_ID", help="model directory, or model of the Hugging Face cache")
    sign.add_argument("--key", type=_path, required=True, metavar="FILE", help="key of `swarm keygen --publisher`")
    sign.add_argument("--model-id", metavar="ID", help="id that is signed; by default the one that serve would use")
    sign.add_argument("--revision", metavar="R", help="revision that is signed; by default the commit, if there is one")

    demo = command(commands.demo, "run one seed and three newcomers on this machine")
    demo.add_argument(
        "path", nargs="?", type=_path, metavar="PATH", help="model directory; by default one with random weights"
    )

    simulate = command(commands.simulate, "simulate a cold-start burst")
    for field in dataclasses.fields(Burst):
        about = field.metadata["help"]
        simulate.add_argument(f"--{flag_of(field)}", dest=field.name, metavar=field.metadata["metavar"], help=about)
    simulate.add_argument(
        "--runs", type=int, default=1, metavar="R", help="number of runs, each with the next random seed"
    )
    simulate.add_argument("--json", action="store_true", help="print one JSON object")
    simulate.add_argument("--trace", type=_path, metavar="FILE", help="write every event and action as JSON lines")
    simulate.add_argument(
        "--plot", type=_path, metavar="FILE", help="draw the progress of every newcomer; needs matplotlib"
    )

    def show_help(options: argparse.Namespace) -> None:
        if options.man:
            print(manual.page(parser, _commands(parser), GROUPS, version=__version__), end="")
        else:
            (_commands(parser)[options.topic] if options.topic else parser).print_help()

    def complete(options: argparse.Namespace) -> None:
        words = options.words[options.words[:1] == ["--"] :]
        lines = completion.answer(_commands(parser), words, commands.cached_ids())
        print("\n".join(lines) if options.words else completion.SCRIPTS[options.shell])

    shells = command(complete, "print what makes a shell complete commands, flags and models", name="completion")
    shells.add_argument("shell", choices=[*completion.SCRIPTS])
    shells.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="-- WORDS", help="print what may stand for the last of these words"
    )
    topics = command(show_help, "show the help of a command, or this help", name="help")
    topics.add_argument("topic", nargs="?", choices=[*_commands(parser)], metavar="COMMAND")
    topics.add_argument("--man", action="store_true", help="print the manual page, for `man -l`")
    parser.epilog = _listed(abouts)
    return parser


def _sentence(about: str) -> str:
    return f"{about[:1].upper()}{about[1:]}."


def _add_settings(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    group = parser.add_argument_group("settings", "also in the environment, for example SWARM_LISTEN, or in swarm.toml")
    for setting in dataclasses.fields(Settings):
        if not setting.metadata["flag"] or setting.name in without:
            continue
        flag = setting.name.removesuffix("_s").replace("_", "-")
        text = setting.metadata["help"]
        if setting.default is True:
            group.add_argument(
                f"--no-{flag}", dest=setting.name, action="store_const", const=False, help=f"do not {text}"
            )
        elif setting.default is False:
            group.add_argument(f"--{flag}", dest=setting.name, action="store_const", const=True, help=text)
        elif setting.default == ():
            metavar = METAVARS.get(setting.name, "HOST[:PORT]")
            group.add_argument(
                f"--{flag.removesuffix('s')}", dest=setting.name, action="append", metavar=metavar, help=text
            )
        else:
            group.add_argument(
                f"--{flag}", dest=setting.name, metavar=METAVARS.get(setting.name, flag.upper()), help=text
            )


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is no port from 0 to 65535")
    return port
