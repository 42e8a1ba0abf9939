"""`swarm agent`, and the commands that ask a running one: `pull` and `pin`; `ls` and `rm` ask it where it runs.

Must not know: how the agent fetches, keeps and evicts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from swarm.cli.daemon import Daemon
from swarm.errors import AgentError, SettingsError, clean
from swarm.observe.progress import Bar, draws_bars
from swarm.observe.progress import Progress as Shown
from swarm.observe.units import size_text
from swarm.protocol.agent_messages import Answer, Done, List, Models, Pin, Pull, Pulled, PullProgress, Remove, Request
from swarm.settings import Settings

log = logging.getLogger("swarm")

NO_AGENT = "no agent runs here; start one with: swarm agent"


async def run(settings: Settings, *, daemon: Daemon, trace: Path | None) -> int:
    """Runs the agent until it is cancelled."""
    from swarm.agent.agent import Agent
    from swarm.agent.control import Control
    from swarm.agent.face import Face
    from swarm.node import agent_reach, local_nodes
    from swarm.observe.trace import tracing
    from swarm.runtime import new_node

    node, report = new_node(settings, figures=lambda: (*agent.cache.figures(), *face.figures()))
    agent = Agent(node, report.fetches, settings)
    control = Control(settings.cache, agent.handle)
    face = Face(agent)
    control.claim()
    async with contextlib.AsyncExitStack() as open_:
        open_.push_async_callback(control.close)
        open_.enter_context(tracing(node.journal, trace))
        await open_.enter_async_context(node)
        open_.enter_context(local_nodes.note(settings.cache, node.local_address))
        open_.push_async_callback(face.close)
        await face.open()
        hub, root = face.address, agent.cache.root
        await control.open(agent_reach.greeting(settings, node=node.local_address, hub=hub, hub_cache=root))
        daemon.serves(node)
        daemon.also = agent.reload
        print(f"{node.address} ready: agent of {root}, HF_ENDPOINT=http://{hub}", flush=True)
        with contextlib.suppress(asyncio.CancelledError):
            await agent.run()
    return 0


def pull(request: Pull, settings: Settings, *, as_json: bool) -> int:
    """Has the agent fetch a model. Raises AgentError."""
    bar = Bar() if draws_bars() and not as_json else None

    def show(progress: PullProgress) -> None:
        if bar:
            left = progress.bytes - progress.done_bytes
            eta_s = left / progress.rate_bytes_per_s if progress.rate_bytes_per_s else None
            rate = progress.rate_bytes_per_s
            bar.show(Shown(request.model_id, progress.done_bytes, progress.bytes, rate, 0, eta_s))

    try:
        pulled = ask(request, settings, progress=show)
    finally:
        if bar:
            bar.end()
    if not isinstance(pulled, Pulled):
        raise AgentError("the agent answers something else than a pull")
    if as_json:
        said = {name: getattr(pulled, name) for name in ("model_id", "digest", "commit", "bytes", "seconds")}
        print(json.dumps({**said, "sources": pulled.sources, "out": pulled.snapshot}), flush=True)
    else:
        size = f"{size_text(pulled.bytes)} in {pulled.seconds:.2f} s, verified"
        print(clean(f"{pulled.model_id}: {size} -> {pulled.snapshot}", chars_max=1000), flush=True)
    return 0


def pin(model_id: str, revision: str | None, settings: Settings, *, pinned: bool) -> int:
    """Keeps a model in the agent's cache, or not any more. Raises AgentError."""
    return _say(ask(Pin(model_id, revision, pinned), settings))


def remove(model_id: str, revision: str | None, settings: Settings) -> int | None:
    """Has the agent remove a model; None where none runs. Raises AgentError."""
    answer = ask_if_there(Remove(model_id, revision), settings)
    return None if answer is None else _say(answer)


def pinned(settings: Settings) -> frozenset[str]:
    """The models that stay in the agent's cache, as ID@COMMIT, also while no agent runs."""
    from swarm.agent.cache import pinned

    return pinned(settings.cache)


def models(settings: Settings) -> Models | None:
    """What the agent keeps; None where none runs. Raises AgentError."""
    answer = ask_if_there(List(), settings)
    return answer if isinstance(answer, Models) else None


def as_json(found: Models) -> dict[str, Any]:
    """The member `agent` of `swarm ls --json`."""
    rows = [{name: getattr(row, name) for name in row.__struct_fields__} for row in found.rows]
    return {"bytes": found.bytes, "limit_bytes": found.limit_bytes, "models": rows}


def show(found: Models, model_id: str | None) -> None:
    """Prints the agent's table of `swarm ls`."""
    console = Console(markup=False, highlight=False)
    limit = "" if found.limit_bytes is None else f" of {size_text(found.limit_bytes)}"
    table = Table(title=f"kept by the agent: {size_text(found.bytes)}{limit}", title_justify="left", title_style="")
    for column in ("id", "revisions", "size", "kept", "served to peers", "last used"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for row in found.rows:
        if model_id in (None, row.model_id):
            names = ", ".join([*row.revisions, row.commit[:12]])
            kept = "pinned" if row.pinned else "in use" if row.in_use else "-"
            size = size_text(row.bytes) if row.bytes else "of others"
            table.add_row(row.model_id, names, size, kept, row.served, _ago(row.used_at))
    console.print(table)


def ask(request: Request, settings: Settings, *, progress: Callable[[PullProgress], object] = lambda _: None) -> Answer:
    """The agent's answer. Raises AgentError, SettingsError where none runs."""
    answer = ask_if_there(request, settings, progress=progress)
    if answer is None:
        raise SettingsError("agent", NO_AGENT)
    return answer


def ask_if_there(
    request: Request, settings: Settings, *, progress: Callable[[PullProgress], object] = lambda _: None
) -> Answer | None:
    """The agent's answer; None where none runs. Raises AgentError."""

    async def talk() -> Answer | None:
        from swarm.node.agent_client import agent

        async with agent(settings.cache) as found:
            return await found.ask(request, progress) if found else None

    return asyncio.run(talk())


def _say(answer: Answer) -> int:
    if not isinstance(answer, Done):
        raise AgentError("the agent answers something else than was asked for")
    for line in answer.lines:
        print(clean(line, chars_max=1000), flush=True)
    return 0


def _ago(at: float) -> str:
    if not at:
        return "-"
    seconds = max(0.0, time.time() - at)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "now"
