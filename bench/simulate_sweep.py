"""The questions of tests/sim/test_crowd.py with a thousand random seeds: `python bench/simulate_sweep.py --runs 1000`.

Prints each question's median and worst ratio (the last newcomer over its lower bound) with the seed of the worst, and
the command that replays each failure: a newcomer that did not finish, a rule that a machine broke, an honest newcomer
that was banned, a newcomer that ended with a lie. Every run is a function of its burst, so the machine does not matter.
Exits 1 after a failure.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace

from disturbances import COLD_DISTURBANCES, DISTURBANCES

from swarm.cli.simulate import Outcome, failure, play_each
from swarm.simulation.report import BurstReport
from swarm.simulation.setup import Burst

CHUNK_BYTES = 62_500_000  # few large chunks: fast to simulate


def wrong(outcome: Outcome) -> str | None:
    """The failure of a run, with the command that replays it."""
    if line := failure(outcome):
        return line
    assert isinstance(outcome, BurstReport)
    if outcome.believed_lies:
        return f"{outcome.believed_lies} newcomers ended with a lie; replay it with: {outcome.burst.command}"
    honest = outcome.banned_by.keys() - outcome.liars
    return (
        f"{', '.join(sorted(honest))} banned though honest; replay it with: {outcome.burst.command}" if honest else None
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="rng seeds of each question")
    parser.add_argument("--first", type=int, default=0, help="the first rng seed")
    parser.add_argument("--newcomers", type=int, default=8)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--cold", action="store_true", help="only the questions without a seed")
    given = parser.parse_args()
    base = Burst(newcomers=given.newcomers, chunks=given.chunks, model_bytes=given.chunks * CHUNK_BYTES)
    cold = replace(base, seeds=0, chunks=32, model_bytes=32 * CHUNK_BYTES, origin_bytes_per_s=base.rate_bytes_per_s)
    failures = 0
    asked = [(words, replace(base, **changes)) for words, changes in DISTURBANCES.items() if not given.cold]
    asked += [(f"without a seed: {words}", replace(cold, **changes)) for words, changes in COLD_DISTURBANCES.items()]
    for words, question in asked:
        if question.racks > 2 or question.per_machine > 4:  # as many as so few newcomers fill
            question = replace(question, racks=min(question.racks, 2), per_machine=min(question.per_machine, 4))
        bursts = [replace(question, rng_seed=given.first + number) for number in range(given.runs)]
        outcomes = list(play_each(bursts))
        reports = [outcome for outcome in outcomes if isinstance(outcome, BurstReport)]
        lines = [line for outcome in outcomes if (line := wrong(outcome))]
        failures += len(lines)
        if reports:
            worst = max(reports, key=lambda report: report.last_ratio)
            median = statistics.median(report.last_ratio for report in reports)
            seeds = max(report.seed_models + report.origin_models for report in reports)
            print(
                f"{words}: median {median:.2f}, worst {worst.last_ratio:.2f} (rng seed {worst.burst.rng_seed}), seeds "
                f"or origin sent at most {seeds:.2f} models, {len(lines)} of {len(outcomes)} failed",
                flush=True,
            )
        for line in lines:
            print(f"  {line}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
