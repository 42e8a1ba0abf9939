"""Manifests and provenances of digests, as linked holders send them, and the waits for them.

Must not know: which of several digests is right.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from functools import partial

from swarm.content.manifest import Digest, Manifest, decode
from swarm.errors import PeerError
from swarm.node.holders import Holder
from swarm.node.node import Node
from swarm.peers.peer import Peer
from swarm.protocol.messages import NodeId, Origin

MANIFEST_TIMEOUT_S = 15.0
ORIGIN_TIMEOUT_S = 2.0
ORIGINS_ASKED_MAX = 4  # holders of a digest; the first may have been killed
LINK_S = 0.5
ASKED_AHEAD_MAX = 4  # manifests; a peer that announces ever new digests would fill the memory with them


class Answers:
    """Manifests and provenances from peers, requested ahead: on a busy link they take longer than the agreement."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._asked: dict[tuple[NodeId, Digest], asyncio.Task[tuple[Manifest, Origin | None]]] = {}

    def ask(self, peer: Peer, digest: Digest) -> asyncio.Task[tuple[Manifest, Origin | None]]:
        """Requests them, once."""
        key = peer.node, digest
        if key not in self._asked:
            if len(self._asked) >= ASKED_AHEAD_MAX:
                _give_up(self._asked.pop(next(iter(self._asked))))
            self._asked[key] = asyncio.create_task(self._ask(peer, digest))
        return self._asked[key]

    async def of(self, peer: Peer, digest: Digest) -> tuple[Manifest, Origin | None]:
        """The answer of a peer. Raises PeerError or ManifestInvalid; the next call requests them again."""
        try:
            return await self.ask(peer, digest)
        finally:
            self._asked.pop((peer.node, digest), None)

    async def _ask(self, peer: Peer, digest: Digest) -> tuple[Manifest, Origin | None]:
        manifest_requests = self._node.manifest_requests
        timeout_s = MANIFEST_TIMEOUT_S + ORIGIN_TIMEOUT_S  # on a slow link it arrives behind other messages
        origin = asyncio.create_task(manifest_requests.origin(peer, digest, timeout_s=timeout_s))
        try:
            data = await manifest_requests.manifest(peer, digest, timeout_s=MANIFEST_TIMEOUT_S)
            manifest = await asyncio.get_running_loop().run_in_executor(None, partial(decode, data, digest=digest))
            with contextlib.suppress(TimeoutError):
                return manifest, await asyncio.wait_for(origin, ORIGIN_TIMEOUT_S)
            return manifest, None
        finally:
            origin.cancel()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._asked.values():
            _give_up(task)


def _give_up(task: asyncio.Task[tuple[Manifest, Origin | None]]) -> None:
    """Ends a request that was made ahead in vain, and marks its exception as retrieved."""
    if not task.cancel() and not task.cancelled():
        task.exception()


async def origins_of(node: Node, holders: Mapping[Digest, list[Holder]]) -> dict[Digest, Origin | None]:
    """Provenances of digests from linked holders. Links are opened for digests without one.

    A digest whose holders do not answer is left out: a killed node says nothing about its revision.
    """

    async def ask(digest: Digest, nodes: list[Holder]) -> tuple[Digest, Origin | None] | None:
        if own := node.described(digest):
            return digest, own[1]
        with node.seeking(digest):
            peers = [holder.peer for holder in nodes if holder.peer][:ORIGINS_ASKED_MAX]
            if not peers:
                await node.changed(LINK_S)
            told = await _first_origin(node, peers, digest)
            return (digest, told[0]) if told else None

    answers = await asyncio.gather(*(ask(digest, nodes) for digest, nodes in holders.items()))
    return dict(answer for answer in answers if answer)


async def _first_origin(node: Node, peers: Sequence[Peer], digest: Digest) -> list[Origin | None]:
    """The first provenance that one of the peers knows, or None if they know none; empty if none of them answers."""
    requests = node.manifest_requests
    asked = [asyncio.create_task(requests.answered_origin(peer, digest, timeout_s=ORIGIN_TIMEOUT_S)) for peer in peers]
    told: list[Origin | None] = []
    try:
        for answer in asyncio.as_completed(asked):
            with contextlib.suppress(PeerError):
                told = [await answer]
                if told[0]:
                    break
    finally:
        for task in asked:
            if not task.cancel() and not task.cancelled():
                task.exception()  # marks it as retrieved
    return told
