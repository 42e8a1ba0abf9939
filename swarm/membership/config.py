"""Times and counts of gossip in memberlist's words, with presets as differences. Pure numbers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SwimConfig:
    """Presets: `lan`, `local`, `wan`.

    probe_interval_s: the period; one member is probed in each. Shorter: quicker detection, more traffic.
    probe_timeout_s: from Ping to the indirect probes; above the usual round trip.
    indirect_probes: members that probe too; SWIM's k.
    suspicion_mult: a suspect has suspicion_mult * max(1, log10(n + 1)) * probe_interval_s to refute.
    retransmit_mult: a member passes a rumour on retransmit_mult * ceil(log10(n + 1)) times.
    gossip_interval_s, gossip_fanout: interval between Gossip packets while there are rumours, and their receivers.
    sync_interval_s: between two windows compared with a random member, and with a lost member.
    dead_memory_s: a tombstone is kept so long.
    profile_interval_s: between two profiles of a member while there are at most profile_members;
        beyond, it grows with n, so that all members together send profile_members / profile_interval_s a second.
    """

    probe_interval_s: float = 1.0
    probe_timeout_s: float = 0.5
    indirect_probes: int = 3
    suspicion_mult: float = 4.0
    retransmit_mult: int = 4
    gossip_interval_s: float = 0.2
    gossip_fanout: int = 3
    sync_interval_s: float = 15.0
    dead_memory_s: float = 600.0
    profile_interval_s: float = 1.0
    profile_members: int = 4

    def suspicion_s(self, members: int) -> float:
        """Seconds that a suspect has to refute."""
        return self.suspicion_mult * max(1.0, math.log10(members + 1)) * self.probe_interval_s

    def retransmits(self, members: int) -> int:
        """Number of times that a member passes a rumour on."""
        return self.retransmit_mult * math.ceil(math.log10(members + 1))

    def between_profiles_s(self, members: int) -> float:
        """Mean seconds between two profiles of a member."""
        return self.profile_interval_s * max(1.0, members / self.profile_members)


def lan() -> SwimConfig:
    """Round trips of a millisecond, hosts that can be busy."""
    return SwimConfig()


def local() -> SwimConfig:
    """All nodes on the same host: as `lan`, with shorter times."""
    return dataclasses.replace(
        lan(), probe_interval_s=0.5, probe_timeout_s=0.2, suspicion_mult=3.0, gossip_interval_s=0.1, sync_interval_s=5.0
    )


def wan() -> SwimConfig:
    """Round trips of a few hundred milliseconds, loss: as `lan`, with longer times."""
    return dataclasses.replace(
        lan(), probe_interval_s=5.0, probe_timeout_s=3.0, suspicion_mult=6.0, gossip_interval_s=0.5, gossip_fanout=4,
        sync_interval_s=30.0,
    )  # fmt: skip
