"""TLS under a bulk session: a connection that a session can use as if it were a plain one.

A `ByteStream` (see `transport.stream`) whose bytes are encrypted and whose other end has shown its certificate.

OpenSSL works in memory, and the socket is read and written in pieces of PIECE_BYTES. A record has 16 KiB at most; where
OpenSSL holds the socket, every record costs a system call or two and wakes the other end, which is more than the
encryption itself.

What `send` and `send_file` could not send is kept, encrypted, and BlockingIOError raised; whoever calls again with the
same is told that it was sent once it was.

Must not know: what is sent, who may connect; contexts are handed in.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Sequence

from swarm.security.certificates import alert
from swarm.security.tls_handshake import part
from swarm.transport.byte_stream import PlainStream

RECORD_BYTES = 16 << 10  # the most that one TLS record carries
PIECE_BYTES = 16 * RECORD_BYTES  # stays in the core's cache from the socket to its place
KEPT_BYTES_MAX = 64  # a frame's header
ALERT = b"\x15"  # how a TLS record begins that says goodbye


class TlsStream:
    """A connection inside TLS. Made by `open`."""

    def __init__(self, sock: PlainStream, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.connection = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._unsent = memoryview(b"")  # encrypted
        self._accepted = 0  # bytes of the caller's that are in `_unsent`, and that it has not been told of
        self._kept = b""
        self._cipher: memoryview | None = None  # as it comes from the socket
        self._clear: memoryview | None = None  # as it comes from a file

    @classmethod
    async def open(cls, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> TlsStream:
        """Shakes hands over a connected socket, which belongs to the result from now on, and is closed when that fails.

        Has no deadline of its own. Raises OSError, of which ssl.SSLError is one.
        """
        stream = cls(PlainStream(sock), context, server_side=server_side)
        try:
            await stream._shake_hands()
        except BaseException as error:
            if isinstance(error, ssl.SSLError):
                await part(stream._sock, alert(error))
            stream.close()
            raise
        return stream

    async def hear(self, most: int) -> bytes:
        """See ByteStream."""
        while True:
            try:
                return self.connection.read(most)
            except ssl.SSLWantReadError:
                await self._hear_more()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    async def say(self, data: bytes) -> None:
        """See ByteStream."""
        self.connection.write(data)
        await self._sock.say(self._outgoing.read())

    def block(self, poll_s: float) -> None:
        """See ByteStream."""
        self._sock.block(poll_s)

    def idle(self) -> None:
        """See ByteStream."""
        self._sock.idle()

    def fileno(self) -> int:
        """See ByteStream."""
        return self._sock.fileno()

    def said(self) -> bytes | None:
        """See ByteStream. Looks beneath TLS: there is nothing that may be said after the handshake but goodbye."""
        try:
            first = self._sock.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:
            return None
        return b"" if first == ALERT else first

    def recv_into(self, room: memoryview) -> int:
        """See ByteStream. As much as is there: what a caller does costs as much as a record."""
        filled = 0
        while filled < len(room):
            try:
                filled += self.connection.read(len(room) - filled, room[filled:])  # type: ignore[operator]  # a count
            except ssl.SSLWantReadError:
                if filled:
                    break
                self._receive(len(room))
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                break
        return filled

    def recvmsg_into(self, rooms: Sequence[memoryview]) -> tuple[int]:
        """Fills some of the first room: what is left waits in memory, so the others have nothing to gain."""
        return (self.recv_into(rooms[0]),)

    def readable(self) -> bool:
        """See ByteStream. What lies here may be less than a record, so that to read it waits for the rest after all."""
        return bool(self.connection.pending() or self._incoming.pending) or self._sock.readable()

    def send(self, data: memoryview, flags: int = 0) -> int:
        """See ByteStream. Up to PIECE_BYTES at once; a little that is to be followed by more is kept until then."""
        if flags & socket.MSG_MORE and not self._kept and len(data) <= KEPT_BYTES_MAX:
            self._kept = bytes(data)
            return len(data)
        return self._send(data[:PIECE_BYTES])

    def sendmsg(self, parts: Sequence[memoryview]) -> int:
        """Sends a little, and the beginning of what follows it in the same record."""
        head, rest = parts
        return self._send(memoryview(b"".join((head, rest[: RECORD_BYTES - len(head)]))))

    def send_file(self, fd: int, offset: int, size: int) -> int:
        """See ByteStream. Up to PIECE_BYTES at once, read into memory: they have to be encrypted."""
        if self._clear is None:
            self._clear = memoryview(bytearray(PIECE_BYTES))
        read = 0 if self._accepted else os.preadv(fd, [self._clear[:size]], offset)
        return self._send(self._clear[:read]) if read or self._accepted else 0

    def shutdown(self, how: int) -> None:
        """See ByteStream."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """See ByteStream."""
        self._sock.close()

    async def _shake_hands(self) -> None:
        while True:
            try:
                self.connection.do_handshake()
            except ssl.SSLWantReadError:
                await self._sock.say(self._outgoing.read())
                await self._hear_more()
            else:
                await self._sock.say(self._outgoing.read())
                return

    async def _hear_more(self) -> None:
        self._take(await self._sock.hear(RECORD_BYTES))

    def _receive(self, wanted: int) -> None:
        if self._cipher is None:
            self._cipher = memoryview(bytearray(PIECE_BYTES))
        least = max(1, wanted - RECORD_BYTES)  # so much of it OpenSSL may hold already, of a record without its end
        self._take(self._cipher[: self._sock.recv_least(self._cipher, least)])

    def _take(self, data: bytes | memoryview) -> None:
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _send(self, data: memoryview) -> int:
        """All of it, and what was kept before it, as one; or BlockingIOError, until the same is asked for again."""
        if not self._accepted:
            if self._kept:
                head = data[: RECORD_BYTES - len(self._kept)]
                self.connection.write(b"".join((self._kept, head)))
                self._kept = b""
                data = data[len(head) :]
                self._accepted = len(head)
            if data:
                self._accepted += self.connection.write(data)
            self._unsent = memoryview(self._outgoing.read())
        while self._unsent:
            self._unsent = self._unsent[self._sock.send(self._unsent) :]
        accepted, self._accepted = self._accepted, 0
        return accepted
