"""The agent of a machine: a node, the models that it keeps, and what programs ask of it over the control socket.

    control ──> Agent ──> Artifact ──> api.fetch_on        files of one revision, in batches
                  ├─────> Cache                            what is kept, and what goes
                  └─────> LocalModels                      what the Hugging Face cache has, served to peers

Pulls of one artifact by several programs are one: they share its `Artifact`. `hold` are models that it fetches at its
start and pins; the node is ready when they are there.

Must not know: HTTP, sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from swarm.agent.artifact import TAKE_S, Artifact
from swarm.agent.cache import Cache, CachedModel, key_of, snapshots
from swarm.agent.control import PROGRESS_EVERY_S
from swarm.agent.local_models import LocalModels
from swarm.agent.revisions import Revisions
from swarm.api import find_on, is_commit, part_of
from swarm.api.fetching import DIGEST_DIGITS
from swarm.checkpoint import hf_cache
from swarm.content.manifest import Digest, ModelId
from swarm.content.selection import Selection
from swarm.errors import AgentError, FetchTimeout, SettingsError, SourceChanged, Stalled, SwarmError, Unpinnable
from swarm.node.cold_start import Found
from swarm.node.node import Node
from swarm.observe.fetch_record import FetchRecords
from swarm.observe.units import size_text
from swarm.protocol import agent_messages as messages
from swarm.protocol.agent_messages import (
    Answer,
    Done,
    List,
    Models,
    Pin,
    Pull,
    Pulled,
    PullProgress,
    Remove,
    Request,
    Row,
)
from swarm.settings import Settings

HOLD_AGAIN_S = 30.0  # after a model of `hold` could not be fetched
LOOK_EVERY_S = 60.0  # at what other programs removed

ARTIFACTS_MAX = 1000
REMOVE_WAIT_S, REMOVE_LOOK_S = TAKE_S + 1.0, 0.1
FOUND_S, FOUND_MAX = 30.0, 1000  # pulls of the same model by several programs look for it once

_Answer: TypeAlias = tuple[Found, Mapping[str, str], str]

log = logging.getLogger("swarm")


class Agent:
    """All methods run on the loop of `node`. `records`: of its fetches."""

    def __init__(self, node: Node, records: FetchRecords, settings: Settings) -> None:
        self.settings = settings
        self.node = node
        root = hf_cache.cache_root()
        self.cache = Cache(settings.cache, root, limit_bytes=_limit(settings), withdraw=self._withdraw)
        self.local = LocalModels(node, root, settings=settings, fetched=self._fetched_keys)
        self.revisions = Revisions(node, settings)
        self._records = records
        self._artifacts: dict[Digest, Artifact] = {}
        self._found: dict[tuple[str, str | None, str | None], tuple[float, _Answer]] = {}  # oldest first

    async def run(self) -> None:
        """Fetches what is to be held, serves what the cache has, and looks after it, until it is cancelled."""
        self.cache.look()
        async with asyncio.TaskGroup() as tasks:
            for model in self.settings.hold:
                tasks.create_task(self._hold(model), name=f"hold {model}")
            tasks.create_task(self.local.run(), name="serve the cache")
            tasks.create_task(self._look(), name="look at the cache")

    def reload(self, settings: Settings) -> list[str]:
        """Takes over the limit of the cache, and evicts what exceeds it; returns what has changed."""
        if (limit := _limit(settings)) == self.cache.policy.limit_bytes:
            return []
        self.cache.policy.limit_bytes = limit
        self.cache.look()
        return ["no limit of the cache" if math.isinf(limit) else f"limit of the cache {size_text(limit)}"]

    async def handle(self, request: Request) -> AsyncGenerator[Answer]:
        """The lines that answer a request. Raises SwarmError."""
        match request:
            case Pull():
                async for line in self._pull(request):
                    yield line
            case List():
                yield await self.models()
            case Pin():
                yield self._pin(request)
            case Remove():
                yield await self._remove(request)

    def artifact(
        self, model_id: ModelId, found: Found, revision: str | None, *, names: Mapping[str, str] | None = None
    ) -> Artifact:
        """The artifact of this agent, the same one for all programs. `names`: as of `Artifact.bind`."""
        digest = found.manifest.digest
        if digest not in self._artifacts:
            self._make_space()
            self._artifacts[digest] = Artifact(
                self.node, model_id, found, revision=revision, settings=self.settings, cache=self.cache
            )
        elif found.source:  # its token has just opened the model; an older one may have expired
            self._artifacts[digest].found = found
        self._artifacts[digest].bind(names or {})
        return self._artifacts[digest]

    def _make_space(self) -> None:
        """Forgets the oldest artifact that is neither shared nor on its way, beyond ARTIFACTS_MAX."""
        if len(self._artifacts) >= ARTIFACTS_MAX:
            held = self.node.holdings()
            idle = (digest for digest, each in self._artifacts.items() if not each.busy and digest not in held)
            if (oldest := next(idle, None)) is not None:
                del self._artifacts[oldest]

    async def models(self) -> Models:
        """What the cache has, the last used first."""
        found = await asyncio.to_thread(snapshots, self.cache.root)
        rows = sorted(map(self._row, found), key=lambda row: (-row.used_at, row.model_id))
        limit = self.cache.policy.limit_bytes
        return Models(tuple(rows), self.cache.policy.bytes, None if math.isinf(limit) else limit)

    def _row(self, each: CachedModel) -> Row:
        key = each.key
        digest = self.local.served.get(key) or next((d for d, a in self._artifacts.items() if a.key == key), None)
        held = self.node.holdings().get(digest) if digest else None
        if held:
            served = "whole" if held.complete else f"{len(held) / held.length:.0%}"
        else:
            served = f"no: {self.local.refused[key][1]}" if key in self.local.refused else "not yet"
        names = hf_cache.revisions(each.model_id, root=self.cache.root).get(each.commit, [])
        return Row(
            each.model_id, each.commit, tuple(names), self.cache.size(key), self.cache.pinned(key),
            self.cache.policy.leased(key), served, self.cache.used_at(key), str(each.place),
        )  # fmt: skip

    # Pulls

    async def _pull(self, pull: Pull) -> AsyncGenerator[Answer]:
        """Pulls, and once more where files changed under it or its holders left: they come from elsewhere then."""
        try:
            async for line in self._pull_once(pull):
                yield line
        except (SourceChanged, Stalled) as error:
            if isinstance(error, Stalled) and self.settings.origin == "none":
                raise
            log.warning("%s: %s; it is looked for again", pull.model_id, error)
            async for line in self._pull_once(pull):
                yield line

    async def _pull_once(self, pull: Pull) -> AsyncGenerator[Answer]:
        yield PullProgress(0, 0, 0.0)
        model_id, revision = hf_cache.with_revision(pull.model_id, pull.revision)
        if not hf_cache.is_model_id(model_id.removeprefix("hf://")):
            raise SettingsError("model_id", f"{model_id!r} is no model id of the hub; the agent keeps only such models")
        began = self.node.now()
        deadline = math.inf if pull.timeout_s is None else began + pull.timeout_s
        name = ModelId(model_id.removeprefix("hf://"))
        key = name, revision, pull.digest
        until, answer = self._found.get(key, (0.0, None))
        if answer is None or self.node.now() > until or answer[0].manifest.digest not in self._artifacts:
            finding = asyncio.ensure_future(self._find(name, revision, pull))
            async for line in self._until(finding, pull, deadline, None, 0):
                yield line
            answer = await finding
            self._found.pop(key, None)
            self._found[key] = self.node.now() + FOUND_S, answer
            while len(self._found) > FOUND_MAX:
                del self._found[next(iter(self._found))]
        found, names, unproven = answer
        artifact = self.artifact(name, found, revision, names=names)
        paths = _chosen(pull, found)
        size = sum(artifact.entries[path].size for path in paths)
        if pull.pin:
            self.cache.pin(artifact.key, pinned=True)
        here = all(path in artifact.files and artifact.files[path].is_as_it_was() for path in paths)
        with self.cache.in_use(artifact.key):  # until the program has taken the files
            getting = asyncio.ensure_future(artifact.ensure(paths))
            async for line in self._until(getting, pull, deadline, artifact, size):
                yield line
            try:
                await getting
            except (SourceChanged, Stalled):
                self._found.pop(key, None)  # its holders are gone: it is looked for again
                raise
            last = None if here else artifact.last
            files = []
            for path in paths:
                stamp = artifact.files[path].stamp
                files.append(messages.PulledFile(path, stamp.size, stamp.mtime_ns, stamp.ctime_ns, stamp.inode))
            yield Pulled(
                name, found.manifest.digest, artifact.commit, str(self._place(artifact)), size,
                self.node.now() - began, last.resumed_bytes if last else size, last.sources if last else {},
                tuple(files), unproven,
            )  # fmt: skip

    async def _find(self, model_id: ModelId, revision: str | None, pull: Pull) -> _Answer:
        """The artifact, and the hub's names of its files if a commit is asked for: they bind peers; or why there are
        none.

        A snapshot that is here already is served first, so that this node finds it with itself.
        """
        here = hf_cache.snapshot(model_id, root=self.cache.root, revision=revision or "main")
        if here:
            with contextlib.suppress(SwarmError):
                await self.local.serve(CachedModel(model_id, here.name, here))
        if is_commit(revision) and revision and pull.digest is None:
            listed = await self.revisions.get(model_id, revision, None)
            unproven = "" if listed.listing else "the hub was not asked, or did not answer"
            return await self.revisions.artifact_of(listed), listed.names if listed.listing else {}, unproven
        limits = [limit for limit in (self.settings.find_timeout_s, pull.timeout_s) if limit is not None]
        found = await find_on(
            self.node, model_id, revision=revision, digest=pull.digest, settings=self.settings,
            find_timeout_s=min(limits, default=math.inf if self.settings.wait else None),
        )  # fmt: skip
        if pull.digest is not None and len(pull.digest) == DIGEST_DIGITS and not found.manifest.has_blake3:
            raise Unpinnable(model_id, found.manifest.digest)
        return found, {}, ""

    async def _until(
        self, task: asyncio.Future[Any], pull: Pull, deadline: float, artifact: Artifact | None, size: int
    ) -> AsyncGenerator[Answer]:
        """PullProgress until the task is done; it is cancelled with the caller. Raises FetchTimeout at the deadline."""
        try:
            while True:
                left_s = min(PROGRESS_EVERY_S, deadline - self.node.now())
                if (await asyncio.wait([task], timeout=max(0.0, left_s)))[0]:
                    return
                progress = self._progress(artifact, size)
                if self.node.now() >= deadline:
                    fraction = progress.done_bytes / size if size else 0.0
                    raise FetchTimeout(pull.model_id, timeout_s=pull.timeout_s or 0.0, fraction=fraction)
                yield progress
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def _progress(self, artifact: Artifact | None, size: int) -> PullProgress:
        if artifact is None:
            return PullProgress(0, 0, 0.0)
        here = sum(artifact.entries[path].size for path in artifact.files)
        record = self._records.records.get(artifact.found.manifest.digest)
        rate = 0.0
        if record and record.running:
            here += record.resumed_bytes + record.received_bytes
            rate = record.rate.at(self.node.now())
        return PullProgress(size, min(size, here), rate)

    async def _hold(self, model: str) -> None:
        name, revision = hf_cache.with_revision(model)
        with self.node.asked_for(model, "is being fetched, to be held"):
            while True:
                try:
                    async for _ in self._pull(Pull(name, revision, pin=True)):
                        pass
                except SwarmError as error:
                    log.warning("%s is to be held: %s; trying again every %g s", model, error, HOLD_AGAIN_S)
                    await asyncio.sleep(HOLD_AGAIN_S)
                else:
                    log.info("%s is here, and stays", model)
                    return

    # What is kept

    def _pin(self, pin: Pin) -> Answer:
        chosen = self._chosen(pin.model_id, pin.revision)
        for each in chosen:
            self.cache.pin(each.key, pinned=pin.pinned)
        return Done(tuple(f"{each.key} {'stays' if pin.pinned else 'may be evicted'}" for each in chosen))

    async def _remove(self, remove: Remove) -> Answer:
        lines = []
        for each in self._chosen(remove.model_id, remove.revision):
            if not await self._unread(each.key):
                raise AgentError(f"{each.key} is being read; try again when the programs that load it are done")
            try:
                freed = self.cache.remove(each.key)
            except OSError as error:
                raise AgentError(f"{each.key}: {error}", exit_code=5) from error
            rest = "; files of other programs stay" if each.place.exists() else ""
            lines.append(f"{each.key}: removed, {size_text(freed)} are free again{rest}")
        return Done(tuple(lines))

    async def _unread(self, key: str) -> bool:
        """Whether nothing reads a model, soon: one that has just arrived is kept for its readers for a moment."""
        deadline = self.node.now() + REMOVE_WAIT_S
        while self.cache.policy.leased(key) and self.node.now() < deadline:  # noqa: ASYNC110 - leases end it
            await asyncio.sleep(REMOVE_LOOK_S)
        return not self.cache.policy.leased(key)

    def _chosen(self, model_id: str, revision: str | None) -> Sequence[CachedModel]:
        """Snapshots of a model, of one revision if it is named. Raises AgentError without any."""
        name, revision = hf_cache.with_revision(model_id, revision)
        found = [each for each in snapshots(self.cache.root) if each.model_id == name]
        if revision is not None:
            place = hf_cache.snapshot(name, root=self.cache.root, revision=revision)
            found = [each for each in found if each.place == place]
        if not found:
            known = ", ".join(sorted({each.model_id for each in snapshots(self.cache.root)})[:20]) or "no model"
            wanted = key_of(name, revision) if revision else name
            raise AgentError(
                f"{wanted} is not in {self.cache.root}, which has {known}; `swarm pull {wanted}` fetches it",
                exit_code=3,
            )
        return found

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self.cache.look()

    def _withdraw(self, key: str) -> None:
        """Its files are about to be removed."""
        self.local.withdraw(key)
        for digest, artifact in list(self._artifacts.items()):
            if artifact.key == key:
                artifact.forget()
                if not artifact.busy:  # else it goes on: a second one for the same files would fetch beside it
                    del self._artifacts[digest]
                self.node.withdraw(digest, "its files are removed")

    def _fetched_keys(self) -> set[str]:
        held = self.node.holdings()
        return {artifact.key for digest, artifact in self._artifacts.items() if digest in held}

    def _place(self, artifact: Artifact) -> Path:
        folder = hf_cache.model_folder(artifact.model_id, root=self.cache.root)
        return folder / "snapshots" / artifact.commit

    def __repr__(self) -> str:
        return f"<Agent {self.node!r} | {self.cache!r} | {len(self.local.served)} served from disk>"


def _limit(settings: Settings) -> float:
    """The limit of the cache in bytes, maybe infinite."""
    return math.inf if settings.hub_limit_gb is None else settings.hub_limit_gb * 1e9


def _chosen(pull: Pull, found: Found) -> list[str]:
    """The paths that a pull wants."""
    selection = Selection.read(include=pull.include, exclude=pull.exclude or None, tensors=pull.tensors)
    part = None if selection is None else part_of(selection, found.manifest, whole_files=True)
    files = found.manifest.files
    return [file.path for file in files] if part is None else [files[number].path for number in part.files]
