"""A seed on the other side of the world: 200 ms away, over a network that loses packets."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from .processes import Machine, contents, write_model

pytestmark = pytest.mark.integration

ONE_WAY_S = 0.1
LOST = 0.02  # of reads of a stream, and of datagrams
RETRANSMISSION_S = 0.3  # a lost packet holds its stream up for so long
READ_BYTES = 64 << 10
FLYING_MAX = 256  # reads on their way

Address = tuple[str, int]


class Road(asyncio.DatagramProtocol):
    """Carries TCP and UDP from `here` to `there` and back, late, and not all of it."""

    def __init__(self, here: Address, there: Address) -> None:
        self._here, self._there = here, there
        self._rng = random.Random(1)
        self._back: dict[Address, asyncio.DatagramTransport] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._transport: asyncio.DatagramTransport

    async def live(self, ready: threading.Event, over: asyncio.Event) -> None:
        """Carries until `over`."""
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._carry_stream, *self._here)
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=self._here)
        ready.set()
        await over.wait()
        server.close()
        for transport in (self._transport, *self._back.values()):
            transport.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0.1)  # aborted transports close their sockets in the next turns

    def datagram_received(self, data: bytes, addr: Address) -> None:
        if self._rng.random() >= LOST:
            task = asyncio.get_running_loop().create_task(self._carry_datagram(data, addr))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry_datagram(self, data: bytes, source: Address) -> None:
        await asyncio.sleep(ONE_WAY_S)
        if source not in self._back:
            self._back[source], _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Answers(self._transport, source), remote_addr=self._there
            )
        self._back[source].sendto(data)

    async def _carry_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, onward = await asyncio.open_connection(*self._there)
        ends = {writer, onward}
        self._writers |= ends
        await asyncio.gather(self._pump(reader, onward), self._pump(there, writer), return_exceptions=True)
        self._writers -= ends
        for end in ends:
            end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        flying: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(FLYING_MAX)

        async def arrive() -> None:
            data = b"more"
            while data:
                due, data = await flying.get()
                await asyncio.sleep(due - asyncio.get_running_loop().time())
                writer.write(data)
                await writer.drain()
            writer.write_eof()

        arriving = asyncio.create_task(arrive())
        data = b"more"
        while data:
            data = await reader.read(READ_BYTES)
            lost_s = RETRANSMISSION_S if self._rng.random() < LOST else 0.0
            await flying.put((asyncio.get_running_loop().time() + ONE_WAY_S + lost_s, data))
        await arriving


class _Answers(asyncio.DatagramProtocol):
    def __init__(self, transport: asyncio.DatagramTransport, to: Address) -> None:
        self._transport, self._to = transport, to

    def datagram_received(self, data: bytes, _: Address) -> None:
        asyncio.get_running_loop().call_later(ONE_WAY_S, self._transport.sendto, data, self._to)


@contextlib.contextmanager
def road(here: Address, there: Address) -> Iterator[None]:
    ready, stop = threading.Event(), threading.Event()

    async def live() -> None:
        over = asyncio.Event()
        carrying = asyncio.create_task(Road(here, there).live(ready, over))
        await asyncio.to_thread(stop.wait)
        over.set()
        await carrying

    thread = threading.Thread(target=lambda: asyncio.run(live()), name="road", daemon=True)
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        stop.set()
        thread.join(10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.mark.timeout(180)
@pytest.mark.parametrize("key", [False, True])
def test_a_fetch_from_far_away_over_a_network_that_loses_packets_is_whole(
    machine: Machine, tmp_path: Path, out: Path, key: bool
) -> None:
    model = write_model(tmp_path / "model", size=8_000_000)
    flags = ["--key-file", str(machine.root / "key")] if key else []
    if key:
        machine.run("keygen", machine.root / "key")
    here, there = free_port(), free_port()
    environment = {"SWARM_NETWORK": "wan", "SWARM_IDLE_TIMEOUT_S": "5", "SWARM_STALL_TIMEOUT_S": "30"}
    with road(("127.0.0.1", here), ("127.0.0.1", there)):
        listening = ("--listen", f"127.0.0.1:{there}", "--advertise", f"127.0.0.1:{here}")
        machine.serve(model, *listening, *flags, environment=environment)
        newcomer = machine.fetch(out, *flags, peers=[f"127.0.0.1:{here}"], environment=environment)
        report = newcomer.end().report
    assert report["rejected_chunks"] == 0
    assert contents(out) == contents(model)
