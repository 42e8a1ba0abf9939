"""A fetch through the agent of this machine: it fetches into its cache, and this process takes the files from there.

    out=HUB_CACHE, and the agent's cache is this one     nothing is left to do
    out=DIR                                              the files are cloned (`store.clone`)
    tensors in memory                                    the agent fetches too, and its node is a peer of this one

Everything else, and every failure of the agent itself, means a fetch without it, with its node as a peer where a link
is possible. The agent's files are the verified ones as long as they have the stamps that it tells.

Must not know: what the agent keeps, and how it fetches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from swarm.api.handles import HubCache
from swarm.checkpoint import digest_cache, hf_cache
from swarm.content.manifest import Digest, ModelId
from swarm.content.selection import Selection
from swarm.errors import AgentError, SourceChanged, StoreError, SwarmError
from swarm.node import agent_reach
from swarm.node.agent_client import AgentLink, agent
from swarm.node.fetch import Fetched
from swarm.node.node import Node
from swarm.protocol.agent_messages import Pull, Pulled, PulledFile, PullProgress
from swarm.protocol.messages import Address
from swarm.settings import Settings
from swarm.store.clone import clone
from swarm.store.confined_directory import ConfinedDirectory
from swarm.store.file_errors import store_errors
from swarm.store.partial_directory import PARTIAL
from swarm.store.stamp import Stamp
from swarm.transfer.commit_proof import warn_unproven

TRANSPORT = "agent"
LINE_EVERY_S = 10.0
FULL = StoreError.exit_code

log = logging.getLogger("swarm")


async def files(
    open_: contextlib.AsyncExitStack, node: Node, pull: Pull, *, out: str | Path | HubCache | None, settings: Settings
) -> tuple[Fetched, Path] | None:
    """The files, fetched through the agent of this machine; None if this process has to fetch by itself.

    Then the agent, if there is one, is a peer of `node`, and for tensors in memory it fetches beside it until `open_`
    ends. Raises AgentError for what the agent was refused.
    """
    if not settings.agent or not hf_cache.is_model_id(pull.model_id.removeprefix("hf://")):
        return None
    found = await open_.enter_async_context(agent(settings.cache))
    if found is None or found.greeting.pid == os.getpid():
        return None
    if why := agent_reach.objection(settings, found.greeting):
        log.info("%s: is fetched without the agent of this machine: %s", pull.model_id, why)
        return None
    node.meet(Address(found.greeting.node))
    if out is not None:
        return await _to_files(found, pull, out=out, settings=settings)
    await open_.enter_async_context(_beside(found, pull))
    return None


def pull_of(
    model_id: str, revision: str | None, digest: str | None, selection: Selection | None, timeout_s: float | None
) -> Pull | None:
    """What to ask the agent for; None for a selection that only this process can make."""
    if selection is None:
        return Pull(model_id, revision, digest, timeout_s=timeout_s)
    if callable(selection.tensors):
        return None
    return Pull(model_id, revision, digest, selection.include, selection.exclude, selection.tensors, False, timeout_s)


async def _to_files(
    found: AgentLink, pull: Pull, *, out: str | Path | HubCache, settings: Settings
) -> tuple[Fetched, Path] | None:
    """Fetches files through the agent; None if it cannot give them. Raises AgentError for what it was refused."""
    if isinstance(out, HubCache) and not _is_own_cache(found.greeting.hub_cache):
        return None
    try:
        pulled = await found.ask(pull, _Lines(pull.model_id).show)
        if not isinstance(pulled, Pulled):
            raise AgentError("the agent of this machine answers something else than a pull", gone=True)
        place = Path(pulled.snapshot)
        if isinstance(out, HubCache):
            await asyncio.to_thread(_demand_files, place, pulled.files)
            path = place
        else:
            path = Path(out)
            await asyncio.to_thread(_clone_all, pulled, place, path, settings)
    except AgentError as error:
        if not error.gone and error.exit_code != FULL:  # a model that is too large for its cache may fit elsewhere
            raise
        log.warning("%s: %s; this process fetches it by itself", pull.model_id, error)
        return None
    except SourceChanged as error:
        log.warning("%s: %s; this process fetches it by itself", pull.model_id, error)
        return None
    if pulled.unproven and pull.revision:
        warn_unproven(pull.model_id, pull.revision, pulled.unproven)
    proven = None if pull.revision != pulled.commit else not pulled.unproven
    fetched = Fetched(
        ModelId(pulled.model_id), Digest(pulled.digest), pulled.bytes, pulled.seconds, pulled.sources, 0,
        pulled.resumed_bytes, (TRANSPORT,), proven, pulled.unproven,
    )  # fmt: skip
    return fetched, path


@contextlib.asynccontextmanager
async def _beside(found: AgentLink, pull: Pull) -> AsyncIterator[None]:
    """In the block, the agent fetches the model as well: the next program of this machine finds it there."""

    async def have() -> None:
        with contextlib.suppress(SwarmError):
            await found.ask(pull)

    task = asyncio.create_task(have(), name="swarm: the agent fetches too")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class _Lines:
    """A line of the log every LINE_EVERY_S."""

    def __init__(self, model_id: str) -> None:
        self._model_id = model_id
        self._loop = asyncio.get_running_loop()
        self._next_at = self._loop.time() + LINE_EVERY_S

    def show(self, progress: PullProgress) -> None:
        if progress.bytes and self._loop.time() >= self._next_at:
            self._next_at = self._loop.time() + LINE_EVERY_S
            done, rate = progress.done_bytes / progress.bytes, progress.rate_bytes_per_s / 1e6
            log.info("%s: %.0f %%, %.3g MB/s, through the agent", self._model_id, 100 * done, rate)


def _is_own_cache(place: str) -> bool:
    return os.path.realpath(hf_cache.cache_root()) == os.path.realpath(place)


def _demand_files(place: Path, files: Sequence[PulledFile]) -> None:
    """Raises SourceChanged unless all files are here, as the agent verified them."""
    for file in files:
        _stamp(file).demand(place / file.path, Stamp.at(place / file.path))


def _clone_all(pulled: Pulled, place: Path, out: Path, settings: Settings) -> None:
    with store_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(ConfinedDirectory.open(out)) as into:
            staged = f"clone-{secrets.token_hex(8)}"
            try:
                for file in pulled.files:
                    at = place / file.path
                    clone(at, _stamp(file), into, file.path, staged=f"{PARTIAL}/{staged}", fsync=settings.fsync)
            except FileNotFoundError as error:
                raise SourceChanged(place, "it is not visible here") from error
            finally:
                _remove_staged(into, staged)
        if manifest := digest_cache.recall(settings.cache, place):
            digest_cache.remember(settings.cache, out, manifest)


def _remove_staged(into: ConfinedDirectory, name: str) -> None:
    with contextlib.suppress(OSError, StoreError), contextlib.closing(into.enter(PARTIAL)) as partial:
        partial.remove_tree(name)
    into.remove_if_empty(PARTIAL)


def _stamp(file: PulledFile) -> Stamp:
    return Stamp(file.size, file.mtime_ns, file.ctime_ns, file.inode)
