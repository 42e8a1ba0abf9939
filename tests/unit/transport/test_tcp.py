"""What can a peer on the wire do to the TCP plane? Contracts between honest ends are in tests/conformance."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import socket
import sys
import tempfile
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from swarm.errors import SettingsError, SourceChanged, TransportError
from swarm.net.listener import Listener
from swarm.security.certificates import LEAF_LIFE_S, Identity
from swarm.security.cluster_key import ClusterKey, Keyring
from swarm.store import FileSpan, Span
from swarm.transport import Inbound, Transfer, tcp, tcp_inbound
from swarm.transport.streams import InboundStreams, OutboundStreams
from swarm.transport.tcp import ACCEPTED, MAGIC, UNKNOWN_TOKEN, WRONG_VERSION, TcpTransport, preamble_of
from swarm.transport.tcp_session import ABORT, DATA, END, FRAME_BYTES_MAX, HEADER

DEADLINE_S = 20.0
TOKEN = "0123456789abcdef" * 2


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    asyncio.run(within_deadline())


async def _hang_up(sock: socket.socket) -> None:
    sock.close()


@contextlib.asynccontextmanager
async def node(
    identity: Identity | None = None, kind: type[TcpTransport] = TcpTransport
) -> AsyncIterator[TcpTransport]:
    listener = await Listener.open("127.0.0.1", 0)
    transport = kind(*listener.address, identity=identity)
    listener.serve({transport.opening: transport.adopt}, _hang_up)
    try:
        yield transport
    finally:
        await transport.close()
        await listener.close()


class FakeHolder:
    """The far end of an asker's session, played by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def frame(self, number: int, kind: int, payload: bytes = b"") -> None:
        await self.say(HEADER.pack(number, len(payload), kind) + payload)


@contextlib.asynccontextmanager
async def fake_holder(verdict: bytes = ACCEPTED) -> AsyncIterator[tuple[FakeHolder, TcpTransport, str]]:
    """A holder that waits for one preamble and answers with `verdict`."""
    asker = TcpTransport("127.0.0.1", 1)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as placeholder:
        server.setblocking(False)
        holder = FakeHolder(placeholder)

        async def greet() -> None:
            loop = asyncio.get_running_loop()
            holder.sock, _ = await loop.sock_accept(server)
            preamble = await loop.sock_recv(holder.sock, 100)
            assert preamble == preamble_of(bytes.fromhex(TOKEN), 1)
            if verdict:
                await holder.say(verdict)
            else:
                holder.sock.close()

        greeting = asyncio.create_task(greet())
        try:
            yield holder, asker, f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            await greeting
            holder.sock.close()
            await asker.close()


@contextlib.asynccontextmanager
async def asking(size: int = 10) -> AsyncIterator[tuple[FakeHolder, Inbound, asyncio.Task[None], bytearray]]:
    """An asker that has posted transfer 1 of `size` bytes."""
    async with fake_holder() as (holder, asker, address):
        inbound = await asker.connect(address, TOKEN, timeout_s=5)
        buffer = bytearray(size)
        receiving = asyncio.create_task(
            inbound.receive(Transfer(1, size, idle_timeout_s=10), iter([memoryview(buffer)]))
        )
        await asyncio.sleep(0)
        try:
            yield holder, inbound, receiving, buffer
        finally:
            await inbound.close()
            await asyncio.wait({receiving})
            receiving.exception()


@pytest.mark.parametrize(
    ("garbage", "why"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "frame of kind"),
        (HEADER.pack(1, 10, 0), "frame of kind 0"),
        (HEADER.pack(1, 10, 4), "frame of kind 4"),
        (HEADER.pack(1, 0, DATA), "with 0 bytes"),
        (HEADER.pack(1, FRAME_BYTES_MAX + 1, DATA), "frame of kind"),
        (HEADER.pack(1, 1, END), "frame of kind"),
        (HEADER.pack(1, 1, ABORT), "frame of kind"),
        (HEADER.pack(1, 5, DATA) + b"12345" + HEADER.pack(2, 1, DATA), "within transfer 1"),
        (HEADER.pack(1, 5, DATA) + b"12345" + HEADER.pack(2, 0, END), "within transfer 1"),
    ],
)
def test_does_a_broken_frame_end_the_session(garbage: bytes, why: str) -> None:
    async def scenario() -> None:
        async with asking() as (holder, inbound, receiving, _):
            await holder.say(garbage)
            with pytest.raises(TransportError, match=why):
                await receiving
            assert not inbound.alive

    run(scenario)


def test_does_an_unwanted_transfer_end_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_inbound, "UNPOSTED_WAIT_S", 0.1)

    async def scenario() -> None:
        async with asking() as (holder, inbound, receiving, _):
            await holder.frame(7, DATA, b"x")
            with pytest.raises(TransportError, match="was not requested"):
                await receiving
            assert not inbound.alive

    run(scenario)


def unread_bytes(inbound: Inbound) -> int:
    assert isinstance(inbound, InboundStreams)
    (session,) = inbound._streams
    assert isinstance(session, tcp_inbound.TcpInbound)
    return int.from_bytes(fcntl.ioctl(session._sock.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("split", range(1, HEADER.size * 2 + 10, 5))
def test_does_it_matter_where_the_stream_is_cut(split: int) -> None:
    stream = HEADER.pack(1, 10, DATA) + b"0123456789" + HEADER.pack(1, 0, END)

    async def scenario() -> None:
        async with asking() as (holder, inbound, receiving, buffer):
            await holder.say(stream[:split])
            while unread_bytes(inbound):  # noqa: ASYNC110 - the scenario has a deadline
                await asyncio.sleep(0.001)
            await holder.say(stream[split:])
            await receiving
            assert buffer == b"0123456789"

    run(scenario)


@pytest.mark.parametrize("payload", [b"short", b"far too long"])
def test_does_a_wrong_amount_fail_the_transfer_and_keep_the_session(payload: bytes) -> None:
    async def scenario() -> None:
        async with asking() as (holder, inbound, receiving, _):
            await holder.frame(1, DATA, payload)
            await holder.frame(1, END)
            with pytest.raises(TransportError, match="the peer sen"):
                await receiving
            assert inbound.alive
            again = asyncio.create_task(inbound.receive(Transfer(2, 0, 10), iter([])))
            await holder.frame(2, END)
            await again

    run(scenario)


def test_does_a_hang_up_within_a_header_fail_what_is_posted() -> None:
    async def scenario() -> None:
        async with asking() as (holder, inbound, receiving, _):
            await holder.say(HEADER.pack(1, 10, DATA)[:5])
            holder.sock.close()
            with pytest.raises(TransportError, match="closed"):
                await receiving
            assert not inbound.alive

    run(scenario)


def test_is_a_hang_up_noticed_while_nothing_is_posted() -> None:
    async def scenario() -> None:
        async with fake_holder() as (holder, asker, address):
            inbound = await asker.connect(address, TOKEN, timeout_s=5)
            holder.sock.close()
            while inbound.alive:  # noqa: ASYNC110 - the scenario has a deadline
                await asyncio.sleep(0.005)

    run(scenario)


@pytest.mark.parametrize(
    ("verdict", "why"),
    [(UNKNOWN_TOKEN, "token"), (WRONG_VERSION, "version"), (b"\x77", "unknown verdict"), (b"", "closed")],
)
def test_is_a_refusal_told_apart(verdict: bytes, why: str) -> None:
    async def scenario() -> None:
        async with fake_holder(verdict) as (_, asker, address):
            with pytest.raises(TransportError, match=why):
                await asker.connect(address, TOKEN, timeout_s=5)

    run(scenario)


def test_does_connect_keep_its_deadline() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            asker = TcpTransport("127.0.0.1", 1)
            with pytest.raises(TransportError, match="no answer"):
                await asker.connect(f"127.0.0.1:{silent.getsockname()[1]}", TOKEN, timeout_s=0.1)
            await asker.close()

    run(scenario)


async def answer_to(transport: TcpTransport, preamble: bytes) -> bytes:
    host, port = transport.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(preamble)
    answer = await reader.read(1)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return answer


def test_what_does_a_holder_answer_to_preambles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "PREAMBLE_TIMEOUT_S", 0.2)
    good = preamble_of(bytes.fromhex(TOKEN), 1)

    async def scenario() -> None:
        async with node() as holder:
            assert await answer_to(holder, good) == UNKNOWN_TOKEN
            holder.admit(TOKEN)
            assert await answer_to(holder, good) == ACCEPTED
            assert await answer_to(holder, good) == UNKNOWN_TOKEN  # somebody who listened plays it again
            assert await answer_to(holder, preamble_of(bytes.fromhex(TOKEN), 7)) == ACCEPTED
            assert await answer_to(holder, preamble_of(bytes.fromhex(TOKEN), 6)) == UNKNOWN_TOKEN
            assert await answer_to(holder, MAGIC + b"\x01" + bytes.fromhex(TOKEN)) == WRONG_VERSION  # as it was once
            assert await answer_to(holder, good[:-1] + b"x") == UNKNOWN_TOKEN
            assert await answer_to(holder, MAGIC + b"\x63" + good[5:]) == WRONG_VERSION
            assert await answer_to(holder, good[:-1]) == b""

    run(scenario)


class OtherKind(TcpTransport):
    scheme = "other"
    magic = b"SWRX"


def test_does_a_proof_of_one_kind_open_no_other() -> None:
    token = bytes.fromhex(TOKEN)

    async def scenario() -> None:
        async with node(kind=OtherKind) as holder:
            holder.admit(TOKEN)
            assert (holder.scheme, holder.opening) == ("other", b"SWRX")
            assert await answer_to(holder, b"SWRX" + preamble_of(token, 1)[4:]) == UNKNOWN_TOKEN
            assert await answer_to(holder, preamble_of(token, 1, magic=b"SWRX")) == ACCEPTED

    run(scenario)


def test_does_an_asker_that_talks_lose_its_session() -> None:
    async def scenario() -> None:
        async with node() as holder:
            holder.admit(TOKEN)
            host, port = holder.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(preamble_of(bytes.fromhex(TOKEN), 1))
            assert await reader.read(1) == ACCEPTED
            outbound = await holder.accept(TOKEN, timeout_s=5)
            writer.write(b"may I have more?")
            with contextlib.suppress(ConnectionError):
                assert await reader.read(1) == b""
            assert isinstance(outbound, OutboundStreams)
            assert not outbound.alive
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    run(scenario)


def test_is_an_asker_that_does_not_read_given_up() -> None:
    async def scenario() -> None:
        async with node() as holder:
            holder.admit(TOKEN)
            host, port = holder.address.split(":")
            with socket.socket() as mute:
                mute.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(mute, (host, int(port)))
                await loop.sock_sendall(mute, preamble_of(bytes.fromhex(TOKEN), 1))
                outbound = await holder.accept(TOKEN, timeout_s=5)
                size = 64 << 20
                with pytest.raises(TransportError, match="did not read"):
                    await outbound.send(Transfer(1, size, idle_timeout_s=0.5), iter([memoryview(bytes(size))]))
                assert isinstance(outbound, OutboundStreams)
                assert not outbound.alive

    run(scenario)


def test_does_a_file_that_shrinks_end_the_session_with_its_name() -> None:
    async def scenario() -> None:
        async with node() as holder, node() as asker:
            token = secrets.token_hex(16)
            holder.admit(token)
            inbound = await asker.connect(holder.address, token, timeout_s=5)
            outbound = await holder.accept(token, timeout_s=5)
            with tempfile.NamedTemporaryFile() as file:
                file.truncate(1000)
                transfer = Transfer(1, 2000, 10)
                receiving = asyncio.create_task(inbound.receive(transfer, iter([memoryview(bytearray(2000))])))
                with pytest.raises(SourceChanged, match=os.path.basename(file.name)):
                    await outbound.send(transfer, iter([FileSpan(file.fileno(), 0, 2000)]))
                with pytest.raises(TransportError):
                    await receiving

    run(scenario)


def test_are_old_sessions_of_a_token_replaced() -> None:
    async def scenario() -> None:
        async with node() as holder, node() as asker:
            holder.admit(TOKEN)
            sessions = [await asker.connect(holder.address, TOKEN, timeout_s=5) for _ in range(3)]
            while sessions[0].alive:  # noqa: ASYNC110 - the scenario has a deadline
                await asyncio.sleep(0.005)
            assert sessions[1].alive
            assert sessions[2].alive

    run(scenario)


def test_does_a_sender_wait_only_for_its_turn_when_closed() -> None:
    taken: list[int] = []

    class Never:
        slice_bytes = 1000

        def take(self, size: int) -> float:
            taken.append(size)
            return 3600.0

    def spans() -> Iterator[Span]:
        yield memoryview(bytes(2000))

    async def scenario() -> None:
        listener = await Listener.open("127.0.0.1", 0)
        holder = TcpTransport(*listener.address, pace=Never())
        listener.serve({MAGIC: holder.adopt}, _hang_up)
        async with node() as asker:
            holder.admit(TOKEN)
            await asker.connect(holder.address, TOKEN, timeout_s=5)
            outbound = await holder.accept(TOKEN, timeout_s=5)
            sending = asyncio.create_task(outbound.send(Transfer(1, 2000, 10), spans()))
            while not taken:  # noqa: ASYNC110 - the scenario has a deadline
                await asyncio.sleep(0.005)
            await holder.close()
            with pytest.raises(TransportError):
                await sending
        await listener.close()

    run(scenario)


@pytest.mark.parametrize(
    ("address", "reachable"),
    [
        ("10.0.0.1:5000", True),
        ("node-3.local:1", True),
        ("[fe80::1]:65535", True),
        ("fe80::1:5000", False),
        ("10.0.0.1", False),
        ("10.0.0.1:0", False),
        ("10.0.0.1:65536", False),
        ("10.0.0.1:9" + "9" * 5000, False),
        (":5000", False),
        ("10.0.0.1:+5", False),
        ("10.0.0.1:\u0665", False),
        ("inproc://x/1", False),
        ("", False),
    ],
)
def test_which_addresses_look_reachable(address: str, *, reachable: bool) -> None:
    async def scenario() -> None:
        transport = TcpTransport("fe80::9", 7)
        assert transport.reach(address) is reachable
        assert transport.address == "[fe80::9]:7"
        await transport.close()

    run(scenario)


def test_is_an_unknown_congestion_control_a_settings_error() -> None:
    async def scenario() -> None:
        async with node() as holder:
            asker = TcpTransport("127.0.0.1", 1, congestion="no-such-thing")
            with pytest.raises(SettingsError, match="no-such-thing"):
                await asker.connect(holder.address, TOKEN, timeout_s=5)
            await asker.close()

    run(scenario)


def test_does_a_node_that_listens_on_loopback_dial_other_machines() -> None:
    """A newcomer downloads over sessions that it opens, whatever it listens on."""

    async def scenario() -> None:
        transport = TcpTransport("127.0.0.1", 7)
        assert all(transport.reach(a) for a in ("127.0.0.1:9", "[::1]:9", "10.0.0.1:9", "other.example:9"))
        assert not any(transport.reach(a) for a in ("", "nowhere", "gpu:0"))
        await transport.close()

    run(scenario)


def member(*keys: bytes, late_s: float = 0.0) -> Identity:
    return Identity(Keyring(tuple(ClusterKey(key * 32) for key in keys)), "a" * 16, now_s=time.time() - late_s)


@pytest.mark.parametrize(
    ("holder", "asker", "says"),
    [
        (member(b"1"), member(b"2"), "has another cluster key"),
        (member(b"1"), member(b"2", b"1"), "does not accept this node's key"),
        (member(b"1"), member(b"1", late_s=2 * LEAF_LIFE_S), "compare the clocks"),
        (member(b"1", late_s=2 * LEAF_LIFE_S), member(b"1"), "compare the clocks"),
        (None, member(b"1"), "hung up|reset"),
        (member(b"1"), None, "verdict|reset"),
    ],
)
def test_is_a_session_between_clusters_refused(holder: Identity | None, asker: Identity | None, says: str) -> None:
    async def scenario() -> None:
        async with node(holder) as target, node(asker) as end:
            target.admit(TOKEN)
            with pytest.raises(TransportError, match=says):
                await end.connect(target.address, TOKEN, timeout_s=5)

    run(scenario)


def test_is_a_member_without_a_token_refused() -> None:
    async def scenario() -> None:
        async with node(member(b"1")) as holder, node(member(b"1")) as asker:
            with pytest.raises(TransportError, match="token"):
                await asker.connect(holder.address, TOKEN, timeout_s=5)

    run(scenario)


def test_does_a_session_inside_tls_show_neither_token_nor_weights() -> None:
    """Read by whoever forwards it."""
    seen = bytearray()

    async def scenario() -> None:
        async with node(member(b"1")) as holder, node(member(b"1")) as asker:
            holder.admit(TOKEN)
            host, port = holder.address.split(":")

            async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                with contextlib.suppress(ConnectionError):
                    while data := await reader.read(1 << 16):
                        seen.extend(data)
                        writer.write(data)
                    writer.close()

            async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                theirs, ours = await asyncio.open_connection(host, int(port))
                await asyncio.gather(forward(reader, ours), forward(theirs, writer))

            async with await asyncio.start_server(between, "127.0.0.1", 0) as server:
                address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
                inbound = await asker.connect(address, TOKEN, timeout_s=5)
                outbound = await holder.accept(TOKEN, timeout_s=5)
                secret, room = b"weights!" * 1000, bytearray(8000)
                transfer = Transfer(1, 8000, 5.0)
                await asyncio.gather(
                    inbound.receive(transfer, iter([memoryview(room)])),
                    outbound.send(transfer, iter([memoryview(secret)])),
                )
                assert room == secret
                await asyncio.gather(inbound.close(), holder.revoke(TOKEN))

    run(scenario)
    assert len(seen) > 8000
    assert b"weights!" not in seen
    assert bytes.fromhex(TOKEN) not in seen
