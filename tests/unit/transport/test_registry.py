"""Which transports does a node get, and what can a plugin do to it?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import EntryPoint

import pytest

from swarm.errors import SettingsError
from swarm.transport import Transport, registry
from swarm.transport.inproc import InprocTransport
from swarm.transport.pace import Unlimited
from swarm.transport.registry import GROUP, TransportConfig, make_transports

LOCAL = ("127.0.0.1", 7000)
CONFIG = TransportConfig(
    local=LOCAL, advertised=LOCAL, pace=Unlimited(), congestion=None, identity=None, encrypted=False
)


class Smoke(InprocTransport):
    scheme = "smoke"


def make_smoke(config: TransportConfig) -> Transport:
    assert config is CONFIG
    return Smoke()


def make_none(config: TransportConfig) -> None:
    """Not usable on this machine."""


def make_unset(config: TransportConfig) -> Transport:
    raise SettingsError("transports", "smoke: give it a chimney")


def make_broken(config: TransportConfig) -> Transport:
    raise OSError("no chimney")


def install(monkeypatch: pytest.MonkeyPatch, **plugins: str) -> None:
    found = [EntryPoint(name, f"{__name__}:{value}", GROUP) for name, value in plugins.items()]
    monkeypatch.setattr(registry, "entry_points", lambda *, group: found if group == GROUP else [])


@contextlib.asynccontextmanager
async def transports(*named: str) -> AsyncIterator[list[str]]:
    made = make_transports(named, CONFIG)
    try:
        yield [transport.scheme for transport in made]
    finally:
        for transport in made:
            await transport.close()


def schemes(*named: str) -> list[str]:
    async def scenario() -> list[str]:
        async with transports(*named) as made:
            return made

    return asyncio.run(scenario())


def test_is_a_plugin_there_only_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, smoke="make_smoke", other="make_broken")
    assert schemes() == ["inproc", "tcp"]
    assert schemes("smoke") == ["inproc", "smoke", "tcp"]


def test_is_a_plugin_that_is_not_usable_here_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, smoke="make_none")
    assert schemes("smoke") == ["inproc", "tcp"]
    assert not caplog.records


@pytest.mark.parametrize("value", ["make_broken", "not_there", "asyncio"])
def test_is_a_broken_plugin_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    install(monkeypatch, smoke=value)
    assert schemes("smoke") == ["inproc", "tcp"]
    (line,) = caplog.messages
    assert line.startswith(f"transport smoke is left out: {__name__}:{value} failed with ")


def test_is_an_error_of_the_user_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, smoke="make_unset")
    with pytest.raises(SettingsError, match="chimney"):
        schemes("smoke")


def test_names_an_unknown_transport_those_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, smoke="make_smoke")
    with pytest.raises(SettingsError, match="'smok' is not one of nccl, gloo, ucc, smoke;"):
        schemes("smok")


def test_are_there_no_more_transports_than_gossip_tells_of(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"smoke{number}" for number in range(registry.TRANSPORTS_MAX - 1)]
    install(monkeypatch, **dict.fromkeys(names, "make_smoke"))
    assert len(schemes(*names[:-1])) == registry.TRANSPORTS_MAX
    with pytest.raises(SettingsError, match="at most 8"):
        schemes(*names)
