"""What a bulk session needs of its connection, and the connection that is nothing but a socket.

A stream lives twice: first on the loop, where `hear` and `say` carry the few bytes that a session begins with; then,
after `block`, on threads, one at a time, whose calls wait for at most `poll_s` and then raise BlockingIOError, so that
a thread can look around. `transport.tls` has the other one. Knows nothing of frames and tokens.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any, Protocol

SAID_BYTES_MAX = 4096
LEAST_BYTES_MAX = 64 << 10  # waking a thread costs what hashing so much does; waiting for more saves little


class ByteStream(Protocol):
    """A connection. Everything but `fileno` raises OSError when it is gone."""

    async def hear(self, most: int) -> bytes:
        """Up to so many bytes, none at the end."""

    async def say(self, data: bytes) -> None:
        """Sends a few bytes."""

    def block(self, poll_s: float) -> None:
        """From now on the calls of threads wait, for at most `poll_s` each."""

    def idle(self) -> None:
        """No thread waits until further notice: whoever watches the socket is to hear of the first byte."""

    def recv_into(self, room: memoryview, /) -> int:
        """Fills some of the room; 0 at the end. May wait for all of it: there must be as much to come."""

    def recvmsg_into(self, rooms: Sequence[memoryview], /) -> tuple[Any, ...]:
        """Fills some of the rooms, in order; the first item says how much, 0 at the end. May wait for all of the first
        room."""

    def readable(self) -> bool:
        """Whether there is something to read, or nothing will ever be; does not wait. On the reading thread."""

    def send(self, data: memoryview, flags: int = 0, /) -> int:
        """Sends some of it. `flags` is MSG_MORE when `send_file` follows."""

    def sendmsg(self, parts: Sequence[memoryview], /) -> int:
        """Sends some of a few bytes and what follows them, in order."""

    def send_file(self, fd: int, offset: int, size: int) -> int:
        """Sends some of this range of a file; 0 when the file ends before it."""

    def said(self) -> bytes | None:
        """Some of what the other end has said, b"" when it has left, None when neither; does not wait. On the loop."""

    def fileno(self) -> int:
        """The socket's; -1 when it is closed."""

    def shutdown(self, how: int, /) -> None:
        """Ends the connection, from any thread."""

    def close(self) -> None:
        """Closes the socket, which no thread may use any more."""


class PlainStream(socket.socket):
    """A connected TCP socket, which belongs to the stream from now on.

    On a slow link every packet would wake the thread that reads. So it reads what is there, and when there is nothing,
    sleeps until LEAST_BYTES_MAX are, or what it waits for (SO_RCVLOWAT). That bounds `poll` and not `recv`, which would
    begin to count anew after each packet that it has taken.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self._least_bytes = 1
        self._poll_ms = 0.0
        self._arriving = select.poll()
        self._arriving.register(self, select.POLLIN)

    async def hear(self, most: int) -> bytes:
        """See ByteStream."""
        return await asyncio.get_running_loop().sock_recv(self, most)

    async def say(self, data: bytes) -> None:
        """See ByteStream."""
        await asyncio.get_running_loop().sock_sendall(self, data)

    def block(self, poll_s: float) -> None:
        """See ByteStream. One system call per write, unlike with Python's own timeouts."""
        self.setblocking(True)
        self._poll_ms = 1e3 * poll_s
        poll = struct.pack("@ll", int(poll_s), int(poll_s % 1 * 1e6))
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, poll)

    def idle(self) -> None:
        """See ByteStream. For epoll, too, a socket is readable once there is as much as was waited for last."""
        self._wake_at(1)

    def recv_into(self, room: memoryview) -> int:  # type: ignore[override]
        """See ByteStream."""
        return self.recv_least(room, len(room))

    def recv_least(self, room: memoryview, least: int) -> int:
        """As `recv_into`, but so many bytes are worth waking up for."""
        try:
            return super().recv_into(room, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._await(least)
            return super().recv_into(room, 0, socket.MSG_DONTWAIT)

    def recvmsg_into(self, rooms: Sequence[memoryview]) -> tuple[Any, ...]:  # type: ignore[override]
        """See ByteStream."""
        try:
            return super().recvmsg_into(rooms, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._await(len(rooms[0]))
            return super().recvmsg_into(rooms, 0, socket.MSG_DONTWAIT)

    def readable(self) -> bool:
        """See ByteStream. Looks itself: `poll` would wait for as much as the last read did."""
        try:
            self.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def send_file(self, fd: int, offset: int, size: int) -> int:
        """See ByteStream. Straight from the page cache."""
        return os.sendfile(self.fileno(), fd, offset, size)

    def said(self) -> bytes | None:
        """See ByteStream."""
        try:
            return self.recv(SAID_BYTES_MAX, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def _await(self, least: int) -> None:
        """Until so many bytes can be read, or the other end has left; for a while at most."""
        self._wake_at(min(least, LEAST_BYTES_MAX))
        self._arriving.poll(self._poll_ms)

    def _wake_at(self, least: int) -> None:
        if least != self._least_bytes:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
            self._least_bytes = least
