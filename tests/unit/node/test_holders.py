"""What other nodes hold and fetch, by their records: near nodes, and whole artifacts that stay."""

from __future__ import annotations

import pytest

from swarm.content.manifest import Digest, ModelId
from swarm.node import holders
from swarm.protocol.messages import Address, NodeId
from swarm.protocol.packets import Holding, Profile, Record, State
from swarm.transfer.download_events import Mates

DIGEST = Digest("ab" * 32)


def member(number: int, host: str = "", rack: str = "", *, chunks: int = 1, leaving: bool = False) -> Record:
    held = Holding(ModelId("org/model"), DIGEST, "checkpoint", chunks, 4, superseeds=False)
    profile = Profile((held,), host=host, rack=rack, leaving=leaving)
    return Record(NodeId(f"{number:016x}"), 0, State.ALIVE, 0, f"n{number}", (Address(f"10.0.0.{number}:1"),), profile)


def ids(*numbers: int) -> frozenset[NodeId]:
    return frozenset(NodeId(f"{number:016x}") for number in numbers)


def test_are_mates_those_of_the_host_and_of_the_rack() -> None:
    fetching = [member(1, "here", "r1"), member(2, "there", "r1"), member(3, "far", "r2")]
    assert holders.mates(fetching, ("here", "r1")) == Mates(ids(1), ids(1, 2))


def test_says_a_rack_without_a_label_nothing_of_the_distance() -> None:
    assert holders.mates([member(1, "here"), member(2, "there")], ("here", "")) == Mates(ids(1), frozenset())


@pytest.mark.parametrize(
    ("record", "complete"),
    [(member(1, chunks=4), True), (member(1, chunks=3), False), (member(1, chunks=4, leaving=True), False)],
)
def test_may_a_node_leave_what_a_node_that_stays_holds_whole(record: Record, complete: bool) -> None:
    assert holders.complete_without_leaving({}, [record], DIGEST) is complete
    assert not holders.complete_without_leaving({}, [record], Digest("cd" * 32))
