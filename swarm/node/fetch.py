"""Fetches of a node: resume, copy or download, seal.

Owns the running downloads by transfer id. Each fetch is a `DownloadDriver`; what this node has already is copied
instead. If that has changed on the disk, it is withdrawn at once, and the rest comes from peers or the origin; without
either, the fetch fails, for its caller to look again. Must not know: links, gossip, how a store keeps its bytes.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from swarm.content.bitfield import Bitfield, runs
from swarm.content.manifest import Chunk, Digest, Digests, Manifest, ModelId
from swarm.errors import FetchTimeout, StoreError, Unpinnable
from swarm.hashing.cpu import chunk_digests
from swarm.journal import FetchEnded, FetchStarted
from swarm.peers.host import Host
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import NodeId, Origin
from swarm.store import LossyStore, RecordingStore, Store
from swarm.transfer.claims import Claims
from swarm.transfer.commit_proof import CommitProof, PinnedCommit
from swarm.transfer.download_driver import DownloadDriver
from swarm.transfer.origin_driver import OriginSource
from swarm.transfer.promise_driver import PromiseDriver
from swarm.transfer.shares import Share, Shares
from swarm.transfer.verify import SourceFailed, copy, is_right

RESUME_JOBS = 4
_NODE = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Fetched:
    """A finished fetch of `bytes`, those of the wanted part.

    `sources`: bytes by the peer's name; `transports`: the schemes that brought them. `proven`: whether the files are
    those of the pinned commit by the listing of its origin, with `unproven`, the reason if not; None without one.
    """

    model_id: ModelId
    digest: Digest
    bytes: int
    seconds: float
    sources: dict[str, int]
    rejected_chunks: int
    resumed_bytes: int
    transports: tuple[str, ...] = ()
    proven: bool | None = None
    unproven: str = ""

    @property
    def rate_bytes_per_s(self) -> float:
        """Transferred bytes per second."""
        return (self.bytes - self.resumed_bytes) / self.seconds if self.seconds > 0 else 0.0


class Fetches:
    """All fetches of a node. `seeking(digest)`: links to holders of the artifact are wanted in its block.

    `held_elsewhere(digest)`: whether another node is known to hold some of it.
    """

    def __init__(
        self,
        *,
        host: Host,
        shares: Shares,
        seeking: Callable[[Digest], AbstractContextManager[None]],
        held_elsewhere: Callable[[Digest], bool],
        idle_timeout_s: float,
        stall_timeout_s: float,
        rng: random.Random,
    ) -> None:
        self._host = host
        self._shares = shares
        self._seeking = seeking
        self._held_elsewhere = held_elsewhere
        self._idle_timeout_s = idle_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._rng = rng
        self._transfer_ids = itertools.count()
        self._transfers: dict[int, DownloadDriver] = {}

    async def fetch(
        self,
        model_id: ModelId,
        store: Store,
        *,
        origin: Origin | None,
        timeout_s: float | None,
        abandon_s: float,
        wanted: Bitfield | None,
        blake3: bool,
        source: OriginSource | None = None,
        pinned: PinnedCommit | None = None,
    ) -> Fetched:
        """See `Node.fetch`."""
        began, manifest = self._host.now(), store.manifest
        if blake3 and not manifest.has_blake3:
            await asyncio.to_thread(store.close)
            raise Unpinnable(model_id, manifest.digest)
        held = Bitfield(len(manifest.chunks))
        needed = Bitfield.full(held.length) if wanted is None else wanted
        size = sum(manifest.chunks[index].size for index in needed)
        share = Share(model_id, store, held, origin, wanted=wanted, claims=self._claims(manifest))
        served = store.kept if isinstance(store, LossyStore) else None
        if served is not None:
            share = Share(model_id, store, Bitfield(held.length), origin, wanted=served, sought=needed)
        undo: Callable[[], None] | None = None
        joined: Bitfield | None = None  # the part that the node has already, with the wanted one
        sources: dict[str, int] = {}
        transports: tuple[str, ...] = ()
        rejected_chunks = 0
        proof = CommitProof(pinned, model_id, store, held, needed, host=self._host) if pinned else None
        try:
            async with asyncio.timeout(timeout_s):
                resumed = await _resume(store, held, needed, share.claims, blake3=blake3)
                if proof:
                    proof.begin(lambda error: share.download.fail(error) if share.download else None)
                kept = tuple(runs(list(held)))
                started = FetchStarted(model_id, manifest.digest, size, resumed, held.length, kept)
                self._host.record("node", started)
                own, copied = await self._copy_own(share, store, held, needed, source, blake3=blake3)
                if copied:
                    sources[self._host.name] = copied
                if not held.covers(needed) or not _proven(share, needed):
                    if own and served is not None:
                        undo, share, joined = own.lend(needed), own, own.wanted
                    elif own:
                        joined = needed.union(own.held if own.wanted is None else own.wanted)
                        undo, share = own.extend(store, held, wanted), own
                    download = await self._download(share, store, held, abandon_s, needed, source, blake3=blake3)
                    sources |= download.sources()
                    transports = tuple(sorted(download.transports))
                    rejected_chunks = download.machine.rejected_chunks
                if proof:
                    await proof.conclude()
            await asyncio.to_thread(
                store.seal, lambda chunk: is_right(store, chunk, blake3=blake3, known=share.known(chunk))
            )
        except BaseException as error:
            if proof:
                await proof.end()
            self._host.record("node", FetchEnded(manifest.digest, str(error) or type(error).__name__))
            done = held.common(needed) / max(1, len(needed))
            if undo:
                undo()
                self._shares.announce()
            elif self._shares.shares.get(manifest.digest) is share:
                self._shares.withdraw(manifest.digest, "the fetch failed")
            await asyncio.to_thread(store.close)
            if isinstance(error, TimeoutError) and timeout_s is not None:
                raise FetchTimeout(model_id, timeout_s=timeout_s, fraction=done, why=share.failure) from None
            raise
        finally:
            share.settled.set()
        self._host.record("node", FetchEnded(manifest.digest, None))
        share.sought = None
        if undo:
            share.wanted = joined
            self._shares.announce()
        else:
            self._shares.add(share)
        seconds = self._host.now() - began
        proven, unproven = (not proof.unproven, proof.unproven) if proof else (None, "")
        return Fetched(
            model_id,
            manifest.digest,
            size,
            seconds,
            sources,
            rejected_chunks,
            resumed,
            transports,
            proven,
            unproven,
        )

    def on_grant(self, peer: Peer, grant: messages.Grant) -> None:
        """Passes a grant to the download of its transfer."""
        if download := self._transfers.get(grant.transfer):
            download.granted(peer, grant.transfer, grant.chunks)

    def on_refuse(self, peer: Peer, refusal: messages.Refuse) -> None:
        """Passes a refusal to the download of its transfer."""
        if download := self._transfers.get(refusal.transfer):
            download.refused(peer, refusal.transfer, reason=refusal.reason, retry_s=refusal.retry_s)

    async def _copy_own(
        self,
        share: Share,
        store: Store,
        held: Bitfield,
        needed: Bitfield,
        source: OriginSource | None,
        *,
        blake3: bool,
    ) -> tuple[Share | None, int]:
        """Copies what this node has; returns its share, if there is one still, and the bytes. Nothing is awaited after
        the last `settled`: another fetch of the digest may wait here too. Raises what the share raised where no other
        node, nor an origin, has the rest."""
        digest, before = store.manifest.digest, held.union(held)
        while (own := await self._shares.settled(digest)) and own.held.common(needed.minus(held)):
            failure = await self._copy(own, store, held, needed, blake3=blake3)
            if failure:
                if self._shares.shares.get(digest) is own:
                    self._shares.lose(digest, failure)
                if source is None and not self._held_elsewhere(digest):
                    raise failure
                share.claims = self._claimed_again(share.claims, held)
        return own, sum(store.manifest.chunks[index].size for index in held.minus(before))

    async def _copy(
        self, own: Share, store: Store, held: Bitfield, needed: Bitfield, *, blake3: bool
    ) -> StoreError | None:
        """Copies chunks of an own share; returns its failure."""
        lacking = needed.minus(held)
        chunks = lacking.minus(lacking.minus(own.held))
        claims = own.claims
        digests = (lambda chunk: claims.claim(chunk).digests) if claims else None
        with self._shares.in_use(own):  # it stays open until the copy is complete
            work = partial(copy, own.source, store, held, chunks=chunks, blake3=blake3, digests=digests)
            try:
                await asyncio.to_thread(work)
            except SourceFailed as error:
                return error.error
        return None

    def _claimed_again(self, claims: Claims | None, held: Bitfield) -> Claims | None:
        """The claims of the held chunks alone, none of whose files is proven: others have to be read again."""
        if claims is None:
            return None
        made = Claims(claims.manifest, node=self._host.id, rng=self._rng)
        for index in held:
            claim = claims.claim(index)
            made.read(index, claim.digests, reader=claim.reader)
        return made

    def _claims(self, manifest: Manifest) -> Claims | None:
        """The claims of a promise, those of an earlier fetch if there is one."""
        known = self._shares.shares.get(manifest.digest)
        if known and known.claims:
            return known.claims
        return Claims(manifest, node=self._host.id, rng=self._rng) if manifest.promised else None

    async def _download(
        self,
        share: Share,
        store: Store,
        held: Bitfield,
        abandon_s: float,
        wanted: Bitfield,
        source: OriginSource | None,
        *,
        blake3: bool,
    ) -> DownloadDriver:
        digest = share.manifest.digest
        promise = None
        if share.claims:
            promise = PromiseDriver(
                store,
                share.held,
                wanted,
                host=self._host,
                claims=share.claims,
                source=source,
                transfer_ids=self._transfer_ids,
                stall_timeout_s=self._stall_timeout_s,
                tell=partial(self._shares.send_reading, digest),
                rng=self._rng,
            )
        download = share.download = DownloadDriver(
            share.model_id,
            store,
            held,
            host=self._host,
            idle_timeout_s=self._idle_timeout_s,
            stall_timeout_s=self._stall_timeout_s,
            abandon_s=math.inf if source else abandon_s,
            wanted=wanted,
            blake3=blake3,
            transfer_ids=self._transfer_ids,
            transfers=self._transfers,
            rng=self._rng,
            announce=self._announcer(share, store),
            promise=promise,
        )
        self._shares.show(share)
        try:
            with self._seeking(digest):
                await download.run()
        finally:
            share.download, share.failure = None, promise.failure if promise else ""
        return download

    def _announcer(self, share: Share, store: Store) -> Callable[[list[int], float], None]:
        """Tells peers of verified chunks, of those that the store does not keep only seeds."""
        digest = share.manifest.digest
        if not isinstance(store, LossyStore):  # asked once: `isinstance` of a protocol costs as much as hashing a chunk
            return partial(self._shares.send_have, digest)
        lossy = store

        def announce(chunks: list[int], within_s: float) -> None:
            kept = [chunk for chunk in chunks if chunk in lossy.kept and share.source is lossy]
            for chunk in kept:
                share.held.add(chunk)
            self._shares.send_have(digest, kept, within_s)
            self._shares.send_have(digest, [chunk for chunk in chunks if chunk not in kept], within_s, to_seeds=True)

        return announce


def _proven(share: Share, wanted: Bitfield) -> bool:
    """Whether the files of these chunks are proven; of a promise, which has to be."""
    chunks = share.manifest.chunks
    return share.claims is None or {chunks[index].file for index in wanted} <= share.claims.proven


async def _resume(store: Store, held: Bitfield, wanted: Bitfield, claims: Claims | None, *, blake3: bool) -> int:
    """Adds the wanted chunks that an earlier attempt left in the store, hashed again; returns their bytes.

    Those of a promise must have the digests that were recorded; files with final names are proven as a whole later.
    """
    manifest = store.manifest
    recording = store if isinstance(store, RecordingStore) and claims else None
    recorded = await asyncio.to_thread(recording.recorded) if recording else {}
    present = await asyncio.to_thread(lambda: [chunk for chunk in store.present() if chunk.index in wanted])

    cancelled = threading.Event()  # a thread cannot be stopped, and the process waits for it at exit

    def verified(chunks: list[Chunk]) -> list[tuple[Chunk, Digests]]:
        todo = itertools.takewhile(lambda _: not cancelled.is_set(), chunks)
        strong = blake3 or claims is not None
        hashed = ((chunk, chunk_digests(manifest.scheme, store.read(chunk), blake3=strong)) for chunk in todo)
        return [(chunk, digests) for chunk, digests in hashed if right(chunk, digests)]

    def right(chunk: Chunk, digests: Digests) -> bool:
        if claims and chunk.index in claims:
            return claims.claim(chunk.index).digests == digests
        if recording is None:
            return chunk.has(digests)
        known, _ = recorded.get(chunk.index, (b"", ""))
        return recording.final(chunk.file) or known == digests.xxh3 + digests.blake3

    jobs = [job for start in range(RESUME_JOBS) if (job := present[start::RESUME_JOBS])]
    try:
        found = await asyncio.gather(*(asyncio.to_thread(verified, job) for job in jobs))
    finally:
        cancelled.set()
    for chunk, digests in itertools.chain.from_iterable(found):
        held.add(chunk.index)
        if claims and chunk.index not in claims:
            _, reader = recorded.get(chunk.index, (b"", ""))
            claims.read(chunk.index, digests, reader=NodeId(reader) if _NODE.fullmatch(reader) else None)
    return sum(manifest.chunks[index].size for index in held)
