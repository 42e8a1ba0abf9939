"""What transfers and links need of the node that runs them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

from swarm.peers.peer import Peer
from swarm.protocol.messages import NodeId


class Host(Protocol):
    """What a node does for its fetches and its uploads."""

    id: NodeId
    peers: dict[NodeId, Peer]  # by node id

    def now(self) -> float:
        """Seconds on the node's clock; callable from any thread."""

    def record(self, subject: str, what: object) -> None:
        """Writes to the journal."""

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Runs something until the node closes."""
