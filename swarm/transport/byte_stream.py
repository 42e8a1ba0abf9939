"""The connection of a bulk session: `ByteStream`, and `PlainStream` over a socket. `tls_stream` and `sealed_stream`
have the encrypted ones, on the base of `CoveredStream`.

A stream has two phases. On the loop, `async_recv` and `async_sendall` carry the few bytes of the preamble. After
`block`, threads use it, one at a time: their calls wait for at most `poll_s` and then raise BlockingIOError, so that a
thread can check for a stop. Must not know: frames, tokens.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, Protocol

KEPT_BYTES_MAX = 64  # a frame's header
NOW_BYTES_MAX = 4096
FAST_BYTES_PER_S = 200e6  # below, a wake-up for each packet costs more than returns to Python
LEAST_BYTES_MAX = 64 << 10  # hashing it takes as long as waking a thread


class ByteStream(Protocol):
    """A connection. All methods but `fileno` raise OSError when it is gone."""

    async def async_recv(self, most: int) -> bytes:
        """Receives up to `most` bytes; b"" at the end."""

    async def async_sendall(self, data: bytes) -> None:
        """Sends a few bytes."""

    def block(self, poll_s: float) -> None:
        """Begins the phase of threads, whose calls wait for at most `poll_s`."""

    def fill_rooms(self) -> None:
        """Other threads read other streams beside this one: a read should return seldom, with much."""

    def idle(self) -> None:
        """No thread reads for now: the first byte must make the socket readable for the loop."""

    def recv_into(self, room: memoryview, /) -> int:
        """Fills a part of `room`; 0 at the end. May wait for all of it, so as many bytes must be on their way."""

    def recvmsg_into(self, rooms: Sequence[memoryview], /) -> tuple[Any, ...]:
        """As `recv_into` over several rooms, in order; the first item is the count. May wait for the first room."""

    def readable(self) -> bool:
        """Whether bytes or the end can be read; does not wait. On the reading thread."""

    def send(self, data: memoryview, flags: int = 0, /) -> int:
        """Sends a part of `data`. `flags` is MSG_MORE before `send_file`."""

    def sendmsg(self, parts: Sequence[memoryview], /) -> int:
        """Sends a part of a header and its payload."""

    def send_file(self, fd: int, offset: int, size: int) -> int:
        """Sends a part of this range of a file; 0 when the file ends before it."""

    def recv_now(self) -> bytes | None:
        """Received bytes, b"" at the end, None for neither; does not wait. On the loop."""

    def fileno(self) -> int:
        """The descriptor of the socket; -1 when closed."""

    def shutdown(self, how: int, /) -> None:
        """Ends the connection, from any thread."""

    def close(self) -> None:
        """Closes the socket. No thread may use it."""


class PlainStream(socket.socket):
    """A connected stream socket, which the stream owns.

    On a slow link each packet would wake the reading thread. So a thread reads the bytes that are there, and otherwise
    polls until LEAST_BYTES_MAX or all wanted bytes are there (SO_RCVLOWAT). It polls because `recv` counts anew after
    each packet. After `fill_rooms`, on a fast link, where LEAST_BYTES_MAX have arrived since the last read, the
    kernel fills the whole room (MSG_WAITALL), for as long as that keeps FAST_BYTES_PER_S: each return to Python waits
    for the interpreter's lock, which all streams share.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self._least_bytes = 1
        self._poll_ms = 0.0
        self._fills_rooms = False
        self._is_fast = False
        self._arriving = select.poll()
        self._arriving.register(self, select.POLLIN)

    async def async_recv(self, most: int) -> bytes:
        """On the loop."""
        return await asyncio.get_running_loop().sock_recv(self, most)

    async def async_sendall(self, data: bytes) -> None:
        """On the loop."""
        await asyncio.get_running_loop().sock_sendall(self, data)

    def block(self, poll_s: float) -> None:
        """By SO_SNDTIMEO and SO_RCVTIMEO: one system call a write, unlike Python's timeouts."""
        self.setblocking(True)
        self._poll_ms = 1e3 * poll_s
        poll = struct.pack("@ll", int(poll_s), int(poll_s % 1 * 1e6))
        self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, poll)
        self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, poll)

    def fill_rooms(self) -> None:
        """Where that needs no wake-up for each packet of a slow link."""
        self._fills_rooms = True

    def idle(self) -> None:
        """Resets SO_RCVLOWAT, which epoll obeys too."""
        self._wake_at(1)

    def recv_into(self, room: memoryview) -> int:  # type: ignore[override]
        """Waits for all of it."""
        return self.recv_least(room, len(room))

    def recv_least(self, room: memoryview, least: int) -> int:
        """As `recv_into`, but waits for `least` bytes only; on a fast link, and for many bytes, for all of the room."""
        if self._is_fast and least >= LEAST_BYTES_MAX:
            return self._recv_all((room,), least)
        try:
            got = super().recv_into(room, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._await(least)
            return super().recv_into(room, 0, socket.MSG_DONTWAIT)
        self._is_fast = self._fills_rooms and (self._is_fast or got >= LEAST_BYTES_MAX)
        return got

    def recvmsg_into(self, rooms: Sequence[memoryview]) -> tuple[Any, ...]:  # type: ignore[override]
        """Waits for the first room; on a fast link for all rooms."""
        least = len(rooms[0])
        if self._is_fast and least >= LEAST_BYTES_MAX:
            return (self._recv_all(rooms, least),)
        try:
            got = super().recvmsg_into(rooms, 0, socket.MSG_DONTWAIT)[0]
        except BlockingIOError:
            self._await(least)
            return super().recvmsg_into(rooms, 0, socket.MSG_DONTWAIT)
        self._is_fast = self._fills_rooms and (self._is_fast or got >= LEAST_BYTES_MAX)
        return (got,)

    def readable(self) -> bool:
        """By MSG_PEEK: `poll` would wait for SO_RCVLOWAT bytes."""
        try:
            self.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def send_file(self, fd: int, offset: int, size: int) -> int:
        """From the page cache, without a copy."""
        return os.sendfile(self.fileno(), fd, offset, size)

    def recv_now(self) -> bytes | None:
        """Up to NOW_BYTES_MAX."""
        try:
            return self.recv(NOW_BYTES_MAX, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def _recv_all(self, rooms: Sequence[memoryview], least: int) -> int:
        """Lets the kernel fill the rooms: a single return to Python. Returns less after `poll_s` and at the end."""
        self._wake_at(1)  # else the last bytes would wait for those of the next read
        began_s = time.monotonic()
        try:
            got: int = super().recvmsg_into(rooms, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            self._is_fast = False
            raise
        self._is_fast = got >= least and got > FAST_BYTES_PER_S * (time.monotonic() - began_s)
        return got

    def _await(self, least: int) -> None:
        """Waits until `least` bytes or the end can be read, for at most `poll_s`."""
        self._wake_at(min(least, LEAST_BYTES_MAX))
        self._arriving.poll(self._poll_ms)

    def _wake_at(self, least: int) -> None:
        if least != self._least_bytes:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
            self._least_bytes = least


class CoveredStream:
    """What streams have in common that encrypt above a connection, which they own."""

    def __init__(self, sock: PlainStream) -> None:
        self._sock = sock
        self._unsent = memoryview(b"")  # encrypted
        self._accepted = 0  # the caller's bytes in `_unsent`
        self._kept = b""  # a header, in the clear

    def block(self, poll_s: float) -> None:
        """As PlainStream."""
        self._sock.block(poll_s)

    def fill_rooms(self) -> None:
        """As PlainStream."""
        self._sock.fill_rooms()

    def idle(self) -> None:
        """As PlainStream."""
        self._sock.idle()

    def fileno(self) -> int:
        """As PlainStream."""
        return self._sock.fileno()

    def shutdown(self, how: int) -> None:
        """As PlainStream."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """As PlainStream."""
        self._sock.close()

    def _keeps(self, data: memoryview, flags: int) -> bool:
        """Keeps a header with MSG_MORE for the next call; returns whether it did."""
        if not (flags & socket.MSG_MORE and not self._kept and len(data) <= KEPT_BYTES_MAX):
            return False
        self._kept = bytes(data)
        return True

    def _send_rest(self) -> int:
        """Sends all of `_unsent`, or raises BlockingIOError: the next call must repeat it. Returns what it accepted."""
        while self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
        accepted, self._accepted = self._accepted, 0
        return accepted
