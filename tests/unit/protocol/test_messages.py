"""The wire format: does it stay what it is, and is everything else refused?"""

from __future__ import annotations

import base64
import json
import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.content.manifest import CHUNKS_MAX, MANIFEST_BYTES_MAX, Digest, ModelId
from swarm.protocol import messages
from swarm.protocol.messages import Address, Announcement, Endpoint, Message, NodeId, Origin, decode, encode

DIGEST = Digest("ab" * 32)
ARTIFACT = Announcement(ModelId("org/model"), DIGEST, "checkpoint", 10, 1, 2, False)
PART = Announcement(
    ModelId("org/model"), DIGEST, "checkpoint", 10, 1, 2, False, messages.HeldPart("0123456789abcdef", 1, 1)
)
NODE, TOKEN = NodeId("0123456789abcdef"), "cd" * 16

ARTIFACT_JSON = (
    f'{{"model_id":"org/model","digest":"{DIGEST}","tier":"checkpoint","size":10,"chunks":1,"chunks_total":2,'
    f'"superseeds":false}}'
)
# A change here is a change of the protocol: `PROTOCOL` counts those.
GOLDEN: dict[Message, str] = {
    messages.Hello(
        3, "0.1.0", NODE, "me", 1, (Address("127.0.0.1:1"),), TOKEN, (Endpoint("tcp", messages.AT_NODE),), (ARTIFACT,)
    ): (
        f'{{"type":"Hello","protocol":3,"software":"0.1.0","node":"{NODE}","name":"me","port":1,"addresses":["127.0.0.1:1"],'
        f'"token":"{TOKEN}","transports":[{{"scheme":"tcp","address":"*"}}],"artifacts":[{ARTIFACT_JSON}]}}'
    ),
    messages.Announce(
        (ARTIFACT,), leaving=False
    ): f'{{"type":"Announce","artifacts":[{ARTIFACT_JSON}],"leaving":false}}',
    messages.Members(((Address("127.0.0.1:1"),),)): '{"type":"Members","nodes":[["127.0.0.1:1"]]}',
    messages.ManifestRequest(DIGEST): f'{{"type":"ManifestRequest","digest":"{DIGEST}"}}',
    messages.ManifestPart(DIGEST, 3, 1, b"\x00\xff"): (
        f'{{"type":"ManifestPart","digest":"{DIGEST}","total":3,"offset":1,"data":"AP8="}}'
    ),
    messages.OriginRequest(DIGEST): f'{{"type":"OriginRequest","digest":"{DIGEST}"}}',
    messages.OriginReply(DIGEST, None): f'{{"type":"OriginReply","digest":"{DIGEST}","origin":null}}',
    messages.ChunkClaims(DIGEST, (messages.ClaimedRun(3, NODE, bytes(48)),)): (
        f'{{"type":"ChunkClaims","digest":"{DIGEST}","runs":[[3,"{NODE}","{"A" * 64}"]]}}'
    ),
    messages.OriginReading(DIGEST, True, ((0, 2), (5, 1))): (
        f'{{"type":"OriginReading","digest":"{DIGEST}","able":true,"runs":[[0,2],[5,1]]}}'
    ),
    messages.Interest(DIGEST, b"\xc0", b"\xf0"): (
        f'{{"type":"Interest","digest":"{DIGEST}","bits":"wA==","wanted":"8A=="}}'
    ),
    messages.Announce((), leaving=True): '{"type":"Announce","artifacts":[],"leaving":true}',
    messages.Announce((PART,), leaving=False): (
        f'{{"type":"Announce","artifacts":[{ARTIFACT_JSON[:-1]},"wanted":["0123456789abcdef",1,1]}}],"leaving":false}}'
    ),
    messages.Holdings(DIGEST, b"\xc0"): f'{{"type":"Holdings","digest":"{DIGEST}","bits":"wA=="}}',
    messages.Have(DIGEST, ((0, 2), (5, 1))): f'{{"type":"Have","digest":"{DIGEST}","runs":[[0,2],[5,1]]}}',
    messages.Request("tcp", DIGEST, 7, (3, 1), 0, False, 5, 9, 2): (
        f'{{"type":"Request","scheme":"tcp","digest":"{DIGEST}","transfer":7,"chunks":[3,1],"count":0,"starving":false,'
        '"sources":5,"pace_bytes_per_s":9,"streams":2}'
    ),
    messages.Grant(7, 0, (3, 1)): '{"type":"Grant","transfer":7,"sequence":0,"chunks":[3,1]}',
    messages.Refuse(7, "busy", 1.5): '{"type":"Refuse","transfer":7,"reason":"busy","retry_s":1.5}',
    messages.Cancel(7): '{"type":"Cancel","transfer":7}',
    messages.Bye("done"): '{"type":"Bye","reason":"done"}',
}
ORIGIN = {"commit": "ef" * 20, "etags": {"config.json": "01" * 20, "model.safetensors": "01" * 32}}

CHUNKS: tuple[list[Any], list[Any]] = (
    [[], [0, CHUNKS_MAX - 1], [0] * messages.REQUEST_CHUNKS_MAX],
    [[0] * (messages.REQUEST_CHUNKS_MAX + 1), [CHUNKS_MAX], [-1], [0.5]],
)
BITS: tuple[list[Any], list[Any]] = (
    ["", base64.b64encode(bytes(CHUNKS_MAX // 8)).decode()],
    [base64.b64encode(bytes(CHUNKS_MAX // 8 + 1)).decode()],
)
RUNS = [[2 * number, 1] for number in range(messages.RUNS_MAX + 1)]
TRANSFER = [0, (1 << 62) - 1]
TEXT = ["", "x" * 256]
# (message, field): values that are just within the bounds, and values that are just beyond them or of a wrong kind.
BOUNDS: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {
    ("Hello", "protocol"): ([1, 2], ["1", 1.5, None]),
    ("Hello", "software"): (TEXT, ["x" * 257, 1]),
    ("Hello", "node"): (["0" * 16], ["0" * 15, "0" * 17, "G" * 16, "A" * 16, "0" * 16 + "\n"]),
    ("Hello", "name"): (TEXT, ["x" * 257]),
    ("Hello", "port"): ([0, 65535], [-1, 65536]),
    ("Hello", "addresses"): (
        [[], [TEXT[0]] * messages.ADDRESSES_OWN_MAX],
        [["x"] * (messages.ADDRESSES_OWN_MAX + 1), ["x" * 257]],
    ),
    ("Hello", "token"): (["0" * 32], ["0" * 31, "0" * 33, "0" * 32 + "\n"]),
    ("Hello", "transports"): (
        [[], [{"scheme": "a", "address": ""}] * 16],
        [
            [{"scheme": "a", "address": ""}] * 17,
            [{"scheme": "", "address": ""}],
            [{"scheme": "A", "address": ""}],
            [{"scheme": "a" * 17, "address": ""}],
            [{"scheme": "a", "address": "x" * 257}],
            [{"scheme": "a"}],
            [{"scheme": "a", "address": "", "more": 1}],
        ],
    ),
    ("Announce", "artifacts"): (
        [[], [json.loads(ARTIFACT_JSON)] * messages.ANNOUNCED_MAX],
        [
            [json.loads(ARTIFACT_JSON)] * (messages.ANNOUNCED_MAX + 1),
            *(
                [json.loads(ARTIFACT_JSON) | change]
                for change in (
                    {"model_id": ""},
                    {"model_id": "x" * 257},
                    {"model_id": "org/\x1b[2J"},
                    {"model_id": "org/model\n"},
                    {"digest": "0" * 63},
                    {"digest": DIGEST + "\n"},
                    {"tier": "hoard"},
                    {"size": -1},
                    {"chunks": -1},
                    {"chunks": CHUNKS_MAX + 1},
                    {"chunks_total": CHUNKS_MAX + 1},
                    {"superseeds": 1},
                    {"more": 1},
                )
            ),
        ],
    ),
    ("Announce", "leaving"): ([True, False], [0, "", None]),
    ("Members", "nodes"): (
        [[], [["x"] * messages.ADDRESSES_OWN_MAX] * messages.NODES_MAX, [[]]],
        [[["x"]] * (messages.NODES_MAX + 1), [["x"] * (messages.ADDRESSES_OWN_MAX + 1)], [["x" * 257]], ["x"]],
    ),
    ("ManifestRequest", "digest"): ([DIGEST], [DIGEST.upper(), DIGEST + "\n", DIGEST[1:], None]),
    ("ManifestPart", "total"): ([0, MANIFEST_BYTES_MAX], [-1, MANIFEST_BYTES_MAX + 1]),
    ("ManifestPart", "offset"): ([0, MANIFEST_BYTES_MAX], [-1, MANIFEST_BYTES_MAX + 1]),
    ("ManifestPart", "data"): (
        ["", base64.b64encode(bytes(messages.MANIFEST_PART_BYTES)).decode()],
        ["!", "AP8", base64.b64encode(bytes(messages.MANIFEST_PART_BYTES + 1)).decode()],
    ),
    ("OriginReply", "origin"): (
        [None, ORIGIN, ORIGIN | {"beside": {"README.md": base64.b64encode(b"# model").decode()}}],
        [
            ORIGIN | {"beside": {"README.md": "!"}},
            ORIGIN | {"beside": {"README.md": base64.b64encode(bytes(messages.BESIDE_BYTES_MAX + 1)).decode()}},
            ORIGIN | {"beside": {str(n): "" for n in range(messages.BESIDE_MAX + 1)}},
            ORIGIN | {"commit": "main"},
            ORIGIN | {"commit": "ef" * 20 + "\n"},
            ORIGIN | {"etags": {"a": "../../x"}},
            ORIGIN | {"etags": {"a": "0" * 41}},
            ORIGIN | {"more": 1},
        ],
    ),
    ("Interest", "bits"): BITS,
    ("Interest", "wanted"): BITS,
    ("Holdings", "bits"): BITS,
    ("ChunkClaims", "runs"): (
        [[[CHUNKS_MAX - 1, NODE, "AA=="]], [[0, NODE, "A" * 8]] * 512],
        [[], [[CHUNKS_MAX, NODE, "AA=="]], [[0, "x", "AA=="]], [[0, NODE, ""]], [[0, NODE, "AA=="]] * 513, [[0, NODE]]],
    ),
    ("OriginReading", "able"): ([True, False], [0, None]),
    ("OriginReading", "runs"): (
        [[], [[CHUNKS_MAX - 1, 1]], [[0, 1]] * 64],
        [[[0, 0]], [[CHUNKS_MAX, 1]], [[0, CHUNKS_MAX + 1]], [[0, 1]] * 65, [[0]]],
    ),
    ("Have", "runs"): (
        [[], RUNS[:-1], [[0, CHUNKS_MAX]], [[CHUNKS_MAX - 1, 1]], [[0, 1], [1, 2], [4, 1]]],
        [
            RUNS,
            [[CHUNKS_MAX, 1]],
            [[-1, 1]],
            [[0, 0]],
            [[0, CHUNKS_MAX + 1]],
            [[0]],
            [[CHUNKS_MAX - 1, 2]],
            [[0, 2], [1, 1]],
            [[5, 1], [0, 1]],
            [[0, CHUNKS_MAX]] * messages.RUNS_MAX,
        ],
    ),
    ("Request", "scheme"): (["inproc", "cuda_ipc"], ["TCP", ""]),
    ("Request", "transfer"): (TRANSFER, [-1, 1 << 62]),
    ("Request", "chunks"): CHUNKS,
    ("Request", "count"): ([0, messages.REQUEST_CHUNKS_MAX], [-1, messages.REQUEST_CHUNKS_MAX + 1]),
    ("Request", "starving"): ([True, False], [1, None]),
    ("Request", "sources"): ([0, messages.SOURCES_MAX], [-1, messages.SOURCES_MAX + 1, 1.5, None]),
    ("Request", "streams"): ([1, messages.STREAMS_MAX], [0, messages.STREAMS_MAX + 1, 1.5, None]),
    ("Request", "pace_bytes_per_s"): (
        [0, messages.PACE_BYTES_PER_S_MAX],
        [-1, messages.PACE_BYTES_PER_S_MAX + 1, 1.5, None],
    ),
    ("Grant", "transfer"): (TRANSFER, [-1, 1 << 62]),
    ("Grant", "sequence"): ([0], [-1]),
    ("Grant", "chunks"): CHUNKS,
    ("Refuse", "transfer"): (TRANSFER, [-1, 1 << 62]),
    ("Refuse", "reason"): (list(typing.get_args(messages.RefusalReason)), ["because", ""]),
    ("Refuse", "retry_s"): ([0, 3600], [-0.1, 3600.1, "1"]),
    ("Cancel", "transfer"): (TRANSFER, [-1, 1 << 62]),
    ("Bye", "reason"): (TEXT, ["x" * 257]),
}


def named(kind: str, field: str, value: Any) -> bytes:
    """The golden message of a type, with one field changed."""
    golden = next(text for message, text in GOLDEN.items() if type(message).__name__ == kind)
    return json.dumps(json.loads(golden) | {field: value}).encode()


def cases(which: int) -> list[tuple[str, str, Any]]:
    return [(kind, field, value) for (kind, field), bounds in BOUNDS.items() for value in bounds[which]]


@pytest.mark.parametrize(("message", "text"), GOLDEN.items(), ids=lambda value: type(value).__name__)
def test_does_the_encoding_stay_what_it_was(message: Message, text: str) -> None:
    assert encode(message) == text.encode()
    assert decode(text.encode()) == message


def test_is_every_message_in_the_golden_table() -> None:
    assert {type(message) for message in GOLDEN} == set(typing.get_args(messages.AnyMessage))


def test_is_every_field_in_the_table_of_bounds() -> None:
    shared = {"digest", "artifacts"}  # of the same types everywhere, tried once
    fields = {(type(m).__name__, field) for m in GOLDEN for field in m.__struct_fields__ if field not in shared}
    assert fields == {case for case in BOUNDS if case[1] not in shared}


@pytest.mark.parametrize(("kind", "field", "value"), cases(0), ids=lambda value: str(value)[:20])
def test_is_a_value_at_the_limit_accepted(kind: str, field: str, value: Any) -> None:
    message = decode(named(kind, field, value))
    assert decode(encode(message)) == message


@pytest.mark.parametrize(("kind", "field", "value"), cases(1), ids=lambda value: str(value)[:20])
def test_is_a_value_beyond_the_limit_refused(kind: str, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(named(kind, field, value))


@pytest.mark.parametrize("message", GOLDEN, ids=lambda message: type(message).__name__)
def test_is_a_missing_or_unknown_field_refused(message: Message) -> None:
    whole = json.loads(encode(message))
    for field in whole:
        with pytest.raises(ValueError, match=r"."):
            decode(json.dumps({name: value for name, value in whole.items() if name != field}).encode())
    with pytest.raises(ValueError, match="more"):
        decode(json.dumps(whole | {"more": 1}).encode())


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"type":"Shout"}',
        b'{"type":1}',
        b"[" * 100_000,
        b'{"type":' * 100_000,
    ],
    ids=lambda frame: repr(frame[:12]),
)
def test_is_something_else_refused(frame: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(frame)


def test_is_a_frame_beyond_the_limit_refused_unread() -> None:
    padding = messages.FRAME_BYTES_MAX - len(encode(messages.Bye("")))
    assert decode(encode(messages.Bye("")) + b" " * padding) == messages.Bye("")
    with pytest.raises(ValueError, match="at most"):
        decode(encode(messages.Bye("")) + b" " * (padding + 1))


def test_does_an_origin_travel() -> None:
    reply = messages.OriginReply(DIGEST, Origin(str(ORIGIN["commit"]), {"a": "01" * 20}))
    assert decode(encode(reply)) == reply


@given(st.binary(max_size=100))
def test_does_garbage_only_ever_raise_value_error(frame: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(frame)


@given(st.sampled_from(list(GOLDEN.values())), st.integers(0), st.integers(0, 255))
def test_does_a_garbled_message_only_ever_raise_value_error(text: str, position: int, byte: int) -> None:
    frame = bytearray(text.encode())
    frame[position % len(frame)] = byte
    try:
        message = decode(bytes(frame))
    except ValueError:
        return
    assert decode(encode(message)) == message


def test_is_a_greeting_of_another_version_told_from_garbage() -> None:
    with pytest.raises(messages.OtherProtocol) as caught:
        messages.decode(b'{"type":"Hello","protocol":7,"software":"9.9","novelty":[1]}')
    assert (caught.value.protocol, caught.value.software) == (7, "9.9")
    with pytest.raises(ValueError, match="novelty") as broken:
        messages.decode(b'{"type":"Hello","protocol":%d,"software":"9.9","novelty":[1]}' % messages.PROTOCOL)
    assert not isinstance(broken.value, messages.OtherProtocol)


def test_are_control_characters_kept_away_from_terminals() -> None:
    with pytest.raises(ValueError, match="regex"):
        messages.decode(b'{"type":"Bye","reason":"\\u001b[2J"}')


def test_do_messages_share_frames_in_order() -> None:
    several = [messages.Cancel(number) for number in range(3)]
    (frame,) = messages.pack(several)
    assert frame == b"\n".join(map(encode, several))
    assert list(messages.unpack(frame)) == several
    assert list(messages.pack([])) == []


def test_are_packed_frames_bounded_in_messages_and_bytes() -> None:
    many = [messages.Cancel(number) for number in range(messages.FRAME_MESSAGES_MAX + 1)]
    assert [len(messages.unpack(frame)) for frame in messages.pack(many)] == [messages.FRAME_MESSAGES_MAX, 1]
    large = [messages.ManifestPart(DIGEST, 1 << 20, 0, bytes(size)) for size in (10, 30_000, 30_000, 256 << 10, 10)]
    frames = list(messages.pack(large))
    assert [len(messages.unpack(frame)) for frame in frames] == [2, 1, 1, 1]
    assert [message for frame in frames for message in messages.unpack(frame)] == large


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"\n", "0 messages"),
        (b"\n".join([encode(messages.Cancel(1))] * (messages.FRAME_MESSAGES_MAX + 1)), "257 messages"),
        (b" ".join([encode(messages.Cancel(1))] * 400) + b"\n", "400 messages"),
        (encode(messages.Cancel(1)) + b'\n{"type":"Shout"}', "Shout"),
        (encode(messages.Cancel(1)) + b"\n\xff", "."),
        (encode(messages.Cancel(1)) + b"\n" + b"[" * 100_000, "."),
        (encode(messages.Cancel(1)) + b"\n" * messages.FRAME_BYTES_MAX, "at most"),
    ],
    ids=["none", "too many", "too many on a line", "unknown", "not text", "deep", "too large"],
)
def test_is_a_frame_of_several_refused_whole(frame: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        messages.unpack(frame)


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_does_garbage_in_lines_only_ever_raise_value_error(one: bytes, other: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        messages.unpack(one + b"\n" + other)
