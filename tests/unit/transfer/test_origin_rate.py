"""When another stream gains nothing."""

from __future__ import annotations

import numpy as np
import pytest

from swarm.transfer.origin_rate import WATCH_S, OriginRate

CHUNKS = 200
SIZES = np.full(CHUNKS, 1 << 20)
ALL = np.ones(CHUNKS, dtype=np.bool_)


def watched(rate: OriginRate, *, begin_s: float, end_s: float, read: float, per_s: float) -> float:
    """Watches chunks that are read in order. Returns how many are read in the end."""
    for tick in range(int((end_s - begin_s) * 4)):
        at_s = begin_s + tick / 4
        rate.watch(at_s, wanted=np.arange(CHUNKS) >= int(read + (at_s - begin_s) * per_s), busy=ALL)
    return read + (end_s - begin_s) * per_s


def test_is_it_full_while_it_is_as_fast_as_ever() -> None:
    rate = OriginRate(SIZES)
    read = watched(rate, begin_s=0, end_s=WATCH_S, read=0, per_s=10)
    assert not rate.full, "too new to tell"
    read = watched(rate, begin_s=WATCH_S, end_s=10, read=read, per_s=10)
    assert rate.full
    assert rate.bytes_per_s == pytest.approx(10 * (1 << 20), rel=0.1)
    watched(rate, begin_s=10, end_s=10 + WATCH_S, read=read, per_s=3)
    assert not rate.full


def test_does_a_node_that_brings_chunks_count_as_no_read() -> None:
    rate = OriginRate(SIZES)
    for tick in range(40):
        wanted = np.arange(CHUNKS) >= (100 if tick > 20 else 0)
        rate.watch(tick / 4, wanted=wanted, busy=~ALL)
    assert rate.bytes_per_s == 0
    assert not rate.full


def test_what_is_its_repr() -> None:
    rate = OriginRate(SIZES)
    assert repr(rate) == "<OriginRate 0.0 MB/s, at most 0.0 so far>"
