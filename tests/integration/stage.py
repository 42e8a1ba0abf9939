"""A swarm to look at: a seed and seven replicas as real processes on labelled hosts and racks, all capped so that a
fetch takes as long as a person looks; one replica's network is slow, and a peer beside them lies.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from swarm.content.manifest import Chunk
from swarm.store import Span
from swarm.transport import Outbound, Transfer

from .lying import LyingPeer
from .processes import MODEL, Machine, Process, write_model

PLACES = (("h1", "a"), ("h1", "a"), ("h2", "a"), ("h2", "a"), ("h3", "b"), ("h3", "b"), ("h4", "b"))  # of replicas
SLOW = 6  # the number of the slow replica
TRACED = 1  # one of those that met the liar
MET_THE_LIAR = (1, 4)  # the others hear of it over links
SLOW_BYTES_PER_S = 700_000

# Read by Python itself as the slow replica starts: its host's network brings so much and no more.
SLOW_NETWORK = f"""
import socket, threading, time
wire = threading.Lock()
def slowed(receive):
    def received(*args, **kwargs):
        got = receive(*args, **kwargs)
        with wire:
            time.sleep((got[0] if isinstance(got, tuple) else got) / {SLOW_BYTES_PER_S})
        return got
    return received
socket.socket.recv_into = slowed(socket.socket.recv_into)
socket.socket.recvmsg_into = slowed(socket.socket.recvmsg_into)
"""


class Liar(LyingPeer):
    """Sends zeros. `lied_at_s` is when its first transfer had gone out, on the clock of `time.time`."""

    lied_at_s: float | None = None

    def spans(self, chunks: list[Chunk]) -> Iterator[Span]:
        for chunk in chunks:
            yield memoryview(bytes(chunk.size))

    async def carry(self, transfer: Transfer, chunks: list[Chunk], outbound: Outbound) -> None:
        await super().carry(transfer, chunks, outbound)
        self.lied_at_s = self.lied_at_s or time.time()


@dataclass
class Stage:
    """Everything that runs. `url` is the seed's page."""

    machine: Machine
    seed: Process
    replicas: list[Process]
    liar: Liar

    @property
    def trace(self) -> Path:
        """What replica TRACED writes."""
        return self.machine.root / "trace"

    @property
    def url(self) -> str:
        return f"http://{self.seed.address}/"


@contextlib.contextmanager
def staged(root: Path, *, size: int, rate: str) -> Iterator[Stage]:
    """Starts the swarm: about `size` bytes from a seed, every node sends at most `rate`. Ends with the block."""
    machine = Machine(root)
    model = write_model(root / "model", size=size)
    (root / "slow").mkdir()
    (root / "slow" / "sitecustomize.py").write_text(SLOW_NETWORK)
    with contextlib.ExitStack() as ending:
        ending.callback(machine.close)
        liar = ending.enter_context(Liar.of(model))
        seed = machine.serve(model, "--upload-limit", rate, environment=_labels("h0", "a", "seed-0"))
        replicas = []
        for number, (host, rack) in enumerate(PLACES):
            peers = [seed.address, liar.address] if number in MET_THE_LIAR else [seed.address]
            named = [word for peer in peers for word in ("--peer", peer)]
            environment = _labels(host, rack, f"replica-{number}")
            if number == TRACED:
                named += ["--trace", str(root / "trace")]
            if number == SLOW:
                environment["PYTHONPATH"] = str(root / "slow")
            flags = ("--out", root / f"out-{number}", "--no-mdns", "--upload-limit", rate)
            replicas.append(machine.start("fetch", MODEL, *flags, *named, environment=environment))
        yield Stage(machine, seed, replicas, liar)


def _labels(host: str, rack: str, name: str) -> dict[str, str]:
    return {"SWARM_HOST": host, "SWARM_RACK": rack, "SWARM_NAME": name, "SWARM_NETWORK": "local"}
