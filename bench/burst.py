"""A burst: seeds hold a model, newcomers request it at the same moment.

Every burst has a network and processes of its own, so that it inherits nothing. The lower bound is the time of a single
copy through a single link (or through the link between two racks, where that is slower). Frame headers count against
the link and not into the bound, so that a perfect plan ends about 5 % above it (66 of every 1514 bytes).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import children
import torrent
from burst_workers import MODEL_ID, SWARM_PORT, Task
from children import Child
from hosts import TICKS_PER_S, Host, Network

SYSTEMS = ("swarm", "star", "http", "libtorrent", "aria2")
WATCHED = "swarm-watched"  # every node traced, the first seed scraped and its dashboard open
DISTURB_AT = 0.5  # of the bound: when newcomers are killed
CHUNKS_MIN = 512
LEAF_BYTES = 512 << 10  # swarm's default
READY_TIMEOUT_S = 120.0
TRACKER_PORT = 6969

_NEEDS_MODULE = {"star": "torch", "libtorrent": "libtorrent"}
_NEEDS_TOOL = {"http": "curl", "aria2": "aria2c"}


@dataclass(frozen=True)
class Scenario:
    """Events of a burst. Times are fractions of the bound, except `stagger_s`: the pause between two newcomers."""

    system: str
    newcomers: int
    seeds: int = 1
    stagger_s: float = 0.0
    kill_seed_at: float | None = None
    kill_newcomers: float = 0.0
    liar: bool = False
    racks: int = 1

    def __str__(self) -> str:
        return f"{self.system}, {self.seeds} + {self.newcomers}"


@dataclass(frozen=True)
class Outcome:
    """The result. `seconds` of each newcomer that was not killed and did not fail, from its request.

    `seed_sent_bytes` of all seeds together and `crossed_bytes` between racks, with headers; `cpu_busy` is the part
    of all the machine's cores that was in use, by all programs; `cpu_ours` the part that the hosts' processes used,
    and `cpu_s` the same in seconds.
    """

    scenario: Scenario
    round: int
    bytes: int
    bound_s: float
    seconds: list[float]
    seed_sent_bytes: int
    crossed_bytes: int
    cpu_busy: float
    cpu_ours: float
    cpu_s: float
    verified: bool
    failures: list[str] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor seconds of a node, seeds included, for each GB of the model."""
        nodes = self.scenario.seeds + self.scenario.newcomers
        return self.cpu_s / nodes / (self.bytes / 1e9)

    @property
    def last(self) -> float:
        """The last newcomer's time over the bound."""
        return max(self.seconds) / self.bound_s

    @property
    def mean(self) -> float:
        """The mean newcomer's time over the bound."""
        return statistics.mean(self.seconds) / self.bound_s


def lacking(system: str) -> str | None:
    """Why a system cannot take part, or None."""
    module, tool = _NEEDS_MODULE.get(system), _NEEDS_TOOL.get(system)
    if module and not importlib.util.find_spec(module):
        return f"Python package {module} is not installed"
    return f"{tool} is not installed" if tool and not shutil.which(tool) else None


def run(scenario: Scenario, *, number: int, model: Path, bits_per_s: int) -> Outcome:
    """Runs a burst of the model file. Raises RuntimeError when it cannot begin."""
    with tempfile.TemporaryDirectory(prefix="burst-", dir=model.parent.parent) as place:
        size = scenario.seeds + scenario.newcomers + scenario.liar
        with Network(bits_per_s=bits_per_s, size=size, racks=scenario.racks) as network:
            return _Burst(scenario, network, Path(place), model).run(number)


class _Burst:
    def __init__(self, scenario: Scenario, network: Network, place: Path, model: Path) -> None:
        self._scenario = scenario
        self._network = network
        self._place = place
        self._model = model
        self._size = model.stat().st_size
        slowest = min(network.bits_per_s, network.rack_bits_per_s or network.bits_per_s)
        self._bound_s = self._size * 8 / slowest
        self._deadline_s = 30 + scenario.newcomers * scenario.stagger_s + self._bound_s * (2 * scenario.newcomers + 4)
        self._seeds = [network.host() for _ in range(scenario.seeds)]
        self._newcomers = [network.host() for _ in range(scenario.newcomers)]
        self._ending = threading.Event()

    def run(self, number: int) -> Outcome:
        doomed = self._doomed()
        # The pool is left last: it waits for answers, and those end when the processes do.
        with ThreadPoolExecutor(len(self._newcomers)) as pool, contextlib.ExitStack() as held:
            held.callback(self._ending.set)
            newcomers = self._start(held)
            sent_before = self._sent_bytes()
            crossed_before = self._network.crossed_bytes()
            busy = _Busy(self._network)
            disturbances = self._disturb(doomed, held)
            asking = [pool.submit(self._ask, child, index) for index, child in enumerate(newcomers)]
            answers, failures = self._collect(asking, doomed)
            shares = busy.shares()
            sent, crossed = self._sent_bytes() - sent_before, self._network.crossed_bytes() - crossed_before
            for disturbance in disturbances:
                disturbance.cancel()
                disturbance.join()
            verified = self._verified([index for index, answer in enumerate(answers) if answer])
        given = [answer for answer in answers if answer]
        seconds = [answer["ended"] - answer["began"] for answer in given]
        outcome = (self._size, self._bound_s, seconds, sent, crossed, *shares, verified, failures, given)
        return Outcome(self._scenario, number, *outcome)

    def _start(self, held: contextlib.ExitStack) -> list[Child]:
        """Seeds ready, then newcomers warm; all newcomers warm up at once."""
        system = self._scenario.system
        announce = f"http://{self._seeds[0].address}:{TRACKER_PORT}/announce"
        tracker: Child | None = None
        if system in ("libtorrent", "aria2"):
            self._torrent.write_bytes(torrent.make(self._model, announce=announce))
        if system == "aria2":
            tracker = self._python(held, self._seeds[0], "torrent.py", self._seeds[0].address, str(TRACKER_PORT))
            _await(tracker, "ready")
        for number, seed in enumerate(self._seeds):
            ours = system in ("swarm", WATCHED)
            started = self._swarm_seed(held, number) if ours else self._worker(held, seed, "seed", 0)
            _await(started, "ready")
            if tracker:
                _await(tracker, "seeded")
        if self._scenario.liar:
            _await(self._worker(held, self._network.host(), "liar", 0), "ready")
        newcomers = [self._worker(held, host, "newcomer", index) for index, host in enumerate(self._newcomers)]
        for newcomer in newcomers:
            _await(newcomer, "ready")
        if system == WATCHED:
            _await(self._python(held, self._seeds[0], "watcher.py", f"127.0.0.1:{SWARM_PORT}"), "ready")
        return newcomers

    def _swarm_seed(self, held: contextlib.ExitStack, number: int) -> Child:
        seed = self._seeds[number]
        listen = f"{seed.address}:{SWARM_PORT}"
        argv = children.swarm(
            *("serve", str(self._model.parent), "--model-id", MODEL_ID, "--listen", listen, "--insecure", "--no-mdns")
        )
        if number:
            argv += ["--peer", f"{self._seeds[0].address}:{SWARM_PORT}"]
        if self._scenario.system == WATCHED:
            argv += ["--trace", "seed.trace", "--advertise", listen, "--listen", f"0.0.0.0:{SWARM_PORT}"]
        chunk_bytes, leaf_bytes = self._grid
        sizes = {"chunk_bytes": str(chunk_bytes), "leaf_bytes": str(leaf_bytes)}
        place = self._place_of(seed)
        environment = children.clean_environment(place, host=seed.address, rack=seed.rack, **sizes)
        return held.enter_context(Child(seed.inside(argv), cwd=place, environment=environment))

    def _worker(self, held: contextlib.ExitStack, host: Host, role: str, index: int) -> Child:
        chunk_bytes, leaf_bytes = self._grid
        task = Task(
            address=host.address,
            rack=host.rack,
            file=self._copy(host) if role == "newcomer" else self._model,
            torrent=self._torrent,
            seeds=tuple(seed.address for seed in self._seeds),
            newcomers=tuple(newcomer.address for newcomer in self._newcomers),
            index=index,
            deadline_s=self._deadline_s,
            chunk_bytes=chunk_bytes,
            leaf_bytes=leaf_bytes,
        )
        return self._python(held, host, "burst_workers.py", role, self._scenario.system, task.written)

    def _python(self, held: contextlib.ExitStack, host: Host, program: str, *arguments: str) -> Child:
        argv = host.inside([sys.executable, str(Path(__file__).with_name(program)), *arguments])
        place = self._place_of(host)
        environment = children.clean_environment(place) | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        return held.enter_context(Child(argv, cwd=place, environment=environment))

    def _ask(self, child: Child, index: int) -> dict[str, Any]:
        if self._ending.wait(index * self._scenario.stagger_s):
            raise RuntimeError("the burst was over before it asked")
        return child.ask({}, timeout_s=self._deadline_s + 10)

    def _collect(
        self, asking: list[Future[dict[str, Any]]], doomed: list[Host]
    ) -> tuple[list[dict[str, Any] | None], list[str]]:
        answers: list[dict[str, Any] | None] = []
        failures = []
        for host, asked in zip(self._newcomers, asking, strict=True):
            answer: dict[str, Any] | None = None
            try:
                answer = asked.result()
            except RuntimeError as error:
                if host not in doomed:
                    failures.append(f"{host.address}: {error}")
            answers.append(None if host in doomed else answer)
        return answers, failures

    def _doomed(self) -> list[Host]:
        """The newcomers that will be killed: the same in every run."""
        count = round(self._scenario.kill_newcomers * len(self._newcomers))
        return random.Random(1).sample(self._newcomers, count)

    def _disturb(self, doomed: list[Host], held: contextlib.ExitStack) -> list[threading.Timer]:
        planned = [(DISTURB_AT, host) for host in doomed]
        if self._scenario.kill_seed_at is not None:
            planned.append((self._scenario.kill_seed_at, self._seeds[-1]))
        timers = [threading.Timer(at * self._bound_s, self._network.cut, [host]) for at, host in planned]
        for timer in timers:
            held.callback(timer.cancel)
            timer.start()
        return timers

    def _sent_bytes(self) -> int:
        return sum(self._network.sent_bytes(seed) for seed in self._seeds)

    def _verified(self, indices: list[int]) -> bool:
        """Whether these newcomers have the very bytes."""
        expected = _sha256(self._model)
        return bool(indices) and all(_sha256(self._copy(self._newcomers[index])) == expected for index in indices)

    @property
    def _grid(self) -> tuple[int, int]:
        """Bytes of a chunk and of a leaf: the largest power of two that gives chunks enough."""
        chunk_bytes = 1 << (self._size // CHUNKS_MIN).bit_length() - 1
        return chunk_bytes, min(LEAF_BYTES, chunk_bytes)

    @property
    def _torrent(self) -> Path:
        return self._place / "model.torrent"

    def _place_of(self, host: Host) -> Path:
        place = self._place / host.address
        place.mkdir(exist_ok=True)
        return place

    def _copy(self, host: Host) -> Path:
        out = self._place_of(host) / "out"
        out.mkdir(exist_ok=True)
        return out / self._model.name


class _Busy:
    """How busy all cores are from here on."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._ours_s = network.cpu_s()
        self._before = _jiffies()

    def shares(self) -> tuple[float, float, float]:
        """With everything on the machine, and with the hosts' processes alone: 0 to 1; the latter in seconds too."""
        idle, total = (now - before for now, before in zip(_jiffies(), self._before, strict=True))
        ours_s = max(0.0, self._network.cpu_s() - self._ours_s)  # those of the killed are lost
        return 1 - idle / max(1, total), ours_s * TICKS_PER_S / max(1, total), ours_s


def _jiffies() -> tuple[int, int]:
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


def _await(child: Child, word: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while word not in child.line(max(0.1, deadline - time.monotonic())):
        pass


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def scenarios(base: Scenario, systems: list[str], *, newcomers: list[int], seeds: list[int]) -> Iterator[Scenario]:
    """Every system in turn, for every number of newcomers and seeds."""
    for system in systems:
        for count in newcomers:
            for sources in seeds:
                yield Scenario(**base.__dict__ | {"system": system, "newcomers": count, "seeds": sources})
