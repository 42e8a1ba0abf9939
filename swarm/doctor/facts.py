"""What the doctor found out, before anybody judges it.

Must not know: what is right or wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from swarm.engines.layout import Fingerprint
from swarm.engines.start_log import Start
from swarm.errors import SwarmError
from swarm.protocol.messages import Announcement


@dataclass(frozen=True)
class Key:
    """The cluster key: its fingerprints, or why it cannot be used; neither when there is none."""

    fingerprint: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Port:
    """`address` is where the examining node listened in the end; `error` why that is not where the settings say.

    `held_by` is the node of this user that has the port, `reached` whether this machine reaches itself there.
    """

    address: str
    error: str | None = None
    held_by: str | None = None
    reached: bool = True


@dataclass(frozen=True)
class Mdns:
    """Multicast DNS: whether this machine hears its own announcement, and the addresses of others."""

    started: bool
    heard_itself: bool = False
    found: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Contact:
    """One address that was dialled. With an `error` nobody was talked to, else `name` answered.

    `ways`: how it was found, of 'given', 'mdns', 'told', 'here'. `gossips`: whether datagrams of that node arrive.
    `clock_s`: how much its clock is ahead, None where it does not tell. `introduces`: whether `trusted` lets its
    machine introduce models.
    """

    address: str
    ways: frozenset[str]
    error: SwarmError | None = None
    name: str = ""
    software: str = ""
    gossips: bool = False
    clock_s: float | None = None
    artifacts: tuple[Announcement, ...] = ()
    introduces: bool = True


@dataclass(frozen=True)
class Member:
    """Somebody that gossip alone knows. `artifacts`: model id, digest, tier and fraction. `software`: its version of
    swarm, empty where it did not say."""

    name: str
    address: str
    artifacts: tuple[tuple[str, str, str, float], ...] = ()
    software: str = ""


@dataclass(frozen=True)
class Running:
    """A node of this user on this machine: how many members it sees, and what of the model it holds."""

    address: str
    members: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Room:
    """A directory that weights or caches go to."""

    purpose: str
    path: Path
    free_bytes: int


@dataclass(frozen=True)
class LoadedTier:
    """A member's tensors of one engine layout, served by this id: its fingerprint, or why that could not be read."""

    member: str
    artifact_id: str
    fingerprint: Fingerprint | None = None
    error: str | None = None


@dataclass(frozen=True)
class Facts:
    """Everything. `model_id` None: no model was asked about. `trusted` names machines, () for all of them."""

    software: str
    key: Key
    insecure: bool
    loopback: bool
    trusted: tuple[str, ...] = ()
    model_id: str | None = None
    port: Port | None = None  # None where no node could be opened at all
    mdns: Mdns | None = None  # None where it is switched off
    names: Mapping[str, tuple[str, ...] | str] = field(default_factory=dict)  # given: addresses, or what went wrong
    contacts: tuple[Contact, ...] = ()
    members: tuple[Member, ...] = ()
    running: tuple[Running, ...] = ()
    rooms: tuple[Room, ...] = ()
    loaded: tuple[LoadedTier, ...] = ()
    starts: tuple[tuple[float, Start], ...] = ()  # the newest first
