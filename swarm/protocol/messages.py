"""The words two nodes say to each other over a link, and the limits on them.

One message is one JSON object, told apart by its `type`. A frame carries one or several, one on a line: what is said in
one breath costs one write, one read and one wake-up. `decode` and `unpack` are the only ways in: unknown types, missing
or unknown fields, wrong types and values beyond the limits below all raise ValueError.

    newcomer                                    peer
       | Hello                        Hello |           versions, names, transports, artifacts, a bulk token
       | ManifestRequest  ->                |
       |                  <-   ManifestPart |           until `offset + len(data) == total`
       | Interest         ->                |
       |                  <-       Holdings |           and Have, whenever more was verified
       | Request          ->                |
       |                  <-          Grant |           the transfer's bytes follow on the agreed transport
       |                  <-         Refuse |           or they do not, and this says why
       | Cancel           ->                |           not wanted any more
       | Bye              <->           Bye |

Pure: this module never sees a socket.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec

from swarm.content.manifest import CHUNKS_MAX, MANIFEST_BYTES_MAX, Digest

PROTOCOL = 3

# Limits, each with its reason. They are part of the protocol, not settings.
FRAME_BYTES_MAX = 1 << 20  # a bitfield of CHUNKS_MAX chunks is 171 KiB in base64
FRAME_MESSAGES_MAX = 256  # heard in one go: some 10 ms, for which whoever hears them does nothing else
FRAME_BYTES_WANTED = 64 << 10  # no further message joins a frame beyond that; one alone may be larger
MANIFEST_PART_BYTES = 256 << 10  # small enough to let other messages through between two parts
REQUEST_CHUNKS_MAX = 256  # chunks in one transfer: more would tie too much to one peer
SOURCES_MAX = 1024
PACE_BYTES_PER_S_MAX = 1 << 50
ANNOUNCED_MAX = 256  # artifacts one node serves
ADDRESSES_MAX = 64  # members told in one message
RUNS_MAX = 4096  # runs of chunks in one Have

PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*\Z"  # no control characters: it reaches terminals
Text = Annotated[str, msgspec.Meta(max_length=256, pattern=PRINTABLE)]
ModelId = Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=PRINTABLE)]
NodeId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
Token = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
ChunkIndex = Annotated[int, msgspec.Meta(ge=0, lt=CHUNKS_MAX)]
Bits = Annotated[bytes, msgspec.Meta(max_length=CHUNKS_MAX // 8)]
TransferId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Scheme = Annotated[str, msgspec.Meta(pattern=r"^[a-z_]{1,16}\Z")]
Chunks = Annotated[tuple[ChunkIndex, ...], msgspec.Meta(max_length=REQUEST_CHUNKS_MAX)]
RefusalReason = Literal["busy", "not_held", "unknown_artifact", "source_changed", "no_transport", "nothing_to_give"]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of everything that travels over a link."""


class Endpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One transport a node can be read through: `address` is in the scheme's own form."""

    scheme: Scheme
    address: Text


class Announcement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One artifact a node holds in full or in part. `chunks` of `chunks_total` are verified.

    `gives`: the node is a seed, and chooses itself which chunks it sends to whom.
    """

    model_id: ModelId
    digest: Digest
    tier: Literal["checkpoint", "loaded", "cache"]
    size: Annotated[int, msgspec.Meta(ge=0)]
    chunks: Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]
    chunks_total: Annotated[int, msgspec.Meta(ge=0, le=CHUNKS_MAX)]
    superseeds: bool


class Hello(Message, frozen=True):
    """First message, both ways. `address` is where others may dial this node; `token` opens a bulk connection to it."""

    protocol: int
    software: Text
    node: NodeId
    name: Text
    address: Text
    token: Token
    transports: Annotated[tuple[Endpoint, ...], msgspec.Meta(max_length=16)]
    artifacts: Annotated[tuple[Announcement, ...], msgspec.Meta(max_length=ANNOUNCED_MAX)]


class Announce(Message, frozen=True):
    """Replaces the artifacts of the sender's Hello."""

    artifacts: Annotated[tuple[Announcement, ...], msgspec.Meta(max_length=ANNOUNCED_MAX)]


class Members(Message, frozen=True):
    """Addresses of nodes the sender is connected to, so that one address is enough to join."""

    addresses: Annotated[tuple[Text, ...], msgspec.Meta(max_length=ADDRESSES_MAX)]


class ManifestRequest(Message, frozen=True):
    """Asks for a manifest's canonical bytes."""

    digest: Digest


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a checkpoint came from: the hub's commit, and the hub's name (etag) of each file's content."""

    commit: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40}\Z")]
    etags: dict[str, Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})\Z")]]


class ManifestPart(Message, frozen=True):
    """Some of a manifest's canonical bytes. `total` 0: not here."""

    digest: Digest
    total: Annotated[int, msgspec.Meta(ge=0, le=MANIFEST_BYTES_MAX)]
    offset: Annotated[int, msgspec.Meta(ge=0, le=MANIFEST_BYTES_MAX)]
    data: Annotated[bytes, msgspec.Meta(max_length=MANIFEST_PART_BYTES)]


class OriginRequest(Message, frozen=True):
    """Asks where a checkpoint came from."""

    digest: Digest


class OriginReply(Message, frozen=True):
    """Where it came from, if the sender knows. A claim: whoever uses it compares the files with it."""

    digest: Digest
    origin: Origin | None


class Interest(Message, frozen=True):
    """The sender wants chunks of this artifact and holds those in `bits`; asks for Holdings now, then for Have."""

    digest: Digest
    bits: Bits


class Holdings(Message, frozen=True):
    """The chunks the sender holds, as a packed bitfield."""

    digest: Digest
    bits: Bits


class Have(Message, frozen=True):
    """Newly verified chunks, as (first, count) runs: ascending and disjoint, so that together they name at most
    CHUNKS_MAX chunks. Raises ValueError when they are not."""

    digest: Digest
    runs: Annotated[
        tuple[tuple[ChunkIndex, Annotated[int, msgspec.Meta(ge=1, le=CHUNKS_MAX)]], ...],
        msgspec.Meta(max_length=RUNS_MAX),
    ]

    def __post_init__(self) -> None:
        end = 0
        for first, count in self.runs:
            if first < end:
                raise ValueError(f"runs are not ascending and disjoint: one begins at {first}, after {end} was reached")
            end = first + count
        if end > CHUNKS_MAX:
            raise ValueError(f"runs end at {end}; there are at most {CHUNKS_MAX} chunks")


class Request(Message, frozen=True):
    """Asks for a transfer over `scheme`: of these chunks in this order, or of up to `count` that the holder chooses.

    Exactly one of `chunks` and `count` is given. `hungry` tells a seed that the asker has nobody else to ask. `sources`
    is 0, or, when others of the asker's machine or rack fetch the same, how many it is fed by: who has few gets more of
    each. `pace_bytes_per_s` is what it got since it began: who fell behind gets more. The id is the asker's own, unique
    on this link.
    """

    scheme: Scheme
    digest: Digest
    transfer: TransferId
    chunks: Chunks
    count: Annotated[int, msgspec.Meta(ge=0, le=REQUEST_CHUNKS_MAX)]
    starving: bool
    sources: Annotated[int, msgspec.Meta(ge=0, le=SOURCES_MAX)]
    pace_bytes_per_s: Annotated[int, msgspec.Meta(ge=0, le=PACE_BYTES_PER_S_MAX)]


class Grant(Message, frozen=True):
    """The transfer of these chunks starts now. `sequence` counts the sender's grants on this link, in their order."""

    transfer: TransferId
    sequence: Annotated[int, msgspec.Meta(ge=0)]
    chunks: Chunks


class Refuse(Message, frozen=True):
    """The transfer will not happen, or broke off; worth asking again after `retry_s` seconds."""

    transfer: TransferId
    reason: RefusalReason
    retry_s: Annotated[float, msgspec.Meta(ge=0, le=3600)]


class Cancel(Message, frozen=True):
    """The asker does not want this transfer any more."""

    transfer: TransferId


class Bye(Message, frozen=True):
    """The sender is leaving, and why."""

    reason: Text


AnyMessage: TypeAlias = (
    Hello | Announce | Members | ManifestRequest | ManifestPart | OriginRequest | OriginReply | Interest | Holdings
    | Have | Request | Grant | Refuse | Cancel | Bye
)  # fmt: skip

_decoder: msgspec.json.Decoder[AnyMessage] = msgspec.json.Decoder(AnyMessage)
_encoder = msgspec.json.Encoder()


def unsayable(model_id: str) -> str | None:
    """Why no message can carry this model id, or None when one can."""
    try:
        msgspec.convert(model_id, ModelId)
    except msgspec.ValidationError as error:
        return f"{model_id!r} cannot be announced: {error}"
    return None


def encode(message: Message) -> bytes:
    """The frame that carries this message alone."""
    return _encoder.encode(message)


def pack(messages: Iterable[Message]) -> Iterator[bytes]:
    """The frames that carry these messages, in order. Encoded as they are asked for."""
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
    """A greeting in another version of the protocol, whatever else it says."""

    def __init__(self, protocol: int, software: str) -> None:
        super().__init__(f"protocol {protocol}")
        self.protocol = protocol
        self.software = software


class _Greeting(msgspec.Struct, tag="Hello"):
    """What a Hello of every version must say."""

    protocol: int
    software: Text = "unknown"


_greeting_decoder = msgspec.json.Decoder(_Greeting)


def decode(frame: bytes) -> AnyMessage:
    """The message in a frame of one. Raises ValueError, which says what is wrong with it, or OtherProtocol."""
    _check_size(frame)
    try:
        return _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            greeting = _greeting_decoder.decode(frame)
            if greeting.protocol != PROTOCOL:
                raise OtherProtocol(greeting.protocol, greeting.software) from error
        raise ValueError(str(error)) from error


def unpack(frame: bytes) -> Sequence[AnyMessage]:
    """The messages in a frame, at least one, in order. Raises as `decode`; a greeting comes alone."""
    if b"\n" not in frame:
        return (decode(frame),)
    _check_size(frame)
    try:
        found = _decoder.decode_lines(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not 0 < len(found) <= FRAME_MESSAGES_MAX:
        raise ValueError(f"{len(found)} messages in one frame; 1 to {FRAME_MESSAGES_MAX} are allowed")
    return found


def _check_size(frame: bytes) -> None:
    if len(frame) > FRAME_BYTES_MAX:
        raise ValueError(f"frame of {len(frame)} bytes; at most {FRAME_BYTES_MAX} are allowed")
