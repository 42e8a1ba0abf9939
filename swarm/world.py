"""The world as a node sees it: a way to other nodes, and data planes to read from them.

`World` is the seam between a node and everything that has a socket or a clock of its own; the simulation has another
one. `HostWorld` is the real one: one listening socket for links and bulk data, HTTP links, TCP and in-process
transports, multicast DNS and addresses given by hand. It decides what may be reached from where (loopback only,
unless the settings say otherwise).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from swarm import discovery
from swarm.errors import PeerError, SettingsError
from swarm.link import HttpLinks, Link, Page
from swarm.listener import Listener
from swarm.settings import Settings, is_loopback, join_address, split_address
from swarm.transport import Transport
from swarm.transport.inproc import InprocTransport
from swarm.transport.pace import TokenBucket, Unlimited
from swarm.transport.tcp import MAGIC, TcpTransport

DIAL_TIMEOUT_S = 5.0
RESOLVE_EVERY_S = 5.0  # names given by hand may point to more addresses later: replicas that start after this one

log = logging.getLogger("swarm")


class World(Protocol):
    """What a node is put into."""

    transports: Sequence[Transport]  # preferred first; usable once open

    async def open(
        self, node: str, accept: Callable[[Link], Awaitable[None]], found: Callable[[str, bool], None]
    ) -> str:
        """Starts to listen and to look for others; returns the address under which others reach this node.

        `accept` is awaited for every incoming link; `found(address, lasting)` is called for every address that turns
        up.
        """

    async def dial(self, address: str) -> Link:
        """A link to another node. Raises PeerError."""

    async def close(self) -> None:
        """Stops everything; never hangs."""


class HostWorld:
    """This machine."""

    transports: Sequence[Transport] = ()

    def __init__(self, settings: Settings, pages: Mapping[str, Page] | None = None) -> None:
        self._settings = settings
        self._peers = discovery.static(settings.peers)
        self._links = HttpLinks(pages)
        self._mdns = discovery.Mdns() if settings.mdns else None
        self._listener: Listener | None = None
        self._resolving: asyncio.Task[None] | None = None

    async def open(
        self, node: str, accept: Callable[[Link], Awaitable[None]], found: Callable[[str, bool], None]
    ) -> str:
        """See World. Raises SettingsError when the address cannot be listened on."""
        host, port = split_address("listen", self._settings.listen, default_port=0)
        self._listener = await Listener.open(host, port)
        host, port = self._listener.address
        if not is_loopback(host):
            log.warning("listening on %s without a cluster key: anyone who reaches it can read what it serves", host)
        else:
            log.info("no cluster key: listening on this machine only (--insecure opens the node to others)")
        limit = self._settings.upload_limit
        pace = Unlimited() if limit is None else TokenBucket(limit)
        tcp = TcpTransport(_reachable(host), port, pace=pace, congestion=self._settings.congestion)
        # A cap counts what leaves the process: with one, even a neighbour in this process is served through TCP.
        self.transports = [tcp] if limit is not None else [InprocTransport(), tcp]
        await self._links.open(accept)
        self._listener.serve({MAGIC: tcp.adopt}, self._links.adopt)
        advertised = join_address(_reachable(host), port)
        self._resolving = asyncio.create_task(self._resolve(found), name="swarm-resolve")
        if self._mdns:
            await self._mdns.start(
                node_id=node, address=split_address("listen", advertised), found=lambda address: found(address, False)
            )
        return advertised

    async def dial(self, address: str) -> Link:
        """See World."""
        host, _ = split_address("peer", address)
        if not self._settings.insecure and not is_loopback(host):
            raise SettingsError(
                "peer", f"{address} is beyond this machine, which needs --insecure without a cluster key"
            )
        return await self._links.dial(address, timeout_s=DIAL_TIMEOUT_S)

    async def close(self) -> None:
        """See World."""
        if self._resolving:
            self._resolving.cancel()
        if self._mdns:
            await self._mdns.close()
        if self._listener:
            await self._listener.close()
        await self._links.close()
        for transport in self.transports:
            await transport.close()

    async def _resolve(self, found: Callable[[str, bool], None]) -> None:
        unknown: set[str] = set()
        while True:
            for name in self._peers:
                try:
                    addresses = await discovery.resolve(name)
                except PeerError as error:
                    if name not in unknown:  # it may come to exist with the first replica that it stands for
                        log.warning("%s; asking again every %g s", error, RESOLVE_EVERY_S)
                    unknown.add(name)
                    continue
                for address in addresses:
                    found(address, address == name)
            await asyncio.sleep(RESOLVE_EVERY_S)


def new_id() -> str:
    """A fresh node id."""
    return secrets.token_hex(8)


def _reachable(host: str) -> str:
    """An address to advertise for a listening host: its own, or for 0.0.0.0 the one that the default route uses."""
    if host not in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return host
    family, probe = (socket.AF_INET, "192.0.2.1") if host == "0.0.0.0" else (socket.AF_INET6, "2001:db8::1")  # noqa: S104
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((probe, 9))  # a datagram socket sends nothing on connect
        except OSError:
            return "127.0.0.1" if family == socket.AF_INET else "::1"
        return str(sock.getsockname()[0])
