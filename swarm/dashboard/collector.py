"""Asks the members of a swarm what they tell of themselves, in rounds, while somebody watches.

Bounded in every way: so many questions a second however many members there are (with more than ASK_PER_S of them a
round takes longer, and whoever fetches is asked first), so many at once, each with a deadline and a size.

Must not know: HTTP, the node. It is handed a way to read a page of another node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from swarm.dashboard.member_report import OWN_BYTES_MAX, PATH, Own, decode
from swarm.errors import PeerError, PeerTimeout, PeerUnreachable, SettingsError
from swarm.protocol.messages import Address
from swarm.protocol.packets import Record

LOOK_EVERY_S = 0.25
ASK_EVERY_S = 1.0  # one member, at most
ASK_PER_S = 24
REFUSED_REST_S = 10.0  # one that answered, but not with what it was asked for
TIMEOUT_S = 2.0

Read = Callable[
    [Address, str, float, int], Awaitable[bytes]
]  # address, path, timeout_s, bytes_max -> body; or PeerError


@dataclass
class Told:
    """What a member said last, and what was wrong with its last answer."""

    own: Own | None = None
    at_s: float = 0.0  # when `own` was heard
    asked_at_s: float = float("-inf")
    failure: str | None = None
    silent: bool = False  # nobody answers at its address

    def due(self, now: float) -> bool:
        """Whether it may be asked again."""
        rest_s = REFUSED_REST_S if self.failure and not self.silent else ASK_EVERY_S
        return now - self.asked_at_s >= rest_s

    @property
    def busy(self) -> bool:
        """Whether it was fetching."""
        return self.own is not None and any(fetch.running for fetch in self.own.fetches)


class Collector:
    """`told` is by node id, of the members that there are."""

    def __init__(self, read: Read, members: Callable[[], Iterable[Record]], clock: Callable[[], float]) -> None:
        self.told: dict[str, Told] = {}
        self._read = read
        self._members = members
        self._clock = clock
        self._running = False
        self._asking: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Asks until it is cancelled."""
        self._running = True
        try:
            while True:
                self._round()
                await asyncio.sleep(LOOK_EVERY_S)
        finally:
            for task in self._asking:
                task.cancel()
            self.told.clear()
            self._running = False

    def hurry(self, node: str) -> None:
        """Something happened to this member: it is asked at the next look, whenever it was asked last."""
        if told := self.told.get(node):
            told.asked_at_s = float("-inf")

    async def ask_all(self, most: int) -> None:
        """Asks once, for whoever looks once: as many members as that, in one round trip or within TIMEOUT_S."""
        if self._running:
            return
        now = self._clock()
        limit = asyncio.Semaphore(ASK_PER_S)

        async def ask(member: Record) -> None:
            async with limit:
                await self._ask(member)

        members = [member for member in self._members() if self.told.setdefault(member.node, Told()).due(now)][:most]
        for member in members:
            self.told[member.node].asked_at_s = now
        await asyncio.gather(*map(ask, members))

    def _round(self) -> None:
        now = self._clock()
        members = {member.node: member for member in self._members()}
        for gone in self.told.keys() - members.keys():
            del self.told[gone]
        due = [node for node in members if self.told.setdefault(node, Told()).due(now)]
        due.sort(key=lambda node: (not self.told[node].busy, self.told[node].asked_at_s))
        for node in due[: max(1, round(ASK_PER_S * LOOK_EVERY_S))]:
            self.told[node].asked_at_s = now
            task = asyncio.create_task(self._ask(members[node]), name=f"swarm: ask {members[node].name}")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask(self, member: Record) -> None:
        told = self.told[member.node]
        try:
            own = decode(await self._read(member.address, PATH, TIMEOUT_S, OWN_BYTES_MAX))
            if own.node != member.node:
                raise ValueError("another node answers at its address")
        except (PeerUnreachable, PeerTimeout) as error:
            told.failure, told.silent = str(error), True
        except (PeerError, SettingsError, ValueError) as error:
            told.failure, told.silent = str(error), False
        else:
            told.own, told.at_s, told.failure, told.silent = own, self._clock(), None, False
