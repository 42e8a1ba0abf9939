"""A seed whose model others read from its origin: it joins them, and they read no more there.

    a member announces a promise of the model    its files are compared with those that this node serves, by content
    a file is right                              its chunks are hashed, claimed and served as chunks of the promise

What members say is not believed: a promise of other files is hashed and left alone, at most `TRIED_MAX` of them.

Must not know: where the files are (`PromisableSource`), origins.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol, runtime_checkable

from swarm.content.manifest import Digest, Digests, Manifest, ModelId, decode
from swarm.content.promise import ETAG
from swarm.errors import ManifestError, PeerError, StoreError
from swarm.hashing.cpu import chunk_digests
from swarm.node.holders import Announced
from swarm.node.manifest_answers import LINK_S, MANIFEST_TIMEOUT_S, ORIGIN_TIMEOUT_S
from swarm.node.node import Node
from swarm.protocol.messages import Origin
from swarm.store import Source, WatchedSource
from swarm.transfer.claims import Claims
from swarm.transfer.proof import BATCH_BYTES, FileProver

LOOK_EVERY_S = 1.0
TRIED_MAX = 4  # promises of one model whose files are hashed

log = logging.getLogger("swarm")


@runtime_checkable
class PromisableSource(Source, Protocol):
    """Files that may be those of a promise."""

    def promised(self, promise: Manifest) -> WatchedSource | None:
        """The files as a source of a promise, to be closed by itself; None for other paths or sizes. Blocks."""


def follow(node: Node, model_id: ModelId, source: Source) -> None:
    """Joins the promises of a model that this node serves, as long as it does."""
    if isinstance(source, PromisableSource):
        node.spawn(PromisedSeed(node, model_id, source).run(), f"promises of {model_id}")


class PromisedSeed:
    """One model of a seed. A promise is tried once, and served until the seed's own artifact is withdrawn."""

    def __init__(self, node: Node, model_id: ModelId, source: PromisableSource) -> None:
        self._node = node
        self._id = model_id
        self._source = source
        self.tried: set[Digest] = set()
        self._shared: list[Digest] = []

    async def run(self) -> None:
        """Follows what others announce."""
        own = self._source.manifest.digest
        while self._node.described(own) and len(self.tried) < TRIED_MAX:
            promises = self._node.promises()
            for announced in self._node.announced():
                if announced.model_id == self._id and announced.digest in promises - self.tried:
                    await self._ask(announced)
            await self._node.changed(LOOK_EVERY_S)
        while self._node.described(own):
            await self._node.changed(LOOK_EVERY_S)
        for digest in self._shared:
            self._node.release(digest)

    async def _ask(self, announced: Announced) -> None:
        digest = announced.digest
        if self._node.described(digest):
            self.tried.add(digest)
            return
        with self._node.seeking(digest):
            if (peer := announced.holder.peer) is None:
                await self._node.changed(LINK_S)
                return
            requests = self._node.manifest_requests
            try:
                data = await requests.manifest(peer, digest, timeout_s=MANIFEST_TIMEOUT_S)
                manifest = await asyncio.to_thread(lambda: decode(data, digest=digest))
                origin = await requests.answered_origin(peer, digest, timeout_s=ORIGIN_TIMEOUT_S)
            except (PeerError, ManifestError) as error:
                log.debug("%s: %s", self._id, error)
                return
        self.tried.add(digest)
        if manifest.promised and not any(file.content.startswith(ETAG) for file in manifest.files):
            await self._join(manifest, origin)

    async def _join(self, promise: Manifest, origin: Origin | None) -> None:
        with suppress(StoreError):
            if (source := await asyncio.to_thread(self._source.promised, promise)) is None:
                return
            claims = Claims(promise, node=self._node.id, rng=random.Random())  # noqa: S311 - nothing is secret
            prover = FileProver(source, lambda _: True, [file.content for file in promise.files])
            for number in sorted(range(len(promise.files)), key=lambda number: -promise.files[number].size):
                found = await self._hashed(promise, source, prover, number)
                if not prover.right(number):
                    log.debug("%s: %s has other content than its origin lists", self._id, promise.files[number].path)
                    break
                for chunk, digests in found:
                    claims.read(chunk, digests)
                claims.proved(number)
                if promise.digest not in self._shared:
                    self._node.serve_promise(self._id, source, claims, origin=origin)
                    self._shared.append(promise.digest)
                self._node.grown(promise.digest, [chunk for chunk, _ in found])
            if promise.digest not in self._shared:
                await asyncio.to_thread(source.close)

    @staticmethod
    async def _hashed(
        promise: Manifest, source: WatchedSource, prover: FileProver, number: int
    ) -> Sequence[tuple[int, Digests]]:
        """Hashes a file as a whole, and each of its chunks."""
        found: list[tuple[int, Digests]] = []
        chunks = list(promise.chunks_of(number))

        def advance() -> None:
            prover.advance(number)
            size = 0
            while len(found) < len(chunks) and size < BATCH_BYTES:
                chunk = chunks[len(found)]
                found.append((chunk.index, chunk_digests(promise.scheme, source.read(chunk), blake3=True)))
                size += chunk.size

        while len(found) < len(chunks) or not prover.complete(number):
            await asyncio.to_thread(advance)
        return found
