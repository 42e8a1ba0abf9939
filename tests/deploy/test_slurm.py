"""The batch script of Slurm, with a `srun` and a `scontrol` that are played in network namespaces."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("dnslib", reason="needs dnslib (pip install -e '.[deploy]')")
from played.cluster import hosts
from played.pod import inside

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy/slurm/swarm.sbatch"
JOB = "4242"

# A task for each node of the job, at the same time, with the variables that slurmd sets. $TMP is each machine's disk.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
number=0
for node in $PLAYED_NODES; do
  env SLURM_PROCID=$number SLURM_NODEID=$number SLURM_LOCALID=0 SLURM_NTASKS=3 SLURMD_NODENAME=node$number \\
    SLURM_TOPOLOGY_ADDR=spine.$(printf 'leaf%040d' $((number / 2))).node$number SWARM_HOST=node$number \\
    ip netns exec "$node" unshare --mount --propagation private bash -c \\
    'mount --bind "$0/$SLURMD_NODENAME" "$SLURM_TMPDIR"; exec "$@"' "$PLAYED_DISKS" "$@" &
  pids+=($!); number=$((number + 1))
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$1 $2 $3" == "show hostnames node[0-2]" ]] && printf '%s\\n' $PLAYED_ADDRESSES
"""


def script(text: str, path: Path) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
@pytest.mark.parametrize("path", ["deploy/slurm/swarm.sbatch", "deploy/kubernetes/render", ".ci/kubectl"])
def test_has_shellcheck_nothing_to_complain_of(path: str) -> None:
    done = subprocess.run(["shellcheck", ROOT / path], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.integration
@pytest.mark.skipif(bool(why := hosts.lacking()), reason=str(why))
def test_do_the_machines_of_a_job_fetch_one_copy_onto_their_own_disks(tmp_path: Path) -> None:
    from hub import Hub, Model

    files = {"model.safetensors": made_up(12_000_000), "config.json": b"{}"}
    programs, disks, local, submit = (tmp_path / name for name in ("bin", "disks", "local", "submit"))
    for folder in (programs, local, submit, *(disks / f"node{number}" for number in range(3))):
        folder.mkdir(parents=True)
    script(SRUN, programs / "srun")
    script(SCONTROL, programs / "scontrol")
    script(f'#!/bin/sh\nexec {sys.executable} -m swarm "$@"\n', programs / "swarm")
    with hosts.Network(bits_per_s=10**9, size=4) as network:
        outside, *nodes = (network.host() for _ in range(4))
        served = {"org/model": Model(files)}
        with inside(outside.namespace, lambda: Hub(served, host=outside.address, total=20e6)) as hub:
            environment = {
                "PATH": f"{programs}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "HOME": str(tmp_path),
                "HF_ENDPOINT": hub.endpoint,
                "SLURM_JOB_ID": JOB,
                "SLURM_JOB_NODELIST": "node[0-2]",
                "SLURM_SUBMIT_DIR": str(submit),
                "SLURM_TMPDIR": str(local),
                "PLAYED_NODES": " ".join(node.namespace for node in nodes),
                "PLAYED_ADDRESSES": " ".join(node.address for node in nodes),
                "PLAYED_DISKS": str(disks),
            }
            program = "import json,os,sys; print(json.dumps([sys.argv[1], sorted(os.listdir(sys.argv[1]))]))"
            command = ["bash", str(SCRIPT), "org/model", sys.executable, "-c", program, "$MODEL_DIR"]
            done = subprocess.run(
                command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False
            )
            assert done.returncode == 0, done.stderr
            directory = f"{local}/swarm-{JOB}/model"
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
            assert lines == [[directory, ["config.json", "model.safetensors"]]] * 3
            assert len(re.findall(r"-> \S+/model: complete, 12 MB", done.stderr)) == 3
            assert hub.sent_bytes < 2 * 12_000_000, "three machines read about one copy"
    assert not list(submit.iterdir()), "the key is removed"
    assert not [path for path in disks.rglob("*") if path.is_file()], "the disks are left as they were"


def made_up(size: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + os.urandom(size)
