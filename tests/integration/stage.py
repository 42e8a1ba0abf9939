"""A swarm to look at: a seed and seven replicas as real processes on labelled hosts and racks, all capped so that a
fetch takes as long as a person looks; one replica's network is slow, and a peer beside them lies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from swarm.manifest import Chunk
from swarm.store import Span

from .lying import LyingPeer
from .processes import Machine, Process, write_model

REPLICAS = 7
SLOW = 6  # the number of the slow replica
PLACES = {
    0: ("h1", "a"),
    1: ("h1", "a"),
    2: ("h2", "a"),
    3: ("h2", "a"),
    4: ("h3", "b"),
    5: ("h3", "b"),
    6: ("h4", "b"),
}
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
    """Sends zeros for half of the chunks that it is asked for."""

    def spans(self, chunks: list[Chunk]) -> Iterator[Span]:
        for chunk in chunks:
            yield memoryview(bytes(chunk.size))


@dataclass
class Stage:
    """Everything that runs. `url` is the page of the first replica's node."""

    machine: Machine
    model: Path
    seed: Process
    replicas: list[Process]

    @property
    def url(self) -> str:
        return f"http://{self.seed.address}/"

    def liar(self) -> Liar:
        """One more peer of the seed's model, to be used as a context."""
        return Liar.of(self.model)


def labels(host: str, rack: str, name: str) -> dict[str, str]:
    return {"SWARM_HOST": host, "SWARM_RACK": rack, "SWARM_NAME": name, "SWARM_NETWORK": "local"}


@contextlib.contextmanager
def staged(root: Path, *, size: int, rate: str, liar: bool = True) -> Iterator[tuple[Stage, str]]:
    """Starts the swarm; yields it and the liar's name. Everything ends with the block."""
    root.mkdir(parents=True)
    machine = Machine(root)
    model = write_model(root / "model", size=size)
    (root / "slow").mkdir()
    (root / "slow" / "sitecustomize.py").write_text(SLOW_NETWORK)
    with contextlib.ExitStack() as ending:
        ending.callback(machine.close)
        lying = ending.enter_context(Liar.of(model)) if liar else None
        seed = machine.serve(model, "--upload-limit", rate, environment=labels("h0", "a", "seed-0"))
        replicas = []
        for number in range(REPLICAS):
            peers = [seed.address] + ([lying.address] if lying and number in (1, 4) else [])
            named = [word for peer in peers for word in ("--peer", peer)]
            replicas.append(
                machine.start(
                    "fetch", "org/model", "--out", root / f"out-{number}", "--no-mdns", "--upload-limit", rate, *named,
                    environment=labels(*PLACES[number], f"replica-{number}")
                    | ({"PYTHONPATH": str(root / "slow")} if number == SLOW else {}),
                )
            )  # fmt: skip
        yield Stage(machine, model, seed, replicas), "Liar"
