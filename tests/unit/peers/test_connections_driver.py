"""The driver of links: does a link begin with Hello, a message reach its handler, and a peer leave with its link?"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, cast

import pytest

from swarm.content.manifest import Digest, ModelId
from swarm.errors import NotAdmitted, PeerError, PeerUnreachable
from swarm.journal import ArtifactsAnnounced, Joined, Left, Unreached
from swarm.net.environment import Environment
from swarm.peers import connections_driver
from swarm.peers.connections import AddressDiscovered, Connections
from swarm.peers.connections_driver import ConnectionsDriver, Handler
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import Address, Announcement, AnyMessage, Bye, Hello, Members, Message, NodeId

DEADLINE_S = 10.0
ME, THEM = NodeId("2" * 16), NodeId("1" * 16)
DIGEST = Digest("ab" * 32)
WHOLE = Announcement(ModelId("org/model"), DIGEST, "checkpoint", 8, 2, 2, True)
HERE, THERE = Address("here:1"), Address("there:1")


def hello(node: NodeId = THEM, *, protocol: int = messages.PROTOCOL, name: str = "them") -> Hello:
    return Hello(protocol, "0.1", node, name, 0, (THERE,), "cd" * 16, (), (WHOLE,))


class FakeLink:
    """A link whose other end is the test: `said` by the node, `say` to the node."""

    def __init__(self, *first: AnyMessage, member: str | None = None) -> None:
        self.remote, self.local = "there:1", "here:2"
        self.member = member
        self.said: list[Message] = []
        self.closed = False
        self._inbox: asyncio.Queue[AnyMessage | None] = asyncio.Queue()
        self.say(*first)

    def say(self, *several: AnyMessage) -> None:
        for message in several:
            self._inbox.put_nowait(message)

    async def send(self, *several: Message) -> None:
        self.said += several

    async def receive(self) -> AnyMessage:
        if (message := await self._inbox.get()) is None:
            raise PeerUnreachable(self.remote, "the link broke")
        return message

    async def close(self) -> None:
        self.closed = True
        self._inbox.put_nowait(None)


class FakeTransport:
    scheme, address, reason = "tcp", "here:1", "tests"
    usual_bytes_per_s = 0.0

    def __init__(self) -> None:
        self.admitted: list[str] = []

    def admit(self, token: str) -> None:
        self.admitted.append(token)

    async def revoke(self, token: str) -> None:
        self.admitted.remove(token)


class Node:
    """A node of links alone. `happened` has its journal and the calls of the driver."""

    id, name = ME, "me"

    def __init__(self, *, opened: bool = True) -> None:
        self.transports = [FakeTransport()]
        self.links: dict[Address, FakeLink | PeerError] = {}
        self.happened: list[object] = []
        self.handled: list[tuple[str, Message]] = []
        self.tasks: list[asyncio.Task[Any]] = []
        machine = Connections(ME, rng=random.Random(1))
        self.driver = ConnectionsDriver(cast(Environment, self), machine, host=self, rng=random.Random(1))
        self._handlers: dict[type[AnyMessage], Handler] = {
            messages.Members: self.driver.on_members,
            messages.Announce: self.driver.on_announce,
            messages.Have: lambda peer, message: self.handled.append((peer.name, message)),
        }
        if opened:
            self.driver.open(self._handlers)

    def open(self) -> None:
        self.driver.open(self._handlers)

    @property
    def peers(self) -> dict[NodeId, Peer]:
        return self.driver.peers

    def now(self) -> float:
        return 0.0

    def record(self, subject: str, event: object) -> None:
        self.happened.append(event)

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    def hello(self, token: str, port: int) -> Hello:
        return Hello(messages.PROTOCOL, "0.1", ME, "me", port, (HERE,), token, (), ())

    def port_at(self, local: str) -> int:
        return 1

    def reached(
        self, claimed: Sequence[str], *, remote: str | None = None, port: int = 0, dialled: Address | None = None
    ) -> tuple[Address, ...]:
        return tuple(dict.fromkeys([*([dialled] if dialled else []), *map(Address, claimed)]))

    def dialled(self, address: Address) -> None:
        self.happened.append(f"dialled {address}")

    def peer_joined(self, peer: Peer) -> None:
        self.happened.append(f"joined {peer.name}")

    def peer_left(self, peer: Peer, why: str) -> None:
        self.happened.append(f"left {peer.name}: {why}")

    def peers_changed(self) -> None:
        """The driver's word for it is in the journal."""

    async def dial(self, addresses: Sequence[Address]) -> FakeLink:
        link = self.links[addresses[0]]
        if isinstance(link, PeerError):
            raise link
        return link

    def accept(self, link: FakeLink) -> asyncio.Task[Any]:
        return self.spawn(self.driver.run_link(link), "link")

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not true():  # noqa: ASYNC110 - what it waits for has no event
                await asyncio.sleep(0)

    async def linked(self, *, name: str = "them") -> FakeLink:
        link = FakeLink(hello(name=name))
        self.accept(link)
        await self.until(lambda: any(peer.link is link for peer in self.peers.values()))
        return link


def run(scenario: Callable[[Node], Coroutine[Any, Any, None]], *, opened: bool = True) -> None:
    async def main() -> None:
        node = Node(opened=opened)
        try:
            await scenario(node)
        finally:
            for task in node.tasks:
                task.cancel()
            await asyncio.gather(*node.tasks, return_exceptions=True)

    asyncio.run(main())


def test_is_a_node_a_peer_from_hello_to_the_end_of_its_link() -> None:
    async def scenario(node: Node) -> None:
        link = await node.linked()
        (greeting,) = [message for message in link.said if isinstance(message, Hello)]
        assert node.transports[0].admitted == [greeting.token]
        assert node.happened == [
            Joined(THEM, "them", THERE, "none"),
            ArtifactsAnnounced(THEM, (WHOLE,)),
            "joined them",
        ]
        await link.close()
        await node.until(lambda: not node.transports[0].admitted)
        assert node.peers == {}
        assert node.happened[3:] == [Left(THEM, "the link broke"), "left them: the link broke"]

    run(scenario)


def test_does_a_link_wait_until_the_node_is_open() -> None:
    async def scenario(node: Node) -> None:
        link = FakeLink(hello())
        node.accept(link)
        for _ in range(10):
            await asyncio.sleep(0)
        assert link.said == []
        node.open()
        await node.until(lambda: THEM in node.peers)

    run(scenario, opened=False)


def test_does_each_message_reach_the_handler_of_its_type() -> None:
    async def scenario(node: Node) -> None:
        have = messages.Have(DIGEST, ((0, 1),))
        link = await node.linked()
        link.say(have, Members(((Address("third:1"),),)), messages.Announce((), leaving=False), have)
        node.links[Address("third:1")] = PeerUnreachable("third:1", "nobody lives there")
        await node.until(lambda: len(node.handled) == 2)
        assert node.handled == [("them", have)] * 2
        await node.until(lambda: any(isinstance(event, Unreached) for event in node.happened))

    run(scenario)


def test_does_a_goodbye_say_why_a_peer_left() -> None:
    async def scenario(node: Node) -> None:
        link = await node.linked()
        link.say(Bye("shutting down"))
        await node.until(lambda: not node.peers)
        assert node.happened[-1] == "left them: left: shutting down"
        assert node.driver.warned == {}

    run(scenario)


@pytest.mark.parametrize(
    ("first", "member", "why"),
    [
        (messages.Have(DIGEST, ((0, 1),)), None, "began with Have instead of Hello"),
        (hello(protocol=messages.PROTOCOL + 1), None, "speaks protocol"),
        (hello(), "f" * 16, "its certificate is that of ffff"),
    ],
    ids=["no hello", "version", "certificate"],
)
def test_is_a_wrong_greeting_refused_with_a_warning(first: AnyMessage, member: str | None, why: str) -> None:
    async def scenario(node: Node) -> None:
        link = FakeLink(first, member=member)
        await node.accept(link)
        assert node.peers == {}
        assert link.closed
        (warning,) = node.driver.warned
        assert why in warning
        assert node.transports[0].admitted == []

    run(scenario)


def test_is_a_second_hello_an_error_of_the_peer() -> None:
    async def scenario(node: Node) -> None:
        link = await node.linked()
        link.say(hello())
        await node.until(lambda: not node.peers)
        assert "said hello twice" in str(node.driver.warned)

    run(scenario)


def test_does_a_silent_end_not_hold_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_driver, "HELLO_TIMEOUT_S", 0.01)

    async def scenario(node: Node) -> None:
        link = FakeLink()
        await node.accept(link)
        assert link.closed
        assert node.peers == {}

    run(scenario)


def test_is_a_peer_that_floods_muted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_driver, "MESSAGES_BURST", 3.0)

    async def scenario(node: Node) -> None:
        have = messages.Have(DIGEST, ((0, 1),))
        link = await node.linked()
        link.say(*[have] * 5)
        await node.until(lambda: not node.peers)
        assert len(node.handled) == 3
        assert "floods this node with messages" in str(node.driver.warned)
        again = FakeLink(hello())
        await node.accept(again)
        assert node.peers == {}, "it is muted"

    run(scenario)


def test_is_the_newer_of_two_links_from_one_node_its_peer() -> None:
    async def scenario(node: Node) -> None:
        have = messages.Have(DIGEST, ((0, 1),))
        old, new = await node.linked(name="old"), await node.linked(name="new")
        assert [peer.name for peer in node.peers.values()] == ["new"]
        assert "left old: another link is open" in node.happened
        await node.until(lambda: old.closed)
        new.say(have)
        await node.until(lambda: node.handled)
        assert node.handled == [("new", have)]
        assert not new.closed

    run(scenario)


def test_are_messages_of_a_link_that_is_dropped_not_handled() -> None:
    async def scenario(node: Node) -> None:
        link = await node.linked()
        peer = node.peers.pop(THEM)
        link.say(messages.Have(DIGEST, ((0, 1),)), Bye("over"))
        await node.until(lambda: peer.why_gone)
        assert node.handled == []

    run(scenario)


def test_is_a_dialled_node_reported_and_a_failure_recorded() -> None:
    async def scenario(node: Node) -> None:
        link = node.links[THERE] = FakeLink(hello())
        node.driver.handle(AddressDiscovered((THERE,), True))
        await node.until(lambda: THEM in node.peers)
        assert node.happened[0] == "dialled there:1"
        refused = node.links[Address("refuses:1")] = NotAdmitted("refuses:1", "needs a key")
        node.driver.handle(AddressDiscovered((Address("refuses:1"),), True))
        await node.until(lambda: Unreached(Address("refuses:1"), refused) in node.happened)
        assert list(node.driver.warned) == [str(refused)]
        assert not link.closed

    run(scenario)


def test_does_closing_say_goodbye_on_every_link() -> None:
    async def scenario(node: Node) -> None:
        link = await node.linked()
        await node.driver.close("shutting down")
        assert link.said[-1] == Bye("shutting down")
        assert repr(node.driver).startswith("<ConnectionsDriver 1 links | <Connections 22222222 1 links")

    run(scenario)


def test_is_a_warning_logged_once_and_their_number_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections_driver, "WARNINGS_MAX", 1)

    async def scenario(node: Node) -> None:
        for protocol in (98, 98, 99):
            await node.accept(FakeLink(hello(protocol=protocol)))
        assert len(node.driver.warned) == 1

    with caplog.at_level(logging.WARNING):
        run(scenario)
    assert len(caplog.messages) == 1


def test_do_links_that_never_greet_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_driver, "GREETINGS_MAX", 3)

    async def scenario(node: Node) -> None:
        silent = [FakeLink() for _ in range(10)]
        for link in silent:
            node.accept(link)
        await node.until(lambda: sum(link.closed for link in silent) == 7)
        assert [link.closed for link in silent] == [True] * 7 + [False] * 3, "the oldest are closed"
        await node.linked()
        await silent[-1].close()
        await node.until(lambda: len(node.transports[0].admitted) == 3)

    run(scenario)
