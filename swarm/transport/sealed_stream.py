"""Sealed records below a bulk session: a `ByteStream` that continues a TLS connection with records of its own.

    asker -> holder   TLS: preamble | share: 32 bytes |                    zeros: this end cannot seal
    holder -> asker   TLS: verdict  | share: 32 bytes |                    with two shares that are not zeros, then:
                      | size: u32 | sealed bytes | tag: 16 bytes | ...     a record has 1 byte to 2 MiB

TLS proves both ends and keeps their shares secret; `security.record_seal` says how records are sealed, and why. Only
the holder sends records, since an asker sends nothing after its preamble. A connection that is cut between two
transfers loses nothing, and within a transfer it fails the transfer, whose END is sealed too.

A frame's header is a record of its own, so that a payload is opened into the place where it belongs. A read takes the
header of the next frame along. Sealed bytes that could not be sent are kept, as in `tls_stream`.

Must not know: frames, tokens, the contents of certificates.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from swarm.errors import TransportError
from swarm.security.record_seal import (
    CANNOT,
    HEADER_BYTES,
    OVERHEAD_BYTES,
    RECORD_BYTES_MAX,
    SHARE_BYTES,
    TAG_BYTES,
    RecordOpener,
    RecordSealer,
    SealBroken,
    new_share,
    secret_of,
    size_of,
)
from swarm.transport.byte_stream import KEPT_BYTES_MAX, ByteStream, CoveredStream, PlainStream
from swarm.transport.tls_stream import TlsStream

AHEAD_BYTES = 16 + OVERHEAD_BYTES  # a frame's header as a record, which follows the last record of a payload at once


async def ask_to_seal(stream: TlsStream, share: bytes) -> ByteStream:
    """The asker's end after the verdict, given the share that it has sent. Raises OSError."""
    theirs = await _read_share(stream)
    return stream if CANNOT in (share, theirs) else SealedStream(*stream.leave(), opens=secret_of(share, theirs))


async def accept_sealing(stream: TlsStream, verdict: bytes) -> ByteStream:
    """The holder's end after the preamble: sends the verdict. Raises OSError."""
    theirs, share = await _read_share(stream), new_share()
    await stream.async_sendall(verdict + share)
    return stream if CANNOT in (share, theirs) else SealedStream(*stream.leave(), seals=secret_of(theirs, share))


async def _read_share(stream: TlsStream) -> bytes:
    share = b""
    while len(share) < SHARE_BYTES:
        part = await stream.async_recv(SHARE_BYTES - len(share))
        if not part:
            raise ConnectionError("it left early")
        share += part
    return share


class SealedStream(CoveredStream):
    """A connection after its TLS, which it owns; it either opens records or seals them, under the given secret.

    `ahead`: bytes that came with the end of TLS. Raises ConnectionError where none may follow.
    """

    def __init__(
        self, sock: PlainStream, ahead: bytes, *, opens: bytes | None = None, seals: bytes | None = None
    ) -> None:
        if seals and ahead:
            raise ConnectionError("it said more than was expected")
        super().__init__(sock)
        self._opener = RecordOpener(opens) if opens else None
        self._sealer = RecordSealer(seals) if seals else None
        self._cipher = memoryview(bytearray(RECORD_BYTES_MAX + OVERHEAD_BYTES + AHEAD_BYTES if opens else 0))
        self._cipher[: len(ahead)] = ahead
        self._begin, self._end = 0, len(ahead)  # of received bytes in `_cipher`
        self._clear = memoryview(b"")  # of a record that is longer than the reader's room, in `_spare`
        self._spare: memoryview | None = None
        self._out = memoryview(bytearray(RECORD_BYTES_MAX + 2 * OVERHEAD_BYTES + KEPT_BYTES_MAX if seals else 0))

    async def async_recv(self, most: int) -> bytes:
        """Not in this phase."""
        raise TransportError("records are for threads")

    async def async_sendall(self, data: bytes) -> None:
        """Not in this phase."""
        raise TransportError("records are for threads")

    def recv_now(self) -> bytes | None:
        """As PlainStream."""
        return self._sock.recv_now()

    def recv_into(self, room: memoryview) -> int:
        """Opens records until the room is full or no byte comes in time."""
        filled = 0
        while filled < len(room):
            if self._clear:
                part = self._clear[: len(room) - filled]
                room[filled : filled + len(part)] = part
                self._clear = self._clear[len(part) :]
                filled += len(part)
                continue
            try:
                size = self._await_record()
            except BlockingIOError:
                if filled:
                    break
                raise
            if not size:
                break
            filled += self._open(size, room[filled:])
        return filled

    def recvmsg_into(self, rooms: Sequence[memoryview]) -> tuple[int]:
        """Fills the first room only: the next header is in memory, so that reading on costs no system call."""
        return (self.recv_into(rooms[0]),)

    def readable(self) -> bool:
        """True also for a partial record, for whose rest a read then waits."""
        return bool(self._clear) or self._begin < self._end or self._sock.readable()

    def send(self, data: memoryview, flags: int = 0) -> int:
        """A record. A header with MSG_MORE is kept for the next call."""
        if self._keeps(data, flags):
            return len(data)
        return self.sendmsg((data[:0], data))

    def sendmsg(self, parts: Sequence[memoryview]) -> int:
        """The header and the begin of the payload, a record each."""
        head, rest = parts
        if not self._accepted:
            part = rest[:RECORD_BYTES_MAX]
            begin = self._seal(head, at=self._seal(memoryview(self._kept), at=0))
            self._unsent, self._kept = self._out[: self._seal(part, at=begin)], b""
            self._accepted = len(head) + len(part)
        return self._send_rest()

    def send_file(self, fd: int, offset: int, size: int) -> int:
        """A record, read into memory and sealed there."""
        if not self._accepted:
            begin = self._seal(memoryview(self._kept), at=0)
            room = self._out[begin + HEADER_BYTES :][: min(size, RECORD_BYTES_MAX)]
            read = os.preadv(fd, [room], offset)
            if not read:
                return 0
            self._unsent, self._kept = self._out[: self._seal(room[:read], at=begin)], b""
            self._accepted = read
        return self._send_rest()

    def _await_record(self) -> int:
        """The clear bytes of the next record, which is here as a whole; 0 at the end of the connection.

        Raises BlockingIOError; TransportError for a record of a forbidden size.
        """
        while (missing := self._missing()) > 0:
            if self._end + missing > len(self._cipher) - AHEAD_BYTES:  # `_missing` has bounded it
                here = self._end - self._begin
                self._cipher[:here] = self._cipher[self._begin : self._end]
                self._begin, self._end = 0, here
            end = self._end + missing + AHEAD_BYTES if missing > HEADER_BYTES else len(self._cipher)
            got = self._sock.recv_least(self._cipher[self._end : end], missing)
            if not got:
                return 0
            self._end += got
        return self._size()

    def _missing(self) -> int:
        """Bytes of the next record, or of its header, that are not here yet."""
        here = self._end - self._begin
        return (HEADER_BYTES if here < HEADER_BYTES else OVERHEAD_BYTES + self._size()) - here

    def _size(self) -> int:
        try:
            return size_of(bytes(self._cipher[self._begin : self._begin + HEADER_BYTES]))
        except SealBroken as error:
            raise TransportError(str(error)) from None

    def _open(self, size: int, room: memoryview) -> int:
        """Opens the record that is here; returns how much of the room it fills. Raises TransportError."""
        opener = self._opener
        if opener is None:
            raise TransportError("this end sends records")
        begin = self._begin + HEADER_BYTES
        head, self._begin = bytes(self._cipher[self._begin : begin]), begin + size + TAG_BYTES
        fits = size <= len(room)
        if not fits and self._spare is None:
            self._spare = memoryview(bytearray(RECORD_BYTES_MAX))
        target = (room if fits or self._spare is None else self._spare)[:size]
        try:
            opener.open(head, self._cipher[begin : self._begin], target)
        except SealBroken as error:
            raise TransportError(str(error)) from None
        if self._begin == self._end:
            self._begin = self._end = 0
        if fits:
            return size
        self._clear = target
        return 0

    def _seal(self, clear: memoryview, *, at: int) -> int:
        """Seals a record into `_out` at this offset, unless it is empty; returns the offset after it."""
        sealer = self._sealer
        if sealer is None:
            raise TransportError("this end receives records")
        return at + sealer.seal(clear, self._out[at:]) if clear else at
