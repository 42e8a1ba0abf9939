"""Which ranges a node reads, event by event."""

from __future__ import annotations

import numpy as np
import pytest

from swarm.content.promise import ListedFile, Listing, promise
from swarm.protocol.messages import NodeId
from swarm.transfer.origin_rate import WATCH_S
from swarm.transfer.origin_reads import LATE_S, STEAL_AFTER_S, OriginReads

FIRST, SECOND = NodeId("1" * 16), NodeId("2" * 16)
CHUNKS = 64
MANIFEST = promise(Listing("o", "", (ListedFile("f", CHUNKS * (256 << 10), "sha256:" + "a" * 64),)))
BIG = promise(Listing("o", "", (ListedFile("f", 400 << 20, "sha256:" + "a" * 64),)))
BIG_CHUNKS = len(BIG.chunks)
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


def test_is_the_tail_left_to_its_reader_while_the_origin_gives_what_it_can(reads: OriginReads) -> None:
    reads.told(SECOND, able=True, ranges=[(0, CHUNKS)], now=0.0)
    for tick in range(30):  # a chunk for each half second, as fast as ever
        now = tick / 2
        reads.watch(now, missing=ALL, elsewhere=only(*range(tick)))
        found = reads.next(0, now, missing=ALL, elsewhere=only(*range(tick)))
        assert found is None or now < WATCH_S, "until then the rate is not known"
        reads.own.clear()
    for tick in range(30, 40):  # now it stands still
        reads.watch(tick / 2, missing=ALL, elsewhere=only(*range(30)))
    assert reads.next(0, 20.0, missing=ALL, elsewhere=only(*range(30)))


def test_is_a_request_that_is_not_answered_yet_no_slow_read(reads: OriginReads) -> None:
    reads.told(SECOND, able=True, ranges=[(0, CHUNKS)], now=0.0)
    assert reads.next(0, LATE_S - 0.1, missing=ALL, elsewhere=NONE) is None
    assert reads.next(0, LATE_S + 0.1, missing=ALL, elsewhere=NONE)


@pytest.mark.parametrize("readers", [3, 4, 6])
def test_do_streams_that_are_idle_at_once_choose_different_chunks(readers: int) -> None:
    nodes = [NodeId(str(number) * 16) for number in range(readers)]
    slow, idle = nodes[0], nodes[1:]
    taken: list[range] = []
    for node in idle:  # none has told the others yet that its range is over
        reads = OriginReads(BIG, node=node)
        reads.met(nodes)
        reads.told(slow, able=True, ranges=[(0, BIG_CHUNKS)], now=0.0)
        for other in idle:
            if other != node:
                reads.told(other, able=True, ranges=[(BIG_CHUNKS - 1, 1)], now=0.0)
        lacking = np.ones(BIG_CHUNKS, dtype=np.bool_)
        lacking[:2] = lacking[-1] = False
        found = reads.next(0, 10.0, missing=lacking, elsewhere=~lacking)
        assert found
        taken.append(range(found.at, found.end))
    assert len({span.start for span in taken}) == len(taken)
    assert min(span.start for span in taken) > 2, "the slow reader goes on"


def test_are_parts_cut_where_files_end() -> None:
    sizes = [134 << 20, 124 << 20, 132 << 20, 124 << 20]
    files = tuple(ListedFile(f"f{number}", size, "sha256:" + "a" * 64) for number, size in enumerate(sizes))
    manifest = promise(Listing("o", "", files))
    nodes = [NodeId(str(number) * 16) for number in range(8)]
    nothing = np.zeros(len(manifest.chunks), dtype=np.bool_)
    total = 0
    for node in nodes:
        reads = OriginReads(manifest, node=node)
        reads.met(nodes)
        found = reads.next(0, 0.0, missing=~nothing, elsewhere=nothing)
        assert found
        assert found.end == len(nothing) or found.end in manifest.first_chunks or found.at in manifest.first_chunks
        total += found.end - found.at
    assert total == len(nothing), "each part is a single range"
