"""Transports: move the bytes of transfers that both ends have agreed on over their link.

A transfer is a run of bytes with an id. The asker posts `receive` when it sends its request; the holder calls `send`
when it grants it. The asker's id is unique among the transfers of its session, so a transport may match the ends by
it. Where bytes land and what is hashed on the way is the caller's: a transport fills the views it is given, in order,
on a worker thread, and never looks inside. Only a session that says `on_device` is lent memory of GPUs. It knows
nothing of chunks, peers' reputations or schedules.

`swarm.testing.check_transport` is the contract as a program: every transport passes it. docs/transports.md shows how to
add one.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from swarm.store import AnySpan, View


@dataclass(frozen=True, slots=True)
class Transfer:
    """An agreed transfer of `size` bytes. `idle_timeout_s`: longest silence on the wire before it fails."""

    id: int
    size: int
    idle_timeout_s: float


class Inbound(Protocol):
    """The asker's end of a session with one peer. `on_device`: it can fill the memory of GPUs as it is."""

    on_device: bool

    async def receive(self, transfer: Transfer, views: Iterator[View]) -> None:
        """Fills `views` until `transfer.size` bytes have arrived; they are advanced on a worker thread.

        Raises TransportError when the peer aborts, stops, sends too much or goes away; `views` is closed then.
        Whatever advancing `views` raises (a full disk) comes out unchanged. After a failure the session may be dead:
        `alive` says. When cancelled, returns only when `views` will not be advanced any more.
        """

    @property
    def received_bytes(self) -> int:
        """Bytes of all transfers so far: while it grows, the peer is not silent, only slow."""

    @property
    def alive(self) -> bool:
        """Whether the session can carry another transfer."""

    async def close(self) -> None:
        """Ends the session; transfers in flight fail with TransportError."""


class Outbound(Protocol):
    """The holder's end of a session with one peer. `on_device`: it can send the memory of GPUs as it is."""

    on_device: bool

    async def send(self, transfer: Transfer, spans: Iterator[AnySpan]) -> None:
        """Sends the bytes of `spans`, `transfer.size` of them in all, advancing it on a worker thread.

        Raises TransportError when the peer goes away or does not read. An error out of `spans` aborts the transfer on
        both ends, keeps the session, and comes out unchanged. When cancelled, the transfer is aborted on both ends.
        """


class Pace(Protocol):
    """An upload cap, shared by everything a node sends."""

    def take(self, size: int) -> float:
        """Books `size` bytes and returns for how many seconds the caller must wait before it sends them."""

    @property
    def slice_bytes(self) -> int | None:
        """Most bytes worth booking at once; None when there is no cap."""


class Transport(Protocol):
    """One data plane of one node: opens sessions as the asker, is handed sessions as the holder."""

    scheme: str
    reason: str  # for the log line of a choice: why this transport is preferred where it reaches a peer
    usual_bytes_per_s: float  # of a session that nobody has measured yet; 0: it may be anything

    @property
    def address(self) -> str:
        """What the handshake advertises, in the scheme's own form."""

    def reach(self, address: str) -> bool:
        """Whether a peer's advertised address can be reached from here."""

    async def connect(self, address: str, token: str, *, timeout_s: float) -> Inbound:
        """Opens a session to a peer with the token from its Hello. Raises TransportError."""

    def admit(self, token: str) -> None:
        """From now on a peer may open a session with this token; every other token is turned away."""

    async def accept(self, token: str, *, timeout_s: float) -> Outbound:
        """The live session that a peer opened, or opens within the deadline, with an admitted token.

        Raises TransportError. A peer whose session broke may open another one with the same token: the latest counts.
        """

    async def revoke(self, token: str) -> None:
        """Closes the sessions opened with this token and turns it away from now on."""

    async def close(self) -> None:
        """Closes every session."""


@runtime_checkable
class AdoptingTransport(Transport, Protocol):
    """A transport whose askers dial the port of the node's listener, so that a firewall needs one hole."""

    @property
    def opening(self) -> bytes:
        """The first bytes of such a connection, at most 4; no two transports of a node have the same."""

    async def adopt(self, sock: socket.socket) -> None:
        """Takes over a connection that begins with `opening`, which is still to be read. Owns the socket, also when it
        raises."""
