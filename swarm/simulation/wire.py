"""The wire of a simulated crowd: hosts whose links are shared fairly, slice by slice, under a virtual clock.

A chunk travels in slices. A host sends one slice at a time and takes its flows by turns; a slice takes the receiver's
downlink in the order of sending, and a flow has only so many slices on their way (a window, as TCP has), so that a busy
receiver holds up nobody else's flows. Nothing is dropped, and no rate grows slowly.

Must not know: machines, messages, what a flow carries.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SLICES = 4  # of a chunk: what a host sends before it is another flow's turn
WINDOW = 2  # slices of one flow on their way, beyond those that the delay takes


class Clock:
    """Virtual seconds, and what is to happen at them."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    def at(self, when: float, call: Callable[..., None], *arguments: Any) -> None:
        """Calls at a time; what is due at the same time happens in the order of asking."""
        heapq.heappush(self._due, (when, next(self._order), call, arguments))

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        """Calls after so many seconds."""
        self.at(self.now + seconds, call, *arguments)

    def run(self, until: Callable[[], bool], *, limit_s: float) -> bool:
        """Lets time pass. False: nothing was left to do, or the time was over, and it is still not so."""
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
    """One direction of a link that several members share: a machine's way out or in, or a rack's."""

    __slots__ = ("free_at", "rate", "sent_bytes")

    def __init__(self, rate_bytes_per_s: float) -> None:
        self.rate = rate_bytes_per_s
        self.free_at = 0.0
        self.sent_bytes = 0.0

    def book(self, ready_at: float, size: float) -> float:
        """When a slice that is ready then may start: after those before it."""
        started = max(self.free_at, ready_at)
        self.free_at = started + size / self.rate
        self.sent_bytes += size
        return started


@dataclass(frozen=True, slots=True, eq=False)
class Domain:
    """A machine with several members, or a rack: what leaves or enters it shares a trunk."""

    out: Trunk
    into: Trunk


class Host:
    """A member's own interface. Rates in bytes per second; `domains`: those it is in, the inner one first."""

    __slots__ = ("alive", "domains", "down_free_at", "down_rate", "flows", "sending", "sent_bytes", "up_rate")

    def __init__(self, up_rate: float, down_rate: float, domains: tuple[Domain | None, ...] = ()) -> None:
        self.up_rate = up_rate
        self.down_rate = down_rate
        self.domains = domains
        self.alive = True
        self.sending = False
        self.down_free_at = 0.0
        self.sent_bytes = 0.0
        self.flows: deque[Flow] = deque()


class Flow:
    """Chunks of one transfer on their way. `landed(n)` is called as the n-th is whole, `ended` once after the last."""

    __slots__ = ("done", "ended", "flying", "landed", "left", "source", "target", "todo", "window")

    def __init__(
        self,
        source: Host,
        target: Host,
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
    """What is between all hosts, which are `delay_s` apart, one way."""

    def __init__(self, clock: Clock, *, delay_s: float) -> None:
        self.delay_s = delay_s
        self._clock = clock

    def send(self, flow: Flow) -> None:
        """Starts a flow."""
        if not flow.todo:
            flow.ended()
            return
        slice_s = flow.todo[0][0] / min(flow.source.up_rate, flow.target.down_rate)
        flow.window = WINDOW + math.ceil(2 * self.delay_s / slice_s)
        flow.source.flows.append(flow)
        self._pump(flow.source)

    def cancel(self, flow: Flow) -> None:
        """Ends a flow early; nothing of it lands any more."""
        flow.done = True
        flow.todo.clear()

    def kill(self, host: Host) -> None:
        """Nothing leaves this host any more, nor lands there."""
        host.alive = False
        for flow in host.flows:
            flow.done = True
        host.flows.clear()

    def _pump(self, host: Host) -> None:
        """Sends the next slice, of the first flow in turn whose window has room."""
        if host.sending:
            return
        flows = host.flows
        for _ in range(len(flows)):
            flow = flows.popleft()
            if flow.done or not flow.todo:
                continue
            flows.append(flow)
            if flow.flying < flow.window:
                self._fly(flow)
                return

    def _fly(self, flow: Flow) -> None:
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

    def _sent(self, source: Host) -> None:
        source.sending = False
        if source.alive:
            self._pump(source)

    def _arrived(self, flow: Flow, number: int, last: bool) -> None:
        if flow.done or not flow.target.alive:
            return  # who is dead acknowledges nothing: the flow's window stays full
        flow.flying -= 1
        flow.left -= 1
        if last:
            flow.landed(number)
        if not flow.left and not flow.done:
            flow.done = True
            flow.ended()
        self._pump(flow.source)
