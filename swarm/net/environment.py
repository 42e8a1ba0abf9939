"""What a node needs of its surroundings: links, datagrams and transports to other nodes, discovery, and a clock.

`Environment` is the seam between a node and all sockets and clocks: `host_environment` is the real one, the simulation
has another implementation.

Must not know: sockets, files, settings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias

from swarm.net.link import Link
from swarm.net.udp import Hear
from swarm.protocol.messages import Address, NodeId
from swarm.transport import Transport

Found: TypeAlias = Callable[[tuple[Address, ...], bool], None]  # (addresses of a node, named by the user)


class Environment(Protocol):
    """The network and the clock of a node."""

    transports: Sequence[Transport]  # preferred first; usable once open

    @property
    def addresses(self) -> tuple[Address, ...]:
        """What this node tells of itself, the best first. They may change; empty if it can only dial."""

    @property
    def local(self) -> Address:
        """The address at which programs of this machine reach the node."""

    @property
    def on_loopback(self) -> bool:
        """Whether only programs of this machine reach the node."""

    @property
    def confined(self) -> bool:
        """Whether the node talks to its own machine only."""

    @property
    def names_peers(self) -> bool:
        """Whether the user named nodes to join through."""

    @property
    def unresolved(self) -> Sequence[str]:
        """A line for each of their names that is not known just now."""

    @property
    def resolving(self) -> bool:
        """Whether one of their names is still looked up for the first time."""

    async def open(
        self,
        node: NodeId,
        accept: Callable[[Link], Awaitable[None]],
        found: Found,
        hear: Hear,
    ) -> Address:
        """Listens and discovers; returns the address to show to users: one that peers dial, if there is any.

        Awaits `accept` for each incoming link, for as long as the link lives. Calls `found(addresses, lasting)` for
        each discovered node and `hear(source, datagram)` for each datagram.
        """

    async def dial(self, addresses: Sequence[Address]) -> Link:
        """A link to the node at one of these addresses, tried side by side; `remote` tells which. Raises PeerError."""

    def port_at(self, local: str) -> int:
        """The port at which others reach this node where a link of its own comes from; 0 if they cannot."""

    def reached(
        self, claimed: Sequence[str], *, remote: str | None = None, port: int = 0, dialled: Address | None = None
    ) -> tuple[Address, ...]:
        """The addresses at which another node may be dialled, the best first.

        `claimed`: told over a link from `remote`, or by gossip without one. With `port` or `dialled` the node is the
        one at the other end of the link.
        """

    def send(self, address: Address, datagram: bytes) -> None:
        """Sends a datagram, which may get lost. Never waits or raises."""

    def drain(self) -> None:
        """Delivers the datagrams that wait in the socket."""

    @property
    def paused_s(self) -> float:
        """Seconds that this process stood still so far; the loop's clock leaves them out (`pausing_loop`)."""

    async def close(self) -> None:
        """Closes everything, within the timeouts of its parts."""
