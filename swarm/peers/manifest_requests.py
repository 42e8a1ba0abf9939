"""Requests for manifests and provenances: those of this node to its peers, and the answers to theirs.

A manifest arrives in parts. A request has a deadline and fails when its peer leaves. Answers are bounded here, each and
all together; callers check their content. The parts of an answer are posted one at a time, as the peer reads them: a
thousand requests of a peer that reads nothing take the memory of one part.
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
ASKED_MAX = 64  # manifests that a peer may ask for at once; a node asks for those of its fetches
ARRIVING_BYTES_MAX = 2 * MANIFEST_BYTES_MAX  # parts of all manifests that are on their way to this node


class ManifestRequests:
    """The open requests of a node. `lookup` returns the manifest and the provenance that this node has of a digest."""

    def __init__(self, lookup: Callable[[Digest], tuple[Manifest, Origin | None] | None]) -> None:
        self._lookup = lookup
        self._answers: dict[Peer, dict[Digest, int]] = {}  # the next offset of each manifest that a peer waits for
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
        """The provenance of a checkpoint as a peer sends it; None when the peer does not know it or does not answer."""
        try:
            return await self.answered_origin(peer, digest, timeout_s=timeout_s)
        except PeerError:
            return None

    async def answered_origin(self, peer: Peer, digest: Digest, *, timeout_s: float) -> Origin | None:
        """The provenance of a checkpoint as a peer sends it; None when the peer knows none. Raises PeerError."""
        if peer.why_gone:
            raise PeerError(peer.name, peer.why_gone)
        key = peer.node, digest
        if key not in self._origins:
            self._origins[key] = _OpenRequest(partial(self._origins.pop, key))
            peer.post(messages.OriginRequest(digest))
        try:
            return await self._origins[key].answer(timeout_s=timeout_s)
        except TimeoutError:
            raise PeerTimeout(peer.name, f"did not send its origin within {timeout_s:g} s") from None

    def on_manifest_request(self, peer: Peer, request: messages.ManifestRequest) -> bool:
        """A peer asks for a manifest; asked again, it gets all parts again. Returns whether to start `send_manifests`.

        Raises RemoteProtocolError for more than ASKED_MAX at once.
        """
        begins = peer not in self._answers
        answers = self._answers.setdefault(peer, {})
        if request.digest not in answers and len(answers) >= ASKED_MAX:
            raise RemoteProtocolError(peer.name, f"asks for more than {ASKED_MAX} manifests at once")
        answers[request.digest] = 0
        return begins

    async def send_manifests(self, peer: Peer) -> None:
        """Sends the manifests that a peer waits for, in parts; an empty part for one that this node does not have."""
        answers = self._answers[peer]
        try:
            while answers:
                for digest, offset in list(answers.items()):
                    if not await peer.room():
                        return
                    if answers[digest] == offset:  # else it was asked again meanwhile
                        self._send_part(peer, digest, offset)
                await asyncio.sleep(0)  # other messages are sent between two parts
        finally:
            del self._answers[peer]

    def _send_part(self, peer: Peer, digest: Digest, offset: int) -> None:
        found = self._lookup(digest)
        data = found[0].encoded if found else b""
        part = data[offset : offset + messages.MANIFEST_PART_BYTES]
        peer.post(messages.ManifestPart(digest, len(data), min(offset, len(data)), part))
        self._answers[peer][digest] = offset + len(part)
        if offset + len(part) >= len(data):
            del self._answers[peer][digest]

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
            if sum(other.arrived_bytes for other in self._manifests.values()) > ARRIVING_BYTES_MAX:
                request.fail("sends one manifest too many at once")

    def on_origin_reply(self, peer: Peer, reply: messages.OriginReply) -> None:
        """Ends the request for this provenance."""
        if request := self._origins.get((peer.node, reply.digest)):
            request.succeed(reply.origin)

    def peer_left(self, node: NodeId, why: str) -> None:
        """Fails the requests to a peer."""
        for (asked, _), manifest in self._manifests.items():
            if asked == node:
                manifest.fail(why)
        for (asked, _), origin in self._origins.items():
            if asked == node:
                origin.end(PeerError("a holder", why))


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

    def end(self, error: PeerError) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # marks it as retrieved: its callers may have given up


class _ManifestRequest(_OpenRequest[bytes]):
    """A request for a manifest, with the parts that have arrived."""

    def __init__(self, peer: Peer, forget: Callable[[], object]) -> None:
        super().__init__(forget)
        self._peer = peer
        self._data = bytearray()

    @property
    def arrived_bytes(self) -> int:
        return len(self._data)

    def add(self, part: messages.ManifestPart) -> None:
        if self.done.done() or (part.offset and not self._data):
            return  # the end of an answer to an earlier request, which was given up
        if part.offset == 0:
            self._data.clear()  # the holder begins again, as it was asked again
        end = part.offset + len(part.data)
        if part.total == 0:
            self.fail("does not have the manifest that it announced")
        elif part.offset != len(self._data) or end > min(part.total, MANIFEST_BYTES_MAX) or not part.data:
            raise RemoteProtocolError(self._peer.name, "sent parts of a manifest that do not fit together")
        else:
            self._data += part.data
            if end == part.total:
                self.succeed(bytes(self._data))
                self._data.clear()

    def fail(self, why: str) -> None:
        self._data.clear()
        if not self.done.done():
            self.done.set_exception(PeerError(self._peer.name, why))
