"""Transports: move the bytes of transfers that both nodes agreed on over their link.

A transfer is a run of bytes with an id. The asker calls `receive` when it sends its request, the holder calls `send`
when it grants the request. Ids are unique within a session, so a transport matches both ends by them. A transport fills
the given views in order, on a worker thread, and never interprets the bytes: the caller decides where they land and
hashes them. Only a session with `on_device` is given memory of GPUs.

`swarm.testing.check_transport` is the contract as a program; docs/transports.md shows how to add a transport. Must not
know: chunks, reputations, schedules.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from swarm.store import AnySpan, View


@dataclass(frozen=True, slots=True)
class Transfer:
    """An agreed transfer of `size` bytes. It fails after `idle_timeout_s` without a byte on the wire."""

    id: int
    size: int
    idle_timeout_s: float


class Inbound(Protocol):
    """The asker's end of a session. `on_device`: it fills DeviceViews."""

    on_device: bool

    async def receive(self, transfer: Transfer, views: Iterator[View]) -> None:
        """Fills `views` with `transfer.size` bytes, advancing it on a worker thread.

        Raises TransportError when the peer aborts, is silent, sends too much or goes away; closes `views` then. Errors
        out of `views` (a full disk) come out unchanged. After a failure the session may be dead, see `alive`. When
        cancelled, returns only once `views` is not advanced any more.
        """

    @property
    def streams(self) -> int:
        """Transfers that it carries side by side; more than 1 only where each has a connection of its own."""

    @property
    def received_bytes(self) -> int:
        """Bytes of all transfers so far: it grows while the peer is slow, but not silent."""

    @property
    def alive(self) -> bool:
        """Whether the session can carry another transfer."""

    async def close(self) -> None:
        """Ends the session; transfers in flight fail with TransportError."""


class Outbound(Protocol):
    """The holder's end of a session. `on_device`: it sends DeviceViews."""

    on_device: bool

    async def send(self, transfer: Transfer, spans: Iterator[AnySpan]) -> None:
        """Sends the `transfer.size` bytes of `spans`, advancing it on a worker thread.

        Raises TransportError when the peer goes away or does not read. An error out of `spans` aborts the transfer on
        both ends, keeps the session, and comes out unchanged. Cancelling aborts the transfer on both ends.
        """


class Pace(Protocol):
    """The upload cap of a node, over all its sessions."""

    def take(self, size: int) -> float:
        """Books `size` bytes; returns the seconds to wait before sending them."""

    @property
    def slice_bytes(self) -> int | None:
        """Most bytes to book at once; None without a cap."""


class Transport(Protocol):
    """A data plane of a node: opens sessions as the asker and accepts them as the holder."""

    scheme: str
    reason: str  # for the log: the advantage of this transport where it reaches a peer
    usual_bytes_per_s: float  # of a session that is not measured yet; 0: unknown

    @property
    def address(self) -> str:
        """The address to advertise to peers, in a form of the scheme's own."""

    def reach(self, address: str) -> bool:
        """Whether `connect` may reach a peer's advertised address. Quick; does not dial."""

    async def connect(self, address: str, token: str, *, timeout_s: float) -> Inbound:
        """Opens a session to a peer with the token from its Hello. Raises TransportError."""

    def admit(self, token: str) -> None:
        """Lets a peer open sessions with this token. Other tokens are refused."""

    async def accept(self, token: str, *, timeout_s: float) -> Outbound:
        """The latest session opened with an admitted token, waiting for it up to `timeout_s`. Raises TransportError.

        A peer whose session broke opens another session with the same token.
        """

    async def revoke(self, token: str) -> None:
        """Closes the sessions opened with this token and refuses it from now on."""

    async def close(self) -> None:
        """Closes every session."""


def told_address(transport: Transport) -> str:
    """The address of a transport in Hello: its attribute `told`, if it has one, else its address.

    `*` in it stands for the address at which the receiver reaches the node (messages.AT_NODE).
    """
    return str(getattr(transport, "told", transport.address))


@runtime_checkable
class AdoptingTransport(Transport, Protocol):
    """A transport whose askers dial the port of the node's listener, so that a firewall needs one hole."""

    @property
    def opening(self) -> bytes:
        """The first bytes of such a connection, at most 4, different for each transport of a node."""

    async def adopt(self, sock: socket.socket) -> None:
        """Takes over a connection that begins with `opening`, which is still to be read. Owns the socket, also when it
        raises."""
