"""Does a fetch take only the grants that it asked for, and let go of what nobody will grant any more?"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sim.content import BytesStore, Content

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import ModelId
from swarm.errors import RemoteProtocolError
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import NodeId
from swarm.store.cuda import CudaError
from swarm.transfer import download_events
from swarm.transfer.download_driver import DownloadDriver
from swarm.transfer.verify import Verifier

CHUNKS = 8
DEADLINE_S = 10.0


class Source:
    """A peer whose session opens and brings nothing; `said` is what it was told."""

    name, node, scheme, on_device, received_bytes = "source", NodeId("5" * 16), "tcp", False, 0

    def __init__(self) -> None:
        self.said: list[messages.Message] = []
        self.receiving: list[int] = []

    async def session(self) -> Source:
        return self

    async def receive(self, transfer: Any, views: Any) -> None:
        self.receiving.append(transfer.size)
        await asyncio.Event().wait()

    def post(self, message: messages.Message, *, within_s: float = 0.0) -> None:
        self.said.append(message)

    @property
    def requests(self) -> list[messages.Request]:
        return [message for message in self.said if isinstance(message, messages.Request)]


class Fetch:
    """A fetch from one source, on a clock that stands still until the test moves it."""

    def __init__(self, *, superseeds: bool) -> None:
        self.source = Source()
        self.peer = cast(Peer, self.source)
        self.now = 0.0
        self.tasks: list[asyncio.Task[Any]] = []
        self.told: list[list[int]] = []
        self.transfers: dict[int, DownloadDriver] = {}
        content = Content.random(0, chunks=CHUNKS, chunk_bytes=64)
        host = SimpleNamespace(
            id="0" * 16,
            peers={self.source.node: self.peer},
            now=lambda: self.now,
            record=lambda *_: None,
            spawn=self.spawn,
        )
        self.fetching = DownloadDriver(
            ModelId("org/model"),
            BytesStore(content.manifest),
            Bitfield(CHUNKS),
            host=host,
            idle_timeout_s=1.0,
            stall_timeout_s=30.0,
            transfer_ids=itertools.count(),
            transfers=self.transfers,
            rng=random.Random(0),
            announce=lambda chunks, _: self.told.append(chunks),
        )
        self.fetching.handle(download_events.PeerJoined(self.source.node, Bitfield.full(CHUNKS), superseeds))

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not true():  # noqa: ASYNC110 - what it waits for has no event
                await asyncio.sleep(0)

    async def asked(self) -> messages.Request:
        await self.until(lambda: self.source.requests)
        return self.source.requests[0]

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


def run(scenario: Callable[[Fetch], Coroutine[Any, Any, None]], *, superseeds: bool) -> None:
    async def main() -> None:
        fetch = Fetch(superseeds=superseeds)
        try:
            await scenario(fetch)
        finally:
            await fetch.close()

    asyncio.run(main())


@pytest.mark.parametrize("chunks", [(), (3, 4), (3, 3), (CHUNKS,)], ids=["none", "too_many", "twice", "beyond"])
def test_is_a_gift_that_cannot_be_an_error_of_the_peer(chunks: tuple[int, ...]) -> None:
    async def scenario(fetch: Fetch) -> None:
        request = await fetch.asked()
        assert (request.chunks, request.count) == ((), 1)
        with pytest.raises(RemoteProtocolError, match="was not asked for"):
            fetch.fetching.granted(fetch.peer, request.transfer, chunks)
        assert fetch.source.receiving == []

    run(scenario, superseeds=True)


@pytest.mark.parametrize("change", [lambda c: (), lambda c: (*c, 7), lambda c: tuple((i + 1) % CHUNKS for i in c)])
def test_is_a_grant_of_other_chunks_than_those_asked_for_an_error_of_the_peer(
    change: Callable[[tuple[int, ...]], tuple[int, ...]],
) -> None:
    async def scenario(fetch: Fetch) -> None:
        request = await fetch.asked()
        assert request.chunks
        with pytest.raises(RemoteProtocolError, match="was not asked for"):
            fetch.fetching.granted(fetch.peer, request.transfer, change(request.chunks))
        fetch.fetching.granted(fetch.peer, request.transfer, request.chunks)

    run(scenario, superseeds=False)


@pytest.mark.parametrize("superseeds", [True, False])
def test_is_a_second_grant_of_one_transfer_an_error_of_the_peer(superseeds: bool) -> None:
    async def scenario(fetch: Fetch) -> None:
        request = await fetch.asked()
        chunks = request.chunks or (5,)
        fetch.fetching.granted(fetch.peer, request.transfer, chunks)
        with pytest.raises(RemoteProtocolError, match="twice"):
            fetch.fetching.granted(fetch.peer, request.transfer, chunks)

    run(scenario, superseeds=superseeds)


def test_is_a_gift_received_once_it_is_known() -> None:
    async def scenario(fetch: Fetch) -> None:
        request = await fetch.asked()
        fetch.fetching.granted(fetch.peer, request.transfer, (5,))
        await fetch.until(lambda: fetch.source.receiving)
        assert fetch.source.receiving == [fetch.fetching.machine.manifest.chunks[5].size]

    run(scenario, superseeds=True)


def test_is_what_gpus_need_there_before_anything_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, may_end = list[Verifier](), threading.Event()

    def prepare(verifier: Verifier) -> None:
        prepared.append(verifier)
        assert may_end.wait(DEADLINE_S)

    monkeypatch.setattr(Verifier, "prepare", prepare)
    monkeypatch.setattr(Source, "on_device", True)

    async def scenario(fetch: Fetch) -> None:
        await fetch.until(lambda: prepared)
        fetch.fetching.handle(download_events.Tick())  # which asks for more
        assert not fetch.source.requests
        may_end.set()
        await fetch.until(lambda: len(fetch.source.requests) == 2)
        assert len(prepared) == 1

    run(scenario, superseeds=False)


def test_does_a_fetch_fail_whose_gpu_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(verifier: Verifier) -> None:
        raise CudaError("hashing on GPU 0: out of memory")

    monkeypatch.setattr(Verifier, "prepare", prepare)
    monkeypatch.setattr(Source, "on_device", True)

    async def scenario(fetch: Fetch) -> None:
        with pytest.raises(CudaError, match="out of memory"):
            await asyncio.wait_for(fetch.fetching.run(), DEADLINE_S)
        assert not fetch.source.requests

    run(scenario, superseeds=False)


def test_is_a_grant_of_what_another_peer_was_asked_for_ignored() -> None:
    async def scenario(fetch: Fetch) -> None:
        request = await fetch.asked()
        before = repr(fetch.fetching.machine)
        fetch.fetching.granted(cast(Peer, Source()), request.transfer, (5,))
        fetch.fetching.granted(fetch.peer, 999, (5,))
        assert fetch.transfers == {request.transfer: fetch.fetching}
        assert repr(fetch.fetching.machine) == before
        assert fetch.source.receiving == []
        fetch.fetching.granted(fetch.peer, request.transfer, (5,))
        await fetch.until(lambda: fetch.source.receiving)

    run(scenario, superseeds=True)


def test_does_no_fetch_wait_for_what_a_peer_that_left_would_have_pushed() -> None:
    """Such a wait used to last as long as the fetch."""

    async def scenario(fetch: Fetch) -> None:
        await fetch.asked()
        fetch.fetching.handle(download_events.PeerLeft(fetch.source.node, "closed the link"))
        await fetch.until(lambda: all(task.done() for task in fetch.tasks))
        await fetch.until(lambda: fetch.transfers == {})

    run(scenario, superseeds=True)


@pytest.mark.parametrize(("reason", "failures"), [("nothing_to_give", 0), ("busy", 1)])
def test_is_nothing_to_give_no_failure(reason: messages.RefusalReason, failures: int) -> None:
    async def scenario(fetch: Fetch) -> None:
        request = await fetch.asked()
        fetch.fetching.refused(fetch.peer, request.transfer, reason=reason, retry_s=3.0)
        machine = fetch.fetching.machine
        await fetch.until(lambda: machine._peers[NodeId(fetch.source.node)].resting_until == 3.0)
        assert machine._peers[NodeId(fetch.source.node)].failures == failures

    run(scenario, superseeds=True)


def test_is_a_granted_transfer_cancelled_whose_session_brings_no_byte() -> None:
    async def scenario(fetch: Fetch) -> None:
        request = await fetch.asked()
        fetch.fetching.granted(fetch.peer, request.transfer, request.chunks)
        await fetch.until(lambda: fetch.source.receiving)
        fetch.now, fetch.source.received_bytes = 0.9, 1
        fetch.fetching.tick()
        fetch.now = 1.8
        fetch.fetching.tick()
        assert messages.Cancel(request.transfer) not in fetch.source.said
        fetch.now = 2.0
        fetch.fetching.tick()
        assert messages.Cancel(request.transfer) in fetch.source.said
        await fetch.until(lambda: fetch.tasks[1].cancelled())

    run(scenario, superseeds=False)


def test_is_the_first_chunk_told_at_once_and_what_follows_together() -> None:
    async def scenario(fetch: Fetch) -> None:
        request = await fetch.asked()
        verified = partial(download_events.ChunksVerified, fetch.source.node, request.transfer)
        fetch.fetching.handle(verified((1,)))
        await fetch.until(lambda: fetch.told)
        fetch.fetching.handle(verified((2,)))
        fetch.fetching.handle(verified((3,)))
        fetch.now = 1.0
        await fetch.until(lambda: len(fetch.told) > 1)
        assert fetch.told == [[1], [2, 3]]

    run(scenario, superseeds=False)


def test_are_the_last_chunks_told_before_the_fetch_is_over() -> None:
    async def scenario(fetch: Fetch) -> None:
        request = await fetch.asked()
        running = asyncio.create_task(fetch.fetching.run())
        for chunk in range(CHUNKS):
            fetch.fetching.handle(download_events.ChunksVerified(fetch.source.node, request.transfer, (chunk,)))
        await running
        assert sorted(itertools.chain(*fetch.told)) == list(range(CHUNKS))

    run(scenario, superseeds=False)
