"""This machine as a node's world: one port for all, and nothing beyond loopback unless that is wanted."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Awaitable, Callable

import pytest

from swarm import discovery, world
from swarm.errors import PeerUnreachable, SettingsError
from swarm.link import Link
from swarm.messages import Bye
from swarm.settings import Settings, split_address
from swarm.world import HostWorld, new_id

DEADLINE_S = 20.0
NODE = "0" * 16


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    asyncio.run(within_deadline())


def ignore(address: str, lasting: bool) -> None:
    """Nobody is looked for."""


async def hang_up(link: Link) -> None:
    await link.send(Bye("hello"))


def test_are_links_and_pages_on_one_port() -> None:
    async def scenario() -> None:
        here = HostWorld(Settings(mdns=False), {"/page": lambda: [1]})
        there = HostWorld(Settings(mdns=False))
        try:
            address = await here.open(NODE, hang_up, ignore)
            await there.open(NODE, hang_up, ignore)
            link = await there.dial(address)
            assert await link.receive() == Bye("hello")
            await link.close()

            def page() -> bytes:
                connection = http.client.HTTPConnection(*split_address("peer", address), timeout=DEADLINE_S)
                try:
                    connection.request("GET", "/page")
                    return connection.getresponse().read()
                finally:
                    connection.close()

            assert await asyncio.to_thread(page) == b"[1]"
        finally:
            await here.close()
            await there.close()

    run(scenario)


@pytest.mark.parametrize(("limit", "schemes"), [(None, ["inproc", "tcp"]), (1e6, ["tcp"])])
def test_which_transports_are_there(limit: float | None, schemes: list[str]) -> None:
    async def scenario() -> None:
        here = HostWorld(Settings(mdns=False, upload_limit=limit))
        await here.open(NODE, hang_up, ignore)
        assert [transport.scheme for transport in here.transports] == schemes
        await here.close()

    run(scenario)


def test_is_nobody_beyond_loopback_dialled() -> None:
    async def scenario() -> None:
        here = HostWorld(Settings(mdns=False))
        await here.open(NODE, hang_up, ignore)
        for address in ("192.0.2.1:7000", "example.org:7000", "[2001:db8::1]:7000"):
            with pytest.raises(SettingsError, match="--insecure"):
                await here.dial(address)
        await here.close()

    run(scenario)


def test_is_a_taken_port_an_error_that_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        here = HostWorld(Settings(mdns=False))
        address = await here.open(NODE, hang_up, ignore)
        there = HostWorld(Settings(mdns=False, listen=address))
        with pytest.raises(SettingsError, match="in use"):
            await there.open(NODE, hang_up, ignore)
        await there.close()
        await here.close()
        with pytest.raises(PeerUnreachable):
            await here.dial(address)

    run(scenario)


def test_is_a_wrong_peer_told_before_anything_is_opened() -> None:
    with pytest.raises(SettingsError, match="not HOST:PORT"):
        HostWorld(Settings(mdns=False, peers=("nowhere",)))


def test_does_a_name_that_is_unknown_today_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "RESOLVE_EVERY_S", 0.01)
    known: dict[str, list[str]] = {"127.0.0.9:1": ["127.0.0.9:1"]}

    async def resolve(name: str) -> list[str]:
        if name not in known:
            raise PeerUnreachable(name, "no such name")
        return known[name]

    monkeypatch.setattr(discovery, "resolve", resolve)

    async def scenario() -> None:
        found: asyncio.Queue[tuple[str, bool]] = asyncio.Queue()
        here = HostWorld(Settings(mdns=False, peers=("later.example:1", "127.0.0.9:1")))
        try:
            await here.open(NODE, hang_up, lambda address, lasting: found.put_nowait((address, lasting)))
            assert await found.get() == ("127.0.0.9:1", True)
            known["later.example:1"] = ["127.0.0.7:1", "127.0.0.8:1"]
            seen = set[tuple[str, bool]]()
            while len(seen) < 3:
                seen.add(await found.get())
            assert seen == {("127.0.0.9:1", True), ("127.0.0.7:1", False), ("127.0.0.8:1", False)}
        finally:
            await here.close()

    run(scenario)


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_is_a_wildcard_never_advertised(wildcard: str) -> None:
    assert world._reachable(wildcard) != wildcard
    assert world._reachable("127.0.0.1") == "127.0.0.1"


def test_are_ids_fresh() -> None:
    assert len({new_id() for _ in range(100)}) == 100
    assert len(new_id()) == 16
