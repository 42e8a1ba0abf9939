"""The dashboard's pages that ask other members: what do they say where nobody answers?"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from swarm.content.manifest import Digest
from swarm.dashboard.server import Dashboard, Watched
from swarm.errors import PeerUnreachable
from swarm.observe.node_report import NodeReport
from swarm.protocol.messages import Address, NodeId
from swarm.protocol.packets import Profile, Record, State

DIGEST, ME, ANN = Digest("d" * 64), "0" * 16, NodeId("a" * 16)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("said", [None, b"no timeline"])
def test_is_a_member_that_tells_no_timeline_silent(*, known: bool, said: bytes | None) -> None:
    async def read(address: str, *_: Any) -> bytes:
        if said is None:
            raise PeerUnreachable(address, "is gone")
        return said

    ann = Record(ANN, 0, State.ALIVE, 0, "ann", (Address("127.0.0.1:2"),), Profile())
    node = SimpleNamespace(id=ME, address="127.0.0.1:1", members=lambda: [ann] if known else [], now=lambda: 0.0)
    dashboard = Dashboard(NodeReport())
    dashboard.attach(cast(Watched, node), read)
    assert asyncio.run(dashboard.timeline_of(DIGEST, ANN)) == {"node": ANN, "digest": DIGEST, "silent": True}
    assert asyncio.run(dashboard.timeline_of(DIGEST, ME)) is None
