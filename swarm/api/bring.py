"""Fetches for programs that read the Hugging Face cache by themselves.

Must not know: engines.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from swarm.api.calls import fetch, fetch_wanted
from swarm.api.fetching import CommitOf
from swarm.api.handles import HUB_CACHE, Weights
from swarm.api.landing import TURN_S
from swarm.api.want import Want
from swarm.content.manifest import Digest, Manifest, ModelId
from swarm.errors import StoreError
from swarm.node.resolve import resolve
from swarm.runtime import runtime
from swarm.settings import Settings

BRING_FIND_S, LINGER_S = 3.0, 10.0


def bring(model_id: str, revision: str | None, *, settings: Settings) -> Path:
    """Fetches a model of the hub into the Hugging Face cache for a program that reads it there; returns its snapshot.

    Looks for peers and the hub for at most `BRING_FIND_S`, because that program can download by itself. Then serves the
    model for up to `LINGER_S`, while other nodes still fetch it: they started at the same time. Raises as `fetch` does.
    """
    quick = dataclasses.replace(settings, find_timeout_s=min(settings.find_timeout_s or BRING_FIND_S, BRING_FIND_S))
    with fetch(model_id, out=HUB_CACHE, settings=quick, revision=revision) as weights:
        runtime().run(_linger(quick, weights.digest))
    if weights.path is None:
        raise StoreError(f"{model_id}: the Hugging Face cache has no directory of it")
    return weights.path


def fetch_of_commit(
    model_id: str, *, out: Path, commit: CommitOf | None, settings: Settings, revision: str | None
) -> Weights:
    """As `fetch` into a directory, of an artifact whose files have to be of a commit of another id.

    Raises NotOfCommit for other files, and as `fetch` does.
    """
    want = Want(model_id, out, None, "cpu", None, None, settings, revision, commit=commit)
    return runtime().run(fetch_wanted(want))


def manifest_of(model_id: str, digest: Digest, *, settings: Settings) -> Manifest:
    """The manifest of a digest, from peers. Raises ManifestNotFound."""

    async def ask() -> Manifest:
        node = await runtime().acquire(settings)
        try:
            find_s, trusted = settings.find_timeout_s, settings.trusted
            found = await resolve(node, ModelId(model_id), digest=digest, find_timeout_s=find_s, trusted=trusted)
            return found[0]
        finally:
            await runtime().release(settings)

    return runtime().run(ask())


async def _linger(settings: Settings, digest: Digest) -> None:
    node = await runtime().acquire(settings)
    try:
        deadline = node.now() + LINGER_S
        while node.feeds(digest) and node.now() < deadline:
            await node.changed(TURN_S)
    finally:
        await runtime().release(settings)
