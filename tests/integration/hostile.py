"""A node that has gone bad, for attacks on a real one: links, greetings and datagrams as it likes them.

With the cluster's key it is a member; without one every node is. Used by test_adversary and by bench/floods.py.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator

from swarm.net.link import Link
from swarm.net.websocket import HttpLinks
from swarm.protocol import messages, packets
from swarm.protocol.messages import Address, Announcement, Endpoint, Hello, NodeId
from swarm.security.certificates import Identity
from swarm.security.cluster_key import Keyring
from swarm.security.datagram_seal import Sealer
from swarm.settings import split_address

ADDRESS = Address("127.0.0.1:9")  # where no program listens
DIAL_TIMEOUT_S = 30.0


class Hostile:
    """A bad node, and the address of its target."""

    def __init__(self, target: str, keyring: Keyring | None) -> None:
        self.target, self.keyring = target, keyring
        self.host, self.port = split_address("peer", target)
        self._sealer = Sealer(keyring.seal_keys[0], secrets.token_bytes) if keyring else None

    def identity(self, *, keyring: Keyring | None = None, node: str | None = None) -> Identity:
        """A certificate of the cluster, or of another key."""
        keyring = keyring or self.keyring
        assert keyring
        return Identity(keyring, node or secrets.token_hex(8), now_s=time.time())

    def membership(self) -> Identity | None:
        """What a member proves itself with; None where no node has a key."""
        return self.identity() if self.keyring else None

    def seal(self, packet: packets.Packet, *, at_s: float | None = None) -> bytes:
        """The datagram of a packet."""
        data = packets.encode(packet)
        return self._sealer.seal(data, time.time() if at_s is None else at_s) if self._sealer else data

    @contextlib.asynccontextmanager
    async def linked(self, identity: Identity | None) -> AsyncIterator[Link]:
        """A link over which neither side has said anything."""
        links = HttpLinks()

        async def unwelcome(link: Link) -> None:
            await link.close()

        await links.open(unwelcome, identity=identity)
        try:
            link = await links.dial(self.target, timeout_s=DIAL_TIMEOUT_S)
            try:
                yield link
            finally:
                await link.close()
        finally:
            await links.close()

    @contextlib.asynccontextmanager
    async def greeted(self, *, name: str = "mallory") -> AsyncIterator[Link]:
        """A link of a new member over which greetings were exchanged."""
        identity = self.membership()
        async with self.linked(identity) as link:
            await link.send(hello(identity.node if identity else secrets.token_hex(8), name=name))
            assert isinstance(await link.receive(), Hello)
            yield link


def hello(
    node: str,
    *artifacts: Announcement,
    address: Address = ADDRESS,
    name: str = "mallory",
    transports: tuple[Endpoint, ...] = (Endpoint("tls", messages.AT_NODE),),
) -> Hello:
    """The greeting of a node."""
    token = secrets.token_hex(16)
    return Hello(messages.PROTOCOL, "9.9", NodeId(node), name, 0, (address,), token, transports, artifacts)


async def read_on(link: Link) -> None:
    """Raises SwarmError once the target has ended the link."""
    while True:
        await link.receive()
