"""A fetch on an open node: finds the artifact, proves what is pinned, and lands it.

    digest                  pins the artifact
    revision, if a commit   pins the files: the origin's listing is asked for beside the fetch (`transfer.commit_proof`)
    signed_by               pins what a publisher signed

Must not know: where bytes go (`landing`), the arguments of users.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from swarm.api import through_agent
from swarm.api.handles import HubCache
from swarm.api.landing import Deadline, FetchTarget
from swarm.checkpoint import hf_cache, proven
from swarm.content.manifest import Digest, ModelId
from swarm.content.selection import Selection
from swarm.errors import FetchTimeout, NotOfCommit, SettingsError, SourceChanged
from swarm.node.cold_start import Found, Lister, OriginModel, find, of_listing
from swarm.node.fetch import Fetched
from swarm.node.node import Node
from swarm.node.resolve import full_digest, resolve
from swarm.origin import registry
from swarm.protocol.messages import unsayable
from swarm.settings import Settings
from swarm.store import Store
from swarm.transfer.commit_proof import PinnedCommit, warn_unproven

if TYPE_CHECKING:
    import torch

DIGEST_DIGITS = 64  # fewer choose among what is served, and pin nothing
RESOLVE_GRACE_S = 1.0  # resolution ends before the timeout: its error names the addresses that were tried
_DIGEST = re.compile("[0-9a-f]{6,64}")
_COMMIT = re.compile("[0-9a-f]{40}")

Landed: TypeAlias = tuple[Fetched, Store | None, Path | None]
Resolved: TypeAlias = Callable[[Digest, int], object]

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class CommitOf:
    """A commit that fetched files have to be of. `beside`: files of the artifact that are no files of the commit."""

    model_id: str
    commit: str
    beside: frozenset[str] = frozenset()


async def fetch_on(
    node: Node,
    model_id: str,
    *,
    settings: Settings,
    out: str | Path | HubCache | None = None,
    into: Mapping[str, Any] | None = None,
    digest: str | None = None,
    timeout_s: float | None = None,
    device: str = "cpu",
    abandon_s: float = math.inf,
    revision: str | None = None,
    selection: Selection | None = None,
    dtype: torch.dtype | None = None,
    resolved: Resolved | None = None,
    commit: CommitOf | None = None,
    found: Found | None = None,
    served_as: ModelId | None = None,
) -> Landed:
    """Fetches `ID` or `ID@REVISION`, or a part of it, on an open node.

    Returns result and store, and the directory if there is one. In a directory files are whole. `resolved` is called
    with the digest and the bytes of the part once they are known. Where an agent of this machine fetched the files,
    there is no store: the agent serves them.

    A revision that is a whole commit pins, unless a digest or a publisher does: the files are compared with the hub's
    listing, where it can be had. If they are others, the fetch reads those of the hub. `commit`: pins beside `digest`,
    and an artifact with other files raises NotOfCommit. `found`: the artifact, if the caller has found it and proves it
    of its revision. `served_as`: the id under which peers have it and get it, in place of the one of the address.
    """
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise SettingsError(
            "digest", f"{digest!r} is not a digest: 64 digits from 0 to 9 and a to f, or the first 6 or more"
        )
    model_id, revision = hf_cache.with_revision(model_id, revision)
    began = node.now()
    pull = None
    if found is None and commit is None and served_as is None:
        pull = through_agent.pull_of(model_id, revision, digest, selection, timeout_s)
    name, at = origin_of(model_id, revision, settings)
    name = served_as or name
    limits = [limit for limit in (settings.find_timeout_s, timeout_s) if limit is not None]
    find_timeout_s = min(limits, default=math.inf if settings.wait else None)
    pinned = digest is not None and len(digest) == DIGEST_DIGITS
    if commit is None and found is None and not pinned and not settings.signed_by and is_commit(revision):
        commit = CommitOf(model_id, revision or "")
    target = FetchTarget(
        node,
        Deadline(node, name, timeout_s, began),
        out=out,
        into=into,
        device=device,
        settings=settings,
        selection=selection,
        dtype=dtype,
        revision=revision,
        abandon_s=abandon_s,
        # What was found before is kept for callers that pin, and for others.
        blake3=pinned or commit is not None or (found is not None and found.manifest.has_blake3),
    )
    proof = _Pin(node, commit, settings, find_timeout_s=find_timeout_s) if commit else None
    async with contextlib.AsyncExitStack() as open_:
        if proof:
            open_.callback(proof.end)
        if pull and (done := await through_agent.files(open_, node, pull, out=out, settings=settings)):
            return done[0], None, done[1]

        async def look() -> Found:
            try:
                async with asyncio.timeout(None if timeout_s is None else timeout_s + RESOLVE_GRACE_S):
                    return await find_on(
                        node, model_id, revision=revision, digest=digest, settings=settings,
                        find_timeout_s=find_timeout_s, lister=proof.lister if proof else None,
                    )  # fmt: skip
            except TimeoutError:
                raise FetchTimeout(model_id, timeout_s=timeout_s or 0.0, fraction=0.0) from None

        async def land(found: Found) -> Landed:
            if proof is None:
                return await target.land(found, None, resolved)
            return await proof.land(target, found, resolved, whole=selection is None, instead=None if digest else at)

        if found is not None:
            return await land(found)
        found = await look()
        try:
            return await land(found)
        except SourceChanged as error:
            if found.manifest.digest in node.holdings():
                raise
            # The own copy was the only one, and is withdrawn: the origin may have it.
            log.warning("%s; it is looked for elsewhere", error)
            return await land(await look())


async def find_on(
    node: Node,
    model_id: str,
    *,
    revision: str | None,
    digest: str | None,
    settings: Settings,
    find_timeout_s: float | None,
    lister: Lister | None = None,
) -> Found:
    """The artifact of a model id, with peers first and at its origin then. Raises as `resolve` and `find` do."""
    name, at = origin_of(model_id, revision, settings)
    whole = digest
    if digest is not None and len(digest) < DIGEST_DIGITS:
        whole = await full_digest(node, name, digest, find_timeout_s=find_timeout_s)
    how: dict[str, Any] = {
        "digest": None if whole is None else Digest(whole),
        "find_timeout_s": find_timeout_s,
        "trusted": settings.trusted,
        "revision": revision,
    }
    if at:
        return await find(node, name, at, **how, lister=lister)
    return Found(*await resolve(node, name, **how))


class _Pin:
    """A pinned commit of one fetch: the listing of its origin, on its way from now on, if there is an origin."""

    def __init__(self, node: Node, commit: CommitOf, settings: Settings, *, find_timeout_s: float | None) -> None:
        self.lister: Lister | None = None
        self._commit = commit
        self._cache = settings.cache
        self._where = ""
        if at := origin_of(commit.model_id, commit.commit, settings)[1]:
            self._where = at.where
            self.lister = Lister(node, at, find_timeout_s=find_timeout_s)
            self.lister.start()

    def end(self) -> None:
        """Asks no more."""
        if self.lister:
            self.lister.stop()

    async def land(
        self, target: FetchTarget, found: Found, resolved: Resolved | None, *, whole: bool, instead: OriginModel | None
    ) -> Landed:
        """Lands the artifact, proven where that is possible. `whole`: not only a part.

        If it has other files than the commit, those of the origin are landed in place of it. Without `instead`, raises
        NotOfCommit.
        """
        commit, lister = self._commit, self.lister
        if found.source or (lister and proven.known(self._cache, self._where, commit.commit, found.manifest.digest)):
            return _as_proven(await target.land(found, None, resolved))
        if lister is None:
            warn_unproven(commit.model_id, commit.commit, "there is no origin to ask")
            fetched, store, path = await target.land(found, None, resolved)
            return dataclasses.replace(fetched, proven=False, unproven="there is no origin to ask"), store, path
        pinned = PinnedCommit(commit.commit, lister, beside=commit.beside)
        try:
            fetched, store, path = await target.land(found, pinned, resolved)
        except NotOfCommit as error:
            if instead is None or lister.listing is None or lister.listing.commit != commit.commit:
                raise
            log.warning("%s; the files are read from %s", error, lister.address)
            return _as_proven(await target.land(of_listing(lister.listing, instead), None, resolved))
        if fetched.unproven:
            warn_unproven(commit.model_id, commit.commit, fetched.unproven)
        elif whole:
            proven.remember(self._cache, self._where, commit.commit, fetched.digest)
        return fetched, store, path


def _as_proven(landed: Landed) -> Landed:
    fetched, store, path = landed
    return dataclasses.replace(fetched, proven=True), store, path


def is_proven(commit: CommitOf, digest: Digest, settings: Settings) -> bool:
    """Whether it is recorded here that the artifact is the commit's."""
    at = origin_of(commit.model_id, commit.commit, settings)[1]
    return at is not None and proven.known(settings.cache, at.where, commit.commit, digest)


def is_commit(revision: str | None) -> bool:
    """Whether a revision names one commit for ever."""
    return _COMMIT.fullmatch(revision or "") is not None


def origin_of(model_id: str, revision: str | None, settings: Settings) -> tuple[ModelId, OriginModel | None]:
    """The id of a model in the swarm, and where it is read if no peer has it. Raises SettingsError."""
    if why := unsayable(model_id):
        raise SettingsError("model_id", why)
    address = registry.parse(model_id)
    if address is None:
        plain = hf_cache.is_model_id(model_id) and "/" in model_id
        if settings.origin == "none" or settings.signed_by or not plain:  # an origin has no signature of a publisher
            return ModelId(model_id), None
        address = registry.OriginAddress(settings.origin, model_id, model_id)
    reader = registry.make_origin(address.scheme)
    limits = settings.origin_limit, settings.origin_readers
    return ModelId(address.model_id), OriginModel(reader, address.model, revision, *limits)
