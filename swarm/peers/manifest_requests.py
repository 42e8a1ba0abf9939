"""Requests for manifests and origins: those of this node to its peers, and the answers to theirs.

A manifest arrives in parts. A request has a deadline and fails when its peer leaves. Answers are bounded here; callers
check their content.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

from swarm.content.manifest import MANIFEST_BYTES_MAX, Digest, Manifest
from swarm.errors import PeerError, PeerTimeout, RemoteProtocolError
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import NodeId, Origin

T = TypeVar("T")


class ManifestRequests:
    """The open requests of a node. `lookup` returns the manifest and the origin that this node has of a digest."""

    def __init__(self, lookup: Callable[[Digest], tuple[Manifest, Origin | None] | None]) -> None:
        self._lookup = lookup
        self._manifests: dict[tuple[NodeId, Digest], _ManifestRequest] = {}
        self._origins: dict[tuple[NodeId, Digest], _OpenRequest[Origin | None]] = {}

    async def manifest(self, peer: Peer, digest: Digest, *, timeout_s: float) -> bytes:
        """A manifest's bytes as a peer sends them: bounded, but not checked. Raises PeerError."""
        if peer.why_gone:  # `peer_left` was called before, and would not end this request
            raise PeerError(peer.name, peer.why_gone)
        key = peer.node, digest
        if key not in self._manifests:
            self._manifests[key] = _ManifestRequest(peer, partial(self._manifests.pop, key))
            peer.post(messages.ManifestRequest(digest))
        try:
            return await self._manifests[key].answer(timeout_s=timeout_s)
        except TimeoutError:
            raise PeerTimeout(peer.name, f"did not send its manifest within {timeout_s:g} s") from None

    async def origin(self, peer: Peer, digest: Digest, *, timeout_s: float) -> Origin | None:
        """The origin of a checkpoint as a peer sends it; None when the peer does not know it or does not answer."""
        if peer.why_gone:
            return None
        key = peer.node, digest
        if key not in self._origins:
            self._origins[key] = _OpenRequest(partial(self._origins.pop, key))
            peer.post(messages.OriginRequest(digest))
        try:
            return await self._origins[key].answer(timeout_s=timeout_s)
        except TimeoutError:
            return None

    async def send_manifest(self, peer: Peer, request: messages.ManifestRequest) -> None:
        """Answers a ManifestRequest in parts, with an empty part if this node has no such manifest."""
        found = self._lookup(request.digest)
        data = found[0].encoded if found else b""
        for offset in range(0, max(1, len(data)), messages.MANIFEST_PART_BYTES):
            part = data[offset : offset + messages.MANIFEST_PART_BYTES]
            peer.post(messages.ManifestPart(request.digest, len(data), offset, part))
            await asyncio.sleep(0)  # other messages are sent between two parts

    def on_origin_request(self, peer: Peer, request: messages.OriginRequest) -> None:
        """Answers an OriginRequest."""
        found = self._lookup(request.digest)
        origin = found[1] if found else None
        # With some 10,000 files: fetched without what lies beside them, or without their etags.
        smaller = (origin, origin and origin.alone(), None)
        replies = (messages.OriginReply(request.digest, origin) for origin in smaller)
        peer.post(next(reply for reply in replies if len(messages.encode(reply)) <= messages.FRAME_BYTES_MAX))

    def on_manifest_part(self, peer: Peer, part: messages.ManifestPart) -> None:
        """Raises RemoteProtocolError when the parts do not fit together."""
        if request := self._manifests.get((peer.node, part.digest)):
            request.add(part)

    def on_origin_reply(self, peer: Peer, reply: messages.OriginReply) -> None:
        """Ends the request for this origin."""
        if request := self._origins.get((peer.node, reply.digest)):
            request.succeed(reply.origin)

    def peer_left(self, node: NodeId, why: str) -> None:
        """Fails the requests to a peer."""
        for (asked, _), manifest in self._manifests.items():
            if asked == node:
                manifest.fail(why)
        for (asked, _), origin in self._origins.items():
            if asked == node:
                origin.succeed(None)


class _OpenRequest(Generic[T]):
    """A request to a peer, and all callers that wait for its answer. `forget` is called when the last caller leaves."""

    def __init__(self, forget: Callable[[], object]) -> None:
        self.done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._forget = forget
        self._callers = 0

    async def answer(self, *, timeout_s: float) -> T:
        """Raises TimeoutError, and the error that the request failed with."""
        self._callers += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self.done)
        finally:
            self._callers -= 1
            if not self._callers:
                self._forget()

    def succeed(self, answer: T) -> None:
        if not self.done.done():
            self.done.set_result(answer)


class _ManifestRequest(_OpenRequest[bytes]):
    """A request for a manifest, with the parts that have arrived."""

    def __init__(self, peer: Peer, forget: Callable[[], object]) -> None:
        super().__init__(forget)
        self._peer = peer
        self._data = bytearray()

    def add(self, part: messages.ManifestPart) -> None:
        end = part.offset + len(part.data)
        if part.total == 0:
            self.fail("does not have the manifest that it announced")
        elif part.offset != len(self._data) or end > min(part.total, MANIFEST_BYTES_MAX) or not part.data:
            raise RemoteProtocolError(self._peer.name, "sent parts of a manifest that do not fit together")
        else:
            self._data += part.data
            if end == part.total:
                self.succeed(bytes(self._data))

    def fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(PeerError(self._peer.name, why))
