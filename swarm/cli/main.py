"""The `swarm` command. Owns flags, what is printed and exit codes; every command imports what it needs when it runs.

Flags for settings are generated from the fields of `Settings`. An error prints one line and exits with its `exit_code`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import shlex
import signal
import sys
import time
from collections.abc import Collection, Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from swarm import __version__
from swarm.errors import SettingsError, StoreError, SwarmError
from swarm.settings import Settings
from swarm.simulation.setup import Setup, flag_of

INTERRUPTED = 130
PROBLEMS_FOUND = 1
MDNS_S = 2.0  # to look for a node
METAVARS = {
    "advertise": "ADDRESS[:PORT]",
    "key_file": "PATH",
    "listen": "HOST[:PORT]",
    "upload_limit": "RATE",
    "timeout_s": "SECONDS",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if options.log_json:
        logging.getLogger().handlers[0].setFormatter(_JsonLines())
    logging.getLogger("swarm").setLevel(logging.DEBUG if options.verbose else logging.INFO)
    try:
        return int(options.run(options))
    except SwarmError as error:
        print(f"swarm: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("swarm: interrupted; what was verified is kept, run the same command again to go on", file=sys.stderr)
        return INTERRUPTED


class _JsonLines(logging.Formatter):
    """One object a line: `time` (UTC), `level`, `logger`, `message`, and `error` with a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("swarm", description="Peer-to-peer distribution of model weights.")
    parser.add_argument("--version", action="version", version=f"swarm {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--verbose", action="store_true", help="say what happens in detail")
    common.add_argument("--log-json", action="store_true", help="log one JSON object a line")
    traced = argparse.ArgumentParser(add_help=False)
    traced.add_argument("--trace", type=Path, metavar="FILE", help="write what happens, a JSON line each")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", parents=[common, traced], help="offer a model to others")
    serve.add_argument("model", metavar="PATH|MODEL_ID", help="a model directory, or a model of the Hugging Face cache")
    serve.add_argument("--model-id", metavar="ID", help="what others fetch it by; by default the hub's id or the name")
    _add_settings(serve, without={"timeout_s"})
    serve.set_defaults(run=_serve)

    fetch = commands.add_parser("fetch", parents=[common, traced], help="get a model from whoever serves it")
    fetch.add_argument("model_id", metavar="MODEL_ID")
    fetch.add_argument("--out", type=Path, metavar="DIR", help="directory to fill; by default the Hugging Face cache")
    fetch.add_argument("--digest", metavar="D", help="accept only this content")
    fetch.add_argument("--json", action="store_true", help="print one JSON object at completion")
    fetch.add_argument("--no-seed", action="store_true", help="exit at completion instead of serving it on")
    _add_settings(fetch)
    fetch.set_defaults(run=_fetch)

    run = commands.add_parser("run", parents=[common], help="start an engine that loads its model from the swarm")
    run.add_argument("--model-id", metavar="ID", help="what others serve the model by; by default as it is named")
    _add_settings(run)
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="as in: -- vllm serve org/model")
    run.set_defaults(run=_become)

    status = commands.add_parser("status", parents=[common], help="show the swarm as a running node sees it")
    status.add_argument(
        "--peer", metavar="HOST:PORT", help="the node to ask; by default one on this machine, else one that mDNS finds"
    )
    status.add_argument("--key-file", metavar="PATH", help="the cluster key, to ask nodes of other machines")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.add_argument("--watch", action="store_true", help="show it again every second")
    status.set_defaults(run=_status)

    replay = commands.add_parser("replay", parents=[common], help="say where the time of a traced fetch went")
    replay.add_argument("trace", type=Path, metavar="FILE", help="what --trace wrote")
    replay.add_argument("--json", action="store_true", help="print one JSON object")
    replay.add_argument("--web", action="store_true", help="show it again in the dashboard, on this machine")
    replay.add_argument("--port", type=int, default=0, metavar="PORT", help="of the dashboard; by default any")
    replay.set_defaults(run=_replay)

    doctor = commands.add_parser("doctor", parents=[common], help="say why a start does, or did not, use the swarm")
    doctor.add_argument("model_id", nargs="?", metavar="MODEL_ID", help="a model to look for")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    _add_settings(doctor, without={"timeout_s", "upload_limit"})
    doctor.set_defaults(run=_doctor)

    verify = commands.add_parser("verify", parents=[common], help="hash a fetched directory again")
    verify.add_argument("directory", type=Path, metavar="DIR")
    verify.add_argument("--digest", metavar="D", help="what it must have been fetched as, too")
    verify.set_defaults(run=_verify)

    keygen = commands.add_parser("keygen", parents=[common], help="make a cluster key: who has it is a member")
    keygen.add_argument(
        "path", nargs="?", type=Path, default=Path("swarm.key"), metavar="PATH", help="by default %(default)s"
    )
    keygen.set_defaults(run=_keygen)

    demo = commands.add_parser("demo", parents=[common], help="one seed and three newcomers on this machine")
    demo.add_argument("path", nargs="?", type=Path, metavar="PATH", help="a model directory; by default a made-up one")
    demo.set_defaults(run=_demo)

    simulate = commands.add_parser("simulate", parents=[common], help="play a burst of newcomers, without a network")
    for field in dataclasses.fields(Setup):
        about = field.metadata["help"]
        simulate.add_argument(f"--{flag_of(field)}", dest=field.name, metavar=field.metadata["metavar"], help=about)
    simulate.add_argument("--runs", type=int, default=1, metavar="R", help="play so many, each with the next dice")
    simulate.add_argument("--json", action="store_true", help="print one JSON object")
    simulate.add_argument("--trace", type=Path, metavar="FILE", help="write every event and action, a JSON line each")
    simulate.add_argument("--plot", type=Path, metavar="FILE", help="draw who had how much when; needs matplotlib")
    simulate.set_defaults(run=_simulate)
    return parser


def _add_settings(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    group = parser.add_argument_group("settings", "also in the environment, as in SWARM_LISTEN, or in swarm.toml")
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
            group.add_argument(f"--{flag[:-1]}", dest=setting.name, action="append", metavar="HOST:PORT", help=text)
        else:
            group.add_argument(
                f"--{flag}", dest=setting.name, metavar=METAVARS.get(setting.name, flag.upper()), help=text
            )


def _settings(options: argparse.Namespace) -> Settings:
    names = [setting.name for setting in dataclasses.fields(Settings) if setting.metadata["flag"]]
    return Settings.load({name: getattr(options, name, None) for name in names})


def _run(work: Coroutine[Any, Any, int]) -> int:
    """Runs a coroutine; Ctrl-C and SIGTERM cancel it, and it may clean up or end well all the same."""

    async def run() -> int:
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _serve(options: argparse.Namespace) -> int:
    from swarm.api import open_source
    from swarm.node import local_nodes
    from swarm.observe.trace import tracing
    from swarm.observe.units import size_text
    from swarm.runtime import new_node

    settings = _settings(options)

    async def serve() -> int:
        node, _ = new_node(settings)
        async with contextlib.AsyncExitStack() as open_:
            open_.enter_context(tracing(node.journal, options.trace))
            await open_.enter_async_context(node)
            name, source, origin = await asyncio.to_thread(
                open_source, options.model, model_id=options.model_id, settings=settings
            )
            node.serve(name, source, origin=origin)
            manifest = source.manifest
            with local_nodes.note(settings.cache, node.address):
                what = f"{name}, {len(manifest.files)} files, {size_text(manifest.size)}, digest {manifest.digest}"
                print(f"{node.address} ready: {what}", flush=True)
                logging.getLogger("swarm").info("fetch it with: swarm fetch %s --peer %s", name, node.address)
                await _until_stopped()
        return 0

    return _run(serve())


def _fetch(options: argparse.Namespace) -> int:
    from swarm.api import HUB_CACHE, fetch_on
    from swarm.cli.progress import progress
    from swarm.node import local_nodes
    from swarm.observe.trace import tracing
    from swarm.observe.units import size_text
    from swarm.runtime import new_node

    settings = _settings(options)

    async def fetch() -> int:
        node, status = new_node(settings)
        async with contextlib.AsyncExitStack() as open_:
            open_.enter_context(tracing(node.journal, options.trace))
            await open_.enter_async_context(node)
            with local_nodes.note(settings.cache, node.address):
                async with progress(status.fetches, node.now, quiet=options.json):
                    fetched, _, path = await fetch_on(
                        node,
                        options.model_id,
                        out=options.out or HUB_CACHE,
                        into=None,
                        digest=options.digest,
                        timeout_s=settings.timeout_s,
                        settings=settings,
                    )
                if options.json:
                    report = {
                        **dataclasses.asdict(fetched),
                        "rate_bytes_per_s": fetched.rate_bytes_per_s,
                        "out": str(path),
                    }
                    print(json.dumps(report), flush=True)
                else:
                    sources = ", ".join(f"{name} {size_text(size)}" for name, size in fetched.sources.items())
                    rate = f"{size_text(fetched.bytes)} in {fetched.seconds:.2f} s, verified"
                    kept = f", {size_text(fetched.resumed_bytes)} kept from before" if fetched.resumed_bytes else ""
                    came = f", from {sources}" if sources else ""
                    print(f"{fetched.model_id}: {rate}{kept}{came} -> {path}", flush=True)
                if not options.no_seed:
                    logging.getLogger("swarm").info("serving it on at %s; Ctrl-C to stop", node.address)
                    await _until_stopped()
        return 0

    return _run(fetch())


async def _until_stopped() -> None:
    """Waits for Ctrl-C or SIGTERM, and returns then: stopping a seed is no failure."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()


def _become(options: argparse.Namespace) -> int:
    import os

    from swarm.engines.launch import prepare

    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise SettingsError("command", "is missing; say what to run, as in: swarm run -- vllm serve org/model")
    launch = prepare(command, _settings(options), model_id=options.model_id)
    logging.getLogger("swarm").info("becomes: %s", shlex.join(launch.command))
    sys.stdout.flush()
    try:
        os.execvpe(launch.command[0], launch.command, {**os.environ, **launch.environment})  # noqa: S606 - no shell
    except OSError as error:
        raise SettingsError("command", f"{launch.command[0]}: {error.strerror}") from error


def _status(options: argparse.Namespace) -> int:
    from swarm.cli import status_table, status_watch
    from swarm.cli.status_json import healthy
    from swarm.node import local_nodes

    settings = Settings.load({"key_file": options.key_file})
    context = None
    if settings.key_file:
        from swarm.security import cluster_key
        from swarm.security.certificates import visitor

        context = visitor(cluster_key.load(settings.key_file))
    here = [] if options.peer else local_nodes.addresses(settings.cache)
    given = [options.peer] if options.peer else here or _heard_of(settings)
    ask = status_watch.Asker(given, context, proven=not here)
    if options.watch and not options.json:
        return status_watch.watch(ask)
    while True:
        swarm = ask()
        if options.json:
            print(json.dumps(swarm), flush=True)
        else:
            status_table.show(swarm)
        if not options.watch:
            return 0 if healthy(swarm) else PROBLEMS_FOUND
        time.sleep(status_watch.EVERY_S)


def _replay(options: argparse.Namespace) -> int:
    from swarm.cli import replay as report

    told = report.read(options.trace)
    if options.json:
        print(json.dumps(told))
    else:
        report.show(told)
    return _run(_screen(options.trace, options.port)) if options.web else 0


async def _screen(trace: Path, port: int) -> int:
    from swarm.dashboard.replay_server import ReplayServer

    screening = await asyncio.to_thread(ReplayServer, trace)
    async with screening.serve(port) as address:
        print(f"http://{address}/ shows it again; Ctrl-C to stop", flush=True)
        await _until_stopped()
    return 0


def _heard_of(settings: Settings) -> Sequence[str]:
    """Nodes that multicast DNS knows, where none of this user runs here."""
    if not settings.mdns:
        return []
    from swarm.net.discovery import nearby

    return asyncio.run(nearby(MDNS_S))


def _doctor(options: argparse.Namespace) -> int:
    from swarm.doctor.checks import diagnose
    from swarm.doctor.examine import examine
    from swarm.doctor.show import as_json, show

    settings = _settings(options)
    if not options.verbose:
        logging.getLogger("swarm").setLevel(logging.ERROR)  # what a node logs comes as findings

    async def doctor() -> int:
        findings = diagnose(await examine(settings, options.model_id))
        if options.json:
            print(as_json(findings), flush=True)
        else:
            show(findings)
        return PROBLEMS_FOUND if any(finding.level == "bad" for finding in findings) else 0

    return _run(doctor())


def _verify(options: argparse.Namespace) -> int:
    from swarm.checkpoint import manifest_builder
    from swarm.store.directory import PARTIAL

    manifest = manifest_builder.recall(Settings.load().cache, options.directory)
    if (options.directory / PARTIAL).exists():
        raise StoreError(f"{options.directory}: a fetch into it is unfinished; run that fetch again")
    if manifest is None:
        raise StoreError(
            f"{options.directory}: not fetched by swarm on this machine, so there is nothing to compare with"
        )
    if options.digest not in (None, manifest.digest):
        raise StoreError(f"{options.directory}: fetched as {manifest.digest}, which is not the digest asked for")
    problems = manifest_builder.verify(options.directory, manifest)
    for problem in problems:
        print(problem)
    if not problems:
        size = f"{len(manifest.files)} files, {manifest.size} bytes"
        print(f"{options.directory}: {size}, as fetched ({manifest.digest[:16]})")
    return PROBLEMS_FOUND if problems else 0


def _keygen(options: argparse.Namespace) -> int:
    from swarm.security import cluster_key

    key = cluster_key.create(options.path)
    print(f"{options.path}: a new cluster key, fingerprint {key}; give every machine a copy of the file")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from swarm.cli.demo import demo

    return demo(options.path)


def _simulate(options: argparse.Namespace) -> int:
    setup = Setup.read({field.name: getattr(options, field.name) for field in dataclasses.fields(Setup)})
    from swarm.cli.simulate import simulate

    return simulate(setup, runs=options.runs, as_json=options.json, trace=options.trace, plot=options.plot)
