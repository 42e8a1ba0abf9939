"""TLS handshakes of connections that asyncio keeps, and a last message to peers that are refused.

After a failed handshake asyncio closes the socket without sending the alert, so the peer would see only a reset. A
second handle of the socket stays open meanwhile: the alert goes through it, and pending bytes are read, since closing
with unread bytes would discard the alert.

A failed handshake leaves no garbage: asyncio's error refers to the frames that waited for it, and so in a circle to
its TLS buffers of 256 KB, which a flood would pile up until the collector runs. Must not know: links, nodes, the origin
of contexts.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import traceback
from collections.abc import Callable
from typing import TypeVar

from swarm.security.certificates import alert

Protocol = TypeVar("Protocol", bound=asyncio.Protocol)
PART_S = 1.0  # a round trip, and time to read an alert
PART_BYTES_MAX = 64 << 10  # requests that were on their way


async def shake(
    factory: Callable[[], Protocol],
    sock: socket.socket,
    context: ssl.SSLContext,
    *,
    server_side: bool,
    timeout_s: float,
) -> tuple[asyncio.Transport, Protocol]:
    """TLS over a connected socket, which this owns and closes on failure. Raises OSError, ssl.SSLError among them; see
    `certificates.refusal`."""
    loop = asyncio.get_running_loop()
    spare = sock.dup()
    try:
        if server_side:
            return await loop.connect_accepted_socket(factory, sock, ssl=context, ssl_handshake_timeout=timeout_s)
        return await loop.create_connection(
            factory, sock=sock, ssl=context, ssl_handshake_timeout=timeout_s, server_hostname=""
        )
    except BaseException as error:
        if isinstance(error, ssl.SSLError):
            await part(spare, alert(error))
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        spare.close()


async def part(sock: socket.socket, last_words: bytes) -> None:
    """Sends `last_words` to a refused peer and gives it PART_S to read them. Never raises OSError; does not close."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):  # TimeoutError is one
        async with asyncio.timeout(PART_S):
            sock.setblocking(False)
            await loop.sock_sendall(sock, last_words)
            sock.shutdown(socket.SHUT_WR)
            read = 0
            while read < PART_BYTES_MAX and (got := await loop.sock_recv(sock, PART_BYTES_MAX)):
                read += len(got)
