"""Links over real sockets: do messages get through, and does nothing else?"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest

from swarm import link as links
from swarm import messages
from swarm.errors import PeerTimeout, PeerUnreachable, RemoteProtocolError
from swarm.link import PATH, HttpLinks, Link
from swarm.listener import Listener
from swarm.messages import Bye, Cancel

DEADLINE_S = 20.0


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario()

    asyncio.run(within_deadline())


class End:
    """A node's links on a port of its own. `accepted` collects incoming links, which live until `close`."""

    def __init__(self, listener: Listener) -> None:
        self.address = "{}:{}".format(*listener.address)
        self.links = HttpLinks({"/page": lambda: {"answer": 42}})
        self.accepted: asyncio.Queue[Link] = asyncio.Queue()
        self._over = asyncio.Event()
        self._listener = listener

    async def accept(self, link: Link) -> None:
        self.accepted.put_nowait(link)
        await self._over.wait()

    async def close(self) -> None:
        self._over.set()
        await self._listener.close()
        await self.links.close()


@contextlib.asynccontextmanager
async def opened() -> AsyncIterator[End]:
    listener = await Listener.open("127.0.0.1", 0)
    end = End(listener)
    await end.links.open(end.accept)
    listener.serve({}, end.links.adopt)
    try:
        yield end
    finally:
        await end.close()


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[tuple[Link, Link]]:
    """Both ends of one link, dialled and accepted."""
    async with opened() as end:
        dialled = await end.links.dial(end.address, timeout_s=DEADLINE_S)
        accepted = await end.accepted.get()
        try:
            yield dialled, accepted
        finally:
            await asyncio.gather(dialled.close(), accepted.close())


@contextlib.asynccontextmanager
async def strange() -> AsyncIterator[tuple[aiohttp.ClientWebSocketResponse, Link]]:
    """A WebSocket that may send anything, and the link at its other end."""
    async with (
        opened() as end,
        aiohttp.ClientSession() as session,
        session.ws_connect(f"http://{end.address}{PATH}") as socket,
    ):
        link = await end.accepted.get()
        try:
            yield socket, link
        finally:
            await asyncio.gather(socket.close(), link.close())


def test_do_messages_get_through_both_ways_in_order() -> None:
    async def scenario() -> None:
        async with linked() as (one, other):
            for sender, receiver in ((one, other), (other, one)):
                for number in range(3):
                    await sender.send(Cancel(number))
                assert [await receiver.receive() for _ in range(3)] == [Cancel(0), Cancel(1), Cancel(2)]
            assert other.remote.startswith("127.0.0.1:")

    run(scenario)


def test_does_the_largest_message_fit() -> None:
    async def scenario() -> None:
        async with linked() as (one, other):
            part = messages.ManifestPart("ab" * 32, 1 << 20, 0, bytes(messages.MANIFEST_PART_BYTES))
            await one.send(part)
            assert await other.receive() == part

    run(scenario)


@pytest.mark.parametrize("text", ["", "hello", "{}", '{"type":"Shout"}', "[" * 10_000])
def test_is_a_frame_that_is_no_message_the_peers_fault(text: str) -> None:
    async def scenario() -> None:
        async with strange() as (socket, link):
            await socket.send_str(text)
            with pytest.raises(RemoteProtocolError, match="no message"):
                await link.receive()

    run(scenario)


def test_is_a_binary_frame_the_peers_fault() -> None:
    async def scenario() -> None:
        async with strange() as (socket, link):
            await socket.send_bytes(messages.encode(Bye("")))
            with pytest.raises(RemoteProtocolError, match="binary"):
                await link.receive()

    run(scenario)


def test_does_an_oversized_frame_end_the_link() -> None:
    async def scenario() -> None:
        async with strange() as (socket, link):
            # The other end hangs up before it has read all of it.
            with contextlib.suppress(ConnectionError, aiohttp.ClientError):
                await socket.send_str(" " * (messages.FRAME_BYTES_MAX + 1))
            with pytest.raises(RemoteProtocolError, match="exceeds limit"):
                await link.receive()

    run(scenario)


def test_are_web_pages_of_others_kept_out() -> None:
    async def scenario() -> None:
        async with opened() as end, aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(f"http://{end.address}{PATH}", origin="http://evil.example")
            assert refused.value.status == 403
            assert end.accepted.empty()

    run(scenario)


def test_does_a_closed_link_say_so_at_both_ends() -> None:
    async def scenario() -> None:
        async with linked() as (one, other):
            closing = asyncio.create_task(one.close())
            with pytest.raises(PeerUnreachable, match="closed the link"):
                await other.receive()
            await closing
            await one.close()
            for end in (one, other):
                with pytest.raises(PeerUnreachable):
                    await end.send(Bye(""))
            with pytest.raises(PeerUnreachable):
                await one.receive()

    run(scenario)


def test_is_a_peer_that_does_not_read_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "SEND_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        async with strange() as (_, link):
            part = messages.ManifestPart("ab" * 32, 1 << 20, 0, bytes(messages.MANIFEST_PART_BYTES))

            async def flood() -> None:
                while True:
                    await link.send(part)

            with pytest.raises(PeerTimeout, match="did not read"):
                await flood()
            with pytest.raises(PeerUnreachable, match="not read"):
                await link.send(part)
            await link.close()

    run(scenario)


def test_does_dialling_nobody_fail() -> None:
    async def scenario() -> None:
        async with opened() as end:
            free = await Listener.open("127.0.0.1", 0)
            await free.close()
            with pytest.raises(PeerUnreachable):
                await end.links.dial("{}:{}".format(*free.address), timeout_s=DEADLINE_S)

    run(scenario)


def test_does_dialling_somebody_silent_end() -> None:
    async def scenario() -> None:
        async with opened() as end:
            silent = await Listener.open("127.0.0.1", 0)
            try:
                with pytest.raises(PeerTimeout, match="no answer"):
                    await end.links.dial("{}:{}".format(*silent.address), timeout_s=0.1)
            finally:
                await silent.close()

    run(scenario)


@pytest.mark.parametrize("address", ["", "no address", "[::1", "127.0.0.1:99999"])
def test_does_dialling_nonsense_fail(address: str) -> None:
    async def scenario() -> None:
        async with opened() as end:
            with pytest.raises(PeerUnreachable):
                await end.links.dial(address, timeout_s=DEADLINE_S)

    run(scenario)


def test_can_nobody_be_dialled_before_it_is_open() -> None:
    async def scenario() -> None:
        links = HttpLinks()
        with pytest.raises(PeerUnreachable, match="not open"):
            await links.dial("127.0.0.1:1", timeout_s=DEADLINE_S)
        await links.close()

    run(scenario)


def test_are_pages_shown_as_json_that_no_browser_runs() -> None:
    async def scenario() -> None:
        async with opened() as end, aiohttp.ClientSession() as session:
            async with session.get(f"http://{end.address}/page") as answer:
                assert await answer.json() == {"answer": 42}
                assert answer.headers["Content-Security-Policy"] == "default-src 'none'"
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
            for method, path, status in (("GET", "/other", 404), ("POST", "/page", 405), ("GET", PATH, 400)):
                async with session.request(method, f"http://{end.address}{path}") as answer:
                    assert answer.status == status

    run(scenario)
