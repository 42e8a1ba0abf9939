"""TCP: the transport that every node has. Owns how bulk connections are opened; `tcp_session` owns their contents.

A session is a connection to the port of the holder's listener, dialled by the asker:

    asker -> holder   | "SWRM" | version: u8 | count: u64 | beside: u64 | proof: 16 bytes |
    holder -> asker   | verdict: u8 |

The token comes from the holder's Hello, over the link; it identifies and authorizes the asker. The preamble does not
contain the token: the proof is its HMAC over the preceding bytes, and `count` grows with each connection of a link, so
an eavesdropper cannot open a session. The verdict tells a refused asker the reason, then the connection is closed. A
connection whose `beside` is not 0 joins the session whose first connection has that count (`streams`).

With an identity the scheme is "tls": "SWRT" in the clear, the TLS handshake, then as above; preamble and verdict are
followed by shares of the secret under which frames are sealed (`sealed_stream`). Transports with a way of their own to
move bytes subclass this, with a magic word of their own, which the proof covers.

Must not know: transfers, frames, links, peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

from swarm.errors import SettingsError, TransportError
from swarm.security.certificates import Identity, refusal
from swarm.security.record_seal import new_share
from swarm.settings import is_loopback, join_address, split_address
from swarm.transport import Inbound, Pace
from swarm.transport.admission import TokenTransport
from swarm.transport.byte_stream import ByteStream, PlainStream
from swarm.transport.sealed_stream import accept_sealing, ask_to_seal
from swarm.transport.streams import InboundStreams, OutboundStreams, streams_most
from swarm.transport.tcp_inbound import TcpInbound
from swarm.transport.tcp_outbound import TcpOutbound
from swarm.transport.tls_stream import TlsStream

MAGIC, TLS_MAGIC = b"SWRM", b"SWRT"
VERSION = 4
TOKEN_BYTES, PROOF_BYTES = 16, 16
COUNTS = struct.Struct(">QQ")
PREAMBLE_BYTES = len(MAGIC) + 1 + COUNTS.size + PROOF_BYTES
ACCEPTED, UNKNOWN_TOKEN, WRONG_VERSION, FULL = b"\0", b"\1", b"\2", b"\3"

PREAMBLE_TIMEOUT_S = 5.0  # one round trip is enough; a silent stranger must not keep a connection
LOOPBACK_CONGESTION = "cubic"  # bbr, some systems' default, paces and costs a quarter or more of the rate on loopback
CONNECTIONS_MAX = 128  # of all sessions of a node; beyond that none gets a connection beside its first
THREADS_MAX = CONNECTIONS_MAX  # of two pools, for askers and holders: a full pool never waits for the other

# A vanished peer is noticed after 2 + 3 * 1 = 5 s, also by the asker, which never writes.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 2, 1, 3
# Only for the asker: a holder must keep sessions whose asker waits for its disk, up to the transfer's idle timeout.
USER_TIMEOUT_MS = 4000


class TcpTransport(TokenTransport[OutboundStreams | TcpOutbound]):
    """The transport of a node whose listener is at `host`:`port` and passes connections with `opening` to `adopt`."""

    scheme = "tcp"
    magic = MAGIC  # how a preamble begins
    parallel = True  # a session may have several connections

    def __init__(
        self,
        host: str,
        port: int,
        *,
        pace: Pace | None = None,
        congestion: str | None = None,
        identity: Identity | None = None,
        streams_max: int | None = None,
    ) -> None:
        """`congestion`: name of a TCP congestion control; None: the system's, on loopback LOOPBACK_CONGESTION.
        `streams_max`: connections of a session; None: by the number of cores."""
        super().__init__()
        self._streams_max = streams_max or streams_most()
        self._identity = identity
        if identity:
            self.scheme = "tls"
        self._count = itertools.count(1)
        self._address = join_address(host, port)
        self._pace = pace
        self._congestion = congestion
        self._inbound: set[Inbound] = set()
        self._askers = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="swarm-tcp-receive")
        self._holders = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="swarm-tcp-send")
        self._closed = False

    @property
    def opening(self) -> bytes:
        """The magic of this transport's connections."""
        return TLS_MAGIC if self._identity else self.magic

    @property
    def address(self) -> str:
        """The listener's host:port; IPv6 hosts in brackets."""
        return self._address

    @property
    def told(self) -> str:
        """See `transport.told_address`: sessions are opened where links are."""
        return "*"

    def reach(self, address: str) -> bool:
        """Whether the address is HOST:PORT."""
        return _where(address) is not None

    async def connect(self, address: str, token: str, *, timeout_s: float) -> Inbound:
        """As Transport. Raises TransportError when the holder does not answer in time, or refuses the token."""
        secret, count = _token_bytes(token), next(self._count)
        first = await self._connect(address, preamble_of(secret, count, magic=self.magic), timeout_s=timeout_s)
        session: Inbound = first
        if self.parallel:

            async def dial(beside: TcpInbound) -> TcpInbound:
                if sum(each.streams for each in self._inbound if isinstance(each, InboundStreams)) >= CONNECTIONS_MAX:
                    raise TransportError(f"tcp to {address}: this node has {CONNECTIONS_MAX} connections")
                preamble = preamble_of(secret, next(self._count), beside=count, magic=self.magic)
                return await self._connect(address, preamble, timeout_s=timeout_s, beside=beside)

            session = InboundStreams(first, most=self._streams_max, dial=dial)
        self._inbound = {known for known in self._inbound if known.alive} | {session}
        return session

    async def _connect(
        self, address: str, preamble: bytes, *, timeout_s: float, beside: TcpInbound | None = None
    ) -> TcpInbound:
        where = _where(address)
        if where is None or self._closed:
            raise TransportError(f"tcp to {address!r}: {'closed' if where else 'not a host:port'}")
        try:
            async with asyncio.timeout(timeout_s):
                stream = await self._dial(*where, preamble)
                if beside:
                    session = TcpInbound(stream, peer=address, pool=self._askers, beside=beside)
                else:
                    session = await self._ask(stream, peer=address)
        except TimeoutError as error:
            raise TransportError(f"tcp to {address}: no answer within {timeout_s:g} s") from error
        except OSError as error:
            why = refusal(error)
            raise TransportError(f"tcp to {address}: {f'it {why.value}' if why else error}") from error
        if self._closed:
            await session.close()
            raise TransportError(f"tcp to {address}: closed")
        return session

    def admit(self, token: str) -> None:
        """As TokenTransport. Raises TransportError unless the token is TOKEN_BYTES bytes in hexadecimal."""
        _token_bytes(token)
        super().admit(token)

    async def adopt(self, sock: socket.socket) -> None:
        """As AdoptingTransport. Errors of a stranger's connection only close it."""
        stream: ByteStream | None = None
        try:
            async with asyncio.timeout(PREAMBLE_TIMEOUT_S):
                peer = str(sock.getpeername()[0])
                _tune(sock, peer=peer, congestion=self._congestion)
                stream = await self._receive(sock)
                preamble = await _read_preamble(stream, magic=self.magic)
                token, verdict = self._judge(preamble)
                if not self.is_admitted(token):
                    await stream.async_sendall(verdict)
                    stream.close()
                    return
                if isinstance(stream, TlsStream):
                    stream = await accept_sealing(stream, verdict)
                else:
                    await stream.async_sendall(verdict)
                session = await self._hold(stream, peer=peer)
        except BaseException as error:
            (stream or sock).close()
            if isinstance(error, OSError | EOFError):  # TimeoutError included
                return
            raise
        count, beside = counts_of(preamble)
        if not beside:
            await self.add_session(token, OutboundStreams(session, count) if self.parallel else session)
        elif not self._join(token, beside, session):
            await session.close()

    async def close(self) -> None:
        """Closes every session, takes at most a session's CLOSE_TIMEOUT_S, and releases the threads."""
        self._closed = True
        await asyncio.gather(*(session.close() for session in self._inbound), super().close())
        self._askers.shutdown(wait=False)
        self._holders.shutdown(wait=False)

    async def _ask(self, stream: ByteStream, *, peer: str) -> TcpInbound:
        """The asker's end of an accepted connection. Owns the stream, also when it raises."""
        return TcpInbound(stream, peer=peer, pool=self._askers)

    async def _hold(self, stream: ByteStream, *, peer: str) -> TcpOutbound:
        """The holder's end of an accepted connection. Owns the stream, also when it raises."""
        return TcpOutbound(stream, peer=peer, pool=self._holders, pace=self._pace)

    async def _receive(self, sock: socket.socket) -> ByteStream:
        """The holder's end of a connection before its preamble."""
        if self._identity is None:
            return PlainStream(sock)
        sock.setblocking(False)
        said = await asyncio.get_running_loop().sock_recv(sock, len(TLS_MAGIC))  # the listener peeked all of it
        if said != TLS_MAGIC:
            raise EOFError("not the magic")
        return await TlsStream.open(sock, self._identity.server, server_side=True)

    async def _dial(self, host: str, port: int, preamble: bytes) -> ByteStream:
        """The asker's end of a connection with an accepted preamble. Raises OSError or TransportError."""
        loop = asyncio.get_running_loop()
        addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = addresses[0]
        sock = socket.socket(family, kind, protocol)
        stream: ByteStream | None = None
        try:
            sock.setblocking(False)
            _tune(sock, peer=str(where[0]), congestion=self._congestion)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
            await loop.sock_connect(sock, where)
            peer = f"{host}:{port}"
            if self._identity is None:
                stream = PlainStream(sock)
                await stream.async_sendall(preamble)
                _check_verdict(await stream.async_recv(1), peer=peer)
            else:
                await loop.sock_sendall(sock, TLS_MAGIC)
                stream = tls = await TlsStream.open(sock, self._identity.client, server_side=False)
                share = new_share()
                await tls.async_sendall(preamble + share)
                _check_verdict(await tls.async_recv(1), peer=peer)
                stream = await ask_to_seal(tls, share)
        except BaseException:
            (stream or sock).close()
            raise
        return stream

    def _judge(self, preamble: bytes) -> tuple[str, bytes]:
        """The token that a preamble proves, empty if it proves none, and the verdict."""
        if not preamble.startswith(self.magic):
            raise EOFError("not a preamble")
        if preamble[len(MAGIC)] != VERSION:
            return "", WRONG_VERSION
        count, beside = counts_of(preamble)
        for token, admission in self._admitted.items():
            if hmac.compare_digest(preamble_of(_token_bytes(token), count, beside=beside, magic=self.magic), preamble):
                if admission.count >= count:  # a replay
                    break
                admission.count = count
                return ("", FULL) if beside and self.connections >= CONNECTIONS_MAX else (token, ACCEPTED)
        return "", UNKNOWN_TOKEN

    @property
    def connections(self) -> int:
        """Connections of the sessions that others have opened."""
        sessions = (session for admission in self._admitted.values() for session in admission.sessions)
        return sum(each.streams if isinstance(each, OutboundStreams) else 1 for each in sessions)

    def _join(self, token: str, first: int, stream: TcpOutbound) -> bool:
        """Adds a connection to the session whose first connection has this count; False where there is none."""
        sessions = self._admitted[token].sessions if self.is_admitted(token) else []
        found = [each for each in sessions if isinstance(each, OutboundStreams) and each.count == first]
        return bool(found) and found[0].join(stream)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._address} {len(self._inbound)} in, {len(self._admitted)} admitted>"


def _check_verdict(verdict: bytes, *, peer: str) -> None:
    if verdict == ACCEPTED:
        return
    why = {
        UNKNOWN_TOKEN: "it does not know the token",
        WRONG_VERSION: f"it does not speak version {VERSION} of the bulk protocol",
        FULL: "it has as many connections as it takes",
        b"": "it closed the connection without a verdict",
    }.get(verdict, f"unknown verdict {verdict!r}")
    raise TransportError(f"tcp to {peer}: {why}")


async def _read_preamble(stream: ByteStream, *, magic: bytes) -> bytes:
    """A preamble, or its first bytes if they show another version. Raises EOFError for other bytes."""
    data = b""
    wanted = len(MAGIC) + 1
    while len(data) < wanted:
        part = await stream.async_recv(wanted - len(data))
        if not part:
            raise EOFError("it left early")
        data += part
        if data == magic + bytes([VERSION]):
            wanted = PREAMBLE_BYTES
    return data


def preamble_of(token: bytes, count: int, *, beside: int = 0, magic: bytes = MAGIC) -> bytes:
    """The preamble of an asker's connection number `count`, in a session of its own or in that of number `beside`."""
    head = magic + bytes([VERSION]) + COUNTS.pack(count, beside)
    return head + hmac.digest(token, head, "sha256")[:PROOF_BYTES]


def counts_of(preamble: bytes) -> tuple[int, int]:
    """The `count` and `beside` of a whole preamble."""
    count, beside = COUNTS.unpack_from(preamble, len(MAGIC) + 1)
    return count, beside


def _tune(sock: socket.socket, *, peer: str, congestion: str | None) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # END follows a frame at once; headers use MSG_MORE
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    if congestion is None and is_loopback(peer):
        with contextlib.suppress(OSError):  # a kernel without it keeps its default
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, LOOPBACK_CONGESTION.encode())
    elif congestion is not None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        except OSError as error:
            raise SettingsError("congestion", f"{congestion!r}: the kernel says {error.strerror}") from error


def _where(address: str) -> tuple[str, int] | None:
    with contextlib.suppress(SettingsError):
        return split_address("address", address)
    return None


def _token_bytes(token: str) -> bytes:
    with contextlib.suppress(ValueError):
        data = bytes.fromhex(token)
        if len(data) == TOKEN_BYTES:
            return data
    raise TransportError(f"tcp: a token is {TOKEN_BYTES} bytes in hexadecimal")
