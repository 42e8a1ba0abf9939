"""From a model id to its manifest: who has it, do they agree, and what exactly is it.

Xxhash digests in a manifest find accidents; that the manifest is the right one rests on its sha256, which the caller
pins, or on all reachable peers naming the same one.
"""

from __future__ import annotations

import asyncio
from functools import partial

from swarm.errors import ManifestConflict, ManifestError, ManifestNotFound, PeerError
from swarm.manifest import Manifest, decode
from swarm.messages import Origin
from swarm.node import Node
from swarm.peer import Peer

# Time for others to object, counted from the first peer that has the model: while some address has not answered yet,
# and in any case until that peer has told of the members it knows.
SETTLE_S, SETTLE_LEAST_S = 0.3, 0.05
POLL_S = 0.1
MANIFEST_TIMEOUT_S = 15.0
ORIGIN_TIMEOUT_S = 2.0


async def resolve(
    node: Node, model_id: str, *, digest: str | None, find_timeout_s: float
) -> tuple[Manifest, Origin | None]:
    """The manifest that a model id stands for in this swarm, and where the model came from if its peers know.

    Raises ManifestNotFound when nobody serves it in time, ManifestConflict when peers disagree and no digest is pinned.
    """
    loop = asyncio.get_running_loop()
    deadline = node.now() + find_timeout_s
    failures: dict[str, None] = {}  # each once, in order
    unusable: set[str] = set()  # nodes whose manifest is not what its digest says; asking again changes nothing
    while True:
        digest_now, peers = await _agreed(node, model_id, digest=digest, deadline=deadline)
        if digest_now and (own := node.described(digest_now)):
            return own
        if digest_now is None:
            raise ManifestNotFound(model_id, tried=[*failures, *node.tried()], waited_s=find_timeout_s)
        for peer in peers:
            if peer.node in unusable or (failures and node.now() > deadline):
                continue
            try:
                data = await node.inquiries.manifest(peer, digest_now, timeout_s=MANIFEST_TIMEOUT_S)
                manifest = await loop.run_in_executor(None, partial(decode, data, digest=digest_now))
            except (PeerError, ManifestError) as error:
                failures[f"{peer.name}: {error}"] = None
                if isinstance(error, ManifestError):
                    unusable.add(peer.node)
                continue
            return manifest, await node.inquiries.origin(peer, digest_now, timeout_s=ORIGIN_TIMEOUT_S)
        if node.now() > deadline:
            raise ManifestNotFound(model_id, tried=list(failures), waited_s=find_timeout_s)
        await node.changed(POLL_S)


async def _agreed(node: Node, model_id: str, *, digest: str | None, deadline: float) -> tuple[str | None, list[Peer]]:
    """The digest to fetch and who announces it; (None, []) when nobody did before the deadline."""
    first_seen: float | None = None
    while True:
        if digest is not None:
            holders = {digest: found} if (found := node.holders_of(digest)) or node.described(digest) else {}
        else:
            holders = node.holders(model_id)
        now = node.now()
        if holders:
            first_seen = now if first_seen is None else first_seen
            settle_s = SETTLE_S if node.searching else SETTLE_LEAST_S
            if digest is not None or now - first_seen >= settle_s:
                if len(holders) > 1:
                    raise ManifestConflict(model_id, {d: _names(who) for d, who in holders.items()})
                return next(iter(holders.items()))
        elif now >= deadline:
            return None, []
        await node.changed(SETTLE_LEAST_S if holders else POLL_S)


def _names(holders: list[Peer]) -> list[str]:
    return [f"{peer.name} ({peer.hello.address})" for peer in holders] or ["this node"]
