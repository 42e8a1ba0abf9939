"""Probes under way: whose Ack is awaited, on whose behalf, and how much this node doubts itself.

Doubt is what Lifeguard calls local health: a node that gets no Acks, or is itself suspected, is likely the one that is
slow; it waits up to 1 + DOUBT_MAX times as long before it doubts others.

Must not know: packets' contents, sockets, clocks. Times are the machine's own, see `gossip`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from swarm.membership.config import SwimConfig
from swarm.protocol.messages import Address, NodeId
from swarm.protocol.packets import Ack, PingRequest, Record

DOUBT_MAX = 7
RELAYS_MAX = 256  # probes for others under way at once; requests beyond are not served


@dataclass(frozen=True)
class Probe:
    """A Ping that was sent."""

    sequence: int
    target: Record


@dataclass(frozen=True)
class Relay:
    """A probe for somebody else, who numbered it `sequence`."""

    target: NodeId
    address: Address
    sequence: int
    until: float


class Prober:
    """One probe of one's own at a time, and those for others."""

    def __init__(self, *, config: SwimConfig, clock: float, rng: random.Random) -> None:
        self._config = config
        self._rng = rng
        self._probe: Probe | None = None
        self._indirect_at = math.inf
        # A burst that starts together does not probe together.
        self._ends_at = clock + rng.random() * config.probe_interval_s
        self._relays: dict[int, Relay] = {}
        self.doubt = 0  # of itself

    def due_at(self) -> float:
        """When `late` or `ended` will say something."""
        return min(self._ends_at, self._indirect_at)

    def void(self, clock: float) -> None:
        """What is under way says nothing about anybody."""
        self._probe, self._indirect_at = None, math.inf
        self._ends_at = clock + self._config.probe_interval_s

    def late(self, clock: float) -> Probe | None:
        """The probe for which others are to be asked now; once."""
        if clock < self._indirect_at:
            return None
        self._indirect_at = math.inf
        return self._probe

    def ended(self, clock: float) -> bool:
        """Whether the period is over."""
        return clock >= self._ends_at

    def failed(self) -> Record | None:
        """Ends the period: who was probed in it and has not answered."""
        probe, self._probe = self._probe, None
        if probe is None:
            return None
        self.weaken(1)
        return probe.target

    def begin(self, target: Record | None, clock: float) -> Probe | None:
        """Begins a period, with a probe if there is a target."""
        scale = 1 + self.doubt
        self._ends_at = clock + self._config.probe_interval_s * scale
        self._indirect_at = clock + self._config.probe_timeout_s * scale if target else math.inf
        self._probe = Probe(self._rng.getrandbits(32), target) if target else None
        self._relays = {key: relay for key, relay in self._relays.items() if relay.until > clock}
        return self._probe

    def relay(self, source: Address, request: PingRequest, clock: float) -> int | None:
        """The sequence under which to ping for another member; None when there are too many such probes."""
        if len(self._relays) >= RELAYS_MAX:
            return None
        sequence = self._rng.getrandbits(32)
        until = clock + self._config.probe_interval_s * (1 + DOUBT_MAX)
        self._relays[sequence] = Relay(request.target, source, request.sequence, until)
        return sequence

    def acknowledged(self, ack: Ack) -> Relay | None:
        """Takes in an Ack. Returns on whose behalf it was awaited, if on another one's."""
        if self._probe and (self._probe.sequence, self._probe.target.node) == (ack.sequence, ack.sender):
            self._probe, self._indirect_at = None, math.inf
            self.weaken(-1)
        elif (relay := self._relays.get(ack.sequence)) and relay.target == ack.sender:
            return self._relays.pop(ack.sequence)
        return None

    def weaken(self, step: int) -> None:
        """Doubts itself more, or less with a negative step."""
        self.doubt = max(0, min(DOUBT_MAX, self.doubt + step))
