"""Requests the reports of all members (`/member`), in rounds, while a browser watches.

Bounded: `ASK_PER_S` requests a second for any number of members (with more members a round takes longer, and fetching
members come first), and each request has a deadline and a maximum size.

Must not know: HTTP, the node. A function reads pages of other nodes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from swarm.dashboard.member_report import PATH, REPORT_BYTES_MAX, MemberReport, decode
from swarm.errors import PeerError, PeerTimeout, PeerUnreachable, SettingsError
from swarm.protocol.messages import Address
from swarm.protocol.packets import Record

LOOK_EVERY_S = 0.25
ASK_EVERY_S = 1.0  # each member, at most
ASK_PER_S = 24
REPORTS_BYTES_MAX = 8 << 20  # of all members together, as they arrived; beyond, the report that came first is dropped
REFUSED_REST_S = 10.0  # after an answer that was no report
TIMEOUT_S = 2.0

Read = Callable[
    [Address, str, float, int], Awaitable[bytes]
]  # address, path, timeout_s, bytes_max -> body; or PeerError


@dataclass
class MemberAnswer:
    """The last report of a member, and the failure of the last request."""

    report: MemberReport | None = None
    at_s: float = 0.0  # when `report` arrived
    asked_at_s: float = float("-inf")
    failure: str | None = None
    silent: bool = False  # no node answers at the member's address
    report_bytes: int = 0

    def due(self, now: float) -> bool:
        """Whether it may be asked again."""
        rest_s = REFUSED_REST_S if self.failure and not self.silent else ASK_EVERY_S
        return now - self.asked_at_s >= rest_s

    @property
    def fetching(self) -> bool:
        """Whether its last report has a running fetch."""
        return self.report is not None and any(fetch.running for fetch in self.report.fetches)


class Collector:
    """`answers` are by node id, of the present members."""

    def __init__(self, read: Read, members: Callable[[], Iterable[Record]], clock: Callable[[], float]) -> None:
        self.answers: dict[str, MemberAnswer] = {}
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
            self.answers.clear()
            self._running = False

    def ask_next(self, node: str) -> None:
        """Makes a member due at once."""
        if answer := self.answers.get(node):
            answer.asked_at_s = float("-inf")

    async def ask_all(self, most: int) -> None:
        """Asks at most `most` due members once, and waits for their answers. Does nothing while `run` runs."""
        if self._running:
            return
        self._forget_gone()
        limit = asyncio.Semaphore(ASK_PER_S)

        async def ask(member: Record) -> None:
            async with limit:
                await self._ask(member)

        await asyncio.gather(*map(ask, self._due(most)))

    def _forget_gone(self) -> None:
        for gone in self.answers.keys() - {member.node for member in self._members()}:
            del self.answers[gone]

    def _round(self) -> None:
        self._forget_gone()
        for member in self._due(max(1, round(ASK_PER_S * LOOK_EVERY_S))):
            task = asyncio.create_task(self._ask(member), name=f"swarm: ask {member.name}")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    def _due(self, most: int) -> list[Record]:
        """At most `most` due members: fetching ones first, then those that waited longest. They count as asked."""
        now = self._clock()
        due = [(self.answers.setdefault(member.node, MemberAnswer()), member) for member in self._members()]
        due = [(answer, member) for answer, member in due if answer.due(now)]
        due.sort(key=lambda pair: (not pair[0].fetching, pair[0].asked_at_s))
        for answer, _ in due[:most]:
            answer.asked_at_s = now
        return [member for _, member in due[:most]]

    async def _ask(self, member: Record) -> None:
        answer = self.answers.setdefault(member.node, MemberAnswer())
        try:
            data = await self._read(member.address, PATH, TIMEOUT_S, REPORT_BYTES_MAX)
            report = decode(data)
            if report.node != member.node:
                raise ValueError("another node answers at its address")
        except (PeerUnreachable, PeerTimeout) as error:
            answer.failure, answer.silent = str(error), True
        except (PeerError, SettingsError, ValueError) as error:
            answer.failure, answer.silent = str(error), False
        else:
            answer.report, answer.at_s, answer.failure, answer.silent = report, self._clock(), None, False
            answer.report_bytes = len(data)
            self._make_room()

    def _make_room(self) -> None:
        """Drops the reports that came first until all fit into REPORTS_BYTES_MAX."""
        total = sum(answer.report_bytes for answer in self.answers.values())
        while total > REPORTS_BYTES_MAX:
            first = min((a for a in self.answers.values() if a.report), key=lambda answer: answer.at_s)
            total -= first.report_bytes
            first.report, first.report_bytes = None, 0
