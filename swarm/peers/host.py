"""Interfaces of a node to the parts that it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

from swarm.peers.peer import Peer
from swarm.protocol.messages import Address, Hello, NodeId


class Host(Protocol):
    """Clock, journal, tasks and peers of the node."""

    id: NodeId
    name: str

    @property
    def peers(self) -> Mapping[NodeId, Peer]:
        """The linked nodes. `peers.connections_driver` owns them."""

    def now(self) -> float:
        """Seconds on the node's clock; callable from any thread."""

    def record(self, subject: str, event: object) -> None:
        """Writes to the journal."""

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Starts a task that ends with the node."""


class LinkHost(Host, Protocol):
    """What the connections driver needs of the node in addition."""

    def hello(self, token: str, port: int) -> Hello:
        """The node's Hello. The receiver presents `token` when it opens a session to a transport of this node.

        `port`: at which the receiver reaches this node where the link comes from; 0 if it cannot.
        """

    def dialled(self, address: Address) -> None:
        """A node at this address accepted a link."""

    def peer_joined(self, peer: Peer) -> None:
        """`peer` is in `peers` now."""

    def peer_left(self, peer: Peer, why: str) -> None:
        """`peer` is not in `peers` any more. All that was agreed over its link has ended."""

    def peers_changed(self) -> None:
        """A peer joined or left, announced artifacts, or could not be dialled."""
