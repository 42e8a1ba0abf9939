"""What may a datagram say, and what is refused?"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.content.manifest import Digest, ModelId
from swarm.errors import LocalProtocolError
from swarm.protocol import packets
from swarm.protocol.messages import Address, NodeId
from swarm.protocol.packets import (
    Ack,
    Holding,
    Packet,
    Ping,
    PingRequest,
    Profile,
    Record,
    State,
    Status,
    Sync,
    SyncReply,
)

ME, ANN, BEN = ("0" * 15 + digit for digit in "123")


def record(node: str, *, profile: Profile | None = None) -> Record:
    return Record(NodeId(node), 0, State.ALIVE, 0, node[-1:], (Address(f"at-{node[-1:]}"),), profile or Profile())


def holding(chunks: int, *, of: int = 80) -> Holding:
    return Holding(ModelId("org/model"), Digest("a" * 64), "checkpoint", chunks, of, chunks == of)


def gossiped(profile: list[object]) -> Profile:
    """What a datagram that says this array of a member is read as."""
    said = [4, ME, [[2, ANN, 0, 0, 0, "ann", ["at-ann"], profile]]]
    packet = packets.decode(packets.encode(Ack(1, NodeId(ME), ()))[:4] + msgspec.msgpack.encode(said))
    assert isinstance(packet, packets.Gossip)
    (told,) = packet.rumours
    assert isinstance(told, Record)
    return told.profile


@pytest.mark.parametrize(
    "packet",
    [
        Ping(1, NodeId(ME), NodeId(ANN), (record(ANN), Status(NodeId(BEN), 1, State.LEFT, 2))),
        PingRequest(1, NodeId(ME), NodeId(ANN), ()),
        Ack(1, NodeId(ME), ()),
        packets.Gossip(
            NodeId(ME), (record(ANN, profile=Profile((holding(3),), 1, ("tcp",), "h", "r", 1, 8, "0.1.0")),)
        ),
        Sync(1, record(ME), NodeId(ANN), NodeId(BEN), (Status(NodeId(BEN), 1, State.DEAD, 2),)),
        SyncReply(1, NodeId(ME), (record(ANN),), (NodeId(BEN),), None),
    ],
)
def test_a_packet_survives_the_wire(packet: Packet) -> None:
    assert packets.decode(packets.encode(packet)) == packet


def test_what_is_no_packet_is_refused() -> None:
    good = packets.encode(Ack(1, NodeId(ME), ()))
    bad = [b"", b"SWG", good[:-1], good + b"\0", b"SWG\x63" + good[4:], b"x" * 1401, good[:4] + b"\x93\x63\x01\x01"]
    bad.append(good[:4] + msgspec.msgpack.encode([3, 1, "not an id", []]))
    bad.append(good[:4] + msgspec.msgpack.encode([3, 1, ME, [[1, ME, 0, 9, 0]]]))
    for datagram in bad:
        with pytest.raises(ValueError, match=r"."):
            packets.decode(datagram)


def test_is_a_profile_understood_that_ends_before_fields_that_came_later() -> None:
    assert gossiped([[], 0, ["tcp"], "h", "r", 1, 8]) == Profile((), 0, ("tcp",), "h", "r", 1, 8)


@pytest.mark.parametrize(
    "fields",
    [
        [[], 0, [], "", "", 0, 0, "1" * 33],
        [[], 0, [], "", "", 0, 0, "1\x1b[2J"],
        [[], 0, [], "", "", 0, 0, "1.0", "more"],
    ],
)
def test_is_a_profile_refused_that_says_more_than_it_may(fields: list[object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        gossiped(fields)


@given(st.binary(max_size=200))
def test_garbage_raises_value_error_only(garbage: bytes) -> None:
    for datagram in (garbage, packets.encode(Ack(1, NodeId(ME), ()))[:4] + garbage):
        try:
            packets.decode(datagram)
        except ValueError:
            continue


def test_a_packet_too_long_is_a_bug_here() -> None:
    with pytest.raises(LocalProtocolError):
        packets.encode(packets.Gossip(NodeId(ME), tuple(record(ANN) for _ in range(60))))


@pytest.mark.parametrize(("chunks", "step"), [(0, 0), (1, 1), (10, 10), (19, 10), (79, 70), (80, 80), (90, 80)])
def test_fractions_are_rounded_down_but_never_to_nothing(chunks: int, step: int) -> None:
    assert packets.quantised(Profile((holding(chunks),))).artifacts[0].chunks == step
