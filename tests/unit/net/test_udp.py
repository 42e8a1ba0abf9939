"""The datagram socket: what gets through, what does not, and that nothing is ever raised for it."""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Awaitable, Callable

import pytest

from swarm.net import udp
from swarm.net.udp import AeadSeal, Datagrams, NoSeal
from swarm.protocol.messages import Address
from swarm.security.datagram_seal import SealKey

DEADLINE_S = 10.0


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    asyncio.run(within_deadline())


class End:
    """One socket and what it heard."""

    def __init__(self, host: str = "127.0.0.1", *, loopback_only: bool = True, codec: udp.Codec | None = None) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.arrived = asyncio.Event()
        self.socket = Datagrams([host], 0, self._hear, codec=codec or NoSeal(), loopback_only=loopback_only)
        self.address = "{}:{}".format(*self.socket._socks[0].getsockname())

    def _hear(self, source: str, datagram: bytes) -> None:
        self.heard.append((source, datagram))
        self.arrived.set()

    async def until(self, count: int) -> None:
        while len(self.heard) < count:
            self.arrived.clear()
            await self.arrived.wait()


def test_does_a_datagram_arrive_with_its_source() -> None:
    async def scenario() -> None:
        one, other = End(), End()
        one.socket.send(Address(other.address), b"hello")
        await other.until(1)
        assert other.heard == [(one.address, b"hello")]
        one.socket.close()
        one.socket.close()
        one.socket.send(Address(other.address), b"closed")
        other.socket.close()

    run(scenario)


def test_is_a_turn_bounded_and_a_drain_thorough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp, "TURN_MAX", 3)

    async def scenario() -> None:
        one, other = End(), End()
        for _ in range(10):
            one.socket.send(Address(other.address), b"x")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 0 < len(other.heard) <= 6
        other.socket.drain()
        assert len(other.heard) == 10
        one.socket.close()
        other.socket.close()

    run(scenario)


@pytest.mark.parametrize(
    "address", ["example.org:7", "localhost:7", "127.0.0.1", "127.0.0.1:0", "[::1]:7", "", "x" * 300]
)
def test_is_nothing_sent_to_what_is_no_literal_of_its_family(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        end = End(loopback_only=False)
        sent: list[object] = []

        class Spy:
            family = socket.AF_INET

            def sendto(self, *sent_to: object) -> None:
                sent.append(sent_to)

        real, end.socket._socks = end.socket._socks, [Spy()]  # type: ignore[list-item]
        end.socket.send(Address(address), b"x")
        assert sent == []
        end.socket._socks = real
        end.socket.close()

    run(scenario)


def test_are_other_machines_neither_told_nor_heard() -> None:
    async def scenario() -> None:
        wide, narrow = End("0.0.0.0", loopback_only=False), End("0.0.0.0")
        sent: list[tuple[bytes, tuple[str, int]]] = []

        class Spy:
            family = socket.AF_INET

            def sendto(self, data: bytes, target: tuple[str, int]) -> None:
                sent.append((data, target))

            def recvfrom(self, _: int) -> tuple[bytes, tuple[str, int]]:
                if len(sent) > 10:
                    raise BlockingIOError
                sent.append((b"", ("", 0)))
                return b"from afar", ("192.0.2.1", 7)

            def fileno(self) -> int:
                return 99

        for end in (wide, narrow):
            real, end.socket._socks = end.socket._socks, [Spy()]  # type: ignore[list-item]
            sent.clear()
            end.socket.send(Address("192.0.2.1:7"), b"x")
            assert bool(sent) == (end is wide)
            end.socket.drain()
            assert bool(end.heard) == (end is wide)
            end.socket._socks = real
            end.socket.close()

    run(scenario)


def test_does_an_empty_port_raise_nothing() -> None:
    async def scenario() -> None:
        one, other, gone = End(), End(), End()
        gone.socket.close()
        for _ in range(3):
            one.socket.send(Address(gone.address), b"anybody?")
            one.socket.drain()
        other.socket.send(Address(one.address), b"still there")
        await one.until(1)
        one.socket.close()
        other.socket.close()

    run(scenario)


def test_is_what_does_not_open_not_heard_but_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    def sealed(key: int) -> AeadSeal:
        return AeadSeal([SealKey(bytes([key]) * 4, bytes([key]) * 32)], time=time.time, rng=secrets.token_bytes)

    async def scenario() -> None:
        stranger, elsewhere, one, other = End(), End(codec=sealed(2)), *(End(codec=sealed(1)) for _ in range(2))
        for _ in range(3):
            stranger.socket.send(Address(other.address), b"open")
            elsewhere.socket.send(Address(other.address), b"of another cluster")
        one.socket.send(Address(other.address), b"secret")
        await other.until(1)
        assert other.heard == [(one.address, b"secret")]
        for end in (stranger, elsewhere, one, other):
            end.socket.close()

    run(scenario)
    assert sorted(caplog.messages) == [
        "refused a datagram from 127.0.0.1 that is not sealed: its sender has no cluster key",
        "refused a datagram from 127.0.0.1 that is sealed with another cluster key",
    ]


def test_is_a_taken_port_an_error() -> None:
    async def scenario() -> None:
        one = End()
        port = int(one.address.rpartition(":")[2])
        with pytest.raises(OSError, match="in use"):
            Datagrams(["127.0.0.1"], port, lambda source, datagram: None, codec=NoSeal(), loopback_only=True)
        one.socket.close()

    run(scenario)
