"""A crowd: many newcomers at once, as machines and messages alone, so that a thousand of them fit into one process.

Every member runs the machines of a real node (`download`, `upload`, `gifts`, links by `mesh`) and says what a node
says. What lies between (links, tasks, stores) is left out, a chunk is right or wrong by dice, and who is there is known
at once. `cluster` runs whole nodes and is where their drivers are tried; here the question is how a burst scales, and
what disturbs it.

A run is a function of its `Setup`. Every event and action of every machine can be observed.

Must not know: how the machines decide.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from swarm.content.bitfield import Bitfield, runs
from swarm.content.manifest import ChunkEntry, Digest, FileEntry, HashScheme, Manifest
from swarm.errors import LocalProtocolError
from swarm.node.node import TICK_S
from swarm.peers import selection
from swarm.peers.connections import LINKS_MAX
from swarm.peers.selection import Candidate
from swarm.protocol import messages
from swarm.protocol.messages import Message, NodeId
from swarm.simulation.report import Report
from swarm.simulation.setup import SLOWER, Setup
from swarm.simulation.wire import Clock, Domain, Flow, Host, Trunk, Wire
from swarm.transfer import download_events, upload
from swarm.transfer.download import Download
from swarm.transfer.superseed import Superseed
from swarm.transfer.upload import Upload
from swarm.transfer.upload_driver import NOTHING_RETRY_S, REFUSED_RETRY_S

DIGEST, SCHEME = Digest("0" * 64), "simulated"
FRAME_BYTES = 8  # around each message
UPLOAD_SLOTS = 8
IDLE_TIMEOUT_S = 5.0
BURST_S = 0.002  # newcomers of one burst ask within so long
LOADS_EVERY_S = 1.0  # gossip tells how busy a member is no more often
BUS_FASTER = 8  # members of one machine reach each other so many times faster than its link is
LIMIT_BOUNDS, LIMIT_S = 50, 60.0  # so many lower bounds, and what timeouts may add, are more than any run should take
LIES_PART = 0.5  # of what a liar sends

Observer = Callable[[float, str, object], None]


@dataclass(frozen=True)
class Asked:
    """A newcomer asks for the model."""


@dataclass(frozen=True)
class Died:
    """A member's machine is gone."""


@dataclass
class _Member:
    name: NodeId
    host: Host
    machine: int
    rack: int
    held: Bitfield
    rng: random.Random
    asked_at: float
    superseed: Superseed | None = None
    download: Download | None = None
    ended_at: float | None = None
    load: int = 0  # what others know of how many links it has
    control_bytes: int = 0
    upload: Upload = field(default_factory=lambda: Upload(slots=UPLOAD_SLOTS))
    links: dict[NodeId, _Member] = field(default_factory=dict)
    due_at: float = math.inf  # of the next `_come_due`
    requests: dict[tuple[NodeId, int], messages.Request] = field(default_factory=dict)
    sending: dict[tuple[NodeId, int], tuple[Flow, float]] = field(default_factory=dict)  # with the time when it began
    receiving: dict[int, NodeId] = field(default_factory=dict)  # the source of each transfer
    received_bytes: Counter[NodeId] = field(default_factory=Counter)  # by source

    @property
    def fetches(self) -> bool:
        return self.host.alive and self.download is not None and not self.download.done

    @property
    def full(self) -> bool:
        if not self.fetches:
            return len(self.links) >= LINKS_MAX
        return sum(not other.held.complete for other in self.links.values()) >= selection.LINKS_FULL


class Crowd:
    """A burst under construction and under way: `Crowd(setup).run()`, once.

    `observe` is told of every event and action. `checked`: after each, the invariants of the machine it concerns.
    """

    def __init__(self, setup: Setup, observe: Observer | None = None, *, checked: bool = False) -> None:
        self.setup = setup
        self._observe = observe
        self._checked = checked
        self._clock = Clock()
        self._wire = Wire(self._clock, delay_s=setup.delay_s)
        self._rng = random.Random(setup.dice)  # noqa: S311 - dice that can be thrown again
        entries = (ChunkEntry(setup.chunk_bytes, "0" * 32),) * setup.chunks
        files = (FileEntry("model", setup.copy_bytes, "", entries),)
        self._manifest = Manifest(1, "checkpoint", "", HashScheme(), setup.chunk_bytes, files)
        self._members: dict[NodeId, _Member] = {}
        self._machines: dict[int, Domain] = {}
        self._racks = [
            Domain(Trunk(setup.rack_bytes_per_s), Trunk(setup.rack_bytes_per_s))
            for _ in range(setup.racks if setup.racks > 1 else 0)
        ]
        self._seeds = [NodeId(f"seed-{number}") for number in range(setup.seeds)]  # alive
        self._names = [NodeId(f"newcomer-{number}") for number in range(setup.newcomers)]
        self._slow, self._late, self._doomed = (
            frozenset(self._rng.sample(self._names, round(part * setup.newcomers)))
            for part in (setup.slow, setup.late, setup.kill_newcomers)
        )
        self._liars = frozenset(self._names[: setup.liars])
        self._awaited = set(self._names) - self._doomed
        self._banned: dict[NodeId, list[str]] = {}
        self._lost_chunks = 0  # that nobody alive holds
        self._mates_due = False

    def run(self, *, limit_s: float | None = None) -> Report:
        """Plays until all newcomers that were not killed are done, or cannot be as a chunk is lost; `limit_s` at most.

        Raises LocalProtocolError when a machine breaks its own rules; the error names the command that replays it.
        """
        setup = self.setup
        for number, name in enumerate(self._seeds):
            self._add(name, machine=number, whole=True)
        for number, name in enumerate(self._names):
            at_s = self._rng.uniform(0, BURST_S) + setup.spread * setup.copy_s * number / setup.newcomers
            at_s += setup.copy_s / 2 if name in self._late else 0.0
            self._clock.at(at_s, self._ask, name, number)
            if name in self._doomed:
                self._clock.at(at_s + self._rng.uniform(0.1, 0.9) * setup.copy_s, self._kill, name)
        if setup.kill_seed_at is not None:
            self._clock.at(setup.kill_seed_at * setup.copy_s, self._kill, "seed-0")
        self._clock.after(LOADS_EVERY_S, self._tell_loads)
        limit_s = limit_s or LIMIT_BOUNDS * setup.bound_s + setup.noticed_s + LIMIT_S
        try:
            self._clock.run(lambda: not self._awaited or bool(self._lost_chunks), limit_s=limit_s)
            if self._checked:
                self.check()
        except LocalProtocolError as error:
            raise LocalProtocolError(f"{self!r}: {error}; replay it with: {setup.command}") from error
        return self._report()

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold, of this or of any machine."""
        for member in self._members.values():
            for machine in (member.upload, member.download, member.superseed):
                if machine:
                    machine.check()
            for name, other in member.links.items():
                if member.host.alive and other.host.alive and other.links.get(member.name) is not member:
                    raise LocalProtocolError(f"{self!r}: {member.name} has a link with {name}, which has none with it")

    def __repr__(self) -> str:
        dead = sum(not member.host.alive for member in self._members.values())
        return (
            f"<Crowd {self.setup.newcomers} newcomers, {len(self._awaited)} awaited | {len(self._seeds)} seeds"
            f" | {dead} dead | {self._clock.now:.3f} s>"
        )

    def _report(self) -> Report:
        members = self._members
        newcomers = [members[name] for name in self._names if name in members]
        return Report(
            setup=self.setup,
            asked_at_s={member.name: member.asked_at for member in newcomers},
            times_s={
                **dict.fromkeys(self._names),
                **{m.name: m.ended_at - m.asked_at for m in newcomers if m.ended_at is not None},
            },
            killed=self._doomed,
            slow=self._slow,
            liars=self._liars,
            lost_chunks=self._lost_chunks,
            seed_bytes=sum(member.host.sent_bytes for member in members.values() if member.superseed),
            control_bytes={name: member.control_bytes for name, member in members.items()},
            rejected_chunks=sum(m.download.rejected_chunks for m in newcomers if m.download),
            banned={name: tuple(peers) for name, peers in self._banned.items()},
            crossed_bytes=sum(rack.out.sent_bytes for rack in self._racks),
            entered_bytes=sum(machine.into.sent_bytes for machine in self._machines.values()),
        )

    # Members

    def _add(self, name: NodeId, *, machine: int, whole: bool = False) -> _Member:
        setup, shared, rate = self.setup, None, self.setup.rate_bytes_per_s
        if setup.per_machine > 1 and not whole:
            shared = self._machines.setdefault(machine, Domain(Trunk(rate), Trunk(rate)))
            rate *= BUS_FASTER
        if name in self._slow:
            rate = setup.rate_bytes_per_s / SLOWER
        rack = machine % setup.racks
        host = Host(rate, rate, (shared, self._racks[rack] if self._racks else None))
        held = Bitfield.full(setup.chunks) if whole else Bitfield(setup.chunks)
        rng = random.Random(f"{setup.dice}/{name}")  # noqa: S311 - dice that can be thrown again
        member = self._members[name] = _Member(name, host, machine, rack, held, rng, self._clock.now)
        member.superseed = Superseed(setup.chunks, rng=rng) if whole else None
        return member

    def _ask(self, name: NodeId, number: int) -> None:
        setup = self.setup
        member = self._add(name, machine=setup.seeds + number // setup.per_machine)
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
        self._note(member, Asked())
        self._look_for_links(member, selection.LINKS_FIRST)
        self._clock.after(selection.SETTLE_S, self._keep_links, member)
        self._clock.after(TICK_S, self._tick, member)
        self._tell_mates_soon()

    def _kill(self, name: NodeId) -> None:
        member = self._members[name]
        self._note(member, Died())
        self._wire.kill(member.host)
        self._seeds = [seed for seed in self._seeds if seed != name]
        living = [member.held for member in self._members.values() if member.host.alive]
        self._lost_chunks = sum(not any(chunk in held for held in living) for chunk in range(self.setup.chunks))
        for other in member.links.values():
            self._clock.after(self.setup.noticed_s + self.setup.delay_s, self._lose, other, name)
        self._tell_mates_soon()

    def _lose(self, member: _Member, name: NodeId) -> None:
        if member.links.pop(name, None) and member.host.alive:
            for number in [number for number, source in member.receiving.items() if source == name]:
                del member.receiving[number]
            self._upload(member, upload.PeerLeft(name))
            self._download(member, download_events.PeerLeft(name, "the connection was reset"))
            if member.superseed:
                member.superseed.left(name)

    def _keep_links(self, member: _Member) -> None:
        if member.fetches:
            self._look_for_links(member, selection.LINKS_WANTED)
            self._clock.after(selection.LOOK_EVERY_S, self._keep_links, member)

    def _look_for_links(self, member: _Member, wanted: int) -> None:
        linked = [self._candidate(member, other) for other in member.links.values()]
        others = [
            self._candidate(member, other)
            for other in self._members.values()
            if other.host.alive and not other.full and other is not member and other.name not in member.links
        ]
        for candidate in selection.choose(linked, others, wanted=wanted, rng=member.rng):
            other = self._members[candidate.node]
            member.links[other.name], other.links[member.name] = other, member
            self._show_interest(member, other)
            self._show_interest(other, member)

    def _candidate(self, member: _Member, other: _Member) -> Candidate:
        return Candidate(other.name, other.held.complete, _distance(member, other), other.load)

    def _show_interest(self, member: _Member, other: _Member) -> None:
        if member.fetches:
            self._say(member, other, messages.Interest(DIGEST, member.held.pack()))

    def _tell_loads(self) -> None:
        for member in self._members.values():
            member.load = len(member.links)
        self._clock.after(LOADS_EVERY_S, self._tell_loads)

    def _tell_mates_soon(self) -> None:
        if (self.setup.per_machine > 1 or self._racks) and not self._mates_due:
            self._mates_due = True
            self._clock.after(selection.SETTLE_S, self._tell_mates)

    def _tell_mates(self) -> None:
        self._mates_due = False
        fetching = [member for member in self._members.values() if member.fetches]
        for member in fetching:
            on_host = frozenset(m.name for m in fetching if m.machine == member.machine and m is not member)
            in_rack = frozenset(m.name for m in fetching if m.rack == member.rack and m is not member)
            self._download(member, download_events.Mates(on_host, in_rack if self._racks else frozenset()))

    # Messages

    def _say(self, member: _Member, other: _Member, message: Message) -> None:
        member.control_bytes += len(messages.encode(message)) + FRAME_BYTES
        self._clock.after(self.setup.delay_s, self._hear, other, member, message)

    def _hear(self, member: _Member, peer: _Member, message: Message) -> None:
        if not member.host.alive or peer.name not in member.links:
            return
        match message:
            case messages.Interest(_, bits):
                self._say(member, peer, messages.Holdings(DIGEST, member.held.pack()))
                if member.superseed:
                    member.superseed.joined(peer.name, Bitfield.unpack(bits, member.held.length))
            case messages.Holdings(_, bits):
                holds = Bitfield.unpack(bits, member.held.length)
                superseeds, distance = peer.superseed is not None, _distance(member, peer)
                self._download(member, download_events.PeerJoined(peer.name, holds, superseeds, distance))
            case messages.Have(_, told):
                chunks = tuple(index for first, count in told for index in range(first, first + count))
                if member.superseed:
                    member.superseed.has(peer.name, chunks)
                self._download(member, download_events.PeerHas(peer.name, chunks))
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

    # Sending

    def _requested(self, member: _Member, peer: _Member, request: messages.Request) -> None:
        if all(chunk in member.held for chunk in request.chunks) and (request.chunks or member.superseed):
            member.requests[peer.name, request.transfer] = request
            size = (len(request.chunks) or request.count) * self.setup.chunk_bytes
            asked = upload.Requested(peer.name, request.transfer, size, request.sources, request.pace_bytes_per_s)
            self._upload(member, asked)
        else:
            self._say(member, peer, messages.Refuse(request.transfer, "not_held", REFUSED_RETRY_S))

    def _upload(self, member: _Member, event: upload.Event) -> None:
        if not member.host.alive:
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
                    self._say(member, self._members[name], messages.Refuse(number, reason, retry_s))

    def _grant(self, member: _Member, peer: _Member, request: messages.Request, sequence: int) -> None:
        number = request.transfer
        chunks = request.chunks or self._choose(member, peer, request)
        if not chunks:
            self._say(member, peer, messages.Refuse(number, "nothing_to_give", NOTHING_RETRY_S))
            self._upload(member, upload.Ended(peer.name, number, 0.0, whole=False))
            return
        self._say(member, peer, messages.Grant(number, sequence, chunks))
        flow = Flow(
            member.host,
            peer.host,
            [self.setup.chunk_bytes] * len(chunks),
            landed=lambda place: self._landed(peer, member, number, chunks[place]),
            ended=lambda: self._ended(peer, member, number),
        )
        member.sending[peer.name, number] = flow, self._clock.now
        self._wire.send(flow)

    def _choose(self, member: _Member, peer: _Member, request: messages.Request) -> tuple[int, ...]:
        if member.superseed is None:
            return ()
        rank, seeds = self._seeds.index(member.name), len(self._seeds)
        chunks = member.superseed.choose(peer.name, request.count, starving=request.starving, rank=rank, seeds=seeds)
        self._check(member.superseed)
        return chunks

    # Receiving

    def _landed(self, member: _Member, source: _Member, number: int, chunk: int) -> None:
        if number in member.receiving:
            member.received_bytes[source.name] += self.setup.chunk_bytes
            if self._rng.random() < (LIES_PART if source.name in self._liars else self.setup.corrupt):
                self._download(member, download_events.ChunkCorrupt(source.name, number, chunk))
            else:
                self._download(member, download_events.ChunksVerified(source.name, number, (chunk,)))

    def _ended(self, member: _Member, source: _Member, number: int) -> None:
        if sent := source.sending.pop((member.name, number), None):
            _, began_at = sent
            self._upload(source, upload.Ended(member.name, number, self._clock.now - began_at))
        if member.receiving.pop(number, None):
            self._download(member, download_events.TransferEnded(source.name, number))

    def _download(self, member: _Member, event: download_events.Event) -> None:
        machine = member.download
        if machine is None or not member.fetches:
            return
        self._note(member, event)
        actions = machine.handle(event, self._clock.now)
        self._check(machine)
        for action in actions:
            self._note(member, action)
            match action:
                case download_events.Ask(name, number, chunks, _, count, starving, sources, pace):
                    member.receiving[number] = name
                    request = messages.Request(SCHEME, DIGEST, number, chunks, count, starving, sources, pace)
                    self._say(member, self._members[name], request)
                case download_events.Cancel(name, number):
                    member.receiving.pop(number, None)
                    self._say(member, self._members[name], messages.Cancel(number))
                case download_events.Announce(chunks):
                    have = messages.Have(DIGEST, tuple(runs(sorted(chunks))))
                    for other in list(member.links.values()):
                        self._say(member, other, have)
                case download_events.Ban(name):
                    self._banned.setdefault(member.name, []).append(name)
                case download_events.Complete():
                    member.ended_at = self._clock.now
                    self._awaited.discard(member.name)
                    self._tell_mates_soon()
        if machine.due_at < member.due_at:
            member.due_at = machine.due_at
            self._clock.at(machine.due_at, self._come_due, member)

    # Time

    def _tick(self, member: _Member) -> None:
        if member.fetches:
            self._download(member, download_events.Tick(dict(member.received_bytes)))
            self._clock.after(TICK_S, self._tick, member)

    def _come_due(self, member: _Member) -> None:
        member.due_at = math.inf
        self._download(member, download_events.Tick(dict(member.received_bytes)))

    def _note(self, member: _Member, what: object) -> None:
        if self._observe:
            self._observe(self._clock.now, member.name, what)

    def _check(self, machine: Download | Upload | Superseed) -> None:
        if self._checked:
            machine.check()


def _distance(one: _Member, other: _Member) -> int:
    if one.rack != other.rack:
        return 2
    return 0 if one.machine == other.machine else 1
