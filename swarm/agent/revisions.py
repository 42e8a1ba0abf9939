"""What a program of the hub may ask about a model: the commit of a revision, and its files with sizes and names.

    origin reachable         its listing, as the hub gives it, for KNOWN_S; a commit is for ever
    it is not, or has none   what peers serve under this id and revision
    neither                  the snapshot in the cache

A branch is thus as new as at the hub, although the bytes come from peers. The token of a program goes to the origin
with the listing and the reads that it causes, and nowhere else; answers are shared by programs with the same token.

The origin also says who may read. It calls a private model missing: what peers have as one of its commits is looked
for there under that commit. It lists gated models to all: `demand_access` asks for a file. An answer that is odd or
late does not make the origin unreachable: a program could bring that about, and read what it is denied.

Must not know: HTTP, how files are fetched.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from swarm.api import find_on, is_commit
from swarm.checkpoint import hf_cache
from swarm.checkpoint.blob_check import is_hub_name
from swarm.content.manifest import ModelId
from swarm.content.promise import ListedFile, Listing, etags
from swarm.errors import (
    AgentError,
    ManifestNotFound,
    OriginBusy,
    OriginDenied,
    OriginError,
    OriginNotFound,
    OriginUnreachable,
    OriginUnusable,
    RevisionNotFound,
    SwarmError,
)
from swarm.node.cold_start import Found, OriginModel, find, of_listing
from swarm.node.node import Node
from swarm.origin import OriginReader
from swarm.origin.hf import HubOrigin
from swarm.settings import Settings
from swarm.transfer.origin_driver import on_daemon

KNOWN_S = 60.0  # a branch may have moved since
ORIGIN_ANSWER_S, ORIGIN_REST_S = 6.0, 30.0  # programs wait 10 s for an answer; an origin that is down is left alone
FIND_S, FIND_UNHEARD_S = 6.0, 1.0  # for a model that a peer is known to serve, and else: this node knows its peers
MISSING_S = 5.0  # what exists nowhere is not looked for again
KNOWN_MAX = 2000
FILES_KNOWN_MAX = 400_000  # of all that are known, at 0.5 KB
LOOKS_MAX = 64  # at the origin at once; each has a thread, until the origin has answered

T = TypeVar("T")

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class HubFile:
    """A file of a revision. `name`: the hub's (sha256 or git's sha1), or swarm's own of the same use as an ETag."""

    path: str
    size: int
    name: str

    @property
    def large(self) -> bool:
        """Whether the hub keeps it in its large file store."""
        return len(self.name) == 64


@dataclass
class Revision:
    """A commit of a model and its files. `found`: the artifact, once it was looked for."""

    model_id: ModelId
    commit: str
    asked: str
    files: dict[str, HubFile]
    listing: Listing | None = None
    reader: OriginReader | None = None
    beside: dict[str, bytes] = field(default_factory=dict)  # small files that are no part of the artifact
    found: Found | None = None
    is_readable: bool = False  # the origin has given a file of it to the token
    asking: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    @property
    def of_origin(self) -> bool:
        """Whether its commit is one of the origin."""
        return self.found is None or (self.found.origin is not None and bool(self.found.origin.commit))

    @property
    def names(self) -> dict[str, str]:
        """The names of the files, by path."""
        return {path: file.name for path, file in self.files.items()}


class Revisions:
    """All methods run on the node's loop."""

    def __init__(self, node: Node, settings: Settings) -> None:
        self.own_address = ""  # of the face: it does not ask itself
        self._node = node
        self._settings = settings
        self._known: dict[tuple[str, str, str], tuple[float, Revision]] = {}  # oldest first
        self._asking: dict[tuple[str, str, str], asyncio.Task[Revision]] = {}
        self._missing: dict[tuple[str, str, str], tuple[float, SwarmError]] = {}
        self._down: tuple[float, OriginUnreachable] | None = None  # until when it rests, and what it said
        self._resting: dict[tuple[ModelId, str], tuple[float, OriginUnreachable]] = {}  # of revisions; oldest first
        self._looks = 0  # threads that ask the origin

    async def get(self, model_id: ModelId, asked: str, token: str | None) -> Revision:
        """The revision. Raises OriginError, ManifestNotFound and its kinds, ManifestConflict."""
        key = model_id, asked, hashlib.sha256((token or "").encode()).hexdigest()
        if (known := self._known.get(key)) and (self._node.now() < known[0] or known[1].commit == asked):
            return known[1]
        if (missing := self._missing.get(key)) and self._node.now() < missing[0]:
            raise missing[1].with_traceback(None)
        return await self._shared(key, lambda: self._look(model_id, asked, token))

    async def demand_access(self, revision: Revision) -> None:
        """Raises OriginError if the origin does not give the files to the program that asked for the revision."""
        reader, listing = revision.reader, revision.listing
        if isinstance(reader, HubOrigin) and listing and listing.gated:
            async with revision.asking:
                if not revision.is_readable:
                    await self._ask(reader, (revision.model_id, "files"), lambda: reader.demand_access(listing))
                    revision.is_readable = True

    async def artifact_of(self, revision: Revision) -> Found:
        """The artifact of a revision, whose files the agent can fetch. Raises as `get`."""
        if revision.found is None or not self._is_held(revision.found):
            revision.found = await self._find(revision)
        return revision.found

    def give_up(self, revision: Revision) -> None:
        """The holders of its artifact have failed: it is what the origin lists, or is looked for again."""
        at = self._at(revision)
        revision.found = of_listing(revision.listing, at) if revision.listing and at else None

    def _is_held(self, found: Found) -> bool:
        """Whether an artifact can still be had: its last holder may have gone, or this node have evicted it."""
        digest = found.manifest.digest
        held = self._node.holdings().get(digest)
        return found.source is not None or (held is not None and held.complete) or bool(self._node.holders_of(digest))

    async def _shared(self, key: tuple[str, str, str], look: Callable[[], Coroutine[Any, Any, Revision]]) -> Revision:
        """One look for all that ask for the same."""
        if key not in self._asking:
            task = self._asking[key] = asyncio.create_task(look(), name=f"look for {key[0]}")
            task.add_done_callback(lambda done: self._looked(key, done))
        return await asyncio.shield(self._asking[key])

    def _looked(self, key: tuple[str, str, str], task: asyncio.Task[Revision]) -> None:
        self._asking.pop(key, None)
        if task.cancelled():
            return
        if error := task.exception():
            if isinstance(error, ManifestNotFound | OriginNotFound | OriginDenied):
                self._missing[key] = self._node.now() + MISSING_S, error
                while len(self._missing) > KNOWN_MAX:
                    del self._missing[next(iter(self._missing))]
            return
        model_id, _, token = key
        for each in (key, (model_id, task.result().commit, token)):  # programs go on with the commit
            self._known.pop(each, None)
            self._known[each] = self._node.now() + KNOWN_S, task.result()
        files = sum(len(known.files) for _, known in self._known.values())
        while len(self._known) > 2 and (len(self._known) > KNOWN_MAX or files > FILES_KNOWN_MAX):
            files -= len(self._known.pop(next(iter(self._known)))[1].files)

    async def _look(self, model_id: ModelId, asked: str, token: str | None, *, of_peers: bool = False) -> Revision:
        """`of_peers`: it is a commit that peers have told."""
        failure: OriginError | None = None
        if self._settings.origin == "hf" and "/" in model_id and not self._settings.signed_by:
            reader = HubOrigin(environment_of(token, os.environ, own=self.own_address))
            try:
                listing = await self._ask(reader, (model_id, asked), lambda: reader.listing(model_id, asked))
                return self._same(_listed(model_id, asked, listing, reader))
            except OriginDenied:
                raise  # peers may have it: who the hub denies it to gets it from no peer either
            except OriginError as error:
                failure = error
        answered = isinstance(failure, OriginNotFound | OriginUnusable)
        if failure and answered and of_peers:
            raise failure
        here = self._here(model_id, asked)
        if here and not answered:
            return here
        try:
            found = await self._with_peers(model_id, asked)
        except ManifestNotFound:
            if failure is None:
                raise
            if here is None:
                raise failure.with_traceback(None) from None
            found = here
        if answered and found.of_origin:
            return await self._look(model_id, found.commit, token, of_peers=True)
        return found

    async def _ask(self, reader: HubOrigin, what: tuple[ModelId, str], work: Callable[[], T]) -> T:
        """What the origin answers, on a thread. Raises OriginError, and AgentError where too much is asked at once."""
        for rest in (self._down, self._resting.get(what)):
            if rest and self._node.now() < rest[0]:
                raise rest[1].with_traceback(None)  # not 'there is no such model': the origin might have it
        if self._looks >= LOOKS_MAX:
            raise AgentError(f"{LOOKS_MAX} questions to {reader.address} are not answered yet; try again")
        self._looks += 1
        asking = on_daemon(work)
        asking.add_done_callback(lambda done: self._asked(done, what))
        if not (await asyncio.wait([asking], timeout=ORIGIN_ANSWER_S))[0]:
            raise OriginUnreachable(reader.address, "does not answer")
        return asking.result()

    def _asked(self, asking: asyncio.Future[Any], what: tuple[ModelId, str]) -> None:
        """The origin has answered, maybe after the program that asked was told that it does not.

        It rests as a whole where no connection holds, or it names a time to come again; else for this question alone: a
        program may know one that it cannot answer, and would read other revisions that it is denied.
        """
        self._looks -= 1
        failure = asking.exception()
        if not isinstance(failure, OriginUnreachable) or (self._down and self._node.now() < self._down[0]):
            return
        until = self._node.now() + ORIGIN_REST_S
        if isinstance(failure, OriginBusy) and not failure.retry_s:
            self._resting.pop(what, None)
            self._resting[what] = until, failure
            while len(self._resting) > KNOWN_MAX:
                del self._resting[next(iter(self._resting))]
            log.warning("%s; peers alone are asked for %s@%s for the next %g s", failure, *what, ORIGIN_REST_S)
            return
        self._down = until, failure
        level = logging.INFO if failure.lasting else logging.WARNING
        log.log(level, "%s; peers alone are asked for the next %g s", failure, ORIGIN_REST_S)

    async def _with_peers(self, model_id: ModelId, asked: str) -> Revision:
        revision = None if asked == "main" else asked
        settings = replace(self._settings, origin="none", wait=False)
        timeout_s = FIND_S if self._node.holders(model_id) else FIND_UNHEARD_S
        try:
            found = await find_on(
                self._node, model_id, revision=revision, digest=None, settings=settings, find_timeout_s=timeout_s
            )
        except RevisionNotFound:
            if not is_commit(asked):
                raise
            # The commit of an artifact without one is the start of its digest.
            found = await find_on(
                self._node, model_id, revision=None, digest=asked, settings=settings, find_timeout_s=FIND_UNHEARD_S
            )
        return _described(model_id, asked, found)

    def _here(self, model_id: ModelId, asked: str) -> Revision | None:
        """What the cache has; files without a name of the hub are left out: only their manifest can prove them."""
        place = hf_cache.snapshot(model_id, revision=asked)
        if place is None:
            return None
        files = {}
        for path, name in hf_cache.hub_names(place).items():
            try:
                files[path] = HubFile(path, (place / path).stat().st_size, name)
            except OSError:
                continue
        return Revision(model_id, place.name, asked, files) if files else None

    def _same(self, revision: Revision) -> Revision:
        """The revision that is known already, with its artifact, if it is the same commit."""
        for _, known in self._known.values():
            if (known.model_id, known.commit, known.files) == (revision.model_id, revision.commit, revision.files):
                if known.found and not known.found.source:
                    revision.found = known.found
                break
        return revision

    async def _find(self, revision: Revision) -> Found:
        """With peers first; what the origin lists binds them: their files must have its names."""
        at = self._at(revision)
        if revision.listing is None or at is None:
            settings = replace(self._settings, origin="none")
            return await find_on(
                self._node, revision.model_id, revision=revision.commit, digest=None, settings=settings,
                find_timeout_s=FIND_S,
            )  # fmt: skip
        found = await find(
            self._node, revision.model_id, at, digest=None, find_timeout_s=self._settings.find_timeout_s,
            trusted=self._settings.trusted, revision=revision.commit,
        )  # fmt: skip
        if found.source is None and (found.manifest.promised or not self._is_held(found)):
            # A promise of peers, or of this node itself, ends with the fetch behind it.
            return of_listing(revision.listing, at)
        if wrong := _differs(found, revision):
            log.warning("%s: peers serve another %s than the hub lists; it is read there", revision.model_id, wrong)
            return of_listing(revision.listing, at)
        return found

    def _at(self, revision: Revision) -> OriginModel | None:
        if revision.listing is None or revision.reader is None:
            return None
        limits = self._settings.origin_limit, self._settings.origin_readers
        return OriginModel(_Known(revision.reader, revision.listing), revision.model_id, revision.commit, *limits)


class _Known:
    """An origin whose listing is known."""

    def __init__(self, reader: OriginReader, listing: Listing) -> None:
        self.scheme, self.address = reader.scheme, reader.address
        self._listing = listing
        self.read = reader.read

    def listing(self, _model: str, _revision: str | None) -> Listing:
        """The same one each time."""
        return self._listing


def environment_of(token: str | None, environment: Mapping[str, str], *, own: str) -> dict[str, str]:
    """The environment in which the origin is asked: with a program's token in place of the agent's.

    An HF_ENDPOINT that names the agent itself is left out: it would ask itself.
    """
    made = dict(environment)
    endpoint = urlsplit(made.get("HF_ENDPOINT", ""))
    if own and endpoint.port == urlsplit(f"//{own}").port and endpoint.hostname in ("127.0.0.1", "localhost", "::1"):
        del made["HF_ENDPOINT"]
    if token:
        made["HF_TOKEN"] = token
        made.pop("HF_HUB_DISABLE_IMPLICIT_TOKEN", None)
    return made


def _listed(model_id: ModelId, asked: str, listing: Listing, reader: OriginReader) -> Revision:
    files = {file.path: HubFile(file.path, file.size, _name_of(file)) for file in listing.files}
    return Revision(model_id, listing.commit, asked, files, listing, reader)


def _name_of(file: ListedFile) -> str:
    return file.content.partition(":")[2]


def _described(model_id: ModelId, asked: str, found: Found) -> Revision:
    """The revision of an artifact that peers serve."""
    manifest, origin = found.manifest, found.origin
    names = etags(manifest) if manifest.promised else dict(origin.etags) if origin else {}
    commit = origin.commit if origin and origin.commit else manifest.digest[:40]
    files = {}
    for number, entry in enumerate(manifest.files):
        name = names.get(entry.path, "")
        if not is_hub_name(name):
            parts = "".join(str(chunk.digest) for chunk in manifest.chunks_of(number))
            name = f"swarm-{hashlib.sha256(f'{entry.size} {parts}'.encode()).hexdigest()[:40]}"
        files[entry.path] = HubFile(entry.path, entry.size, name)
    return Revision(model_id, commit, asked, files, found=found)


def _differs(found: Found, revision: Revision) -> str:
    """The path of a file of the artifact that the hub does not list with this content; '' if there is none.

    A file without a name is compared when it is here (`Artifact`).
    """
    names = etags(found.manifest) if found.manifest.promised else dict(found.origin.etags) if found.origin else {}
    for entry in found.manifest.files:
        listed = revision.files.get(entry.path)
        if listed and (entry.size != listed.size or names.get(entry.path, listed.name) != listed.name):
            return entry.path
    return ""


def is_revision(text: str) -> bool:
    """Whether a text may be a revision; others would be paths."""
    return re.fullmatch(r"[\w][\w./+-]{0,255}", text, re.ASCII) is not None and ".." not in text
