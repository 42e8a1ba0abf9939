"""The node: one member of the swarm, on one task loop.

Joins the parts and is what users ask: `Shares` has the artifacts, `ConnectionsDriver` the links, `SwimDriver` the
gossip, `UploadDriver` the uploads, `ManifestRequests` the questions; each fetch is a `DownloadDriver`. It serves any
number of artifacts and fetches any number at once; whatever it has verified it serves on. Everything it does and hears
goes to its journal.

    link message ─┐                       ┌─> message to a peer
    datagram     ─┼─> machine.handle() ───┼─> transfer received or sent by a transport
    landed chunk ─┤                       ├─> datagram to a member
    tick         ─┘                       └─> a fetch completes or gives up

Must not know: HTTP, sockets, files. Those are behind `Environment`, `Store` and `Transport`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Collection, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from swarm import __version__
from swarm.content.bitfield import Bitfield, runs
from swarm.content.manifest import Chunk, Digest, Manifest, ModelId
from swarm.errors import FetchTimeout, LocalProtocolError, SwarmError
from swarm.hashing.cpu import chunk_digest
from swarm.journal import FetchEnded, FetchStarted, Journal, Opened
from swarm.membership import config
from swarm.membership.config import SwimConfig
from swarm.membership.swim import MemberChanged, Swim
from swarm.membership.swim_driver import SwimDriver
from swarm.net.environment import Environment
from swarm.peers import connections
from swarm.peers.connections import Connections
from swarm.peers.connections_driver import ConnectionsDriver, Handler
from swarm.peers.manifest_requests import ManifestRequests
from swarm.peers.peer import Peer
from swarm.protocol import messages, packets
from swarm.protocol.messages import Address, Announcement, AnyMessage, Endpoint, Hello, NodeId, Origin
from swarm.protocol.packets import Holding, Profile, Record
from swarm.store import Source, Store
from swarm.transfer import download
from swarm.transfer import download_events as events
from swarm.transfer.download import Download
from swarm.transfer.download_driver import DownloadDriver
from swarm.transfer.shares import Share, Shares
from swarm.transfer.upload import Upload
from swarm.transfer.upload_driver import UploadDriver
from swarm.transfer.verify import copy

TICK_S = 0.25
RESUME_JOBS = 4
OFFERS_SHOWN = 3
MEMBERS_SHOWN = 16  # of those not linked, in error messages

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class Fetched:
    """A finished fetch. `sources`: bytes by the peer's name; `transports`: the schemes that brought them."""

    model_id: ModelId
    digest: Digest
    bytes: int
    seconds: float
    sources: dict[str, int]
    rejected_chunks: int
    resumed_bytes: int
    transports: tuple[str, ...] = ()

    @property
    def rate_bytes_per_s(self) -> float:
        """Transferred bytes per second."""
        return (self.bytes - self.resumed_bytes) / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Holder:
    """Somebody who says that it holds an artifact; `peer` is None while this node is not linked with it."""

    node: NodeId
    name: str
    address: Address
    peer: Peer | None


class Node:
    """One member of the swarm. Use it as `async with Node(world) as node:`.

    `host` and `rack` are labels of where it runs, told to others; `network` says how patient its gossip is.
    """

    def __init__(
        self,
        environment: Environment,
        *,
        name: str | None = None,
        upload_slots: int = 8,
        idle_timeout_s: float = 5.0,
        stall_timeout_s: float = 30.0,
        network: SwimConfig | None = None,
        host: str = "",
        rack: str = "",
        rng: random.Random | None = None,
    ) -> None:
        self._rng = rng or random.SystemRandom()
        self.id = NodeId(f"{self._rng.getrandbits(64):016x}")
        self.name = name or f"node-{self.id[:6]}"
        self.address = Address("")
        self.journal = Journal()
        self.manifest_requests = ManifestRequests(self.described)
        self._environment = environment
        self._upload_slots = upload_slots
        self._idle_timeout_s = idle_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._host, self._rack = host[: packets.LABEL_MAX], rack[: packets.LABEL_MAX]
        machine = Connections(self.id, rng=self._rng, host=self._host, rack=self._rack)
        self._connections = ConnectionsDriver(environment, machine, host=self, rng=self._rng)
        self._swim = SwimDriver(
            environment, config=network or config.lan(), rng=self._rng, clock=self.now, changed=self._member_changed
        )
        self._shares = Shares(host=self, rng=self._rng, changed=self._update_profile, distance=self._distance)
        self._upload_driver: UploadDriver | None = None  # until the transports are there
        self._sought: Counter[Digest | None] = Counter()  # digests; None where only a model id is known
        self._withdrawn: list[Share] = []  # until they are closed
        self._transfer_ids = itertools.count()
        self._transfers: dict[int, DownloadDriver] = {}  # open transfers to this node, by id
        self._tasks: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Event()  # somebody came, went or announced
        self._closing = False

    # Life

    async def open(self) -> None:
        """Joins the swarm. Raises SettingsError when the listening address cannot be used."""
        self._loop = asyncio.get_running_loop()
        self.address = await self._environment.open(
            self.id, self._connections.run_link, self._discovered, self._swim.hear
        )
        self._upload_driver = UploadDriver(
            host=self,
            transports=self._environment.transports,
            shares=self._shares.shares,
            rank=self._shares.rank,
            withdraw=self.withdraw,
            slots=self._upload_slots,
            idle_timeout_s=self._idle_timeout_s,
        )
        self.record("node", Opened(self.id, self.name, self.address, *self.place))
        self._swim.open(self.id, self.address, self.name, self._profile())
        self._connections.open(self._handlers(self._upload_driver))
        self.spawn(self._ticks(), "ticks")

    async def close(self, reason: str = "shutting down") -> None:
        """Leaves the swarm: says goodbye, ends transfers, closes what it serves."""
        self._closing = True
        self._swim.close()
        await self._connections.close(reason)
        for download_driver in self._shares.downloads():
            download_driver.fail(SwarmError("the node was closed"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._environment.close()
        for share in (*self._shares.shares.values(), *self._withdrawn):
            share.close()

    async def __aenter__(self) -> Node:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # What users ask for

    def serve(self, model_id: ModelId, source: Source, *, origin: Origin | None = None) -> None:
        """Offers a complete artifact under a model id from now on.

        Raises SettingsError when this node offers the same content under another model id: it has one name here.
        """
        self._shares.serve(model_id, source, origin)

    def release(self, digest: Digest) -> None:
        """Undoes one `serve` or one successful `fetch` of an artifact; without users it is offered no longer."""
        if share := self._shares.shares.get(digest):
            share.users -= 1
            if share.users == 0:
                self.withdraw(digest, "not served any more")

    def withdraw(self, digest: Digest, why: str) -> asyncio.Task[Any] | None:
        """Stops offering an artifact, whoever still uses it. The task ends when nothing of it is read any more."""
        if share := self._shares.remove(digest, why):
            self._withdrawn.append(share)
            return self.spawn(self._close_share(share), f"close {share.model_id}")
        return None

    async def fetch(
        self,
        model_id: ModelId,
        store: Store,
        *,
        origin: Origin | None = None,
        timeout_s: float | None = None,
        abandon_s: float = math.inf,
    ) -> Fetched:
        """Fills a store from every peer that has its artifact, seals it, and serves it from then on.

        `abandon_s`: seconds without a linked peer that holds a missing chunk, after which a fetch with an alternative
        gives up sooner than a stalled fetch.

        Raises FetchError when it gives up and StoreError when the store fails. The store is closed then; a directory
        keeps what was verified for the next attempt.
        """
        began, manifest = self.now(), store.manifest
        held = Bitfield(len(manifest.chunks))
        share = Share(model_id, store, held, origin)
        sources: dict[str, int] = {}
        transports: tuple[str, ...] = ()
        rejected_chunks = 0
        try:
            async with asyncio.timeout(timeout_s):
                resumed = await self._resume(store, held)
                # No await from here to `_fetch`: two fetches may be here.
                own = await self._shares.complete(manifest.digest)
                kept = tuple(runs(list(held)))
                self.record("node", FetchStarted(model_id, manifest.digest, manifest.size, resumed, held.length, kept))
                if own:
                    sources[self.name] = await self._copy(own, store, held)
                else:
                    fetching = await self._fetch(share, store, abandon_s)
                    sources, transports = fetching.sources(), tuple(sorted(fetching.transports))
                    rejected_chunks = fetching.machine.rejected_chunks
            await self._loop.run_in_executor(None, store.seal)
        except BaseException as error:
            self.record("node", FetchEnded(manifest.digest, str(error) or type(error).__name__))
            if self._shares.shares.get(manifest.digest) is share:
                self.withdraw(manifest.digest, "the fetch failed")
            await self._loop.run_in_executor(None, store.close)
            if isinstance(error, TimeoutError) and timeout_s is not None:
                done = len(held) / max(1, held.length)
                raise FetchTimeout(model_id, timeout_s=timeout_s, fraction=done) from None
            raise
        finally:
            share.settled.set()
        self.record("node", FetchEnded(manifest.digest, None))
        self._shares.add(share)
        seconds = self.now() - began
        return Fetched(model_id, manifest.digest, manifest.size, seconds, sources, rejected_chunks, resumed, transports)

    async def _copy(self, own: Share, store: Store, held: Bitfield) -> int:
        own.users += 1  # nobody closes it meanwhile
        try:
            return await self._loop.run_in_executor(None, copy, own.source, store, held)
        finally:
            self.release(own.manifest.digest)

    async def _fetch(self, share: Share, store: Store, abandon_s: float) -> DownloadDriver:
        fetching = share.download = DownloadDriver(
            share.model_id,
            store,
            share.held,
            host=self,
            idle_timeout_s=self._idle_timeout_s,
            stall_timeout_s=self._stall_timeout_s,
            abandon_s=abandon_s,
            transfer_ids=self._transfer_ids,
            transfers=self._transfers,
            rng=self._rng,
            announce=partial(self._shares.send_have, share.manifest.digest),
        )
        self._shares.add(share)
        try:
            with self.seeking(share.manifest.digest):
                await fetching.run()
        finally:
            share.download = None
        return fetching

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

    # What it knows

    @contextlib.contextmanager
    def seeking(self, digest: Digest | None) -> Iterator[None]:
        """While the block runs, links to those that hold this are wanted; None: something of unknown digest."""
        self._sought[digest] += 1
        self._tell_wants()
        try:
            yield
        finally:
            self._sought[digest] -= 1
            self._sought += Counter()  # without what nobody seeks any more
            if not self._closing:
                self._tell_wants()

    def holders(self, model_id: ModelId) -> dict[Digest, list[Holder]]:
        """Who announces a model id, by the digest that it stands for there; [] where only this node does."""
        shares = self._shares.shares.values()
        holders: dict[Digest, list[Holder]] = {s.manifest.digest: [] for s in shares if s.model_id == model_id}
        for holder, digest, named in self._offers():
            if named == model_id:
                holders.setdefault(digest, []).append(holder)
        return holders

    def holders_of(self, digest: Digest) -> list[Holder]:
        """Who announces a digest, under whatever model id."""
        return [holder for holder, held, _ in self._offers() if held == digest]

    def members(self) -> list[Record]:
        """All others that gossip knows to be alive or suspect, by id."""
        return self._swim.members()

    def described(self, digest: Digest) -> tuple[Manifest, Origin | None] | None:
        """Manifest and origin of an artifact that this node shares."""
        share = self._shares.shares.get(digest)
        return (share.manifest, share.origin) if share else None

    @property
    def place(self) -> tuple[str, str]:
        """Labels of the host and the rack that this node is on, empty where there is none."""
        return self._host, self._rack

    def holdings(self) -> dict[Digest, Bitfield]:
        """The chunks that this node holds, by digest."""
        return {digest: share.held for digest, share in self._shares.shares.items()}

    async def changed(self, timeout_s: float) -> None:
        """Waits until a peer comes, goes or announces something, or until the time is over."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    @property
    def searching(self) -> bool:
        """Whether somebody was asked who there is, or dialled, and has neither answered nor failed yet."""
        return bool(self._connections.machine.unanswered()) or self._swim.joining

    @property
    def machines(self) -> list[Download | Upload | Connections | Swim]:
        """The state machines of an open node, for whoever checks their invariants."""
        gossip = [] if self._swim.machine is None else [self._swim.machine]
        upload = [] if self._upload_driver is None else [self._upload_driver.machine]
        fetches = [download_driver.machine for download_driver in self._shares.downloads()]
        return [self._connections.machine, *gossip, *upload, *fetches]

    def tried(self) -> list[str]:
        """What became of everyone who could have had something, for error messages."""
        peers = [_serves(p.name, p.hello.address, p.artifacts.values()) for p in self.peers.values()]
        others = [member for member in self.members() if member.node not in self.peers]
        heard = [_serves(m.name, m.address, m.profile.artifacts) for m in others[:MEMBERS_SHOWN]]
        more = [f"{len(others) - MEMBERS_SHOWN} more members"] if len(others) > MEMBERS_SHOWN else []
        return [*peers, *heard, *more, *self._connections.machine.tried(), *sorted(self._connections.warned)]

    def _offers(self) -> Iterator[tuple[Holder, Digest, ModelId]]:
        """Everything that others announce: who, digest and model id. A link says it sooner than gossip."""
        for peer in self.peers.values():
            for announced in peer.artifacts.values():
                holder = Holder(peer.node, peer.name, peer.hello.address, peer)
                yield holder, announced.digest, announced.model_id
        for member in self.members():
            if member.node not in self.peers:
                for held in member.profile.artifacts:
                    yield Holder(member.node, member.name, member.address, None), held.digest, held.model_id

    # For its parts, see peers.host

    @property
    def peers(self) -> Mapping[NodeId, Peer]:
        """The linked nodes, by id."""
        return self._connections.peers

    def now(self) -> float:
        """Seconds on the loop's clock."""
        return self._loop.time()

    def record(self, subject: str, event: object) -> None:
        """Writes to the journal."""
        self.journal.record(self.now(), subject, event)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Starts a task that ends with the node; its failure is logged."""
        task = asyncio.create_task(work, name=f"swarm: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def hello(self, token: str) -> Hello:
        """The node's Hello."""
        endpoints = tuple(Endpoint(transport.scheme, transport.address) for transport in self._environment.transports)
        artifacts = self._shares.announcements()
        return Hello(messages.PROTOCOL, __version__, self.id, self.name, self.address, token, endpoints, artifacts)

    def dialled(self, address: Address) -> None:
        """Tries gossip at an address that accepted a link, unless a member is known there."""
        if all(member.address != address for member in self.members()):
            self._swim.found(address)

    def peer_joined(self, peer: Peer) -> None:
        """Shows interest in the peer's artifacts."""
        self._shares.show_interest(peer)

    def peer_left(self, peer: Peer, why: str) -> None:
        """Ends transfers and requests of a peer, in both directions."""
        self._shares.peer_left(peer, why)
        if self._upload_driver:
            self._upload_driver.left(peer.node)
        self.manifest_requests.peer_left(peer.node, why)

    def peers_changed(self) -> None:
        """Wakes callers of `changed`."""
        self._changed.set()

    # Messages

    def _handlers(self, uploads: UploadDriver) -> dict[type[AnyMessage], Handler]:
        """The handler of each type of message from a peer, but of Hello and Bye, which are the link's."""
        shares, requests = self._shares, self.manifest_requests
        return {
            messages.Members: self._connections.on_members,
            messages.Announce: self._on_announce,
            messages.ManifestRequest: self._on_manifest_request,
            messages.ManifestPart: requests.on_manifest_part,
            messages.OriginRequest: requests.on_origin_request,
            messages.OriginReply: requests.on_origin_reply,
            messages.Interest: shares.on_interest,
            messages.Holdings: shares.on_holdings,
            messages.Have: shares.on_have,
            messages.Request: uploads.requested,
            messages.Cancel: lambda peer, cancel: uploads.cancelled(peer, cancel.transfer),
            messages.Grant: self._on_grant,
            messages.Refuse: self._on_refuse,
        }

    def _on_announce(self, peer: Peer, announce: messages.Announce) -> None:
        self._connections.on_announce(peer, announce)
        self._shares.on_announce(peer, announce)

    def _on_manifest_request(self, peer: Peer, request: messages.ManifestRequest) -> None:
        self.spawn(self.manifest_requests.send_manifest(peer, request), f"send a manifest to {peer.name}")

    def _on_grant(self, peer: Peer, grant: messages.Grant) -> None:
        if download := self._transfers.get(grant.transfer):
            download.granted(peer, grant.transfer, grant.chunks)

    def _on_refuse(self, peer: Peer, refusal: messages.Refuse) -> None:
        if download := self._transfers.get(refusal.transfer):
            download.refused(peer, refusal.transfer, reason=refusal.reason, retry_s=refusal.retry_s)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("%s failed", task.get_name(), exc_info=error)
            for download_driver in self._shares.downloads():  # it may be what would have ended them
                download_driver.fail(LocalProtocolError(f"{task.get_name()} failed: {error!r}; please report this"))

    async def _close_share(self, share: Share) -> None:
        if self._upload_driver:
            await self._upload_driver.stop(share)
        await self._loop.run_in_executor(None, share.close)
        self._withdrawn.remove(share)

    # Members

    def _discovered(self, address: Address, lasting: bool) -> None:
        self._swim.found(address)
        self._connections.handle(connections.AddressDiscovered(address, lasting))

    def _member_changed(self, record: Record) -> None:
        self.record(record.node, MemberChanged(record))
        if not self._closing:
            self._connections.handle(connections.MemberUpdated(record))
            for download_driver in self._shares.downloads():
                download_driver.placed(record.node, record.profile.distance(self._host, self._rack))

    def _tell_wants(self) -> None:
        digests = frozenset(digest for digest in self._sought if digest is not None)
        self._connections.handle(connections.Wanted(digests, more=None in self._sought))

    def _profile(self) -> Profile:
        holdings = tuple(share.holding() for share in self._shares.shares.values())
        told = holdings[: packets.ARTIFACTS_MAX]
        schemes = tuple(transport.scheme for transport in self._environment.transports)
        uploads = self._upload_driver.machine.active if self._upload_driver else 0
        omitted = len(holdings) - len(told)
        software = __version__[: packets.SOFTWARE_MAX]
        return Profile(told, omitted, schemes, self._host, self._rack, uploads, self._upload_slots, software)

    def _distance(self, node: NodeId) -> int:
        """On the way to another node; who is not a member may be anywhere in the rack."""
        record = self._swim.member(node)
        return record.profile.distance(self._host, self._rack) if record else 1

    def _tell_mates(self) -> None:
        """Tells every fetch who fetches the same nearby: each chunk comes in once for all of them."""
        members = self.members()
        for download_driver in self._shares.downloads():
            near: tuple[set[NodeId], set[NodeId]] = (set(), set())
            for member in members:
                distance = member.profile.distance(self._host, self._rack)
                if distance < download.DISTANCE_MAX and self._fetches(member, download_driver.digest):
                    for names in near[distance:]:
                        names.add(member.node)
            # Without a label of its own a rack is everybody, and has no border.
            download_driver.met(events.Mates(frozenset(near[0]), frozenset(near[1] if self._rack else ())))

    def _fetches(self, member: Record, digest: Digest) -> bool:
        """Whether a member fetches this just now. Its link says so sooner than gossip."""
        if (peer := self.peers.get(member.node)) and (told := peer.artifacts.get(digest)):
            return told.chunks < told.chunks_total
        return any(held.digest == digest and held.chunks < held.chunks_total for held in member.profile.artifacts)

    def _update_profile(self) -> None:
        self._swim.tell(self._profile())

    # Time

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._connections.handle(connections.Tick())
            self._tell_mates()
            self._shares.tick()
            self._update_profile()

    def __repr__(self) -> str:
        return f"<Node {self.name} {self.address} | {len(self.peers)} peers | {len(self._shares.shares)} artifacts>"


def _serves(name: str, address: Address, artifacts: Collection[Announcement | Holding]) -> str:
    offers = [f"{a.model_id} ({a.digest[:16]})" for a in artifacts]
    more = f" and {len(offers) - OFFERS_SHOWN} more" if len(offers) > OFFERS_SHOWN else ""
    return f"{name} at {address} serves {', '.join(offers[:OFFERS_SHOWN]) + more if offers else 'nothing'}"
