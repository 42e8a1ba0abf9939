"""Questions to a crowd, asked with many rng seeds. `bench/simulate_sweep.py` asks the same with a thousand.

Few large chunks make a run fast and its ratios worse than they are with a thousand: the bounds hold so that the policy
cannot rot unseen, not to say how good it is. A failing run prints the command that replays it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from swarm.errors import LocalProtocolError
from swarm.simulation.crowd import ORIGIN, Asked, Crowd, Died, Observer
from swarm.simulation.report import BurstReport
from swarm.simulation.setup import SLOWER, Burst
from swarm.transfer import download, download_events
from swarm.transfer.upload import Upload

BURST = Burst(newcomers=8, chunks=20, model_bytes=1_250_000_000)
EVERYTHING = replace(
    BURST, seeds=2, kill_newcomers=0.25, noticed_s=0.2, slow=0.25, late=0.25, spread=0.5, corrupt=0.02, liars=1,
    per_machine=2, racks=2,
)  # fmt: skip

integration = pytest.mark.integration  # more of the same: a second each, or further seeds
each_seed = pytest.mark.parametrize(
    "rng_seed", [*range(5), *(pytest.param(number, marks=integration) for number in range(5, 20))]
)


def played(burst: Burst, observe: Observer | None = None, *, checked: bool = False) -> BurstReport:
    print(burst.command)  # shown when the test fails
    report = Crowd(burst, observe, checked=checked).run()
    assert report.unfinished == []
    return report


@each_seed
def test_does_it_stop_anyone_that_one_of_two_seeds_dies_at_half_time(rng_seed: int) -> None:
    report = played(replace(BURST, seeds=2, kill_seed_at=0.5, rng_seed=rng_seed))
    assert report.last_ratio <= 1.7


@each_seed
def test_is_a_liar_banned_by_all_that_took_from_it_and_no_honest_peer(rng_seed: int) -> None:
    wrong = Counter[tuple[str, str]]()

    def observe(_: float, node: str, what: object) -> None:
        if isinstance(what, download_events.ChunkCorrupt):
            wrong[node, what.peer] += 1

    report = played(replace(BURST, chunks=48, model_bytes=3_000_000_000, liars=1, rng_seed=rng_seed), observe)
    (liar,) = report.liars
    fooled = {node for (node, source), count in wrong.items() if count >= download.CORRUPT_CHUNKS_MAX}
    assert {source for _, source in wrong} == {liar}
    assert {node for node, names in report.banned.items() if liar in names} == fooled
    assert set(report.banned_by) <= {liar}
    assert fooled, "else this asks nothing"
    assert max(wrong.values()) <= 2 * download.CORRUPT_CHUNKS_MAX  # what is on its way arrives after a ban
    assert report.rejected_chunks == wrong.total()


def test_does_a_flash_crowd_of_64_keep_the_upload_of_the_seed_low() -> None:
    report = played(replace(BURST, newcomers=64, chunks=24, model_bytes=1_500_000_000))
    assert report.seed_models <= 2.5
    assert report.last_ratio <= 2.1
    assert report.star_s[-1] >= 60 * report.burst.copy_s


@each_seed
def test_does_a_slow_quarter_slow_the_rest(rng_seed: int) -> None:
    report = played(replace(BURST, slow=0.25, rng_seed=rng_seed))
    assert len(report.slow) == 2
    assert all(report.ratio_of(name) <= 2.25 for name in report.times_s.keys() - report.slow)
    assert all(report.ratio_of(name) <= 1.4 for name in report.slow), f"of a bound that is {SLOWER} times longer"


@each_seed
def test_do_newcomers_that_die_hold_up_the_rest_though_it_is_noticed_late(rng_seed: int) -> None:
    report = played(replace(BURST, kill_newcomers=0.25, noticed_s=0.5, rng_seed=rng_seed))
    assert len(report.killed) == 2
    assert all(report.times_s[name] is None for name in report.killed)
    assert report.last_ratio <= 1.8


@each_seed
def test_is_half_that_joins_late_as_fast_as_the_first(rng_seed: int) -> None:
    report = played(replace(BURST, late=0.5, rng_seed=rng_seed))
    asked_at_s = sorted(report.asked_at_s.values())
    assert asked_at_s[3] < 0.1 * report.burst.copy_s < 0.4 * report.burst.copy_s < asked_at_s[4]
    assert report.last_ratio <= 1.75


@each_seed
def test_do_arrivals_that_are_spread_get_it_as_fast(rng_seed: int) -> None:
    report = played(replace(BURST, spread=1.0, rng_seed=rng_seed))
    assert max(report.asked_at_s.values()) > 0.8 * report.burst.copy_s
    assert report.last_ratio <= 1.6


@each_seed
def test_does_one_chunk_in_a_hundred_that_arrives_wrong_cost_little(rng_seed: int) -> None:
    report = played(replace(BURST, corrupt=0.01, rng_seed=rng_seed))
    assert report.banned == {}, "so little is the wire's fault"
    assert report.last_ratio <= 1.85


@each_seed
def test_does_each_chunk_cross_about_once_into_each_rack(rng_seed: int) -> None:
    report = played(replace(BURST, racks=2, rng_seed=rng_seed))
    assert 0.5 <= report.crossed_models <= 1.6  # one rack of two has the seed; 4 each would be no care at all
    assert report.last_ratio <= 2.4


@each_seed
def test_does_each_chunk_enter_a_machine_of_several_newcomers_about_once(rng_seed: int) -> None:
    report = played(replace(BURST, per_machine=4, rng_seed=rng_seed))
    assert 1.0 <= report.entered_models <= 1.85
    assert report.last_ratio <= 2.4


# Is the simulation itself right?


def test_is_a_run_a_function_of_its_setup() -> None:
    def trace(rng_seed: int) -> tuple[BurstReport, list[str]]:
        lines: list[str] = []
        report = played(
            replace(EVERYTHING, rng_seed=rng_seed), lambda at_s, node, what: lines.append(f"{at_s} {node} {what}")
        )
        return report, lines

    assert trace(3) == trace(3)
    assert trace(3) != trace(4)


@pytest.mark.parametrize("rng_seed", range(3))
def test_do_invariants_hold_after_every_event_whatever_happens(rng_seed: int) -> None:
    played(replace(EVERYTHING, rng_seed=rng_seed), checked=True)


def test_is_a_broken_invariant_told_with_the_command_that_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Upload) -> None:
        raise LocalProtocolError("broken")

    monkeypatch.setattr(Upload, "check", broken)
    with pytest.raises(LocalProtocolError, match=r"<Crowd 8 newcomers, 8 awaited .*broken; replay it with: swarm sim"):
        Crowd(BURST, checked=True).run()


def test_is_told_how_many_chunks_died_with_the_only_seed() -> None:
    report = Crowd(replace(BURST, kill_seed_at=0.5)).run()
    assert len(report.unfinished) == 8
    assert 6 <= report.lost_chunks < 20
    assert report.last_ratio == report.mean_ratio == float("inf")


def test_are_the_doomed_observed_to_ask_and_to_die_while_they_fetch() -> None:
    happened: dict[str, list[object]] = {}

    def observe(_: float, node: str, what: object) -> None:
        if isinstance(what, Asked | Died):
            happened.setdefault(node, []).append(what)

    report = played(replace(BURST, kill_newcomers=0.5, late=0.5, spread=0.5, rng_seed=1), observe)
    assert all(happened[name] == [Asked(), *([Died()] if name in report.killed else [])] for name in report.times_s)


def test_what_would_a_star_take() -> None:
    report = played(replace(BURST, slow=0.125, seeds=2, newcomers=8))
    copy_s = report.burst.copy_s
    # Two seeds send a copy at a time, and one of the copies takes as long as four.
    assert sum(report.star_s) > sum((number // 2 + 1) * copy_s for number in range(8))
    assert report.star_s[0] == pytest.approx(copy_s)
    assert 5 * copy_s <= report.star_s[-1] <= 7.5 * copy_s


def test_what_is_the_repr_of_a_crowd() -> None:
    assert repr(Crowd(BURST)) == "<Crowd 8 newcomers, 8 awaited | 1 seeds | 0 dead | 0.000 s>"


# Without a seed: an origin

GIGABIT = 125e6
COLD = Burst(
    newcomers=8, seeds=0, chunks=100, model_bytes=1_600_000_000, rate_bytes_per_s=GIGABIT, origin_bytes_per_s=GIGABIT
)
RUN_BYTES = 64 << 20
LARGE = pytest.param(64, 8.0, marks=integration)


@pytest.mark.parametrize(
    ("newcomers", "links"), [(8, 0.25), (8, 1.0), (8, 8.0), pytest.param(64, 8.0, marks=integration)]
)
def test_do_newcomers_without_a_seed_split_one_read(newcomers: int, links: float) -> None:
    report = played(replace(COLD, newcomers=newcomers, origin_bytes_per_s=links * GIGABIT))
    assert report.last_ratio <= (1.2 if newcomers == 8 else 1.4)  # 1 s of 12.8 s is for meeting; chunks are large
    assert report.origin_models <= 1.1  # a chunk is 0.01
    assert report.origin_requests <= 1.2 * (COLD.copy_bytes / RUN_BYTES + 1) + min(newcomers, 12)


def test_do_streams_add_up_where_each_is_limited() -> None:
    burst = replace(COLD, origin_bytes_per_s=100 * GIGABIT, origin_each_bytes_per_s=GIGABIT / 16)
    assert played(burst).last_ratio <= 2 * 1.15  # 8 streams of a sixteenth


@each_seed
def test_does_a_seed_that_appears_late_help(rng_seed: int) -> None:
    slow = replace(COLD, chunks=32, origin_bytes_per_s=GIGABIT / 4, rng_seed=rng_seed)
    helped = played(replace(slow, seeds=1, seeds_at=1.0))
    assert max(helped.lived_s) <= 0.75 * slow.bound_s
    assert helped.origin_models <= 0.5


@each_seed
def test_does_every_newcomer_end_without_a_seed_whatever_happens(rng_seed: int) -> None:
    burst = replace(
        EVERYTHING, seeds=0, origin_bytes_per_s=1e9, chunks=64, model_bytes=4_000_000_000, rng_seed=rng_seed
    )
    report = played(burst, checked=True)
    assert report.origin_models <= 3.0  # the dead, the slow and the corrupt have read in vain


# Newcomers that lie about what they read, die while they read, and are held back; bench/disturbances.py has the same.
COLD_DISTURBANCES: dict[str, dict[str, Any]] = {
    "one lies": {"false_claims": 1},
    "two lie, some die": {"false_claims": 2, "kill_newcomers": 0.3, "noticed_s": 0.3},
    "two lie in two ways, some are late or slow": {"false_claims": 1, "liars": 1, "late": 0.3, "slow": 0.2},
    "two may read, some die": {"origin_readers": 2, "kill_newcomers": 0.3, "noticed_s": 0.3},
}
DICED = replace(COLD, newcomers=6, chunks=32, model_bytes=800_000_000)


@pytest.mark.parametrize("rng_seed", range(12))
@pytest.mark.parametrize("changes", list(COLD_DISTURBANCES.values()), ids=list(COLD_DISTURBANCES))
def test_does_no_honest_newcomer_end_with_a_lie(changes: dict[str, Any], rng_seed: int) -> None:
    report = played(replace(DICED, **changes, rng_seed=rng_seed), checked=True)
    assert report.believed_lies == 0
    assert set(report.banned_by) <= report.liars
    assert report.origin_models <= 1.6 + 2 * bool(report.burst.false_claims)  # each reads again what liars had read


@each_seed
def test_is_a_newcomer_that_claims_wrong_digests_banned_by_all_others(rng_seed: int) -> None:
    report = played(replace(DICED, false_claims=1, rng_seed=rng_seed))
    (liar,) = report.liars
    assert report.believed_lies == 0
    assert report.banned_by == {liar: DICED.newcomers - 1}


def test_do_few_newcomers_read_where_few_may() -> None:
    readers: set[str] = set()

    def observe(_: float, node: str, what: object) -> None:
        if isinstance(what, download_events.ChunksVerified) and what.peer == ORIGIN:
            readers.add(node)

    report = played(replace(COLD, origin_readers=2), observe)
    assert len(readers) == 2
    assert report.origin_models <= 1.05
    assert report.last_ratio <= 1.45


def test_is_the_limit_of_a_newcomer_kept_and_used() -> None:
    report = played(replace(COLD, origin_bytes_per_s=100 * GIGABIT, origin_limit_bytes_per_s=GIGABIT / 16))
    assert report.burst.bound_s == pytest.approx(2 * COLD.copy_s)
    assert 1.0 <= report.last_ratio <= 1.15
    assert report.origin_models <= 1.05


@pytest.mark.parametrize(("newcomers", "links", "copies"), [(2, 8.0, 1.0), (2, 0.25, 4.0), (8, 1.0, 1.02)])
def test_how_fast_can_a_burst_without_a_seed_be(newcomers: int, links: float, copies: float) -> None:
    burst = replace(COLD, newcomers=newcomers, origin_bytes_per_s=links * GIGABIT)
    assert burst.bound_s == pytest.approx(copies * burst.copy_s)
