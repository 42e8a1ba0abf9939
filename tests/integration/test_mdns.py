"""Real processes that find each other by multicast on loopback; nothing leaves this machine."""

import asyncio
import contextlib
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from swarm.net.discovery import Mdns

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("mdns")]

DEADLINE_S = 20

PROGRAM = """
import asyncio, sys
from swarm.net.discovery import Mdns

async def main():
    mdns = Mdns()
    host, port = sys.argv[2], int(sys.argv[3])
    report = lambda addresses: print(*addresses, flush=True)
    await mdns.start(node_id=sys.argv[1], hosts=[host], port=port, found=report)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)  # until the test closes our input
    await mdns.close()
    print("closed", flush=True)

asyncio.run(main())
"""


class Process:
    """One node in a process of its own; `found` collects what it reports."""

    def __init__(self, port: int, *, host: str) -> None:
        self.node_id = secrets.token_hex(8)
        self.popen = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROGRAM, self.node_id, host, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.put(line.strip())

    def wait_for(self, wanted: set[str]) -> set[str]:
        seen: set[str] = set()
        while not wanted <= seen:
            try:
                seen.add(self.lines.get(timeout=DEADLINE_S))
            except queue.Empty:
                pytest.fail(f"{wanted - seen} not found within {DEADLINE_S} s, only {seen}")
        return seen


@contextlib.contextmanager
def processes(*ports: int, host: str = "127.0.0.1") -> Iterator[list[Process]]:
    running = [Process(port, host=host) for port in ports]
    try:
        yield running
    finally:
        for process in running:
            process.popen.kill()
            process.popen.wait(DEADLINE_S)
            for pipe in (process.popen.stdin, process.popen.stdout):
                assert pipe is not None
                process._reader.join(DEADLINE_S)
                pipe.close()


def ports(count: int) -> list[int]:
    """Port numbers that no other run of these tests announces just now; nothing listens there."""
    first = 20000 + secrets.randbelow(40000)
    return list(range(first, first + count))


def test_do_three_processes_all_find_each_other() -> None:
    numbers = ports(3)
    with processes(*numbers) as nodes:
        for node, own in zip(nodes, numbers, strict=True):
            node.wait_for({f"127.0.0.1:{port}" for port in numbers if port != own})


def test_does_a_newcomer_find_a_seed_that_was_there_before() -> None:
    seed_port, witness_port, newcomer_port = ports(3)
    with processes(seed_port, witness_port) as (_, witness):
        witness.wait_for({f"127.0.0.1:{seed_port}"})
        with processes(newcomer_port) as (newcomer,):
            newcomer.wait_for({f"127.0.0.1:{seed_port}", f"127.0.0.1:{witness_port}"})


def test_does_an_announced_node_close_cleanly_with_warnings_as_errors() -> None:
    leaver_port, other_port = ports(2)
    with processes(leaver_port, other_port) as (leaver, other):
        other.wait_for({f"127.0.0.1:{leaver_port}"})
        assert leaver.popen.stdin is not None
        leaver.popen.stdin.close()
        leaver.wait_for({"closed"})
        assert leaver.popen.wait(DEADLINE_S) == 0


def test_is_a_node_that_said_goodbye_forgotten() -> None:
    leaver_port, seed_port, newcomer_port = ports(3)
    with processes(leaver_port, seed_port) as (leaver, seed):
        seed.wait_for({f"127.0.0.1:{leaver_port}"})
        assert leaver.popen.stdin is not None
        leaver.popen.stdin.close()
        leaver.wait_for({"closed"})
        with processes(newcomer_port) as (newcomer,):
            assert newcomer.wait_for({f"127.0.0.1:{seed_port}"}).isdisjoint({f"127.0.0.1:{leaver_port}"})


def test_do_nodes_on_the_ipv6_loopback_find_each_other() -> None:
    one_port, other_port = ports(2)
    with processes(one_port, other_port, host="::1") as (one, other):
        one.wait_for({f"[::1]:{other_port}"})
        other.wait_for({f"[::1]:{one_port}"})


def test_is_a_killed_node_no_obstacle_for_others() -> None:
    dead_port, seed_port, newcomer_port = ports(3)
    with processes(dead_port, seed_port) as (dead, seed):
        seed.wait_for({f"127.0.0.1:{dead_port}"})
        os.kill(dead.popen.pid, signal.SIGKILL)
        with processes(newcomer_port) as (newcomer,):
            newcomer.wait_for({f"127.0.0.1:{seed_port}"})


def test_is_a_node_never_reported_to_itself_and_others_only_once() -> None:
    own_port, other_port, last_port = ports(3)
    found: list[str] = []

    async def main() -> None:
        mdns = Mdns()
        await mdns.start(node_id=secrets.token_hex(8), hosts=["127.0.0.1"], port=own_port, found=found.extend)
        async with asyncio.timeout(DEADLINE_S):
            with processes(other_port, last_port) as (other, _):
                # Both ask and both are announced several times before this is true.
                await asyncio.to_thread(other.wait_for, {f"127.0.0.1:{own_port}", f"127.0.0.1:{last_port}"})
                while not {f"127.0.0.1:{other_port}", f"127.0.0.1:{last_port}"} <= set(found):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        assert not mdns.silent(asyncio.get_running_loop().time() + 3600)
        await mdns.close()

    asyncio.run(main())
    assert f"127.0.0.1:{own_port}" not in found
    assert found.count(f"127.0.0.1:{other_port}") == 1
