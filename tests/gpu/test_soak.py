"""Newcomers come and go; what their source and this process use comes back to where it was."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import swarm
from swarm.settings import Settings
from swarm.transport import nccl

from .conftest import Source, StartSource, joining
from .sources import MODEL, state, trim

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

WARM = 150  # until malloc's arenas, of which each thread that NCCL starts may take another, have all been used
COUNT = 200
SETTLE_S = 20.0  # communicators end behind their sessions, a third of a second each
QUIET_S = 1.5  # longer than any of what goes on after a session


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


@dataclass
class Communicators:
    """How many were made and how many have ended, here; and how many of those by being aborted."""

    made: int = 0
    ended: int = 0
    aborted: int = 0


@pytest.fixture
def communicators(monkeypatch: pytest.MonkeyPatch) -> Communicators:
    counts = Communicators()
    real_end, real_abort = nccl._end, nccl._abort

    class Counted(nccl.NcclLane):
        def __init__(self, *args: object, **named: object) -> None:
            super().__init__(*args, **named)  # type: ignore[arg-type]
            counts.made += 1

    def end(*args: Any) -> None:
        aborted = counts.aborted
        real_end(*args)
        counts.ended += counts.aborted == aborted

    def abort(*args: Any) -> None:
        real_abort(*args)
        counts.aborted += 1
        counts.ended += 1

    monkeypatch.setattr(nccl, "NcclLane", Counted)
    monkeypatch.setattr(nccl, "_end", end)
    monkeypatch.setattr(nccl, "_abort", abort)
    return counts


def settled(source: Source, communicators: Communicators) -> tuple[list[tuple[int, int, int]], int]:
    """What source and newcomer use, and the GPU's free MiB, once nothing of it has changed for a while."""
    deadline, since, before = time.monotonic() + SETTLE_S, time.monotonic(), None
    while time.monotonic() < deadline and (
        time.monotonic() < since + QUIET_S or communicators.made > communicators.ended
    ):
        gc.collect()
        now = [used(process)[:2] for process in (source.process.pid, os.getpid())], free_mib()
        if now != before:
            before, since = now, time.monotonic()
        time.sleep(0.1)
    source.trim(SETTLE_S)
    trim()
    return [used(process) for process in (source.process.pid, os.getpid())], free_mib()


@pytest.mark.parametrize("scheme", ["cuda_ipc", "nccl"])
def test_nothing_is_left_behind(
    start: StartSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, communicators: Communicators, scheme: str
) -> None:
    monkeypatch.setenv("NCCL_HOSTID", "newcomer")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    named = {"transports": "nccl"} if scheme == "nccl" else {}
    source = start(environment={"NCCL_HOSTID": "source", "NCCL_SOCKET_IFNAME": "lo"}, **named)
    settings = joining(tmp_path, source, transports=tuple(named.values()))
    into = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    into["tied"] = into["layer0"]
    rounds(settings, into, WARM)
    before, free = settled(source, communicators)
    memory, began = torch.cuda.memory_allocated(), time.monotonic()
    rounds(settings, into, COUNT)
    took_s = time.monotonic() - began
    after, free_after = settled(source, communicators)
    print(f"{scheme}, {COUNT} newcomers in {took_s:.0f} s, {communicators}")
    print(f"descriptors, threads, MiB of source and newcomer, trimmed: {before} -> {after}; ", end="")
    print(f"the GPU's free MiB {free} -> {free_after}")
    for now, then in zip(after, before, strict=True):
        assert now[0] <= then[0] + 2, "descriptors"
        assert now[1] <= then[1] + 2, "threads"
        assert now[2] <= then[2] + COUNT // 8, "memory"  # an eighth of a MiB for each
    assert communicators == Communicators(*([WARM + COUNT] * 2 if scheme == "nccl" else []))
    assert torch.cuda.memory_allocated() <= memory + (1 << 20)
    assert free_after >= free - 64, "buffers of communicators, or memory of other processes that is still open"
