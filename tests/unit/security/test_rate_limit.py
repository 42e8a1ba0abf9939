"""Who floods is muted for a while, and nobody else is."""

from __future__ import annotations

from swarm.security.rate_limit import MUTE_S, SENDERS_MAX, RateLimiter


def floods() -> RateLimiter:
    return RateLimiter(rate_per_s=10.0, burst=100.0)


def test_is_who_keeps_to_the_rate_never_muted() -> None:
    made = floods()
    assert not any(made.charge("a", n / 10) for n in range(10_000))
    assert not made.is_muted("a", 1000.0)


def test_is_a_burst_allowed_once_and_again_when_the_allowance_is_back() -> None:
    made = floods()
    assert not any(made.charge("a", 0.0) for _ in range(100))
    assert not any(made.charge("a", 10.0) for _ in range(100))
    assert made.charge("a", 10.0)


def test_is_a_flooder_muted_once_for_each_time_and_no_other() -> None:
    made = floods()
    assert [made.charge("a", 0.0) for _ in range(1000)].count(True) == 1
    assert not made.charge("b", 0.0)
    assert made.is_muted("a", MUTE_S - 0.1)
    assert not made.is_muted("b", 0.0)
    assert not made.is_muted("a", MUTE_S)
    assert not made.charge("a", MUTE_S)


def test_does_no_sender_make_it_remember_more() -> None:
    made = floods()
    for n in range(2 * SENDERS_MAX):
        made.charge(str(n), 0.0)
    assert repr(made) == f"<RateLimiter {SENDERS_MAX} senders, 10 a second each>"


def test_does_a_clock_that_is_set_back_mute_no_sender() -> None:
    made = floods()
    assert not any(made.charge("a", n / 10) for n in range(10))
    assert not any(made.charge("a", n / 10 - 3600.0) for n in range(1000))
    while not made.charge("b", 0.0):
        assert not made.is_muted("b", 0.0)
    assert made.is_muted("b", 0.0)
    assert not made.is_muted("b", -3600.0)
