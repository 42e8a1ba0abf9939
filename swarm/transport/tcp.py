"""TCP: the data plane that always works. Owns how bulk connections come about; what they carry is `tcp_session`'s.

A session is one connection to the port of the holder's listener, dialled by the asker:

    asker -> holder   | "SWRM" | version: u8 | token: 16 bytes |        holder -> asker   | verdict: u8 |

The token comes from the holder's Hello, over the link: it says who is asking, and that the asker may. It is
compared in constant time. A refused asker is told why in the verdict, then the connection is closed.

Must not know: transfers, frames, links, who the peers are.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
from concurrent.futures import ThreadPoolExecutor

from swarm.errors import SettingsError, TransportError
from swarm.settings import is_loopback, join_address
from swarm.transport import Pace
from swarm.transport.tcp_session import TcpInbound, TcpOutbound

MAGIC = b"SWRM"
VERSION = 1
TOKEN_BYTES = 16
PREAMBLE_BYTES = len(MAGIC) + 1 + TOKEN_BYTES
ACCEPTED, UNKNOWN_TOKEN, WRONG_VERSION = b"\0", b"\1", b"\2"

PREAMBLE_TIMEOUT_S = 5.0  # one round trip is enough; a stranger must not keep a connection by silence
SESSIONS_PER_TOKEN = 2  # the one in use, and one that replaces it while the break is not noticed yet
LOOPBACK_CONGESTION = (
    "cubic"  # bbr, some machines' default, paces and loses a quarter or more of the speed within a host
)
THREADS_MAX = 64  # askers and holders have a pool each: a full one never waits for the other

# A peer that vanished without a word is noticed after 2 + 3 * 1 = 5 s. The asker needs this most: it never writes.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 2, 1, 3
# Only for the asker: at the holder it would also kill sessions whose asker waits for its disk for that long. There, a
# transfer's own idle timeout counts.
USER_TIMEOUT_MS = 4000


class TcpTransport:
    """The plane of the node whose listener is at `host`:`port`, and hands "SWRM" connections to `adopt`."""

    scheme = "tcp"

    def __init__(self, host: str, port: int, *, pace: Pace | None = None, congestion: str | None = None) -> None:
        """`congestion`: the kernel's name of a congestion control; None leaves the machine's own, but within a host."""
        self._address = join_address(host, port)
        self._pace = pace
        self._congestion = congestion
        self._admitted: dict[bytes, _Admission] = {}
        self._inbound: set[TcpInbound] = set()
        self._askers = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="swarm-tcp-receive")
        self._holders = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="swarm-tcp-send")
        self._closed = False

    @property
    def address(self) -> str:
        """The listener's host:port; IPv6 hosts in brackets."""
        return self._address

    def reach(self, address: str) -> bool:
        """Whether the address is a host and a port that this node may dial; who is there, only `connect` finds out.

        A node that listens on loopback has no business beyond this machine, whatever a peer's Hello says.
        """
        own, where = _split(self._address), _split(address)
        return where is not None and (own is None or not is_loopback(own[0]) or is_loopback(where[0]))

    async def connect(self, address: str, token: str, *, timeout_s: float) -> TcpInbound:
        """See `Transport`. Raises TransportError when nobody answers in time, or turns the token away."""
        where = _split(address)
        if where is None or self._closed:
            raise TransportError(f"tcp to {address!r}: {'closed' if where else 'not a host:port'}")
        try:
            async with asyncio.timeout(timeout_s):
                sock = await _dial(*where, token=_token_bytes(token), congestion=self._congestion)
        except TimeoutError as error:
            raise TransportError(f"tcp to {address}: no answer within {timeout_s:g} s") from error
        except OSError as error:
            raise TransportError(f"tcp to {address}: {error}") from error
        if self._closed:
            sock.close()
            raise TransportError(f"tcp to {address}: closed")
        session = TcpInbound(sock, peer=address, pool=self._askers)
        self._inbound = {known for known in self._inbound if known.alive} | {session}
        return session

    def admit(self, token: str) -> None:
        """See `Transport`. Admitting a token twice is the same as once."""
        self._admitted.setdefault(_token_bytes(token), _Admission())

    async def accept(self, token: str, *, timeout_s: float) -> TcpOutbound:
        """See `Transport`."""
        admission = self._admitted.get(_token_bytes(token))
        if admission is None:
            raise TransportError("tcp: the token is not admitted")
        try:
            async with asyncio.timeout(timeout_s):
                return await admission.latest()
        except TimeoutError as error:
            raise TransportError(f"tcp: the peer opened no session within {timeout_s:g} s") from error

    async def adopt(self, sock: socket.socket) -> None:
        """Takes over a connection that begins with MAGIC, and judges its preamble. Whatever goes wrong ends with it."""
        try:
            async with asyncio.timeout(PREAMBLE_TIMEOUT_S):
                admission, verdict = self._judge(await _read_preamble(sock))
                await asyncio.get_running_loop().sock_sendall(sock, verdict)
                peer = str(sock.getpeername()[0])
                _tune(sock, peer=peer, congestion=self._congestion)
        except (OSError, EOFError):  # TimeoutError is an OSError; a stranger's broken connection concerns nobody
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        if admission is None or admission.revoked:
            sock.close()
            return
        await admission.add(TcpOutbound(sock, peer=peer, pool=self._holders, pace=self._pace))

    async def revoke(self, token: str) -> None:
        """See `Transport`."""
        admission = self._admitted.pop(_token_bytes(token), None)
        if admission is not None:
            await admission.revoke()

    async def close(self) -> None:
        """Closes every session, takes at most a session's CLOSE_TIMEOUT_S, and lets the threads go."""
        self._closed = True
        admissions = list(self._admitted.values())
        self._admitted.clear()
        await asyncio.gather(
            *(session.close() for session in self._inbound), *(admission.revoke() for admission in admissions)
        )
        self._askers.shutdown(wait=False)
        self._holders.shutdown(wait=False)

    def _judge(self, preamble: bytes) -> tuple[_Admission | None, bytes]:
        if preamble[len(MAGIC)] != VERSION:
            return None, WRONG_VERSION
        token = preamble[len(MAGIC) + 1 :]
        admission = None
        for known, candidate in self._admitted.items():  # all of them: the time taken tells nothing
            if hmac.compare_digest(known, token):
                admission = candidate
        return admission, UNKNOWN_TOKEN if admission is None else ACCEPTED

    def __repr__(self) -> str:
        return f"<TcpTransport {self._address} {len(self._inbound)} in, {len(self._admitted)} admitted>"


class _Admission:
    """One admitted token: the sessions opened with it, oldest first."""

    def __init__(self) -> None:
        self.revoked = False
        self._sessions: list[TcpOutbound] = []
        self._changed = asyncio.Event()

    async def add(self, session: TcpOutbound) -> None:
        self._sessions.append(session)
        self._changed.set()
        replaced = self._sessions[:-SESSIONS_PER_TOKEN]
        self._sessions = self._sessions[-SESSIONS_PER_TOKEN:]
        for old in replaced:
            await old.close()

    async def latest(self) -> TcpOutbound:
        while not self.revoked:
            if self._sessions and self._sessions[-1].alive:
                return self._sessions[-1]
            self._changed.clear()
            await self._changed.wait()
        raise TransportError("tcp: the token was revoked")

    async def revoke(self) -> None:
        self.revoked = True
        self._changed.set()
        await asyncio.gather(*(session.close() for session in self._sessions))


async def _dial(host: str, port: int, *, token: bytes, congestion: str | None) -> socket.socket:
    """A connection whose preamble was accepted. Raises OSError or TransportError."""
    loop = asyncio.get_running_loop()
    addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, where = addresses[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        _tune(sock, peer=str(where[0]), congestion=congestion)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        await loop.sock_connect(sock, where)
        await loop.sock_sendall(sock, MAGIC + bytes([VERSION]) + token)
        _check_verdict(await loop.sock_recv(sock, 1), peer=f"{host}:{port}")
    except BaseException:
        sock.close()
        raise
    return sock


def _check_verdict(verdict: bytes, *, peer: str) -> None:
    if verdict == ACCEPTED:
        return
    why = {
        UNKNOWN_TOKEN: "it does not know the token",
        WRONG_VERSION: f"it does not speak version {VERSION} of the bulk protocol",
        b"": "it closed the connection without a verdict",
    }.get(verdict, f"unknown verdict {verdict!r}")
    raise TransportError(f"tcp to {peer}: {why}")


async def _read_preamble(sock: socket.socket) -> bytes:
    """Raises EOFError when the stranger leaves early or does not know the magic."""
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    preamble = b""
    while len(preamble) < PREAMBLE_BYTES:
        part = await loop.sock_recv(sock, PREAMBLE_BYTES - len(preamble))
        if not part:
            raise EOFError("no preamble")
        preamble += part
    if not preamble.startswith(MAGIC):
        raise EOFError("not a preamble")
    return preamble


def _tune(sock: socket.socket, *, peer: str, congestion: str | None) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # END follows a frame at once; headers ask for MORE
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    if congestion is None and is_loopback(peer):
        with contextlib.suppress(OSError):  # a kernel without it is as good without it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, LOOPBACK_CONGESTION.encode())
    elif congestion is not None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        except OSError as error:
            raise SettingsError("congestion", f"{congestion!r}: the kernel says {error.strerror}") from error


def _split(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 1 << 16:
        return None
    return host, int(port)


def _token_bytes(token: str) -> bytes:
    with contextlib.suppress(ValueError):
        data = bytes.fromhex(token)
        if len(data) == TOKEN_BYTES:
            return data
    raise TransportError(f"tcp: a token is {TOKEN_BYTES} bytes in hexadecimal")
