"""Which holders a model id is believed: machines that may introduce a model, and publishers that sign digests.

The address of a link is proven by its packets, that of gossip is not: only a linked peer introduces. A holder may
withhold signatures, so every linked one is asked.

Must not know: manifests' contents, which digest is wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from swarm.content.manifest import Digest, Manifest, ModelId
from swarm.errors import SettingsError
from swarm.node.holders import Holder
from swarm.node.manifest_answers import LINK_S, ORIGIN_TIMEOUT_S
from swarm.node.node import Node
from swarm.peers.peer import Peer
from swarm.protocol.messages import NodeId, Origin, Signature
from swarm.security.signatures import valid
from swarm.settings import split_address

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Signed:
    """The digests that a publisher signed, with the signatures that hold, as holders send them.

    A holder may withhold signatures, so every linked one is asked, each once for a digest.
    """

    def __init__(self, node: Node, model_id: ModelId, revision: str | None) -> None:
        self.found: dict[Digest, tuple[Signature, ...]] = {}
        self._node = node
        self._model_id = model_id
        self._revision = revision
        self._asked: set[tuple[NodeId, Digest]] = set()

    async def ask(self, holders: Mapping[Digest, list[Holder]]) -> None:
        """Asks the holders of digests without a signature that holds. Opens links where there are none."""
        await asyncio.gather(*(self._ask(d, nodes) for d, nodes in holders.items() if d not in self.found))

    def sealed(self, answer: tuple[Manifest, Origin | None]) -> tuple[Manifest, Origin | None]:
        """The answer with these signatures in its provenance: who sent it may have withheld them."""
        manifest, origin = answer
        return manifest, (origin or Origin("", {})).signed(self.found[manifest.digest])

    async def _ask(self, digest: Digest, holders: list[Holder]) -> None:
        if own := self._node.described(digest):
            self._take(digest, own[1])
        peers = [holder.peer for holder in holders if holder.peer and (holder.node, digest) not in self._asked]
        if not peers:
            with self._node.seeking(digest):
                await self._node.changed(LINK_S)
        for peer in peers:
            if digest in self.found:
                return
            self._asked.add((peer.node, digest))
            self._take(digest, await self._node.manifest_requests.origin(peer, digest, timeout_s=ORIGIN_TIMEOUT_S))

    def _take(self, digest: Digest, origin: Origin | None) -> None:
        offered = origin.signatures if origin else ()
        if held := valid(offered, self._node.publishers, self._model_id, digest, revision=self._revision):
            self.found[digest] = held


def networks(trusted: Sequence[str]) -> list[Network]:
    """The networks of `trusted`, which Settings has checked."""
    return [ipaddress.ip_network(network, strict=False) for network in trusted]


def introduced(holders: Mapping[Digest, list[Holder]], trusted: Sequence[Network]) -> dict[Digest, list[Holder]]:
    """The digests that a peer on a trusted machine announces."""
    return {
        digest: nodes
        for digest, nodes in holders.items()
        if any(holder.peer and may_introduce(holder.peer, trusted) for holder in nodes)
    }


def may_introduce(peer: Peer, trusted: Sequence[Network]) -> bool:
    """Whether a peer is on a trusted machine."""
    with contextlib.suppress(SettingsError, ValueError):  # a peer in this process, or at a host name
        address = ipaddress.ip_address(split_address("peer", peer.link.remote)[0])
        return any(address in network for network in trusted)
    return False
