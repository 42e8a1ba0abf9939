"""This machine as the environment of a node: its sockets, keys, transports and discovery.

`HostEnvironment` has links, chunks and HTTP pages on a single TCP port, datagrams on the UDP port of the same number
(`port_pair`), the transports of `transport.registry`, mDNS, and the names of the settings (`peer_names`). It enforces
the reach of the node: loopback only, unless the settings allow more. A node that listens on loopback and has a key
dials other machines, and looks for them by multicast; it is announced to its own machine alone.

Must not know: messages, artifacts, members.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime

from swarm.errors import PeerError, SettingsError
from swarm.net import addresses, cards, dialling, port_pair, timetable
from swarm.net.addresses import (
    Machine,
    announced,
    host_of,
    hosts_to_listen_on,
    listens_at,
    multicast_hosts,
    told,
)
from swarm.net.discovery import Mdns
from swarm.net.environment import Found
from swarm.net.http_pages import PROBES, Bearer, Page, read_token
from swarm.net.link import Link
from swarm.net.listener import Listener
from swarm.net.pausing_loop import PausingLoop
from swarm.net.peer_names import PeerNames
from swarm.net.probe_listener import ProbeListener
from swarm.net.udp import AeadSeal, Codec, Datagrams, Hear, NoSeal
from swarm.net.websocket import HttpLinks
from swarm.protocol.messages import Address, NodeId
from swarm.security import cluster_key
from swarm.security.certificates import Identity
from swarm.settings import DEFAULT_PORT, Settings, is_loopback, join_address, split_address
from swarm.transport import AdoptingTransport, Transport
from swarm.transport.cuda_ipc import machine_id
from swarm.transport.pace import TokenBucket
from swarm.transport.registry import TransportConfig, make_transports

DIAL_TIMEOUT_S = 5.0
RENEW_LOOK_S = 5.0  # a node whose clock was set right is refused for so long at most
CARDS_LOOK_S = 10.0
HOURS_LOOK_S = 10.0
TLS_RECORD = b"\x16\x03"  # the first bytes of a handshake

log = logging.getLogger("swarm")


class HostEnvironment:
    """This machine. `lenient`: a metrics address that is taken is a warning, as another node of this machine has it."""

    transports: Sequence[Transport] = ()

    def __init__(self, settings: Settings, pages: Mapping[str, Page] | None = None, *, lenient: bool = False) -> None:
        self._settings = settings
        self._lenient = lenient
        self._bearer = Bearer(read_token(settings.metrics_token_file))
        self._probes = ProbeListener(pages or {}, self._bearer)
        self._keyring = cluster_key.load(settings.key_file) if settings.key_file else None
        self._identity: Identity | None = None
        self._seal = self._codec()
        self._hours = timetable.read(settings.upload_hours)
        self._pace = TokenBucket(self._limit())
        self._names = PeerNames(settings.peers)
        self._links = HttpLinks(pages, bearer=self._bearer)
        self._mdns = Mdns() if settings.mdns else None
        self._browser: Mdns | None = None  # of a node on loopback that dials other machines
        self._listener: Listener | None = None
        self._datagrams: Datagrams | None = None
        self._port = 0
        self._machine = Machine()
        self._told: tuple[Address, ...] = ()
        self._tasks: list[asyncio.Task[None]] = []

    def reload(self, settings: Settings) -> list[str]:
        """Takes over the upload limit, and the contents of key and token file; returns what has changed.

        New connections and datagrams use the new keys, open links go on. Raises SettingsError, and changes nothing, for
        a key that cannot be read, or that comes to a node without one, or leaves it.
        """
        keyring = cluster_key.load(settings.key_file) if settings.key_file else None
        if (keyring is None) != (self._keyring is None):
            raise SettingsError("key_file", "a node gets or loses its cluster key at a restart only")
        token, hours = read_token(settings.metrics_token_file), timetable.read(settings.upload_hours)
        changed = []
        if self._bearer.take(token):
            changed.append("token for metrics" if token else "no token for metrics")
        if keyring is not None and keyring != self._keyring:
            self._keyring = keyring
            if self._identity:
                self._identity.take(keyring, time.time())
            if isinstance(self._seal, AeadSeal):
                self._seal.take(keyring.seal_keys)
            changed.append(f"cluster key {keyring}")
        if (settings.upload_limit, hours) != (self._settings.upload_limit, self._hours):
            self._hours = hours
            self._settings = dataclasses.replace(
                self._settings, upload_limit=settings.upload_limit, upload_hours=settings.upload_hours
            )
            limit = self._limit()
            self._pace.change(limit)
            changed.append("no upload limit" if limit is None else f"upload limit {limit / 1e6:g} MB/s")
        return changed

    def _limit(self) -> float | None:
        """The upload limit at this time of the day."""
        return timetable.limit(self._hours, self._settings.upload_limit, datetime.now())

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
        found: Found,
        hear: Hear,
    ) -> Address:
        """As Environment. Raises SettingsError when the address cannot be bound or a transport cannot be used."""
        try:
            machine = cards.read()
            self._listener, self._datagrams = await self._listen(hear, machine)
            _, self._port = self._listener.address
            self._told = self._tell(machine)
            zoned = [] if self.on_loopback else announced(self._hosts, machine)  # of use within the network at least
            shown = next(iter((*self._told, *(Address(join_address(h, self._port)) for h in zoned), self.local)))
            identity = Identity(self._keyring, node, now_s=time.time()) if self._keyring else None
            self._identity = identity
            self._log_security(identity)
            await self._open_probes()
            self.transports = self._make_transports(shown, identity)
            routes = {each.opening: each.adopt for each in self.transports if isinstance(each, AdoptingTransport)}
            await self._links.open(accept, identity=identity)
            self._listener.serve({TLS_RECORD: self._links.adopt_tls, **routes}, self._links.adopt)
            self._tasks.append(asyncio.create_task(self._names.follow(found), name="swarm-resolve"))
            self._tasks.append(asyncio.create_task(self._look_at_cards(), name="swarm-cards"))
            self._tasks.append(asyncio.create_task(self._keep_hours(), name="swarm-hours"))
            if identity:
                self._tasks.append(asyncio.create_task(_renew(identity), name="swarm-renew"))
            if self._mdns:
                await self._discover(self._mdns, node, machine, found)
            return shown
        except BaseException:
            await self.close()
            raise

    @property
    def addresses(self) -> tuple[Address, ...]:
        """As Environment."""
        return self._told

    @property
    def confined(self) -> bool:
        """As Environment."""
        return not self._settings.reaches_out

    @property
    def names_peers(self) -> bool:
        """As Environment."""
        return bool(self._names)

    @property
    def unresolved(self) -> Sequence[str]:
        """As Environment."""
        return self._names.unresolved

    @property
    def resolving(self) -> bool:
        """As Environment."""
        return self._names.resolving

    @property
    def local(self) -> Address:
        """As Environment."""
        return addresses.local(self._hosts, self._port)

    @property
    def on_loopback(self) -> bool:
        """As Environment."""
        return all(map(is_loopback, self._hosts))

    async def dial(self, addresses: Sequence[Address]) -> Link:
        """As Environment. Raises SettingsError for an address beyond this machine without a key."""
        for address in addresses:
            self._demand_reachable(address)
        try:
            return await dialling.race(
                [functools.partial(self._links.dial, address, timeout_s=DIAL_TIMEOUT_S) for address in addresses],
                discard=Link.close,
            )
        except ExceptionGroup as failed:
            peers, others = failed.split(PeerError)
            if peers is None or others is not None:
                raise
            raise _most_telling(peers.exceptions) from failed

    def port_at(self, local: str) -> int:
        """As Environment. With `advertise` only that address counts."""
        host = host_of(local)
        return self._port if host and not self._settings.advertise and listens_at(self._hosts, host) else 0

    def reached(
        self, claimed: Sequence[str], *, remote: str | None = None, port: int = 0, dialled: Address | None = None
    ) -> tuple[Address, ...]:
        """As Environment."""
        if remote is None:  # gossip, whose datagrams leave from where the node listens
            near, far = self.on_loopback, not self.on_loopback
        else:
            near, far = is_loopback(host_of(remote) or ""), self._settings.reaches_out
        first = dialled or (addresses.behind(remote, port) if remote and port else None)
        known = addresses.usable(claimed, self._machine, loopback=near, beyond=far)
        others = [each for each in known if each not in self._told]
        return tuple(dict.fromkeys((*([first] if first else []), *others)))

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
        for mdns in filter(None, (self._mdns, self._browser)):
            await mdns.close()
        if self._datagrams:
            self._datagrams.close()
        listener, self._listener = self._listener, None
        if listener:
            await listener.close()
        await self._probes.close()
        await self._links.close()
        for transport in self.transports:
            await transport.close()

    def _demand_reachable(self, address: Address) -> None:
        host, _ = split_address("peer", address)
        if not self._settings.reaches_out and not is_loopback(host):
            raise SettingsError("peer", f"{address} is beyond this machine, which needs --key-file, or --insecure")

    async def _listen(self, hear: Hear, machine: Machine) -> tuple[Listener, Datagrams]:
        """TCP and UDP sockets on one port. Raises SettingsError."""
        host, given = split_address("listen", self._settings.listen, default_port=-1, least_port=-1)
        hosts = hosts_to_listen_on(host, machine) or (host,)
        wanted = max(0, given)
        if given < 0 and not is_loopback(host) and await port_pair.is_free(hosts, DEFAULT_PORT, codec=self._codec()):
            wanted = DEFAULT_PORT
        confined = not self._settings.reaches_out
        return await port_pair.open_pair(hosts, wanted, hear, codec=self._seal, loopback_only=confined)

    def _codec(self) -> Codec:
        if self._keyring is None:
            return NoSeal()
        return AeadSeal(self._keyring.seal_keys, time=time.time, rng=secrets.token_bytes)

    @property
    def _hosts(self) -> tuple[str, ...]:
        return self._listener.hosts if self._listener else ()

    def _tell(self, machine: Machine) -> tuple[Address, ...]:
        """The addresses to tell: the advertised one, or those that the node listens on."""
        self._machine = machine
        if self._settings.advertise is None:
            return told(self._hosts, self._port, machine)
        host, mapped = split_address("advertise", self._settings.advertise, default_port=0)
        return (Address(join_address(host, mapped or self._port)),)

    async def _look_at_cards(self) -> None:
        """Cards come and go: a laptop moves, a container starts before its network."""
        while True:
            await asyncio.sleep(CARDS_LOOK_S)
            self._told = self._tell(cards.read())

    async def _discover(self, mdns: Mdns, node: NodeId, machine: Machine, found: Found) -> None:
        """Announces the node where it listens, and looks for others wherever it may dial."""

        def report(claimed: tuple[Address, ...]) -> None:
            known = addresses.usable(claimed, machine, loopback=True, beyond=self._settings.reaches_out, zoned=True)
            if known:
                found(known, False)

        hosts = self._hosts if self.on_loopback else announced(self._hosts, machine)
        await mdns.start(node_id=node, hosts=hosts, port=self._port, found=report)
        if self.on_loopback and self._settings.reaches_out and (beyond := multicast_hosts(machine)):
            self._browser = Mdns()
            await self._browser.start(node_id=node, hosts=beyond, port=0, found=report)

    def _make_transports(self, shown: Address, identity: Identity | None) -> Sequence[Transport]:
        settings = self._settings
        advertised = split_address("advertise", shown)
        own = told(self._hosts, self._port, self._machine)
        config = TransportConfig(
            local=split_address("listen", own[0]) if own else advertised,
            advertised=advertised,
            pace=self._pace,
            congestion=settings.congestion,
            identity=identity,
            encrypted=identity is not None and settings.data_encryption != "none",
        )
        return make_transports(settings.transports, config)

    async def _keep_hours(self) -> None:
        while True:
            self._pace.change(self._limit())
            await asyncio.sleep(HOURS_LOOK_S)

    async def _open_probes(self) -> None:
        wanted = self._settings.metrics_listen
        if wanted is None:
            return
        try:
            address = await self._probes.open(wanted)
        except SettingsError as error:
            if not self._lenient:
                raise
            log.warning("%s; this node goes on without", error)
        else:
            log.info("%s at http://%s, open to all that reach it", ", ".join(PROBES), address)

    def _log_security(self, identity: Identity | None) -> None:
        if identity is None and self.on_loopback:
            log.info("no cluster key: listening on this machine only (--key-file opens the node to members)")
        elif identity is None:
            hosts = ", ".join(self._hosts)
            log.warning("listening on %s without a cluster key: anyone who reaches it can read what it serves", hosts)
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


async def _renew(identity: Identity) -> None:
    """Renews the certificate. Checks every RENEW_LOOK_S: a machine may sleep, and its clock may be set."""
    while True:
        await asyncio.sleep(RENEW_LOOK_S)
        if identity.is_due(now_s := time.time()):
            identity.renew(now_s)


def machine_label() -> str:
    """A label that nodes of one machine share and no other machine has: a digest of the id of its last boot.

    Containers share the kernel of their machine, so they have its label, under any host name.
    """
    return hashlib.sha256(id_.encode()).hexdigest()[:12] if (id_ := machine_id()) else socket.gethostname()


def _most_telling(errors: Sequence[Exception]) -> PeerError:
    """The error to report when no address of a node answers: a final one, else that of the best address."""
    known = [error for error in errors if isinstance(error, PeerError)]
    return next((error for error in known if error.final), known[0])
