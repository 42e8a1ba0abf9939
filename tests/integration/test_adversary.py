"""Attacks on a running node that has a cluster key, over real sockets: by strangers, by who listens, by members.

After each, a good newcomer is served, no handle stays open, and memory is back to what it was, give or take what
allocators keep. What lies in manifests, chunks and output directories does is in test_bad_peers and test_bad_disks;
here are those that a key changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from swarm.content.manifest import Digest
from swarm.errors import NotAdmitted, SwarmError
from swarm.net.websocket import PATH
from swarm.protocol import messages, packets
from swarm.protocol.messages import Address, Hello, NodeId
from swarm.protocol.packets import Profile, Record, State
from swarm.security import cluster_key
from swarm.security.certificates import Refusal
from swarm.security.cluster_key import Keyring
from swarm.transport.tcp import MAGIC, TLS_MAGIC, VERSION

from .hostile import Hostile, hello, read_on
from .processes import DEADLINE_S, Machine, Process, contents, wait_until

pytestmark = pytest.mark.integration

HANDLES_SLACK = 8  # connections of the newcomer that are about to be closed
MEMORY_SLACK_BYTES = 64 << 20  # what allocators keep of a flood, once; 10,000 handshakes would be 4 GB
CONNECTIONS = 10_000
MEMBERS = 1000


class Target(Hostile):
    """A seed with a key that members on this machine can reach, and how it was before an attack."""

    def __init__(self, machine: Machine, model: Path, key: Path, out: Path) -> None:
        self._machine, self._model, self._out = machine, model, out
        self._environment = {"SWARM_KEY_FILE": str(key), "SWARM_NETWORK": "local"}
        self.seed: Process = machine.serve(model, environment=self._environment)
        super().__init__(self.seed.address, cluster_key.load(key))
        self._serve_newcomer("before")
        self._handles = self.seed.handles
        self._memory_bytes = self.seed.memory_bytes

    def check(self) -> None:
        """Fails unless the node is as well as before."""
        assert self.seed.running
        assert "Traceback" not in self.seed.err
        self._serve_newcomer("after")
        wait_until(lambda: self.seed.handles <= self._handles + HANDLES_SLACK, "handles to be closed")
        wait_until(lambda: self.seed.memory_bytes < self._memory_bytes + MEMORY_SLACK_BYTES, "memory to come back")

    def _serve_newcomer(self, name: str) -> None:
        fetch = self._machine.fetch(self._out / name, peers=[self.seed.address], environment=self._environment)
        assert fetch.end().report["digest"] == self.seed.digest
        assert contents(self._out / name) == contents(self._model)


@pytest.fixture
def target(machine: Machine, model: Path, out: Path, tmp_path: Path) -> Iterator[Target]:
    cluster_key.create(tmp_path / "key")
    target = Target(machine, model, tmp_path / "key", out)
    yield target
    target.check()


def run(attack: Callable[[], Awaitable[None]]) -> None:
    async def within_deadline() -> None:
        async with asyncio.timeout(2 * DEADLINE_S):
            await attack()

    asyncio.run(within_deadline())


async def answer(target: Target, said: bytes) -> bytes:
    """All that the node has to say to these first bytes."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        writer.write(said)
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


# Strangers


def test_no_key(target: Target) -> None:
    """Plain HTTP, a plain session, and TLS without a certificate."""

    async def attack() -> None:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{target.seed.address}{PATH}") as refused:
                assert refused.status == 426
            with pytest.raises(aiohttp.ClientError):
                await session.ws_connect(f"https://{target.seed.address}{PATH}", ssl=False)
        assert b"400" in (await answer(target, MAGIC + bytes([VERSION]) + bytes(24))).partition(b"\r\n")[0]
        assert not (await answer(target, TLS_MAGIC + bytes(100))).startswith(b"\0")

    run(attack)
    target.seed.wait_for(Refusal.PLAINTEXT.value)
    target.seed.wait_for(Refusal.NO_KEY.value)


def test_wrong_key(target: Target) -> None:
    async def attack() -> None:
        mallory = target.identity(keyring=Keyring((cluster_key.generate(),)))
        mallory.client.verify_mode = ssl.CERT_NONE  # she does not care who answers
        with pytest.raises(NotAdmitted, match="does not accept this node's key"):
            async with target.linked(mallory):
                pass

    run(attack)
    target.seed.wait_for(Refusal.OTHER_KEY.value)


@pytest.mark.parametrize(
    "said",
    [
        b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc" + bytes(100),  # a ClientHello of 16 KiB that does not come
        b"\x16\x03\x01\xff\xff" + bytes(1000),  # a record longer than records are
        TLS_MAGIC + b"\x16\x03\x01\x40\x00\x01\xff\xff\xff",
        MAGIC + b"\xff" * 100,
        b"GET " + b"/" * 100_000,
        b"GET / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /status HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        b"GET /" + b"../" * 100 + b"etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"\0" * 100_000,
    ],
    ids=["tls cut", "tls length", "session tls cut", "session", "long line", "length", "chunk length", "path", "zeros"],
)
def test_truncated_tls_giant_lengths_and_paths(target: Target, said: bytes) -> None:
    async def attack() -> None:
        answers = await asyncio.gather(*(answer(target, said) for _ in range(20)))
        assert not any(b"root:" in each or b" 200 " in each for each in answers)

    run(attack)


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x02\x00", b"GET /swarm"], ids=["silent", "tls", "http"])
def test_10000_half_open_connections(target: Target, said: bytes) -> None:
    """All are held open until the node has dropped them, and a newcomer is served meanwhile."""

    async def attack() -> None:
        loop = asyncio.get_running_loop()
        held: list[socket.socket] = []
        try:
            for _ in range(CONNECTIONS):
                sock = socket.socket()
                held.append(sock)
                sock.setblocking(False)
                with contextlib.suppress(ConnectionError):  # dropped before it could speak: also an answer
                    await loop.sock_connect(sock, (target.host, target.port))
                    await loop.sock_sendall(sock, said)
            await asyncio.to_thread(target.check)
        finally:
            for sock in held:
                sock.close()

    run(attack)


# Who listens


def test_replayed_datagrams(target: Target) -> None:
    """What a member says of a third one is taken once: played again, it does not bring that one back to life."""
    ghost = secrets.token_hex(8)
    record = Record(NodeId(ghost), 0, State.ALIVE, 0, "ghost", (Address("127.0.0.1:9"),), Profile())
    gone = packets.Status(NodeId(ghost), 1, State.LEFT, 0)
    said = [target.seal(packets.Gossip(NodeId(ghost), (each,))) for each in (record, gone)]
    unsaid = target.seal(packets.Gossip(NodeId(ghost), (record,)))
    forged = unsaid[:-1] + bytes([unsaid[-1] ^ 1])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for datagram in said * 1000:
            sock.sendto(datagram, (target.host, target.port))

        def heard() -> bool:
            sock.sendto(forged, (target.host, target.port))  # again: the flood may have pushed it out
            return "was altered or forged" in target.seed.err

        wait_until(heard, "a forged datagram to be noticed")


def test_datagrams_of_strangers(target: Target) -> None:
    said = packets.Gossip(NodeId(secrets.token_hex(8)), ())
    plain = packets.encode(said)
    other = Hostile(target.target, Keyring((cluster_key.generate(),))).seal(said)
    old = target.seal(said, at_s=time.time() - 3600)
    dice = random.Random(1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(10_000):
            sock.sendto(dice.randbytes(dice.randrange(1500)), (target.host, target.port))
        for datagram, words in (
            (plain, "not sealed"),
            (other, "another cluster key"),
            (old, "clocks of both machines"),
        ):

            def heard(datagram: bytes = datagram, words: str = words) -> bool:
                sock.sendto(datagram, (target.host, target.port))  # again: the flood may have pushed it out
                return words in target.seed.err

            wait_until(heard, f"{words!r} to be said")


# Members who have gone bad


def test_stolen_id(target: Target) -> None:
    """A member greets under the id of another one, whose link stays."""

    async def attack() -> None:
        good, bad = target.identity(), target.identity()
        async with target.linked(good) as victim:
            await victim.send(hello(good.node, name="victim"))
            assert isinstance(await victim.receive(), Hello)
            async with target.linked(bad) as thief:
                await thief.send(hello(good.node, name="thief"))
                with pytest.raises(SwarmError):
                    await read_on(thief)
            digest = target.seed.digest
            await victim.send(messages.ManifestRequest(Digest(digest)))
            async with asyncio.timeout(DEADLINE_S):
                while not isinstance(await victim.receive(), messages.ManifestPart):
                    pass

    run(attack)
    target.seed.wait_for("but its certificate is that of")


def test_sybil_flood_of_1000_claimed_members(target: Target) -> None:
    """One member claims a thousand others. They are probed, not believed for ever, and newcomers find the real one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for number in range(0, MEMBERS, 5):
            claimed = tuple(
                Record(
                    NodeId(secrets.token_hex(8)),
                    0,
                    State.ALIVE,
                    0,
                    f"sybil-{n}",
                    (Address(f"127.0.0.1:{20000 + n}"),),
                    Profile(),
                )
                for n in range(number, number + 5)
            )
            sock.sendto(target.seal(packets.Gossip(claimed[0].node, claimed)), (target.host, target.port))


@pytest.mark.parametrize("what", ["requests", "manifests", "nonsense", "half a frame"])
def test_member_that_floods(target: Target, what: str) -> None:
    async def attack() -> None:
        mallory = target.identity()
        async with target.linked(mallory) as link:
            await link.send(hello(mallory.node))
            assert isinstance(await link.receive(), Hello)
            digest = target.seed.digest
            with contextlib.suppress(SwarmError):
                for number in range(20_000):
                    match what:
                        case "requests":
                            await link.send(messages.Request("tls", Digest(digest), number, (0,), 0, False, 1, 0, 1))
                        case "manifests":
                            await link.send(messages.ManifestRequest(Digest(digest)))
                        case "nonsense":
                            await link.send(messages.Have(Digest(digest), ((1 << 19, 1 << 19),)))
                        case _:
                            await link.send(messages.Bye(json.dumps("x" * 200)))

    run(attack)


def test_member_that_floods_is_muted_and_named(target: Target) -> None:
    """Words that are no error in themselves, without end: the link ends, and the member does not get another one."""

    async def attack() -> None:
        mallory = target.identity()
        async with target.linked(mallory) as link:
            await link.send(hello(mallory.node))
            assert isinstance(await link.receive(), Hello)
            with contextlib.suppress(SwarmError):
                for _ in range(300):
                    await link.send(*[messages.Members(((Address("127.0.0.1:9"),),))] * 256)
            with pytest.raises(SwarmError):
                await read_on(link)
        async with target.linked(mallory) as again:
            await again.send(hello(mallory.node))
            assert isinstance(await again.receive(), Hello)
            with pytest.raises(SwarmError):
                await read_on(again)

    run(attack)
    target.seed.wait_for("mallory: floods this node with messages: it is muted for 30 s")


def test_member_that_floods_with_datagrams_is_muted_and_named(target: Target) -> None:
    packet = packets.Gossip(NodeId(secrets.token_hex(8)), ())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        own = "{}:{}".format(*sock.getsockname())

        def named() -> bool:
            for _ in range(1000):
                sock.sendto(target.seal(packet), (target.host, target.port))
            return f"{own} floods this node with datagrams: it is muted for 30 s" in target.seed.err

        wait_until(named, "a flood to be named")
