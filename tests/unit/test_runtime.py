"""The background loop: who shares a node, when does it close, and what does Ctrl-C leave behind?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from swarm import __version__
from swarm.errors import SettingsError
from swarm.net.host_environment import HostEnvironment
from swarm.node.node import Node
from swarm.runtime import Runtime, new_node, runtime
from swarm.settings import Settings

DEADLINE_S = 20.0

# The child works, and ends as processes do, though a thread that it does not have holds the lock for ever. Were it to
# wait for the nodes of its parent, it would wait without end.
FORKING = """
import os, sys
from swarm import runtime as runtimes

async def answer():
    return 42

runtimes.EXIT_TIMEOUT_S = None
assert runtimes.runtime().run(answer()) == 42
with runtimes._lock:
    child = os.fork()
    if child == 0:
        sys.exit(runtimes.runtime().run(answer()))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
assert runtimes.runtime().run(answer()) == 42
"""


def settings(tmp_path: Path, **changes: object) -> Settings:
    return Settings.load({"mdns": False, "cache": tmp_path, **changes}, environment={})


def test_do_equal_settings_share_a_node(tmp_path: Path) -> None:
    one, other = settings(tmp_path), settings(tmp_path, name="other")

    async def scenario() -> None:
        first, again = await asyncio.gather(runtime().acquire(one), runtime().acquire(settings(tmp_path)))
        another = await runtime().acquire(other)
        assert first is again
        assert another is not first
        await runtime().release(one)
        assert not first._closing
        await runtime().release(one)
        assert first._closing
        assert not another._closing
        await runtime().release(other)

    runtime().run(scenario())


def test_is_a_closed_node_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        nodes = []
        for _ in range(2):
            nodes.append(await runtime().acquire(settings(tmp_path)))
            await runtime().release(settings(tmp_path))
        assert nodes[0] is not nodes[1]

    runtime().run(scenario())


def test_does_a_node_that_cannot_open_leave_nothing_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        taken = await runtime().acquire(settings(tmp_path))
        wrong = settings(tmp_path, listen=taken.address)
        failures = await asyncio.gather(*(runtime().acquire(wrong) for _ in range(2)), return_exceptions=True)
        assert [type(failure) for failure in failures] == [SettingsError, SettingsError]
        await runtime().release(settings(tmp_path))
        await runtime().acquire(wrong)  # the address is free now
        await runtime().release(wrong)

    runtime().run(scenario())


def test_does_giving_up_while_a_node_opens_close_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, stopped = list[bool](), list[bool]()
    real_close = HostEnvironment.close

    async def close(self: HostEnvironment) -> None:
        closed.append(True)
        await real_close(self)

    async def never(self: Node) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(True)

    monkeypatch.setattr(HostEnvironment, "close", close)
    monkeypatch.setattr(Node, "open", never)

    async def scenario() -> None:
        acquiring = asyncio.create_task(runtime().acquire(settings(tmp_path)))
        for _ in range(3):  # the node's opening has begun
            await asyncio.sleep(0)
        acquiring.cancel()
        await asyncio.gather(acquiring, return_exceptions=True)
        assert (stopped, closed) == ([True], [True])

    runtime().run(scenario())


def test_can_many_threads_use_it_at_once() -> None:
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: runtime().run(double(number)), range(50))) == list(range(0, 100, 2))
    assert runtime() is runtime()


def test_does_it_work_inside_a_running_loop() -> None:
    async def answer() -> int:
        return 42

    async def scenario() -> int:
        return runtime().run(answer())

    assert asyncio.run(scenario()) == 42


def test_does_an_error_come_out_unchanged() -> None:
    wrong = SettingsError("name", "is wrong")

    async def fail() -> None:
        raise wrong

    with pytest.raises(SettingsError) as caught:
        runtime().run(fail())
    assert caught.value is wrong


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell that starts a command in the background lets it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_does_ctrl_c_wait_until_the_work_has_cleaned_up() -> None:
    began, cleaned = threading.Event(), threading.Event()

    async def work() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            cleaned.set()

    main = threading.main_thread().ident or 0

    def press() -> None:
        """Once the main thread waits for the work."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            if began.is_set() and sys._current_frames()[main].f_code.co_name == "wait":
                signal.pthread_kill(main, signal.SIGINT)
                return
            time.sleep(0.001)

    presser = threading.Thread(target=press)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        runtime().run(work())
    assert cleaned.is_set()
    presser.join()


def test_does_the_end_of_the_process_close_every_node(tmp_path: Path) -> None:
    own = Runtime()
    node = own.run(own.acquire(settings(tmp_path)))
    own._close_all()
    assert node._closing


def test_does_it_work_in_a_forked_child() -> None:
    with subprocess.Popen([sys.executable, "-c", FORKING], start_new_session=True) as parent:
        try:
            assert parent.wait(DEADLINE_S) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)  # a child that hangs, too


def test_what_is_a_node_called_that_has_no_name(tmp_path: Path) -> None:
    node, _ = new_node(settings(tmp_path))
    assert node.name == f"{socket.gethostname()}-{node.id[:6]}"
    assert new_node(settings(tmp_path, name="me"))[0].name == "me"


def test_does_the_picture_follow_the_node(tmp_path: Path) -> None:
    async def scenario() -> None:
        node, picture = new_node(settings(tmp_path, name="me"))
        async with node:
            told = picture.report(node.now())["node"]
            assert (told["id"], told["name"], told["address"]) == (node.id, "me", node.address)
            assert (told["version"], told["open"], told["mdns"]) == (__version__, False, "off")

    runtime().run(scenario())
