"""Links over real sockets: do messages get through, and does nothing else?"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest

from swarm.content.manifest import Digest
from swarm.errors import NotAdmitted, PeerTimeout, PeerUnreachable, RemoteProtocolError
from swarm.net import http_pages, http_server, link
from swarm.net import websocket as links
from swarm.net.link import Link
from swarm.net.listener import Listener
from swarm.net.websocket import PATH, HttpLinks
from swarm.protocol import messages
from swarm.protocol.messages import Bye, Cancel
from swarm.security.certificates import LEAF_LIFE_S, Identity, Refusal
from swarm.security.cluster_key import ClusterKey, Keyring

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
        self.problems: list[str] = []
        health = http_pages.HealthPage(lambda: self.problems)
        asset = http_pages.Asset("text/html", lambda: b"")
        self.links = HttpLinks({"/page": lambda: {"answer": 42}, "/asset": asset, "/healthz": health})
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
async def opened(identity: Identity | None = None) -> AsyncIterator[End]:
    listener = await Listener.open("127.0.0.1", 0)
    end = End(listener)
    await end.links.open(end.accept, identity=identity)
    listener.serve({b"\x16\x03": end.links.adopt_tls}, end.links.adopt)
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


def test_do_messages_sent_together_keep_their_order() -> None:
    async def scenario() -> None:
        async with linked() as (one, other):
            several = [Cancel(number) for number in range(messages.FRAME_MESSAGES_MAX + 10)]
            await one.send(*several[:-1])
            await one.send(several[-1])
            assert [await other.receive() for _ in several] == several

    run(scenario)


def test_do_messages_sent_together_share_a_frame() -> None:
    async def scenario() -> None:
        async with strange() as (socket, link):
            await link.send(Cancel(1), Cancel(2))
            assert messages.unpack((await socket.receive_str()).encode()) == [Cancel(1), Cancel(2)]
            await socket.send_str('{"type":"Cancel","transfer":1}\n{"type":"Shout"}')
            with pytest.raises(RemoteProtocolError, match="Shout"):  # nothing of a frame is believed that is broken
                await link.receive()

    run(scenario)


def test_does_the_largest_message_fit() -> None:
    async def scenario() -> None:
        async with linked() as (one, other):
            part = messages.ManifestPart(Digest("ab" * 32), 1 << 20, 0, bytes(messages.MANIFEST_PART_BYTES))
            await one.send(part)
            assert await other.receive() == part

    run(scenario)


@pytest.mark.parametrize("text", ["", "hello", "{}", '{"type":"Shout"}', "[" * 10_000])
def test_is_a_frame_that_is_no_message_the_peers_fault(text: str) -> None:
    async def scenario() -> None:
        async with strange() as (socket, link):
            await socket.send_str(text)
            with pytest.raises(RemoteProtocolError, match="invalid message"):
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
    monkeypatch.setattr(link, "SEND_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        async with strange() as (_, link):
            part = messages.ManifestPart(Digest("ab" * 32), 1 << 20, 0, bytes(messages.MANIFEST_PART_BYTES))

            async def flood() -> None:
                while True:
                    await link.send(part)

            with pytest.raises(PeerTimeout, match="did not read"):
                await flood()
            with pytest.raises(PeerUnreachable, match="not read"):
                await link.send(part)
            await link.close()

    run(scenario)


def test_does_dialling_an_empty_port_fail() -> None:
    async def scenario() -> None:
        async with opened() as end:
            free = await Listener.open("127.0.0.1", 0)
            await free.close()
            with pytest.raises(PeerUnreachable):
                await end.links.dial("{}:{}".format(*free.address), timeout_s=DEADLINE_S)

    run(scenario)


def test_does_dialling_a_silent_peer_end() -> None:
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


def test_can_no_peer_be_dialled_before_it_is_open() -> None:
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


def test_a_health_page_tells_by_its_status() -> None:
    async def scenario() -> None:
        async with opened() as end, aiohttp.ClientSession() as session:
            for problems, status in (([], 200), (["a file changed"], 503), ([], 200)):
                end.problems = problems
                async with session.get(f"http://{end.address}/healthz") as answer:
                    assert (answer.status, await answer.json()) == (status, {"problems": problems})

    run(scenario)


# With a cluster key

ONE, TWO = (ClusterKey(bytes([n]) * 32) for n in (1, 2))
ANN, BEN = "a" * 16, "b" * 16


def member(*keys: ClusterKey, node: str = ANN, late_s: float = 0.0) -> Identity:
    return Identity(Keyring(keys), node, now_s=time.time() - late_s)


def test_have_both_ends_of_a_link_proven_who_they_are() -> None:
    async def scenario() -> None:
        async with opened(member(ONE)) as holder, opened(member(ONE, node=BEN)) as asker:
            dialled = await asker.links.dial(holder.address, timeout_s=DEADLINE_S)
            accepted = await holder.accepted.get()
            assert (dialled.member, accepted.member) == (ANN, BEN)
            await dialled.send(Cancel(1))
            assert await accepted.receive() == Cancel(1)
            await asyncio.gather(dialled.close(), accepted.close())

    run(scenario)


def test_is_nothing_proven_without_a_key() -> None:
    async def scenario() -> None:
        async with linked() as (one, other):
            assert one.member is other.member is None

    run(scenario)


LATE_S = 2 * LEAF_LIFE_S


@pytest.mark.parametrize(
    ("holder", "asker", "told", "logged"),
    [
        (member(ONE), member(TWO), Refusal.OTHER_KEY, Refusal.REFUSES_KEY),
        (member(ONE), member(TWO, ONE), Refusal.REFUSES_KEY, Refusal.OTHER_KEY),
        (member(TWO, ONE), member(ONE), Refusal.OTHER_KEY, Refusal.REFUSES_KEY),
        (member(ONE), None, Refusal.WANTS_KEY, Refusal.PLAINTEXT),
        (None, member(ONE), Refusal.PLAINTEXT, Refusal.HAS_KEY),
        (member(ONE), member(ONE, late_s=LATE_S), Refusal.REFUSES_CLOCK, Refusal.CLOCK),
        (member(ONE, late_s=LATE_S), member(ONE), Refusal.CLOCK, Refusal.REFUSES_CLOCK),
        (member(ONE), member(ONE, node="nobody"), None, Refusal.NOT_A_NODE),
        (member(ONE, node="nobody"), member(ONE), Refusal.NOT_A_NODE, None),
    ],
)
def test_do_both_sides_say_why_a_link_was_refused(
    holder: Identity | None,
    asker: Identity | None,
    told: Refusal | None,
    logged: Refusal | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        async with opened(holder) as target, opened(asker) as end:
            with pytest.raises(PeerUnreachable if told is None else NotAdmitted) as caught:
                await end.links.dial(target.address, timeout_s=DEADLINE_S)
            if told:
                assert f"{target.address}: {told.value}" in str(caught.value)
            while logged and not caplog.messages:  # noqa: ASYNC110 - every scenario has a deadline
                await asyncio.sleep(0.01)
            assert target.accepted.empty() or not logged

    run(scenario)
    if logged:
        (line,) = caplog.messages  # once, however often a client tries again
        assert line.startswith(f"127.0.0.1 {logged.value}")
        assert holder is None or line.endswith(f"(this node's key: {holder.keyring})")


@pytest.mark.parametrize(
    ("keyed", "name", "status"),
    [
        (True, "127.0.0.1", 200),
        (False, "127.0.0.1", 200),
        (False, "localhost", 200),
        (False, "evil.example", 403),
        (True, "evil.example", 403),
        (False, "10.0.0.1", 200),
    ],
)
def test_is_a_page_for_this_machine_and_not_for_web_pages(keyed: bool, name: str, status: int) -> None:
    async def scenario() -> None:
        async with (
            opened(member(ONE) if keyed else None) as end,
            aiohttp.ClientSession() as session,
            session.get(f"http://{end.address}/page", headers={"Host": name}) as answer,
        ):
            assert answer.status == status
            assert ("answer" in await answer.text()) == (status == 200)

    run(scenario)


OPENED = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize(
    ("headers", "page", "asset"),
    [
        ({"Sec-Fetch-Site": "none"}, 200, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, 403, 403),
        ({"Sec-Fetch-Site": "cross-site", **OPENED}, 403, 200),
        ({"Origin": "http://evil.example"}, 403, 403),
        ({"Origin": "null"}, 403, 403),
    ],
)
def test_are_pages_kept_from_web_pages_of_others(headers: dict[str, str], page: int, asset: int) -> None:
    """They could not read an answer, but hold all streams, and have the node ask others."""

    async def scenario() -> None:
        async with opened() as end, aiohttp.ClientSession() as session:
            for path, status in (("/page", page), ("/asset", asset)):
                async with session.get(f"http://{end.address}{path}", headers=headers) as answer:
                    assert answer.status == status

    run(scenario)


def test_is_a_page_for_members(monkeypatch: pytest.MonkeyPatch) -> None:
    """From elsewhere: nothing is local in this test."""
    monkeypatch.setattr(http_pages, "_is_local", lambda request: False)

    async def scenario() -> None:
        ann = member(ONE)
        async with opened(ann) as end, aiohttp.ClientSession() as session:
            async with session.get(f"http://{end.address}/page") as answer:
                assert answer.status == 403
            async with session.get(f"https://{end.address}/page", ssl=ann.client) as answer:
                assert await answer.json() == {"answer": 42}

    run(scenario)


@pytest.mark.parametrize("says", [b"GET ", b"GET /swarm/link HTTP/1.1\r\nHost: x\r\nX: ", b"\x16\x03\x01\x02\x00"])
@pytest.mark.parametrize("keyed", [True, False])
def test_is_one_that_never_finishes_its_request_cut_off(
    says: bytes, keyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "REQUEST_TIMEOUT_S", 0.1)
    monkeypatch.setattr(links, "HANDSHAKE_TIMEOUT_S", 0.1)

    async def scenario() -> None:
        async with opened(member(ONE) if keyed else None) as end:
            reader, writer = await asyncio.open_connection(*end.address.split(":"))
            writer.write(says)
            with contextlib.suppress(ConnectionError):
                await reader.read()  # ends
            writer.close()

    run(scenario)


async def said_by(
    address: str, request: bytes, *, limit: int = 1024
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=limit)
    writer.write(request)
    return reader, writer


GET = b"GET /page HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def test_do_connections_that_are_no_links_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept-alive connections of pages cost memory too; links are not closed for them."""
    monkeypatch.setattr(http_server, "VISITORS_MAX", 4)

    async def scenario() -> None:
        async with opened() as end:
            dialled = await end.links.dial(end.address, timeout_s=DEADLINE_S)
            accepted = await end.accepted.get()
            visits = []
            for _ in range(12):
                reader, writer = await said_by(end.address, GET)
                assert b"200" in await reader.readline()
                visits.append((reader, writer))
            for reader, _ in visits[:8]:
                await reader.read()  # its end
            await dialled.send(Cancel(1))
            assert await accepted.receive() == Cancel(1)
            for _, writer in visits:
                writer.close()
            await dialled.close()

    run(scenario)


def test_do_pages_that_are_not_read_bound_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_pages, "ANSWERS_MAX", 2)
    monkeypatch.setattr(http_pages, "WRITE_TIMEOUT_S", 2.0)
    making, most = 0, 0

    async def large() -> str:
        nonlocal making, most
        making += 1
        most = max(most, making)
        await asyncio.sleep(0)
        making -= 1
        return "x" * (16 << 20)  # more than the buffers of both sockets

    async def scenario() -> None:
        listener = await Listener.open("127.0.0.1", 0)
        end = HttpLinks({"/page": large})
        await end.open(lambda link: link.close())
        listener.serve({}, end.adopt)
        address = "{}:{}".format(*listener.address)
        visits = [await said_by(address, GET) for _ in range(3)]
        for reader, _ in visits:
            reader._transport.pause_reading()  # type: ignore[attr-defined]
        whole, writer = await said_by(address, GET, limit=1 << 20)
        size = 0
        while part := await whole.read(1 << 20):
            size += len(part)
            if size > 16 << 20:
                break
        assert size > 16 << 20, "who reads gets the page, once those that do not are cut off"
        for _, other in visits:
            other.transport.abort()
        writer.close()
        await listener.close()
        await end.close()

    run(scenario)
    assert most <= 2


@pytest.mark.parametrize(
    "headers", [b"X: " + b"x" * 5000 + b"\r\n\r\n", b"X: x\r\n" * 60 + b"\r\n"], ids=["long", "many"]
)
def test_is_a_request_with_endless_headers_refused(headers: bytes) -> None:
    async def scenario() -> None:
        async with opened() as end:
            reader, writer = await said_by(end.address, b"GET /page HTTP/1.1\r\nHost: 127.0.0.1\r\n" + headers)
            assert b"400" in await reader.readline()
            writer.close()

    run(scenario)


def test_is_what_a_closed_link_has_not_read_dropped() -> None:
    """A transport that waits for a peer to read would keep the link's messages for as long as the peer likes."""

    async def scenario() -> None:
        async with opened() as end:
            reader, writer = await said_by(
                end.address,
                f"GET {PATH} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode(),
            )
            link = await end.accepted.get()
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    while True:
                        await link.send(*(messages.Holdings(Digest("ab" * 32), bytes(1 << 16)) for _ in range(8)))
            transport = link._socket.get_extra_info("socket")  # type: ignore[attr-defined]
            assert transport.fileno() >= 0
            await link.close()
            async with asyncio.timeout(DEADLINE_S):
                while transport.fileno() >= 0:  # noqa: ASYNC110 - the transport has no event for its end
                    await asyncio.sleep(0)
            writer.transport.abort()

    run(scenario)


def test_does_closing_a_link_never_raise_whose_connection_is_lost() -> None:
    """Inside TLS too, whose transport loses its protocol with its connection."""

    async def scenario() -> None:
        keyring = Keyring((ClusterKey(b"k" * 32),))
        one, other = (Identity(keyring, digit * 16, now_s=time.time()) for digit in "ab")
        async with opened(one) as end, opened(other) as dialler:
            dialled = await dialler.links.dial(end.address, timeout_s=DEADLINE_S)
            accepted = await end.accepted.get()
            dialled._socket.get_extra_info("socket").shutdown(2)  # type: ignore[attr-defined]
            for link in (dialled, accepted):
                with pytest.raises(PeerUnreachable):
                    await link.receive()
            for _ in range(2):
                await asyncio.gather(dialled.close(), accepted.close())

    run(scenario)


def test_do_refused_handshakes_leave_no_garbage() -> None:
    """Each had 256 KB of buffers in a circle with its error: a flood took hundreds of MB until a full collection."""
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE

    def knock(host: str, port: int) -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection((host, port)) as plain,
            stranger.wrap_socket(plain) as sock,
        ):
            while sock.recv(1000):
                pass

    async def refuse(end: End, count: int) -> None:
        host, _, port = end.address.rpartition(":")
        for _ in range(count):
            await asyncio.to_thread(knock, host, int(port))

    async def scenario() -> None:
        async with opened(Identity(Keyring((ONE,)), "a" * 16, now_s=time.time())) as end:
            await refuse(end, 3)  # fills caches
            gc.collect()
            gc.disable()
            tracemalloc.start()
            try:
                await refuse(end, 40)
                own, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
                gc.enable()
            assert own < 4 << 20

    run(scenario)
