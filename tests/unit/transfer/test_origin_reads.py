"""Which ranges a node reads, event by event."""

from __future__ import annotations

import numpy as np
import pytest

from swarm.content.promise import ListedFile, Listing, promise
from swarm.protocol.messages import NodeId
from swarm.transfer.origin_reads import STEAL_AFTER_S, OriginReads

FIRST, SECOND = NodeId("1" * 16), NodeId("2" * 16)
CHUNKS = 64
MANIFEST = promise(Listing("o", "", (ListedFile("f", CHUNKS * (256 << 10), "sha256:" + "a" * 64),)))
ALL = np.ones(CHUNKS, dtype=np.bool_)
NONE = ~ALL


def only(*chunks: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    found = NONE.copy()
    found[list(chunks)] = True
    return found


@pytest.fixture
def reads() -> OriginReads:
    made = OriginReads(MANIFEST, node=FIRST)
    made.met([SECOND])
    return made


@pytest.mark.parametrize("held", range(1, CHUNKS - 1))
def test_is_no_range_begun_at_a_chunk_that_a_peer_holds(reads: OriginReads, held: int) -> None:
    reads.told(SECOND, able=True, ranges=[(0, CHUNKS)], now=0.0)
    late = 10 * STEAL_AFTER_S
    found = reads.next(0, late, missing=ALL, elsewhere=only(held))
    assert found
    assert held not in range(found.at, found.end)


def test_is_the_rest_of_a_range_behind_a_held_chunk_a_gap(reads: OriginReads) -> None:
    reads.told(SECOND, able=True, ranges=[(0, CHUNKS)], now=0.0)
    assert reads.next(0, 0.1, missing=ALL, elsewhere=NONE) is None, "it is being read"
    found = reads.next(0, 0.1, missing=ALL, elsewhere=only(40))
    assert found
    assert found.at > 40


def test_does_a_reader_of_what_is_taken_over_stop_there(reads: OriginReads) -> None:
    own = reads.next(0, 0.0, missing=ALL, elsewhere=NONE)
    assert own
    reads.told(SECOND, able=True, ranges=[(own.at + 3, CHUNKS - own.at - 3)], now=1.0)
    assert own.end == own.at + 3


def test_is_a_range_free_again_when_its_reader_leaves(reads: OriginReads) -> None:
    reads.told(SECOND, able=True, ranges=[(0, CHUNKS)], now=0.0)
    assert reads.next(0, 0.1, missing=ALL, elsewhere=NONE) is None
    reads.left(SECOND)
    assert reads.next(0, 0.1, missing=ALL, elsewhere=NONE)
