"""The node: one member of the swarm, on one task loop.

Greets peers, keeps the membership machine, passes their messages to the fetches and uploads they belong to, and tells
others what is new here. It serves any number of artifacts and fetches any number at once; whatever it has verified it
serves on. Everything it does and hears goes to its journal.

    link message ─┐                       ┌─> message to a peer
    landed chunk ─┼─> machine.handle() ───┼─> transfer received or sent by a transport
    tick ─────────┘                       └─> a fetch completes or gives up

Must not know: HTTP, sockets, files. Those are behind `World`, `Store` and `Transport`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from swarm import __version__, download, membership, messages
from swarm.bitfield import Bitfield, runs
from swarm.download import Download
from swarm.errors import (
    FetchTimeout,
    LocalProtocolError,
    PeerError,
    PeerTimeout,
    RemoteProtocolError,
    SettingsError,
    SwarmError,
    VersionSkew,
)
from swarm.fetching import Fetching
from swarm.gifts import Gifts
from swarm.hashing.cpu import chunk_digest
from swarm.inquiries import Inquiries
from swarm.journal import Announced, FetchEnded, FetchStarted, Joined, Journal, Left, Opened
from swarm.landing import copy
from swarm.link import Link
from swarm.manifest import Chunk, Manifest
from swarm.membership import Membership
from swarm.messages import Announcement, AnyMessage, Hello, Offer, Origin
from swarm.peer import Peer
from swarm.serving import Serving
from swarm.store import Source, Store
from swarm.upload import Upload
from swarm.world import World

TICK_S = 0.25
HAVE_EVERY_S = 0.05  # newly verified chunks are told in batches; late news costs the swarm, see ARCHITECTURE.md
ANNOUNCE_EVERY_S = 1.0  # progress for people to look at
HELLO_TIMEOUT_S = 5.0
RESUME_JOBS = 4
OFFERS_SHOWN = 3
WARNINGS_MAX = 1000  # different ones; strangers cannot make this node remember more

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class Fetched:
    """A finished fetch. `sources`: bytes by the name of the peer they came from."""

    model_id: str
    digest: str
    bytes: int
    seconds: float
    sources: dict[str, int]
    rejected_chunks: int
    resumed_bytes: int

    @property
    def rate_bytes_per_s(self) -> float:
        """Transferred bytes per second."""
        return (self.bytes - self.resumed_bytes) / self.seconds if self.seconds > 0 else 0.0


@dataclass
class _Share:
    model_id: str
    source: Source
    held: Bitfield
    origin: Origin | None
    fetching: Fetching | None = None
    gifts: Gifts | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # set once it is whole, or will never be
    users: int = 1
    spares: list[Source] = field(default_factory=list)  # further sources of the same content

    def close(self) -> None:
        for source in (self.source, *self.spares):
            source.close()

    @property
    def manifest(self) -> Manifest:
        return self.source.manifest

    def announcement(self) -> Announcement:
        m = self.manifest
        gives = self.gifts is not None
        return Announcement(self.model_id, m.digest, m.tier, m.size, len(self.held), self.held.length, gives)


class Node:
    """One member of the swarm. Use it as `async with Node(world) as node:`."""

    def __init__(
        self,
        world: World,
        *,
        name: str | None = None,
        upload_slots: int = 8,
        idle_timeout_s: float = 5.0,
        stall_timeout_s: float = 30.0,
        rng: random.Random | None = None,
    ) -> None:
        self._rng = rng or random.SystemRandom()
        self.id = f"{self._rng.getrandbits(64):016x}"
        self.name = name or f"node-{self.id[:6]}"
        self.address = ""
        self.journal = Journal()
        self.peers: dict[str, Peer] = {}  # by node id
        self.inquiries = Inquiries(self.described)
        self._world = world
        self._upload_slots = upload_slots
        self._idle_timeout_s = idle_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._membership = Membership(self.id)
        self._shares: dict[str, _Share] = {}
        self._links: dict[int, Peer] = {}  # all that said hello, welcome or not
        self._link_numbers = itertools.count()
        self._transfer_ids = itertools.count()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Event()  # somebody came, went or announced
        self._opened = asyncio.Event()  # the world may bring links before it is open
        self._announced_at = 0.0
        self._warned: set[str] = set()
        self._closing = False

    # Life

    async def open(self) -> None:
        """Joins the swarm. Raises SettingsError when the listening address cannot be used."""
        self._loop = asyncio.get_running_loop()
        self.address = await self._world.open(self.id, self._converse, self._found)
        self._serving = Serving(
            host=self,
            transports=self._world.transports,
            shares=self._shares,
            rank=self._rank,
            withdraw=self.withdraw,
            slots=self._upload_slots,
            idle_timeout_s=self._idle_timeout_s,
        )
        self._opened.set()
        self.record("node", Opened(self.id, self.name, self.address))
        self.spawn(self._ticks(), "ticks")
        self.spawn(self._tell_news(), "news")

    async def close(self, reason: str = "shutting down") -> None:
        """Leaves the swarm: says goodbye, ends transfers, closes what it serves."""
        self._closing = True
        for peer in list(self._links.values()):
            with contextlib.suppress(PeerError):
                await peer.link.send(messages.Bye(reason))
        for share in self._shares.values():
            if share.fetching:
                share.fetching.fail(SwarmError("the node was closed"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._world.close()
        for share in self._shares.values():
            share.close()

    async def __aenter__(self) -> Node:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # What users ask for

    def serve(self, model_id: str, source: Source, *, origin: Origin | None = None) -> None:
        """Offers a complete artifact under a model id from now on.

        Raises SettingsError when this node offers the same content under another model id: it has one name here.
        """
        if why := messages.unsayable(model_id):
            raise SettingsError("model_id", why)
        known = self._shares.get(source.manifest.digest)
        if known and known.model_id != model_id:
            raise SettingsError("model_id", f"the same content is offered as {known.model_id!r} by this node already")
        if known and not known.settled.is_set():
            raise SettingsError("model_id", f"this node is fetching {model_id!r}; it serves it by itself as it arrives")
        share = _Share(model_id, source, Bitfield.full(len(source.manifest.chunks)), origin)
        share.gifts = Gifts(share.held.length, rng=self._rng)
        share.settled.set()
        self._add(share)

    def release(self, digest: str) -> None:
        """Undoes one `serve` or one successful `fetch` of an artifact; without users it is offered no longer."""
        if share := self._shares.get(digest):
            share.users -= 1
            if share.users == 0:
                self.withdraw(digest, "not served any more")

    def withdraw(self, digest: str, why: str) -> None:
        """Stops offering an artifact, whoever still uses it."""
        if share := self._shares.pop(digest, None):
            if share.fetching:
                share.fetching.fail(SwarmError(f"{share.model_id} was withdrawn: {why}"))
            self._announce()
            self.spawn(self._close_share(share), f"close {share.model_id}")

    async def fetch(
        self, model_id: str, store: Store, *, origin: Origin | None = None, timeout_s: float | None = None
    ) -> Fetched:
        """Fills a store from every peer that has its artifact, seals it, and serves it from then on.

        Raises FetchError when it gives up and StoreError when the store fails. The store is closed then; a directory
        keeps what was verified for the next attempt.
        """
        began, manifest = self.now(), store.manifest
        held = Bitfield(len(manifest.chunks))
        share = _Share(model_id, store, held, origin)
        sources: dict[str, int] = {}
        rejected_chunks = 0
        try:
            async with asyncio.timeout(timeout_s):
                resumed = await self._resume(store, held)
                own = await self._own(manifest.digest)  # no await from here to `_fetch`: two fetches may be here
                self.record("node", FetchStarted(model_id, manifest.digest, manifest.size, resumed))
                if own:
                    sources[self.name] = await self._copy(own, store, held)
                else:
                    fetching = await self._fetch(share, store)
                    sources = fetching.sources()
                    rejected_chunks = fetching.machine.rejected_chunks
            await self._loop.run_in_executor(None, store.seal)
        except BaseException as error:
            self.record("node", FetchEnded(manifest.digest, str(error) or type(error).__name__))
            if self._shares.get(manifest.digest) is share:
                self.withdraw(manifest.digest, "the fetch failed")
            await self._loop.run_in_executor(None, store.close)
            if isinstance(error, TimeoutError) and timeout_s is not None:
                done = len(held) / max(1, held.length)
                raise FetchTimeout(model_id, timeout_s=timeout_s, fraction=done) from None
            raise
        finally:
            share.settled.set()
        self.record("node", FetchEnded(manifest.digest, None))
        self._add(share)
        seconds = self.now() - began
        return Fetched(model_id, manifest.digest, manifest.size, seconds, sources, rejected_chunks, resumed)

    async def _copy(self, own: _Share, store: Store, held: Bitfield) -> int:
        own.users += 1  # nobody closes it meanwhile
        try:
            return await self._loop.run_in_executor(None, copy, own.source, store, held)
        finally:
            self.release(own.manifest.digest)

    async def _own(self, digest: str) -> _Share | None:
        """What this node holds whole already, possibly after another fetch of it has ended."""
        while (share := self._shares.get(digest)) and not share.settled.is_set():
            await share.settled.wait()
        return share

    async def _fetch(self, share: _Share, store: Store) -> Fetching:
        fetching = share.fetching = Fetching(
            share.model_id,
            store,
            share.held,
            host=self,
            idle_timeout_s=self._idle_timeout_s,
            stall_timeout_s=self._stall_timeout_s,
            transfer_ids=self._transfer_ids,
            rng=self._rng,
        )
        self._add(share)
        try:
            await fetching.run()
        finally:
            self._tell(share.manifest.digest, fetching)  # the last chunks too, before the fetch is forgotten
            share.fetching = None
        return fetching

    def holders(self, model_id: str) -> dict[str, list[Peer]]:
        """Peers that announce a model id, by the digest that they announce it with; [] where only this node does."""
        holders: dict[str, list[Peer]] = {
            s.manifest.digest: [] for s in self._shares.values() if s.model_id == model_id
        }
        for peer in self.peers.values():
            for announced in peer.artifacts.values():
                if announced.model_id == model_id:
                    holders.setdefault(announced.digest, []).append(peer)
        return holders

    def holders_of(self, digest: str) -> list[Peer]:
        """Peers that announce a digest, under whatever model id."""
        return [peer for peer in self.peers.values() if digest in peer.artifacts]

    async def changed(self, timeout_s: float) -> None:
        """Waits until a peer comes, goes or announces something, or until the time is over."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    @property
    def searching(self) -> bool:
        """Whether some known address has neither answered nor failed yet."""
        return bool(self._membership.unanswered())

    @property
    def machines(self) -> list[Download | Upload | Membership]:
        """The state machines of an open node, for whoever checks their invariants."""
        return [self._membership, self._serving.machine, *(fetching.machine for fetching in self._fetchings())]

    def tried(self) -> list[str]:
        """What became of everyone who could have had something, for error messages."""
        peers = [f"{p.name} at {p.hello.address} serves {_offers(p)}" for p in self.peers.values()]
        return [*peers, *self._membership.tried(), *sorted(self._warned)]

    # What fetches and uploads ask for (see fetching.Host)

    def now(self) -> float:
        """Seconds on the loop's clock."""
        return self._loop.time()

    def record(self, subject: str, what: object) -> None:
        """Writes to the journal."""
        self.journal.record(self.now(), subject, what)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Runs something until the node closes; its failure is logged."""
        task = asyncio.create_task(work, name=f"swarm: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("%s failed", task.get_name(), exc_info=error)
            for fetching in self._fetchings():  # it may be what would have ended them
                fetching.fail(LocalProtocolError(f"{task.get_name()} failed: {error!r}; please report this"))

    # Links

    def _found(self, address: str, lasting: bool) -> None:
        self._meet(membership.Found(address, lasting))

    async def _dial(self, address: str) -> None:
        try:
            link = await self._world.dial(address)
        except (PeerError, SettingsError) as error:
            log.debug("%s", error)
            self._meet(membership.DialFailed(address))
        else:
            await self._converse(link, dialled=address)

    async def _converse(self, link: Link, *, dialled: str | None = None) -> None:
        """The life of one link, from hello to goodbye."""
        token = f"{self._rng.getrandbits(128):032x}"
        for transport in self._world.transports:
            transport.admit(token)
        try:
            peer = await self._greet(link, token)
            try:
                await self._listen(peer, dialled)
            finally:
                await peer.close()
        except PeerError as error:
            # The peer is told why by its own side of the same check.
            level = logging.WARNING if isinstance(error, VersionSkew | RemoteProtocolError) else logging.DEBUG
            self._log_once(level, str(error))
            if dialled:
                self._meet(membership.DialFailed(dialled))
        finally:
            await link.close()
            for transport in self._world.transports:
                await transport.revoke(token)

    async def _greet(self, link: Link, token: str) -> Peer:
        await self._opened.wait()  # opening has its own deadlines, and ends all links when it fails
        offers = tuple(Offer(transport.scheme, transport.address) for transport in self._world.transports)
        ours = Hello(
            messages.PROTOCOL, __version__, self.id, self.name, self.address, token, offers, self._announcements()
        )
        await link.send(ours)
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                theirs = await link.receive()
        except TimeoutError:
            raise PeerTimeout(link.remote, f"said no hello within {HELLO_TIMEOUT_S:g} s") from None
        if not isinstance(theirs, Hello):
            raise RemoteProtocolError(link.remote, f"began with {type(theirs).__name__} instead of Hello")
        if theirs.protocol != messages.PROTOCOL:
            raise VersionSkew(link.remote, theirs=theirs.protocol, ours=messages.PROTOCOL, software=theirs.software)
        return Peer(next(self._link_numbers), link, theirs, token=token, transports=self._world.transports)

    async def _listen(self, peer: Peer, dialled: str | None) -> None:
        self._links[peer.number] = peer
        writer = self.spawn(peer.write(), f"write to {peer.name}")
        why = "closed the link"
        try:
            self._meet(membership.LinkUp(peer.number, peer.node, peer.hello.address, dialled))
            while True:
                self._hear(peer, await peer.link.receive())
        except PeerError as error:
            why = peer.why_gone or error.why
            if isinstance(error, RemoteProtocolError):
                self._log_once(logging.WARNING, str(error))
        finally:
            writer.cancel()
            del self._links[peer.number]
            self._farewell(peer, why)

    def _meet(self, event: membership.Event) -> None:
        """Tells the membership machine, and does what it says."""
        for action in self._membership.handle(event, self.now()):
            match action:
                case membership.Dial(address):
                    self.spawn(self._dial(address), f"dial {address}")
                case membership.Welcome(number, addresses):
                    self._welcome(self._links[number], addresses)
                case membership.Drop(number, why):
                    if dropped := self._links.get(number):
                        dropped.why_gone = why
                        self.spawn(dropped.close(), f"drop link to {dropped.name}")
        self._changed.set()

    def _welcome(self, peer: Peer, others: tuple[str, ...]) -> None:
        if twin := self.peers.get(peer.node):
            self._forget(twin, "another link is open")
        self.peers[peer.node] = peer
        self.record(peer.node, Joined(peer.node, peer.name, peer.hello.address, peer.scheme))
        self.record(peer.node, Announced(peer.node, peer.hello.artifacts))
        if others:
            peer.post(messages.Members(others))
        self._inquire(peer)

    def _farewell(self, peer: Peer, why: str) -> None:
        if self.peers.get(peer.node) is peer:
            self._forget(peer, why)
        if not self._closing:
            self._meet(membership.LinkDown(peer.number))

    def _forget(self, peer: Peer, why: str) -> None:
        """What was agreed on over a link ends with it."""
        del self.peers[peer.node]
        self.record(peer.node, Left(peer.node, why))
        for digest, share in self._shares.items():
            if share.fetching and digest in peer.asked:
                share.fetching.handle(download.PeerLeft(peer.node, why))
        self._serving.left(peer.node)
        for share in self._shares.values():
            if share.gifts:
                share.gifts.left(peer.node)
        self.inquiries.left(peer.node, why)

    # Messages

    def _hear(self, peer: Peer, message: AnyMessage) -> None:
        """Acts on one message. Raises RemoteProtocolError for what a well-behaved peer would not say."""
        match message:
            case messages.Bye(reason):
                peer.why_gone = peer.why_gone or f"left: {reason}"
                raise PeerError(peer.name, peer.why_gone)
            case messages.Hello():
                raise RemoteProtocolError(peer.name, "said hello twice")
            case _ if self.peers.get(peer.node) is not peer:
                return  # the other of two links, about to be dropped
            case messages.Announce(artifacts):
                self._hear_announce(peer, artifacts)
            case messages.Members(addresses):
                self._meet(membership.Told(addresses))
            case messages.ManifestRequest() | messages.OriginRequest():
                self.spawn(self.inquiries.answer(peer, message), f"answer {peer.name}")
            case messages.ManifestPart() | messages.OriginReply():
                self.inquiries.hear(peer, message)
            case messages.Interest(digest, bits):
                peer.wants.add(digest)
                if share := self._shares.get(digest):
                    peer.post(messages.Holdings(digest, share.held.pack()))
                    if share.gifts:
                        share.gifts.joined(peer.node, _unpacked(peer, bits, share))
            case messages.Request():
                self._serving.requested(peer, message)
            case messages.Cancel(transfer):
                self._serving.cancelled(peer, transfer)
            case messages.Holdings() | messages.Have() | messages.Grant() | messages.Refuse():
                self._hear_source(peer, message)

    def _hear_announce(self, peer: Peer, artifacts: tuple[Announcement, ...]) -> None:
        dropped = peer.artifacts.keys() - {announced.digest for announced in artifacts}
        peer.artifacts = {announced.digest: announced for announced in artifacts}
        self.record(peer.node, Announced(peer.node, artifacts))
        for digest in sorted(dropped):
            peer.asked.discard(digest)
            if (share := self._shares.get(digest)) and share.fetching:
                share.fetching.handle(download.PeerLeft(peer.node, "does not serve it any more"))
        self._inquire(peer)
        self._changed.set()

    def _hear_source(
        self, peer: Peer, message: messages.Holdings | messages.Have | messages.Grant | messages.Refuse
    ) -> None:
        """What a peer says that this node fetches from."""
        match message:
            case messages.Grant(transfer, _, chunks):
                for fetching in self._fetchings():
                    fetching.granted(peer, transfer, chunks)
            case messages.Refuse(transfer, reason, retry_s):
                for fetching in self._fetchings():
                    fetching.refused(peer, transfer, reason=reason, retry_s=retry_s)
            case messages.Holdings(digest, bits):
                if (share := self._shares.get(digest)) and share.fetching:
                    announced = peer.artifacts.get(digest)
                    gives = announced is not None and announced.gives
                    share.fetching.handle(download.PeerJoined(peer.node, _unpacked(peer, bits, share), gives))
            case messages.Have(digest, told):
                if share := self._shares.get(digest):
                    if any(first + count > share.held.length for first, count in told):
                        raise RemoteProtocolError(peer.name, f"has chunks beyond the {share.held.length} there are")
                    chunks = tuple(index for first, count in told for index in range(first, first + count))
                    if share.fetching:
                        share.fetching.handle(download.PeerHas(peer.node, chunks))
                    elif share.gifts:
                        share.gifts.has(peer.node, chunks)

    def _inquire(self, peer: Peer) -> None:
        """Shows interest in what this node is fetching and the peer has."""
        for digest in sorted(peer.artifacts.keys() - peer.asked):
            if (share := self._shares.get(digest)) and share.fetching:
                peer.asked.add(digest)
                share.fetching.meet(peer)
                peer.post(messages.Interest(digest, share.held.pack()))

    # Artifacts

    def _add(self, share: _Share) -> None:
        """Shares an artifact, or adds another source and user to it if it is shared already."""
        digest = share.manifest.digest
        known = self._shares.setdefault(digest, share)
        if known is not share:
            known.spares.append(share.source)
            known.users += 1
        self._announce()
        for peer in list(self.peers.values()):
            peer.asked.discard(digest)
            self._inquire(peer)

    async def _close_share(self, share: _Share) -> None:
        await self._serving.stop(share)
        await self._loop.run_in_executor(None, share.close)

    def described(self, digest: str) -> tuple[Manifest, Origin | None] | None:
        """Manifest and origin of an artifact that this node shares."""
        share = self._shares.get(digest)
        return (share.manifest, share.origin) if share else None

    def _rank(self, digest: str) -> tuple[int, int]:
        """Which of how many seeds of an artifact this node is."""
        others = [node for node, p in self.peers.items() if (a := p.artifacts.get(digest)) and a.gives]
        return sum(node < self.id for node in others), len(others) + 1

    def _announcements(self) -> tuple[Announcement, ...]:
        return tuple(share.announcement() for share in self._shares.values())[: messages.ANNOUNCED_MAX]

    def _announce(self) -> None:
        self._announced_at = self.now()
        artifacts = self._announcements()
        self.record("node", Announced(self.id, artifacts))
        for peer in self.peers.values():
            peer.post(messages.Announce(artifacts))

    def _fetchings(self) -> list[Fetching]:
        return [share.fetching for share in self._shares.values() if share.fetching]

    async def _resume(self, store: Store, held: Bitfield) -> int:
        """Adds the chunks that a store holds from an earlier attempt, every one hashed again; returns their bytes."""
        manifest = store.manifest
        present: list[Chunk] = await self._loop.run_in_executor(None, lambda: list(store.present()))

        def verified(some: list[Chunk]) -> list[Chunk]:
            return [chunk for chunk in some if chunk_digest(manifest.scheme, store.read(chunk)) == chunk.digest]

        jobs = [job for start in range(RESUME_JOBS) if (job := present[start::RESUME_JOBS])]
        found = await asyncio.gather(*(self._loop.run_in_executor(None, verified, job) for job in jobs))
        for chunk in itertools.chain.from_iterable(found):
            held.add(chunk.index)
        return sum(manifest.chunks[index].size for index in held)

    # Time

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._meet(membership.Tick())
            for fetching in self._fetchings():
                fetching.tick()
            if self._fetchings() and self.now() - self._announced_at > ANNOUNCE_EVERY_S:
                self._announce()

    async def _tell_news(self) -> None:
        """Tells everyone interested which chunks were verified since the last time."""
        while True:
            await asyncio.sleep(HAVE_EVERY_S)
            for digest, share in self._shares.items():
                if share.fetching:
                    self._tell(digest, share.fetching)

    def _tell(self, digest: str, fetching: Fetching) -> None:
        told = runs(sorted(fetching.fresh))
        fetching.fresh.clear()
        for start in range(0, len(told), messages.RUNS_MAX):
            have = messages.Have(digest, tuple(told[start : start + messages.RUNS_MAX]))
            for peer in self.peers.values():
                if digest in peer.wants or digest in peer.asked:  # a seed listens too, and gives what is rare
                    peer.post(have)

    def _log_once(self, level: int, text: str) -> None:
        if text not in self._warned and len(self._warned) < WARNINGS_MAX:
            if level >= logging.WARNING:
                self._warned.add(text)
            log.log(level, "%s", text)

    def __repr__(self) -> str:
        return f"<Node {self.name} {self.address} | {len(self.peers)} peers | {len(self._shares)} artifacts>"


def _offers(peer: Peer) -> str:
    offers = [f"{a.model_id} ({a.digest[:16]})" for a in peer.artifacts.values()]
    more = f" and {len(offers) - OFFERS_SHOWN} more" if len(offers) > OFFERS_SHOWN else ""
    return ", ".join(offers[:OFFERS_SHOWN]) + more if offers else "nothing"


def _unpacked(peer: Peer, bits: bytes, share: _Share) -> Bitfield:
    try:
        return Bitfield.unpack(bits, share.held.length)
    except ValueError as error:
        raise RemoteProtocolError(peer.name, str(error)) from error
