"""Does a socket inside TLS do for a session what a plain one does, and nothing in the open?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from swarm.security import cluster_key
from swarm.security.certificates import Identity, Refusal, node_of, refusal
from swarm.security.cluster_key import Keyring
from swarm.transport.tls_stream import PIECE_BYTES, RECORD_BYTES, TlsStream

DEADLINE_S = 20.0
POLL_S = 0.05
NOW = time.time()
KEY = cluster_key.generate()
HOLDER, ASKER = (Identity(Keyring((KEY,)), digit * 16, now_s=NOW) for digit in "01")
BIG = os.urandom(3 * PIECE_BYTES + 12345)


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


@contextlib.asynccontextmanager
async def session(holder: ssl.SSLContext = HOLDER.server) -> AsyncIterator[tuple[TlsStream, TlsStream]]:
    """The holder's end and the asker's, after their handshake."""
    ours, theirs = connected()
    ends = await asyncio.gather(
        TlsStream.open(ours, holder, server_side=True), TlsStream.open(theirs, ASKER.client, server_side=False)
    )
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.close()


def write_all(size: int, write: Callable[[int], int], *, stuck: threading.Event) -> None:
    done = 0
    while done < size:
        try:
            done += write(done)
        except BlockingIOError:
            stuck.set()


def read_all(end: TlsStream, size: int) -> bytes:
    room = memoryview(bytearray(size))
    done = 0
    while done < size:
        with contextlib.suppress(BlockingIOError):
            got = end.recv_into(room[done:])
            assert got
            done += got
    return bytes(room)


def test_what_is_said_first_is_heard_and_both_know_each_other() -> None:
    async def scenario() -> None:
        async with session() as (holder, asker):
            assert (node_of(holder.connection), node_of(asker.connection)) == ("1" * 16, "0" * 16)
            await asker.async_sendall(b"token")
            assert await holder.async_recv(100) == b"token"
            await holder.async_sendall(b"\0")
            assert await asker.async_recv(1) == b"\0"
            asker.close()
            assert await holder.async_recv(1) == b""

    run(scenario)


@pytest.mark.parametrize("how", ["memory", "message", "file", "header and memory", "header and file"])
def test_do_bytes_survive_a_reader_who_is_slow(how: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"#" + BIG)

    async def scenario() -> None:
        view = memoryview(BIG)
        fd = os.open(tmp_path / "file", os.O_RDONLY)
        try:
            async with session() as (holder, asker):
                holder.block(POLL_S)
                asker.block(POLL_S)
                write = {
                    "memory": lambda done: holder.send(view[done:]),
                    "message": lambda done: holder.sendmsg((view[done : done + 16], view[done + 16 :])),
                    "file": lambda done: holder.send_file(fd, 1 + done, len(BIG) - done),
                    "header and memory": lambda done: (
                        holder.send(view[done:]) if done else holder.send(view[:16], socket.MSG_MORE)
                    ),
                    "header and file": lambda done: (
                        holder.send_file(fd, 1 + done, len(BIG) - done)
                        if done
                        else holder.send(view[:16], socket.MSG_MORE)
                    ),
                }[how]
                stuck = threading.Event()
                writing = asyncio.create_task(asyncio.to_thread(write_all, len(BIG), write, stuck=stuck))
                # It has to give up and try again, which is what could go wrong.
                assert await asyncio.to_thread(stuck.wait, DEADLINE_S)
                assert await asyncio.to_thread(read_all, asker, len(BIG)) == BIG
                await writing
        finally:
            os.close(fd)

    run(scenario)


def test_does_nothing_travel_in_the_open() -> None:
    async def scenario() -> None:
        async with session() as (holder, asker):
            holder.block(POLL_S)
            holder.send(memoryview(b"secret weights" * 100))
            seen = asker._sock.recv(1 << 20)  # beneath TLS
            assert len(seen) > 1400
            assert b"secret" not in seen

    run(scenario)


def test_does_an_idle_end_give_up_for_a_while_and_a_gone_one_for_good() -> None:
    async def scenario() -> None:
        async with session() as (holder, asker):
            asker.block(POLL_S)
            with pytest.raises(BlockingIOError):
                asker.recv_into(memoryview(bytearray(9)))
            holder.shutdown(socket.SHUT_RDWR)
            assert asker.recvmsg_into([memoryview(bytearray(9)), memoryview(bytearray(9))]) == (0,)

    run(scenario)


def test_is_a_file_that_became_shorter_noticed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"short")

    async def scenario() -> None:
        fd = os.open(tmp_path / "file", os.O_RDONLY)
        try:
            async with session() as (holder, _):
                holder.block(POLL_S)
                assert holder.send_file(fd, 2, 100) == 3
                assert holder.send_file(fd, 5, 100) == 0
        finally:
            os.close(fd)

    run(scenario)


@pytest.mark.parametrize("how", ["leaves", "talks"])
def test_does_a_holder_notice_an_asker_that_leaves_or_talks(how: str) -> None:
    async def scenario() -> None:
        async with session() as (holder, asker):
            holder.block(POLL_S)
            assert holder.recv_now() is None
            if how == "leaves":
                asker.close()
            else:
                await asker.async_sendall(b"?")
            assert (holder.recv_now() == b"") == (how == "leaves")

    run(scenario)


def test_is_nothing_encrypted_taken_for_content_when_a_reader_is_stopped() -> None:
    """Shutting down from another thread while a thread reads: what it gets is what was sent, or the end."""

    async def scenario() -> None:
        async with session() as (holder, asker):
            holder.block(POLL_S)
            asker.block(DEADLINE_S)
            room = memoryview(bytearray(4 * RECORD_BYTES))
            got = list[int]()

            def read() -> None:
                with contextlib.suppress(OSError):
                    while size := asker.recv_into(room):
                        got.append(size)
                        assert bytes(room[:size]) == b"x" * size

            reader = threading.Thread(target=read)
            reader.start()
            for _ in range(20):
                holder.send(memoryview(b"x" * RECORD_BYTES))
            asker.shutdown(socket.SHUT_RDWR)
            await asyncio.to_thread(reader.join, DEADLINE_S)
            assert not reader.is_alive()
            assert sum(got) <= 20 * RECORD_BYTES

    run(scenario)


def test_is_a_stranger_refused_and_its_socket_closed() -> None:
    stranger = Identity(Keyring((cluster_key.generate(),)), "2" * 16, now_s=NOW)

    async def scenario() -> None:
        ours, theirs = connected()
        outcomes = await asyncio.gather(
            TlsStream.open(ours, HOLDER.server, server_side=True),
            TlsStream.open(theirs, stranger.client, server_side=False),
            return_exceptions=True,
        )
        reasons = [refusal(outcome) for outcome in outcomes if isinstance(outcome, BaseException)]
        assert reasons == [Refusal.REFUSES_KEY, Refusal.OTHER_KEY]
        assert ours.fileno() == theirs.fileno() == -1

    run(scenario)


def test_does_a_refused_asker_hear_so_when_it_listens() -> None:
    late = Identity(Keyring((KEY,)), "2" * 16, now_s=NOW - 30 * 86400)

    async def scenario() -> None:
        ours, theirs = connected()
        holder, asker = await asyncio.gather(
            TlsStream.open(ours, HOLDER.server, server_side=True),
            TlsStream.open(theirs, late.client, server_side=False),
            return_exceptions=True,
        )
        assert isinstance(holder, ssl.SSLError)
        assert isinstance(asker, TlsStream)
        assert refusal(holder) is Refusal.CLOCK
        with pytest.raises(ssl.SSLError) as caught:
            await asker.async_recv(1)
        assert refusal(caught.value) is Refusal.REFUSES_CLOCK
        asker.close()

    run(scenario)


def test_is_a_cancelled_handshake_closed() -> None:
    async def scenario() -> None:
        ours, theirs = connected()
        with theirs, pytest.raises(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await TlsStream.open(ours, HOLDER.server, server_side=True)
        assert ours.fileno() == -1

    run(scenario)
