"""Floods by strangers and members: the memory of a node before, under and after each of them.

    python bench/floods.py [--no-key] [--limit MB] [--only NAME,NAME] [--scale 1.0] [--out FILE]

The node is a process of its own that serves a model; after each flood a newcomer fetches it, which shows that the node
still works. `under` is the peak of its resident memory, `after` the least within SETTLE_S of the end of the flood.
`--limit` puts the node into a memory cgroup of that size, where it is killed if it takes more (root, cgroup v1 or v2).
Floods of members need the key; without a key everybody is a member.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import secrets
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swarm.content.manifest import CHUNKS_MAX, ChunkEntry, Digest, FileEntry, HashScheme, Manifest, ModelId
from swarm.errors import SwarmError
from swarm.net.host_environment import TLS_RECORD
from swarm.net.link import Link
from swarm.net.listener import Listener
from swarm.net.websocket import HttpLinks
from swarm.protocol import messages, packets
from swarm.protocol.messages import Address, Announcement, NodeId
from swarm.protocol.packets import Holding, Profile, Record, State
from swarm.security import cluster_key
from swarm.security.certificates import Identity
from swarm.security.cluster_key import Keyring

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from integration.hostile import Hostile, hello, read_on

MODEL = "org/model"
MODEL_BYTES, CHUNK_BYTES = 1 << 20, 256  # 4,096 chunks: a manifest of 400 KB, and bitfields of 512 bytes
SETTLE_S = 20.0
READY_TIMEOUT_S = 60.0
LOOK_EVERY_S = 0.05
LINKS = 64
NAMES = "\N{GRINNING FACE}"  # four bytes a character


@dataclass
class Row:
    """A line of the table; megabytes of resident memory."""

    flood: str
    by: str
    sent: str
    before_mb: float
    under_mb: float
    after_mb: float
    served_s: float | None  # a newcomer, after the flood; None: not


class Node:
    """A process under attack."""

    def __init__(self, root: Path, command: list[str], *, limit_mb: int | None, environment: dict[str, str]) -> None:
        self._limit = _cgroup(limit_mb) if limit_mb else None
        self._log = (root / "node.log").open("ab")
        wrapped = [sys.executable, "-c", _JOIN, str(self._limit or ""), *command]
        self.process = subprocess.Popen(
            wrapped, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.peak_mb = 0.0
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def line(self) -> str:
        """Its next line of output."""
        assert self.process.stdout
        return self.process.stdout.readline()

    @property
    def memory_mb(self) -> float:
        """Resident memory that no file backs."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+)", status)[0]) / 1024

    def close(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        self._log.close()
        if self._limit:
            with contextlib.suppress(OSError):
                self._limit.rmdir()

    def _watch(self) -> None:
        while self.process.poll() is None:
            with contextlib.suppress(OSError, IndexError):
                self.peak_mb = max(self.peak_mb, self.memory_mb)
            time.sleep(LOOK_EVERY_S)


# Joins the cgroup, if there is one, and becomes the command.
_JOIN = """
import os, sys
if sys.argv[1]:
    open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
os.execvp(sys.argv[2], sys.argv[2:])
"""


def _cgroup(limit_mb: int) -> Path:
    """A memory cgroup of this size."""
    v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    path = Path("/sys/fs/cgroup" if v2 else "/sys/fs/cgroup/memory") / f"swarm-floods-{os.getpid()}"
    path.mkdir(exist_ok=True)
    (path / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(limit_mb << 20))
    return path


class Attack(Hostile):
    """A bad node that floods its target."""

    def __init__(self, address: str, digest: str, keyring: Keyring | None, scale: float) -> None:
        super().__init__(address, keyring)
        self.digest, self.scale = Digest(digest), scale
        self.rng = random.Random(1)

    def count(self, number: int) -> int:
        return max(1, round(number * self.scale))

    async def members(self, work: Callable[[Link, int], Awaitable[None]], *, count: int = LINKS) -> None:
        """`work` over so many links at once; the node may end each of them."""

        async def one(number: int) -> None:
            with contextlib.suppress(SwarmError, OSError, TimeoutError):
                async with self.greeted(name=f"mallory-{number}") as link:
                    await work(link, number)

        await asyncio.gather(*(one(number) for number in range(count)))


async def _drain(link: Link) -> None:
    with contextlib.suppress(SwarmError):
        await read_on(link)


# Strangers


async def refused(attack: Attack) -> str:
    """Connections that do not prove membership, one after the other, 50 at once."""
    count, limit = attack.count(5000), asyncio.Semaphore(50)
    stranger = attack.identity(keyring=Keyring((cluster_key.generate(),)))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if attack.keyring:
        context = stranger.client
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    async def one(number: int) -> None:
        async with limit:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                async with asyncio.timeout(10.0):
                    tls = context if number % 2 and attack.keyring else None
                    reader, writer = await asyncio.open_connection(attack.host, attack.port, ssl=tls)
                    try:
                        writer.write(_upgrade(attack) + _frame(b'{"type":"Hello","protocol":1,"software":"old"}'))
                        await reader.read()
                    finally:
                        writer.close()

    await asyncio.gather(*map(one, range(count)))
    return f"{count:,} greetings"


async def half_open(attack: Attack) -> str:
    """Connections that say nothing, or half a request or handshake, held open."""
    held: list[socket.socket] = []
    loop, said = asyncio.get_running_loop(), (b"", b"\x16\x03\x01\x02\x00", b"GET /swarm", b"SWRT\x16\x03\x01\x02\x00")
    count = attack.count(10_000)
    try:
        for number in range(count):
            sock = socket.socket()
            held.append(sock)
            sock.setblocking(False)
            with contextlib.suppress(ConnectionError):
                await loop.sock_connect(sock, (attack.host, attack.port))
                await loop.sock_sendall(sock, said[number % len(said)])
        await asyncio.sleep(2.0)
    finally:
        for sock in held:
            sock.close()
    return f"{count:,} connections"


async def headers(attack: Attack) -> str:
    """Requests whose headers do not end, as fast as they are taken."""
    line = b"X-Header: " + b"x" * 4000 + b"\r\n"
    sent = 0

    async def one() -> None:
        nonlocal sent
        reader, writer = await asyncio.open_connection(attack.host, attack.port)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(8.0):
                writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n")
                while not reader.at_eof():
                    writer.write(line * 16)
                    await writer.drain()
                    sent += len(line) * 16
        writer.close()

    await asyncio.gather(*(one() for _ in range(attack.count(200))))
    return f"{sent >> 20:,} MB of headers"


async def mute(attack: Attack) -> str:
    """WebSockets that never greet: of members with a key, of strangers without."""
    count, writers = attack.count(2000), []
    identity = attack.membership()
    for _ in range(count):
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(10.0):
                tls = identity.client if identity else None
                _, writer = await asyncio.open_connection(
                    attack.host, attack.port, ssl=tls, server_hostname="" if tls else None
                )
                writer.write(_upgrade(attack))
                writers.append(writer)
    await asyncio.sleep(2.0)
    for writer in writers:
        writer.close()
    return f"{count:,} WebSockets"


def _upgrade(attack: Attack) -> bytes:
    return (
        f"GET /swarm/link HTTP/1.1\r\nHost: {attack.target}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        "Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
    ).encode()


def _frame(payload: bytes) -> bytes:
    return b"\x81" + bytes([128 | len(payload)]) + bytes(4) + payload


async def mdns(attack: Attack) -> str:
    """Multicast answers with ever new services, each with a large text."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
    sent, end = 0, time.monotonic() + 20 * attack.scale
    while time.monotonic() < end:
        for _ in range(20):
            packet = _answers(f"{attack.rng.getrandbits(64):016x}", text=attack.rng.choice((0, 200, 7000)))
            with contextlib.suppress(OSError):
                sock.sendto(packet, ("224.0.0.251", 5353))
                sent += 1
        await asyncio.sleep(0.005)
    sock.close()
    return f"{sent:,} answers"


def _answers(name: str, *, text: int) -> bytes:
    """A DNS response with PTR, SRV, TXT and A of a service."""
    service = _dns("_swarm-weights._tcp.local")
    full, host = _dns(f"{name}._swarm-weights._tcp.local"), _dns(f"{name}.local")

    def record(owner: bytes, kind: int, data: bytes) -> bytes:
        return owner + struct.pack(">HHIH", kind, 1, 4500, len(data)) + data

    strings = b"".join(bytes([250]) + secrets.token_bytes(250) for _ in range(text // 251)) or b"\x03v=3"
    records = [
        record(service, 12, full),
        record(full, 33, struct.pack(">HHH", 0, 0, 7000) + host),
        record(full, 16, strings),
        record(host, 1, socket.inet_aton("127.0.0.1")),
    ]
    return struct.pack(">HHHHHH", 0, 0x8400, 0, len(records), 0, 0) + b"".join(records)


def _dns(name: str) -> bytes:
    return b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"


# Members


async def interests(attack: Attack) -> str:
    """Interest in digests that no node has, below the limit of messages."""
    sent, end = 0, time.monotonic() + 20 * attack.scale

    async def work(link: Link, _: int) -> None:
        nonlocal sent
        reading = asyncio.create_task(_drain(link))
        while time.monotonic() < end:
            await link.send(*(messages.Interest(Digest(secrets.token_hex(32)), b"", b"") for _ in range(150)))
            sent += 150
            await asyncio.sleep(0.1)
        reading.cancel()

    await attack.members(work, count=16)
    return f"{sent:,} messages"


async def unread(attack: Attack) -> str:
    """Links that ask for manifests and holdings, and never read the answers."""
    asked = 0

    async def work(link: Link, _: int) -> None:
        nonlocal asked
        bits = bytes(MODEL_BYTES // CHUNK_BYTES // 8)
        for _ in range(attack.count(100)):
            both = messages.ManifestRequest(attack.digest), messages.Interest(attack.digest, bits, b"")
            await link.send(*both * 8)
            asked += 16
            await asyncio.sleep(0.02)
        await asyncio.sleep(5.0 * attack.scale)

    await attack.members(work)
    return f"{asked:,} requests over {LINKS} links"


async def pages(attack: Attack) -> str:
    """Connections that ask for every page and never read."""
    identity, writers = attack.membership(), []
    paths = ("/status", "/view", "/metrics", "/member", "/web/main.js", "/events")
    for number in range(attack.count(500)):
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(10.0):
                tls = identity.client if identity else None
                _, writer = await asyncio.open_connection(
                    attack.host, attack.port, ssl=tls, server_hostname="" if tls else None, limit=1024
                )
                writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport of a socket
                path = paths[number % len(paths)]
                writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode() * 4)
                writers.append(writer)
    await asyncio.sleep(3.0)
    for writer in writers:
        writer.transport.abort()
    return f"{len(writers):,} connections"


async def announcements(attack: Attack) -> str:
    """The longest announcements, again and again, each time of other artifacts."""
    sent = 0

    async def work(link: Link, number: int) -> None:
        nonlocal sent
        reading = asyncio.create_task(_drain(link))
        for turn in range(attack.count(60)):
            await link.send(
                messages.Announce(
                    tuple(_artifact(number, turn, n) for n in range(messages.ANNOUNCED_MAX)), leaving=False
                )
            )
            sent += messages.ANNOUNCED_MAX
            await asyncio.sleep(0.05)
        reading.cancel()

    await attack.members(work)
    return f"{sent:,} artifacts"


def _artifact(number: int, turn: int, n: int) -> Announcement:
    model_id = ModelId(f"{number}-{turn}-{n}".ljust(256, NAMES))
    return Announcement(model_id, Digest(secrets.token_hex(32)), "checkpoint", 1 << 40, 1, 2, False)


async def haves(attack: Attack) -> str:
    """Chunks that were verified, all of them, again and again; and holdings that nobody asked for."""
    sent, chunks = 0, MODEL_BYTES // CHUNK_BYTES

    async def work(link: Link, _: int) -> None:
        nonlocal sent
        reading = asyncio.create_task(_drain(link))
        await link.send(messages.Interest(attack.digest, bytes(chunks // 8), b""))
        for _ in range(attack.count(20)):
            await link.send(messages.Have(attack.digest, ((0, chunks),)), messages.Holdings(attack.digest, b"\xff" * 8))
            sent += 2
            await asyncio.sleep(0.05)
        reading.cancel()

    await attack.members(work, count=8)
    return f"{sent:,} messages"


async def gossip(attack: Attack) -> str:
    """Invented members with the longest records, and ever new artifacts of them."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    ids = [NodeId(secrets.token_hex(8)) for _ in range(20_000)]
    sent, end, turn = 0, time.monotonic() + 30 * attack.scale, itertools.count(1)
    while time.monotonic() < end:
        for _ in range(20):
            version = next(turn)
            node = attack.rng.choice(ids)
            held = tuple(
                Holding(
                    ModelId(f"{version}-{n}".ljust(60, NAMES)), Digest(secrets.token_hex(32)), "checkpoint", 1, 1, True
                )
                for n in range(3)
            )
            profile = Profile(held, 0, ("tcp",), NAMES * 32, NAMES * 32, 1, 8, "9")
            record = Record(
                node, version, State.ALIVE, version, NAMES * 32, (Address(f"127.0.0.1:{version % 60000 + 1}"),), profile
            )
            source = Address(f"127.{version % 250}.0.1:1")  # another address: each is muted for itself
            with contextlib.suppress(OSError):
                sock.close()
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                sock.bind((source.partition(":")[0], 0))
                sock.sendto(attack.seal(packets.Gossip(node, (packets.fitted(record),))), (attack.host, attack.port))
                sent += 1
        await asyncio.sleep(0.002)
    sock.close()
    return f"{sent:,} records"


FLOODS: dict[str, tuple[str, Callable[[Attack], Awaitable[str]]]] = {
    "refused": ("strangers", refused),
    "half_open": ("strangers", half_open),
    "headers": ("strangers", headers),
    "mdns": ("strangers", mdns),
    "mute": ("members", mute),
    "interests": ("members", interests),
    "unread": ("members", unread),
    "pages": ("members", pages),
    "announcements": ("members", announcements),
    "haves": ("members", haves),
    "gossip": ("members", gossip),
}


@contextlib.asynccontextmanager
async def giant(keyring: Keyring | None, scale: float) -> AsyncIterator[str]:
    """A member that offers a model whose manifest has the largest size; yields its address."""
    digest = "01" * 16
    count = round((CHUNKS_MAX - 1) * min(scale, 0.6))
    entries = tuple(ChunkEntry(1, digest) for _ in range(count))
    manifest = Manifest(1, "checkpoint", "", HashScheme(), 1, (FileEntry("a", count, "", entries),))
    data, found = manifest.encoded, manifest.digest
    del manifest, entries
    identity = Identity(keyring, secrets.token_hex(8), now_s=time.time()) if keyring else None
    node = NodeId(identity.node if identity else secrets.token_hex(8))
    artifact = Announcement(ModelId(MODEL), found, "checkpoint", count, count, count, True)
    links, listener = HttpLinks(), await Listener.open("127.0.0.1", 0)
    address = "{}:{}".format(*listener.address)

    async def accept(link: Link) -> None:
        with contextlib.suppress(SwarmError):
            await link.send(hello(node, artifact, address=Address(address), transports=()))
            while True:
                if isinstance(await link.receive(), messages.ManifestRequest):
                    size = messages.MANIFEST_PART_BYTES
                    for offset in range(0, len(data), size):
                        await link.send(messages.ManifestPart(found, len(data), offset, data[offset : offset + size]))

    await links.open(accept, identity=identity)
    listener.serve({TLS_RECORD: links.adopt_tls}, links.adopt)
    try:
        yield address
    finally:
        await listener.close()
        await links.close()


async def giant_manifest(root: Path, options: argparse.Namespace, keyring: Keyring | None) -> Row:
    """The memory of a newcomer that is offered a manifest of the largest size."""
    async with giant(keyring, options.scale) as address:
        command = ["swarm", "fetch", MODEL, "--peer", address, "--out", str(root / "giant"), "--no-seed", "--no-mdns"]
        environment = _environment(root, options.key) | {"SWARM_STALL_TIMEOUT_S": "5", "SWARM_FIND_TIMEOUT_S": "30"}
        began = time.monotonic()
        node = Node(root, _swarm(command), limit_mb=options.limit, environment=environment)
        code = await asyncio.to_thread(node.process.wait, 300)
        node.close()
    ended_s = time.monotonic() - began if code >= 0 else None
    return Row("giant manifest", "a member", f"to a newcomer, exit code {code}", 0.0, node.peak_mb, 0.0, ended_s)


def _swarm(command: list[str]) -> list[str]:
    return [sys.executable, "-m", *command]


def _environment(root: Path, key: Path | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    own = {"SWARM_CACHE": str(root / "cache"), "SWARM_NETWORK": "local", "SWARM_CHUNK_BYTES": str(CHUNK_BYTES)}
    patient = {"SWARM_FIND_TIMEOUT_S": "60", "SWARM_STALL_TIMEOUT_S": "60", "SWARM_ORIGIN": "none"}
    return kept | own | patient | ({"SWARM_KEY_FILE": str(key)} if key else {})


@contextlib.contextmanager
def serving(root: Path, options: argparse.Namespace) -> Iterator[tuple[Node, str, str]]:
    """A node that serves; its address and digest."""
    command = _swarm(["swarm", "serve", str(root / "model"), "--model-id", MODEL])
    node = Node(root, command, limit_mb=options.limit, environment=_environment(root, options.key))
    try:
        ready = re.match(r"(\S+) ready: .* digest (\w+)", node.line())
        if ready is None:
            raise RuntimeError(f"the node did not start: {(root / 'node.log').read_text()[-500:]}")
        yield node, ready[1], ready[2]
    finally:
        node.close()


def fetches(root: Path, address: str, digest: str, key: Path | None) -> float | None:
    """Seconds in which a newcomer gets the model; None if it does not. Nodes of other benches may serve its id too."""
    began = time.monotonic()
    out = root / f"out-{secrets.token_hex(4)}"
    command = _swarm(
        ["swarm", "fetch", MODEL, "--peer", address, "--digest", digest, "--out", str(out), "--no-seed", "--no-mdns"]
    )
    environment = _environment(root, key)
    with contextlib.suppress(subprocess.TimeoutExpired):
        ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, timeout=600, check=False)
        return time.monotonic() - began if ended.returncode == 0 else None
    return None


def run(root: Path, name: str, options: argparse.Namespace, keyring: Keyring | None) -> Row:
    """One flood against a node of its own."""
    by, flood = FLOODS[name]
    with serving(root, options) as (node, address, digest):
        fetches(root, address, digest, options.key)
        before = node.memory_mb
        node.peak_mb = before
        attack = Attack(address, digest, keyring, options.scale)
        sent = asyncio.run(_within(flood(attack)))
        end, after = time.monotonic() + SETTLE_S, node.peak_mb
        while time.monotonic() < end and node.process.poll() is None:
            after = min(after, node.memory_mb)
            time.sleep(0.2)
        alive = node.process.poll() is None
        peak = node.peak_mb
        served_s = fetches(root, address, digest, options.key) if alive else None
    return Row(name.replace("_", " "), by, sent, before, peak, after, served_s)


async def _within(work: Awaitable[str]) -> str:
    async with asyncio.timeout(300):
        return await work


def main() -> int:
    """Prints a row for each flood."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--no-key", action="store_true", help="a node on loopback without a key")
    parser.add_argument("--limit", type=int, metavar="MB", help="memory of the node")
    parser.add_argument("--only", default="", metavar="NAMES")
    parser.add_argument("--scale", type=float, default=1.0, help="part of each flood")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [*FLOODS, "giant"]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "model").mkdir()
        (root / "model" / "w.bin").write_bytes(os.urandom(MODEL_BYTES))
        options.key = None if options.no_key else root / "key"
        keyring = None
        if options.key:
            cluster_key.create(options.key)
            keyring = cluster_key.load(options.key)
        print("| flood | by | sent | before | under | after | serves a newcomer in |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name in names:
            row = (
                asyncio.run(giant_manifest(root, options, keyring))
                if name == "giant"
                else run(root, name, options, keyring)
            )
            rows.append(row)
            served = "NO" if row.served_s is None else f"{row.served_s:.0f} s"
            figures = " | ".join(f"{mb:.0f}" for mb in (row.before_mb, row.under_mb, row.after_mb))
            print(f"| {row.flood} | {row.by} | {row.sent} | {figures} | {served} |", flush=True)
    if options.out:
        result: dict[str, Any] = {
            "limit_mb": options.limit,
            "key": bool(keyring),
            "rows": [asdict(row) for row in rows],
        }
        options.out.write_text(json.dumps(result, indent=1))
    return 1 if any(row.served_s is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
