"""A real node that reports its gossip as JSON lines, see `gossip.py --real`.

    python gossip_worker.py NETWORK [CONTACT]

First it prints its address. It answers each line on standard input with the events since the line before. Times are of
the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from swarm.journal import Entry
from swarm.membership.config import SwimConfig, lan, local, wan
from swarm.membership.swim_events import MemberChanged
from swarm.net.host_environment import HostEnvironment, machine_label
from swarm.node.node import Node
from swarm.protocol.messages import Address
from swarm.settings import Settings

NETWORKS: dict[str, SwimConfig] = {"local": local(), "lan": lan(), "wan": wan()}
UDP_IP_BYTES = 28


class Counting(HostEnvironment):
    """A host that counts datagrams."""

    sent_bytes = 0
    sent_datagrams = 0

    def send(self, address: str, datagram: bytes) -> None:
        self.sent_bytes += len(datagram) + UDP_IP_BYTES
        self.sent_datagrams += 1
        super().send(Address(address), datagram)


async def main(network: str, *contacts: str) -> None:
    environment = Counting(Settings(mdns=False, peers=contacts))
    node = Node(environment, network=NETWORKS[network], host=machine_label())
    changes: list[tuple[float, str, str]] = []

    def note(entry: Entry) -> None:
        if isinstance(entry.event, MemberChanged):
            record = entry.event.record
            changes.append((time.monotonic(), record.node, record.state.name))

    node.journal.subscribe(note)
    opened_at = time.monotonic()
    async with node:
        print(json.dumps({"node": node.id, "address": node.address, "opened_at": opened_at}), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            answer: dict[str, Any] = {
                "at": time.monotonic(),
                "known": [record.node for record in node.members()],
                "links": len(node.peers),
                "changes": changes[:],
                "sent_bytes": environment.sent_bytes,
                "sent_datagrams": environment.sent_datagrams,
            }
            changes.clear()
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
