"""Each decoder of peer bytes, what it may raise, and what must be true of what it accepts."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from unittest import mock

from swarm import manifest, messages, rumours, safetensors_header, tuning
from swarm.bitfield import Bitfield
from swarm.errors import ManifestInvalid, SettingsError, TransportError
from swarm.gossip import Gossip, Heard
from swarm.manifest import ChunkEntry, FileEntry, HashScheme, Manifest
from swarm.messages import Announcement, Offer, Origin
from swarm.rumours import Ack, Claim, Holding, News, Ping, PingRequest, Profile, Record, State, Sync
from swarm.sealing import Opener, Sealer, SealKey
from swarm.settings import join_address, split_address
from swarm.transport import Transfer, tcp_session
from swarm.transport.stream import PlainStream
from swarm.transport.tcp import TcpTransport, preamble_of
from swarm.transport.tcp_session import ABORT, DATA, END, HEADER, TcpInbound

NOW = 1_800_000_000.0
ME, ANN, BEN = "0" * 16, "1" * 16, "f" * 16
DIGEST, TOKEN = "ab" * 32, "0123456789abcdef" * 2
PREAMBLE = preamble_of(bytes.fromhex(TOKEN), 1)
DEADLINE_S = 20.0


@dataclass(frozen=True)
class Target:
    """A decoder. `feed` returns whether it accepted an input, and raises for whatever it should not have done."""

    name: str
    seeds: Sequence[bytes]
    feed: Callable[[bytes], bool]
    share: float  # of all inputs: those that need sockets are slower


def _messages() -> list[bytes]:
    offers = (Offer("tcp", "10.0.0.1:7000"), Offer("inproc", "inproc://ab/0"))
    artifacts = (Announcement("org/model", DIGEST, "checkpoint", 1 << 40, 3, 80, False),)
    said = (
        messages.Hello(messages.PROTOCOL, "0.1.0", ANN, "node", "10.0.0.1:7000", TOKEN, offers, artifacts),
        messages.Announce(artifacts),
        messages.Members(("10.0.0.1:7000", "[::1]:7000")),
        messages.ManifestRequest(DIGEST),
        messages.ManifestPart(DIGEST, 100, 10, b"some of it"),
        messages.OriginRequest(DIGEST),
        messages.OriginReply(DIGEST, Origin("a" * 40, {"config.json": "b" * 40})),
        messages.Interest(DIGEST, b"\xf0"),
        messages.Holdings(DIGEST, b"\xf0\x80"),
        messages.Have(DIGEST, ((0, 2), (5, 1))),
        messages.Request("tcp", DIGEST, 7, (1, 2, 3), 0, False, 1, 0),
        messages.Grant(7, 1, (1, 2, 3)),
        messages.Refuse(7, "busy", 0.5),
        messages.Cancel(7),
        messages.Bye("shutting down"),
    )
    return [*map(messages.encode, said), *messages.pack(said[1:6]), *messages.pack(said[6:])]


def feed_message(data: bytes) -> bool:
    """A frame of a link."""
    try:
        said = messages.unpack(data)
    except ValueError:
        return False
    again = [message for frame in messages.pack(said) for message in messages.unpack(frame)]
    assert 0 < len(said) <= messages.FRAME_MESSAGES_MAX
    assert again == list(said)
    return True


def _packets() -> list[bytes]:
    held = Holding("org/model", DIGEST, "checkpoint", 40, 80, False)
    ann = Record(ANN, 1, State.ALIVE, 2, "ann", "10.0.0.1:7000", Profile((held,), 1, ("tcp",), "host", "rack", 1, 8))
    own = Record(ME, 0, State.ALIVE, 0, "me", "10.0.0.9:7000", Profile())
    return [
        rumours.encode(packet)
        for packet in (
            Ping(1, ANN, ME, (ann, Claim(BEN, 1, State.SUSPECT, 2))),
            PingRequest(1, ANN, BEN, ()),
            Ack(1, ANN, (Claim(ME, 1, State.DEAD, 2),)),
            rumours.Gossip(ANN, (ann, own)),
            Sync(1, ann, ME, BEN, (Claim(BEN, 1, State.ALIVE, 2),)),
            News(1, ANN, (ann,), (ME, BEN), BEN),
        )
    ]


def feed_gossip(data: bytes) -> bool:
    """A datagram, and what it does to the machine that is handed it."""
    try:
        packet = rumours.decode(data)
    except ValueError:
        return False
    assert rumours.decode(rumours.encode(packet)) == packet
    machine = Gossip(ME, "10.0.0.9:7000", name="me", tuning=tuning.lan(), now=NOW, rng=random.Random(1))
    for event in (Heard("10.0.0.1:7000", packet),) * 2:
        machine.handle(event, NOW)
        machine.check()
    return True


_KEY = SealKey(b"hint", bytes(32))
_sealed = [Sealer(_KEY, random.Random(n).randbytes).seal(b"packet" * n, NOW) for n in (0, 1, 20)]


def feed_sealed(data: bytes) -> bool:
    """A sealed datagram."""
    opener = Opener([_KEY])
    opened = isinstance(opener.open(data, NOW), bytes)
    assert opened == (data in _sealed)
    opener.check()
    return opened


def _headers() -> list[bytes]:
    tensors = [("a", "BF16", (2, 4), 16), ("b.weight", "F32", (), 4), ("c", "F4", (4,), 2), ("empty", "I8", (0, 3), 0)]
    composed = [safetensors_header.compose(tensors[:count], {"format": "pt"}) for count in (1, 2, 4)]
    return [len(header).to_bytes(8, "little") + header for header in (*composed, b"{}      ", b'{"__metadata__":{}}')]


def feed_header(data: bytes) -> bool:
    """A safetensors file's first bytes. The file is taken for as long as its header says, so that more is accepted."""
    try:
        end = safetensors_header.header_bytes(data[:8], subject="file", file_bytes=len(data))
        header = data[8:end]
        claimed = max((int(n) for n in _numbers(header)), default=0)
        size = end + min(claimed, 1 << 60)
        tensors, metadata = safetensors_header.parse(header, subject="file", file_bytes=size)
    except ManifestInvalid:
        return False
    assert isinstance(json.loads(header), dict)
    assert all(isinstance(text, str) for pair in metadata.items() for text in pair)
    place = end
    for tensor in tensors:
        assert tensor.offset == place
        place += tensor.size
    assert place == size
    return True


def _numbers(header: bytes) -> Iterator[bytes]:
    return (word[:30] for word in header.replace(b"]", b",").split(b",") if word.isdigit())


def _manifests() -> list[bytes]:
    (header, *_) = (data[8:] for data in _headers())
    size = 8 + len(header) + 16
    chunk = "01" * 16
    files = (
        FileEntry("config.json", 6, "", (ChunkEntry(4, chunk), ChunkEntry(2, chunk))),
        FileEntry("dir/model.safetensors", size, header.decode(), (ChunkEntry(size, chunk),)),
    )
    made = [Manifest(1, "checkpoint", "", HashScheme(), 1 << 10, files[:count]) for count in (0, 1, 2)]
    longer = (FileEntry("config.json", 4, "", (ChunkEntry(4, "01" * 32),)),)
    made.append(Manifest(1, "checkpoint", "", HashScheme("blake3"), 1 << 10, longer))
    return [each.encoded for each in made]


def feed_manifest(data: bytes) -> bool:
    """A manifest whose digest a peer announced, so that it need not be one that anybody made in good faith."""
    try:
        found = manifest.decode(data, digest=hashlib.sha256(data).hexdigest())
    except ManifestInvalid:
        return False
    assert found.encoded == data
    assert sum(chunk.size for chunk in found.chunks) == found.size == sum(file.size for file in found.files)
    for file in found.files:
        path = PurePosixPath(file.path)
        assert not path.is_absolute()
        assert not {"..", ".", ""} & set(file.path.split("/"))
        assert path.parts[0] != ".swarm"
        assert all(0 <= t.offset <= t.offset + t.size <= file.size for t in file.tensors())
    return True


def feed_bitfield(data: bytes) -> bool:
    """Holdings of 77 chunks."""
    try:
        field = Bitfield.unpack(data, 77)
    except ValueError:
        return False
    assert field.pack() == data
    assert len(field) == len(list(field)) <= field.length == 77
    return True


def feed_address(data: bytes) -> bool:
    """An address that a peer names, for itself or for others."""
    text = data.decode("utf-8", "replace")
    try:
        host, port = split_address("peer", text)
    except SettingsError:
        assert not _anywhere().reach(text)
        return False
    assert 0 < port < 1 << 16
    assert host.encode("idna")  # as whoever looks it up does
    assert _anywhere().reach(text)
    assert split_address("peer", join_address(host, port)) == (host, port)
    return True


@functools.cache
def _anywhere() -> TcpTransport:
    return TcpTransport("10.0.0.9", 7000)


def _frames() -> list[bytes]:
    def frame(transfer: int, kind: int, payload: bytes = b"") -> bytes:
        return HEADER.pack(transfer, len(payload), kind) + payload

    whole = frame(1, DATA, b"x" * 30) + frame(1, DATA, b"y" * 10) + frame(1, END)
    other = frame(2, DATA, b"z" * 8) + frame(2, END)
    return [whole + other, frame(1, DATA, b"x" * 5) + frame(1, ABORT) + other, whole]


_runner = asyncio.Runner()
_pool = ThreadPoolExecutor(1, thread_name_prefix="fuzz")


def feed_frames(data: bytes) -> bool:
    """What a holder sends over a session, which then ends: a transfer of 40 bytes and one of 8 were asked for."""
    return _runner.run(_receive(data))


async def _receive(data: bytes) -> bool:
    ours, theirs = socket.socketpair()
    with theirs, mock.patch.object(tcp_session, "UNPOSTED_WAIT_S", 0.0):
        async with asyncio.timeout(DEADLINE_S):
            session = TcpInbound(PlainStream(ours), peer="fuzz", pool=_pool)
            buffers = {1: bytearray(40), 2: bytearray(8)}
            waiting = [
                asyncio.ensure_future(session.receive(Transfer(n, len(room), 5.0), iter([memoryview(room)])))
                for n, room in buffers.items()
            ]
            await asyncio.sleep(0)
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            await session.close()
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, TransportError):
            raise outcome
    return None in outcomes


def feed_preamble(data: bytes) -> bool:
    """How an asker's connection begins."""
    return _runner.run(_adopt(data))


async def _adopt(data: bytes) -> bool:
    transport = TcpTransport("127.0.0.1", 7000)
    transport.admit(TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as theirs:
        ours, _ = server.accept()
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(DEADLINE_S):
            await transport.adopt(ours)
        try:
            said = theirs.recv(2)
        except ConnectionResetError:  # what it did not read makes the kernel forget what it said
            said = None
        await transport.close()
    if said is None:
        return False
    assert (said == b"\0") == data.startswith(PREAMBLE)
    assert said in (b"", b"\0", b"\1", b"\2")
    return said == b"\0"


TARGETS = [
    Target("messages", _messages(), feed_message, 0.34),
    Target("gossip", _packets(), feed_gossip, 0.2),
    Target("sealed", _sealed, feed_sealed, 0.12),
    Target("safetensors", _headers(), feed_header, 0.14),
    Target("manifest", _manifests(), feed_manifest, 0.12),
    Target("bitfield", [b"\xf0" * 10, bytes(10), b"\xff" * 9 + b"\xf8"], feed_bitfield, 0.04),
    Target("address", [b"10.0.0.1:7000", b"[fe80::1]:7000", b"seed.swarm.svc.:80"], feed_address, 0.036),
    Target("frames", _frames(), feed_frames, 0.003),
    Target("preamble", [PREAMBLE], feed_preamble, 0.001),
]
