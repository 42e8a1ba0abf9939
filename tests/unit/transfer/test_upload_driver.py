"""Does a node answer each request with a grant and its bytes, or with the right refusal?"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sim.content import BytesStore, Content

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Digest
from swarm.errors import RemoteProtocolError, SourceChanged, TransportError
from swarm.journal import Sent
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import NodeId
from swarm.store import Source
from swarm.transfer.superseed import Superseed
from swarm.transfer.upload import LEAVING_RETRY_S
from swarm.transfer.upload_driver import NOTHING_RETRY_S, REFUSED_RETRY_S, UploadDriver

CHUNKS = 8
DEADLINE_S = 10.0
CONTENT = Content.random(0, chunks=CHUNKS, chunk_bytes=64)
DIGEST = CONTENT.manifest.digest


class Newcomer:
    """A peer that keeps the messages sent to it."""

    name, node, token = "newcomer", "5" * 16, "token"

    def __init__(self) -> None:
        self.heard: list[messages.Message] = []

    def post(self, message: messages.Message, *, within_s: float = 0.0) -> None:
        self.heard.append(message)


class Wire:
    """A transport and its only session. `error` is raised by `send`; `may_end` holds transfers back."""

    scheme, address, on_device = "tcp", "here:1", False

    def __init__(self) -> None:
        self.sent: list[tuple[int, bytes]] = []
        self.error: Exception | None = None
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def accept(self, token: str, *, timeout_s: float) -> Wire:
        return self

    async def send(self, transfer: Any, spans: Any) -> None:
        data = b"".join(bytes(span) for span in spans)
        await self.may_end.wait()
        if self.error:
            raise self.error
        self.sent.append((transfer.id, data))


class Node:
    """A node that serves one artifact to one newcomer; `slots` transfers at once."""

    def __init__(self, *, superseeds: bool = False, slots: int = 2) -> None:
        held = Bitfield.full(CHUNKS) if superseeds else Bitfield(CHUNKS, [0, 1, 2, 3])
        self.newcomer, self.wire = Newcomer(), Wire()
        self.peer = cast(Peer, self.newcomer)
        self.tasks: list[asyncio.Task[Any]] = []
        self.recorded: list[object] = []
        self.withdrawn: list[tuple[str, str]] = []
        self.only_here: frozenset[int] = frozenset()
        superseed = Superseed(CHUNKS, rng=random.Random(0)) if superseeds else None
        if superseed:
            superseed.joined(NodeId(self.newcomer.node), Bitfield(CHUNKS))
        source = cast(Source, BytesStore(CONTENT.manifest, CONTENT.files))
        self.share = SimpleNamespace(
            manifest=CONTENT.manifest,
            source=source,
            held=held,
            superseed=superseed,
            readable=lambda index: index < held.length and index in held,
        )
        self.shares: dict[Digest, Any] = {DIGEST: self.share}
        host = SimpleNamespace(
            id="0" * 16,
            peers={self.newcomer.node: self.peer},
            now=lambda: 0.0,
            record=lambda _, event: self.recorded.append(event),
            spawn=self.spawn,
        )
        self.driver = UploadDriver(
            host=host,
            transports=[cast(Any, self.wire)],
            shares=self.shares,
            rank=lambda _: (0, 1),
            withdraw=lambda digest, failure: self.withdrawn.append((digest, str(failure))),
            only_here=lambda share: self.only_here,
            slots=slots,
            idle_timeout_s=1.0,
        )

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    def request(self, number: int, *chunks: int, count: int = 0, digest: str = DIGEST, scheme: str = "tcp") -> None:
        self.driver.requested(
            self.peer, messages.Request(scheme, Digest(digest), number, chunks, count, False, 0, 0, 1)
        )

    def heard(self, kind: type[messages.Message]) -> list[Any]:
        return [message for message in self.newcomer.heard if isinstance(message, kind)]

    async def ended(self) -> None:
        """Until no transfer is on the wire or can be granted."""
        await self.started()
        while running := [task for task in self.tasks if not task.done()]:
            await asyncio.wait(running)
            await self.started()

    async def started(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def bytes_of(*chunks: int) -> bytes:
    store = BytesStore(CONTENT.manifest, CONTENT.files)
    return b"".join(bytes(span) for chunk in chunks for span in store.spans(CONTENT.manifest.chunks[chunk]))


def test_are_requested_chunks_granted_and_sent_in_order() -> None:
    async def scenario() -> None:
        node = Node()
        node.request(7, 2, 3)
        node.request(8, 1)
        await node.ended()
        assert node.heard(messages.Grant) == [messages.Grant(7, 0, (2, 3)), messages.Grant(8, 1, (1,))]
        assert node.wire.sent == [(7, bytes_of(2, 3)), (8, bytes_of(1))]
        sent = [event for event in node.recorded if isinstance(event, Sent)]
        assert sent == [
            Sent(NodeId(node.newcomer.node), DIGEST, len(bytes_of(2, 3))),
            Sent(NodeId(node.newcomer.node), DIGEST, 64),
        ]
        assert node.driver.machine.active == 0

    run(scenario)


@pytest.mark.parametrize(
    ("request_of", "reason"),
    [
        (lambda node: node.request(1, 2, digest="ff" * 32), "unknown_artifact"),
        (lambda node: node.request(1, 5), "not_held"),
        (lambda node: node.request(1, CHUNKS), "not_held"),
        (lambda node: node.request(1, count=2), "not_held"),
        (lambda node: node.request(1, 2, scheme="nccl"), "no_transport"),
    ],
)
def test_is_a_request_that_cannot_be_answered_refused(request_of: Callable[[Node], None], reason: str) -> None:
    async def scenario() -> None:
        node = Node()
        request_of(node)
        assert node.newcomer.heard == [messages.Refuse(1, cast(Any, reason), REFUSED_RETRY_S)]
        assert node.tasks == []

    run(scenario)


@pytest.mark.parametrize(("chunks", "count"), [((), 0), ((1,), 1)])
def test_is_a_request_for_neither_or_both_an_error_of_the_peer(chunks: tuple[int, ...], count: int) -> None:
    async def scenario() -> None:
        with pytest.raises(RemoteProtocolError, match="cannot be answered"):
            Node().request(1, *chunks, count=count)

    run(scenario)


def test_is_a_transfer_number_used_twice_an_error_of_the_peer() -> None:
    async def scenario() -> None:
        node = Node(slots=1)
        node.request(1, 2)
        node.request(2, 3)
        for number in (1, 2):  # one on the wire, one that waits
            with pytest.raises(RemoteProtocolError, match="twice"):
                node.request(number, 1)
        await node.ended()
        assert [number for number, _ in node.wire.sent] == [1, 2]

    run(scenario)


def test_does_a_seed_choose_and_refuse_when_it_has_sent_everything() -> None:
    async def scenario() -> None:
        node = Node(superseeds=True)
        node.request(1, count=CHUNKS)
        await node.ended()
        assert node.heard(messages.Grant) == [messages.Grant(1, 0, tuple(range(CHUNKS)))]
        node.request(2, count=1)
        await node.ended()
        assert node.heard(messages.Refuse) == [messages.Refuse(2, "nothing_to_give", NOTHING_RETRY_S)]

    run(scenario)


def test_are_chunks_of_a_transfer_that_broke_given_again() -> None:
    async def scenario() -> None:
        node = Node(superseeds=True)
        node.wire.error = TransportError("the session broke")
        node.request(1, count=CHUNKS)
        await node.ended()
        assert not any(isinstance(event, Sent) for event in node.recorded)
        node.wire.error = None
        node.request(2, count=CHUNKS)
        await node.ended()
        assert node.wire.sent == [(2, bytes_of(*range(CHUNKS)))]

    run(scenario)


def test_a_seed_that_drains_hands_over_what_only_it_has() -> None:
    async def scenario() -> None:
        node = Node(superseeds=True, slots=1)
        node.wire.may_end.clear()
        node.request(1, count=1)
        node.request(2, count=1)
        node.request(3, 0)
        await node.started()
        node.only_here = frozenset({5, 6})
        node.driver.drain()
        assert node.heard(messages.Refuse) == [messages.Refuse(3, "leaving", LEAVING_RETRY_S)]
        node.request(4, 4)
        assert node.heard(messages.Refuse)[1:] == [messages.Refuse(4, "leaving", LEAVING_RETRY_S)]
        node.request(5, 5)
        assert not node.driver.drained
        node.wire.may_end.set()
        while not node.driver.machine.idle:
            await node.ended()
        granted = {grant.transfer: set(grant.chunks) for grant in node.heard(messages.Grant)}
        assert granted.keys() == {1, 2, 5}
        assert granted[2] <= node.only_here
        assert granted[5] == {5}
        assert not node.driver.drained
        node.only_here = frozenset()
        assert node.driver.drained

    run(scenario)


def test_is_an_artifact_withdrawn_whose_source_changed() -> None:
    async def scenario() -> None:
        node = Node()
        node.wire.error = SourceChanged("model.bin", "it became shorter")
        node.request(1, 2)
        await node.ended()
        assert node.heard(messages.Refuse) == [messages.Refuse(1, "source_changed", REFUSED_RETRY_S)]
        assert [digest for digest, _ in node.withdrawn] == [DIGEST]

    run(scenario)


def test_is_a_request_refused_whose_artifact_went_while_it_waited() -> None:
    async def scenario() -> None:
        node = Node(slots=1)
        node.request(1, 2)
        node.request(2, 3)
        del node.shares[DIGEST]
        await node.ended()
        assert [number for number, _ in node.wire.sent] == [1]
        assert node.heard(messages.Refuse) == [messages.Refuse(2, "unknown_artifact", REFUSED_RETRY_S)]

    run(scenario)


def test_is_a_cancelled_transfer_stopped_and_its_slot_given_to_the_next() -> None:
    async def scenario() -> None:
        node = Node(slots=1)
        node.wire.may_end.clear()
        for number, chunk in ((1, 1), (2, 2), (3, 3)):
            node.request(number, chunk)
        await node.started()
        node.driver.cancelled(node.peer, 1)
        node.driver.cancelled(node.peer, 2)
        node.wire.may_end.set()
        await node.ended()
        assert node.wire.sent == [(3, bytes_of(3))]

    run(scenario)


def test_does_a_peer_that_left_keep_no_slot() -> None:
    async def scenario() -> None:
        node = Node(slots=1)
        node.wire.may_end.clear()
        node.request(1, 1)
        node.request(2, 2)
        await node.started()
        node.driver.left(NodeId(node.newcomer.node))
        await asyncio.gather(*node.tasks, return_exceptions=True)
        assert [task.cancelled() for task in node.tasks] == [True]
        assert node.wire.sent == []
        assert repr(node.driver.machine) == "<Upload 0/1 slots | 0 waiting | 0 peers>"

    run(scenario)


def test_is_nothing_read_of_a_share_once_it_was_stopped() -> None:
    async def scenario() -> None:
        node = Node()
        node.wire.may_end.clear()
        node.request(1, 1)
        await node.started()
        await node.driver.stop(cast(Any, node.share))
        assert node.tasks[0].cancelled()
        assert node.wire.sent == []
        assert node.driver.machine.active == 0

    run(scenario)
