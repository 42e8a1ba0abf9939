"""A transport for nodes of one machine: chunks over Unix sockets. docs/transports.md explains it.

A package that holds this module enables it with an entry point, and a node with `transports = ["unix"]`:

    [project.entry-points."swarm.transports"]
    unix = "unix_transport:UnixTransport"
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor

from swarm.errors import TransportError
from swarm.transport.admission import TokenTransport
from swarm.transport.byte_stream import PlainStream
from swarm.transport.cuda_ipc import machine_id
from swarm.transport.registry import TransportConfig
from swarm.transport.tcp_inbound import TcpInbound
from swarm.transport.tcp_outbound import TcpOutbound

GREETING_TIMEOUT_S = 1.0
TOKEN_BYTES = 32  # characters: tokens are 16 bytes in hexadecimal
ADMITTED = b"\1"


class UnixTransport(TokenTransport[TcpOutbound]):
    scheme = "unix"
    reason = "both nodes are on this machine"

    def __init__(self, config: TransportConfig) -> None:
        super().__init__()
        self._pace = config.pace
        self._name = f"swarm-{secrets.token_hex(8)}"
        self._asking, self._holding = ThreadPoolExecutor(64), ThreadPoolExecutor(64)
        self._dialled: set[TcpInbound] = set()
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.setblocking(False)
        self._sock.bind(f"\0{self._name}")  # an abstract name: no file is left behind
        self._sock.listen()
        self._serving = asyncio.create_task(self._serve())

    @property
    def address(self) -> str:
        return f"{machine_id()}/{self._name}"

    def reach(self, address: str) -> bool:
        return address.startswith(f"{machine_id()}/swarm-")

    async def connect(self, address: str, token: str, *, timeout_s: float) -> TcpInbound:
        loop, sock = asyncio.get_running_loop(), socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(timeout_s):
                await loop.sock_connect(sock, f"\0{address.partition('/')[2]}")
                await loop.sock_sendall(sock, token.encode())
                if await loop.sock_recv(sock, 1) != ADMITTED:
                    raise TransportError("unix: it does not know the token")
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError):  # TimeoutError is one
                raise TransportError(f"unix to {address}: {error!r}") from error
            raise
        session = TcpInbound(PlainStream(sock), peer=address, pool=self._asking)
        self._dialled = {known for known in self._dialled if known.alive} | {session}
        return session

    async def close(self) -> None:
        self._serving.cancel()
        await asyncio.wait({self._serving})
        self._sock.close()
        await asyncio.gather(*(session.close() for session in self._dialled), super().close())
        self._asking.shutdown(wait=False)
        self._holding.shutdown(wait=False)

    async def _serve(self) -> None:
        while True:
            sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
            sock.setblocking(False)
            with sock, contextlib.suppress(OSError):  # closed unless a session took it over
                async with asyncio.timeout(GREETING_TIMEOUT_S):
                    await self._greet(sock)

    async def _greet(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        token = (await loop.sock_recv(sock, TOKEN_BYTES)).decode("ascii", "replace")
        if self.is_admitted(token):
            await loop.sock_sendall(sock, ADMITTED)
            await self.add_session(
                token, TcpOutbound(PlainStream(sock), peer="unix", pool=self._holding, pace=self._pace)
            )
