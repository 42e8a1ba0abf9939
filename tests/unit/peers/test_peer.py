"""One connected peer: how is it read, and what happens to one that does not read?"""

from __future__ import annotations

import asyncio
import logging

import pytest

from swarm.content.manifest import Digest
from swarm.errors import PeerUnreachable, TransportError
from swarm.peers import peer as peers
from swarm.peers.peer import Backlog, Peer
from swarm.protocol.messages import Address, AnyMessage, Bye, Cancel, Endpoint, Hello, ManifestPart, Message, NodeId
from swarm.transport import Transport
from swarm.transport.inproc import InprocHub, InprocSession, InprocTransport

TOKEN = "cd" * 16


class FakeLink:
    """Remembers what was sent. With `stuck` its other end reads nothing; with `broken` there is none."""

    remote, local = "fake", "here"
    member: str | None = None

    def __init__(self, *, stuck: bool = False, broken: bool = False) -> None:
        self.sent: asyncio.Queue[Message] = asyncio.Queue()
        self.closed = False
        self._stuck = stuck
        self._broken = broken

    async def send(self, *several: Message) -> None:
        if self._broken:
            raise PeerUnreachable(self.remote, "it broke")
        if self._stuck:
            await asyncio.Event().wait()
        for message in several:
            self.sent.put_nowait(message)

    async def receive(self) -> AnyMessage:
        raise PeerUnreachable(self.remote, "says nothing")

    async def close(self) -> None:
        self.closed = True


def peer_at(
    link: FakeLink, *offers: Endpoint, transports: tuple[Transport, ...] = (), backlog: Backlog | None = None
) -> Peer:
    hello = Hello(1, "0", NodeId("0" * 16), "them", 0, (Address("127.0.0.1:1"),), TOKEN, offers, ())
    return Peer(0, link, hello, token="ef" * 16, transports=transports, backlog=backlog)


def test_are_posted_messages_sent_in_order() -> None:
    async def scenario() -> None:
        link = FakeLink()
        peer = peer_at(link)
        peer.post(Cancel(1))
        writing = asyncio.create_task(peer.write())
        peer.post(Cancel(2))
        assert [await link.sent.get(), await link.sent.get()] == [Cancel(1), Cancel(2)]
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        assert link.closed

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_do_messages_posted_in_one_turn_travel_together() -> None:
    class CountingLink(FakeLink):
        sends = 0

        async def send(self, *several: Message) -> None:
            self.sends += 1
            await super().send(*several)

    async def scenario() -> None:
        link = CountingLink()
        peer = peer_at(link)
        writing = asyncio.create_task(peer.write())
        for turn in range(2):
            for number in range(3):
                peer.post(Cancel(number))
            assert [await link.sent.get() for _ in range(3)] == [Cancel(0), Cancel(1), Cancel(2)]
            assert link.sends == turn + 1
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_does_a_message_that_may_wait_travel_with_the_next_and_not_for_ever() -> None:
    class Frames(FakeLink):
        def __init__(self) -> None:
            super().__init__()
            self.frames: asyncio.Queue[tuple[Message, ...]] = asyncio.Queue()

        async def send(self, *several: Message) -> None:
            self.frames.put_nowait(several)

    async def scenario() -> None:
        link = Frames()
        peer = peer_at(link)
        writing = asyncio.create_task(peer.write())
        peer.post(Cancel(1), within_s=1e6)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert link.frames.empty()
        peer.post(Cancel(2))
        assert await link.frames.get() == (Cancel(1), Cancel(2))
        peer.post(Cancel(3), within_s=0.001)
        peer.post(Cancel(4), within_s=1e6)
        assert await link.frames.get() == (Cancel(3), Cancel(4))
        peer.post(Cancel(5), within_s=1e6)
        peer.post(Cancel(6), within_s=0.001)
        assert await link.frames.get() == (Cancel(5), Cancel(6))
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_is_a_peer_that_reads_nothing_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "OUTBOX_MAX", 2)

    async def scenario() -> None:
        link = FakeLink(stuck=True)
        peer = peer_at(link)
        writing = asyncio.create_task(peer.write())
        for number in range(4):
            peer.post(Cancel(number))
        await writing
        assert link.closed
        assert peer.why_gone == "left 2 messages unread"
        peer.post(Bye("too late"))

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_is_a_peer_that_leaves_much_unread_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2 * (peers.MESSAGE_BYTES + 5)
    monkeypatch.setattr(peers, "OUTBOX_BYTES_MAX", most)
    part = ManifestPart(Digest("ab" * 32), 10, 0, bytes(5))

    async def scenario() -> None:
        link = FakeLink()
        reading = peer_at(link)
        writing = asyncio.create_task(reading.write())
        for _ in range(5):
            reading.post(part)
            assert await link.sent.get() == part
        assert reading.why_gone is None
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

        deaf = FakeLink(stuck=True)
        stuck = peer_at(deaf)
        for _ in range(3):
            stuck.post(part)
        await stuck.write()
        assert deaf.closed
        assert stuck.why_gone == f"left {most} bytes unread"

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_are_all_peers_together_bounded_and_the_fullest_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of each peer alone would allow a node's memory times the number of its links."""
    size = peers.MESSAGE_BYTES + 1000
    monkeypatch.setattr(peers, "BACKLOG_BYTES_MAX", 10 * size)
    part = ManifestPart(Digest("ab" * 32), 10, 0, bytes(1000))

    async def scenario() -> None:
        backlog = Backlog()
        modest, *others = (peer_at(FakeLink(stuck=True), backlog=backlog) for _ in range(4))
        modest.post(part)
        for _ in range(20):
            for other in others:
                other.post(part)
            assert backlog.bytes <= 10 * size
        assert modest.why_gone is None
        cut = [other for other in others if other.why_gone]
        assert all(other.why_gone and other.why_gone.endswith("the most of all peers") for other in cut)
        assert cut
        for peer in (modest, *others):
            await peer.close()
        assert backlog.bytes == 0
        assert repr(backlog) == "<Backlog 0 bytes for 0 peers>"

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_does_a_sender_wait_for_room() -> None:
    async def scenario() -> None:
        link = FakeLink()
        peer = peer_at(link)
        assert await peer.room()
        peer.post(ManifestPart(Digest("ab" * 32), 1 << 20, 0, bytes(peers.ROOM_BYTES)))
        waiting = asyncio.create_task(peer.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        writing = asyncio.create_task(peer.write())
        assert await waiting
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)

        stuck = peer_at(FakeLink(stuck=True))
        stuck.post(ManifestPart(Digest("ab" * 32), 1 << 20, 0, bytes(peers.ROOM_BYTES)))
        waiting = asyncio.create_task(stuck.room())
        await asyncio.sleep(0)
        await stuck.close()
        assert not await waiting, "a peer that left has no room for ever"

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_does_writing_end_with_the_link() -> None:
    async def scenario() -> None:
        link = FakeLink(broken=True)
        peer = peer_at(link)
        peer.post(Cancel(1))
        await peer.write()
        assert link.closed
        assert peer.why_gone is None

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_is_the_session_kept_and_opened_again_once_it_is_dead() -> None:
    async def scenario() -> None:
        hub = InprocHub()
        ours, theirs = InprocTransport(hub), InprocTransport(hub)
        theirs.admit(TOKEN)
        link = FakeLink()
        peer = peer_at(link, Endpoint("inproc", theirs.address), transports=(ours,))
        first, again = await asyncio.gather(peer.session(), peer.session())
        assert first is again
        await first.close()
        second = await peer.session()
        assert second is not first
        assert second.alive
        await peer.close()
        assert link.closed
        assert not second.alive
        await theirs.close()
        with pytest.raises(TransportError):
            await peer.session()
        await ours.close()

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_is_a_session_that_opens_after_the_end_closed() -> None:
    class Slow(InprocTransport):
        connecting, go_on = asyncio.Event(), asyncio.Event()
        opened: InprocSession

        async def connect(self, address: str, token: str, *, timeout_s: float) -> InprocSession:
            self.opened = await super().connect(address, token, timeout_s=timeout_s)
            self.connecting.set()
            await self.go_on.wait()
            return self.opened

    async def scenario() -> None:
        hub = InprocHub()
        ours, theirs = Slow(hub), InprocTransport(hub)
        theirs.admit(TOKEN)
        peer = peer_at(FakeLink(), Endpoint("inproc", theirs.address), transports=(ours,))
        late = asyncio.create_task(peer.session())
        await ours.connecting.wait()
        await peer.close()
        ours.go_on.set()
        with pytest.raises(TransportError, match="gone"):
            await late
        assert not ours.opened.alive
        with pytest.raises(TransportError, match="gone"):
            await peer.session()
        await theirs.close()
        await ours.close()

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_which_transport_is_chosen() -> None:
    class Other(InprocTransport):
        scheme = "other"

    async def scenario() -> None:
        hub = InprocHub()
        inproc, other, far = InprocTransport(hub), Other(hub), InprocTransport(InprocHub("elsewhere"))
        both = (Endpoint("inproc", far.address), Endpoint("other", other.address))
        assert peer_at(FakeLink(), *both, transports=(inproc, other)).scheme == "other"
        near = (Endpoint("other", other.address), Endpoint("inproc", inproc.address))
        assert peer_at(FakeLink(), *near, transports=(inproc, other)).scheme == "inproc"
        unreachable = peer_at(FakeLink(), *both, transports=(inproc,))
        assert unreachable.scheme == "none"
        with pytest.raises(TransportError, match="no transport"):
            await unreachable.session()
        assert repr(unreachable) == "<Peer them fake none | 0 artifacts>"
        for transport in (inproc, other, far):
            await transport.close()

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_does_one_line_say_which_transport_was_chosen_and_why(caplog: pytest.LogCaptureFixture) -> None:
    class Other(InprocTransport):
        scheme = "other"

    async def scenario() -> None:
        hub = InprocHub()
        ours, theirs = (Other(hub), InprocTransport(hub)), (Other(hub), InprocTransport(hub))
        for transport in theirs:
            transport.admit(TOKEN)
        offers = [Endpoint(transport.scheme, transport.address) for transport in theirs]
        peer = peer_at(FakeLink(), *offers, transports=ours)
        with caplog.at_level(logging.INFO, "swarm"):
            await (await peer.session()).close()
            await peer.session()
        assert caplog.messages == [
            "transport=other to them because both nodes are in this process; inproc also possible"
        ]
        await peer.close()
        for transport in (*ours, *theirs):
            await transport.close()

    asyncio.run(asyncio.wait_for(scenario(), 10))
