"""Datagrams between nodes: UDP sockets on the addresses and the port of the listener.

Datagrams may get lost, so nothing here waits or raises when a buffer is full or a peer unreachable. A flood costs at
most TURN_MAX datagrams a turn of the loop; the kernel drops the rest. Each datagram passes a `Codec` in both
directions, which encrypts and authenticates it in a cluster with a key.

Must not know: packets, names (addresses are literals; nothing is resolved here).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from swarm.errors import SettingsError
from swarm.protocol.messages import Address
from swarm.security.datagram_seal import Opener, Sealer, SealKey, Unopened
from swarm.security.rate_limit import LogOnce
from swarm.settings import is_literal, is_loopback, join_address, split_address

TURN_MAX = 64  # datagrams read in a turn of the loop
DRAIN_MAX = 2048  # datagrams read by `drain`: more than fit a socket's buffer
SIZE_MAX = 2048  # bytes; a longer datagram is cut and fails to decode
ZONE_AT = 3  # in a socket address of IPv6
BUFFER_BYTES = 1 << 20  # requested from the kernel, for a loop that stalls

Hear: TypeAlias = Callable[[Address, bytes], None]  # (source address, datagram)

log = logging.getLogger("swarm")


class Codec(Protocol):
    """The encoding of datagrams on the wire."""

    def seal(self, datagram: bytes) -> bytes:
        """The bytes to send."""

    def open(self, sealed: bytes, source: str) -> bytes | None:
        """The datagram; None if it is not authentic or a replay. `source`: the host that sent it."""


class NoSeal:
    """Datagrams in the clear, for nodes without a cluster key."""

    def seal(self, datagram: bytes) -> bytes:
        """The datagram itself."""
        return datagram

    def open(self, sealed: bytes, source: str) -> bytes | None:
        """The datagram itself."""
        return sealed


class AeadSeal:
    """Datagrams that only members of the cluster read and write (`datagram_seal`). Refusals are logged once for each
    host and reason."""

    def __init__(self, keys: Sequence[SealKey], *, time: Callable[[], float], rng: Callable[[int], bytes]) -> None:
        """`time` returns seconds since 1970, `rng(n)` n unpredictable bytes."""
        self._rng = rng
        self._sealer = Sealer(keys[0], rng)
        self._opener = Opener(keys)
        self._time = time
        self._refusals = LogOnce(log)

    def take(self, keys: Sequence[SealKey]) -> None:
        """Seals and opens with these keys from now on."""
        self._sealer = Sealer(keys[0], self._rng)
        self._opener.take(keys)

    def seal(self, datagram: bytes) -> bytes:
        """Sealed with the first key."""
        return self._sealer.seal(datagram, self._time())

    def open(self, sealed: bytes, source: str) -> bytes | None:
        """Opened with any of the keys."""
        opened = self._opener.open(sealed, self._time())
        if isinstance(opened, bytes):
            return opened
        level = logging.DEBUG if opened is Unopened.REPLAYED else logging.WARNING  # networks duplicate datagrams
        self._refusals.log(level, f"refused a datagram from {source} that {opened.value}")
        return None


class Datagrams:
    """The sockets, one for each of `hosts`. Calls `hear(source address, datagram)` on the loop.

    `loopback_only`: drops datagrams to and from other machines. Raises OSError when an address cannot be bound.
    """

    def __init__(self, hosts: Sequence[str], port: int, hear: Hear, *, codec: Codec, loopback_only: bool) -> None:
        self._hear = hear
        self._codec = codec
        self._loopback_only = loopback_only
        self._loop = asyncio.get_running_loop()
        self._socks: list[socket.socket] = []
        try:
            for host in hosts:
                self._socks.append(_bound(host, port))
        except OSError:
            self.close()
            raise
        for sock in self._socks:
            self._loop.add_reader(sock.fileno(), self._read, sock, TURN_MAX)

    def send(self, address: Address, datagram: bytes) -> None:
        """Sends a datagram to HOST:PORT; drops it unless that is a literal address within reach.

        A node that listens on several addresses sends from the first whose network leads there.
        """
        target = _target(address)
        if target is None or not self._permitted(target[1][0]):
            return
        sealed: bytes | None = None
        for sock in self._socks:
            if sock.family == target[0]:
                sealed = self._codec.seal(datagram) if sealed is None else sealed
                with contextlib.suppress(OSError):
                    sock.sendto(sealed, target[1])
                    return

    def drain(self) -> None:
        """Delivers the datagrams that wait in the sockets."""
        for sock in self._socks:
            self._read(sock, DRAIN_MAX)

    def close(self) -> None:
        """Closes the sockets."""
        socks, self._socks = self._socks, []
        for sock in socks:
            self._loop.remove_reader(sock.fileno())
            sock.close()

    def _read(self, sock: socket.socket, most: int) -> None:
        for _ in range(most):
            if sock.fileno() < 0:  # closed by `hear`
                return
            try:
                sealed, source = sock.recvfrom(SIZE_MAX)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error for a datagram sent before
                continue
            if self._permitted(source[0]) and (datagram := self._codec.open(sealed, source[0])) is not None:
                self._hear(Address(join_address(zoned(source), source[1])), datagram)

    def _permitted(self, host: str) -> bool:
        return not self._loopback_only or is_loopback(host)


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as the listener's
        sock.bind(socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM, 0, socket.AI_NUMERICHOST)[0][4])
    except OSError:
        sock.close()
        raise
    return sock


def zoned(source: tuple[Any, ...]) -> str:
    """The host of a socket address; that of a link-local one has its zone."""
    host = str(source[0])
    if len(source) > ZONE_AT and source[ZONE_AT] and "%" not in host:
        with contextlib.suppress(OSError):
            return f"{host}%{socket.if_indextoname(source[ZONE_AT])}"
    return host


@functools.lru_cache(4096)
def _target(address: Address) -> tuple[socket.AddressFamily, tuple[Any, ...]] | None:
    """The family and the socket address; None for names."""
    try:
        host, port = split_address("address", address)
        if not is_literal(host):
            return None
        family, _, _, _, where = socket.getaddrinfo(host, port, 0, socket.SOCK_DGRAM, 0, socket.AI_NUMERICHOST)[0]
    except (SettingsError, OSError):  # malformed, or a zone that this machine does not have
        return None
    return family, tuple(where)
