"""Handshakes on the loop, for connections that asyncio keeps: TLS, and a last word for those who are refused.

asyncio closes the socket of a handshake that failed without sending the alert that says why, and the other side would
only ever hear that the connection was reset. So a second handle of the socket is kept until it is known how things
went; through it the alert is sent, and what is still arriving is read, since closing before would discard the alert.

Must not know: links, nodes, whose contexts these are.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import TypeVar

from swarm.security.certificates import alert

Protocol = TypeVar("Protocol", bound=asyncio.Protocol)
PART_S = 1.0  # a round trip, and time to read an alert
PART_BYTES_MAX = 64 << 10  # a request or two that were on their way


async def shake(
    factory: Callable[[], Protocol],
    sock: socket.socket,
    context: ssl.SSLContext,
    *,
    server_side: bool,
    timeout_s: float,
) -> tuple[asyncio.Transport, Protocol]:
    """TLS over a connected socket, which belongs to the transport from now on, and is closed when this fails.

    Raises OSError, of which ssl.SSLError is one; see `identity.refusal`.
    """
    loop = asyncio.get_running_loop()
    spare = sock.dup()
    try:
        if server_side:
            return await loop.connect_accepted_socket(factory, sock, ssl=context, ssl_handshake_timeout=timeout_s)
        return await loop.create_connection(
            factory, sock=sock, ssl=context, ssl_handshake_timeout=timeout_s, server_hostname=""
        )
    except ssl.SSLError as error:
        await part(spare, alert(error))
        raise
    finally:
        spare.close()


async def part(sock: socket.socket, last_words: bytes) -> None:
    """Says something to who is turned away, and gives it time to read that. Never raises OSError; does not close."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):  # TimeoutError is one
        async with asyncio.timeout(PART_S):
            sock.setblocking(False)
            await loop.sock_sendall(sock, last_words)
            sock.shutdown(socket.SHUT_WR)
            read = 0
            while read < PART_BYTES_MAX and (got := await loop.sock_recv(sock, PART_BYTES_MAX)):
                read += len(got)
