"""The wire of a simulated burst: network interfaces that share their links fairly, under a virtual clock.

A chunk travels in slices. An interface sends a single slice at a time and serves its flows in turn (round robin). A
slice then takes the receiver's downlink, in the order of sending. A flow has a window of slices in flight, as TCP has,
so that a busy receiver delays only its own flows. There is no loss and no slow start.

Must not know: machines, messages, the content of a flow.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SLICES = 4  # slices of a chunk; after each it is the turn of another flow
WINDOW = 2  # slices of a flow in flight, beyond those that fill the delay


class Clock:
    """Virtual time in seconds, and the calls scheduled at later times."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    def at(self, when: float, call: Callable[..., None], *arguments: Any) -> None:
        """Schedules a call. Calls at the same time happen in the order in which they were scheduled."""
        heapq.heappush(self._due, (when, next(self._order), call, arguments))

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        """Schedules a call relative to now."""
        self.at(self.now + seconds, call, *arguments)

    def run(self, until: Callable[[], bool], *, limit_s: float) -> bool:
        """Makes scheduled calls until `until()`. False when it still is not so at `limit_s` or after the last call."""
        while not until():
            if not self._due:
                return False
            when, _, call, arguments = heapq.heappop(self._due)
            if when > limit_s:
                return False
            self.now = when
            call(*arguments)
        return True


class Trunk:
    """A direction of a link that several members share: the uplink or downlink of a machine or rack."""

    __slots__ = ("free_at", "rate", "sent_bytes")

    def __init__(self, rate_bytes_per_s: float) -> None:
        self.rate = rate_bytes_per_s
        self.free_at = 0.0
        self.sent_bytes = 0.0

    def book(self, ready_at: float, size: float) -> float:
        """The time at which a slice starts that is ready at `ready_at`: after the slices before it."""
        started = max(self.free_at, ready_at)
        self.free_at = started + size / self.rate
        self.sent_bytes += size
        return started


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """A machine with several members, or a rack, with the trunks out of it and into it."""

    out: Trunk
    into: Trunk


class Nic:
    """The network interface of a member. Rates in bytes per second; `domains` are its machine and its rack."""

    __slots__ = ("alive", "domains", "down_free_at", "down_rate", "flows", "sending", "sent_bytes", "up_rate")

    def __init__(self, up_rate: float, down_rate: float, domains: tuple[Domain | None, ...] = ()) -> None:
        self.up_rate = up_rate
        self.down_rate = down_rate
        self.domains = domains
        self.alive = True
        self.sending = False
        self.down_free_at = 0.0
        self.sent_bytes = 0.0
        self.flows: deque[ChunkFlow] = deque()


class ChunkFlow:
    """The chunks of a transfer in flight. Calls `landed(n)` when chunk n is whole, and `ended()` after the last."""

    __slots__ = ("done", "ended", "flying", "landed", "left", "source", "target", "todo", "window")

    def __init__(
        self,
        source: Nic,
        target: Nic,
        sizes: Sequence[int],
        *,
        landed: Callable[[int], None],
        ended: Callable[[], None],
    ) -> None:
        self.source, self.target = source, target
        self.landed, self.ended = landed, ended
        self.todo = deque(
            (size / SLICES, n, part == SLICES - 1) for n, size in enumerate(sizes) for part in range(SLICES)
        )
        self.left = len(self.todo)
        self.flying = 0
        self.window = WINDOW
        self.done = False


class Wire:
    """The network between all interfaces, with a one-way delay of `delay_s`."""

    def __init__(self, clock: Clock, *, delay_s: float) -> None:
        self.delay_s = delay_s
        self._clock = clock

    def send(self, flow: ChunkFlow) -> None:
        """Starts a flow."""
        if not flow.todo:
            flow.ended()
            return
        slice_s = flow.todo[0][0] / min(flow.source.up_rate, flow.target.down_rate)
        flow.window = WINDOW + math.ceil(2 * self.delay_s / slice_s)
        flow.source.flows.append(flow)
        self._pump(flow.source)

    def cancel(self, flow: ChunkFlow) -> None:
        """Ends a flow early; its slices in flight do not land."""
        flow.done = True
        flow.todo.clear()

    def kill(self, nic: Nic) -> None:
        """Ends all flows from an interface, and lets no slice land there any more."""
        nic.alive = False
        for flow in nic.flows:
            flow.done = True
        nic.flows.clear()

    def _pump(self, nic: Nic) -> None:
        """Sends a slice of the next flow whose window has room."""
        if nic.sending:
            return
        flows = nic.flows
        for _ in range(len(flows)):
            flow = flows.popleft()
            if flow.done or not flow.todo:
                continue
            flows.append(flow)
            if flow.flying < flow.window:
                self._fly(flow)
                return

    def _fly(self, flow: ChunkFlow) -> None:
        now, source, target = self._clock.now, flow.source, flow.target
        size, number, last = flow.todo.popleft()
        flow.flying += 1
        source.sending = True
        sent_at = now + size / source.up_rate
        started = now
        for leaves, enters in zip(source.domains, target.domains, strict=True):
            if leaves is not enters:
                started = leaves.out.book(started, size) if leaves else started
                started = enters.into.book(started, size) if enters else started
        target.down_free_at = max(started + self.delay_s, target.down_free_at) + size / target.down_rate
        source.sent_bytes += size
        self._clock.at(sent_at, self._sent, source)
        self._clock.at(max(target.down_free_at, sent_at + self.delay_s), self._arrived, flow, number, last)

    def _sent(self, source: Nic) -> None:
        source.sending = False
        if source.alive:
            self._pump(source)

    def _arrived(self, flow: ChunkFlow, number: int, last: bool) -> None:
        if flow.done or not flow.target.alive:
            return  # a dead receiver acknowledges nothing: the flow's window stays full
        flow.flying -= 1
        flow.left -= 1
        if last:
            flow.landed(number)
        if not flow.left and not flow.done:
            flow.done = True
            flow.ended()
        self._pump(flow.source)
