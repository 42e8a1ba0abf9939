"""What a chunk costs the event loops of a pair, over loopback: processor time, and the events that cause it.

    python bench/loop_cost.py [--mib 1024] [--chunk-mib 4 16] [--repeat 5] [--trees DIR ...]

A seed serves tensors out of memory; a newcomer fetches them into existing tensors, in a fresh node each time. Processor
time of the loop's thread is taken in rounds without counting; another round counts wake-ups of the loop (through its
pipe), turns (`select`), callbacks run, messages posted, frames sent, calls of mailboxes, jobs given to thread pools and
journal entries. The newcomer's figures are from its first request to its last verified chunk, the seed's from its first
grant to its last complete transfer. `--trees`: checkouts to compare, interleaved; default: this one.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = "bench/loop-cost"
TENSOR_BYTES = 64 << 20
COUNTED = ("wakes", "turns", "callbacks", "messages", "frames", "posts", "jobs", "entries")


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        COMMANDS[sys.argv[1]](json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--chunk-mib", type=float, nargs="+", default=[4, 16])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--trees", type=Path, nargs="+", default=[HERE.parent])
    options = parser.parse_args()
    print(f"{platform.node()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}")
    print(" ".join(sys.argv), flush=True)
    for chunk_mib in options.chunk_mib:
        measure(options, chunk_bytes=int(chunk_mib * (1 << 20)))


def measure(options: argparse.Namespace, *, chunk_bytes: int) -> None:
    tensors = max(1, (options.mib << 20) // TENSOR_BYTES)
    chunks, size = tensors * TENSOR_BYTES // chunk_bytes, tensors * TENSOR_BYTES / 1e9
    given = {"tensors": tensors, "chunk_bytes": chunk_bytes, "streams": options.streams}
    with contextlib.ExitStack() as held:
        pairs = [
            (tree, count, Pair(tree, given | {"count": count}, held))
            for tree in options.trees
            for count in (False, True)
        ]
        found: dict[tuple[Path, bool], list[dict[str, Any]]] = collections.defaultdict(list)
        for number in range(options.repeat):
            for tree, count, pair in pairs if number % 2 == 0 else reversed(pairs):
                found[tree, count].append(pair.round())
    for tree in options.trees:
        timed, counted = found[tree, False], found[tree, True]
        print(f"\n{chunk_bytes >> 20} MiB chunks, {chunks} of them, {size:.2f} GB; {tree.resolve()}")
        for end in ("newcomer", "seed"):
            loop = [one[end]["loop_s"] / size for one in timed]
            process = [one[end]["process_s"] / size for one in timed]
            print(f"  {end:<9} loop CPU s/GB {spread(loop)}; process {spread(process)}")
            per = {
                name: statistics.median(one[end]["counts"].get(name, 0) for one in counted) / chunks for name in COUNTED
            }
            print("            a chunk:", ", ".join(f"{name} {value:.2f}" for name, value in per.items()), flush=True)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4f} ({min(values):.4f} - {max(values):.4f})"


class Pair:
    """A seed and a newcomer of a checkout."""

    def __init__(self, tree: Path, given: dict[str, Any], held: contextlib.ExitStack) -> None:
        self._seed = start("serve", given, tree, held)
        address = self._ask(self._seed, None)["address"]
        self._newcomer = start("fetch", given | {"peer": address}, tree, held)
        self._ask(self._newcomer, None)
        self.round()  # imports, first use

    def round(self) -> dict[str, Any]:
        self._ask(self._seed, "mark")
        newcomer = self._ask(self._newcomer, "fetch")
        return {"newcomer": newcomer, "seed": self._ask(self._seed, "mark")}

    @staticmethod
    def _ask(process: subprocess.Popen[str], word: str | None) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        if word:
            process.stdin.write(word + "\n")
            process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer


def start(command: str, given: dict[str, Any], tree: Path, held: contextlib.ExitStack) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(tree.resolve()), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, __file__, command, json.dumps(given)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    held.callback(process.wait, 60)
    held.callback(process.communicate, "end\n", 60)
    return process


def settings(given: dict[str, Any]) -> Any:
    from swarm.settings import Settings
    from swarm.transport import tcp

    vars(tcp)["streams_most"] = lambda: given["streams"]
    peers = {"peers": (given["peer"],)} if "peer" in given else {}
    return Settings.load({"mdns": False, "chunk_bytes": given["chunk_bytes"], **peers})


def state(given: dict[str, Any]) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    numbers = range(given["tensors"])
    made = {f"tensor{number:04}": torch.zeros(TENSOR_BYTES // 8, dtype=torch.int64) for number in numbers}
    if "peer" not in given:
        for tensor in made.values():
            tensor.random_(generator=generator)
    return made


def serve(given: dict[str, Any]) -> None:
    import swarm
    from swarm.journal import Sent
    from swarm.transfer.upload import Grant

    tell = marking(given, first=Grant, last=Sent)
    with swarm.serve(state(given), model_id=MODEL, settings=settings(given)) as served:
        print(json.dumps({"address": served.address}), flush=True)
        for _ in requests():
            tell()


def fetch(given: dict[str, Any]) -> None:
    import swarm
    from swarm.transfer.download_events import Ask, Complete

    into, how = state(given), settings(given)
    tell = marking(given, first=Ask, last=Complete)
    print("{}", flush=True)
    for _ in requests():
        swarm.fetch(MODEL, into=into, settings=how, timeout_s=300).close()
        tell()


def marking(given: dict[str, Any], *, first: type, last: type) -> Callable[[], None]:
    """Returns a call that prints what lay between the first and the last of these entries since its last call."""
    from swarm import journal

    counts = counting() if given["count"] else collections.Counter()
    marks: list[tuple[float, float, dict[str, int]]] = []
    real_record = journal.Journal.record

    def record(self: journal.Journal, at_s: float, subject: str, event: object) -> None:
        kind = type(event)
        if (kind is first and not marks) or (kind is last and marks):
            marks[1:] = [(time.thread_time(), process_s(), dict(counts))]
        real_record(self, at_s, subject, event)

    def tell() -> None:
        (loop0, process0, before), (loop1, process1, after) = marks or [(0.0, 0.0, {})] * 2
        told = {name: after[name] - before.get(name, 0) for name in after}
        marks.clear()
        print(json.dumps({"loop_s": loop1 - loop0, "process_s": process1 - process0, "counts": told}), flush=True)

    journal.Journal.record = record  # type: ignore[method-assign]
    return tell


def requests() -> Iterator[str]:
    for line in sys.stdin:
        if line == "end\n":
            return
        yield line


def process_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def loop_s() -> float:
    """Processor time of the loop's thread."""
    from swarm.runtime import runtime

    async def own() -> float:
        return time.thread_time()

    return runtime().run(own())


def counting() -> collections.Counter[str]:
    """Counts what COUNTED names, from now on."""
    from concurrent.futures import ThreadPoolExecutor

    from swarm import journal
    from swarm.net.link import WebSocketLink
    from swarm.net.pausing_loop import PausingLoop
    from swarm.peers.peer import Peer
    from swarm.transport.sink import Mailbox

    counts: collections.Counter[str] = collections.Counter()

    def count(owner: Any, method: str, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, method)

        def counted(*args: Any, **more: Any) -> Any:
            counts[name] += 1
            return real(*args, **more)

        setattr(owner, method, counted)

    count(PausingLoop, "_write_to_self", "wakes")
    count(PausingLoop, "_run_once", "turns")
    count(asyncio.events.Handle, "_run", "callbacks")
    count(Peer, "post", "messages")
    count(WebSocketLink, "_send", "frames")
    count(Mailbox, "post", "posts")
    count(ThreadPoolExecutor, "submit", "jobs")
    count(journal.Journal, "record", "entries")
    return counts


COMMANDS = {"serve": serve, "fetch": fetch}

if __name__ == "__main__":
    main()
