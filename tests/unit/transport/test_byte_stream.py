"""When does a thread that reads return to Python: for what is there, for some bytes, or once its room is full?"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from swarm.transport import byte_stream
from swarm.transport.byte_stream import LEAST_BYTES_MAX, PlainStream

DEADLINE_S = 20.0
POLL_S = 0.05
FAST = 2 * LEAST_BYTES_MAX


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, PlainStream]]:
    """A TCP connection: the writer's socket, and the reader."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        writer = socket.create_connection(server.getsockname())
        reader = PlainStream(server.accept()[0])
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 * FAST)
    reader.block(POLL_S)
    reader.fill_rooms()
    with writer, reader:
        yield writer, reader


def await_bytes(reader: PlainStream, size: int) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while len(reader.recv(size, socket.MSG_PEEK)) < size:
        assert time.monotonic() < deadline_s


def become_fast(writer: socket.socket, reader: PlainStream) -> None:
    """The reader finds so many bytes that the link counts as fast."""
    writer.sendall(b"-" * FAST)
    await_bytes(reader, FAST)
    assert reader.recv_into(memoryview(bytearray(FAST))) == FAST


def writing(writer: socket.socket, data: bytes) -> threading.Thread:
    thread = threading.Thread(target=writer.sendall, args=(data,))
    thread.start()
    return thread


def test_does_a_slow_link_return_with_what_is_there() -> None:
    with connected() as (writer, reader):
        writer.sendall(b"x" * 1000)
        await_bytes(reader, 1000)
        assert reader.recv_into(memoryview(bytearray(1 << 20))) == 1000


@pytest.mark.parametrize("how", ["one room", "several rooms", "some of a room"])
def test_does_a_fast_link_fill_the_room_at_once(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_stream, "FAST_BYTES_PER_S", 0.0)  # however slow this machine is
    with connected() as (writer, reader):
        become_fast(writer, reader)
        reader.block(DEADLINE_S)
        size, header = 40 * FAST, bytearray(16)
        thread = writing(writer, b"x" * size + b"header of a fram")
        room = bytearray(size)
        if how == "several rooms":
            assert reader.recvmsg_into([memoryview(room), memoryview(header)])[0] == size + 16
            assert header == b"header of a fram"
        elif how == "one room":
            assert reader.recv_into(memoryview(room)) == size
        else:
            assert reader.recv_least(memoryview(room), LEAST_BYTES_MAX) == size
        assert room == b"x" * size
        thread.join(DEADLINE_S)


def test_does_a_lone_stream_return_with_what_is_there() -> None:
    with connected() as (writer, reader):
        reader._fills_rooms = False
        become_fast(writer, reader)
        writer.sendall(b"x" * FAST)
        await_bytes(reader, FAST)
        assert reader.recv_into(memoryview(bytearray(1 << 20))) == FAST
        assert not reader._is_fast


def test_is_a_small_read_of_a_fast_link_not_kept_waiting() -> None:
    with connected() as (writer, reader):
        become_fast(writer, reader)
        writer.sendall(b"x" * 10)
        await_bytes(reader, 10)
        assert reader.recv_into(memoryview(bytearray(16))) == 10


def test_does_a_link_that_stops_or_ends_give_what_came() -> None:
    with connected() as (writer, reader):
        for _ in range(2):  # a link that has stopped may become fast again
            become_fast(writer, reader)
            writer.sendall(b"x" * 1000)
            assert reader.recv_into(memoryview(bytearray(1 << 20))) == 1000
            with pytest.raises(BlockingIOError):
                reader.recv_into(memoryview(bytearray(1 << 20)))
        become_fast(writer, reader)
        with pytest.raises(BlockingIOError):
            reader.recv_into(memoryview(bytearray(1 << 20)))
        become_fast(writer, reader)
        writer.close()
        assert reader.recv_into(memoryview(bytearray(1 << 20))) == 0


def test_is_a_link_that_became_slow_read_as_a_slow_one() -> None:
    with connected() as (writer, reader):
        become_fast(writer, reader)
        writer.sendall(b"x" * 1000)
        assert reader.recv_into(memoryview(bytearray(1 << 20))) == 1000  # after `poll_s`
        reader.block(DEADLINE_S)
        thread = writing(writer, b"y" * LEAST_BYTES_MAX)
        assert reader.recv_into(memoryview(bytearray(1 << 20))) >= 1  # a fast link would wait for all of it
        thread.join(DEADLINE_S)


def test_does_a_thread_that_waits_for_a_full_room_leave_when_the_connection_is_shut() -> None:
    with connected() as (writer, reader):
        become_fast(writer, reader)
        reader.block(DEADLINE_S)
        got = list[int]()
        thread = threading.Thread(target=lambda: got.append(reader.recv_into(memoryview(bytearray(1 << 20)))))
        thread.start()
        writer.sendall(b"x" * 1000)
        reader.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S / 2)
        assert not thread.is_alive()
        assert got[0] in (0, 1000)
