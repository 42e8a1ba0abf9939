"""The artifacts that a node serves or fetches, and what its peers hold of them.

Keeps one `Share` for each digest, announces them to peers, sends `Have` for verified chunks, and passes the holdings of
peers to the download or the super-seeding that they concern.

Must not know: links, datagrams, how a fetch or an upload runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarm.content.bitfield import Bitfield, runs
from swarm.content.commit import PART
from swarm.content.manifest import Chunk, Digest, Digests, Manifest, ModelId
from swarm.content.selection import part_id
from swarm.errors import RemoteProtocolError, SettingsError, StoreError, SwarmError
from swarm.journal import ArtifactsAnnounced, Withdrawn
from swarm.peers.host import Host
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import Announcement, HeldPart, NodeId, Origin
from swarm.protocol.packets import Holding
from swarm.store import Source
from swarm.store.joined import JoinedSource
from swarm.transfer import download_events as events
from swarm.transfer.claims import Claims, claim_messages, claimed_runs
from swarm.transfer.download_driver import DownloadDriver
from swarm.transfer.superseed import Superseed

ANNOUNCE_EVERY_S = 1.0  # progress of a fetch, for status pages

log = logging.getLogger("swarm")


@dataclass(eq=False)
class Share:
    """An artifact whose `source` has the chunks in `held`. `download` is set while a fetch adds chunks.

    `wanted`: the part that was fetched, or is; None for everything. `failure`: of the origin, at the end of a fetch.
    """

    model_id: ModelId
    source: Source
    held: Bitfield
    origin: Origin | None
    download: DownloadDriver | None = None
    superseed: Superseed | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # the artifact is complete, or its fetch failed
    users: int = 1
    spares: list[Source] = field(default_factory=list)  # further sources of the same content
    wanted: Bitfield | None = None
    claims: Claims | None = None  # of a promise
    failure: str = ""
    sought: Bitfield | None = None  # the chunks that a fetch of a LossyStore asks for, beyond those that it will serve

    def close(self) -> None:
        """Closes its sources."""
        for source in (self.source, *self.spares):
            source.close()

    @property
    def manifest(self) -> Manifest:
        """The manifest of the artifact."""
        return self.source.manifest

    def readable(self, chunk: int) -> bool:
        """Whether a chunk is here, and not about to be replaced."""
        return chunk < self.held.length and chunk in self.held and not (self.claims and chunk in self.claims.must_read)

    def known(self, chunk: Chunk) -> Digests | None:
        """The digests of a held chunk of a promise; None of other chunks, and where the manifest has them."""
        return self.claims.claim(chunk.index).digests if self.claims and chunk.index in self.claims else None

    def announcement(self) -> Announcement:
        """The artifact as links announce it."""
        m = self.manifest
        chunks = len(self.held), self.held.length
        known = self.origin.shown() if self.origin else []
        shown = [name for name in known if len(name) <= messages.REVISION_SHOWN_CHARS]
        names = dict.fromkeys([*shown[: messages.REVISIONS_SHOWN - 1], *shown[-1:]])  # the commit is the last
        superseeds = self.superseed is not None
        return Announcement(self.model_id, m.digest, m.tier, m.size, *chunks, superseeds, self._part(), tuple(names))

    def holding(self) -> Holding:
        """The artifact as gossip announces it."""
        m = self.manifest
        chunks = len(self.held), self.held.length
        return Holding(self.model_id, m.digest, m.tier, *chunks, self.superseed is not None, self._part())

    @property
    def part(self) -> str:
        """The id of the wanted part; '' for everything."""
        return "" if self.wanted is None else part_id(self.wanted)

    def _part(self) -> HeldPart | None:
        part = self.part
        if self.wanted is None or not part:
            return None
        return HeldPart(part, self.held.common(self.wanted), len(self.wanted))

    def extend(self, source: Source, held: Bitfield, wanted: Bitfield | None) -> Callable[[], None]:
        """Adds a source that a fetch fills with the chunks of `wanted`; returns the call that undoes it.

        `held`, its chunks so far, gets those that the share has beside it, which are served on.
        """
        before = self.source, self.held, self.wanted
        of_first = self.held.minus(held)
        for chunk in of_first:
            held.add(chunk)
        self.source = JoinedSource(self.source, source, of_first=of_first)
        self.held, self.wanted = held, wanted
        self.settled.clear()
        self.users += 1

        def undo() -> None:
            self.source, self.held, self.wanted = before
            self.users -= 1

        return undo

    def lend(self, sought: Bitfield) -> Callable[[], None]:
        """Carries a fetch whose chunks are not served; returns the call that undoes it."""
        self.sought = sought
        self.settled.clear()
        self.users += 1

        def undo() -> None:
            self.sought = None
            self.users -= 1

        return undo


class Shares:
    """All shares of a node. `changed` is called after each announcement, `stop_uploads` before a share is closed.

    `distance`: see `download_events.PeerJoined`. `complete_elsewhere`: whether another node announces all of a digest.
    """

    def __init__(
        self,
        *,
        host: Host,
        rng: random.Random,
        changed: Callable[[], None],
        distance: Callable[[NodeId], int],
        stop_uploads: Callable[[Share], Awaitable[None]],
        complete_elsewhere: Callable[[Digest], bool],
    ) -> None:
        self.shares: dict[Digest, Share] = {}
        self._host = host
        self._distance = distance
        self._rng = rng
        self._changed = changed
        self._stop_uploads = stop_uploads
        self._complete_elsewhere = complete_elsewhere
        self.lost: dict[Digest, Withdrawn] = {}  # until the model is served again or released
        self.leaving = False  # the node drains: peers do not count on its chunks
        self._waiting: dict[Digest, list[asyncio.Future[Withdrawn]]] = {}
        self._withdrawn: list[Share] = []  # until they are closed
        self._announced_at = 0.0

    def serve(self, model_id: ModelId, source: Source, origin: Origin | None) -> None:
        """Shares a complete artifact.

        Raises SettingsError for a model id that no message can carry, and for content that this node fetches, or
        shares under another model id.
        """
        if why := messages.unsayable(model_id):
            raise SettingsError("model_id", why)
        known = self.shares.get(source.manifest.digest)
        if known and known.model_id.removesuffix(PART) != model_id.removesuffix(PART):
            raise SettingsError("model_id", f"the same content is offered as {known.model_id!r} by this node already")
        if known and not known.settled.is_set():
            raise SettingsError("model_id", f"this node is fetching {model_id!r}; it serves it by itself as it arrives")
        share = Share(model_id, source, Bitfield.full(len(source.manifest.chunks)), origin)
        share.superseed = Superseed(share.held.length, rng=self._rng)
        share.settled.set()
        self.add(share)

    def serve_part(self, model_id: ModelId, source: Source, held: Bitfield, origin: Origin | None) -> None:
        """Shares the chunks `held` of an artifact that this node does not share yet."""
        share = Share(model_id, source, held, origin, wanted=held.union(held))
        share.settled.set()
        self.add(share)

    def serve_promise(self, model_id: ModelId, source: Source, claims: Claims, origin: Origin | None) -> None:
        """Shares a promise of which no chunk is known yet."""
        share = Share(model_id, source, Bitfield(len(source.manifest.chunks)), origin, claims=claims)
        share.settled.set()
        self.add(share)

    def grown(self, digest: Digest, chunks: Sequence[int]) -> None:
        """Adds chunks to a share that is not fetched, and tells peers of them."""
        if share := self.shares.get(digest):
            for chunk in chunks:
                share.held.add(chunk)
            self.send_have(digest, list(chunks))
            self.announce()

    def rename(self, digest: Digest, model_id: ModelId) -> None:
        """Announces a share under another model id from now on; its transfers go on."""
        share = self.shares.get(digest)
        if share and share.model_id != model_id:
            share.model_id = model_id
            self.announce()

    def add(self, share: Share) -> None:
        """Adds a share. If its digest is shared already, that share gets another source and another user."""
        digest = share.manifest.digest
        self.lost = {key: lost for key, lost in self.lost.items() if lost.model_id != share.model_id}
        known = self.shares.setdefault(digest, share)
        if known is not share and share.held.complete and not known.held.complete:
            known.spares.append(known.source)  # a part, which transfers may still read
            known.source, known.held, known.wanted = share.source, share.held, None
            known.superseed, known.origin = share.superseed, share.origin or known.origin
            known.users += 1
        elif known is not share:
            known.spares.append(share.source)
            known.users += 1
        self.show(known)

    def show(self, share: Share) -> None:
        """Announces a share, and shows interest in what it still wants."""
        digest = share.manifest.digest
        self.shares.setdefault(digest, share)
        self.announce()
        for peer in list(self._host.peers.values()):
            peer.own_interests.discard(digest)
            self.show_interest(peer)

    def release(self, digest: Digest) -> None:
        """Removes a user of a share. A share without users is withdrawn."""
        self.lost.pop(digest, None)
        if share := self.shares.get(digest):
            self._leave(share)

    @contextlib.contextmanager
    def in_use(self, share: Share) -> Iterator[None]:
        """In the block the share has one user more, and stays unless it is lost."""
        share.users += 1
        try:
            yield
        finally:
            self._leave(share)

    def _leave(self, share: Share) -> None:
        share.users -= 1
        digest = share.manifest.digest
        if share.users == 0 and self.shares.get(digest) is share:
            self.withdraw(digest, "not served any more")

    def withdraw(self, digest: Digest, why: str, *, failure: SwarmError | None = None) -> asyncio.Task[Any] | None:
        """Removes a share, and ends its fetch, with `failure`, and its uploads.

        The task ends when its sources are closed.
        """
        share = self.shares.pop(digest, None)
        if share is None:
            return None
        if share.download:
            share.download.fail(failure or SwarmError(f"{share.model_id} was withdrawn: {why}"))
        for peer in self._host.peers.values():
            peer.interests.discard(digest)
        self.announce()
        self._withdrawn.append(share)
        return self._host.spawn(self._close_share(share), f"close {share.model_id}")

    def lose(self, digest: Digest, failure: StoreError) -> None:
        """Withdraws a share whose source has changed or cannot be read; its fetch fails with this failure."""
        if share := self.shares.get(digest):
            why = str(failure)
            lost = self.lost[digest] = Withdrawn(share.model_id, digest, why)
            log.error("%s: %s", share.model_id, why)
            self._host.record("node", lost)
            self.withdraw(digest, why, failure=failure)
            for future in self._waiting.pop(digest, ()):
                if not future.done():
                    future.set_result(lost)

    async def until_lost(self, digest: Digest) -> Withdrawn:
        """Waits until `lose` withdraws the share of a digest."""
        if digest in self.lost:
            return self.lost[digest]
        future: asyncio.Future[Withdrawn] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(digest, []).append(future)
        return await future

    async def _close_share(self, share: Share) -> None:
        await self._stop_uploads(share)
        await asyncio.to_thread(share.close)
        self._withdrawn.remove(share)

    def replace(self, digest: Digest, source: Source) -> asyncio.Task[Any]:
        """Serves a share from another source of the same chunks; the task closes the old one."""
        share = self.shares[digest]
        old, share.source = share.source, source

        async def close() -> None:
            await self._stop_uploads(share)
            await asyncio.to_thread(old.close)

        return self._host.spawn(close(), f"close the first copy of {share.model_id}")

    def close(self) -> None:
        """Closes all sources."""
        for share in (*self.shares.values(), *self._withdrawn):
            share.close()

    async def settled(self, digest: Digest) -> Share | None:
        """The share of a digest, after any fetch of it has ended; None if there is no share then."""
        while (share := self.shares.get(digest)) and not share.settled.is_set():
            await share.settled.wait()
        return share

    def leave(self) -> None:
        """Tells others that this node leaves: those that leave too do not count on its chunks."""
        self.leaving = True
        self.announce()

    def only_here(self, share: Share) -> frozenset[int]:
        """The chunks of a complete share that a linked peer lacks, and that no node is known to hold that stays."""
        digest = share.manifest.digest
        if not share.settled.is_set() or self._complete_elsewhere(digest):
            return frozenset()
        if share.superseed:
            return share.superseed.only_here({node for node, peer in self._host.peers.items() if peer.leaving})
        return frozenset(share.held) if self._feeds(digest) else frozenset()

    @property
    def feeds(self) -> bool:
        """Whether a linked peer still lacks chunks of an artifact that this node holds."""
        return any(share.settled.is_set() and self._feeds(digest) for digest, share in self.shares.items())

    def _feeds(self, digest: Digest) -> bool:
        fetching = (peer.artifacts.get(digest) for peer in self._host.peers.values() if digest in peer.interests)
        return any(announced is None or not announced.fetched for announced in fetching)

    def downloads(self) -> list[DownloadDriver]:
        """All running fetches."""
        return [share.download for share in self.shares.values() if share.download]

    def rank(self, digest: Digest) -> tuple[int, int]:
        """The rank of this node by id among the linked seeds of an artifact, and their number with this node."""
        others = [node for node, p in self._host.peers.items() if (a := p.artifacts.get(digest)) and a.superseeds]
        return sum(node < self._host.id for node in others), len(others) + 1

    # To peers

    def announcements(self) -> tuple[Announcement, ...]:
        """The first `ANNOUNCED_MAX` shares: a message holds no more."""
        return tuple(share.announcement() for share in self.shares.values())[: messages.ANNOUNCED_MAX]

    def joined(self, peer: Peer) -> None:
        """A link to this peer is open; its Hello had the artifacts."""
        if self.leaving:
            peer.post(messages.Announce(self.announcements(), leaving=True))
        self.show_interest(peer)

    def announce(self) -> None:
        """Sends `Announce` to every peer."""
        self._announced_at = self._host.now()
        artifacts = self.announcements()
        self._host.record("node", ArtifactsAnnounced(self._host.id, artifacts))
        for peer in self._host.peers.values():
            peer.post(messages.Announce(artifacts, leaving=self.leaving))
        self._changed()

    def show_interest(self, peer: Peer) -> None:
        """Sends `Interest`, once for each digest that this node fetches and the peer announces."""
        if not peer.readable:
            return
        for digest in sorted(peer.artifacts.keys() - peer.own_interests):
            if (share := self.shares.get(digest)) and share.download:
                peer.own_interests.add(digest)
                share.download.meet(peer)
                asked = share.wanted if share.sought is None else share.sought
                wanted = b"" if asked is None or asked.complete else asked.pack()
                peer.post(messages.Interest(digest, share.held.pack(), wanted))
                if share.download.promise:
                    peer.post(share.download.promise.own_reading())

    def send_have(self, digest: Digest, chunks: list[int], within_s: float = 0.0, *, to_seeds: bool = False) -> None:
        """Sends `Have` for verified chunks to every peer with an interest in the artifact, either way.

        A seed to which this node showed interest counts the copies of each chunk, and sends the rarest. `to_seeds`:
        only to seeds, which must not take a chunk for lost that this node cannot serve. It may wait for `within_s`.
        """
        share = self.shares.get(digest)
        claims = claim_messages(share.claims, sorted(chunks)) if share and share.claims else []
        verified = runs(sorted(chunks))
        for peer in self._host.peers.values() if claims else ():
            if digest in peer.interests or digest in peer.own_interests:
                for claim in claims:
                    peer.post(claim, within_s=within_s)
        for start in range(0, len(verified), messages.RUNS_MAX):
            have = messages.Have(digest, tuple(verified[start : start + messages.RUNS_MAX]))
            for peer in self._host.peers.values():
                seed = (announced := peer.artifacts.get(digest)) is not None and announced.superseeds
                if (digest in peer.interests or digest in peer.own_interests) and (seed or not to_seeds):
                    peer.post(have, within_s=within_s)

    def send_reading(self, digest: Digest, message: messages.OriginReading) -> None:
        """Tells every peer with an interest in a promise what this node reads from its origin."""
        for peer in self._host.peers.values():
            if digest in peer.interests or digest in peer.own_interests:
                peer.post(message)

    def tick(self) -> None:
        """Passes time to the downloads, and announces their progress."""
        for download in self.downloads():
            download.tick()
        if self.downloads() and self._host.now() - self._announced_at > ANNOUNCE_EVERY_S:
            self.announce()

    # From peers. Messages that break the protocol raise RemoteProtocolError.

    def on_announce(self, peer: Peer, message: messages.Announce) -> None:
        """Keeps a peer's artifacts, and shows interest in those that this node fetches."""
        dropped = peer.artifacts.keys() - {announced.digest for announced in message.artifacts}
        peer.artifacts = {announced.digest: announced for announced in message.artifacts}
        peer.leaving = message.leaving
        self._host.record(peer.node, ArtifactsAnnounced(peer.node, message.artifacts))
        for digest in sorted(dropped):
            peer.own_interests.discard(digest)
            peer.interests.discard(digest)  # its fetch has failed: a seed that drains must not wait for it
            share = self.shares.get(digest)
            if share and share.superseed:
                share.superseed.left(peer.node)
            if share and share.download:
                share.download.handle(events.PeerLeft(peer.node, "does not serve it any more"))
                if share.download.promise:
                    share.download.promise.left(peer.node)
        self.show_interest(peer)

    def on_interest(self, peer: Peer, message: messages.Interest) -> None:
        """Answers with the own chunks; the peer gets `Have` for later chunks.

        An interest in an artifact that is not shared is forgotten: a peer asks again when it is announced.
        """
        if share := self.shares.get(message.digest):
            peer.interests.add(message.digest)
            for claim in claim_messages(share.claims, list(share.held)) if share.claims else ():
                peer.post(claim)
            peer.post(messages.Holdings(message.digest, share.held.pack()))
            if share.download and share.download.promise:
                peer.post(share.download.promise.own_reading())
            if share.superseed:
                wants = _unpacked(peer, message.wanted, share) if message.wanted else None
                share.superseed.joined(peer.node, _unpacked(peer, message.bits, share), wants)

    def on_holdings(self, peer: Peer, message: messages.Holdings) -> None:
        """The answer to `Interest`: the download may request chunks from this peer."""
        if (share := self.shares.get(message.digest)) and share.download:
            announced = peer.artifacts.get(message.digest)
            superseeds = announced is not None and announced.superseeds
            holds, distance = _unpacked(peer, message.bits, share), self._distance(peer.node)
            if share.claims:
                holds = Bitfield(holds.length, share.claims.offered(peer.node, holds))
            share.download.handle(events.PeerJoined(peer.node, holds, superseeds, distance, peer.usual_bytes_per_s))

    def on_have(self, peer: Peer, message: messages.Have) -> None:
        """A peer verified chunks."""
        share = self.shares.get(message.digest)
        if share is None:
            return
        if any(first + count > share.held.length for first, count in message.runs):
            raise RemoteProtocolError(peer.name, f"has chunks beyond the {share.held.length} there are")
        chunks = tuple(index for first, count in message.runs for index in range(first, first + count))
        if share.claims:
            chunks = tuple(share.claims.offered(peer.node, chunks))
        if share.download:
            share.download.handle(events.PeerHas(peer.node, chunks))
        elif share.superseed:
            share.superseed.has(peer.node, chunks)

    def on_claims(self, peer: Peer, message: messages.ChunkClaims) -> None:
        """A peer claims digests of chunks of a promise that it holds."""
        share = self.shares.get(message.digest)
        if share is None or share.claims is None:
            return
        try:
            found = claimed_runs(message, share.held.length)
        except ValueError as error:
            raise RemoteProtocolError(peer.name, str(error)) from None
        if share.download and share.download.promise:
            share.download.promise.told(peer.node, found)

    def on_reading(self, peer: Peer, message: messages.OriginReading) -> None:
        """A peer reads chunks of a promise from its origin."""
        if (share := self.shares.get(message.digest)) and share.download and share.download.promise:
            share.download.promise.reading(peer.node, message)

    def peer_left(self, peer: Peer, why: str) -> None:
        """Ends the part of a peer in downloads and super-seeding."""
        for digest, share in self.shares.items():
            if share.download and digest in peer.own_interests:
                share.download.handle(events.PeerLeft(peer.node, why))
            if share.download and share.download.promise:
                share.download.promise.left(peer.node)
        for share in self.shares.values():
            if share.superseed:
                share.superseed.left(peer.node)

    def __repr__(self) -> str:
        return f"<Shares {len(self.shares)} artifacts, {len(self.downloads())} arriving>"


def _unpacked(peer: Peer, bits: bytes, share: Share) -> Bitfield:
    try:
        return Bitfield.unpack(bits, share.held.length)
    except ValueError as error:
        raise RemoteProtocolError(peer.name, str(error)) from error
