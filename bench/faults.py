"""Swarms of six real processes that are killed, stopped, cut off, lied to by their disks and wires, and out of room.

    python bench/faults.py [--seeds 500] [--first 0] [--jobs 4] [--out FILE]

A run is a function of its seed, except for the machine's timing: 1 or 2 seeds of a model of 6 MB, and newcomers that
fetch it, six nodes in all, half of the runs with a cluster key. Every node is reached through a proxy of its own, which
carries TCP and UDP. Within the first seconds some of these faults happen, each to a random node:

    kill       kill -9; half of them are started again a moment later, newcomers into the same directory
    stop       SIGSTOP, and SIGCONT 0.2 to 3 s later
    cut        all connections of its proxy are reset, and none is made for 0.2 to 3 s
    hang       its proxy carries nothing for 0.2 to 3 s, and says nothing
    flip       a bit that its proxy carries, TCP or UDP
    disk       a bit of a file that it serves, or of the partial download of a newcomer that was killed
    full       its directory is on a disk that is too small, or becomes so while it fetches

Every newcomer must be complete and byte-identical, or end with a line that says why, within its own timeout and
`GRACE_S`; and every file under a final name must be right. Bits that flip on the newcomer's own disk after they were
verified are left out: `swarm verify` finds those.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import forked
from children import host, isolate
from proxy import Proxy

from swarm.cli.demo import write_made_up
from swarm.security import cluster_key

MODEL, TENSOR_BYTES = "org/model", 3_000_000
NODES = 6
TIMEOUT_S = 12.0
GRACE_S = 20.0  # a busy machine, beyond a fetch's own timeout
WINDOW_S = 2.5  # faults begin within it
LONG_S = (0.2, 3.0)
SMALL_DISK_BYTES = (4 << 20, 16 << 20)
PORT = 7000
PATIENCE = {"SWARM_FIND_TIMEOUT_S": "4", "SWARM_IDLE_TIMEOUT_S": "1", "SWARM_STALL_TIMEOUT_S": "4"}
FAULTS = ("kill", "stop", "cut", "hang", "flip", "disk", "full")


@dataclass
class Outcome:
    """The result of a run. `wrong`, `hung` and `unclear` name nodes, and must be empty."""

    seed: int
    faults: list[str] = field(default_factory=list)
    complete: int = 0
    errors: list[str] = field(default_factory=list)
    killed: int = 0
    rejected_chunks: int = 0
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not (self.wrong or self.hung or self.unclear)


class Node:
    """A node: its directory, its proxy, and its present process."""

    def __init__(self, number: int, place: Path, *, peers: list[str], serves: bool) -> None:
        self.name = f"{'seed' if serves else 'newcomer'}-{number}"
        self.serves = serves
        self.path = place / self.name / "model"
        self.proxy = Proxy(("127.0.0.1", PORT + 100 + number), ("127.0.0.1", PORT + number))
        self.address = f"127.0.0.1:{PORT + 100 + number}"
        self.stopped_until = 0.0
        self.deadline = 0.0
        self.dead = False  # killed, and not to be started again
        self.checked = False  # a newcomer that is complete, and was compared
        self.command: forked.Command | None = None
        self._starts = 0
        own = ["--listen", f"127.0.0.1:{PORT + number}", "--advertise", self.address, "--name", self.name, "--no-mdns"]
        others = [word for peer in peers for word in ("--peer", peer)]
        if serves:
            self._arguments = ["serve", str(self.path), "--model-id", MODEL, "--upload-limit", "6MB/s", *own, *others]
        else:
            timeout = ("--timeout", f"{TIMEOUT_S:g}")
            self._arguments = ["fetch", MODEL, "--out", str(self.path), "--json", *timeout, *own, *others]
        self.path.parent.mkdir()

    def pin(self, digest: str) -> None:
        """Pins the digest: a seed that lost a bit of its disk while it was dead serves another model afterwards."""
        self._arguments += ["--digest", digest]

    def start(self, environment: dict[str, str]) -> None:
        self._starts += 1
        self.deadline = time.monotonic() + TIMEOUT_S + GRACE_S
        name = f"{self.name}-{self._starts}"
        self.command = forked.Command(self._arguments, environment, place=self.path.parent.parent, name=name)

    @property
    def running(self) -> bool:
        return self.command is not None and self.command.exit_code is None


class Run:
    """The run of a seed, in a directory of its own."""

    def __init__(self, seed: int, place: Path, model: Path) -> None:
        self._rng = random.Random(seed)
        self._place, self._model = place, model
        self._outcome = Outcome(seed)
        self._environment = {**PATIENCE, "SWARM_CACHE": str(place / "cache"), "SWARM_NETWORK": "local"}
        if self._rng.random() < 0.5:
            cluster_key.create(place / "key")
            self._environment["SWARM_KEY_FILE"] = str(place / "key")
            self._outcome.faults.append("with a key")
        seeds = self._rng.randint(1, 2)
        known = [f"127.0.0.1:{PORT + 100 + number}" for number in range(seeds)]
        self._nodes = [
            Node(number, place, peers=known[:number] if number < seeds else known, serves=number < seeds)
            for number in range(NODES)
        ]
        self._mounted: list[Path] = []

    async def run(self) -> Outcome:
        began = time.monotonic()
        try:
            async with contextlib.AsyncExitStack() as stack:
                for node in self._nodes:
                    await stack.enter_async_context(node.proxy)
                await self._play()
        finally:
            for node in self._nodes:
                if node.command:
                    node.command.send(signal.SIGCONT)
            for node in self._nodes:
                if node.command and not await asyncio.to_thread(node.command.stop):
                    self._outcome.hung.append(f"{node.name} did not end when asked to")
            for path in self._mounted:
                await asyncio.to_thread(subprocess.run, ["umount", "-l", str(path)], check=False)
        self._outcome.seconds = round(time.monotonic() - began, 2)
        return self._outcome

    async def _play(self) -> None:
        seeds, newcomers = ([node for node in self._nodes if node.serves is which] for which in (True, False))
        for node in seeds:
            shutil.copytree(self._model, node.path)
            node.start(self._environment)
        async with asyncio.timeout(GRACE_S + TIMEOUT_S):
            while not all(node.command and " ready: " in node.command.out for node in seeds):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # processes set no events
        dice = self._rng
        planned = [
            (dice.uniform(0, WINDOW_S), dice.choice(FAULTS), dice.choice(self._nodes))
            for _ in range(dice.randint(2, 6))
        ]
        tasks = []
        for at_s, kind, node in planned:
            if kind == "full":
                self._make_small(node)
            else:
                tasks.append(asyncio.create_task(self._later(at_s, kind, node, random.Random(dice.random()))))
        ready = seeds[0].command.out if seeds[0].command else ""
        for node in newcomers:
            node.pin(ready.partition(" digest ")[2].split()[0])
            node.start(self._environment)
        pending = list(newcomers)
        while pending:
            await asyncio.sleep(0.02)
            pending = [node for node in pending if not self._over(node)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for node in newcomers:
            self._compare(node)

    def _over(self, node: Node) -> bool:
        """Whether a newcomer is complete or has failed."""
        if node.dead:
            self._outcome.killed += 1
            return True
        command = node.command
        if command is None:
            return False  # about to be started again
        if command.exit_code is None and command.out.endswith("\n"):
            report = json.loads(command.out)
            self._outcome.complete += 1
            self._outcome.rejected_chunks += report["rejected_chunks"]
            self._outcome.resumed += report["resumed_bytes"] > 0
            self._compare(node)
            if files := set(self._right()) - {path.relative_to(node.path).as_posix() for path in _files(node.path)}:
                self._outcome.wrong.append(f"{node.name} says that it is complete and lacks {sorted(files)}")
            node.checked = True
            return True
        if command.exit_code is not None:
            self._judge(node, command)
            return True
        if time.monotonic() > node.deadline:
            self._outcome.hung.append(f"{node.name}: {command.err[-500:]}")
            return True
        return False

    def _judge(self, node: Node, command: forked.Command) -> None:
        lines = command.err.splitlines()
        said = [line for line in lines if line.startswith("swarm: ")]
        clear = len(said) == 1 and lines[-1] == said[0] and "Traceback" not in command.err
        if command.exit_code in (2, 3, 4, 5) and clear:
            self._outcome.errors.append(said[0])
        else:
            self._outcome.unclear.append(f"{node.name} ended with {command.exit_code}: {command.err[-800:]}")

    def _compare(self, node: Node) -> None:
        """Compares files under final names with the model; afterwards the run may flip their bits."""
        if node.checked:
            return
        right = self._right()
        for path in _files(node.path):
            name = path.relative_to(node.path).as_posix()
            if path.read_bytes() != right.get(name):
                self._outcome.wrong.append(f"{node.name} has a wrong {name}")

    def _right(self) -> dict[str, bytes]:
        return {path.relative_to(self._model).as_posix(): path.read_bytes() for path in _files(self._model)}

    def _make_small(self, node: Node) -> None:
        size = self._rng.choice(SMALL_DISK_BYTES)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(node.path.parent)]
        if node.serves or node.path.parent in self._mounted or subprocess.run(mount, check=False).returncode:
            return
        self._mounted.append(node.path.parent)
        self._outcome.faults.append(f"{node.name} has a disk of {size >> 20} MiB")
        if size == max(SMALL_DISK_BYTES):
            ballast = node.path.parent / "ballast"  # room for a part of the model, by the time that is wanted
            ballast.write_bytes(bytes(size - self._rng.randrange(3 << 20, 9 << 20)))

    async def _later(self, at_s: float, kind: str, node: Node, dice: random.Random) -> None:
        await asyncio.sleep(at_s)
        duration_s = dice.uniform(*LONG_S)
        what = f"{at_s:.2f} s {node.name}: {kind}"
        match kind:
            case "kill" if node.running and node.command:
                again = dice.random() < 0.5
                node.command.send(signal.SIGKILL)
                node.command, node.dead = None, not again
                what += f", again after {duration_s / 2:.2f} s" if again else ""
                self._outcome.faults.append(what)
                if again:
                    if not node.serves and dice.random() < 0.5:
                        self._flip(node, dice)
                    await asyncio.sleep(duration_s / 2)
                    node.start(self._environment)
                return
            case "stop" if node.running and node.command:
                command = node.command
                command.send(signal.SIGSTOP)
                node.deadline += duration_s
                self._outcome.faults.append(f"{what} for {duration_s:.2f} s")
                try:
                    await asyncio.sleep(duration_s)
                finally:
                    command.send(signal.SIGCONT)
                return
            case "cut":
                node.proxy.cut(duration_s)
                what += f" for {duration_s:.2f} s"
            case "hang":
                node.proxy.hang(duration_s)
                what += f" for {duration_s:.2f} s"
            case "flip":
                node.proxy.flip(dice.choice([0, 100, 1000, 100_000, 1_000_000]), dice)
            case "disk" if node.serves or node.checked:
                self._flip(node, dice)
            case _:
                return
        self._outcome.faults.append(what)

    def _flip(self, node: Node, dice: random.Random) -> None:
        """Flips a bit of a file that is served, or of the partial download of a dead newcomer."""
        below = node.path if node.serves or node.checked else node.path / ".swarm"
        found = sorted(path for path in below.rglob("*") if path.is_file() and path.stat().st_size)
        if found:
            with dice.choice(found).open("r+b") as file:
                place = dice.randrange(file.seek(0, 2))
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1 << dice.randrange(8)]))
            self._outcome.faults.append(f"{node.name}: a bit on disk")


def _files(path: Path) -> Iterator[Path]:
    """Files under their final names."""
    return (file for file in path.rglob("*") if file.is_file() and ".swarm" not in file.relative_to(path).parts)


def play(seeds: list[int]) -> Iterator[Outcome]:
    """Runs these in sequence, in this process."""
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="swarm-faults-") as root:
        model = Path(root) / "model"
        (model / "sub").mkdir(parents=True)
        for name in ("a", "sub/b"):
            file = model / f"{name}.safetensors"
            write_made_up(file, [(name, (TENSOR_BYTES // 2,))], rng=np.random.default_rng(len(name)))
        (model / "config.json").write_text('{"model_type": "made-up"}')
        for seed in seeds:
            place = Path(root) / str(seed)
            place.mkdir()
            yield asyncio.run(Run(seed, place, model).run())
            shutil.rmtree(place)


def _job(seeds: list[int]) -> list[Outcome]:
    """In a process, and where that is allowed a network, of its own: every run listens on the same ports."""
    isolate("cubic")
    outcomes = []
    for outcome in play(seeds):
        outcomes.append(outcome)
        print("." if outcome.good else f"\n{_failure(outcome)}\n", end="", file=sys.stderr, flush=True)
    return outcomes


def _failure(outcome: Outcome) -> str:
    what = [*outcome.wrong, *outcome.hung, *outcome.unclear]
    again = f"python bench/faults.py --first {outcome.seed} --seeds 1 --jobs 1"
    return "\n  ".join([f"seed {outcome.seed} (again with: {again})", *outcome.faults, *what])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=500, help="how many runs")
    parser.add_argument("--first", type=int, default=0, help="the first one's seed")
    parser.add_argument("--jobs", type=int, default=4, help="runs at once: most of the time they wait")
    parser.add_argument("--out", type=Path, help="JSON file for what became of every run")
    options = parser.parse_args()
    began = time.monotonic()
    seeds = list(range(options.first, options.first + options.seeds))
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        parts = [seeds[number :: options.jobs] for number in range(options.jobs)]
        outcomes = sorted((one for part in pool.map(_job, parts) for one in part), key=lambda one: one.seed)
    summary = _summary(outcomes) | {"seconds": round(time.monotonic() - began)}
    print("\n" + "\n".join(f"{name}: {value}" for name, value in summary.items()))
    for outcome in outcomes:
        if not outcome.good:
            print(_failure(outcome))
    if options.out:
        report = {"command": ["bench/faults.py", *sys.argv[1:]], "host": host(), "summary": summary}
        runs = [{**asdict(one), "errors": [error[:200] for error in one.errors]} for one in outcomes]
        options.out.write_text(json.dumps({**report, "runs": runs}, indent=1) + "\n")
    return 0 if all(outcome.good for outcome in outcomes) else 1


def _summary(outcomes: list[Outcome]) -> dict[str, Any]:
    faults = collections.Counter(kind for one in outcomes for fault in one.faults for kind in _kinds(fault))
    return {
        "runs": len(outcomes),
        "newcomers complete and identical": sum(one.complete for one in outcomes),
        "newcomers that ended in a clear error": sum(len(one.errors) for one in outcomes),
        "newcomers killed for good": sum(one.killed for one in outcomes),
        "wrong bytes": sum(len(one.wrong) for one in outcomes),
        "hung": sum(len(one.hung) for one in outcomes),
        "unclear": sum(len(one.unclear) for one in outcomes),
        "chunks rejected": sum(one.rejected_chunks for one in outcomes),
        "newcomers that resumed": sum(one.resumed for one in outcomes),
        "longest run, s": max(one.seconds for one in outcomes),
        "faults": dict(sorted(faults.items())),
    }


def _kinds(fault: str) -> Iterator[str]:
    words = {"kill": ": kill", "stop": ": stop", "cut": ": cut", "hang": ": hang", "flip on the wire": ": flip",
             "bit on disk": "a bit on disk", "full disk": "has a disk", "with a key": "with a key"}  # fmt: skip
    return (name for name, word in words.items() if word in fault)


if __name__ == "__main__":
    sys.exit(main())
