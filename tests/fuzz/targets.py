"""Each decoder of peer bytes, what it may raise, and what must be true of what it accepts."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import random
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from unittest import mock

import msgspec
import torch
from conformance.fake_gpu import FakeGpu

from swarm import journal
from swarm.cli import replay
from swarm.content import manifest, safetensors_header
from swarm.content.bitfield import Bitfield
from swarm.content.manifest import ChunkEntry, Digest, FileEntry, HashScheme, Manifest, ModelId
from swarm.dashboard import member_report
from swarm.dashboard.collector import MemberAnswer
from swarm.dashboard.replay_server import ReplayServer
from swarm.dashboard.swarm_view import SwarmView
from swarm.errors import ManifestInvalid, SettingsError, StoreError, TransportError
from swarm.membership import config
from swarm.membership.swim import Swim
from swarm.membership.swim_events import PacketReceived
from swarm.observe import trace
from swarm.observe.fetch_record import FetchRecords
from swarm.protocol import messages, packets
from swarm.protocol.messages import Address, Announcement, Endpoint, NodeId, Origin
from swarm.protocol.packets import Ack, Holding, Ping, PingRequest, Profile, Record, State, Status, Sync, SyncReply
from swarm.security import record_seal
from swarm.security.datagram_seal import Opener, Sealer, SealKey
from swarm.settings import join_address, split_address
from swarm.store import View, cuda
from swarm.store.cuda import CudaError
from swarm.transfer import download_events
from swarm.transport import Transfer, cuda_ipc, paired, tcp_inbound, torch_distributed
from swarm.transport.byte_stream import ByteStream, PlainStream
from swarm.transport.sealed_stream import SealedStream
from swarm.transport.tcp import TcpTransport, preamble_of
from swarm.transport.tcp_inbound import TcpInbound
from swarm.transport.tcp_session import ABORT, DATA, END, HEADER

from .file_targets import FILE_TARGETS
from .target import Target

ORG_MODEL = ModelId("org/model")

NOW = 1_800_000_000.0
ME, ANN, BEN = NodeId("0" * 16), NodeId("1" * 16), NodeId("f" * 16)
DIGEST, TOKEN = Digest("ab" * 32), "0123456789abcdef" * 2
PREAMBLE = preamble_of(bytes.fromhex(TOKEN), 1)
DEADLINE_S = 20.0
WANTED = 40, 8  # bytes of the transfers that a holder was asked for


def _messages() -> list[bytes]:
    offers = (Endpoint("tcp", messages.AT_NODE), Endpoint("inproc", "inproc://ab/0"))
    part = messages.HeldPart("ab" * 8, 1, 2)
    artifacts = (Announcement(ORG_MODEL, DIGEST, "checkpoint", 1 << 40, 3, 80, False, part),)
    signature = messages.Signature(ORG_MODEL, "v1", "d" * 64, "e" * 128)
    said = (
        messages.Hello(
            messages.PROTOCOL, "0.1.0", ANN, "node", 7000, (Address("10.0.0.1:7000"),), TOKEN, offers, artifacts
        ),
        messages.Announce(artifacts, leaving=True),
        messages.Members(((Address("10.0.0.1:7000"), Address("[::1]:7000")), ())),
        messages.ManifestRequest(DIGEST),
        messages.ManifestPart(DIGEST, 100, 10, b"some of it"),
        messages.OriginRequest(DIGEST),
        messages.OriginReply(
            DIGEST, Origin("a" * 40, {"config.json": "b" * 40}, ("main",), {"README.md": b"# model"}, (signature,))
        ),
        messages.ChunkClaims(DIGEST, (messages.ClaimedRun(0, ANN, b"\x01" * 96),)),
        messages.OriginReading(DIGEST, True, ((0, 2), (5, 1))),
        messages.Interest(DIGEST, b"\xf0", b"\x30"),
        messages.Holdings(DIGEST, b"\xf0\x80"),
        messages.Have(DIGEST, ((0, 2), (5, 1))),
        messages.Request("tcp", DIGEST, 7, (1, 2, 3), 0, False, 1, 0, 1),
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
    held = Holding(ORG_MODEL, DIGEST, "checkpoint", 40, 80, False, messages.HeldPart("ab" * 8, 1, 2))
    ann = Record(
        ANN,
        1,
        State.ALIVE,
        2,
        "ann",
        (Address("10.0.0.1:7000"), Address("[fd00::1]:7000")),
        Profile((held,), 1, ("tcp",), "host", "rack", 1, 8, "0.1.0"),
    )
    own = Record(ME, 0, State.ALIVE, 0, "me", (Address("10.0.0.9:7000"),), Profile())
    return [
        packets.encode(packet)
        for packet in (
            Ping(1, ANN, ME, (ann, Status(BEN, 1, State.SUSPECT, 2))),
            PingRequest(1, ANN, BEN, ()),
            Ack(1, ANN, (Status(ME, 1, State.DEAD, 2),)),
            packets.Gossip(ANN, (ann, own)),
            Sync(1, ann, ME, BEN, (Status(BEN, 1, State.ALIVE, 2),)),
            SyncReply(1, ANN, (ann,), (NodeId(ME), NodeId(BEN)), BEN),
        )
    ]


def feed_gossip(data: bytes) -> bool:
    """A datagram, and its effect on a machine."""
    try:
        packet = packets.decode(data)
    except ValueError:
        return False
    assert packets.decode(packets.encode(packet)) == packet
    machine = Swim(ME, (Address("10.0.0.9:7000"),), name="me", config=config.lan(), now=NOW, rng=random.Random(1))
    for event in (PacketReceived(Address("10.0.0.1:7000"), packet),) * 2:
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
    pinnable = (FileEntry("config.json", 4, "", (ChunkEntry(4, "01" * 16),), blake3=("01" * 32,)),)
    made.append(Manifest(1, "checkpoint", "", HashScheme(), 1 << 10, pinnable))
    listed = (
        FileEntry("config.json", 6, "", (), content="git-sha1:" + "b" * 40),
        FileEntry("model.safetensors", 5000, "", (), content="sha256:" + "a" * 64),
    )
    made.append(Manifest(1, "promised", "", HashScheme(), 1 << 10, listed))
    return [each.encoded for each in made]


def feed_manifest(data: bytes) -> bool:
    """A manifest whose digest a peer announced, so that the manifest may be malicious."""
    try:
        found = manifest.decode(data, digest=Digest(hashlib.sha256(data).hexdigest()))
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
    assert host.encode("idna")  # as getaddrinfo does
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
    """The bytes of a holder in a session, which then ends: transfers of 40 and of 8 bytes are posted."""
    return _runner.run(_receive(data, TcpInbound, *map(_room, WANTED)))


def _room(size: int) -> Iterator[View]:
    return iter([memoryview(bytearray(size))])


async def _receive(data: bytes, ask: Callable[..., TcpInbound], *rooms: Iterator[View]) -> bool:
    ours, theirs = socket.socketpair()
    bugs: list[BaseException] = []  # an unexpected error ends a session and is reported to the loop
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: bugs.append(context["exception"]))
    with theirs, mock.patch.object(tcp_inbound, "UNPOSTED_WAIT_S", 0.0):
        async with asyncio.timeout(DEADLINE_S):
            session = ask(PlainStream(ours), peer="fuzz", pool=_pool)
            waiting = [
                asyncio.ensure_future(session.receive(Transfer(number, size, 5.0), views))
                for number, (size, views) in enumerate(zip(WANTED, rooms, strict=True), 1)
            ]
            await asyncio.sleep(0)
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            await session.close()
    for outcome in (*bugs, *outcomes):
        if isinstance(outcome, BaseException) and not isinstance(outcome, TransportError):
            raise outcome
    return None in outcomes


HANDLE = bytes(range(cuda.HANDLE_BYTES))  # of the holder's allocation
LENT = bytes(range(64))


_RECORDS_SECRET = b"s" * 32
_RECORDS_CLEAR = [b"frame header 16b", b"weights" * 40, b"x", b"frame header 16b"]


def _records() -> bytes:
    sealer, wire = record_seal.RecordSealer(_RECORDS_SECRET), b""
    for clear in _RECORDS_CLEAR:
        room = memoryview(bytearray(len(clear) + record_seal.OVERHEAD_BYTES))
        sealer.seal(memoryview(clear), room)
        wire += bytes(room)
    return wire


def feed_records(data: bytes) -> bool:
    """Sealed records, as their asker opens them: it reads what was sealed, in order from the begin, or nothing."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(data)
    stream = SealedStream(PlainStream(theirs), b"", opens=_RECORDS_SECRET)
    room, read = memoryview(bytearray(50)), b""
    try:
        while got := stream.recv_into(room):
            read += bytes(room[:got])
    except TransportError:
        return False
    finally:
        stream.close()
        whole = b"".join(_RECORDS_CLEAR)
        assert read == whole[: len(read)]
    return read == whole


def _regions() -> list[bytes]:
    def frame(transfer: int, kind: int, payload: bytes = b"") -> bytes:
        return HEADER.pack(transfer, len(payload), kind) + payload

    first = frame(1, cuda_ipc.REGION, cuda_ipc.FRAME.pack(HANDLE, 24, 30)) + frame(1, DATA, b"y" * 10) + frame(1, END)
    second = frame(2, cuda_ipc.REGION, cuda_ipc.FRAME.pack(HANDLE, 0, 8)) + frame(2, END)
    return [first + second, frame(1, cuda_ipc.REGION, cuda_ipc.FRAME.pack(HANDLE, 0, 64)) + frame(1, ABORT) + second]


def feed_regions(data: bytes) -> bool:
    """As `feed_frames`, of a holder on this host: the first transfer is wanted in a GPU's memory."""
    gpu = _LendingGpu()
    target = torch.zeros(WANTED[0], dtype=torch.uint8)

    def first() -> Iterator[View]:
        yield gpu.own(target)
        gpu.current().synchronize()

    with gpu.in_place_of_cuda():
        return _runner.run(_receive(data, _Reading, first(), _room(WANTED[1])))


class _Reading(cuda_ipc.CudaIpcInbound):
    def __init__(self, sock: ByteStream, *, peer: str, pool: ThreadPoolExecutor) -> None:
        super().__init__(sock, peer=peer, pool=pool)
        self.refused = lambda why: None  # not logged


class _LendingGpu(FakeGpu):
    """Reads nothing that was not lent."""

    def __init__(self) -> None:
        super().__init__()
        self._lent = self.own(torch.tensor(list(LENT), dtype=torch.uint8))

    def open(self, handle: bytes) -> int:
        if handle != HANDLE:
            raise CudaError("no such handle")
        self.opened.append(self._lent.address)
        return self._lent.address

    def copy(self, target: int, source: int, size: int, *, stream: int) -> None:
        from_lent = 0 <= source - self._lent.address < len(LENT)
        assert size <= (self._lent.address + len(LENT) - source if from_lent else max(WANTED))
        super().copy(target, source, size, stream=stream)


def _pieces() -> list[bytes]:
    def frame(transfer: int, kind: int, *sizes: int) -> bytes:
        return HEADER.pack(transfer, 4 * len(sizes), kind) + struct.pack(f">{len(sizes)}I", *sizes)

    pieces = paired.PIECES
    first = frame(1, pieces, 10, 20) + frame(1, pieces, 10) + frame(1, END)
    second = frame(2, pieces, 8) + frame(2, END)
    return [
        first + second,
        frame(1, pieces, 40, 40) + frame(1, ABORT) + second,
        frame(2, pieces, 3, 5) + frame(2, END) + first,
    ]


def feed_pieces(data: bytes) -> bool:
    """As `feed_frames`, where bytes come over a lane."""
    return _runner.run(_receive(data, functools.partial(paired.PairedInbound, lane=_Lane()), *map(_room, WANTED)))


class _Lane:
    """Receives the announced pieces, up to a limit."""

    on_device = False
    most = 2 * paired.HOST_PIECE_BYTES_MAX

    def begin(self) -> None: ...

    def send(self, view: View, *, timeout_s: float) -> None:
        raise NotImplementedError

    def receive(self, view: View, *, timeout_s: float) -> None:
        self.most -= view.nbytes
        if self.most < 0:
            raise TransportError("the other end did not call")

    def end(self, *, timeout_s: float) -> paired.Done:
        return paired.at_once

    def flush(self) -> None: ...

    def puts_off(self) -> bool:
        return False

    def abandon(self) -> None: ...

    def scratch(self, size: int) -> View:
        assert size <= paired.HOST_PIECE_BYTES_MAX
        return memoryview(bytearray(size))

    def close(self) -> None: ...


def _stored() -> list[bytes]:
    def value(key: bytes, data: bytes) -> bytes:
        return torch_distributed._SIZES.pack(len(key), len(data)) + key + data

    return [value(b"other", b"x" * 9) + value(b"wanted", b"127.0.0.1:7"), value(b"wanted", b"")]


def feed_stored(data: bytes) -> bool:
    """What the other end of a pair says of itself while torch makes it."""
    ours, theirs = socket.socketpair()
    with theirs, PlainStream(ours) as stream:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        stream.block(DEADLINE_S)
        store = torch_distributed._store_class()(stream)
        try:
            store.get("wanted")
        except EOFError:
            return False
        finally:
            assert (
                sum(len(key) + len(value) for key, value in store._known.items()) <= torch_distributed.STORED_BYTES_MAX
            )
    return True


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
        except ConnectionResetError:  # unread bytes make the kernel reset the connection
            said = None
        await transport.close()
    if said is None:
        return False
    assert (said == b"\0") == data.startswith(PREAMBLE)
    assert said in (b"", b"\0", b"\1", b"\2")
    return said == b"\0"


def _reports() -> list[bytes]:
    read = {"id": BEN, "name": "origin hub", "scheme": "hf", "bytes": 9, "requests": 2, "retries": 1, "error": "429"}
    status = {"node": {"id": ME}, "members": [], "origins": [read], "transfers": [], "artifacts": []}
    bits = {DIGEST: Bitfield(77, [1, 2, 3])}
    flow = member_report.PeerFlow(DIGEST, "down", ANN, 5, 7)
    own = member_report.member_report(status, FetchRecords(), bits, NOW, place=("host", "rack"))
    busy = msgspec.structs.replace(own, flows=(flow,), peers=(member_report.KnownPeer(ANN, "ann", "10.0.0.1:7000"),))
    return [msgspec.json.encode(each) for each in (own, busy)]


def feed_report(data: bytes) -> bool:
    """The report of a member about itself, and the view that it is part of."""
    try:
        report = member_report.decode(data)
    except ValueError:
        return False
    status = {"node": {"id": BEN, "name": "ben"}, "members": [], "origins": [], "transfers": [], "artifacts": []}
    own = member_report.member_report(status, FetchRecords(), {}, NOW, place=("", ""))
    answers = {str(report.node): MemberAnswer(report, NOW)}
    view = SwarmView().view(status, own, answers, NOW)
    assert json.loads(json.dumps(view)) == view
    return True


def _traces() -> list[bytes]:
    happened = (
        journal.Opened(ME, "me", Address("10.0.0.9:7000"), "host", "rack"),
        journal.Joined(ANN, "ann", Address("10.0.0.1:7000"), "tcp"),
        journal.FetchStarted(ORG_MODEL, DIGEST, 80, 0, 8, ((0, 1),)),
        download_events.PeerJoined(ANN, Bitfield(8, [1, 2])),
        download_events.PeerHas(ANN, (3, 4)),
        download_events.Ask(ANN, 1, (1, 2), "first"),
        download_events.Granted(ANN, 1, (1, 2)),
        journal.Received(ANN, DIGEST, 1, 10),
        download_events.TransferEnded(ANN, 1),
        journal.FetchEnded(DIGEST, None),
    )
    lines = [
        json.dumps(trace.event(journal.Entry(float(number), DIGEST, event))).encode() + b"\n"
        for number, event in enumerate(happened)
    ]
    return [b"".join(lines), b"".join(lines[:5]), b"".join(lines[2:])]


def feed_trace(data: bytes) -> bool:
    """A file for `swarm replay`, which shows it as tables and as a dashboard."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.write(data)
        file.flush()
        try:
            found = replay.read(Path(file.name))
            ReplayServer(Path(file.name))
        except StoreError as error:
            said = str(error)
        else:
            json.dumps(found)
            return True
    assert said.isprintable()
    return False


TARGETS = [
    Target("messages", _messages(), feed_message, 0.302),
    Target("gossip", _packets(), feed_gossip, 0.17),
    Target("sealed", _sealed, feed_sealed, 0.09),
    Target("safetensors", _headers(), feed_header, 0.14),
    Target("manifest", _manifests(), feed_manifest, 0.12),
    Target("reports", _reports(), feed_report, 0.005),
    Target("traces", _traces(), feed_trace, 0.005),
    Target("bitfield", [b"\xf0" * 10, bytes(10), b"\xff" * 9 + b"\xf8"], feed_bitfield, 0.04),
    Target("address", [b"10.0.0.1:7000", b"[fe80::1]:7000", b"seed.swarm.svc.:80"], feed_address, 0.036),
    Target("frames", _frames(), feed_frames, 0.003),
    Target("records", [_records()], feed_records, 0.003),
    Target("regions", _regions(), feed_regions, 0.002),
    Target("pieces", _pieces(), feed_pieces, 0.001),
    Target("stored", _stored(), feed_stored, 0.002),
    Target("preamble", [PREAMBLE], feed_preamble, 0.001),
    *FILE_TARGETS,
]
