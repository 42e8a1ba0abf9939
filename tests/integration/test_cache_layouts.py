"""Each layout of the Hugging Face cache: served, filled, filled again, mended, and judged by huggingface_hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import swarm

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

PROGRAM = Path(swarm.__file__).parent.parent / "bench" / "cache_layouts.py"


def test_does_every_layout_transfer_only_what_is_not_there(tmp_path: Path) -> None:
    """With the installed huggingface_hub; `--python` of the program takes others."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, PROGRAM, "--json"], capture_output=True, text=True, timeout=580, env=environment
    )
    rows = json.loads(ended.stdout)
    assert [row["layout"] for row in rows] == ["links", "shared", "copies", "local_dir"]
    assert [row for row in rows if row["wrong"]] == []
