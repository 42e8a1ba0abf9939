"""Probes and metrics for programs of other machines: an address of their own, or a token. Who else gets anything?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from swarm.errors import SettingsError
from swarm.net import http_pages
from swarm.net.host_environment import HostEnvironment
from swarm.net.http_pages import Asset, Bearer, HealthPage, Page
from swarm.net.listener import Listener
from swarm.net.probe_listener import ProbeListener
from swarm.net.websocket import HttpLinks
from swarm.protocol.messages import NodeId
from swarm.settings import Settings

TOKEN = "0123456789abcdef"
PAGES: dict[str, Page] = {
    "/healthz": HealthPage(list),
    "/readyz": HealthPage(lambda: ["org/model: is being fetched"]),
    "/metrics": Asset("text/plain", lambda: b"swarm_ready 0\n"),
    "/status": lambda: {"secret": "names"},
}


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(within_deadline())


async def status(address: str, path: str, *, method: str = "GET", **headers: str) -> int:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"http://{address}{path}", headers=headers) as answer,
    ):
        return answer.status


@contextlib.asynccontextmanager
async def probes(token: str = "") -> AsyncIterator[str]:
    listener = ProbeListener(PAGES, Bearer(token))
    try:
        yield await listener.open("127.0.0.1:0")
    finally:
        await listener.close()


@contextlib.asynccontextmanager
async def node_page(token: str) -> AsyncIterator[str]:
    """The ordinary listener of a node."""
    links, listener = HttpLinks(PAGES, bearer=Bearer(token)), await Listener.open("127.0.0.1", 0)
    await links.open(lambda link: link.close())
    listener.serve({}, links.adopt)
    try:
        yield "{}:{}".format(*listener.address)
    finally:
        await listener.close()
        await links.close()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every client is on another machine."""
    monkeypatch.setattr(http_pages, "_is_local", lambda request: False)


@pytest.mark.usefixtures("elsewhere")
def test_does_the_listener_have_probes_and_metrics_and_nothing_else() -> None:
    async def scenario() -> None:
        async with probes() as address:
            paths = ["/healthz", "/readyz", "/metrics", "/status", "/", "/swarm/link"]
            assert [await status(address, path) for path in paths] == [200, 503, 200, 404, 404, 404]
            assert await status(address, "/metrics", method="POST") == 405
            assert await status(address, "/healthz", method="HEAD") == 200
            assert await status(address, "/metrics", Host="any.name.example") == 200, "kubelets send any"

    run(scenario)


@pytest.mark.usefixtures("elsewhere")
def test_are_metrics_for_holders_of_the_token_where_there_is_one() -> None:
    async def scenario() -> None:
        async with probes(TOKEN) as address:
            assert await status(address, "/healthz") == 200
            assert await status(address, "/metrics") == 401
            assert await status(address, "/metrics", Authorization=f"Bearer {TOKEN}") == 200

    run(scenario)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("token", "said", "path", "expected"),
    [
        (TOKEN, f"Bearer {TOKEN}", "/metrics", 200),
        (TOKEN, f"bearer {TOKEN}", "/healthz", 200),
        (TOKEN, f"Bearer {TOKEN}", "/status", 403),
        (TOKEN, f"Bearer {TOKEN}x", "/metrics", 401),
        (TOKEN, f"Basic {TOKEN}", "/metrics", 401),
        (TOKEN, "Bearer \u00e9", "/metrics", 401),
        (TOKEN, "", "/metrics", 401),
        ("", "", "/metrics", 403),
        ("", "Bearer ", "/metrics", 403),
    ],
)
def test_what_does_a_token_open_at_the_address_of_the_node(token: str, said: str, path: str, expected: int) -> None:
    async def scenario() -> None:
        async with node_page(token) as address:
            assert await status(address, path, **({"Authorization": said} if said else {})) == expected

    run(scenario)


def test_is_a_taken_address_an_error_unless_another_node_may_have_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with probes() as taken:
            settings = Settings(metrics_listen=taken, mdns=False, cache=tmp_path)
            with pytest.raises(SettingsError, match=r"^metrics_listen: port \d+ on 127.0.0.1 is in use"):
                await opened(HostEnvironment(settings, PAGES))
            environment = HostEnvironment(settings, PAGES, lenient=True)
            await opened(environment)
            await environment.close()

    run(scenario)
    assert "this node goes on without" in caplog.text


async def opened(environment: HostEnvironment) -> None:
    await environment.open(NodeId("0" * 16), lambda link: link.close(), lambda *_: None, lambda *_: None)


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        ("short", 0o600, "holds no token: one line of 16"),
        (f"{TOKEN}\n{TOKEN}", 0o600, "holds no token"),
        (TOKEN, 0o644, "can be used by others"),
        ("x" * 5000, 0o600, "more than 4096 bytes"),
        (None, 0, "does not exist; make one with: openssl rand -hex 32"),
    ],
)
def test_is_a_file_without_a_usable_token_an_error(text: str | None, mode: int, why: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(SettingsError, match=f"^metrics_token_file: .*{why}"):
        HostEnvironment(Settings(metrics_token_file=path, cache=tmp_path))


def test_is_the_token_read_again(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    settings = Settings(metrics_token_file=path, cache=tmp_path)
    environment = HostEnvironment(settings)
    assert environment.reload(settings) == []
    path.write_text(TOKEN[::-1])
    assert environment.reload(settings) == ["token for metrics"]
