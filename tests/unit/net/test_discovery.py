import asyncio
import logging
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

from swarm.errors import PeerTimeout, PeerUnreachable, SettingsError
from swarm.net import discovery
from swarm.net.discovery import Mdns, Name, resolve, static
from swarm.protocol.messages import Address


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


def test_without_multicast_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable(**_: Any) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("zeroconf.asyncio.AsyncZeroconf", unavailable)

    async def main() -> None:
        mdns = Mdns()
        await mdns.start(node_id="0" * 16, hosts=("127.0.0.1",), port=7000, found=lambda _: None)
        assert repr(mdns) == "<Mdns 0000000000000000 off, 0 found>"
        await mdns.close()

    with caplog.at_level(logging.WARNING, logger="swarm.net.discovery"):
        asyncio.run(main())
    (record,) = caplog.records
    assert "No such device" in record.message
    assert "--peer" in record.message


def test_zeroconf_is_imported_only_when_mdns_starts() -> None:
    program = f"import {discovery.__name__}, sys; sys.exit('zeroconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
