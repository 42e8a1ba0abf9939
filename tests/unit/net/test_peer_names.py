"""Names of nodes in the settings: their form, their resolution, and how often they are asked for."""

import asyncio
import contextlib
import socket
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from swarm.errors import PeerTimeout, PeerUnreachable, SettingsError
from swarm.net import peer_names
from swarm.net.environment import Found
from swarm.net.peer_names import Name, PeerNames, resolve, static
from swarm.protocol.messages import Address

DEADLINE_S = 20.0


def test_static_addresses_have_one_form_and_come_once() -> None:
    peers = ["10.0.0.1:7000", " seed.example:7001", "[::1]:7002", "10.0.0.1:7000", "node_1:07003", "seed", "[::1]"]
    assert static(peers) == [
        "10.0.0.1:7000",
        "seed.example:7001",
        "[::1]:7002",
        "node_1:7003",
        "seed:7000",
        "[::1]:7000",
    ]


@pytest.mark.parametrize(
    "text",
    ["", "host:", ":7000", "host:0", "host:65536", "host:port", "host:-1", "host:٣", "::1", "::1:7000",
     "[host]:7000", "[10.0.0.1]:7000", "http://host:7000", "a b:7000", "-x:7000", "a..b:7000",
     "host:" + "9" * 5000],
)  # fmt: skip
def test_malformed_address_is_named_with_the_form_it_should_have(text: str) -> None:
    with pytest.raises(SettingsError, match="HOST:PORT"):
        static(["ok:1", text])


def test_literal_addresses_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert asyncio.run(resolve(Address("10.1.2.3:7000"))) == ["10.1.2.3:7000"]
    assert asyncio.run(resolve(Address("[fe80::1]:7000"))) == ["[fe80::1]:7000"]


def test_localhost_resolves_to_loopback() -> None:
    found = asyncio.run(resolve(Address("localhost:7000")))
    assert found
    assert set(found) <= {"127.0.0.1:7000", "[::1]:7000"}


def test_name_gives_all_its_addresses_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_host: str, port: int, **_: Any) -> list[Any]:
        v4 = [(socket.AF_INET, 1, 6, "", (f"10.0.0.{n}", port)) for n in (3, 1, 3)]
        return [*v4, (socket.AF_INET6, 1, 6, "", ("fd00::7", port, 0, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    assert asyncio.run(resolve(Address("headless:7000"))) == ["10.0.0.3:7000", "10.0.0.1:7000", "[fd00::7]:7000"]


def test_unknown_name_is_an_unreachable_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    with pytest.raises(PeerUnreachable, match=r"nowhere:7000: .*not known"):
        asyncio.run(resolve(Address("nowhere:7000")))


def test_silent_dns_ends_at_the_deadline_and_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    asked: list[str] = []

    def answer(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        answered.wait(10)
        return [(socket.AF_INET, 1, 6, "", ("10.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", answer)

    async def scenario() -> None:
        name = Name(Address("slow:7000"))
        for _ in range(3):
            with pytest.raises(PeerTimeout, match=r"slow:7000: its name was not resolved within 0.01 s"):
                await name.resolve(timeout_s=0.01)
        answered.set()
        assert await name.resolve() == ["10.0.0.1:7000"]
        assert asked == ["slow"]
        assert await name.resolve() == ["10.0.0.1:7000"]
        assert asked == ["slow", "slow"]

    asyncio.run(scenario())


def test_does_a_silent_resolver_take_no_thread_of_the_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing and disks work there; the loop waits for them when it ends."""
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait(10) and [])

    async def scenario() -> None:
        with pytest.raises(PeerTimeout):
            await resolve(Address("slow:7000"), timeout_s=0.01)
        assert asyncio.get_running_loop()._default_executor is None  # type: ignore[attr-defined]

    asyncio.run(scenario())  # ends though the resolver is silent still
    assert not answered.is_set()
    answered.set()


@contextlib.asynccontextmanager
async def following(names: PeerNames, found: Found) -> AsyncIterator[None]:
    """In the block, the names are followed."""
    task = asyncio.create_task(names.follow(found))
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("soon_for_s", [0.0, 1000.0])
def test_is_a_name_asked_sooner_at_the_start(soon_for_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_names, "RESOLVE_SOON_FOR_S", soon_for_s)
    asked: list[str] = []
    waits: list[float] = []
    sleep = asyncio.sleep

    async def resolve(name: peer_names.Name) -> list[str]:
        asked.append(name.address)
        return []

    async def wait(delay_s: float) -> None:
        if "follow" in sys._getframe(1).f_code.co_name:
            waits.append(delay_s)
            delay_s = 0 if len(waits) < 3 else 1000
        await sleep(delay_s)

    monkeypatch.setattr(peer_names.Name, "resolve", resolve)
    monkeypatch.setattr(asyncio, "sleep", wait)

    async def scenario() -> None:
        async with following(PeerNames(["replicas.example:1"]), lambda known, lasting: None):
            while len(waits) < 3:
                await sleep(0)

    asyncio.run(scenario())
    assert asked == ["replicas.example:1"] * 3
    expected = peer_names.RESOLVE_SOON_S if soon_for_s else peer_names.RESOLVE_EVERY_S
    assert waits == [expected] * 3


def test_does_a_silent_resolver_of_a_name_hold_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = asyncio.Event()

    async def resolve(name: peer_names.Name) -> list[str]:
        if name.address == "silent.example:1":
            await silent.wait()
        return ["127.0.0.7:1"]

    monkeypatch.setattr(peer_names.Name, "resolve", resolve)

    async def scenario() -> None:
        found: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()
        names = PeerNames(["silent.example:1", "answers.example:1"])
        async with following(names, lambda known, lasting: found.put_nowait(known)):
            assert await found.get() == ("127.0.0.7:1",)

    asyncio.run(scenario())


def test_is_a_name_without_an_answer_yet_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answered, asked = asyncio.Event(), asyncio.Event()

    async def resolve(name: Name) -> list[str]:
        asked.set()
        await answered.wait()
        raise PeerUnreachable(name.address, "no such name")

    monkeypatch.setattr(Name, "resolve", resolve)

    async def scenario() -> None:
        names = PeerNames(["slow.example:1"])
        async with following(names, lambda known, lasting: None):
            await asked.wait()
            assert names.resolving
            assert names.unresolved == ["slow.example:1: its name is still being looked up"]
            answered.set()
            for _ in range(10):
                await asyncio.sleep(0)
            assert not names.resolving
            assert names.unresolved == ["slow.example:1: no such name"]

    asyncio.run(scenario())


def test_does_a_name_that_is_unknown_today_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_names, "RESOLVE_SOON_S", 0.01)
    known: dict[str, list[str]] = {"127.0.0.9:1": ["127.0.0.9:1"]}

    async def resolve(name: peer_names.Name) -> list[str]:
        if name.address not in known:
            raise PeerUnreachable(name.address, "no such name")
        return known[name.address]

    monkeypatch.setattr(peer_names.Name, "resolve", resolve)

    async def scenario() -> None:
        found: asyncio.Queue[tuple[tuple[str, ...], bool]] = asyncio.Queue()
        names = PeerNames(["later.example:1", "127.0.0.9:1"])
        async with following(names, lambda known, lasting: found.put_nowait((known, lasting))):
            assert await found.get() == (("127.0.0.9:1",), True)
            assert names.unresolved == ["later.example:1: no such name"]
            known["later.example:1"] = ["127.0.0.7:1", "127.0.0.8:1"]
            seen = set[tuple[tuple[str, ...], bool]]()
            while len(seen) < 3:
                seen.add(await found.get())
            assert seen == {(("127.0.0.9:1",), True), (("127.0.0.7:1",), False), (("127.0.0.8:1",), False)}
            assert names.unresolved == []

    asyncio.run(scenario())
