"""A simulated burst: members as pure machines and their messages, under a virtual clock in a single process.

Each member runs the machines of a node: `Connections`, `Download`, `Upload`, `Superseed` and `OriginReads`. The crowd
carries out their actions: it opens links, delivers messages after a delay and moves chunks over a `Wire`. Nothing
stands for sockets, tasks, stores, hashes and claims: a random generator decides which chunks are corrupt. Gossip tells
every member of joins and deaths at once, and of loads every second (less often with more than `GOSSIP_MEMBERS`).
`tests/sim` runs whole nodes with their drivers; the crowd shows how a burst of a thousand scales.

A run is a function of its `Burst`. An observer sees every event and action, except gossip.

Must not know: how the machines decide.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from swarm.content.bitfield import Bitfield, runs
from swarm.content.manifest import ChunkEntry, Digest, FileEntry, HashScheme, Manifest, ModelId
from swarm.errors import LocalProtocolError
from swarm.node.node import TICK_S
from swarm.peers import connections, selection
from swarm.peers.connections import Connections
from swarm.protocol import messages
from swarm.protocol.messages import Address, Announcement, Message, NodeId
from swarm.protocol.packets import Holding, Profile, Record, State
from swarm.simulation.claims import false_digests, promised, true_digests
from swarm.simulation.origin import SimulatedOrigin
from swarm.simulation.report import BurstReport
from swarm.simulation.setup import SLOWER, Burst
from swarm.simulation.wire import ChunkFlow, Clock, Domain, Nic, Trunk, Wire
from swarm.transfer import download_events, upload
from swarm.transfer.claims import BanClaimant, Claims, claim_messages, claimed_runs
from swarm.transfer.download import Download
from swarm.transfer.superseed import Superseed
from swarm.transfer.upload import Upload
from swarm.transfer.upload_driver import NOTHING_RETRY_S, REFUSED_RETRY_S

ORIGIN = NodeId("origin")  # the source of what newcomers read from it
DIGEST, MODEL, SCHEME = Digest("0" * 64), ModelId("simulated"), "simulated"
FRAME_BYTES = 8  # around each message
UPLOAD_SLOTS = 8
IDLE_TIMEOUT_S, DIAL_TIMEOUT_S = 5.0, 5.0
BURST_S = 0.002  # the newcomers of a burst ask within this time
GOSSIP_EVERY_S = ANNOUNCE_EVERY_S = 1.0
GOSSIP_MEMBERS = 256  # of more members, loads are told less often: all of them hear of each
BUS_FASTER = 8  # members of a machine reach each other at this multiple of its link's rate
LIMIT_BOUNDS, LIMIT_S = 50, 60.0  # a run ends after this many lower bounds, plus a time for timeouts
LIES_PART = 0.5  # part of a liar's chunks that is corrupt

Observer = Callable[[float, str, object], None]


class _Machine(Protocol):
    def check(self) -> None: ...


@dataclass(frozen=True)
class Asked:
    """A newcomer asks for the model."""


@dataclass(frozen=True)
class Died:
    """A member stops, and with it everything that it sends and receives."""


@dataclass
class _Member:
    name: NodeId
    nic: Nic
    machine: int
    rack: int
    held: Bitfield
    rng: random.Random
    asked_at: float
    connections: Connections
    profile: Profile  # as gossip tells it
    superseed: Superseed | None = None
    download: Download | None = None
    claims: Claims | None = None
    ended_at: float | None = None
    due_at: float = math.inf  # of the next `_come_due`
    control_bytes: int = 0
    upload: Upload = field(default_factory=lambda: Upload(slots=UPLOAD_SLOTS))
    open: dict[int, _Member] = field(default_factory=dict)  # all links, by number
    links: dict[NodeId, int] = field(default_factory=dict)  # the links that carry messages, by node
    requests: dict[tuple[NodeId, int], messages.Request] = field(default_factory=dict)
    sending: dict[tuple[NodeId, int], tuple[ChunkFlow, float]] = field(default_factory=dict)  # with its start
    receiving: dict[int, NodeId] = field(default_factory=dict)  # the source of each transfer
    received_bytes: Counter[NodeId] = field(default_factory=Counter)  # by source
    outboxes: dict[NodeId, list[Message]] = field(default_factory=dict)  # messages that wait, by receiver

    @property
    def fetches(self) -> bool:
        return self.nic.alive and self.download is not None and not self.download.done

    def record(self, state: State = State.ALIVE) -> Record:
        return Record(self.name, 0, state, 0, self.name, (Address(self.name),), self.profile)

    def distance(self, other: _Member) -> int:
        return other.profile.distance(self.profile.host, self.profile.rack)


class Crowd:
    """A simulated burst: `Crowd(burst).run()`, once.

    `observe(at_s, member, what)` is called for every event and action. `checked`: after each, the invariants of its
    machine are checked.
    """

    def __init__(self, burst: Burst, observe: Observer | None = None, *, checked: bool = False) -> None:
        self.burst = burst
        self._observe = observe
        self._checked = checked
        self._clock = Clock()
        self._wire = Wire(self._clock, delay_s=burst.delay_s)
        self._rng = random.Random(burst.rng_seed)  # noqa: S311 - reproducible
        entries = (ChunkEntry(burst.chunk_bytes, "0" * 32),) * burst.chunks
        files = (FileEntry("model", burst.copy_bytes, "", entries),)
        self._manifest = Manifest(1, "checkpoint", "", HashScheme(), burst.chunk_bytes, files)
        if burst.false_claims:
            self._manifest = promised(burst)
        self._members: dict[NodeId, _Member] = {}
        self._machines: dict[int, Domain] = {}
        self._racks = [
            Domain(Trunk(burst.rack_bytes_per_s), Trunk(burst.rack_bytes_per_s))
            for _ in range(burst.racks if burst.racks > 1 else 0)
        ]
        self._seeds = [NodeId(f"seed-{number}") for number in range(burst.seeds)]
        self._names = [NodeId(f"newcomer-{number}") for number in range(burst.newcomers)]
        self._slow, self._late, self._doomed = (
            frozenset(self._rng.sample(self._names, round(part * burst.newcomers)))
            for part in (burst.slow, burst.late, burst.kill_newcomers)
        )
        self._liars = frozenset(self._names[: burst.liars])
        self._false = frozenset(self._names[burst.liars :][: burst.false_claims])
        self._awaited = set(self._names) - self._doomed
        self._link_numbers = itertools.count()
        self._banned: dict[str, list[str]] = {}
        self._lost_chunks = 0  # without a living holder
        self._mates_due = False
        self._gossip_every_s = GOSSIP_EVERY_S * max(1.0, burst.newcomers / GOSSIP_MEMBERS)
        self._origin = (
            SimulatedOrigin(burst, self._manifest, self._clock, self._wire) if burst.origin_bytes_per_s else None
        )

    def run(self, *, limit_s: float | None = None) -> BurstReport:
        """Runs until every newcomer that is not killed is done, a chunk has no holder left, or `limit_s` is over.

        Raises LocalProtocolError when a machine breaks an invariant, with the command that replays the run.
        """
        burst = self.burst
        for number, name in enumerate(self._seeds):
            self._clock.at(burst.seeds_at * burst.copy_s, self._serve, name, number)
        for number, name in enumerate(self._names):
            at_s = self._rng.uniform(0, BURST_S) + burst.spread * burst.copy_s * number / burst.newcomers
            at_s += burst.copy_s / 2 if name in self._late else 0.0
            self._clock.at(at_s, self._ask, name, number)
            if name in self._doomed:
                self._clock.at(at_s + self._rng.uniform(0.1, 0.9) * burst.copy_s, self._kill, name)
        if burst.kill_seed_at is not None:
            self._clock.at(burst.kill_seed_at * burst.copy_s, self._kill, self._seeds[0])
        self._clock.after(self._gossip_every_s, self._gossip_loads)
        limit_s = limit_s or LIMIT_BOUNDS * burst.bound_s + burst.noticed_s + LIMIT_S
        try:
            self._clock.run(lambda: not self._awaited or bool(self._lost_chunks), limit_s=limit_s)
            if self._checked:
                self.check()
        except LocalProtocolError as error:
            raise LocalProtocolError(f"{self!r}: {error}; replay it with: {burst.command}") from error
        return self._report()

    def check(self) -> None:
        """Raises LocalProtocolError when a member's machine breaks an invariant."""
        for member in self._members.values():
            reads = self._origin.reads_of(member.name) if self._origin else None
            machines = member.connections, member.upload, member.download, member.superseed, member.claims, reads
            for machine in machines:
                if machine:
                    machine.check()

    def __repr__(self) -> str:
        seeds = sum(self._members[name].nic.alive for name in self._seeds if name in self._members)
        dead = sum(not member.nic.alive for member in self._members.values())
        return (
            f"<Crowd {self.burst.newcomers} newcomers, {len(self._awaited)} awaited | {seeds or len(self._seeds)} seeds"
            f" | {dead} dead | {self._clock.now:.3f} s>"
        )

    def _report(self) -> BurstReport:
        members = self._members
        newcomers = [members[name] for name in self._names if name in members]
        return BurstReport(
            burst=self.burst,
            asked_at_s={member.name: member.asked_at for member in newcomers},
            times_s={
                **dict.fromkeys(self._names),
                **{m.name: m.ended_at - m.asked_at for m in newcomers if m.ended_at is not None},
            },
            killed=self._doomed,
            slow=self._slow,
            liars=self._liars | self._false,
            believed_lies=sum(
                any(m.claims.claim(chunk).digests != true_digests(chunk) for chunk in m.held)
                for m in newcomers
                if m.claims and m.ended_at is not None and m.name not in self._false
            ),
            lost_chunks=self._lost_chunks,
            seed_bytes=sum(members[name].nic.sent_bytes for name in self._seeds if name in members),
            origin_bytes=self._origin.sent_bytes if self._origin else 0.0,
            origin_requests=self._origin.requests if self._origin else 0,
            control_bytes={name: member.control_bytes for name, member in members.items()},
            rejected_chunks=sum(m.download.rejected_chunks for m in newcomers if m.download),
            banned={name: tuple(peers) for name, peers in self._banned.items()},
            crossed_bytes=sum(rack.out.sent_bytes for rack in self._racks),
            entered_bytes=sum(machine.into.sent_bytes for machine in self._machines.values()),
        )

    # Members

    def _add(self, name: NodeId, *, machine: int, whole: bool = False) -> _Member:
        burst, shared, rate = self.burst, None, self.burst.rate_bytes_per_s
        if burst.per_machine > 1 and not whole:
            shared = self._machines.setdefault(machine, Domain(Trunk(rate), Trunk(rate)))
            rate *= BUS_FASTER
        if name in self._slow:
            rate = burst.rate_bytes_per_s / SLOWER
        rack = machine % burst.racks
        nic = Nic(rate, rate, (shared, self._racks[rack] if self._racks else None))
        rng = random.Random(f"{burst.rng_seed}/{name}")  # noqa: S311 - reproducible
        host_label, rack_label = f"machine-{machine}", f"rack-{rack}" if self._racks else ""
        member = self._members[name] = _Member(
            name=name,
            nic=nic,
            machine=machine,
            rack=rack,
            held=Bitfield.full(burst.chunks) if whole else Bitfield(burst.chunks),
            rng=rng,
            asked_at=self._clock.now,
            connections=Connections(name, rng=rng, host=host_label, rack=rack_label),
            profile=Profile(host=host_label, rack=rack_label),
        )
        member.superseed = Superseed(burst.chunks, rng=rng) if whole else None
        member.profile = self._profile(member)
        for other in self._members.values():
            if other is not member and other.nic.alive:
                self._connect(member, connections.MemberUpdated(other.record(), (Address(other.name),)))
        self._gossip(member)
        self._tick(member)
        return member

    def _serve(self, name: NodeId, number: int) -> None:
        self._add(name, machine=number, whole=True)

    def _ask(self, name: NodeId, number: int) -> None:
        burst = self.burst
        member = self._add(name, machine=burst.seeds + number // burst.per_machine)
        member.download = Download(
            self._manifest,
            member.held,
            node=name,
            now=self._clock.now,
            idle_timeout_s=IDLE_TIMEOUT_S,
            stall_timeout_s=math.inf,
            transfer_ids=itertools.count(),
            rng=member.rng,
        )
        if burst.false_claims:
            member.claims = Claims(self._manifest, node=name, rng=member.rng)
        if self._origin:
            self._origin.begin(
                name,
                member.nic,
                member.download,
                tell=lambda: self._tell_reading(member),
                landed=partial(self._read, member),
                urgent=member.claims.must_read if member.claims else (),
            )
        self._note(member, Asked())
        self._connect(member, connections.Wanted(frozenset({DIGEST})))
        self._clock.after(ANNOUNCE_EVERY_S, self._announce_progress, member)
        self._schedule_mates()

    def _kill(self, name: NodeId) -> None:
        member = self._members[name]
        self._note(member, Died())
        self._wire.kill(member.nic)
        if self._origin:
            self._origin.end(name)
        living = [member.held for member in self._members.values() if member.nic.alive]
        if not self._origin:
            self._lost_chunks = sum(not any(chunk in held for held in living) for chunk in range(self.burst.chunks))
        noticed_s = self.burst.noticed_s + self.burst.delay_s
        for number, other in member.open.items():
            self._clock.after(noticed_s, self._close, other, number, "the connection was reset")
        self._clock.after(noticed_s, self._gossip, member, State.DEAD)
        self._schedule_mates()

    def _profile(self, member: _Member) -> Profile:
        chunks, total = len(member.held), member.held.length
        holding = Holding(MODEL, DIGEST, "checkpoint", chunks, total, member.superseed is not None)
        labels = member.profile.host, member.profile.rack
        return Profile((holding,), 0, (), *labels, member.upload.active, UPLOAD_SLOTS)

    def _gossip(self, member: _Member, state: State = State.ALIVE) -> None:
        updated = connections.MemberUpdated(member.record(state), (Address(member.name),))
        for other in self._members.values():
            if other is member or not other.nic.alive:
                continue
            if state < State.DEAD and not self._checked:
                other.connections.handle(updated, self._clock.now)  # of all calls by far the most: nothing follows
            else:
                self._connect(other, updated)

    def _gossip_loads(self) -> None:
        for member in self._members.values():
            profile = self._profile(member)
            if member.nic.alive and _shown(profile) != _shown(member.profile):
                member.profile = profile
                self._gossip(member)
        self._clock.after(self._gossip_every_s, self._gossip_loads)

    def _schedule_mates(self) -> None:
        if (self.burst.per_machine > 1 or self._racks or self._origin) and not self._mates_due:
            self._mates_due = True
            self._clock.after(selection.SETTLE_S, self._update_mates)

    def _update_mates(self) -> None:
        self._mates_due = False
        fetching = [member for member in self._members.values() if member.fetches]
        names = frozenset(member.name for member in fetching)
        for member in fetching:
            if self._origin:
                self._origin.met(member.name, names)
            on_host = frozenset(m.name for m in fetching if m.machine == member.machine and m is not member)
            in_rack = frozenset(m.name for m in fetching if m.rack == member.rack and m is not member)
            self._download(member, download_events.Mates(on_host, in_rack if self._racks else frozenset()))

    # Links

    def _connect(self, member: _Member, event: connections.Event) -> None:
        if not member.nic.alive:
            return
        gossip = isinstance(event, connections.MemberUpdated)
        if not gossip:
            self._note(member, event)
        actions = member.connections.handle(event, self._clock.now)
        self._check(member.connections)
        for action in actions:
            self._note(member, action)
            match action:
                case connections.Dial((address,)):
                    self._clock.after(2 * self.burst.delay_s, self._dialled, member, self._members[NodeId(address)])
                case connections.Drop(number, why):
                    if other := member.open.get(number):
                        self._forget(member, other.name, number, why)
                        del member.open[number]
                        self._clock.after(self.burst.delay_s, self._close, other, number, why)
                case connections.Welcome(number, nodes):
                    self._welcome(member, number, nodes)
                case connections.ShareNodes(number, nodes):
                    self._send(messages.Members(nodes), member, member.open[number])

    def _dialled(self, member: _Member, other: _Member) -> None:
        address = Address(other.name)
        if not other.nic.alive:
            self._clock.after(DIAL_TIMEOUT_S, self._connect, member, connections.DialFailed(address))
            return
        number = next(self._link_numbers)
        member.open[number], other.open[number] = other, member
        for end, far, dialled in ((other, member, None), (member, other, address)):
            holds, here = {DIGEST: far.held.complete}, (Address(far.name),)
            self._connect(end, connections.LinkUp(number, far.name, here, dialled, holds, here))

    def _welcome(self, member: _Member, number: int, nodes: tuple[tuple[Address, ...], ...]) -> None:
        other = member.open[number]
        if (twin := member.links.get(other.name)) is not None:
            self._forget(member, other.name, twin, "another link is open")
        member.links[other.name] = number
        if nodes:
            self._send(messages.Members(nodes), member, other)
        if member.fetches:
            self._send(messages.Interest(DIGEST, member.held.pack(), b""), member, other)
            if reading := self._reading(member):
                self._send(reading, member, other)

    def _close(self, member: _Member, number: int, why: str) -> None:
        """The other end of a link has closed it, or is dead."""
        if other := member.open.pop(number, None):
            self._forget(member, other.name, number, why)
            self._connect(member, connections.LinkDown(number))

    def _forget(self, member: _Member, name: NodeId, number: int, why: str) -> None:
        if member.links.get(name) != number or not member.nic.alive:
            return
        del member.links[name]
        for transfer in [transfer for transfer, source in member.receiving.items() if source == name]:
            del member.receiving[transfer]
        self._upload(member, upload.PeerLeft(name))
        self._download(member, download_events.PeerLeft(name, why))
        if self._origin:
            self._origin.left(member.name, name)
        if member.superseed:
            member.superseed.left(name)

    # Messages

    def _send(self, message: Message, member: _Member, *others: _Member, within_s: float = 0.0) -> None:
        """As `Peer.post`: a message that may wait shares the frame of the next that may not."""
        for other in others:
            outbox = member.outboxes.setdefault(other.name, [])
            outbox.append(message)
            if within_s <= 0:
                self._flush(member, other)
            elif len(outbox) == 1:
                self._clock.after(within_s, self._flush, member, other)

    def _flush(self, member: _Member, other: _Member) -> None:
        if outbox := member.outboxes.pop(other.name, []):
            member.control_bytes += FRAME_BYTES + sum(len(messages.encode(message)) for message in outbox)
        for message in outbox:
            self._clock.after(self.burst.delay_s, self._receive, other, member, message)

    def _linked(self, member: _Member) -> list[_Member]:
        return [self._members[name] for name in member.links]

    def _receive(self, member: _Member, peer: _Member, message: Message) -> None:
        if not member.nic.alive or peer.name not in member.links:
            return
        match message:
            case messages.Members(nodes):
                self._connect(member, connections.AddressesShared(nodes))
            case messages.Announce(artifacts):
                holds = {held.digest: held.chunks == held.chunks_total for held in artifacts}
                self._connect(member, connections.HoldingsAnnounced(member.links[peer.name], holds))
            case messages.Interest(bits=bits):
                self._send_claims(list(member.held), member, peer)
                self._send(messages.Holdings(DIGEST, member.held.pack()), member, peer)
                if member.superseed:
                    member.superseed.joined(peer.name, Bitfield.unpack(bits, member.held.length))
            case messages.Holdings(_, bits):
                holds_chunks = Bitfield.unpack(bits, member.held.length)
                if member.claims:
                    holds_chunks = Bitfield(holds_chunks.length, member.claims.offered(peer.name, holds_chunks))
                superseeds, distance = peer.superseed is not None, member.distance(peer)
                self._download(member, download_events.PeerJoined(peer.name, holds_chunks, superseeds, distance))
            case messages.Have() | messages.OriginReading() | messages.ChunkClaims():
                self._heard(member, peer, message)
            case messages.Request():
                self._requested(member, peer, message)
            case messages.Grant(number, _, chunks):
                if member.receiving.get(number) == peer.name:
                    self._download(member, download_events.Granted(peer.name, number, chunks))
            case messages.Refuse(number, reason, retry_s):
                if member.receiving.pop(number, None):
                    self._download(member, download_events.Refused(peer.name, number, reason, retry_s))
            case messages.Cancel(number):
                member.requests.pop((peer.name, number), None)
                self._upload(member, upload.Cancelled(peer.name, number))

    def _heard(
        self, member: _Member, peer: _Member, message: messages.Have | messages.OriginReading | messages.ChunkClaims
    ) -> None:
        """A peer has chunks, claims their digests, or reads some."""
        if isinstance(message, messages.ChunkClaims):
            if member.claims:
                self._ban(member, member.claims.told(peer.name, claimed_runs(message, member.held.length))[1])
        elif isinstance(message, messages.Have):
            chunks = tuple(index for first, count in message.runs for index in range(first, first + count))
            if member.claims:
                chunks = tuple(member.claims.offered(peer.name, chunks))
            if member.superseed:
                member.superseed.has(peer.name, chunks)
            self._download(member, download_events.PeerHas(peer.name, chunks))
        elif self._origin:
            self._origin.told(member.name, peer.name, message.runs, able=message.able)

    def _announce_progress(self, member: _Member) -> None:
        superseeds = member.superseed is not None
        total = member.held.length
        held = Announcement(MODEL, DIGEST, "checkpoint", self.burst.copy_bytes, len(member.held), total, superseeds)
        self._send(messages.Announce((held,), leaving=False), member, *self._linked(member))
        if member.fetches:
            self._clock.after(ANNOUNCE_EVERY_S, self._announce_progress, member)

    # Uploads

    def _requested(self, member: _Member, peer: _Member, request: messages.Request) -> None:
        again = member.claims.must_read if member.claims else ()
        held = all(chunk in member.held and chunk not in again for chunk in request.chunks)
        if held and (request.chunks or member.superseed):
            member.requests[peer.name, request.transfer] = request
            size = (len(request.chunks) or request.count) * self.burst.chunk_bytes
            asked = upload.Requested(peer.name, request.transfer, size, request.sources, request.pace_bytes_per_s)
            self._upload(member, asked)
        else:
            self._send(messages.Refuse(request.transfer, "not_held", REFUSED_RETRY_S), member, peer)

    def _upload(self, member: _Member, event: upload.Event) -> None:
        if not member.nic.alive:
            return
        self._note(member, event)
        actions = member.upload.handle(event)
        self._check(member.upload)
        for action in actions:
            self._note(member, action)
            match action:
                case upload.Grant(name, number, sequence):
                    self._grant(member, self._members[name], member.requests.pop((name, number)), sequence)
                case upload.Stop(name, number):
                    flow, began_at = member.sending.pop((name, number))
                    self._wire.cancel(flow)
                    self._upload(member, upload.Ended(name, number, self._clock.now - began_at, whole=False))
                case upload.Refuse(name, number, reason, retry_s):
                    member.requests.pop((name, number), None)
                    self._send(messages.Refuse(number, reason, retry_s), member, self._members[name])

    def _grant(self, member: _Member, peer: _Member, request: messages.Request, sequence: int) -> None:
        number = request.transfer
        chunks = request.chunks or self._choose(member, peer, request)
        if not chunks:
            self._send(messages.Refuse(number, "nothing_to_give", NOTHING_RETRY_S), member, peer)
            self._upload(member, upload.Ended(peer.name, number, 0.0, whole=False))
            return
        self._send(messages.Grant(number, sequence, chunks), member, peer)
        flow = ChunkFlow(
            member.nic,
            peer.nic,
            [self.burst.chunk_bytes] * len(chunks),
            landed=lambda place: self._landed(peer, member, number, chunks[place]),
            ended=lambda: self._ended(peer, member, number),
        )
        member.sending[peer.name, number] = flow, self._clock.now
        self._wire.send(flow)

    def _choose(self, member: _Member, peer: _Member, request: messages.Request) -> tuple[int, ...]:
        if member.superseed is None:
            return ()
        others = [other.name for other in self._linked(member) if other.superseed]
        rank, seeds = sum(name < member.name for name in others), len(others) + 1
        chunks = member.superseed.choose(peer.name, request.count, starving=request.starving, rank=rank, seeds=seeds)
        self._check(member.superseed)
        return chunks

    # Downloads

    def _landed(self, member: _Member, source: _Member, number: int, chunk: int) -> None:
        if number in member.receiving:
            member.received_bytes[source.name] += self.burst.chunk_bytes
            corrupt = self._rng.random() < (LIES_PART if source.name in self._liars else self.burst.corrupt)
            if member.claims and source.claims and not corrupt:
                sent = source.claims.claim(chunk).digests
                corrupt = sent != member.claims.expected(source.name, chunk)  # read again since it was claimed
                if not corrupt and chunk not in member.claims:
                    member.claims.landed(chunk, sent, source.name)
            if corrupt:
                self._download(member, download_events.ChunkCorrupt(source.name, number, chunk))
            else:
                self._download(member, download_events.ChunksVerified(source.name, number, (chunk,)))
                self._prove(member)

    def _ended(self, member: _Member, source: _Member, number: int) -> None:
        if sent := source.sending.pop((member.name, number), None):
            _, began_at = sent
            self._upload(source, upload.Ended(member.name, number, self._clock.now - began_at))
        if member.receiving.pop(number, None):
            self._download(member, download_events.TransferEnded(source.name, number))

    def _reading(self, member: _Member) -> messages.OriginReading | None:
        reads = self._origin.reads_of(member.name) if self._origin else None
        return messages.OriginReading(DIGEST, True, tuple(reads.ranges())) if reads else None

    def _tell_reading(self, member: _Member) -> None:
        if member.nic.alive:
            reading = self._reading(member) or messages.OriginReading(DIGEST, False, ())
            self._send(reading, member, *self._linked(member))

    def _read(self, member: _Member, transfer: int, chunk: int, goes_on: bool) -> None:
        """A chunk from the origin."""
        if member.claims:
            digests = true_digests(chunk)
            member.claims.read(chunk, digests if member.name not in self._false else false_digests(chunk, member.name))
        self._download(member, download_events.ChunksVerified(ORIGIN, transfer, (chunk,)))
        if not goes_on:
            self._download(member, download_events.OriginReadEnded())
        self._prove(member)

    # Claims

    def _send_claims(self, chunks: Sequence[int], member: _Member, *others: _Member, within_s: float = 0.0) -> None:
        for message in claim_messages(member.claims, sorted(chunks)) if member.claims else ():
            self._send(message, member, *others, within_s=within_s)

    def _prove(self, member: _Member) -> None:
        """A complete model counts if its content is right; else some of it is read again. A liar believes itself."""
        claims = member.claims
        if not claims or not member.fetches or claims.proven or claims.must_read or not member.held.complete:
            return
        chunks = range(member.held.length)
        if member.name in self._false:
            self._download(member, download_events.Proven())
        elif all(claims.claim(chunk).digests == true_digests(chunk) for chunk in chunks):
            self._ban(member, claims.proved(0))
            self._download(member, download_events.Proven())
        elif claims.disproved(0) and self._origin:
            self._origin.look(member.name)

    def _ban(self, member: _Member, bans: Sequence[BanClaimant]) -> None:
        for ban in bans:
            self._download(member, download_events.ClaimDisproved(ban.peer, ban.why))

    def _download(self, member: _Member, event: download_events.Event) -> None:
        machine = member.download
        if machine is None or not member.fetches:
            return
        self._note(member, event)
        actions = machine.handle(event, self._clock.now)
        self._check(machine)
        if self._origin and isinstance(event, download_events.ChunksVerified):
            self._origin.progressed(member.name)
        for action in actions:
            self._note(member, action)
            match action:
                case download_events.Ask(name, number, chunks, _, count, starving, sources, pace, streams):
                    member.receiving[number] = name
                    request = messages.Request(SCHEME, DIGEST, number, chunks, count, starving, sources, pace, streams)
                    self._send(request, member, self._members[name])
                case download_events.Cancel(name, number):
                    member.receiving.pop(number, None)
                    self._send(messages.Cancel(number), member, self._members[name])
                case download_events.Announce(chunks, within_s):
                    have = messages.Have(DIGEST, tuple(runs(sorted(chunks))))
                    self._send_claims(chunks, member, *self._linked(member), within_s=within_s)
                    self._send(have, member, *self._linked(member), within_s=within_s)
                case download_events.Ban(name):
                    self._banned.setdefault(member.name, []).append(name)
                case download_events.Complete():
                    member.ended_at = self._clock.now
                    self._awaited.discard(member.name)
                    if self._origin:
                        self._origin.end(member.name)
                    self._connect(member, connections.Wanted(frozenset()))
                    self._announce_progress(member)
                    self._schedule_mates()
        if machine.due_at < member.due_at:
            member.due_at = machine.due_at
            self._clock.at(machine.due_at, self._come_due, member)

    # Time

    def _tick(self, member: _Member) -> None:
        if member.nic.alive:
            self._connect(member, connections.Tick())
            self._download(member, download_events.Tick(dict(member.received_bytes)))
            if self._origin:
                self._origin.tick(member.name)
            self._clock.after(TICK_S, self._tick, member)

    def _come_due(self, member: _Member) -> None:
        member.due_at = math.inf
        self._download(member, download_events.Tick(dict(member.received_bytes)))

    def _note(self, member: _Member, what: object) -> None:
        if self._observe:
            self._observe(self._clock.now, member.name, what)

    def _check(self, machine: _Machine) -> None:
        if self._checked:
            machine.check()


def _shown(profile: Profile) -> tuple[int, tuple[bool, ...]]:
    """What `Connections` sees of a profile that changes: load, and which holdings are whole."""
    return profile.uploads, tuple(held.chunks == held.chunks_total for held in profile.artifacts)
