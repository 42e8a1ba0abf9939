"""TLS below a bulk session: a `ByteStream` with encryption, whose peer has presented a certificate.

OpenSSL works in memory, and the socket is read and written in pieces of PIECE_BYTES. With OpenSSL on the socket, each
record of 16 KiB would cost one or two system calls and wake the peer, which takes longer than its encryption.

Encrypted bytes that could not be sent are kept, and BlockingIOError is raised; the caller repeats the call with the
same bytes until it returns their count. Must not know: frames, the origin of contexts.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Sequence

from swarm.security.certificates import alert
from swarm.security.tls_handshake import part
from swarm.transport.byte_stream import CoveredStream, PlainStream

RECORD_BYTES = 16 << 10  # most bytes of a TLS record
PIECE_BYTES = 16 * RECORD_BYTES  # fits the core's cache
ALERT = b"\x15"  # the first byte of a TLS alert


class TlsStream(CoveredStream):
    """A connection inside TLS. Made by `open`."""

    def __init__(self, sock: PlainStream, context: ssl.SSLContext, *, server_side: bool) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.connection = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._cipher: memoryview | None = None  # read from the socket
        self._clear: memoryview | None = None  # read from a file

    @classmethod
    async def open(cls, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> TlsStream:
        """Performs the handshake over a connected socket, which this owns. No deadline. Raises OSError."""
        stream = cls(PlainStream(sock), context, server_side=server_side)
        try:
            await stream._shake_hands()
        except BaseException as error:
            if isinstance(error, ssl.SSLError):
                await part(stream._sock, alert(error))
            stream.close()
            raise
        return stream

    async def async_recv(self, most: int) -> bytes:
        """On the loop."""
        while True:
            try:
                return self.connection.read(most)
            except ssl.SSLWantReadError:
                await self._recv_more()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    async def async_sendall(self, data: bytes) -> None:
        """On the loop."""
        self.connection.write(data)
        await self._sock.async_sendall(self._outgoing.read())

    def recv_now(self) -> bytes | None:
        """Below TLS: after the handshake an asker sends nothing but an alert."""
        try:
            first = self._sock.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:
            return None
        return b"" if first == ALERT else first

    def recv_into(self, room: memoryview) -> int:
        """All decrypted bytes that are there: a caller's turn costs as much as a record."""
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
        """Fills the first room only: the rest is in memory, so that reading on costs no system call."""
        return (self.recv_into(rooms[0]),)

    def readable(self) -> bool:
        """True also for a partial record, for whose rest a read then waits."""
        return bool(self.connection.pending() or self._incoming.pending) or self._sock.readable()

    def send(self, data: memoryview, flags: int = 0) -> int:
        """Up to PIECE_BYTES. A header with MSG_MORE is kept for the next call."""
        if self._keeps(data, flags):
            return len(data)
        return self._send(data[:PIECE_BYTES])

    def sendmsg(self, parts: Sequence[memoryview]) -> int:
        """Sends the header and the begin of the payload in a single record."""
        head, rest = parts
        return self._send(memoryview(b"".join((head, rest[: RECORD_BYTES - len(head)]))))

    def send_file(self, fd: int, offset: int, size: int) -> int:
        """Up to PIECE_BYTES, read into memory for encryption."""
        if self._clear is None:
            self._clear = memoryview(bytearray(PIECE_BYTES))
        read = 0 if self._accepted else os.preadv(fd, [self._clear[:size]], offset)
        return self._send(self._clear[:read]) if read or self._accepted else 0

    def leave(self) -> tuple[PlainStream, bytes]:
        """Ends TLS between two messages: the connection, and received bytes that follow the last TLS record.

        Raises ConnectionError when bytes inside TLS are unread.
        """
        if self.connection.pending():
            raise ConnectionError("it said more than was expected")
        return self._sock, self._incoming.read()

    async def _shake_hands(self) -> None:
        while True:
            try:
                self.connection.do_handshake()
            except ssl.SSLWantReadError:
                await self._sock.async_sendall(self._outgoing.read())
                await self._recv_more()
            else:
                await self._sock.async_sendall(self._outgoing.read())
                return

    async def _recv_more(self) -> None:
        self._take(await self._sock.async_recv(RECORD_BYTES))

    def _receive(self, wanted: int) -> None:
        if self._cipher is None:
            self._cipher = memoryview(bytearray(PIECE_BYTES))
        least = max(1, wanted - RECORD_BYTES)  # OpenSSL may hold the rest already, as a partial record
        self._take(self._cipher[: self._sock.recv_least(self._cipher, least)])

    def _take(self, data: bytes | memoryview) -> None:
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _send(self, data: memoryview) -> int:
        """Sends all of it after the kept header, or raises BlockingIOError: the next call must repeat it."""
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
        return self._send_rest()
