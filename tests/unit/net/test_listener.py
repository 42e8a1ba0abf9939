"""One port for everything: who gets which connection, and what can strangers do to it?"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from swarm.errors import SettingsError
from swarm.net import listener as listener_module
from swarm.net.listener import Handler, Listener

DEADLINE_S = 20.0


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    asyncio.run(within_deadline())


def echo(name: bytes) -> Handler:
    """Answers with its name and the first bytes it reads, then hangs up."""

    async def handle(sock: socket.socket) -> None:
        with sock:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, name + b":" + await loop.sock_recv(sock, 100))

    return handle


@contextlib.asynccontextmanager
async def listening(default: Handler | None = None) -> AsyncIterator[Listener]:
    listener = await Listener.open("127.0.0.1", 0)
    listener.serve({b"SWRM": echo(b"bulk"), b"\x16\x03": echo(b"tls")}, default or echo(b"default"))
    try:
        yield listener
    finally:
        await listener.close()


async def dial(listener: Listener) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, listener.address)
    return sock


async def read_all(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    with sock, contextlib.suppress(ConnectionResetError):
        while part := await loop.sock_recv(sock, 1000):
            data += part
    return data


async def ask(listener: Listener, *parts: bytes) -> bytes:
    sock = await dial(listener)
    for part in parts:
        await asyncio.get_running_loop().sock_sendall(sock, part)
        await asyncio.sleep(0)
    return await read_all(sock)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - every scenario has a deadline
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("parts", "answer"),
    [
        ([b"SWRM and more"], b"bulk:SWRM and more"),
        ([b"GET / HTTP/1.1"], b"default:GET / HTTP/1.1"),
        ([b"SWRN"], b"default:SWRN"),
        ([b"\x16\x03\x01\x02"], b"tls:\x16\x03\x01\x02"),
        ([b"\x16\x03\x03\x00"], b"tls:\x16\x03\x03\x00"),
    ],
)
def test_are_first_bytes_routed_and_left_in_place(parts: list[bytes], answer: bytes) -> None:
    async def scenario() -> None:
        async with listening() as listener:
            assert await ask(listener, *parts) == answer

    run(scenario)


def test_does_a_split_first_word_still_find_its_route() -> None:
    async def scenario() -> None:
        async with listening() as listener:
            sock = await dial(listener)
            loop = asyncio.get_running_loop()
            await until(lambda: "1 strangers" in repr(listener))
            for byte in (b"S", b"W", b"R", b"M"):
                await loop.sock_sendall(sock, byte)
                for _ in range(5):  # turns in which the listener looks at the bytes so far
                    await asyncio.sleep(0)
            assert await read_all(sock) == b"bulk:SWRM"

    run(scenario)


def test_is_a_port_in_use_named() -> None:
    async def scenario() -> None:
        async with listening() as listener:
            host, port = listener.address
            with pytest.raises(SettingsError, match=str(port)) as caught:
                await Listener.open(host, port)
            assert caught.value.setting == "listen"

    run(scenario)


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host"])
def test_is_a_host_that_is_not_ours_a_settings_error(host: str) -> None:
    async def scenario() -> None:
        with pytest.raises(SettingsError, match=f"{host} is no address, card or name of this machine"):
            await Listener.open(host, 0)

    run(scenario)


def test_are_the_silent_dropped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "DECIDE_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        async with listening() as listener:
            assert await read_all(await dial(listener)) == b""
            assert await ask(listener, b"SW") == b""
            assert await ask(listener, b"SWRM") == b"bulk:SWRM"

    run(scenario)


def test_does_a_flood_of_silence_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "STRANGERS_MAX", 4)

    async def scenario() -> None:
        async with listening() as listener:
            silent = [await dial(listener) for _ in range(10)]
            for oldest in silent[:6]:
                assert await read_all(oldest) == b""
            assert await ask(listener, b"SWRM") == b"bulk:SWRM"
            for sock in silent[6:]:
                sock.close()

    run(scenario)


def test_does_a_flood_of_those_who_began_to_speak_leave_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "STRANGERS_MAX", 4)

    async def endless(sock: socket.socket) -> None:
        with sock:
            await asyncio.Event().wait()

    async def scenario() -> None:
        async with listening(endless) as listener:
            slow = [await dial(listener) for _ in range(10)]
            for sock in slow:
                await asyncio.get_running_loop().sock_sendall(sock, b"GET ")
            for oldest in slow[:6]:
                assert await read_all(oldest) == b""
            assert await ask(listener, b"SWRM") == b"bulk:SWRM"
            assert "4 strangers" in repr(listener) or "3 strangers" in repr(listener)
            for sock in slow[6:]:
                sock.close()

    run(scenario)


def test_does_it_survive_running_out_of_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    accept, failures = socket.socket.accept, set[int | None]()

    def noted(sock: socket.socket) -> tuple[socket.socket, object]:
        try:
            return accept(sock)
        except OSError as error:
            failures.add(error.errno)
            raise

    monkeypatch.setattr(socket.socket, "accept", noted)

    async def scenario() -> None:
        async with listening() as listener:
            client = socket.socket()
            client.setblocking(False)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            probe = os.open("/dev/null", os.O_RDONLY)
            os.close(probe)  # the next number that accept would get
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
                with pytest.raises(OSError, match="Too many open files"):
                    os.open("/dev/null", os.O_RDONLY)
                await asyncio.get_running_loop().sock_connect(client, listener.address)
                await asyncio.get_running_loop().sock_sendall(client, b"SWRM")
                await until(lambda: errno.EMFILE in failures)
                assert "0 strangers" in repr(listener)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert await read_all(client) == b"bulk:SWRM"

    run(scenario)


def test_is_a_failing_handler_reported_and_survived() -> None:
    async def broken(sock: socket.socket) -> None:
        sock.close()
        raise ValueError("a bug in a handler")

    async def scenario() -> None:
        reported: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        async with listening(broken) as listener:
            assert await ask(listener, b"GET ") == b""
            await until(lambda: bool(reported))
            assert isinstance(reported[0], ValueError)
            assert await ask(listener, b"SWRM") == b"bulk:SWRM"

    run(scenario)


def test_does_close_end_handlers_and_free_the_port() -> None:
    begun = asyncio.Event()

    async def endless(sock: socket.socket) -> None:
        with sock:
            begun.set()
            await asyncio.Event().wait()

    async def scenario() -> None:
        async with listening(endless) as listener:
            silent, busy = await dial(listener), await dial(listener)
            await asyncio.get_running_loop().sock_sendall(busy, b"GET ")
            await begun.wait()
        assert await read_all(silent) == b""
        assert await read_all(busy) == b""
        again = await Listener.open(*listener.address)
        await again.close()

    run(scenario)


def test_is_a_stranger_kept_that_spoke_while_the_loop_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "DECIDE_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        async with listening() as listener:
            with await dial(listener) as sock:
                await until(lambda: bool(listener._strangers))
                sock.send(b"SWRM")
                time.sleep(0.3)  # noqa: ASYNC251 - the loop stands still
                assert await read_all(sock) == b"bulk:SWRM"

    run(scenario)
