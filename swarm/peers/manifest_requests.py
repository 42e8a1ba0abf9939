"""Questions between two nodes before a fetch: what is the manifest of this digest, and where does the model come from.

Answers come in messages, some in parts; each question has a deadline, and a peer that leaves has answered all of
them. What a peer answers is bounded here and checked by whoever asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeAlias, TypeVar

from swarm.content.manifest import MANIFEST_BYTES_MAX, Digest, Manifest
from swarm.errors import PeerError, PeerTimeout, RemoteProtocolError
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import NodeId, Origin

T = TypeVar("T")
Question: TypeAlias = messages.ManifestRequest | messages.OriginRequest
Answer: TypeAlias = messages.ManifestPart | messages.OriginReply


class ManifestRequests:
    """This node's open questions, and its answers to others'. `lookup` says what this node has of a digest."""

    def __init__(self, lookup: Callable[[Digest], tuple[Manifest, Origin | None] | None]) -> None:
        self._lookup = lookup
        self._manifests: dict[tuple[NodeId, Digest], _Manifest] = {}
        self._origins: dict[tuple[NodeId, Digest], _Open[Origin | None]] = {}

    async def manifest(self, peer: Peer, digest: Digest, *, timeout_s: float) -> bytes:
        """A manifest's bytes as one peer sends them: bounded, but not checked. Raises PeerError."""
        if peer.why_gone:  # nobody would say so later: `left` was called before
            raise PeerError(peer.name, peer.why_gone)
        key = peer.node, digest
        if key not in self._manifests:
            self._manifests[key] = _Manifest(peer, partial(self._manifests.pop, key))
            peer.post(messages.ManifestRequest(digest))
        try:
            return await self._manifests[key].answer(timeout_s=timeout_s)
        except TimeoutError:
            raise PeerTimeout(peer.name, f"did not send its manifest within {timeout_s:g} s") from None

    async def origin(self, peer: Peer, digest: Digest, *, timeout_s: float) -> Origin | None:
        """Where a peer says that a checkpoint came from; None when it does not know or does not answer."""
        if peer.why_gone:
            return None
        key = peer.node, digest
        if key not in self._origins:
            self._origins[key] = _Open(partial(self._origins.pop, key))
            peer.post(messages.OriginRequest(digest))
        try:
            return await self._origins[key].answer(timeout_s=timeout_s)
        except TimeoutError:
            return None

    async def answer(self, peer: Peer, question: Question) -> None:
        """Answers a peer's question."""
        found = self._lookup(question.digest)
        if isinstance(question, messages.OriginRequest):
            reply = messages.OriginReply(question.digest, found[1] if found else None)
            if len(messages.encode(reply)) > messages.FRAME_BYTES_MAX:  # some 10,000 files: fetched without their etags
                reply = messages.OriginReply(question.digest, None)
            peer.post(reply)
            return
        data = found[0].encoded if found else b""
        for offset in range(0, max(1, len(data)), messages.MANIFEST_PART_BYTES):
            part = data[offset : offset + messages.MANIFEST_PART_BYTES]
            peer.post(messages.ManifestPart(question.digest, len(data), offset, part))
            await asyncio.sleep(0)  # other messages get in between

    def hear(self, peer: Peer, answer: Answer) -> None:
        """Takes (a part of) an answer. Raises RemoteProtocolError when the parts do not fit together."""
        key = peer.node, answer.digest
        if isinstance(answer, messages.ManifestPart):
            if inquiry := self._manifests.get(key):
                inquiry.add(answer)
        elif waiting := self._origins.get(key):
            waiting.succeed(answer.origin)

    def left(self, node: NodeId, why: str) -> None:
        """A peer is gone."""
        for (asked, _), inquiry in self._manifests.items():
            if asked == node:
                inquiry.fail(why)
        for (asked, _), waiting in self._origins.items():
            if asked == node:
                waiting.succeed(None)


class _Open(Generic[T]):
    """A question on its way to one peer. Whoever asks the same meanwhile waits for the same answer; `forget` is called
    when nobody waits any more."""

    def __init__(self, forget: Callable[[], object]) -> None:
        self.done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._forget = forget
        self._askers = 0

    async def answer(self, *, timeout_s: float) -> T:
        """Raises TimeoutError, and what the question failed with."""
        self._askers += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self.done)
        finally:
            self._askers -= 1
            if not self._askers:
                self._forget()

    def succeed(self, answer: T) -> None:
        if not self.done.done():
            self.done.set_result(answer)


class _Manifest(_Open[bytes]):
    """A manifest on its way from one peer."""

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
