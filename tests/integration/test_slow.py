"""Is a peer that is merely slow told from one that is silent?"""

from __future__ import annotations

from pathlib import Path

import pytest

from .processes import Machine, contents, write_model

pytestmark = pytest.mark.integration


def test_does_a_chunk_that_takes_longer_than_the_idle_timeout_arrive(
    machine: Machine, tmp_path: Path, out: Path
) -> None:
    model = write_model(tmp_path / "small", size=400_000, seed=1)
    seed = machine.serve(model, "--upload-limit", "100kB/s", environment={"SWARM_CHUNK_BYTES": "1048576"})
    report = machine.fetch(out, peers=[seed.address], environment={"SWARM_IDLE_TIMEOUT_S": "1"}).end().report
    assert report["bytes"] >= 400_000
    assert contents(out) == contents(model)
