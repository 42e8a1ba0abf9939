"""A simulated cluster: seeds and newcomers that are real nodes, what may go wrong, and a report of what happened.

    python -m tests.sim.cluster --seed 7 --newcomers 8 --chunks 128 --scenario seed_dies

A run is a function of its `Setup`; every failure names the command that replays it. After every event the machines'
invariants are checked, and a task that fails anywhere fails the run. A chunk holds few bytes, so that a run is fast,
and rates are as low as it takes for a chunk to last as long as a real one.

Must not know: how nodes decide; it reads journals and results.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import logging
import math
import random
import shlex
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import ModelId
from swarm.errors import LocalProtocolError, SwarmError
from swarm.journal import ArtifactsAnnounced, Entry, Joined, Left
from swarm.membership.swim import Swim
from swarm.membership.swim_events import MemberChanged
from swarm.node.fetch import Fetched
from swarm.node.node import Node
from swarm.peers.connections import Connections
from swarm.store import Source
from swarm.transfer import download_events, upload
from swarm.transfer.download import Download
from swarm.transfer.upload import Upload

from . import clock, scenarios
from .content import BytesStore, Content, Liar
from .network import Fabric

MODEL_ID = ModelId("simulated/model")
SPREAD_S = 0.01  # newcomers of one burst do not ask in the same instant

# What each machine's state may have changed with, as far as the journal tells.
CHANGES: dict[type, tuple[type, ...]] = {
    Download: get_args(download_events.Event),
    Upload: get_args(upload.Action),
    Connections: (Joined, Left, ArtifactsAnnounced, MemberChanged),
    Swim: (MemberChanged,),
}


@dataclass(frozen=True)
class Setup:
    """Everything a run depends on. Hosts are alike: a chunk lasts `chunk_s` on each direction of each."""

    seed: int = 0
    seeds: int = 1
    newcomers: int = 8
    liars: int = 0  # further seeds, every third chunk of which is wrong
    chunks: int = 64
    chunk_bytes: int = 4096
    chunk_s: float = 0.0125
    delay_s: float = 0.0001
    known: Literal["one", "all"] = "one"  # whose addresses a newcomer is given: the first seed's, or everybody's
    upload_slots: int = 8
    idle_timeout_s: float = 5.0
    stall_timeout_s: float = 30.0
    loss: float = 0.0  # the part of datagrams that is lost
    limit_s: float = 600.0
    scenario: str = "undisturbed"

    @property
    def command(self) -> str:
        """What replays the run."""
        given = (
            (f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        )
        flags = (f" --{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in given)
        return "python -m tests.sim.cluster" + "".join(flags)


@dataclass
class Member:
    """One node of the cluster. `outcome` stays None for seeds, and for newcomers that were killed."""

    name: str
    node: Node
    store: BytesStore
    asked_at: float = 0.0
    ended_at: float = 0.0
    outcome: Fetched | SwarmError | None = None
    fetch: asyncio.Task[None] | None = None
    killed: bool = False
    wanted: Bitfield | None = None  # the part that it fetches


@dataclass(frozen=True)
class Report:
    """What happened. Seconds count from each newcomer's own request; bytes are those of hosts, by name."""

    command: str
    bound_s: float
    finished_s: dict[str, float]
    failed: dict[str, SwarmError]
    wrong: tuple[str, ...]  # finished with other bytes than the seeds have
    banned: dict[str, tuple[str, ...]]  # by newcomer, whom it banned
    sources: dict[str, dict[str, int]]
    sent_bytes: dict[str, int]
    control_bytes: dict[str, int]
    rejected_chunks: int
    longest_wait_s: float  # from a request to its grant
    seed_models: float  # sent by all seeds together, in sizes of the model
    trace_hash: str
    entries: int
    virtual_s: float

    @property
    def ratio(self) -> float:
        """Last newcomer's time over the lower bound; infinite when nobody finished."""
        return max(self.finished_s.values(), default=math.inf) / self.bound_s

    def __str__(self) -> str:
        control = sum(self.control_bytes.values()) / max(1, sum(self.sent_bytes.values()))
        lines = [
            self.command,
            f"  {len(self.finished_s)} finished, {len(self.failed)} failed, {len(self.wrong)} wrong",
            f"  last after {max(self.finished_s.values(), default=math.nan):.3f} s, bound {self.bound_s:.3f} s:"
            f" ratio {self.ratio:.3f}",
            f"  seeds sent {self.seed_models:.2f} models, control {control:.1%} of the payload (chunks are small here)",
            f"  {self.rejected_chunks} chunks rejected, longest wait for a grant {self.longest_wait_s:.3f} s",
            f"  trace {self.trace_hash[:16]} of {self.entries} entries over {self.virtual_s:.3f} s",
        ]
        return "\n".join([*lines, *(f"  {name}: {error}" for name, error in self.failed.items())])


class Cluster:
    """A swarm under construction and under way. `Cluster(setup).run()`."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.content = Content.random(setup.seed, chunks=setup.chunks, chunk_bytes=setup.chunk_bytes)
        self.members: dict[str, Member] = {}
        self.fabric: Fabric
        self.dice = random.Random(f"{setup.seed}/scenario")  # dice that can be thrown again
        self._happened: asyncio.Event
        self._trace = _Trace()
        self._faults = _Faults()

    def run(self, scenario: scenarios.Scenario | None = None) -> Report:
        """Plays a scenario, the setup's own one if none is given, until every fetch is over.

        Raises LocalProtocolError when an invariant breaks or a task fails, clock.Stuck beyond the setup's `limit_s`.
        """
        logger = logging.getLogger("swarm")
        logger.addHandler(self._faults)
        try:
            return clock.run(self._play(scenario or scenarios.named(self.setup.scenario)), limit_s=self.setup.limit_s)
        except BaseException as error:
            error.add_note(f"replay: {self.setup.command}")
            raise
        finally:
            logger.removeHandler(self._faults)

    # What scenarios do

    async def seed(self, name: str, content: Content | None = None, *, lies: bool = False) -> Member:
        """Adds a node that serves the artifact, or another one under the same model id."""
        content = content or self.content
        member = await self.open(name, BytesStore(content.manifest, content.files))
        source: Source = member.store
        member.node.serve(MODEL_ID, Liar(source, every=3) if lies else source)
        return member

    async def newcomer(self, name: str, *, wanted: Iterable[int] | None = None) -> Member:
        """Adds a node that fetches the artifact, or these chunks of it, from now on."""
        member = await self.open(name, BytesStore(self.content.manifest))
        member.wanted = None if wanted is None else Bitfield(self.setup.chunks, wanted)
        member.asked_at = member.node.now()
        context = clock.within(name)
        member.fetch = asyncio.create_task(self._fetch(member), name=f"fetch of {name}", context=context)
        return member

    async def open(self, name: str, store: BytesStore, *, machine: str | None = None) -> Member:
        """Adds a node that neither serves nor fetches; those with one `machine` run on one host."""
        setup, rate = self.setup, self.setup.chunk_bytes / self.setup.chunk_s
        known = [other for other in self.members if other != name][: 1 if setup.known == "one" else None]
        environment = self.fabric.add(
            name, up_bytes_per_s=rate, down_bytes_per_s=rate, delay_s=setup.delay_s / 2, known=known
        )
        node = Node(
            environment,
            name=name,
            upload_slots=setup.upload_slots,
            idle_timeout_s=setup.idle_timeout_s,
            stall_timeout_s=setup.stall_timeout_s,
            host=machine or name,
            rng=random.Random(f"{setup.seed}/{name}"),  # dice that can be thrown again
        )
        member = self.members[name] = Member(name, node, store)
        await asyncio.create_task(node.open(), context=clock.within(name))
        node.journal.subscribe(lambda entry: self._observe(member, entry))
        return member

    async def kill(self, name: str, *, silent: bool = False) -> None:
        """Ends a node without goodbye: noticed at once, or, if silent, only by what does not arrive any more."""
        member = self.members[name]
        member.killed = True
        self.fabric.kill(name, silent=silent)
        if member.fetch:
            member.fetch.cancel()
        if not silent:
            await asyncio.sleep(2 * self.setup.delay_s)  # its peers' systems answer first
            await member.node.close()

    async def leave(self, *names: str, within_s: float = 10.0, apart_s: float = 0.0) -> None:
        """Ends these nodes as SIGTERM does, one `apart_s` after the other: they drain, then close."""

        async def one(number: int, node: Node) -> None:
            await asyncio.sleep(number * apart_s)
            await node.drain(within_s)
            await node.close()

        await asyncio.gather(*(one(number, self.members[name].node) for number, name in enumerate(names)))

    async def pause(self, *names: str, seconds: float) -> None:
        """Stops the processes of these nodes, and lets them go on after a while."""
        for name in names:
            self.fabric.pause(name)
        await asyncio.sleep(seconds)
        for name in names:
            self.fabric.resume(name)

    async def until(self, condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
        """Waits for something that shows in the journals to become true. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._happened.clear()
                await self._happened.wait()

    def fetched(self, name: str) -> float:
        """The part of the chunks that a newcomer holds."""
        return float(self._held(self.members[name]).mean())

    def linked(self, name: str) -> int:
        """To how many others a node is linked."""
        return len(self.members[name].node.peers)

    def spread(self) -> float:
        """The part of the chunks that the living newcomers hold together."""
        living = [self._held(member) for member in self.members.values() if member.fetch and not member.killed]
        return float(np.any(living, axis=0).mean()) if living else 0.0

    # How a run goes

    async def _play(self, scenario: scenarios.Scenario) -> Report:
        setup = self.setup
        dice = random.Random(f"{setup.seed}/datagrams")  # dice that can be thrown again
        self.fabric = Fabric(slice_bytes=setup.chunk_bytes, loss=setup.loss, rng=dice)
        self._happened = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._faults.unhandled)
        try:
            for number in range(setup.seeds):
                await self.seed(f"seed-{number}")
            for number in range(setup.liars):
                await self.seed(f"liar-{number}", lies=True)
            script = asyncio.create_task(scenario(self), name="scenario")
            dice = random.Random(setup.seed)  # dice that can be thrown again
            for number in range(setup.newcomers):
                await self.newcomer(f"newcomer-{number}")
                await asyncio.sleep(dice.uniform(0, 2 * SPREAD_S / max(1, setup.newcomers)))
            await script
            await asyncio.gather(*(m.fetch for m in self.members.values() if m.fetch), return_exceptions=True)
            ended = loop.time()
            report = self._report(ended)
        finally:
            self._trace.closed = True
            for member in self.members.values():
                await member.node.close()
        self._faults.raise_first()
        return report

    async def _fetch(self, member: Member) -> None:
        try:
            member.outcome = await member.node.fetch(MODEL_ID, member.store, wanted=member.wanted)
        except SwarmError as error:
            if not member.killed:
                member.outcome = error
        member.ended_at = member.node.now()

    def _observe(self, member: Member, entry: Entry) -> None:
        self._trace.add(member.name, entry)
        self._happened.set()
        try:
            for machine in member.node.machines:
                if isinstance(entry.event, CHANGES[type(machine)]):
                    machine.check()
        except LocalProtocolError as error:
            self._faults.note(error)

    def _held(self, member: Member) -> np.ndarray[Any, np.dtype[np.bool_]]:
        for machine in member.node.machines:
            if isinstance(machine, Download):
                return machine.held.mask
        return np.full(self.setup.chunks, isinstance(member.outcome, Fetched))

    def _report(self, now: float) -> Report:
        members = self.members.values()
        finished = {m.name: m.outcome for m in members if isinstance(m.outcome, Fetched)}
        hosts = self.fabric.hosts
        sent = {name: host.sent_bytes for name, host in hosts.items()}
        by_seeds = sum(size for name, size in sent.items() if not self.members[name].fetch)
        return Report(
            command=self.setup.command,
            bound_s=self._bound_s(),
            finished_s={name: self.members[name].ended_at - self.members[name].asked_at for name in finished},
            failed={m.name: m.outcome for m in members if isinstance(m.outcome, SwarmError)},
            wrong=tuple(name for name in finished if self._differs(self.members[name])),
            banned=self._trace.banned_by({m.node.id: m.name for m in members}),
            sources={name: fetched.sources for name, fetched in finished.items()},
            sent_bytes=sent,
            control_bytes={name: host.control_bytes for name, host in hosts.items()},
            rejected_chunks=sum(fetched.rejected_chunks for fetched in finished.values()),
            longest_wait_s=self._trace.longest_wait_s,
            seed_models=by_seeds / self.content.manifest.size,
            trace_hash=self._trace.hash.hexdigest(),
            entries=sum(self._trace.entries.values()),
            virtual_s=now,
        )

    def _differs(self, member: Member) -> bool:
        """Whether a chunk that a newcomer wanted has other bytes than the seeds have."""
        truth = BytesStore(self.content.manifest, self.content.files)
        chunks = self.content.manifest.chunks
        wanted = chunks if member.wanted is None else [chunks[index] for index in member.wanted]
        return any([*member.store.spans(chunk)] != [*truth.spans(chunk)] for chunk in wanted)

    def _bound_s(self) -> float:
        """No schedule is faster, if all hosts are alike and all newcomers ask at once: fluid, and in whole chunks."""
        setup = self.setup
        seeds, newcomers = max(1, setup.seeds), max(1, setup.newcomers)
        fluid = max(1.0, newcomers / (newcomers + seeds))
        whole = (setup.chunks - 1 + math.ceil(math.log2(1 + newcomers / seeds))) / setup.chunks
        # The short file's chunk takes less than `chunk_s`, so the model is a little less than all of its chunks.
        rate = setup.chunk_bytes / setup.chunk_s
        return max(fluid, whole) * self.content.manifest.size / rate


@dataclass
class _Trace:
    """The journals of all nodes, as one hash and the few figures that reports need."""

    closed: bool = False
    longest_wait_s: float = 0.0
    hash: Any = field(default_factory=hashlib.sha256)
    entries: Counter[str] = field(default_factory=Counter)
    _asked_at: dict[tuple[str, int], float] = field(default_factory=dict)
    _bans: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, entry: Entry) -> None:
        if self.closed:
            return
        self.entries[name] += 1
        self.hash.update(f"{entry.at_s!r} {name} {entry.subject} {entry.event!r}\n".encode())
        match entry.event:
            case download_events.Ask(_, number):
                self._asked_at[name, number] = entry.at_s
            case download_events.Granted(_, number) if (name, number) in self._asked_at:
                waited_s = entry.at_s - self._asked_at.pop((name, number))
                self.longest_wait_s = max(self.longest_wait_s, waited_s)
            case download_events.Ban(peer):
                self._bans.append((name, peer))

    def banned_by(self, names: dict[str, str]) -> dict[str, tuple[str, ...]]:
        banned: dict[str, list[str]] = {}
        for name, peer in self._bans:
            banned.setdefault(name, []).append(names[peer])
        return {name: tuple(peers) for name, peers in banned.items()}


class _Faults(logging.Handler):
    """What must not happen in a run: broken invariants, failed tasks, exceptions that nobody awaited."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._first: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.note(error or LocalProtocolError(record.getMessage()))

    def unhandled(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.note(context.get("exception") or LocalProtocolError(str(context.get("message"))))

    def note(self, error: BaseException) -> None:
        self._first = self._first or error

    def raise_first(self) -> None:
        if self._first is not None:
            raise LocalProtocolError(f"the run broke: {self._first!r}") from self._first


def main(arguments: list[str] | None = None) -> int:
    """Plays one run and prints its report. Exits with 1 when a newcomer ended without the right bytes."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.cluster", description="One simulated burst.")
    for f in dataclasses.fields(Setup):
        choices = {"known": ["one", "all"], "scenario": scenarios.names()}.get(f.name)
        flag = f"--{f.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(f.default), default=f.default, choices=choices, help="default: %(default)s")
    report = Cluster(Setup(**vars(parser.parse_args(arguments)))).run()
    print(report)  # this is what it is for
    return 1 if report.failed or report.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
