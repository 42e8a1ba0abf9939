"""What one node shares: artifacts that are whole or still arriving, and who is told of them.

Keeps one `Share` for each digest, announces them to peers, tells interested ones which chunks are new, and passes what
peers say of them on to the fetch or the gifts that it concerns.

Must not know: links, datagrams, how a fetch or an upload goes.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from swarm.content.bitfield import Bitfield, runs
from swarm.content.manifest import Digest, Manifest, ModelId
from swarm.errors import RemoteProtocolError, SettingsError, SwarmError
from swarm.journal import ArtifactsAnnounced
from swarm.peers.host import Host
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import Announcement, AnyMessage, NodeId, Origin
from swarm.protocol.packets import Holding
from swarm.store import Source
from swarm.transfer import download_events as events
from swarm.transfer.download_driver import DownloadDriver
from swarm.transfer.superseed import Superseed

ANNOUNCE_EVERY_S = 1.0  # progress for people to look at


@dataclass(eq=False)
class Share:
    """One artifact. Its `source` has the chunks in `held`; `fetching` is set while more arrive."""

    model_id: ModelId
    source: Source
    held: Bitfield
    origin: Origin | None
    fetching: DownloadDriver | None = None
    superseed: Superseed | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # set once it is whole, or will never be
    users: int = 1
    spares: list[Source] = field(default_factory=list)  # further sources of the same content

    def close(self) -> None:
        """Closes its sources."""
        for source in (self.source, *self.spares):
            source.close()

    @property
    def manifest(self) -> Manifest:
        """What its chunks are."""
        return self.source.manifest

    def announcement(self) -> Announcement:
        """What peers are told."""
        m = self.manifest
        superseeds = self.superseed is not None
        return Announcement(self.model_id, m.digest, m.tier, m.size, len(self.held), self.held.length, superseeds)

    def holding(self) -> Holding:
        """What everybody else is told."""
        m = self.manifest
        return Holding(self.model_id, m.digest, m.tier, len(self.held), self.held.length, self.superseed is not None)


class Shares:
    """Everything that a node shares. `announced` is called when that changes.

    `borders` says how many there are on the way to a node: see `events.PeerJoined`.
    """

    def __init__(
        self, *, host: Host, rng: random.Random, announced: Callable[[], None], distance: Callable[[NodeId], int]
    ) -> None:
        self.shares: dict[Digest, Share] = {}  # by digest
        self._host = host
        self._distance = distance
        self._rng = rng
        self._announced = announced
        self._announced_at = 0.0

    def serve(self, model_id: ModelId, source: Source, origin: Origin | None) -> None:
        """Shares a complete artifact. Raises SettingsError, see `Node.serve`."""
        if why := messages.unsayable(model_id):
            raise SettingsError("model_id", why)
        known = self.shares.get(source.manifest.digest)
        if known and known.model_id != model_id:
            raise SettingsError("model_id", f"the same content is offered as {known.model_id!r} by this node already")
        if known and not known.settled.is_set():
            raise SettingsError("model_id", f"this node is fetching {model_id!r}; it serves it by itself as it arrives")
        share = Share(model_id, source, Bitfield.full(len(source.manifest.chunks)), origin)
        share.superseed = Superseed(share.held.length, rng=self._rng)
        share.settled.set()
        self.add(share)

    def add(self, share: Share) -> None:
        """Shares an artifact, or adds another source and user to it if it is shared already."""
        digest = share.manifest.digest
        known = self.shares.setdefault(digest, share)
        if known is not share:
            known.spares.append(share.source)
            known.users += 1
        self.announce()
        for peer in list(self._host.peers.values()):
            peer.asked.discard(digest)
            self.inquire(peer)

    def remove(self, digest: Digest, why: str) -> Share | None:
        """Ends what is shared under a digest; its sources stay open until whoever reads them has ended."""
        if share := self.shares.pop(digest, None):
            if share.fetching:
                share.fetching.fail(SwarmError(f"{share.model_id} was withdrawn: {why}"))
            self.announce()
        return share

    async def own(self, digest: Digest) -> Share | None:
        """What this node holds whole already, possibly after another fetch of it has ended."""
        while (share := self.shares.get(digest)) and not share.settled.is_set():
            await share.settled.wait()
        return share

    def fetchings(self) -> list[DownloadDriver]:
        """All fetches that run."""
        return [share.fetching for share in self.shares.values() if share.fetching]

    def rank(self, digest: Digest) -> tuple[int, int]:
        """Which of how many seeds of an artifact this node is, as far as it is linked with them."""
        others = [node for node, p in self._host.peers.items() if (a := p.artifacts.get(digest)) and a.superseeds]
        return sum(node < self._host.id for node in others), len(others) + 1

    # What others are told

    def announcements(self) -> tuple[Announcement, ...]:
        """All artifacts, as far as one message can name them."""
        return tuple(share.announcement() for share in self.shares.values())[: messages.ANNOUNCED_MAX]

    def announce(self) -> None:
        """Tells every peer what is shared now."""
        self._announced_at = self._host.now()
        artifacts = self.announcements()
        self._host.record("node", ArtifactsAnnounced(self._host.id, artifacts))
        for peer in self._host.peers.values():
            peer.post(messages.Announce(artifacts))
        self._announced()

    def inquire(self, peer: Peer) -> None:
        """Shows interest in what this node is fetching and the peer has."""
        for digest in sorted(peer.artifacts.keys() - peer.asked):
            if (share := self.shares.get(digest)) and share.fetching:
                peer.asked.add(digest)
                share.fetching.meet(peer)
                peer.post(messages.Interest(digest, share.held.pack()))

    def tell(self, digest: Digest, chunks: list[int]) -> None:
        """Tells everyone interested that these chunks were verified."""
        told = runs(sorted(chunks))
        for start in range(0, len(told), messages.RUNS_MAX):
            have = messages.Have(digest, tuple(told[start : start + messages.RUNS_MAX]))
            for peer in self._host.peers.values():
                if digest in peer.wants or digest in peer.asked:  # a seed listens too, and gives what is rare
                    peer.post(have)

    def tick(self) -> None:
        """Time passed."""
        for fetching in self.fetchings():
            fetching.tick()
        if self.fetchings() and self._host.now() - self._announced_at > ANNOUNCE_EVERY_S:
            self.announce()

    # What others tell

    def hear(self, peer: Peer, message: AnyMessage) -> None:
        """What a peer says of an artifact. Raises RemoteProtocolError for what a well-behaved one would not say."""
        match message:
            case messages.Announce(artifacts):
                self._hear_announce(peer, artifacts)
            case messages.Interest(digest, bits):
                peer.wants.add(digest)
                if share := self.shares.get(digest):
                    peer.post(messages.Holdings(digest, share.held.pack()))
                    if share.superseed:
                        share.superseed.joined(peer.node, _unpacked(peer, bits, share))
            case messages.Grant(transfer, _, chunks):
                for fetching in self.fetchings():
                    fetching.granted(peer, transfer, chunks)
            case messages.Refuse(transfer, reason, retry_s):
                for fetching in self.fetchings():
                    fetching.refused(peer, transfer, reason=reason, retry_s=retry_s)
            case messages.Holdings(digest, bits):
                if (share := self.shares.get(digest)) and share.fetching:
                    announced = peer.artifacts.get(digest)
                    superseeds = announced is not None and announced.superseeds
                    holds = _unpacked(peer, bits, share)
                    joined = events.PeerJoined(
                        peer.node, holds, superseeds, self._distance(peer.node), peer.usual_bytes_per_s
                    )
                    share.fetching.handle(joined)
            case messages.Have(digest, told):
                if share := self.shares.get(digest):
                    self._hear_have(peer, share, told)

    def left(self, peer: Peer, why: str) -> None:
        """A peer is gone."""
        for digest, share in self.shares.items():
            if share.fetching and digest in peer.asked:
                share.fetching.handle(events.PeerLeft(peer.node, why))
        for share in self.shares.values():
            if share.superseed:
                share.superseed.left(peer.node)

    def _hear_announce(self, peer: Peer, artifacts: tuple[Announcement, ...]) -> None:
        dropped = peer.artifacts.keys() - {announced.digest for announced in artifacts}
        peer.artifacts = {announced.digest: announced for announced in artifacts}
        self._host.record(peer.node, ArtifactsAnnounced(peer.node, artifacts))
        for digest in sorted(dropped):
            peer.asked.discard(digest)
            if (share := self.shares.get(digest)) and share.fetching:
                share.fetching.handle(events.PeerLeft(peer.node, "does not serve it any more"))
        self.inquire(peer)

    def _hear_have(self, peer: Peer, share: Share, told: tuple[tuple[int, int], ...]) -> None:
        if any(first + count > share.held.length for first, count in told):
            raise RemoteProtocolError(peer.name, f"has chunks beyond the {share.held.length} there are")
        chunks = tuple(index for first, count in told for index in range(first, first + count))
        if share.fetching:
            share.fetching.handle(events.PeerHas(peer.node, chunks))
        elif share.superseed:
            share.superseed.has(peer.node, chunks)

    def __repr__(self) -> str:
        return f"<Shares {len(self.shares)} artifacts, {len(self.fetchings())} arriving>"


def _unpacked(peer: Peer, bits: bytes, share: Share) -> Bitfield:
    try:
        return Bitfield.unpack(bits, share.held.length)
    except ValueError as error:
        raise RemoteProtocolError(peer.name, str(error)) from error
