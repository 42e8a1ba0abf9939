"""Datagrams between nodes: one UDP socket beside the listener's, on the same address and port.

What is sent may get lost, and nothing here waits or raises for that: no buffer, no route and no reader are all loss.
A stranger can send as much as it likes; it costs at most `TURN_MAX` datagrams a turn of the loop, and what does not fit
into the socket's buffer is dropped by the kernel.

Every datagram goes through an `Codec` on its way out and in: the one place to encrypt and to authenticate them.

Must not know: what datagrams say, names (addresses are literals; nothing is looked up here).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from swarm.errors import SettingsError
from swarm.protocol.messages import Address
from swarm.security.datagram_seal import Opener, Sealer, SealKey, Unopened
from swarm.settings import is_literal, is_loopback, join_address, split_address

TURN_MAX = 64  # datagrams read before others have their turn
DRAIN_MAX = 2048  # datagrams read before a timer: more than a socket's buffer holds
SIZE_MAX = 2048  # bytes; of a longer one only so much is read, and it is nobody's
REFUSALS_MAX = 1000  # different ones that are logged; strangers cannot make this node remember more
BUFFER_BYTES = 1 << 20  # asked for; a loop that stalls for a moment loses nothing

Hear: TypeAlias = Callable[[Address, bytes], None]  # (source address, datagram)


log = logging.getLogger("swarm")


class Codec(Protocol):
    """What a datagram travels in."""

    def seal(self, datagram: bytes) -> bytes:
        """What is sent."""

    def open(self, sealed: bytes, source: str) -> bytes | None:
        """What was sent, or None if it is not authentic, or was here before. `source` is the host it came from."""


class NoSeal:
    """No codec: everybody can read and write it."""

    def seal(self, datagram: bytes) -> bytes:
        """See Codec."""
        return datagram

    def open(self, sealed: bytes, source: str) -> bytes | None:
        """See Codec."""
        return sealed


class AeadSeal:
    """Members of the cluster alone write and read. What is refused is logged, once for each host and reason."""

    def __init__(self, keys: Sequence[SealKey], *, time: Callable[[], float], rng: Callable[[int], bytes]) -> None:
        """`time` gives seconds since 1970, `rng(n)` n unpredictable bytes."""
        self._sealer = Sealer(keys[0], rng)
        self._opener = Opener(keys)
        self._time = time
        self._refused: set[tuple[str, Unopened]] = set()

    def seal(self, datagram: bytes) -> bytes:
        """See Codec."""
        return self._sealer.seal(datagram, self._time())

    def open(self, sealed: bytes, source: str) -> bytes | None:
        """See Codec."""
        opened = self._opener.open(sealed, self._time())
        if isinstance(opened, bytes):
            return opened
        if (source, opened) not in self._refused and len(self._refused) < REFUSALS_MAX:
            self._refused.add((source, opened))
            level = logging.DEBUG if opened is Unopened.REPLAYED else logging.WARNING  # networks double datagrams
            log.log(level, "refused a datagram from %s that %s", source, opened.value)
        return None


class Datagrams:
    """The socket. `hear` is called on the loop with every datagram and the address that it came from.

    `loopback_only`: datagrams to and from other machines are neither sent nor accepted.
    Raises OSError when the address cannot be had.
    """

    def __init__(self, host: str, port: int, hear: Hear, *, codec: Codec, loopback_only: bool) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._hear = hear
        self._codec = codec
        self._loopback_only = loopback_only
        self._family = family
        self._loop = asyncio.get_running_loop()
        self._sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self._sock.setblocking(False)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            if family == socket.AF_INET6:
                self._sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as the listener
            self._sock.bind(socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM, 0, socket.AI_NUMERICHOST)[0][4])
        except OSError:
            self._sock.close()
            raise
        self._loop.add_reader(self._sock.fileno(), self._read, TURN_MAX)

    def send(self, address: Address, datagram: bytes) -> None:
        """Sends one datagram to HOST:PORT, if that is a literal address that may be reached from here."""
        target = _target(address, self._family)
        if target is None or self._sock.fileno() < 0 or not self._permitted(target[0]):
            return
        with contextlib.suppress(OSError):
            self._sock.sendto(self._codec.seal(datagram), target)

    def drain(self) -> None:
        """Hands over what has arrived and waits."""
        self._read(DRAIN_MAX)

    def close(self) -> None:
        """Stops at once."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _read(self, most: int) -> None:
        for _ in range(most):
            if self._sock.fileno() < 0:  # closed by whoever heard the last one
                return
            try:
                sealed, source = self._sock.recvfrom(SIZE_MAX)
            except BlockingIOError:
                return
            except OSError:  # the kernel tells of a datagram that was not delivered: it is lost, and that is all
                continue
            if self._permitted(source[0]) and (datagram := self._codec.open(sealed, source[0])) is not None:
                self._hear(Address(join_address(source[0], source[1])), datagram)

    def _permitted(self, host: str) -> bool:
        return not self._loopback_only or is_loopback(host)


@functools.lru_cache(4096)
def _target(address: Address, family: socket.AddressFamily) -> tuple[str, int] | None:
    """Where to send to; None for names, and for addresses of the other family."""
    try:
        host, port = split_address("address", address)
    except SettingsError:
        return None
    return (host, port) if is_literal(host) and (":" in host) == (family == socket.AF_INET6) else None
