"""The asyncio half of `Claims`: the part of a promised fetch that proves files, and bans who claimed wrong digests.

    peers  ── Claims, Reading ──>  claims, reads
    chunk  ── held ─────────────>  proof (threads) ──> claims ──> Proven, or chunks to read from the origin again

Must not know: which origin it is, how chunks come from peers or from the origin.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator, Sequence

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Chunk, Digests
from swarm.errors import OriginChanged, StoreError
from swarm.peers.host import Host
from swarm.protocol import messages
from swarm.protocol.messages import NodeId
from swarm.store import RecordingStore, Store
from swarm.transfer import download_events as events
from swarm.transfer.claims import BanClaimant, ClaimRun, Claims
from swarm.transfer.origin_driver import OriginDownload, OriginDriver, OriginSource
from swarm.transfer.origin_reads import OriginReads
from swarm.transfer.proof import FileProver
from swarm.transfer.verify import Verifier

HASHERS_MAX = 8


class PromiseDriver:
    """Claims, proofs and reads of one fetch. `source` is None for a node that has only peers.

    `tell(message)` sends a message to all peers with an interest in the artifact.
    """

    def __init__(
        self,
        store: Store,
        held: Bitfield,
        wanted: Bitfield,
        *,
        host: Host,
        claims: Claims,
        source: OriginSource | None,
        transfer_ids: Iterator[int],
        stall_timeout_s: float,
        tell: Callable[[messages.OriginReading], None],
        rng: random.Random,
    ) -> None:
        self.claims = claims
        self._manifest = store.manifest
        chunks = store.manifest.chunks
        self._wanted = {chunks[index].file for index in wanted}
        self._wanted |= {number for number, file in enumerate(store.manifest.files) if not file.size}
        self._store = store
        self._host = host
        self._tell = tell
        self._stall_timeout_s = stall_timeout_s
        self._reads = OriginReads(store.manifest, node=host.id, readers_max=source.readers_max if source else None)
        self._origin: OriginDriver | None = None
        if source:
            self._origin = OriginDriver(
                source,
                store.manifest,
                held,
                host=host,
                reads=self._reads,
                urgent=lambda: claims.must_read,
                transfer_ids=transfer_ids,
                tell=self._tell_reading,
                rng=rng,
            )
        contents = [file.content for file in store.manifest.files]
        self._prover = FileProver(store, lambda chunk: chunk in held and chunk not in claims.must_read, contents)
        self._hashers = asyncio.Semaphore(min(HASHERS_MAX, os.cpu_count() or 1))
        self._proving: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._senders: dict[int, NodeId] = {}  # by transfer
        self._again_at = host.now()  # the last chunk that was read again, or was to be
        self._download: OriginDownload

    def begin(self, download: OriginDownload, verifier: Verifier) -> None:
        """Starts to prove, and to read where there is an origin."""
        self._download = download
        if self._origin:
            self._origin.begin(download, verifier)
        for file in sorted(self._wanted):
            self._prove_soon(file)
        asyncio.get_running_loop().call_soon(self._finish)

    async def end(self) -> None:
        """Ends all reads and proofs; returns when no thread uses the store any more."""
        if self._origin:
            await self._origin.end()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def failure(self) -> str:
        """Why the last read from the origin failed; empty after one that did not."""
        return self._origin.failure if self._origin else ""

    def tick(self) -> None:
        """Ends a fetch for which the origin has been silent for too long."""
        if self._origin:
            self._origin.tick()
        if self.claims.must_read and self._host.now() - self._again_at > self._stall_timeout_s:
            file = self._manifest.chunks[min(self.claims.must_read)].file
            self._download.fail(self._wrong(file, "could not be read again"))

    # Chunks

    def asked(self, transfer: int, peer: NodeId) -> None:
        """A transfer is requested from a peer."""
        self._senders[transfer] = peer

    def closed(self, transfer: int) -> None:
        """A transfer is over."""
        self._senders.pop(transfer, None)

    def is_right(self, transfer: int, chunk: Chunk, digests: Digests) -> bool:
        """Whether the sender of a transfer claims these digests. The origin is right until it is disproved."""
        if self._origin and transfer in self._origin.transfers:
            return True
        sender = self._senders.get(transfer)
        return sender is not None and self.claims.expected(sender, chunk.index) == digests

    def landed(self, peer: NodeId | None, chunk: Chunk, digests: Digests) -> None:
        """A chunk with these digests lies in its place; `peer` is None for one that this node read from the origin."""
        if peer is None:
            self.claims.read(chunk.index, digests)
            self._again_at = self._host.now()
        else:
            self.claims.landed(chunk.index, digests, peer)
        if isinstance(self._store, RecordingStore):
            claim = self.claims.claim(chunk.index)
            self._store.record(chunk.index, claim.digests.xxh3 + claim.digests.blake3, claim.reader)

    async def stop_read(self, transfer: int) -> None:
        """Ends a transfer from the origin that another one was faster than."""
        if self._origin:
            await self._origin.stop(transfer)

    def held(self, chunk: Chunk) -> None:
        """The download knows a chunk that has landed."""
        if self._origin:
            self._origin.progressed()
        self._prove_soon(chunk.file)

    # Peers

    def told(self, peer: NodeId, runs: Sequence[ClaimRun]) -> None:
        """A peer claims digests of chunks that it holds."""
        _, bans = self.claims.told(peer, runs)
        self._ban(bans)
        if bans and not self._is_done():
            self._read_again(self.claims.reopen())

    def reading(self, peer: NodeId, message: messages.OriginReading) -> None:
        """A peer reads these chunks from the origin."""
        self._reads.told(peer, message.able, message.runs, self._host.now())
        self._look()

    def left(self, peer: NodeId) -> None:
        """A peer is gone: what it was reading is free again."""
        self._reads.left(peer)
        self.claims.left(peer)
        self._look()

    def met(self, members: frozenset[NodeId]) -> None:
        """The members that fetch this artifact, linked or not."""
        self._reads.met(members)

    def own_reading(self) -> messages.OriginReading:
        """The ranges that this node reads, for peers."""
        able = self._origin is not None and self._origin.able
        runs = tuple(self._reads.ranges())[: messages.READING_RUNS_MAX]
        return messages.OriginReading(self._manifest.digest, able, runs)

    def _tell_reading(self) -> None:
        self._tell(self.own_reading())

    def _look(self) -> None:
        if self._origin:
            self._origin.look()

    def _ban(self, bans: Sequence[BanClaimant]) -> None:
        for ban in bans:
            self._download.handle(events.ClaimDisproved(ban.peer, ban.why))

    # Proofs

    def _prove_soon(self, file: int) -> None:
        ready = self._prover.advances(file) or self._prover.complete(file)
        if ready and file not in self._proving and file not in self.claims.proven:
            self._proving.add(file)
            task = self._host.spawn(self._prove(file), f"prove file {file}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _prove(self, file: int) -> None:
        try:
            while self._prover.advances(file):
                async with self._hashers:
                    job = asyncio.get_running_loop().run_in_executor(None, self._prover.advance, file)
                    try:
                        await asyncio.shield(job)
                    finally:
                        await asyncio.wait([job])
        except StoreError as error:
            self._download.fail(error)
            return
        finally:
            self._proving.discard(file)
        if self._prover.complete(file) and file not in self.claims.proven:
            self._conclude(file)

    def _conclude(self, file: int) -> None:
        """All chunks of a file are hashed: it counts, or some are read again."""
        if self.claims.is_weak(file):
            again = self.claims.sample(file) if self._origin else self.claims.suspect(file)
            right = not again
        else:
            right = self._prover.right(file)
            again = [] if right else self.claims.disproved(file)
        if right:
            self._ban(self.claims.proved(file))
            self._read_again(self.claims.reopen())
            self._finish()
        elif again:
            self._read_again(again)
        else:
            self._download.fail(self._wrong(file, "does not have the content that the origin lists"))

    def _read_again(self, chunks: Sequence[int]) -> None:
        """Asks the origin for held chunks that are in doubt, ascending."""
        if chunks and not self._origin:
            file = self._manifest.chunks[chunks[0]].file
            self._download.fail(self._wrong(file, "has wrong chunks of a peer, and no origin is here to ask"))
        elif chunks:
            self._again_at = self._host.now()
            for chunk in reversed(chunks):
                self._prover.again(chunk)
            self._look()

    def _is_done(self) -> bool:
        return self._wanted <= self.claims.proven

    def _finish(self) -> None:
        if self._is_done():
            self._download.handle(events.Proven())

    def _wrong(self, file: int, why: str) -> OriginChanged:
        where = self._origin.source.name if self._origin else "peers"
        return OriginChanged(where, f"{self._manifest.files[file].path} {why}; run the same fetch again")
