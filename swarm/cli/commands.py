"""The commands of `swarm`: each takes parsed options, prints, and returns an exit code.

Every command imports the modules that it needs when it runs: `swarm --version` and `swarm status` start fast.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.cli import signals, stdio
from swarm.cli.daemon import Daemon
from swarm.cli.next_step import fetch_command, listening
from swarm.errors import LINE_CHARS_MAX, SettingsError, StoreError, clean
from swarm.settings import DEFAULT_PORT, Settings, join_address, split_address
from swarm.simulation.setup import Burst

if TYPE_CHECKING:
    from swarm.content.manifest import Digest, ModelId
    from swarm.node.node import Node
    from swarm.protocol.messages import Origin
    from swarm.store import Source

PROBLEMS_FOUND = 1
MDNS_S = 2.0  # to find a node

log = logging.getLogger("swarm")


def settings_of(options: argparse.Namespace) -> Settings:
    """Settings with the flags of a command. Raises SettingsError."""
    names = [setting.name for setting in dataclasses.fields(Settings) if setting.metadata["flag"]]
    names += getattr(options, "further", ())
    return Settings.load({name: getattr(options, name, None) for name in names})


def _run(
    work: Coroutine[Any, Any, int],
    *,
    stopped: Callable[[], int] = lambda: signals.INTERRUPTED,
    daemon: Daemon | None = None,
) -> int:
    """Runs a coroutine. A signal cancels it, unless the daemon heeds it; it may catch that and return an exit code.

    `stopped()`: exit code when it does not end in time after a signal.
    """

    async def run() -> int:
        task = asyncio.current_task()

        def stop() -> None:
            signals.exit_soon(stopped)
            if task is not None:
                task.cancel()

        def within(after_s: float) -> None:
            signals.exit_soon(stopped, after_s=after_s)

        def heed(number: int) -> None:
            if daemon is None or not daemon.heeds(number, stop, within=within):
                stop()

        if threading.current_thread() is threading.main_thread():
            for number in signals.heeded():
                asyncio.get_running_loop().add_signal_handler(number, heed, number)
        return await work

    from swarm.net.pausing_loop import PausingLoop

    try:
        with asyncio.Runner(loop_factory=PausingLoop) as runner:
            return runner.run(run())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def serve(options: argparse.Namespace) -> int:
    """Serves a model until it is stopped."""
    from swarm.api import open_source
    from swarm.cli.reopen import reopened
    from swarm.node import commit_parts, local_nodes, promised_seed
    from swarm.observe.trace import tracing
    from swarm.observe.units import size_text
    from swarm.runtime import new_node

    settings = settings_of(options)
    daemon = Daemon(lambda: settings_of(options), drain_timeout_s=settings.drain_timeout_s, seeds=True)
    if options.source:
        from swarm.cli.origin_seed import serve_origin

        seed = serve_origin(options, settings, serves=daemon.serves)
        return _run(seed, stopped=lambda: 0, daemon=daemon)
    if options.model is None:
        options.parser.error("the following arguments are required: PATH|MODEL_ID, or --origin ADDRESS")

    def hashed() -> tuple[ModelId, Source, Origin | None]:
        return open_source(options.model, model_id=options.model_id, settings=settings, revision=options.revision)

    async def serve() -> int:
        node, _ = new_node(settings)
        async with contextlib.AsyncExitStack() as open_:
            open_.enter_context(tracing(node.journal, options.trace))
            unready = open_.enter_context(contextlib.ExitStack())
            unready.enter_context(node.asked_for(options.model, "its files are being hashed"))
            await open_.enter_async_context(node)
            name, source, origin = await asyncio.to_thread(hashed)
            open_.enter_context(local_nodes.note(settings.cache, node.local_address))
            while True:
                commit_parts.serve(node, name, source, origin=origin, trusted=settings.trusted)
                promised_seed.follow(node, name, source)
                daemon.serves(node)
                unready.close()
                manifest, missing = source.manifest, getattr(source, "missing", "")
                part = "a part of " if missing else ""
                size = f"{len(manifest.files)} files, {size_text(manifest.size)}"
                print(f"{node.address} ready: {part}{name}, {size}, digest {manifest.digest}", flush=True)
                if missing:
                    log.warning("%s: %s (this part is served as soon as members announce the rest)", name, missing)
                log.info("fetch it with: %s", fetch_command(name, node.address, settings))
                if node.on_loopback:
                    log.info("only from this machine; for others serve it with %s", listening(settings))
                await node.until_lost(manifest.digest)
                log.info("%s: hashing its files again once they are complete and quiet", name)
                name, source, origin = await reopened(hashed)

    async def until_stopped() -> int:
        with contextlib.suppress(asyncio.CancelledError):  # also while files are hashed
            await serve()
        return 0

    return _run(until_stopped(), stopped=lambda: 0, daemon=daemon)


def fetch(options: argparse.Namespace) -> int:
    """Fetches a model, and serves it until it is stopped, unless `--no-seed`."""
    from swarm.api import HUB_CACHE, fetch_on
    from swarm.cli.progress import progress
    from swarm.content.selection import Selection
    from swarm.node import local_nodes
    from swarm.observe.trace import tracing
    from swarm.observe.units import size_text
    from swarm.runtime import new_node

    settings = settings_of(options)
    selection = Selection.read(include=options.include, exclude=options.exclude, tensors=options.tensors)
    daemon = Daemon(lambda: settings_of(options), drain_timeout_s=settings.drain_timeout_s, seeds=False)
    stopped = signals.INTERRUPTED

    async def fetch() -> int:
        nonlocal stopped
        node, status = new_node(settings)
        async with contextlib.AsyncExitStack() as open_:
            open_.enter_context(tracing(node.journal, options.trace))
            unready = open_.enter_context(contextlib.ExitStack())
            unready.enter_context(node.asked_for(options.model_id, "is being fetched"))
            await open_.enter_async_context(node)
            with local_nodes.note(settings.cache, node.local_address):
                async with progress(status.fetches, node.now, quiet=options.json or options.quiet):
                    fetched, _, path = await fetch_on(
                        node,
                        options.model_id,
                        revision=options.revision,
                        out=options.out or HUB_CACHE,
                        digest=options.digest or os.environ.get("SWARM_DIGEST") or None,
                        timeout_s=settings.timeout_s,
                        settings=settings,
                        selection=selection,
                    )
                stopped = 0
                unready.close()
                if options.json:
                    report = {
                        **dataclasses.asdict(fetched),
                        "rate_bytes_per_s": fetched.rate_bytes_per_s,
                        "out": str(path),
                    }
                    print(json.dumps(report), flush=True)
                else:
                    sources = ", ".join(f"{clean(name)} {size_text(size)}" for name, size in fetched.sources.items())
                    rate = f"{size_text(fetched.bytes)} in {fetched.seconds:.2f} s, verified"
                    kept = f", {size_text(fetched.resumed_bytes)} kept from before" if fetched.resumed_bytes else ""
                    came = f", from {sources}" if sources else ""
                    shown = clean(path, chars_max=stdio.PATH_CHARS_MAX)
                    print(f"{clean(fetched.model_id)}: {rate}{kept}{came} -> {shown}", flush=True)
                if node.described(fetched.digest) is None:
                    log.info("the agent of this machine serves it on")
                elif not options.no_seed:
                    log.info("serving it on at %s; Ctrl-C to stop", node.address)
                    if node.on_loopback and settings.reaches_out:
                        log.info("only to this machine; to serve it to others fetch with %s", listening(settings))
                    daemon.serves(node)
                    await _until_lost(node, fetched.digest)
        return 0

    return _run(fetch(), stopped=lambda: stopped, daemon=daemon)


def storage(options: argparse.Namespace) -> int:
    """Fills directories before a server starts."""
    from swarm.cli.storage import pairs, storage

    wanted, settings = pairs(options.pairs), settings_of(options)
    return _run(storage(wanted, settings, os.environ, quiet=options.quiet))


async def _until_lost(node: Node, digest: Digest) -> None:
    """Returns at a signal: to stop a seed is no failure. Raises StoreError when the files changed: nothing is left."""
    with contextlib.suppress(asyncio.CancelledError):
        raise StoreError((await node.until_lost(digest)).why)


async def _until_stopped() -> None:
    """Returns at a signal: to stop a seed is no failure."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()


def agent(options: argparse.Namespace) -> int:
    """Runs the agent of this machine until it is stopped."""
    from swarm.cli import agent

    settings = settings_of(options)
    daemon = Daemon(lambda: settings_of(options), drain_timeout_s=settings.drain_timeout_s, seeds=True)

    async def until_stopped() -> int:
        with contextlib.suppress(asyncio.CancelledError):
            return await agent.run(settings, daemon=daemon, trace=options.trace)
        return 0

    return _run(until_stopped(), stopped=lambda: 0, daemon=daemon)


def pull(options: argparse.Namespace) -> int:
    """Has the agent fetch a model."""
    from swarm.cli import agent
    from swarm.protocol.agent_messages import Pull

    request = Pull(
        options.model_id,
        options.revision,
        options.digest,
        tuple(options.include) if options.include else None,
        tuple(options.exclude or ()),
        pin=options.pin,
        timeout_s=options.timeout,
    )
    return agent.pull(request, Settings.load(), as_json=options.json)


def pin(options: argparse.Namespace) -> int:
    """Keeps a model in the cache of the agent, or not any more."""
    from swarm.cli import agent

    return agent.pin(options.model_id, options.revision, Settings.load(), pinned=not options.remove)


def run(options: argparse.Namespace) -> int:
    """Replaces this process by an engine that loads its model from peers."""
    from swarm.engines.launch import prepare

    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise SettingsError("command", "is missing; for example: swarm run -- vllm serve org/model")
    if shutil.which(command[0]) is None:  # a search for peers before that would be in vain
        raise SettingsError(
            "command", f"{command[0]} is not a program on PATH; install it, or activate the environment that has it"
        )
    launch = prepare(command, settings_of(options), model_id=options.model_id)
    log.info("becomes: %s", shlex.join(launch.command))
    sys.stdout.flush()
    try:
        os.execvpe(launch.command[0], launch.command, {**os.environ, **launch.environment})  # noqa: S606 - no shell
    except OSError as error:
        raise SettingsError("command", f"{launch.command[0]}: {error.strerror}") from error


def status(options: argparse.Namespace) -> int:
    """Prints the view of a running node; 1 if a warning is bad."""
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
    given = [named_peer(options.peer)] if options.peer else here or _discovered(settings)
    ask = status_watch.Asker(given, context, proven=not here)
    if options.watch and not options.json:
        return status_watch.watch(ask)
    while True:
        swarm = ask()
        if options.json:
            print(json.dumps(swarm), flush=True)
        else:
            status_table.show(swarm)
        if not options.watch or stdio.ended():
            return 0 if healthy(swarm) else PROBLEMS_FOUND
        time.sleep(status_watch.EVERY_S)


def named_peer(text: str) -> str:
    """The address of a node that is named as HOST or HOST:PORT. Raises SettingsError."""
    return join_address(*split_address("peer", text, default_port=DEFAULT_PORT, least_port=1))


def cached_ids() -> list[str]:
    """The ids of the models in the Hugging Face cache, complete or not; none if it cannot be read."""
    from swarm.checkpoint.hf_cache import cache_root

    with contextlib.suppress(OSError):
        return sorted(place.name[8:].replace("--", "/", 1) for place in cache_root().glob("models--*--*"))
    return []


def replay(options: argparse.Namespace) -> int:
    """Prints phases and sources of the fetches in a trace; serves its dashboard with `--web`."""
    from swarm.cli.replay import read, show

    replayed = read(options.trace)
    if options.json:
        print(json.dumps(replayed))
    else:
        show(replayed)
    return _run(_serve_replay(options.trace, options.port)) if options.web else 0


async def _serve_replay(trace: Path, port: int) -> int:
    from swarm.dashboard.replay_server import ReplayServer

    server = await asyncio.to_thread(ReplayServer, trace)
    async with server.serve(port) as address:
        print(f"http://{address}/ shows it again; Ctrl-C to stop", flush=True)
        await _until_stopped()
    return 0


def _discovered(settings: Settings) -> Sequence[str]:
    """Addresses of nodes that multicast DNS finds."""
    if not settings.mdns:
        return []
    from swarm.net.discovery import nearby

    return asyncio.run(nearby(MDNS_S))


def doctor(options: argparse.Namespace) -> int:
    """Prints findings about this machine and its swarm; 1 if one of them is bad."""
    from swarm.doctor.checks import diagnose
    from swarm.doctor.examine import examine
    from swarm.doctor.show import as_json, show

    settings = settings_of(options)
    if not options.verbose:
        log.setLevel(logging.ERROR)  # findings report the same

    async def doctor() -> int:
        findings = diagnose(await examine(settings, options.model_id))
        if options.json:
            print(as_json(findings), flush=True)
        else:
            show(findings)
        return PROBLEMS_FOUND if any(finding.level == "bad" for finding in findings) else 0

    return _run(doctor())


def verify(options: argparse.Namespace) -> int:
    """Hashes a directory or a cached model again; 1 if a file differs."""
    from swarm.cli.verify import verify

    if options.model_signature:
        return _verify_signed(Path(options.what), options.model_signature)
    return verify(options.what, revision=options.revision, digest=options.digest, settings=Settings.load())


def ls(options: argparse.Namespace) -> int:
    """Lists the models of the swarm and of this machine."""
    from swarm.cli import kept

    settings = Settings.load({"key_file": options.key_file})
    from swarm.cli import agent

    found = kept.listed(kept.report_of(options.peer and named_peer(options.peer), settings), settings, options.model_id)
    models = None if options.peer else agent.models(settings)
    if options.json:
        print(kept.as_json({**found, "agent": agent.as_json(models) if models else None}), flush=True)
    else:
        kept.show(found, options.model_id)
        if models:
            agent.show(models, options.model_id)
    return 0


def rm(options: argparse.Namespace) -> int:
    """Removes what swarm keeps of a model; 1 if the user declines."""
    from swarm.cli.kept import remove

    how = {"yes": options.yes, "force": options.force}
    return remove(options.model_id, revision=options.revision, **how, settings=Settings.load())


def _verify_signed(directory: Path, key: Path) -> int:
    from swarm.checkpoint import signed_files
    from swarm.security import model_signature
    from swarm.store.file_errors import store_errors
    from swarm.store.own_files import open_regular

    with store_errors(key):
        signer = model_signature.public_key(key.read_bytes())
    place = directory / model_signature.FILE_NAME
    with store_errors(place), open_regular(place) as file:
        signed = model_signature.signed_files(file.read(model_signature.BUNDLE_BYTES_MAX + 1), signer)
    found = signed_files.problems(directory, signed, signature=model_signature.FILE_NAME)
    for problem in found:
        print(clean(problem))
    if not found:
        print(clean(f"{directory}: {len(signed)} files, as signed with {key}", chars_max=LINE_CHARS_MAX))
    return PROBLEMS_FOUND if found else 0


def sign(options: argparse.Namespace) -> int:
    """Signs a model."""
    from swarm import api

    settings = settings_of(options)
    digest, made, place = api.sign(
        options.model, key=options.key, model_id=options.model_id, revision=options.revision, settings=settings
    )
    said = f"{made.model_id}{'@' + made.revision if made.revision else ''}"
    print(f"{said} is {digest}, says {made.publisher}" + (f": written to {place}" if place else ": known before"))
    print(f"serve it as before; fetch it with: swarm fetch {said} --signed-by {made.publisher}")
    return 0


def keygen(options: argparse.Namespace) -> int:
    """Writes a new cluster key."""
    if options.publisher:
        from swarm.security import signatures

        public = signatures.create(options.path)
        print(f"{options.path}: a new key of a publisher; keep it to yourself. Fetch with --signed-by {public}")
        return 0
    from swarm.security import cluster_key

    key = cluster_key.create(options.path)
    print(f"{options.path}: a new cluster key, fingerprint {key}; give every machine a copy of the file")
    return 0


def demo(options: argparse.Namespace) -> int:
    """Runs the demo; 1 if a copy differs."""
    from swarm.cli.demo import demo

    return demo(options.path)


def simulate(options: argparse.Namespace) -> int:
    """Runs the simulation; 1 if a newcomer did not finish."""
    burst = Burst.read({field.name: getattr(options, field.name) for field in dataclasses.fields(Burst)})
    from swarm.cli.simulate import simulate

    return simulate(burst, runs=options.runs, as_json=options.json, trace=options.trace, plot=options.plot)
