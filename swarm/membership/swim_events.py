"""Events and actions of `swim.Swim`: its whole vocabulary.

`MemberChanged` is a journal entry too, so traces and reports name it as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from swarm.journal import Paused
from swarm.protocol.messages import Address
from swarm.protocol.packets import Packet, Profile, Record


@dataclass(frozen=True)
class ContactFound:
    """Discovery found an address. It gets a Sync, now and whenever no member is known there."""

    address: Address


@dataclass(frozen=True)
class PacketReceived:
    """A datagram arrived from this address."""

    source: Address
    packet: Packet


@dataclass(frozen=True)
class ProfileChanged:
    """The profile of this node is another one. It is announced after `between_profiles_s`, at once if it leaves."""

    profile: Profile


@dataclass(frozen=True)
class AddressesChanged:
    """This node has other addresses."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True)
class Leave:
    """This node closes. It announces that, and sends no packet afterwards."""


@dataclass(frozen=True)
class Tick:
    """`wait_s` has passed."""


@dataclass(frozen=True)
class Send:
    """Send this packet as a datagram."""

    address: Address
    packet: Packet


@dataclass(frozen=True)
class MemberChanged:
    """A member is new, or in another state, or has another profile."""

    record: Record

    @property
    def weight_bytes(self) -> int:
        """Approximate memory, for the journal."""
        return 1024 + 512 * len(self.record.profile.artifacts)


@dataclass(frozen=True)
class Conflict:
    """A live node at this address uses the id of this node."""

    address: Address


Event: TypeAlias = Paused | ContactFound | PacketReceived | ProfileChanged | AddressesChanged | Leave | Tick
Action: TypeAlias = Send | MemberChanged | Conflict
