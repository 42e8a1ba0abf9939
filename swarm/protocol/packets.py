"""The words of gossip: what one datagram may say about members, and the limits on it.

A datagram is `SWG`, a version byte, and one MessagePack array whose first item tells the packets apart. `decode` is the
only way in: what is unknown, of a wrong type or beyond the limits below raises ValueError. A packet never needs another
one to be understood, so that a lost datagram costs time and nothing else.

    Ping        ->      are you alive?                        every packet but Sync and SyncReply ends with rumours:
                <- Ack  I am                                  a Status says how a member is (about 30 bytes),
    PingRequest ->      ask another one for me                a Record says that and everything else known of it
    Gossip      ->      nothing but rumours
    Sync        ->      this is how far I am, from one node id to another
                <- SyncReply what you lack of that, and what I lack

Tags are part of the protocol: append, never renumber.

Pure: this module never sees a socket.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Annotated, Literal, TypeAlias

import msgspec

from swarm.content.manifest import CHUNKS_MAX, Digest
from swarm.errors import LocalProtocolError
from swarm.protocol.messages import PRINTABLE, ModelId, NodeId, Scheme

VERSION = 1

# Limits, each with its reason. They are part of the protocol, not settings.
# A seal adds 40; 1400 pass an Ethernet of 1500 with room for IPv6 and a tunnel, and fragments are lost as a whole.
DATAGRAM_BYTES_MAX = 1360
RECORD_BYTES_MAX = 1200  # a record always fits into a datagram, whatever else must be there
PACKET_HEAD_BYTES = 140  # at most, of everything in a packet but its rumours, and of two claims
SYNC_BYTES = 1320  # for a Sync's record and claims
ARTIFACTS_MAX = 16  # told of one member; the rest is told over its links
STATUSES_MAX = 40  # in one Sync: so many fit beside a record of usual length
WANTS_MAX = 40  # a SyncReply wants no more than what a Sync can name
LABEL_MAX = 32  # characters of names and labels: four bytes each at worst
SOFTWARE_MAX = 32  # characters of a version of swarm, ASCII
STEPS = 8  # fractions are told in eighths: every further step costs every member a rumour

Label = Annotated[str, msgspec.Meta(max_length=LABEL_MAX, pattern=PRINTABLE)]
Address = Annotated[str, msgspec.Meta(min_length=1, max_length=260, pattern=PRINTABLE)]
Software = Annotated[str, msgspec.Meta(max_length=SOFTWARE_MAX, pattern=r"^[!-~]*\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Version = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
VERSION_MAX = 1 << 53
ID_FIRST, ID_LAST = "0" * 16, "f" * 16


class State(IntEnum):
    """How a member is. Of two claims with one incarnation the greater state holds."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class _Word(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of what packets carry."""


class Holding(_Word, frozen=True):
    """One artifact that a member holds: `chunks` of `chunks_total` are verified. `gives`: see messages.Announcement."""

    model_id: ModelId
    digest: Digest
    tier: Literal["checkpoint", "loaded", "cache"]
    chunks: Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]
    chunks_total: Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]
    superseeds: bool


class Profile(_Word, frozen=True):
    """What a member tells of itself. `omitted` counts artifacts that found no room; `uploads` of `slots` are taken;
    `software` is its version of swarm."""

    artifacts: Annotated[tuple[Holding, ...], msgspec.Meta(max_length=ARTIFACTS_MAX)] = ()
    omitted: Count = 0
    transports: Annotated[tuple[Scheme, ...], msgspec.Meta(max_length=8)] = ()
    host: Label = ""
    rack: Label = ""
    uploads: Count = 0
    slots: Count = 0
    software: Software = ""

    def distance(self, host: str, rack: str) -> int:
        """How many borders are on the way there: 0 from the same host, 1 within a rack, 2 from another one."""
        if host and self.host == host:
            return 0
        return 1 if self.rack == rack else 2


class Status(_Word, frozen=True, tag=1):
    """How a member is. `version` counts its profiles, so that whoever has an older one notices."""

    node: NodeId
    incarnation: Version
    state: State
    version: Version


class Record(_Word, frozen=True, tag=2):
    """Everything known of a member."""

    node: NodeId
    incarnation: Version
    state: State
    version: Version
    name: Label
    address: Address
    profile: Profile

    @property
    def status(self) -> Status:
        """The short form."""
        return Status(self.node, self.incarnation, self.state, self.version)


Rumour: TypeAlias = Status | Record
Rumours = Annotated[tuple[Rumour, ...], msgspec.Meta(max_length=64)]


class Ping(_Word, frozen=True, tag=1):
    """Asks a member for an Ack. One that is not `target` (a new process with an old port) does not answer."""

    sequence: Count
    sender: NodeId
    target: NodeId
    rumours: Rumours


class PingRequest(_Word, frozen=True, tag=2):
    """Asks the receiver to ping `target`, and to pass on its Ack under this sequence."""

    sequence: Count
    sender: NodeId
    target: NodeId
    rumours: Rumours


class Ack(_Word, frozen=True, tag=3):
    """`sender` is alive: the answer to a Ping, maybe passed on by another member."""

    sequence: Count
    sender: NodeId
    rumours: Rumours


class Gossip(_Word, frozen=True, tag=4):
    """Rumours alone."""

    sender: NodeId
    rumours: Rumours


class Sync(_Word, frozen=True, tag=5):
    """What the sender knows of the node ids `first` to `last`, both included; its own record in full."""

    sequence: Count
    record: Record
    first: NodeId
    last: NodeId
    statuses: Annotated[tuple[Status, ...], msgspec.Meta(max_length=STATUSES_MAX)]

    @property
    def sender(self) -> str:
        """Who asks."""
        return self.record.node


class SyncReply(_Word, frozen=True, tag=6):
    """What a Sync's sender lacks. `until`, in the last of several: the ids up to this one are settled; ask on from it.

    `wants` are the members of which the receiver of the Sync wants the records.
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
    """The datagram that carries this packet. Raises LocalProtocolError when it is too long."""
    datagram = _MAGIC + _encoder.encode(packet)
    if len(datagram) > DATAGRAM_BYTES_MAX:
        raise LocalProtocolError(f"a {type(packet).__name__} of {len(datagram)} bytes does not fit into a datagram")
    return datagram


def decode(datagram: bytes) -> Packet:
    """The packet in a datagram. Raises ValueError, which says what is wrong with it."""
    if len(datagram) > DATAGRAM_BYTES_MAX:
        raise ValueError(f"datagram of {len(datagram)} bytes; at most {DATAGRAM_BYTES_MAX} are allowed")
    if not datagram.startswith(_MAGIC):
        raise ValueError("not gossip, or of another version")
    try:
        return _decoder.decode(memoryview(datagram)[len(_MAGIC) :])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def size(word: Rumour | Packet) -> int:
    """Bytes that a rumour adds to a datagram, or that a packet takes without its magic."""
    return len(_encoder.encode(word))


def quantised(profile: Profile) -> Profile:
    """The profile in steps that are worth a rumour: chunks and uploads in eighths, rounded down, labels cut.

    Something is never told as nothing, and not everything never as everything.
    """
    holdings = (
        msgspec.structs.replace(held, chunks=_step(held.chunks, held.chunks_total)) for held in profile.artifacts
    )
    return msgspec.structs.replace(
        profile,
        artifacts=tuple(holdings),
        uploads=_step(profile.uploads, profile.slots),
        host=profile.host[:LABEL_MAX],
        rack=profile.rack[:LABEL_MAX],
    )


def fitted(record: Record) -> Record:
    """The record with so many of its artifacts left out, last first, that it is within RECORD_BYTES_MAX."""
    while size(record) > RECORD_BYTES_MAX or len(record.profile.artifacts) > ARTIFACTS_MAX:
        profile = record.profile
        fewer = msgspec.structs.replace(profile, artifacts=profile.artifacts[:-1], omitted=profile.omitted + 1)
        if not profile.artifacts:
            raise LocalProtocolError(f"the record of {record.name} does not fit into a datagram")
        record = msgspec.structs.replace(record, profile=fewer)
    return record


def replaced(
    record: Record,
    *,
    incarnation: int | None = None,
    state: State | None = None,
    version: int | None = None,
    profile: Profile | None = None,
) -> Record:
    """The record with some of its fields changed; None leaves a field as it is."""
    return Record(
        record.node,
        record.incarnation if incarnation is None else incarnation,
        record.state if state is None else state,
        record.version if version is None else version,
        record.name,
        record.address,
        record.profile if profile is None else profile,
    )


def batches(records: Iterable[Record]) -> list[tuple[Record, ...]]:
    """Records in the same order, so many at a time as fit into one datagram."""
    room = DATAGRAM_BYTES_MAX - PACKET_HEAD_BYTES
    found: list[list[Record]] = []
    left = 0
    for record in records:
        need = size(record)
        if need > left or not found:
            found.append([])
            left = room
        found[-1].append(record)
        left -= need
    return [tuple(batch) for batch in found]


def following(node: str) -> str:
    """The node id after this one; the first one after the last."""
    return f"{(int(node, 16) + 1) % (1 << 64):016x}"


def _step(part: int, whole: int) -> int:
    if part <= 0 or part >= whole:
        return max(0, min(part, whole))
    return max(1, part * STEPS // whole * whole // STEPS)
