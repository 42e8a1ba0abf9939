"""Does torch.compile use in one process what another one compiled, and the swarm brought?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++"),
]

PROGRAM = """
import json, sys
from pathlib import Path
from swarm import Settings
from swarm.engines import compile_caches

role, root, *peers = sys.argv[1:]
settings = Settings(name=role, mdns=False, peers=tuple(peers), cache=Path(root, role), trusted=("127.0.0.1",),
                    compile_caches=True, find_timeout_s=10)
import torch
from torch._dynamo.utils import counters

fields = {"model": "org/model"}
installed = compile_caches.before_compiling(fields, settings) if peers else None

@torch.compile
def layer(x, y):
    return torch.nn.functional.gelu(x @ y).sum(-1) + torch.sin(x).sum(-1)

x = torch.arange(4096, dtype=torch.float32).reshape(64, 64) / 4096
result = layer(x, x).sum().item()
inductor = counters["inductor"]
report = {"result": result, "hits": inductor["fxgraph_cache_hit"], "misses": inductor["fxgraph_cache_miss"],
          "new": installed.new if installed else None}
served = compile_caches.after_warm_up(fields, settings)
print(json.dumps(report | {"address": served.address}), flush=True)
sys.stdin.read()
"""


def start(role: str, root: Path, *peers: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """A process that compiles, with a cache directory of its own; what it reports once it serves its cache."""
    kept = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(root / "home"),
        "PYTHONPATH": ":".join(filter(None, sys.path)),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, role, str(root), *peers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**kept, "TORCHINDUCTOR_CACHE_DIR": str(root / f"inductor-{role}")},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "it did not come to an end"
    return process, json.loads(line)


def test_is_nothing_compiled_twice(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    first, one = start("first", tmp_path)
    try:
        second, other = start("second", tmp_path, one["address"])
        second.communicate(timeout=60)
    finally:
        first.communicate(timeout=60)
    assert (one["hits"], one["misses"]) == (0, 1)
    assert (other["hits"], other["misses"]) == (1, 0)
    assert other["new"] > 0
    assert other["result"] == one["result"]
