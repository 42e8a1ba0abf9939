"""The messages of a link, their JSON encoding and their limits.

A message is a JSON object with its class name in `type`. A frame contains 1 to 256 messages, separated by newlines,
because a frame costs a write, a read and a wake-up. `decode` and `unpack` validate all input: unknown types, missing or
unknown fields, wrong types and values beyond the limits below raise ValueError.

    newcomer                                    peer
       | Hello            <->         Hello |           version, name, endpoints, artifacts, session token
       | ManifestRequest  ->                |
       |                  <-   ManifestPart |           until `offset + len(data) == total`
       | Interest         ->                |
       |                  <-       Holdings |           then Have for newly verified chunks
       | Request          ->                |
       |                  <-          Grant |           the bytes follow on the transport of the request
       |                  <-         Refuse |           or the transfer is refused, with a reason
       | Cancel           ->                |
       | Bye              <->           Bye |

Pure: must not know sockets. docs/protocol.md describes every message.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal, NewType, TypeAlias

import msgspec

from swarm.content.manifest import CHUNKS_MAX, MANIFEST_BYTES_MAX, PRINTABLE, Digest, ModelId, Tier
from swarm.errors import clean

PROTOCOL = 3

# Limits of the protocol. They are no settings, because all nodes must agree on them.
FRAME_BYTES_MAX = 1 << 20  # a bitfield of CHUNKS_MAX chunks is 171 KiB in base64
FRAME_MESSAGES_MAX = 256  # handling them blocks the receiver for some 10 ms
FRAME_BYTES_WANTED = 64 << 10  # a sender starts a new frame beyond that; a single message may be larger
MANIFEST_PART_BYTES = 256 << 10  # other messages are sent between two parts
REQUEST_CHUNKS_MAX = 256  # more in a transfer would depend too much on a single peer
SOURCES_MAX = 1024
STREAMS_MAX = 16  # connections of one bulk session: on 32 cores raw sockets gain nothing beyond
PACE_BYTES_PER_S_MAX = 1 << 50
ANNOUNCED_MAX = 256  # artifacts of a node
SIZE_BYTES_MAX = 1 << 62  # of an artifact
PROTOCOL_MAX = 1 << 31  # an integer of a million digits is no version, and cannot be printed
NODES_MAX = 64  # nodes in a Members message
ADDRESSES_OWN_MAX = 8  # addresses that a node tells about itself: a few cards, two families
RUNS_MAX = 4096  # runs in a Have message
CLAIMED_RUNS_MAX, CLAIMS_BYTES_MAX = 512, 128 << 10  # runs in a Claims message, and bytes of digests in a run
READING_RUNS_MAX = 64  # ranges that a node reads from an origin at once

Text = Annotated[str, msgspec.Meta(max_length=256, pattern=PRINTABLE)]
NodeId = NewType("NodeId", Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")])
Address = NewType("Address", str)  # HOST:PORT of a node
AddressText = Annotated[Address, msgspec.Meta(max_length=256, pattern=PRINTABLE)]
AddressTexts = Annotated[tuple[AddressText, ...], msgspec.Meta(max_length=ADDRESSES_OWN_MAX)]
Port = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
Token = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
ChunkIndex = Annotated[int, msgspec.Meta(ge=0, lt=CHUNKS_MAX)]
Bits = Annotated[bytes, msgspec.Meta(max_length=CHUNKS_MAX // 8)]
ProtocolVersion = Annotated[int, msgspec.Meta(ge=0, lt=PROTOCOL_MAX)]
TransferId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Scheme = Annotated[str, msgspec.Meta(pattern=r"^[a-z_]{1,16}\Z")]
Chunks = Annotated[tuple[ChunkIndex, ...], msgspec.Meta(max_length=REQUEST_CHUNKS_MAX)]
RefusalReason = Literal[
    "busy", "not_held", "unknown_artifact", "source_changed", "no_transport", "nothing_to_give", "leaving"
]


# Some names of an artifact, for people: an Origin has all of them.
REVISIONS_SHOWN, REVISION_SHOWN_CHARS = 4, 64
RevisionShown = Annotated[str, msgspec.Meta(min_length=1, max_length=REVISION_SHOWN_CHARS, pattern=PRINTABLE)]
AT_NODE = "*"  # in the address of an Endpoint


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages of a link."""


class Endpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A transport that serves chunks of the sender. `address` has the form that its scheme defines.

    AT_NODE in it stands for the address at which the receiver reaches the sender.
    """

    scheme: Scheme
    address: Text


class HeldPart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The part of an artifact that a node wants: `chunks` of `chunks_total` are verified.

    `part`: equal for equal sets of chunks (`selection.part_id`).
    """

    part: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
    chunks: Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]
    chunks_total: Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]


class Announcement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An artifact of the sender: `chunks` of `chunks_total` are verified, `size` is its total size in bytes.

    `superseeds`: the sender is a seed and chooses the chunks that it sends (super-seeding, BEP 16). `wanted`: the part
    that the sender wants, None if that is everything.
    """

    model_id: ModelId
    digest: Digest
    tier: Tier
    size: Annotated[int, msgspec.Meta(ge=0, le=SIZE_BYTES_MAX)]
    chunks: Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]
    chunks_total: Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]
    superseeds: bool
    wanted: HeldPart | None = None
    revisions: Annotated[tuple[RevisionShown, ...], msgspec.Meta(max_length=REVISIONS_SHOWN)] = ()

    @property
    def fetched(self) -> bool:
        """Whether every chunk that the sender wants is verified."""
        progress = self.wanted or self
        return progress.chunks >= progress.chunks_total


class Hello(Message, frozen=True):
    """First message of both sides. `token`: key for sessions to the sender.

    `port`: of the sender's listener at the address that this link comes from, 0 if it takes no connections there.
    `addresses`: all others at which it takes connections; none if it can only dial.
    """

    protocol: ProtocolVersion
    software: Text
    node: NodeId
    name: Text
    port: Port
    addresses: AddressTexts
    token: Token
    transports: Annotated[tuple[Endpoint, ...], msgspec.Meta(max_length=16)]
    artifacts: Annotated[tuple[Announcement, ...], msgspec.Meta(max_length=ANNOUNCED_MAX)]


class Announce(Message, frozen=True):
    """Replaces the artifacts in the Hello of the sender. `leaving`: it drains, and does not hold them for long."""

    artifacts: Annotated[tuple[Announcement, ...], msgspec.Meta(max_length=ANNOUNCED_MAX)]
    leaving: bool


class Members(Message, frozen=True):
    """The addresses of each node linked to the sender. A newcomer that knows a single address learns the others."""

    nodes: Annotated[tuple[AddressTexts, ...], msgspec.Meta(max_length=NODES_MAX)]


class ManifestRequest(Message, frozen=True):
    """Requests the canonical bytes of a manifest."""

    digest: Digest


SHORT_COMMIT_MIN = 7  # git's least
REVISIONS_MAX = 256
REVISION_CHARS_MAX = 256
BESIDE_MAX, BESIDE_BYTES_MAX = 64, 256 << 10  # a README takes 5 to 50 KB; some 350 KB in base64, of a frame of 1 MiB
Beside = Annotated[bytes, msgspec.Meta(max_length=BESIDE_BYTES_MAX)]
Revision = Annotated[str, msgspec.Meta(min_length=1, max_length=REVISION_CHARS_MAX, pattern=PRINTABLE)]


SIGNATURES_MAX = 16


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A publisher says that an artifact is this model, in this revision if it is not empty.

    `publisher`: an Ed25519 public key. Unproven until `security.signatures` has verified it.
    """

    model_id: ModelId
    revision: Annotated[str, msgspec.Meta(max_length=256, pattern=PRINTABLE)]
    publisher: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    signature: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z")]


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The provenance of a checkpoint: its Hugging Face commit, the etag of each file by path, signatures of publishers.

    `revisions`: branches, tags and labels that name it at its source. `commit` is empty for a labelled directory.
    `beside`: small files of the commit that are no part of the artifact (README, licence), by path.
    """

    commit: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{40})?\Z")]
    etags: dict[str, Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})\Z")]]
    revisions: Annotated[tuple[Revision, ...], msgspec.Meta(max_length=REVISIONS_MAX)] = ()
    beside: Annotated[dict[str, Beside], msgspec.Meta(max_length=BESIDE_MAX)] = {}
    signatures: Annotated[tuple[Signature, ...], msgspec.Meta(max_length=SIGNATURES_MAX)] = ()

    def is_revision(self, revision: str) -> bool:
        """Whether the text is one of its names, or the first 7 or more digits of its commit."""
        short = len(revision) >= SHORT_COMMIT_MIN and self.commit.startswith(revision)
        return short or revision in self.revisions

    def labelled(self, revision: str) -> Origin:
        """With this as its only name."""
        return msgspec.structs.replace(self, revisions=(revision,))

    def signed(self, signatures: tuple[Signature, ...]) -> Origin:
        """With these signatures."""
        return msgspec.structs.replace(self, signatures=signatures)

    def proven(self, commit: str, *, etags: dict[str, str], beside: dict[str, bytes]) -> Origin:
        """Of proven files: what a listing says in place of what a member says."""
        return msgspec.structs.replace(self, commit=commit, etags=etags, beside=beside)

    def alone(self) -> Origin:
        """Without the files beside the artifact."""
        return msgspec.structs.replace(self, beside={})

    def shown(self) -> list[str]:
        """Its revisions, names first."""
        return [*self.revisions, *([self.commit] if self.commit else [])]


class ManifestPart(Message, frozen=True):
    """`data` is at `offset` of the `total` canonical bytes of a manifest. `total` 0: the sender does not have it."""

    digest: Digest
    total: Annotated[int, msgspec.Meta(ge=0, le=MANIFEST_BYTES_MAX)]
    offset: Annotated[int, msgspec.Meta(ge=0, le=MANIFEST_BYTES_MAX)]
    data: Annotated[bytes, msgspec.Meta(max_length=MANIFEST_PART_BYTES)]


class OriginRequest(Message, frozen=True):
    """Requests the provenance of a checkpoint."""

    digest: Digest


class OriginReply(Message, frozen=True):
    """The provenance of a checkpoint, None if unknown. Unproven: the receiver compares its files with the etags."""

    digest: Digest
    origin: Origin | None


class Interest(Message, frozen=True):
    """The sender holds the chunks in `bits` and wants the others, or the others of `wanted` if that is not empty.

    The receiver answers Holdings, then sends Have.
    """

    digest: Digest
    bits: Bits
    wanted: Bits


class Holdings(Message, frozen=True):
    """The chunks that the sender holds, as a packed bitfield."""

    digest: Digest
    bits: Bits


class Have(Message, frozen=True):
    """Newly verified chunks as (first, count) runs. Raises ValueError unless they are ascending and disjoint."""

    digest: Digest
    runs: Annotated[
        tuple[tuple[ChunkIndex, Annotated[int, msgspec.Meta(ge=1, le=CHUNKS_MAX)]], ...],
        msgspec.Meta(max_length=RUNS_MAX),
    ]

    def __post_init__(self) -> None:
        end = 0
        for first, count in self.runs:
            if first < end:
                raise ValueError(f"runs are not ascending and disjoint: {first} follows a run that ends at {end}")
            end = first + count
        if end > CHUNKS_MAX:
            raise ValueError(f"runs end at {end}; at most {CHUNKS_MAX} chunks are allowed")


class ClaimedRun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Digests, one after another, of consecutive chunks from `first` on, as `reader` read them from the origin."""

    first: ChunkIndex
    reader: NodeId
    digests: Annotated[bytes, msgspec.Meta(min_length=1, max_length=CLAIMS_BYTES_MAX)]


class ChunkClaims(Message, frozen=True):
    """The digests of chunks of a promise that the sender holds; `Have` and `Holdings` for them follow."""

    digest: Digest
    runs: Annotated[tuple[ClaimedRun, ...], msgspec.Meta(min_length=1, max_length=CLAIMED_RUNS_MAX)]


class OriginReading(Message, frozen=True):
    """The chunks of a promise that the sender reads from the origin now, as (first, count) runs; replaces the last.

    `able`: whether the origin answers the sender.
    """

    digest: Digest
    able: bool
    runs: Annotated[
        tuple[tuple[ChunkIndex, Annotated[int, msgspec.Meta(ge=1, le=CHUNKS_MAX)]], ...],
        msgspec.Meta(max_length=READING_RUNS_MAX),
    ]


class Request(Message, frozen=True):
    """Requests a transfer over `scheme`: of `chunks` in this order, or of up to `count` chunks of the seed's choice.

    Exactly one of `chunks` and `count` is set. `transfer` is unique on the link, chosen by the sender. `starving`: the
    peers of the sender do not fill its link, so a seed may repeat a chunk. `sources`: the number of peers that send to
    the sender if other nodes of its host or rack fetch the same artifact, else 0. `pace_bytes_per_s`: mean download
    rate since the fetch began. transfer.upload orders uploads by `sources` and pace. `streams`: the transfers that the
    sender's session carries side by side.
    """

    scheme: Scheme
    digest: Digest
    transfer: TransferId
    chunks: Chunks
    count: Annotated[int, msgspec.Meta(ge=0, le=REQUEST_CHUNKS_MAX)]
    starving: bool
    sources: Annotated[int, msgspec.Meta(ge=0, le=SOURCES_MAX)]
    pace_bytes_per_s: Annotated[int, msgspec.Meta(ge=0, le=PACE_BYTES_PER_S_MAX)]
    streams: Annotated[int, msgspec.Meta(ge=1, le=STREAMS_MAX)]


class Grant(Message, frozen=True):
    """The transfer of `chunks` starts now. `sequence` counts the grants of the sender on this link."""

    transfer: TransferId
    sequence: TransferId
    chunks: Chunks


class Refuse(Message, frozen=True):
    """The transfer is refused or was aborted. Request again after `retry_s` seconds."""

    transfer: TransferId
    reason: RefusalReason
    retry_s: Annotated[float, msgspec.Meta(ge=0, le=3600)]


class Cancel(Message, frozen=True):
    """The requester withdraws its request or aborts the transfer."""

    transfer: TransferId


class Bye(Message, frozen=True):
    """The sender closes the link."""

    reason: Text


AnyMessage: TypeAlias = (
    Hello | Announce | Members | ManifestRequest | ManifestPart | OriginRequest | OriginReply | Interest | Holdings
    | Have | ChunkClaims | OriginReading | Request | Grant | Refuse | Cancel | Bye
)  # fmt: skip

_decoder: msgspec.json.Decoder[AnyMessage] = msgspec.json.Decoder(AnyMessage)
_encoder = msgspec.json.Encoder()


def unsayable(model_id: str) -> str | None:
    """The reason why a model id is invalid in messages, or None if it is valid."""
    try:
        msgspec.convert(model_id, ModelId)
    except msgspec.ValidationError as error:
        return f"{clean(repr(model_id))} cannot be announced: {error}"
    return None


def unsayable_endpoint(scheme: str, address: str) -> str | None:
    """The reason why a transport cannot be announced, or None if it can."""
    try:
        msgspec.convert({"scheme": scheme, "address": address}, Endpoint)
    except msgspec.ValidationError as error:
        return str(error)
    return None


def encode(message: Message) -> bytes:
    """A frame with a single message."""
    return _encoder.encode(message)


def pack(messages: Iterable[Message]) -> Iterator[bytes]:
    """Frames with these messages in order. Encodes lazily, frame by frame."""
    lines: list[bytes] = []
    size = 0
    for message in messages:
        line = encode(message)
        if lines and (size + len(line) > FRAME_BYTES_WANTED or len(lines) == FRAME_MESSAGES_MAX):
            yield b"\n".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line) + 1
    if lines:
        yield b"\n".join(lines)


class OtherProtocol(ValueError):
    """A Hello with another protocol version; its other fields are not checked."""

    def __init__(self, protocol: int, software: str) -> None:
        super().__init__(f"protocol {protocol}")
        self.protocol = protocol
        self.software = software


class _HelloVersion(msgspec.Struct, tag="Hello"):
    """The fields of Hello that every protocol version has."""

    protocol: ProtocolVersion
    software: Text = "unknown"


_version_decoder = msgspec.json.Decoder(_HelloVersion)


def decode(frame: bytes) -> AnyMessage:
    """The message of a frame with a single message. Raises ValueError, or OtherProtocol for another version."""
    _check_size(frame)
    try:
        return _decoder.decode(frame)
    except (ValueError, RecursionError) as error:
        hello = None
        with contextlib.suppress(ValueError, RecursionError):
            hello = _version_decoder.decode(frame)
        if hello is not None and hello.protocol != PROTOCOL:
            raise OtherProtocol(hello.protocol, hello.software) from error
        raise ValueError(str(error)) from error


def unpack(frame: bytes) -> Sequence[AnyMessage]:
    """The messages of a frame in order, at least one. Raises like `decode`. Hello has a frame of its own."""
    if b"\n" not in frame:
        return (decode(frame),)
    _check_size(frame)
    try:
        found = _decoder.decode_lines(frame)
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not 0 < len(found) <= FRAME_MESSAGES_MAX:
        raise ValueError(f"{len(found)} messages in a frame; 1 to {FRAME_MESSAGES_MAX} are allowed")
    return found


def _check_size(frame: bytes) -> None:
    if len(frame) > FRAME_BYTES_MAX:
        raise ValueError(f"frame of {len(frame)} bytes; at most {FRAME_BYTES_MAX} are allowed")
