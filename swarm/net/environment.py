"""The environment of a node: links, datagrams and transports to other nodes, and discovery.

`Environment` is the seam between a node and all sockets and clocks; the simulation has another implementation.
`HostEnvironment` is the real one: links, chunks and HTTP pages on a single TCP port, datagrams on the UDP port of the
same number, the transports of `transport.registry`, mDNS, and addresses of the settings. It enforces the reach of the
node: loopback only, unless the settings allow more.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import hashlib
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from swarm.errors import PeerError, SettingsError
from swarm.net import discovery
from swarm.net.http_pages import Page
from swarm.net.listener import Listener
from swarm.net.pausing_loop import PausingLoop
from swarm.net.udp import AeadSeal, Codec, Datagrams, Hear, NoSeal
from swarm.net.websocket import HttpLinks, Link
from swarm.protocol.messages import Address, NodeId
from swarm.security import cluster_key
from swarm.security.certificates import Identity
from swarm.settings import Settings, is_loopback, join_address, split_address
from swarm.transport import AdoptingTransport, Transport
from swarm.transport.cuda_ipc import machine_id
from swarm.transport.pace import TokenBucket
from swarm.transport.registry import TransportConfig, make_transports

DIAL_TIMEOUT_S = 5.0
PORTS_TRIED = 16  # when the system chooses: a TCP port is skipped if its UDP port is taken
RENEW_LOOK_S = 5.0  # a node whose clock was set right is refused for so long at most
TLS_RECORD = b"\x16\x03"  # the first bytes of a handshake
RESOLVE_EVERY_S = 5.0  # a name of the settings may have more addresses later, of replicas that start later

log = logging.getLogger("swarm")


class Environment(Protocol):
    """The network and the clock of a node."""

    transports: Sequence[Transport]  # preferred first; usable once open

    async def open(
        self,
        node: NodeId,
        accept: Callable[[Link], Awaitable[None]],
        found: Callable[[Address, bool], None],
        hear: Hear,
    ) -> Address:
        """Listens and discovers; returns the address that peers dial.

        Awaits `accept` for each incoming link, for as long as the link lives. Calls `found(address, lasting)` for each
        discovered address and `hear(source, datagram)` for each datagram.
        """

    async def dial(self, address: Address) -> Link:
        """A link to another node. Raises PeerError."""

    def send(self, address: Address, datagram: bytes) -> None:
        """Sends a datagram, which may get lost. Never waits or raises."""

    def drain(self) -> None:
        """Delivers the datagrams that wait in the socket."""

    @property
    def paused_s(self) -> float:
        """Seconds that this process stood still so far; the loop's clock leaves them out (`pausing_loop`)."""

    async def close(self) -> None:
        """Closes everything, within the timeouts of its parts."""


class HostEnvironment:
    """This machine."""

    transports: Sequence[Transport] = ()

    def __init__(self, settings: Settings, pages: Mapping[str, Page] | None = None) -> None:
        self._settings = settings
        self._keyring = cluster_key.load(settings.key_file) if settings.key_file else None
        self._identity: Identity | None = None
        self._seal = self._codec()
        self._pace = TokenBucket(settings.upload_limit)
        self._peers = discovery.static(settings.peers)
        self._links = HttpLinks(pages)
        self._mdns = discovery.Mdns() if settings.mdns else None
        self._listener: Listener | None = None
        self._datagrams: Datagrams | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def reload(self, settings: Settings) -> list[str]:
        """Takes over the upload limit and the contents of the key file; returns what has changed.

        New connections and datagrams use the new keys, open links go on. Raises SettingsError, and changes nothing, for
        a key that cannot be read, or that comes to a node without one, or leaves it.
        """
        keyring = cluster_key.load(settings.key_file) if settings.key_file else None
        if (keyring is None) != (self._keyring is None):
            raise SettingsError("key_file", "a node gets or loses its cluster key at a restart only")
        changed = []
        if keyring is not None and keyring != self._keyring:
            self._keyring = keyring
            if self._identity:
                self._identity.take(keyring, time.time())
            if isinstance(self._seal, AeadSeal):
                self._seal.take(keyring.seal_keys)
            changed.append(f"cluster key {keyring}")
        if settings.upload_limit != self._settings.upload_limit:
            self._pace.change(settings.upload_limit)
            limit = settings.upload_limit
            changed.append("no upload limit" if limit is None else f"upload limit {limit / 1e6:g} MB/s")
            self._settings = dataclasses.replace(self._settings, upload_limit=limit)
        return changed

    @property
    def open_to_all(self) -> bool:
        """Whether other machines reach the node and no key protects it."""
        return self._settings.insecure and not is_loopback(
            split_address("listen", self._settings.listen, default_port=0)[0]
        )

    @property
    def mdns(self) -> str:
        """off, on, blocked (no multicast), or silent (not even its own announcement arrives)."""
        if self._mdns is None:
            return "off"
        if not self._mdns.started:
            return "blocked"
        return "silent" if self._mdns.silent(asyncio.get_running_loop().time()) else "on"

    async def open(
        self,
        node: NodeId,
        accept: Callable[[Link], Awaitable[None]],
        found: Callable[[Address, bool], None],
        hear: Hear,
    ) -> Address:
        """As Environment. Raises SettingsError when the address cannot be bound or a transport cannot be used."""
        try:
            self._listener, self._datagrams = await self._listen(hear)
            host, port = self._listener.address
            local = _reachable(host), port
            advertised = self._advertised(*local)
            identity = Identity(self._keyring, node, now_s=time.time()) if self._keyring else None
            self._identity = identity
            self._log_security(host, identity)
            self.transports = self._make_transports(local, advertised, identity)
            routes = {each.opening: each.adopt for each in self.transports if isinstance(each, AdoptingTransport)}
            await self._links.open(accept, identity=identity)
            self._listener.serve({TLS_RECORD: self._links.adopt_tls, **routes}, self._links.adopt)
            self._tasks.append(asyncio.create_task(self._resolve(found), name="swarm-resolve"))
            if identity:
                self._tasks.append(asyncio.create_task(_renew(identity), name="swarm-renew"))
            if self._mdns:
                await self._mdns.start(node_id=node, address=local, found=lambda address: found(address, False))
            return Address(join_address(*advertised))
        except BaseException:
            await self.close()
            raise

    async def dial(self, address: Address) -> Link:
        """As Environment. Raises SettingsError for an address beyond this machine without a key."""
        self._demand_reachable(address)
        return await self._links.dial(address, timeout_s=DIAL_TIMEOUT_S)

    async def read(self, address: Address, path: str, timeout_s: float, bytes_max: int) -> bytes:
        """A page of another node (`HttpLinks.read`). Raises PeerError."""
        self._demand_reachable(address)
        return await self._links.read(address, path, timeout_s=timeout_s, bytes_max=bytes_max)

    def send(self, address: Address, datagram: bytes) -> None:
        """Nothing before `open`."""
        if self._datagrams:
            self._datagrams.send(address, datagram)

    def drain(self) -> None:
        """Nothing before `open`."""
        if self._datagrams:
            self._datagrams.drain()

    @property
    def paused_s(self) -> float:
        """As Environment; 0 on a loop of the caller's own."""
        loop = asyncio.get_running_loop()
        return loop.paused_s if isinstance(loop, PausingLoop) else 0.0

    async def close(self) -> None:
        """Also after an `open` that failed, and twice."""
        for task in self._tasks:
            task.cancel()
        if self._mdns:
            await self._mdns.close()
        if self._datagrams:
            self._datagrams.close()
        listener, self._listener = self._listener, None
        if listener:
            await listener.close()
        await self._links.close()
        for transport in self.transports:
            await transport.close()

    def _demand_reachable(self, address: Address) -> None:
        host, _ = split_address("peer", address)
        if not self._settings.reaches_out and not is_loopback(host):
            raise SettingsError("peer", f"{address} is beyond this machine, which needs --key-file, or --insecure")

    async def _listen(self, hear: Hear) -> tuple[Listener, Datagrams]:
        """A TCP and a UDP socket on one port. Raises SettingsError."""
        host, wanted = split_address("listen", self._settings.listen, default_port=0)
        for _ in range(PORTS_TRIED):
            listener = await Listener.open(host, wanted)
            where, port = listener.address
            try:
                return listener, Datagrams(
                    where, port, hear, codec=self._seal, loopback_only=not self._settings.reaches_out
                )
            except OSError as error:
                await listener.close()
                if wanted or error.errno != errno.EADDRINUSE:
                    why = (
                        f"UDP port {port} on {where} cannot be had ({error.strerror}); members hear of each other there"
                    )
                    raise SettingsError("listen", f"{why}: choose another port, or 0 for any free one") from error
        raise SettingsError("listen", f"no port of {host} is free for both TCP and UDP; choose one that is")

    def _codec(self) -> Codec:
        if self._keyring is None:
            return NoSeal()
        return AeadSeal(self._keyring.seal_keys, time=time.time, rng=secrets.token_bytes)

    def _advertised(self, host: str, port: int) -> tuple[str, int]:
        """The host and port to advertise, given those of the listener."""
        if self._settings.advertise is None:
            return host, port
        given, mapped = split_address("advertise", self._settings.advertise, default_port=0)
        return given, mapped or port

    def _make_transports(
        self, local: tuple[str, int], advertised: tuple[str, int], identity: Identity | None
    ) -> Sequence[Transport]:
        settings = self._settings
        config = TransportConfig(
            local=local,
            advertised=advertised,
            pace=self._pace,
            congestion=settings.congestion,
            identity=identity,
            encrypted=identity is not None and settings.data_encryption != "none",
        )
        return make_transports(settings.transports, config)

    def _log_security(self, host: str, identity: Identity | None) -> None:
        if identity is None and is_loopback(host):
            log.info("no cluster key: listening on this machine only (--key-file opens the node to members)")
        elif identity is None:
            log.warning("listening on %s without a cluster key: anyone who reaches it can read what it serves", host)
        elif self._settings.data_encryption == "none":
            log.warning(
                "cluster key %s; chunks are not encrypted (data_encryption = none): the network can read them, and "
                "only checksums detect changes",
                identity.keyring,
            )
            if self._settings.transports:
                log.warning(
                    "%s opens connections of its own, which no key protects: hosts that reach its ports may stop this "
                    "process; use it on trusted networks",
                    ", ".join(self._settings.transports),
                )
        else:
            log.info("cluster key %s: only members can connect", identity.keyring)

    async def _resolve(self, found: Callable[[Address, bool], None]) -> None:
        unknown: set[Address] = set()
        while True:
            for name in self._peers:
                try:
                    addresses = await discovery.resolve(name)
                except PeerError as error:
                    if name not in unknown:  # it may exist once its first replica runs
                        log.warning("%s; asking again every %g s", error, RESOLVE_EVERY_S)
                    unknown.add(name)
                    continue
                for address in addresses:
                    found(address, address == name)
            await asyncio.sleep(RESOLVE_EVERY_S)


async def _renew(identity: Identity) -> None:
    """Renews the certificate. Checks every RENEW_LOOK_S: a machine may sleep, and its clock may be set."""
    while True:
        await asyncio.sleep(RENEW_LOOK_S)
        if identity.is_due(now_s := time.time()):
            identity.renew(now_s)


def new_id() -> NodeId:
    """A fresh node id."""
    return NodeId(secrets.token_hex(8))


def machine_label() -> str:
    """A label that nodes of one machine share and no other machine has: a digest of the id of its last boot.

    Containers share the kernel of their machine, so they have its label, under any host name.
    """
    return hashlib.sha256(id_.encode()).hexdigest()[:12] if (id_ := machine_id()) else socket.gethostname()


def _reachable(host: str) -> str:
    """As `discovery.reachable_host`; the loopback address where a wildcard has no default route."""
    try:
        return discovery.reachable_host(host)
    except OSError:
        return "::1" if ":" in host else "127.0.0.1"
