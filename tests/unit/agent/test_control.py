"""The control socket: who may ask, what happens to nonsense, silence and a second agent?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from swarm.agent import control
from swarm.agent.control import Control
from swarm.errors import AgentError, SettingsError, StoreError, StoreFull
from swarm.node import agent_client
from swarm.node.agent_client import agent
from swarm.node.agent_reach import greeting, objection
from swarm.protocol import agent_messages as messages
from swarm.protocol.agent_messages import Answer, Done, List, Pin, Pull, PullProgress, Remove, Request
from swarm.settings import Settings
from swarm.store import own_files


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(within_deadline())


async def answers(request: Request) -> AsyncGenerator[Answer]:
    match request:
        case Pull(model_id="org/full"):
            raise StoreFull("cache", need_bytes=2, free_bytes=1)
        case Pull(model_id="org/bug"):
            raise ZeroDivisionError
        case Pull():
            yield PullProgress(10, 5, 1.0)
            yield Done(("pulled",))
        case Pin(pinned=pinned):
            yield Done((f"pinned {pinned}",))
        case Remove():
            await asyncio.Event().wait()
        case List():
            yield Done(("listed",))


@contextlib.asynccontextmanager
async def listening(cache: Path) -> AsyncIterator[Control]:
    made = Control(cache, answers)
    made.claim()
    await made.open(greeting(Settings(cache=cache), node="127.0.0.1:1", hub="127.0.0.1:2", hub_cache=cache))
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Longer than the path of a socket may be."""
    place = tmp_path / ("x" * 100) / ("y" * 100)
    place.mkdir(parents=True)
    return place


def test_is_a_request_answered(cache: Path) -> None:
    async def scenario() -> None:
        async with listening(cache):
            seen: list[PullProgress] = []
            async with agent(cache) as found:
                assert found
                assert found.greeting.hub == "127.0.0.1:2"
                assert await found.ask(Pull("org/model"), seen.append) == Done(("pulled",))
            assert seen == [PullProgress(10, 5, 1.0)]
            async with agent(cache) as found:
                assert found
                assert await found.ask(Pin("org/model", pinned=False)) == Done(("pinned False",))

    run(scenario)


def test_is_no_agent_none(cache: Path) -> None:
    async def scenario() -> None:
        async with agent(cache) as found:
            assert found is None
        async with listening(cache):
            pass
        async with agent(cache) as found:
            assert found is None, "it has ended"

    run(scenario)


@pytest.mark.parametrize(
    ("model", "why", "code"), [("org/full", "2 bytes are needed and 1 are free", 5), ("org/bug", "ZeroDivision", 70)]
)
def test_is_a_failure_that_of_the_agent(
    model: str, why: str, code: int, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with listening(cache), agent(cache) as found:
            assert found
            with pytest.raises(AgentError, match=why) as failed:
                await found.ask(Pull(model))
            assert failed.value.exit_code == code

    run(scenario)
    assert ("the agent failed" in caplog.text) == (code == 70)


def test_is_the_socket_for_its_user_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with listening(cache):
            place = cache / messages.FOLDER
            assert stat.S_IMODE((place / messages.SOCKET).stat().st_mode) == 0o600
            assert stat.S_IMODE(place.stat().st_mode) == 0o700
            monkeypatch.setattr(control, "peer_uid", lambda _: os.geteuid() + 1)
            async with agent(cache) as found:
                assert found is None, "the agent hangs up"
            monkeypatch.undo()
            monkeypatch.setattr(agent_client, "peer_uid", lambda _: os.geteuid() + 1)
            async with agent(cache) as found:
                assert found is None, "the program does not believe it"

    run(scenario)


def test_is_a_directory_of_another_user_no_place_for_the_socket(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache / messages.FOLDER
    folder.mkdir(mode=0o2770)  # as a volume of a pod has it
    Control(cache, answers).claim()
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(control, "close_to_others", lambda _: None)  # only its owner can
    os.chown(folder, 23456, -1) if os.getuid() == 0 else monkeypatch.setattr(own_files, "_is_foreign", lambda _: True)
    with pytest.raises(StoreError, match="another user can change it"):
        Control(cache, answers).claim()


def test_is_a_link_no_place_for_the_socket(cache: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    (cache / messages.FOLDER).symlink_to(elsewhere)
    with pytest.raises(StoreError, match="another user can change it"):
        Control(cache, answers).claim()
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o755
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("said", [b"nonsense\n", b'{"type":"list"', b'{"type":"greeting"}\n', b"[" * 5000 + b"\n", b""])
def test_does_nonsense_end_its_own_connection_alone(said: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "REQUEST_TIMEOUT_S", 0.2)

    async def scenario() -> None:
        async with listening(cache):
            with agent_client.at(cache) as path:
                reader, writer = await asyncio.open_unix_connection(path)
            writer.write(said)
            answer = await reader.read()
            assert len(answer.splitlines()) <= 2
            writer.close()
            async with agent(cache) as found:
                assert found
                assert await found.ask(List()) == Done(("listed",))

    run(scenario)


def test_are_connections_bounded(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control, "CONNECTIONS_MAX", 2)

    async def scenario() -> None:
        async with listening(cache), contextlib.AsyncExitStack() as held:
            for _ in range(2):
                assert await held.enter_async_context(agent(cache))
            assert await held.enter_async_context(agent(cache)) is None

    run(scenario)
    assert "2 programs ask the agent already" in caplog.text


def test_does_an_agent_that_falls_silent_end_the_wait(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_client, "SILENCE_MAX_S", 0.1)

    async def scenario() -> None:
        async with listening(cache), agent(cache) as found:
            assert found
            with pytest.raises(AgentError, match="says nothing for"):
                await found.ask(Remove("org/model"))

    run(scenario)


def test_is_a_second_agent_refused_and_the_socket_of_a_killed_one_replaced(cache: Path) -> None:
    async def scenario() -> None:
        async with listening(cache):
            with pytest.raises(SettingsError, match="an agent runs here already"):
                Control(cache, answers).claim()
        (cache / messages.FOLDER / messages.SOCKET).touch()
        async with listening(cache), agent(cache) as found:
            assert found

    run(scenario)


@pytest.mark.parametrize(
    ("program", "of_agent", "why"),
    [
        ({}, {}, ""),
        ({}, {"key_file": "k", "peers": "a:1"}, ""),
        ({"key_file": "k"}, {"key_file": "k"}, ""),
        ({"key_file": "other"}, {"key_file": "k"}, "its key_file is another one"),
        ({"peers": "a:1"}, {"peers": "a:1,b:1"}, ""),
        ({"peers": "c:1"}, {"peers": "a:1,b:1"}, "its peers is another one"),
        ({"signed_by": "0" * 64}, {}, "its signed_by is another one"),
        ({}, {"signed_by": "0" * 64}, "its signed_by is another one"),
        ({"origin": "none"}, {}, "its origin is another one"),
    ],
)
def test_when_does_a_program_go_on_without_the_agent(
    program: dict[str, str], of_agent: dict[str, str], why: str, tmp_path: Path
) -> None:
    said = greeting(Settings(**of_agent), node="", hub="", hub_cache=tmp_path)  # type: ignore[arg-type]
    assert objection(Settings(**program), said) == why  # type: ignore[arg-type]
