"""Newcomers come and go; what their source and this process use comes back to where it was."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from pathlib import Path

import pytest
import torch

import swarm
from swarm.settings import Settings

from .conftest import StartSource, joining
from .sources import MODEL, state

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

WARM = 10
SETTLE_S = 20.0


def used(process: int) -> tuple[int, int, int]:
    """File descriptors, threads, resident MiB of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return len(os.listdir(f"/proc/{process}/fd")), int(fields["Threads"]), int(fields["VmRSS"].split()[0]) >> 10


def free_mib() -> int:
    """Of the GPU, which source and newcomer share."""
    return int(torch.cuda.mem_get_info()[0]) >> 20


def rounds(settings: Settings, into: dict[str, torch.Tensor], count: int) -> None:
    for number in range(count):
        given = dataclasses.replace(settings, name=f"newcomer{number}")  # a node of its own each time
        swarm.fetch(MODEL, into=into, settings=given, timeout_s=60).close()


@pytest.mark.parametrize(("scheme", "count"), [("cuda_ipc", 200), ("nccl", 100)])
def test_nothing_is_left_behind(
    start: StartSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, count: int
) -> None:
    monkeypatch.setenv("NCCL_HOSTID", "newcomer")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    named = {"transports": "nccl"} if scheme == "nccl" else {}
    source = start(environment={"NCCL_HOSTID": "source", "NCCL_SOCKET_IFNAME": "lo"}, **named)
    settings = joining(tmp_path, source, transports=tuple(named.values()))
    into = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    into["tied"] = into["layer0"]
    processes = (source.process.pid, os.getpid())
    rounds(settings, into, WARM)
    before = [used(process) for process in processes]
    memory, free = torch.cuda.memory_allocated(), free_mib()
    rounds(settings, into, count)
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        gc.collect()
        after = [used(process) for process in processes]
        back = all(now[0] <= then[0] + 2 and now[1] <= then[1] + 2 for now, then in zip(after, before, strict=True))
        if back and free_mib() >= free - 64:
            break
        time.sleep(0.1)
    print(
        f"{scheme}, {count} newcomers: descriptors, threads, MiB of source and newcomer {before} -> {after}", end="; "
    )
    print(f"the GPU's free MiB {free} -> {free_mib()}")
    for now, then in zip(after, before, strict=True):
        assert now[0] <= then[0] + 2, "descriptors"
        assert now[1] <= then[1] + 2, "threads"
        kept = 5 * count if scheme == "nccl" else 0  # MiB: NCCL keeps some of the host's for each that it aborts
        assert now[2] <= then[2] + 200 + kept, "memory"
    assert torch.cuda.memory_allocated() <= memory + (1 << 20)
    assert free_mib() >= free - 64, "buffers of communicators, or memory of other processes that is still open"
