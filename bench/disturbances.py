"""Disturbances of a simulated burst: changes to a `Burst`, by their names in the printed table."""

from __future__ import annotations

from typing import Any

DISTURBANCES: dict[str, dict[str, Any]] = {
    "undisturbed": {},
    "10 % die": {"kill_newcomers": 0.1},
    "10 % die, noticed after 1 s": {"kill_newcomers": 0.1, "noticed_s": 1.0},
    "10 % die, noticed after 10 s": {"kill_newcomers": 0.1, "noticed_s": 10.0},
    "one of two seeds dies at half time": {"seeds": 2, "kill_seed_at": 0.5},
    "10 % at a quarter of the speed": {"slow": 0.1},
    "half join at half time": {"late": 0.5},
    "arrivals spread over the time": {"spread": 1.0},
    "1 % arrive corrupt": {"corrupt": 0.01},
    "one liar": {"liars": 1},
    "four racks behind 4:1": {"racks": 4},
    "eight newcomers a machine": {"per_machine": 8},
}

# Of a burst without a seed: newcomers that lie about what they read, die while they read, and are held back.
COLD_DISTURBANCES: dict[str, dict[str, Any]] = {
    "one claims wrong digests": {"false_claims": 1},
    "two claim wrong digests, 30 % die": {"false_claims": 2, "kill_newcomers": 0.3, "noticed_s": 0.3},
    "wrong digests, wrong bytes, late and slow": {"false_claims": 1, "liars": 1, "late": 0.3, "slow": 0.2},
    "two may read, and 30 % die": {"origin_readers": 2, "kill_newcomers": 0.3, "noticed_s": 0.3},
}
