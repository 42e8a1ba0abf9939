"""A few of the runs of bench/faults.py: six processes that are killed, stopped, cut off and out of room."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
RUNS = 6
DEADLINE_S = 240.0


@pytest.mark.skipif(os.geteuid() != 0, reason="a network and disks of its own need root")
@pytest.mark.timeout(2 * DEADLINE_S)
def test_do_faults_end_in_the_whole_model_or_in_a_clear_error() -> None:
    argv = [sys.executable, "bench/faults.py", "--seeds", str(RUNS), "--first", "1000", "--jobs", "2"]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for words in (f"runs: {RUNS}", "wrong bytes: 0", "hung: 0", "unclear: 0"):
        assert words in ran.stdout.splitlines()
