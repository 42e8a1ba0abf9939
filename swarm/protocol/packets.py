"""The packets of gossip (SWIM, memberlist), their MessagePack encoding and their limits.

A datagram is `SWG`, a version byte and a MessagePack array that begins with the tag of the packet. `decode` validates
all input: unknown tags, wrong types and values beyond the limits below raise ValueError. Every packet is complete in
itself, so that a lost datagram costs time only.

    Ping        ->                probes a member               Ping, PingRequest, Ack and Gossip end with rumours:
                <-  Ack           the member is alive           Status (22 bytes): id, incarnation, state, version
    PingRequest ->                asks for an indirect probe    Record (190 bytes): Status, name, addresses, profile
    Gossip      ->                rumours only
    Sync        ->                statuses of a range of ids
                <-  SyncReply     records that the sender lacks, ids of the records that the receiver lacks

Tags are part of the protocol: append, never renumber. Pure: must not know sockets. docs/gossip.md describes them all.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Annotated, TypeAlias

import msgspec
from msgspec.structs import replace as replace  # for modules that must not import msgspec

from swarm.content.manifest import CHUNKS_MAX, PRINTABLE, Digest, ModelId, Tier
from swarm.errors import LocalProtocolError
from swarm.protocol.messages import ADDRESSES_OWN_MAX, Address, HeldPart, NodeId, Scheme

VERSION = 1

# Limits of the protocol. They are no settings, because all nodes must agree on them.
# Sealed 1400 bytes, which leaves room for IPv6 and a tunnel in Ethernet's 1500: a lost fragment loses the datagram.
DATAGRAM_BYTES_MAX = 1360
RECORD_BYTES_MAX = 1200  # a record and the head of any packet fit into a datagram
PACKET_HEAD_BYTES = 140  # maximum size of a packet without rumours, and of two statuses
SYNC_BYTES = 1320  # for the record and the statuses of a Sync
ARTIFACTS_MAX = 16  # of a member; links announce the rest
STATUSES_MAX = 40  # of a Sync: they fit beside a record of usual size
WANTS_MAX = 40  # of a SyncReply: as many ids as a Sync can have
LABEL_MAX = 32  # characters of names and labels: up to four bytes each
SOFTWARE_MAX = 32  # ASCII characters of a swarm version
STEPS = 8  # fractions are rounded to eighths: each step costs every member a rumour

Label = Annotated[str, msgspec.Meta(max_length=LABEL_MAX, pattern=PRINTABLE)]
# A literal: [ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255]:65535 has 53 characters.
AddressLabel = Annotated[Address, msgspec.Meta(min_length=1, max_length=53, pattern=r"^[!-~]*\Z")]
Software = Annotated[str, msgspec.Meta(max_length=SOFTWARE_MAX, pattern=r"^[!-~]*\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
VERSIONS = 1 << 53  # incarnations and versions; after the last comes 0 (`is_newer`)
Version = Annotated[int, msgspec.Meta(ge=0, lt=VERSIONS)]
ID_FIRST, ID_LAST = NodeId("0" * 16), NodeId("f" * 16)


class State(IntEnum):
    """State of a member. Of two statuses with the same incarnation the greater state is valid."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class _Array(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of packets and their parts: a MessagePack array of its fields."""


class Holding(_Array, frozen=True):
    """An artifact of a member: `chunks` of `chunks_total` are verified.

    `superseeds`, `wanted`: see messages.Announcement.
    """

    model_id: ModelId
    digest: Digest
    tier: Tier
    chunks: Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]
    chunks_total: Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]
    superseeds: bool
    wanted: HeldPart | None = None

    @property
    def fetched(self) -> bool:
        """Whether every chunk that the member wants is verified."""
        progress = self.wanted or self
        return progress.chunks >= progress.chunks_total


class Profile(_Array, frozen=True):
    """The metadata of a member. `omitted` counts artifacts beyond the size limit; `uploads` of `slots` are in use;
    `software` is the swarm version. `leaving`: it drains, and closes soon."""

    artifacts: Annotated[tuple[Holding, ...], msgspec.Meta(max_length=ARTIFACTS_MAX)] = ()
    omitted: Count = 0
    transports: Annotated[tuple[Scheme, ...], msgspec.Meta(max_length=8)] = ()
    host: Label = ""
    rack: Label = ""
    uploads: Count = 0
    slots: Count = 0
    software: Software = ""
    leaving: bool = False

    def distance(self, host: str, rack: str) -> int:
        """Distance to a node with these labels: 0 on the same host, 1 in the same rack, 2 elsewhere."""
        if host and self.host == host:
            return 0
        return 1 if self.rack == rack else 2


class Status(_Array, frozen=True, tag=1):
    """The state of a member. `version` is the version of its profile: a receiver with an older profile requests it."""

    node: NodeId
    incarnation: Version
    state: State
    version: Version


class Record(_Array, frozen=True, tag=2):
    """All fields of a member. `addresses`: of its datagrams and links, the best first; empty if none is known to it."""

    node: NodeId
    incarnation: Version
    state: State
    version: Version
    name: Label
    addresses: Annotated[tuple[AddressLabel, ...], msgspec.Meta(max_length=ADDRESSES_OWN_MAX)]
    profile: Profile

    @property
    def address(self) -> Address:
        """The first address, for people; empty without one."""
        return self.addresses[0] if self.addresses else Address("")

    @property
    def status(self) -> Status:
        """The record without name, addresses and profile."""
        return Status(self.node, self.incarnation, self.state, self.version)


Rumour: TypeAlias = Status | Record
Rumours = Annotated[tuple[Rumour, ...], msgspec.Meta(max_length=64)]


class Ping(_Array, frozen=True, tag=1):
    """Requests an Ack of `target`. Another node on its port does not answer."""

    sequence: Count
    sender: NodeId
    target: NodeId
    rumours: Rumours


class PingRequest(_Array, frozen=True, tag=2):
    """Requests an indirect probe: the receiver pings `target` and forwards the Ack with this sequence."""

    sequence: Count
    sender: NodeId
    target: NodeId
    rumours: Rumours


class Ack(_Array, frozen=True, tag=3):
    """The answer of `sender` to a Ping, direct or forwarded."""

    sequence: Count
    sender: NodeId
    rumours: Rumours


class Gossip(_Array, frozen=True, tag=4):
    """Rumours alone."""

    sender: NodeId
    rumours: Rumours


class Sync(_Array, frozen=True, tag=5):
    """The record of the sender, and its statuses of the node ids `first` to `last`, both included."""

    sequence: Count
    record: Record
    first: NodeId
    last: NodeId
    statuses: Annotated[tuple[Status, ...], msgspec.Meta(max_length=STATUSES_MAX)]

    @property
    def sender(self) -> NodeId:
        """Node id of the sender."""
        return self.record.node


class SyncReply(_Array, frozen=True, tag=6):
    """The answer to a Sync: `records` that its sender lacks, and `wants`, ids of the records that its receiver lacks.

    `until`, in the last of several answers: the ids up to it are compared; the next Sync continues after it.
    """

    sequence: Count
    sender: NodeId
    records: Annotated[tuple[Record, ...], msgspec.Meta(max_length=64)]
    wants: Annotated[tuple[NodeId, ...], msgspec.Meta(max_length=WANTS_MAX)]
    until: NodeId | None


Packet: TypeAlias = Ping | PingRequest | Ack | Gossip | Sync | SyncReply

_MAGIC = b"SWG" + bytes([VERSION])
_decoder: msgspec.msgpack.Decoder[Packet] = msgspec.msgpack.Decoder(Packet)
_encoder = msgspec.msgpack.Encoder()


def encode(packet: Packet) -> bytes:
    """The datagram of a packet. Raises LocalProtocolError if it exceeds DATAGRAM_BYTES_MAX."""
    datagram = _MAGIC + _encoder.encode(packet)
    if len(datagram) > DATAGRAM_BYTES_MAX:
        raise LocalProtocolError(f"a {type(packet).__name__} of {len(datagram)} bytes does not fit into a datagram")
    return datagram


def decode(datagram: bytes) -> Packet:
    """The packet of a datagram. Raises ValueError."""
    if len(datagram) > DATAGRAM_BYTES_MAX:
        raise ValueError(f"datagram of {len(datagram)} bytes; at most {DATAGRAM_BYTES_MAX} are allowed")
    if not datagram.startswith(_MAGIC):
        raise ValueError("not gossip, or another version of it")
    try:
        return _decoder.decode(memoryview(datagram)[len(_MAGIC) :])
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error)) from error


def is_newer(number: int, other: int) -> bool:
    """Whether an incarnation or version comes after another one, on a ring (serial numbers, RFC 1982).

    On a line a false rumour could take the last number, and no later number would be left to refute it. On a ring each
    number has a successor. Honest numbers are small, so their order is that of integers.
    """
    return 0 < (number - other) % VERSIONS <= VERSIONS // 2


def next_after(*numbers: int) -> int:
    """The successor of the newest of these, compared from left to right."""
    newest = numbers[0]
    for number in numbers[1:]:
        newest = number if is_newer(number, newest) else newest
    return (newest + 1) % VERSIONS


def overrules(rumour: Rumour, known: Rumour) -> bool:
    """Whether the state in a rumour replaces the known one: a newer incarnation, or the same and a worse state."""
    if rumour.incarnation == known.incarnation:
        return rumour.state > known.state
    return is_newer(rumour.incarnation, known.incarnation)


def size(part: Rumour | Packet) -> int:
    """Size in bytes of a rumour in a datagram, or of a packet without `SWG` and version."""
    return len(_encoder.encode(part))


def quantised(profile: Profile) -> Profile:
    """The profile with chunks and uploads rounded down to eighths, labels cut to LABEL_MAX characters.

    A count above 0 stays above 0, so that a started fetch differs from none; a count below the total stays below it.
    """
    holdings = (
        replace(
            held,
            chunks=_step(held.chunks, held.chunks_total),
            wanted=held.wanted and replace(held.wanted, chunks=_step(held.wanted.chunks, held.wanted.chunks_total)),
        )
        for held in profile.artifacts
    )
    return replace(
        profile,
        artifacts=tuple(holdings),
        uploads=_step(profile.uploads, profile.slots),
        host=profile.host[:LABEL_MAX],
        rack=profile.rack[:LABEL_MAX],
    )


def fitted(record: Record) -> Record:
    """The record without its last artifacts beyond RECORD_BYTES_MAX and ARTIFACTS_MAX."""
    while size(record) > RECORD_BYTES_MAX or len(record.profile.artifacts) > ARTIFACTS_MAX:
        profile = record.profile
        fewer = replace(profile, artifacts=profile.artifacts[:-1], omitted=profile.omitted + 1)
        if not profile.artifacts:
            raise LocalProtocolError(f"the record of {record.name} does not fit into a datagram")
        record = replace(record, profile=fewer)
    return record


def batches(records: Iterable[Record]) -> list[tuple[Record, ...]]:
    """Records in the same order, grouped into datagrams."""
    room = DATAGRAM_BYTES_MAX - PACKET_HEAD_BYTES
    groups: list[list[Record]] = []
    left = 0
    for record in records:
        need = size(record)
        if need > left or not groups:
            groups.append([])
            left = room
        groups[-1].append(record)
        left -= need
    return [tuple(group) for group in groups]


def following(node: NodeId) -> NodeId:
    """The node id after `node` on the ring: after the last id comes the first."""
    return NodeId(f"{(int(node, 16) + 1) % (1 << 64):016x}")


def _step(part: int, whole: int) -> int:
    if part <= 0 or part >= whole:
        return max(0, min(part, whole))
    return max(1, part * STEPS // whole * whole // STEPS)
