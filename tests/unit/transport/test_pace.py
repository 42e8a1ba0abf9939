"""Does the cap hold, however it is used?"""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import SettingsError
from swarm.transport.pace import BURST_S, SLICE_BYTES_MIN, TokenBucket, Unlimited


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def most_in_one_second(sent: list[tuple[float, int]]) -> int:
    return max(sum(size for at_s, size in sent if start <= at_s < start + 1) for start, _ in sent)


@given(
    rate=st.sampled_from([2e6, 100e6, 5e9]),
    pauses=st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.03, 0.7]), min_size=1, max_size=300),
)
def test_no_second_carries_more_than_five_percent_too_much(rate: float, pauses: list[float]) -> None:
    clock = Clock()
    bucket = TokenBucket(rate, clock=clock)
    size = bucket.slice_bytes or 0
    sent = []
    for pause in pauses:
        clock.now_s += pause
        clock.now_s += bucket.take(size)
        sent.append((clock.now_s, size))
    assert most_in_one_second(sent) <= rate * 1.05 + 1


def test_a_busy_sender_gets_the_whole_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(10e6, clock=clock)
    sent = 0
    while clock.now_s < 5:
        clock.now_s += bucket.take(100_000) + 0.0001  # sending takes time too, which is not lost
        sent += 100_000
    assert sent >= 0.99 * 5 * 10e6


def test_several_senders_share_one_cap() -> None:
    clock = Clock()
    bucket = TokenBucket(1e6, clock=clock)
    waits: list[float] = []
    booked = threading.Lock()

    def book() -> None:
        for _ in range(250):
            wait_s = bucket.take(1000)
            with booked:
                waits.append(wait_s)

    threads = [threading.Thread(target=book) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(waits) == pytest.approx(1.0)  # a million bytes, none of them earned before
    assert len({round(wait_s, 6) for wait_s in waits}) == 1000  # each slice has its own turn


def test_unused_rate_is_saved_only_for_a_moment() -> None:
    clock = Clock()
    bucket = TokenBucket(1e6, clock=clock)
    clock.now_s += 3600
    assert bucket.take(int(1e6 * BURST_S)) == 0
    assert bucket.take(1000) == pytest.approx(0.001)


@pytest.mark.parametrize(("rate", "slice_bytes"), [(1000, SLICE_BYTES_MIN), (10e6, 200_000), (10e9, 200_000_000)])
def test_slices_follow_the_rate(rate: float, slice_bytes: int) -> None:
    assert TokenBucket(rate).slice_bytes == slice_bytes


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_rate_that_never_sends_is_refused(rate: float) -> None:
    with pytest.raises(SettingsError):
        TokenBucket(rate)


def test_a_cap_changes_for_what_is_sent_from_now_on() -> None:
    bucket = TokenBucket(None)
    assert (bucket.take(1 << 40), bucket.slice_bytes) == (0.0, None)
    bucket.change(1e6)
    assert bucket.take(10_000_000) > 9.0
    assert bucket.slice_bytes == 20_000
    bucket.change(None)
    assert bucket.take(1 << 40) == 0.0
    with pytest.raises(SettingsError):
        bucket.change(0.0)


def test_no_cap_never_waits() -> None:
    assert Unlimited().take(1 << 40) == 0
    assert Unlimited().slice_bytes is None
