"""A node of the swarm: joins the machines and drivers of this process, all on one event loop.

`Shares` holds the artifacts, `Fetches` the downloads, `UploadDriver` the uploads, `ConnectionsDriver` the links and
peers, `ManifestRequests` the requests for manifests, `SwimDriver` the members. A node serves and fetches any number of
artifacts at once, and serves every chunk that it has verified. The journal gets every event and action.

    link message ─┐                       ┌─> message to a peer
    datagram     ─┼─> machine.handle() ───┼─> transfer received or sent by a transport
    landed chunk ─┤                       ├─> datagram to a member
    tick         ─┘                       └─> a fetch completes or gives up

Must not know: HTTP, sockets, files. `Environment`, `Store` and `Transport` hide them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any

from swarm import __version__
from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Chunk, Digest, Digests, Manifest, ModelId
from swarm.errors import LocalProtocolError, SwarmError
from swarm.journal import Journal, Opened, Paused, Withdrawn
from swarm.membership import config
from swarm.membership.config import SwimConfig
from swarm.membership.swim import Swim
from swarm.membership.swim_driver import SwimDriver
from swarm.membership.swim_events import MemberChanged
from swarm.net.environment import Environment
from swarm.node import holders
from swarm.node.fetch import Fetched, Fetches
from swarm.node.holders import Announced, Holder
from swarm.peers import connections
from swarm.peers.connections import Connections
from swarm.peers.connections_driver import ConnectionsDriver, Handler
from swarm.peers.manifest_requests import ManifestRequests
from swarm.peers.peer import Peer
from swarm.protocol import messages, packets
from swarm.protocol.messages import Address, AnyMessage, Endpoint, Hello, NodeId, Origin
from swarm.protocol.packets import Profile, Record
from swarm.store import Source, Store
from swarm.transfer.claims import Claims
from swarm.transfer.commit_proof import PinnedCommit
from swarm.transfer.download import Download
from swarm.transfer.file_watch import watch_files
from swarm.transfer.origin_driver import OriginSource
from swarm.transfer.shares import Share, Shares
from swarm.transfer.upload import Upload
from swarm.transfer.upload_driver import UploadDriver
from swarm.transport import told_address

TICK_S = 0.25
DRAIN_LOOK_S = 0.05
PAUSE_NOTICED_S = 0.5  # clocks that are read one after the other differ by less

log = logging.getLogger("swarm")


class Node:
    """A node of the swarm. Use it as `async with Node(environment) as node:`.

    `host` and `rack` are its location labels, which gossip announces; `network` holds the times of gossip. With
    `publishers`, public keys, it resolves an id only to what one of them signed. `check_blake3`:
    fetches check BLAKE3 whether they are pinned or not.
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
        publishers: Sequence[str] = (),
        check_blake3: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        rng = rng or random.SystemRandom()
        self.id = NodeId(f"{rng.getrandbits(64):016x}")
        self.name = name or f"node-{self.id[:6]}"
        self.address = Address("")
        self.journal = Journal()
        self.publishers = frozenset(publishers)
        self._check_blake3 = check_blake3 or bool(publishers)
        self.manifest_requests = ManifestRequests(self.described)
        self._environment = environment
        self._upload_slots = upload_slots
        self._idle_timeout_s = idle_timeout_s
        self._host, self._rack = host[: packets.LABEL_MAX], rack[: packets.LABEL_MAX]
        machine = Connections(self.id, rng=rng, host=self._host, rack=self._rack)
        self._connections = ConnectionsDriver(environment, machine, host=self, rng=rng)
        self._swim = SwimDriver(
            environment, config=network or config.lan(), rng=rng, clock=self.now, changed=self._member_changed
        )
        self._shares = Shares(
            host=self,
            rng=rng,
            changed=self._update_profile,
            distance=self._distance,
            stop_uploads=self._stop_uploads,
            complete_elsewhere=self._complete_elsewhere,
        )
        self._fetches = Fetches(
            host=self,
            shares=self._shares,
            seeking=self.seeking,
            held_elsewhere=lambda digest: bool(self.holders_of(digest)),
            idle_timeout_s=idle_timeout_s,
            stall_timeout_s=stall_timeout_s,
            rng=rng,
        )
        self._upload_driver: UploadDriver | None = None  # until the environment has opened the transports
        self._wanted: Counter[Digest | None] = Counter()  # None: the digest of a model id is not known yet
        self._tasks: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Event()
        self._asked_for: Counter[tuple[str, str]] = Counter()  # what is not there yet, and why
        self._draining = False
        self.broken: list[str] = []  # its loops that failed: only a restart helps
        self._loops: list[asyncio.Task[Any]] = []
        self._closing = self._closed = False
        self._paused_s = 0.0  # that the machines know of

    async def open(self) -> None:
        """Joins the swarm. Raises SettingsError when the listening address cannot be used."""
        self._loop = asyncio.get_running_loop()
        self.address = await self._environment.open(
            self.id, self._connections.run_link, self._discovered, self._swim.receive
        )
        self._upload_driver = UploadDriver(
            host=self,
            transports=self._environment.transports,
            shares=self._shares.shares,
            rank=self._shares.rank,
            withdraw=self._shares.lose,
            only_here=self._shares.only_here,
            slots=self._upload_slots,
            idle_timeout_s=self._idle_timeout_s,
        )
        self.record("node", Opened(self.id, self.name, self.address, *self.place))
        self._swim.open(self.id, self._environment.addresses, self.name, self._profile())
        self._connections.open(self._handlers(self._upload_driver))
        self._paused_s = self._environment.paused_s
        self._loops = [self.spawn(self._tick(), "ticks"), self.spawn(watch_files(self._shares), "watch files")]

    async def drain(self, timeout_s: float) -> None:
        """Prepares for `close`: grants only chunks that no other node has, and waits for the transfers that run.

        Other holders may drain at the same time. So this node tells that it leaves, counts on no other that does, and
        leaves chunks to the others only when it would have heard from those that leave.
        Returns at once if no peer fetches from this node, and after `timeout_s` at the latest.
        """
        self._draining = True
        uploads = self._upload_driver
        if uploads is None or timeout_s <= 0:
            return
        self._shares.leave()
        uploads.drain()
        heard_at = self.now() + self._swim.spread_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                # Peers, gossip and transfers end it.
                while not uploads.drained or (self._shares.feeds and self.now() < heard_at):  # noqa: ASYNC110
                    await asyncio.sleep(DRAIN_LOOK_S)

    async def close(self, reason: str = "shutting down") -> None:
        """Leaves the swarm, ends all transfers and closes all stores."""
        self._closing = True
        self._swim.close()
        await self._connections.close(reason)
        for download in self._shares.downloads():
            download.fail(SwarmError("the node was closed"))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._closed = True
        self._changed.set()
        await self._environment.close()
        self._shares.close()

    async def __aenter__(self) -> Node:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # For users

    def serve(self, model_id: ModelId, source: Source, *, origin: Origin | None = None) -> None:
        """Serves a complete artifact.

        Raises SettingsError for a model id that no message can carry, and for content that this node fetches, or
        serves under another model id.
        """
        self._shares.serve(model_id, source, origin)

    def serve_part(self, model_id: ModelId, source: Source, held: Bitfield, *, origin: Origin | None) -> None:
        """Serves the chunks `held` of an artifact that this node does not share yet, until `release`."""
        self._shares.serve_part(model_id, source, held, origin)

    def serve_promise(self, model_id: ModelId, source: Source, claims: Claims, *, origin: Origin | None) -> None:
        """Serves a promise that was not fetched: of its chunks those that `grown` names, until `release`."""
        self._shares.serve_promise(model_id, source, claims, origin)

    def grown(self, digest: Digest, chunks: Sequence[int]) -> None:
        """More chunks of such a promise can be read, and have claims."""
        self._shares.grown(digest, chunks)

    def rename(self, digest: Digest, model_id: ModelId) -> None:
        """Announces an artifact under another model id from now on."""
        self._shares.rename(digest, model_id)

    def release(self, digest: Digest) -> None:
        """Undoes a `serve` or a successful `fetch`; without users the artifact is withdrawn."""
        self._shares.release(digest)

    def withdraw(self, digest: Digest, why: str) -> asyncio.Task[Any] | None:
        """Stops serving an artifact, and ends its fetch. The task ends when its sources are closed."""
        return self._shares.withdraw(digest, why)

    @property
    def lost(self) -> list[Withdrawn]:
        """Models that this node served until their files changed, and does not serve again."""
        return list(self._shares.lost.values())

    def meet(self, address: Address) -> None:
        """A node of this machine that the user's programs share is at this address."""
        if address not in self._environment.addresses and address != self.local_address:
            self._discovered((address,), True)

    @property
    def unready(self) -> list[str]:
        """Why not all that was asked for is there and served; empty for a node that is ready."""
        waiting = [f"{what}: {why}" for what, why in self._asked_for]
        lost = [lost.why for lost in self.lost]
        return [*self.broken, *waiting, *lost, *(["it is being stopped"] if self._draining or self._closing else [])]

    @contextlib.contextmanager
    def asked_for(self, what: str, why: str) -> Iterator[None]:
        """In the block, `what` was asked for and is not there yet: the node is not ready."""
        self._asked_for[what, why] += 1
        try:
            yield
        finally:
            self._asked_for[what, why] -= 1
            self._asked_for += Counter()  # drops counts of 0

    async def until_lost(self, digest: Digest) -> Withdrawn:
        """Waits until an artifact is withdrawn because its source changed or cannot be read."""
        return await self._shares.until_lost(digest)

    async def fetch(
        self,
        model_id: ModelId,
        store: Store,
        *,
        origin: Origin | None = None,
        timeout_s: float | None = None,
        abandon_s: float = math.inf,
        wanted: Bitfield | None = None,
        pinned: bool = False,
        source: OriginSource | None = None,
        commit: PinnedCommit | None = None,
    ) -> Fetched:
        """Fills a store from all peers that hold chunks of its artifact, seals it, and serves it.

        `wanted`: the chunks to fetch, None for all; the store has a place for each of them.
        `abandon_s`: seconds without a linked peer that holds a missing chunk, after which a fetch with an alternative
        gives up sooner than a stalled fetch. `pinned`: every chunk must also have its BLAKE3 digest; always, where the
        node checks BLAKE3 or knows publishers. `source`: the origin of a promise, for chunks that no peer holds.
        `commit`: what the files must be, by the listing of its origin; the result says whether that was proven.

        Raises FetchError when it gives up, OriginError where only the origin has the rest and fails, NotOfCommit,
        StoreError when the store fails. The store is closed then; a directory keeps the verified chunks for the next
        attempt.
        """
        return await self._fetches.fetch(
            model_id,
            store,
            origin=origin,
            timeout_s=timeout_s,
            abandon_s=abandon_s,
            wanted=wanted,
            blake3=pinned or self._check_blake3,
            source=source,
            pinned=commit,
        )

    @contextlib.contextmanager
    def seeking(self, digest: Digest | None) -> Iterator[None]:
        """Links to holders of this artifact are wanted in the block; None: of a model id without known digest."""
        self._wanted[digest] += 1
        self._update_wanted()
        try:
            yield
        finally:
            self._wanted[digest] -= 1
            self._wanted += Counter()  # drops counts of 0
            if not self._closing:
                self._update_wanted()

    def holders(self, model_id: ModelId) -> dict[Digest, list[Holder]]:
        """Nodes that announce a model id, by digest. The list is empty for a digest that only this node has."""
        shares = self._shares.shares.values()
        found: dict[Digest, list[Holder]] = {s.manifest.digest: [] for s in shares if s.model_id == model_id}
        for announced in self.announced():
            if announced.model_id == model_id:
                found.setdefault(announced.digest, []).append(announced.holder)
        return found

    def holders_of(self, digest: Digest) -> list[Holder]:
        """Nodes that announce a digest, under any model id."""
        return [announced.holder for announced in self.announced() if announced.digest == digest]

    def announced(self) -> list[Announced]:
        """All artifacts that other nodes announce."""
        return list(holders.announced(self.peers, self.members()))

    def promised(self, model_id: ModelId) -> bool:
        """Whether a node fetches or serves a promise of a model id: its origin was read."""
        promises = self.promises()
        return any(announced.digest in promises and announced.model_id == model_id for announced in self.announced())

    def promises(self) -> set[Digest]:
        """The digests that are promises, as other nodes announce."""
        return holders.promises(self.peers, self.members())

    def feeds(self, digest: Digest) -> bool:
        """Whether another node still fetches an artifact that this node holds."""
        return any(holders.fetches(member, digest, self.peers) for member in self.members())

    def replace_source(self, digest: Digest, source: Source) -> asyncio.Task[Any]:
        """Serves an artifact from another source, with the same chunks. The task ends when the old one is closed."""
        return self._shares.replace(digest, source)

    def known(self, chunk: Chunk, digest: Digest) -> Digests | None:
        """The digests of a chunk of a promise that this node has fetched."""
        return self._shares.shares[digest].known(chunk)

    def members(self) -> list[Record]:
        """All other nodes that gossip knows as alive or suspect, by id."""
        return self._swim.members()

    def described(self, digest: Digest) -> tuple[Manifest, Origin | None] | None:
        """Manifest and provenance of an artifact that this node shares."""
        share = self._shares.shares.get(digest)
        return (share.manifest, share.origin) if share else None

    @property
    def place(self) -> tuple[str, str]:
        """Labels of this node's host and rack, empty if unknown."""
        return self._host, self._rack

    def holdings(self) -> dict[Digest, Bitfield]:
        """The chunks that this node holds, by digest."""
        return {digest: share.held for digest, share in self._shares.shares.items()}

    async def changed(self, timeout_s: float) -> None:
        """Waits until a peer joins, leaves or announces artifacts, or an address fails, for at most `timeout_s`.

        Raises SwarmError once the node is closed: a search for a holder ends with its node.
        """
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0 if self._closed else timeout_s):
                await self._changed.wait()
        if self._closed:
            raise SwarmError("the node was closed")

    @property
    def refused(self) -> bool:
        """Whether every address that is known fails in a way that only a user can change, such as another key."""
        return self._connections.machine.refused and not self.members()

    @property
    def alone(self) -> bool:
        """Whether no address of another node is known, nor will be once names are looked up."""
        return self._connections.machine.alone and not self.members() and not self._environment.resolving

    @property
    def addresses(self) -> tuple[Address, ...]:
        """What this node tells of itself, the best first."""
        return self._environment.addresses

    @property
    def local_address(self) -> Address:
        """Where programs of this machine reach the node."""
        return self._environment.local

    @property
    def on_loopback(self) -> bool:
        """Whether only programs of this machine reach the node."""
        return self._environment.on_loopback

    @property
    def confined(self) -> bool:
        """Whether this node talks to its own machine only."""
        return self._environment.confined

    @property
    def named_peers(self) -> bool:
        """Whether the user named nodes to join through."""
        return self._environment.names_peers

    @property
    def searching(self) -> bool:
        """Whether an address has not answered a dial yet, or no contact has answered a Sync."""
        return bool(self._connections.machine.unanswered()) or self._swim.joining

    @property
    def machines(self) -> list[Download | Upload | Connections | Swim]:
        """The state machines of an open node; tests check their invariants."""
        swim = [] if self._swim.machine is None else [self._swim.machine]
        upload = [] if self._upload_driver is None else [self._upload_driver.machine]
        return [self._connections.machine, *swim, *upload, *(driver.machine for driver in self._shares.downloads())]

    def tried(self) -> list[str]:
        """Known nodes with their artifacts, addresses without a link, and warnings: lines for error messages."""
        nodes = holders.described(self.peers, self.members())
        failed = [*self._environment.unresolved, *self._connections.machine.tried()]
        return list(dict.fromkeys([*nodes, *failed, *sorted(self._connections.warned)]))

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
        """Starts a task that ends with the node. Its failure is logged, and fails all fetches."""
        task = asyncio.create_task(work, name=f"swarm: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def hello(self, token: str, port: int) -> Hello:
        """The node's Hello, for a link where others reach it at `port`."""
        endpoints = tuple(Endpoint(each.scheme, told_address(each)) for each in self._environment.transports)
        told, artifacts = self._environment.addresses, self._shares.announcements()
        return Hello(messages.PROTOCOL, __version__, self.id, self.name, port, told, token, endpoints, artifacts)

    def dialled(self, address: Address) -> None:
        """Tries gossip at an address that accepted a link, unless a member is known there."""
        if all(address not in member.addresses for member in self.members()):
            self._swim.found(address)

    def peer_joined(self, peer: Peer) -> None:
        """Exchanges holdings with the peer."""
        self._shares.joined(peer)

    def peer_left(self, peer: Peer, why: str) -> None:
        """Ends the transfers and requests of a peer, in both directions."""
        self._shares.peer_left(peer, why)
        if self._upload_driver:
            self._upload_driver.left(peer.node)
        self.manifest_requests.peer_left(peer.node, why)

    def peers_changed(self) -> None:
        """Wakes the callers of `changed`."""
        self._changed.set()

    async def _stop_uploads(self, share: Share) -> None:
        if self._upload_driver:
            await self._upload_driver.stop(share)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("%s failed", task.get_name(), exc_info=error)
            if task in self._loops:
                self.broken.append(f"{task.get_name()} failed: {error!r}")
            for download in self._shares.downloads():  # the task may be the only thing that they wait for
                download.fail(LocalProtocolError(f"{task.get_name()} failed: {error!r}; please report this"))

    # Messages

    def _handlers(self, uploads: UploadDriver) -> dict[type[AnyMessage], Handler]:
        """The handler of each type of message. Hello and Bye belong to the link, and have none."""
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
            messages.ChunkClaims: shares.on_claims,
            messages.OriginReading: shares.on_reading,
            messages.Request: uploads.requested,
            messages.Cancel: lambda peer, cancel: uploads.cancelled(peer, cancel.transfer),
            messages.Grant: self._fetches.on_grant,
            messages.Refuse: self._fetches.on_refuse,
        }

    def _on_announce(self, peer: Peer, announce: messages.Announce) -> None:
        self._connections.on_announce(peer, announce)
        self._shares.on_announce(peer, announce)

    def _on_manifest_request(self, peer: Peer, request: messages.ManifestRequest) -> None:
        if self.manifest_requests.on_manifest_request(peer, request):
            self.spawn(self.manifest_requests.send_manifests(peer), f"send manifests to {peer.name}")

    # Members

    def _discovered(self, addresses: tuple[Address, ...], lasting: bool) -> None:
        for address in addresses:
            self._swim.found(address)
        self._connections.handle(connections.AddressDiscovered(addresses, lasting))

    def _member_changed(self, record: Record) -> None:
        self.record(record.node, MemberChanged(record))
        if not self._closing:
            addresses = self._environment.reached(record.addresses)
            self._connections.handle(connections.MemberUpdated(record, addresses))
            for download in self._shares.downloads():
                download.placed(record.node, record.profile.distance(self._host, self._rack))

    def _update_wanted(self) -> None:
        digests = frozenset(digest for digest in self._wanted if digest is not None)
        self._connections.handle(connections.Wanted(digests, unresolved=None in self._wanted))

    def _profile(self) -> Profile:
        holdings = tuple(share.holding() for share in self._shares.shares.values())
        announced = holdings[: packets.ARTIFACTS_MAX]
        omitted = len(holdings) - len(announced)
        schemes = tuple(transport.scheme for transport in self._environment.transports)
        uploads = self._upload_driver.machine.active if self._upload_driver else 0
        software = __version__[: packets.SOFTWARE_MAX]
        labels = self._host, self._rack
        leaving = self._shares.leaving
        return Profile(announced, omitted, schemes, *labels, uploads, self._upload_slots, software, leaving)

    def _update_profile(self) -> None:
        self._swim.announce(self._profile())

    def _distance(self, node: NodeId) -> int:
        """The distance of a node; 1 for a node that gossip does not know, which may be in this rack."""
        record = self._swim.member(node)
        return record.profile.distance(self._host, self._rack) if record else 1

    def _complete_elsewhere(self, digest: Digest) -> bool:
        """Whether a node that stays holds all of an artifact."""
        return holders.complete_without_leaving(self.peers, self.members(), digest)

    def _update_mates(self) -> None:
        """Passes each download the nodes nearby that fetch its artifact: together they import each chunk once."""
        members = self.members()
        for download in self._shares.downloads():
            digest, part = download.digest, download.part
            fetching = [member for member in members if holders.fetches(member, digest, self.peers, part=part)]
            if download.promise:
                download.promise.met(frozenset(member.node for member in fetching))
            download.met(holders.mates(fetching, self.place))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._notice_pause()
            self._connections.handle(connections.Tick())
            self._update_mates()
            self._shares.tick()
            self._swim.moved(self._environment.addresses)
            self._update_profile()

    def _notice_pause(self) -> None:
        """Tells the machines if this process stood still. The loop's clock has left that out, so no deadline passed."""
        seconds = self._environment.paused_s - self._paused_s
        if seconds >= PAUSE_NOTICED_S:
            self._paused_s += seconds
            paused = Paused(seconds)
            self.record("node", paused)
            log.info("this process stood still for %.1f s; it goes on", seconds)
            self._swim.paused(seconds)
            self._connections.handle(paused)
            for download in self._shares.downloads():
                download.handle(paused)

    def __repr__(self) -> str:
        return f"<Node {self.name} {self.address} | {len(self.peers)} peers | {len(self._shares.shares)} artifacts>"
