"""This machine as a node's world: one port for all, and nothing beyond loopback unless that is wanted."""

from __future__ import annotations

import asyncio
import errno
import http.client
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from swarm.errors import NotAdmitted, PeerUnreachable, SettingsError
from swarm.net import port_pair
from swarm.net.addresses import WILDCARDS
from swarm.net.host_environment import HostEnvironment, machine_label
from swarm.net.link import Link
from swarm.net.udp import Datagrams
from swarm.protocol.messages import Address, Bye, NodeId
from swarm.security import cluster_key
from swarm.settings import Settings, split_address
from swarm.store import cuda
from swarm.transport import cuda_ipc

DEADLINE_S = 20.0
NODE = NodeId("0" * 16)
TOKEN = "ab" * 16


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    asyncio.run(within_deadline())


def ignore(addresses: tuple[str, ...], lasting: bool) -> None:
    """Nobody is looked for."""


def unheard(source: str, datagram: bytes) -> None:
    """Nobody gossips."""


async def hang_up(link: Link) -> None:
    await link.send(Bye("hello"))


def test_are_links_and_pages_on_one_port() -> None:
    async def scenario() -> None:
        here = HostEnvironment(Settings(mdns=False), {"/page": lambda: [1]})
        there = HostEnvironment(Settings(mdns=False))
        try:
            address = await here.open(NODE, hang_up, ignore, unheard)
            await there.open(NODE, hang_up, ignore, unheard)
            link = await there.dial([address])
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


@pytest.mark.parametrize(
    ("given", "gpu", "schemes"),
    [
        ({}, False, ["inproc", "tcp"]),
        ({"upload_limit": 1e6}, False, ["tcp"]),
        ({"transports": ("gloo",)}, True, ["inproc", "gloo", "cuda_ipc", "tcp"]),
        ({"key_file": "key"}, False, ["inproc", "tls"]),
        ({"key_file": "key"}, True, ["inproc", "cuda_ipc", "tls"]),
        ({"key_file": "key", "data_encryption": "none"}, False, ["inproc", "tcp", "tls"]),
        (
            {"key_file": "key", "data_encryption": "none", "transports": ("gloo",)},
            True,
            ["inproc", "gloo", "cuda_ipc", "tcp", "tls"],
        ),
    ],
)
def test_which_transports_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], gpu: bool, schemes: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cuda, "in_use", lambda: gpu)
    cluster_key.create(tmp_path / "key")

    async def scenario() -> None:
        worlds = [HostEnvironment(Settings(mdns=False, **given)) for _ in range(2)]
        try:
            for here in worlds:
                await here.open(NODE, hang_up, ignore, unheard)
                assert [transport.scheme for transport in here.transports] == schemes
            for holder, asker in zip(*(here.transports for here in worlds), strict=True):
                holder.admit(TOKEN)
                assert asker.reach(holder.address)
                session = await asker.connect(holder.address, TOKEN, timeout_s=DEADLINE_S)
                assert session.alive
        finally:
            for here in worlds:
                await here.close()

    run(scenario)


@pytest.mark.parametrize("transports", [(), ("gloo",)])
def test_does_a_member_say_what_it_sends_in_the_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, transports: tuple[str, ...]
) -> None:
    cluster_key.create(tmp_path / "key")

    async def scenario() -> None:
        settings = Settings(mdns=False, key_file=tmp_path / "key", data_encryption="none", transports=transports)
        here = HostEnvironment(settings)
        await here.open(NODE, hang_up, ignore, unheard)
        await here.close()

    run(scenario)
    assert "chunks are not encrypted" in caplog.text
    assert ("gloo opens connections of its own" in caplog.text) == bool(transports)


@pytest.mark.parametrize(
    ("given", "told"),
    [("127.9.9.9:80", "127.9.9.9:80"), ("127.9.9.9", "127.9.9.9:{port}"), ("[::1]:80", "[::1]:80")],
)
def test_are_others_told_the_address_that_is_advertised(given: str, told: str) -> None:
    async def scenario() -> None:
        here = HostEnvironment(Settings(mdns=False, advertise=given, upload_limit=1e6))
        address = await here.open(NODE, hang_up, ignore, unheard)
        assert here._listener is not None
        assert address == told.format(port=here._listener.address[1])
        assert [transport.address for transport in here.transports] == [address]
        await here.close()

    run(scenario)


def test_a_node_takes_over_another_key_while_it_runs(tmp_path: Path) -> None:
    async def scenario() -> None:
        paths = [tmp_path / name for name in ("old", "new", "both")]
        for path in paths[:2]:
            cluster_key.create(path)
        paths[2].touch(0o600)
        paths[2].write_text("".join(path.read_text() for path in reversed(paths[:2])))
        old, new, both = (Settings(mdns=False, key_file=path) for path in paths)
        here, there = HostEnvironment(old), HostEnvironment(new)
        heard: asyncio.Queue[bytes] = asyncio.Queue()
        try:
            address = await here.open(NODE, hang_up, ignore, lambda _, datagram: heard.put_nowait(datagram))
            await there.open(NODE, hang_up, ignore, unheard)
            with pytest.raises(NotAdmitted):
                await there.dial([address])
            assert here.reload(old) == []
            assert here.reload(both) == [f"cluster key {cluster_key.load(paths[2])}"]
            link = await there.dial([address])
            assert await link.receive() == Bye("hello")
            await link.close()
            there.send(address, b"a datagram")
            assert await heard.get() == b"a datagram"
            with pytest.raises(SettingsError, match="restart"):
                here.reload(Settings(mdns=False))
        finally:
            await here.close()
            await there.close()

    run(scenario)


def test_an_upload_limit_changes_while_a_node_runs() -> None:
    environment = HostEnvironment(Settings(mdns=False))
    limited = Settings(mdns=False, upload_limit=5e6)
    assert environment.reload(limited) == ["upload limit 5 MB/s"]
    assert environment.reload(limited) == []
    assert environment.reload(Settings(mdns=False)) == ["no upload limit"]


def test_is_no_address_beyond_loopback_dialled() -> None:
    async def scenario() -> None:
        here = HostEnvironment(Settings(mdns=False))
        await here.open(NODE, hang_up, ignore, unheard)
        for address in ("192.0.2.1:7000", "example.org:7000", "[2001:db8::1]:7000"):
            with pytest.raises(SettingsError, match="--insecure"):
                await here.dial([Address(address)])
        await here.close()

    run(scenario)


def test_is_a_taken_port_an_error_that_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        here = HostEnvironment(Settings(mdns=False))
        address = await here.open(NODE, hang_up, ignore, unheard)
        there = HostEnvironment(Settings(mdns=False, listen=address))
        with pytest.raises(SettingsError, match="in use"):
            await there.open(NODE, hang_up, ignore, unheard)
        await there.close()
        await here.close()
        with pytest.raises(PeerUnreachable):
            await here.dial([address])

    run(scenario)


def test_does_a_transport_that_cannot_be_used_leave_no_port_behind() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        here = HostEnvironment(Settings(mdns=False, listen=f"127.0.0.1:{port}", transports=("smoke",)))
        with pytest.raises(SettingsError, match="'smoke' is not one of nccl, gloo, ucc"):
            await here.open(NODE, hang_up, ignore, unheard)
        socket.create_server(("127.0.0.1", port)).close()
        await here.close()

    run(scenario)


def test_is_a_wrong_peer_told_before_anything_is_opened() -> None:
    with pytest.raises(SettingsError, match="not HOST:PORT"):
        HostEnvironment(Settings(mdns=False, peers=("nowhere:",)))


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "[::]"])
def test_is_a_wildcard_never_told(wildcard: str) -> None:
    async def scenario() -> None:
        here = HostEnvironment(Settings(mdns=False, listen=f"{wildcard}:0", insecure=True))
        try:
            shown = await here.open(NODE, hang_up, ignore, unheard)
            hosts = {split_address("told", address)[0] for address in (shown, here.local, *here.addresses)}
            assert hosts.isdisjoint(WILDCARDS)
            assert set(here._hosts) <= set(WILDCARDS)
            assert not here.on_loopback
        finally:
            await here.close()

    run(scenario)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0"])
def test_do_datagrams_go_to_the_address_that_links_go_to(listen: str) -> None:
    async def scenario() -> None:
        here, there = (HostEnvironment(Settings(mdns=False, listen=listen)) for _ in range(2))
        here.send(Address("127.0.0.1:1"), b"not open yet")
        heard: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        try:
            address = await here.open(NODE, hang_up, ignore, lambda *datagram: heard.put_nowait(datagram))
            source = await there.open(NODE, hang_up, ignore, unheard)
            there.send(address, b"hello")
            assert await heard.get() == (source, b"hello")
            there.send(address, b"waiting")
            here.drain()
            assert heard.get_nowait() == (source, b"waiting")
        finally:
            await here.close()
            await there.close()

    run(scenario)


def test_is_a_port_whose_twin_is_taken_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    class Twin(Datagrams):
        def __init__(self, host: str, port: int, *args: Any, **flags: Any) -> None:
            if len(taken) < 2:
                taken.append(port)
                raise OSError(errno.EADDRINUSE, "in use")
            super().__init__(host, port, *args, **flags)

    monkeypatch.setattr(port_pair, "Datagrams", Twin)

    async def scenario() -> None:
        here = HostEnvironment(Settings(mdns=False))
        address = await here.open(NODE, hang_up, ignore, unheard)
        assert len(taken) == 2
        assert split_address("peer", address)[1] not in taken
        await here.close()

    run(scenario)


def test_is_a_wanted_port_whose_twin_is_taken_an_error() -> None:
    async def scenario() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as twin:
            twin.bind(("127.0.0.1", 0))
            port = twin.getsockname()[1]
            here = HostEnvironment(Settings(mdns=False, listen=f"127.0.0.1:{port}"))
            with pytest.raises(SettingsError, match=f"UDP port {port} on 127.0.0.1 cannot be had"):
                await here.open(NODE, hang_up, ignore, unheard)
            await here.close()
            socket.create_server(("127.0.0.1", port)).close()  # nothing is left behind

    run(scenario)


def test_has_a_machine_one_label_whatever_it_is_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    label = machine_label()
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert machine_label() == label
    (boot := tmp_path / "boot_id").write_text("another boot\n")
    monkeypatch.setattr(cuda_ipc, "MACHINE_IDS", (str(tmp_path / "missing"), str(boot)))
    assert machine_label() not in (label, "another")
    monkeypatch.setattr(cuda_ipc, "MACHINE_IDS", ())
    assert machine_label() == "another"
