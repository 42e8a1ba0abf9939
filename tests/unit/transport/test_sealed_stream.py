"""Do sealed records after a TLS handshake do for a session what a plain socket does, and nothing in the open?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from swarm.errors import TransportError
from swarm.security import cluster_key
from swarm.security.certificates import Identity
from swarm.security.cluster_key import Keyring
from swarm.security.record_seal import CANNOT, OVERHEAD_BYTES, RECORD_BYTES_MAX, SHARE_BYTES, new_share
from swarm.transport import sealed_stream
from swarm.transport.byte_stream import ByteStream, PlainStream
from swarm.transport.sealed_stream import SealedStream, accept_sealing, ask_to_seal
from swarm.transport.tls_stream import TlsStream

DEADLINE_S = 20.0
POLL_S = 0.05
SECRET = b"s" * 32
MEMBER = Identity(Keyring((cluster_key.generate(),)), "0" * 16, now_s=time.time())
BIG = os.urandom(3 * RECORD_BYTES_MAX + 12345)
HEADER = b"frame header 16b"


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    asyncio.run(within_deadline())


def connected() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair()
    for sock in pair:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 << 10)  # so that writers have to wait
    return pair


@contextlib.contextmanager
def ends() -> Iterator[tuple[SealedStream, SealedStream]]:
    """The holder's end and the asker's, without their TLS."""
    ours, theirs = connected()
    holder, asker = (
        SealedStream(PlainStream(ours), b"", seals=SECRET),
        SealedStream(PlainStream(theirs), b"", opens=SECRET),
    )
    for end in (holder, asker):
        end.block(POLL_S)
    try:
        yield holder, asker
    finally:
        holder.close()
        asker.close()


@contextlib.asynccontextmanager
async def tls() -> AsyncIterator[tuple[TlsStream, TlsStream]]:
    ours, theirs = connected()
    pair = await asyncio.gather(
        TlsStream.open(ours, MEMBER.server, server_side=True), TlsStream.open(theirs, MEMBER.client, server_side=False)
    )
    try:
        yield pair[0], pair[1]
    finally:
        for end in pair:
            end.close()


def write_all(size: int, write: Callable[[int], int], *, stuck: threading.Event) -> None:
    done = 0
    while done < size:
        try:
            done += write(done)
        except BlockingIOError:
            stuck.set()


def read_all(end: ByteStream, size: int, *, room_bytes: int) -> bytes:
    """Through rooms of so many bytes."""
    parts = []
    left = size
    while left:
        room = memoryview(bytearray(min(left, room_bytes)))
        with contextlib.suppress(BlockingIOError):
            got = end.recvmsg_into([room, memoryview(bytearray(16))])[0]
            assert got
            parts.append(bytes(room[:got]))
            left -= got
    return b"".join(parts)


@pytest.mark.parametrize("room_bytes", [len(BIG), 1 << 20, 100_000, 4096])
@pytest.mark.parametrize("how", ["memory", "message", "file", "header and memory", "header and file"])
def test_do_bytes_survive_a_reader_who_is_slow(how: str, room_bytes: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"#" + BIG)
    view = memoryview(BIG)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with ends() as (holder, asker):
        write = {
            "memory": lambda done: holder.send(view[done:]),
            "message": lambda done: holder.sendmsg((view[done : done + 16], view[done + 16 :])),
            "file": lambda done: holder.send_file(fd, 1 + done, len(BIG) - done),
            "header and memory": lambda done: (
                holder.send(view[done:]) if done else holder.send(view[:16], socket.MSG_MORE)
            ),
            "header and file": lambda done: (
                holder.send_file(fd, 1 + done, len(BIG) - done) if done else holder.send(view[:16], socket.MSG_MORE)
            ),
        }[how]
        stuck = threading.Event()
        writer = threading.Thread(target=write_all, args=(len(BIG), write), kwargs={"stuck": stuck})
        writer.start()
        assert stuck.wait(DEADLINE_S)  # it has to give up and try again, which is what could go wrong
        assert read_all(asker, len(BIG), room_bytes=room_bytes) == BIG
        writer.join(DEADLINE_S)
    os.close(fd)


def test_is_an_empty_payload_only_its_header() -> None:
    with ends() as (holder, asker):
        assert holder.sendmsg((memoryview(HEADER), memoryview(b""))) == len(HEADER)
        seen = asker._sock.recv(1 << 20)
        assert len(seen) == len(HEADER) + OVERHEAD_BYTES
        assert HEADER not in seen


def test_is_a_header_that_came_along_read_without_the_socket() -> None:
    with ends() as (holder, asker):
        for payload in (b"x" * 1000, b"y" * 1000):
            holder.sendmsg((memoryview(HEADER), memoryview(payload)))
        assert read_all(asker, 16 + 1000, room_bytes=16) == HEADER + b"x" * 1000
        assert asker.readable()
        asker._sock.shutdown(socket.SHUT_RD)
        room = memoryview(bytearray(16))
        assert asker.recv_into(room) == 16
        assert bytes(room) == HEADER


def test_does_an_idle_end_give_up_for_a_while_and_a_gone_one_for_good() -> None:
    with ends() as (holder, asker):
        room = memoryview(bytearray(9))
        with pytest.raises(BlockingIOError):
            asker.recv_into(room)
        assert not asker.readable()
        holder._sock.send(b"\0\0")  # half of a record's header
        with pytest.raises(BlockingIOError):
            asker.recv_into(room)
        assert asker.readable()
        holder.shutdown(socket.SHUT_RDWR)
        assert asker.recv_into(room) == 0


@pytest.mark.parametrize("at", [0, 3, 4, 500, 1019, 1020, 1023, 1024, 1500])
def test_does_an_altered_record_end_the_stream_with_the_records_before_it_read(at: int) -> None:
    with ends() as (holder, asker):
        for letter in (b"x", b"y"):
            holder.send(memoryview(letter * 1000))
        wire = bytearray(asker._sock.recv(1 << 20))
        wire[at] ^= 1
        holder._sock.send(wire)
        holder.shutdown(socket.SHUT_WR)
        read = b""
        room = memoryview(bytearray(1000))
        with contextlib.suppress(TransportError):
            while got := asker.recv_into(room):
                read += bytes(room[:got])
        assert read == (b"" if at < 1020 else b"x" * 1000)


@pytest.mark.parametrize("size", [0, RECORD_BYTES_MAX + 1, 2**32 - 1])
def test_is_a_record_of_a_forbidden_size_refused_at_once(size: int) -> None:
    with ends() as (holder, asker):
        holder._sock.send(size.to_bytes(4))
        with pytest.raises(TransportError, match=f"record of {size} bytes"):
            asker.recv_into(memoryview(bytearray(9)))


def test_does_each_end_go_one_way() -> None:
    with ends() as (holder, asker):
        with pytest.raises(TransportError, match="this end receives"):
            asker.send(memoryview(b"?"))
        asker._sock.send(b"?")
        assert holder.recv_now() == b"?"


@pytest.mark.parametrize("how", ["leaves", "talks"])
def test_does_a_holder_notice_an_asker_that_leaves_or_talks(how: str) -> None:
    with ends() as (holder, asker):
        assert holder.recv_now() is None
        if how == "leaves":
            asker.close()
        else:
            asker._sock.send(b"?")
        assert (holder.recv_now() == b"") == (how == "leaves")


def test_is_a_file_that_became_shorter_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"short")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    with ends() as (holder, _):
        assert holder.send_file(fd, 2, 100) == 3
        assert holder.send_file(fd, 5, 100) == 0
    os.close(fd)


async def agree(holder: TlsStream, asker: TlsStream, *, share: bytes | None = None) -> tuple[ByteStream, ByteStream]:
    """The two ends of a session after preamble and verdict."""
    share = new_share() if share is None else share
    await asker.async_sendall(share)
    accepted = await accept_sealing(holder, b"\0")
    assert await asker.async_recv(1) == b"\0"
    return accepted, await ask_to_seal(asker, share)


def test_do_two_ends_agree_inside_tls_and_bytes_that_follow_at_once_are_read() -> None:
    async def scenario() -> None:
        async with tls() as (holder, asker):
            share = new_share()
            await asker.async_sendall(share)
            sealing = await accept_sealing(holder, b"\0")
            sealing.block(POLL_S)
            sealing.send(memoryview(b"secret weights" * 100))  # arrives together with the verdict
            assert await asker.async_recv(1) == b"\0"
            opening = await ask_to_seal(asker, share)
            opening.block(POLL_S)
            assert isinstance(opening, SealedStream)
            assert read_all(opening, 1400, room_bytes=1000) == b"secret weights" * 100

    run(scenario)


@pytest.mark.parametrize("who", ["holder", "asker", "both"])
def test_do_two_ends_stay_inside_tls_if_one_cannot_seal(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if who != "asker":
        monkeypatch.setattr(sealed_stream, "new_share", lambda: CANNOT)

    async def scenario() -> None:
        async with tls() as (holder, asker):
            kept = await agree(holder, asker, share=CANNOT if who != "holder" else os.urandom(SHARE_BYTES))
            assert kept == (holder, asker)
            for end in kept:
                end.block(POLL_S)
            holder.send(memoryview(b"weights"))
            assert read_all(asker, 7, room_bytes=7) == b"weights"

    run(scenario)


def test_has_each_connection_a_secret_of_its_own() -> None:
    async def scenario() -> None:
        wires = set[bytes]()
        for _ in range(3):
            async with tls() as (holder, asker):
                sealing, opening = await agree(holder, asker)
                sealing.block(POLL_S)
                opening.block(POLL_S)
                sealing.send(memoryview(b"weights"))
                assert isinstance(opening, SealedStream)
                wires.add(opening._sock.recv(100))
        assert len(wires) == 3

    run(scenario)


def test_is_an_asker_that_goes_on_talking_refused() -> None:
    async def scenario() -> None:
        for more in (b"inside TLS", b""):
            async with tls() as (holder, asker):
                await asker.async_sendall(new_share() + more)
                if not more:
                    await asker._sock.async_sendall(b"after it")
                with pytest.raises(ConnectionError, match="more than was expected"):
                    await accept_sealing(holder, b"\0")

    run(scenario)


def test_is_an_end_that_leaves_before_its_share_noticed() -> None:
    async def scenario() -> None:
        async with tls() as (holder, asker):
            await asker.async_sendall(b"only some")
            asker.close()
            with pytest.raises(ConnectionError, match="left early"):
                await accept_sealing(holder, b"\0")

    run(scenario)
