"""Manifests that are requested ahead, and given up."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

from swarm.content.manifest import Digest
from swarm.node import manifest_answers
from swarm.node.manifest_answers import Answers
from swarm.node.node import Node
from swarm.peers.peer import Peer
from swarm.protocol.messages import NodeId


def test_are_manifests_of_ever_new_digests_not_all_kept() -> None:
    async def scenario() -> None:
        async def never(*_: object, **__: object) -> None:
            await asyncio.Event().wait()

        requests = SimpleNamespace(manifest=never, origin=never)
        asked = [Answers(cast(Node, SimpleNamespace(manifest_requests=requests)))]
        with asked[0] as answers:
            peer = cast(Peer, SimpleNamespace(node=NodeId("a" * 16)))
            tasks = [answers.ask(peer, Digest(f"{number:064x}")) for number in range(20)]
            await asyncio.sleep(0)
            assert len(answers._asked) == manifest_answers.ASKED_AHEAD_MAX
            assert answers.ask(peer, Digest(f"{19:064x}")) is tasks[19]
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)

    asyncio.run(asyncio.wait_for(scenario(), 10))
