"""Probes under way, direct and for other members, and Lifeguard's local health of this node.

`doubt` (Lifeguard: local health multiplier) counts failed probes and suspicions of this node, minus Acks: a node that
gets no Acks is probably slow itself. It waits up to 1 + DOUBT_MAX times as long before it suspects a member.

Must not know: rumours, sockets, clocks. Times are those of `swim`.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from swarm.membership.config import SwimConfig
from swarm.protocol.messages import Address, NodeId
from swarm.protocol.packets import Ack, PingRequest, Record

DOUBT_MAX = 7
RELAYS_MAX = 256  # probes for other members at once; further requests are ignored


@dataclass(frozen=True)
class Probe:
    """A Ping that was sent."""

    sequence: int
    target: Record


@dataclass(frozen=True)
class Relay:
    """A probe of `target` for the member at `address`, with the sequence of its request."""

    target: NodeId
    address: Address
    sequence: int
    until: float


class Prober:
    """The own probe of this period, and the relayed probes."""

    def __init__(self, *, config: SwimConfig, clock: float, rng: random.Random) -> None:
        self._config = config
        self._rng = rng
        self._probe: Probe | None = None
        self._indirect_at = math.inf
        # Jitter: nodes that start together do not probe together.
        self._ends_at = clock + rng.random() * config.probe_interval_s
        self._relays: dict[int, Relay] = {}
        self.doubt = 0

    def due_at(self) -> float:
        """Time of the next `overdue` or `ended`."""
        return min(self._ends_at, self._indirect_at)

    def reset(self, clock: float) -> None:
        """Drops the probe under way, whose Ack may be lost."""
        self._probe, self._indirect_at = None, math.inf
        self._ends_at = clock + self._config.probe_interval_s

    def overdue(self, clock: float) -> Probe | None:
        """The probe that needs indirect probes now; each once."""
        if clock < self._indirect_at:
            return None
        self._indirect_at = math.inf
        return self._probe

    def ended(self, clock: float) -> bool:
        """Whether the period has ended."""
        return clock >= self._ends_at

    def failed(self) -> Record | None:
        """Ends the period; returns the probed member if there was no Ack."""
        probe, self._probe = self._probe, None
        if probe is None:
            return None
        self.add_doubt(1)
        return probe.target

    def begin(self, target: Record | None, clock: float) -> Probe | None:
        """Starts a period, with a probe if there is a target."""
        scale = 1 + self.doubt
        self._ends_at = clock + self._config.probe_interval_s * scale
        self._indirect_at = clock + self._config.probe_timeout_s * scale if target else math.inf
        self._probe = Probe(self._rng.getrandbits(32), target) if target else None
        self._relays = {key: relay for key, relay in self._relays.items() if relay.until > clock}
        return self._probe

    def relay(self, source: Address, request: PingRequest, clock: float) -> int | None:
        """The sequence of the Ping for another member's request; None above RELAYS_MAX."""
        if len(self._relays) >= RELAYS_MAX:
            return None
        sequence = self._rng.getrandbits(32)
        until = clock + self._config.probe_interval_s * (1 + DOUBT_MAX)
        self._relays[sequence] = Relay(request.target, source, request.sequence, until)
        return sequence

    def acknowledged(self, ack: Ack) -> Relay | None:
        """Ends the probe of an Ack. Returns the relay if the probe was for another member."""
        if self._probe and (self._probe.sequence, self._probe.target.node) == (ack.sequence, ack.sender):
            self._probe, self._indirect_at = None, math.inf
            self.add_doubt(-1)
        elif (relay := self._relays.get(ack.sequence)) and relay.target == ack.sender:
            return self._relays.pop(ack.sequence)
        return None

    def add_doubt(self, step: int) -> None:
        """Raises the doubt, or lowers it with a negative step."""
        self.doubt = max(0, min(DOUBT_MAX, self.doubt + step))
