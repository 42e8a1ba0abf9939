"""Connections: which of several addresses wins, and what is said when none answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from swarm.errors import NotSwarm, PeerUnreachable
from swarm.net import dialling
from swarm.net.dialling import connect, race
from swarm.net.listener import Listener
from swarm.net.websocket import HttpLinks

DEADLINE_S = 20.0
NEVER_S = 3600.0


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    asyncio.run(within_deadline())


class Attempts:
    """Attempts by name; `began` and `discarded` in order."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.discarded: list[str] = []

    def succeeds(self, name: str) -> Callable[[], Awaitable[str]]:
        async def attempt() -> str:
            self.began.append(name)
            return name

        return attempt

    def fails(self, name: str) -> Callable[[], Awaitable[str]]:
        async def attempt() -> str:
            self.began.append(name)
            raise PeerUnreachable(name, "no")

        return attempt

    def hangs(self, name: str) -> Callable[[], Awaitable[str]]:
        async def attempt() -> str:
            self.began.append(name)
            await asyncio.Event().wait()
            return name

        return attempt

    async def discard(self, name: str) -> None:
        self.discarded.append(name)


def test_the_next_address_is_tried_when_one_has_failed_and_not_after_one_that_answers() -> None:
    async def scenario() -> None:
        tries = Attempts()
        attempts = [tries.fails("a"), tries.succeeds("b"), tries.succeeds("c")]
        assert await race(attempts, discard=tries.discard, stagger_s=NEVER_S) == "b"
        assert tries.began == ["a", "b"]

    run(scenario)


def test_a_silent_address_keeps_no_other_waiting() -> None:
    async def scenario() -> None:
        tries = Attempts()
        attempts = [tries.hangs("a"), tries.hangs("b"), tries.succeeds("c")]
        assert await race(attempts, discard=tries.discard, stagger_s=0.001) == "c"
        assert tries.began == ["a", "b", "c"]

    run(scenario)


def test_every_failure_is_told_in_order() -> None:
    async def scenario() -> None:
        tries = Attempts()
        with pytest.raises(ExceptionGroup) as failed:
            await race([tries.fails("a"), tries.fails("b")], discard=tries.discard, stagger_s=NEVER_S)
        assert [str(error) for error in failed.value.exceptions] == ["a: no", "b: no"]

    run(scenario)


def test_a_second_answer_is_discarded() -> None:
    async def scenario() -> None:
        tries, both = Attempts(), asyncio.Event()

        async def waits() -> str:
            await both.wait()
            return "a"

        async def sets() -> str:
            both.set()
            await asyncio.sleep(0)
            return "b"

        won = await race([waits, sets], discard=tries.discard, stagger_s=0.0)
        assert {won, *tries.discarded} == {"a", "b"}

    run(scenario)


def test_what_is_said_of_a_port_without_a_program_and_of_a_name_that_is_unknown() -> None:
    async def scenario() -> None:
        free = await Listener.open("127.0.0.1", 0)
        host, port = free.address
        await free.close()
        with pytest.raises(PeerUnreachable, match="no program listens there on this machine"):
            await connect(f"{host}:{port}")
        with pytest.raises(PeerUnreachable, match="this name is not known"):
            await connect("nowhere.invalid:7000")

    run(scenario)


NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("answer", [NOT_FOUND, b"SSH-2.0-OpenSSH_9.6\r\n", b""])
def test_another_program_is_no_swarm_node(answer: bytes) -> None:
    async def serve(sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with sock:
            await loop.sock_recv(sock, 4096)
            await loop.sock_sendall(sock, answer)

    async def nothing(link: object) -> None:
        """No link comes in."""

    async def scenario() -> None:
        listener, links = await Listener.open("127.0.0.1", 0), HttpLinks()
        listener.serve({}, serve)
        await links.open(nothing)
        try:
            with pytest.raises(NotSwarm, match="is no swarm node") as refused:
                await links.dial("{}:{}".format(*listener.address), timeout_s=DEADLINE_S)
            assert refused.value.final
        finally:
            await links.close()
            await listener.close()

    run(scenario)


def test_a_redirect_leads_nowhere_else() -> None:
    async def scenario() -> None:
        reached: list[str] = []

        async def elsewhere(sock: socket.socket) -> None:
            reached.append("elsewhere")
            sock.close()

        other, links = await Listener.open("127.0.0.1", 0), HttpLinks()
        other.serve({}, elsewhere)
        target = "http://{}:{}/".format(*other.address)

        async def redirect(sock: socket.socket) -> None:
            loop = asyncio.get_running_loop()
            with sock:
                await loop.sock_recv(sock, 4096)
                answer = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n"
                await loop.sock_sendall(sock, answer.encode())

        async def nothing(link: object) -> None:
            """No link comes in."""

        listener = await Listener.open("127.0.0.1", 0)
        listener.serve({}, redirect)
        await links.open(nothing)
        try:
            with pytest.raises(NotSwarm):
                await links.dial("{}:{}".format(*listener.address), timeout_s=DEADLINE_S)
            assert reached == []
        finally:
            await links.close()
            await listener.close()
            await other.close()

    run(scenario)


def test_the_time_between_attempts_is_that_of_happy_eyeballs() -> None:
    assert dialling.STAGGER_S == 0.25


def test_is_a_dial_while_the_interpreter_ends_no_failure_of_the_node() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        await loop.shutdown_default_executor()
        with pytest.raises(PeerUnreachable, match=r"^127\.0\.0\.1:1: is not dialled: "):
            await dialling.connect("127.0.0.1:1")

    asyncio.run(scenario())
