"""An agent with many models and many programs at once: the cache limit is kept, and memory stays flat.

    python bench/agent.py                                   # 50 models, 200 clients, 60 s
    python bench/agent.py --seconds 1800                    # half an hour
    python bench/agent.py --direct                          # a fetch through the face beside a direct `swarm fetch`

The origin is the stand-in of the tests (`tests/hub.py`) in a process of its own. Clients are threads of this process
that read random files of random models by HTTP, and compare each byte with the truth. The limit has room for a third of
the models, so the agent evicts all the time. Prints a line every ten seconds with the agent's memory, and at the end
one JSON object and a verdict: no failure, no wrong byte, the cache within its limit, memory flat. Exits with 1 else.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import random
import re
import stat
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
HUB = """
import sys, time
sys.path.insert(0, sys.argv[1])
from hub import Hub, Model
import agent
models, rate, sizes = int(sys.argv[2]), float(sys.argv[3]), [int(size) for size in sys.argv[4:]]
with Hub({f"org/m{n}": Model(agent.files(n, sizes)) for n in range(models)}, total=rate or None) as hub:
    print(hub.endpoint, flush=True)
    sys.stdin.read()
"""
FLAT = 0.08  # of memory, from the third quarter to the last; the allocator takes some MB at a time
FACE_LEAST = 0.7
CLIENT = "import sys; from huggingface_hub import snapshot_download as s; s(sys.argv[1])"


def data(number: int, name: str, size: int) -> bytes:
    """The bytes of a file: as random as they need to be, and the same in each process."""
    return random.Random(f"{number} {name}").randbytes(size)


def files(number: int, sizes: list[int]) -> dict[str, bytes]:
    """The files of a model."""
    made = {f"part-{n}.bin": data(number, f"part-{n}.bin", size) for n, size in enumerate(sizes)}
    return {**made, "config.json": b'{"n": %d}' % number}


class Clients:
    """Threads that download files until `over`, and count what they got and what was wrong."""

    def __init__(self, endpoint: str, models: int, sizes: list[int]) -> None:
        self.over = threading.Event()
        self.bytes = self.files = self.wrong = self.failed = 0
        self.errors: dict[str, int] = {}  # by kind
        self.examples: dict[str, str] = {}  # the first of each kind, as it was said
        self.seconds: list[float] = []
        self._address = endpoint.removeprefix("http://")
        self._truth = {
            (number, name): (len(content), hashlib.sha256(content).digest())
            for number in range(models)
            for name, content in files(number, sizes).items()
        }
        self._lock = threading.Lock()

    def start(self, count: int) -> list[threading.Thread]:
        threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(count)]
        for thread in threads:
            thread.start()
        return threads

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        choices = list(self._truth)
        connection = http.client.HTTPConnection(self._address, timeout=120)
        while not self.over.is_set():
            number, name = rng.choice(choices)
            began = time.monotonic()
            try:
                connection.request("GET", f"/org/m{number}/resolve/main/{name}")
                answer = connection.getresponse()
                state, size = hashlib.sha256(), 0
                while part := answer.read(1 << 18):
                    state.update(part)
                    size += len(part)
            except (OSError, http.client.HTTPException) as error:
                self._fail(type(error).__name__, f"m{number}/{name}: {error}")
                connection.close()
                continue
            if answer.status != 200:
                said = answer.headers.get("X-Error-Message", "")
                # Names, paths and numbers differ from case to case; what is left is the kind.
                kind = re.sub(r"\S*[/\d]\S*", "…", said)[:80]
                self._fail(f"{answer.status} {kind}", f"m{number}/{name}: {said}")
                continue
            with self._lock:
                self.wrong += (size, state.digest()) != self._truth[number, name]
                self.files += 1
                self.bytes += size
                self.seconds.append(time.monotonic() - began)
        connection.close()

    def _fail(self, kind: str, example: str) -> None:
        with self._lock:
            self.failed += 1
            self.errors[kind] = self.errors.get(kind, 0) + 1
            self.examples.setdefault(kind, example)


class Machine:
    """A hub and an agent, in processes of their own."""

    def __init__(self, root: Path, models: int, sizes: list[int], *flags: str, hub_mb_per_s: float = 0.0) -> None:
        words = [str(ROOT / "tests"), str(models), str(1e6 * hub_mb_per_s), *map(str, sizes)]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'bench'}"}
        self.hub = subprocess.Popen(
            [sys.executable, "-c", HUB, *words],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.hub.stdout
        self.environment = {
            **os.environ, "HF_ENDPOINT": self.hub.stdout.readline().strip(), "HF_HOME": str(root / "hf"),
            "SWARM_CACHE": str(root / "cache"), "SWARM_MDNS": "0",
        }  # fmt: skip
        self._log = root / "agent.log"
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "swarm", "agent", "--hub-listen", "127.0.0.1:0", *flags]
            self.agent = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        while not (found := re.search(r"HF_ENDPOINT=(\S+)", self._log.read_text())):
            assert self.agent.poll() is None, self._log.read_text()
            time.sleep(0.05)
        self.endpoint = found[1]
        self.kept = root / "hf" / "hub"

    def warm(self, model: str) -> None:
        """Has the hub hash a model: a real one knows the names of its files."""
        url = f"{self.environment['HF_ENDPOINT']}/api/models/{model}/revision/main?blobs=true"
        with urllib.request.urlopen(url, timeout=600) as answer:
            answer.read()

    def memory(self) -> int:
        """Anonymous memory of the agent."""
        status = Path(f"/proc/{self.agent.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) << 10  # type: ignore[index]

    def handles(self) -> int:
        return len(os.listdir(f"/proc/{self.agent.pid}/fd"))

    def disk(self) -> int:
        """Bytes of the hub's cache, of unfinished files those that are there: as the limit counts, without the rest of
        a file's last block."""
        total = 0
        for folder, _, names in os.walk(self.kept):
            for name in names:
                try:
                    status = os.lstat(os.path.join(folder, name))
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    total += min(status.st_size, status.st_blocks * 512)
        return total

    def close(self) -> None:
        self.agent.terminate()
        self.agent.wait(30)
        assert self.hub.stdin
        self.hub.stdin.close()
        self.hub.wait(30)


def many(options: argparse.Namespace) -> dict[str, object]:
    sizes = [int(options.mb * 1e6)] * options.files
    total = options.models * sum(sizes)
    limit = total * options.room
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        machine = Machine(Path(folder), options.models, sizes, "--hub-limit-gb", f"{limit / 1e9:.6f}")
        clients = Clients(machine.endpoint, options.models, sizes)
        began = time.monotonic()
        threads = clients.start(options.clients)
        memory: list[tuple[float, int]] = []
        most_disk = 0
        while (passed := time.monotonic() - began) < options.seconds:
            time.sleep(min(10.0, options.seconds - passed))
            memory.append((time.monotonic() - began, machine.memory()))
            most_disk = max(most_disk, machine.disk())
            told = (
                f"{clients.files} files, {clients.bytes / 1e9:.2f} GB, {clients.failed} failed, {clients.wrong} wrong"
            )
            used = f"agent {memory[-1][1] / 1e6:.0f} MB, {machine.handles()} handles"
            room = f"disk {most_disk / 1e6:.0f} of {limit / 1e6:.0f} MB"
            print(f"{memory[-1][0]:6.0f} s  {told}; {used}; {room}", flush=True)
        clients.over.set()
        deadline = time.monotonic() + 60
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        metrics = http.client.HTTPConnection(machine_address(machine), timeout=10)
        metrics.request("GET", "/metrics")
        text = metrics.getresponse().read().decode()
        evicted = re.search(r"^swarm_cache_evictions_total (\S+)", text, re.MULTILINE)
        machine.close()
    seconds = sorted(clients.seconds)
    growth = _growth([size for _, size in memory])
    verdict = {
        "no failure": clients.failed == 0, "no wrong byte": clients.wrong == 0, "files came": clients.files > 0,
        "limit kept": most_disk <= limit, "memory flat": growth <= FLAT,
    }  # fmt: skip
    return {
        "models": options.models, "clients": options.clients, "seconds": options.seconds, "files": clients.files,
        "GB": round(clients.bytes / 1e9, 3), "failed": clients.failed, "errors": clients.errors,
        "examples": clients.examples, "wrong": clients.wrong,
        "evictions": float(evicted[1]) if evicted else None, "limit_MB": round(limit / 1e6, 1),
        "most_disk_MB": round(most_disk / 1e6, 1), "memory_MB": [round(size / 1e6) for _, size in memory],
        "memory_growth": round(growth, 3),
        "median_s": round(statistics.median(seconds), 3) if seconds else None,
        "p99_s": round(seconds[int(len(seconds) * 0.99)], 3) if seconds else None, "verdict": verdict,
    }  # fmt: skip


def _growth(memory: list[int]) -> float:
    """The median of the last quarter beside that of the third, as a part of it: a leak grows as long as it runs."""
    quarter = len(memory) // 4
    if not quarter:
        return 0.0
    before, after = memory[-2 * quarter : -quarter], memory[-quarter:]
    return statistics.median(after) / statistics.median(before) - 1


def machine_address(machine: Machine) -> str:
    """The address of the agent's node, from its log."""
    found = re.search(r"^(\S+) ready: agent", machine._log.read_text(), re.MULTILINE)
    assert found
    return found[1]


def direct(options: argparse.Namespace) -> dict[str, object]:
    """Seconds of a cold download by huggingface_hub through the face, and of a cold `swarm fetch`, in turns."""
    sizes = [int(options.mb * 1e6)] * options.files
    seconds: dict[str, list[float]] = {"face": [], "direct": []}
    for turn in range(options.turns):
        for way in ("direct", "face") if turn % 2 else ("face", "direct"):
            with tempfile.TemporaryDirectory(dir=options.dir) as folder:
                machine = Machine(Path(folder), 1, sizes, hub_mb_per_s=options.hub)
                machine.warm("org/m0")
                home = {"HF_HOME": f"{folder}/client", "SWARM_CACHE": f"{folder}/client-cache"}
                command = [sys.executable, "-c", CLIENT, "org/m0"]
                environment = {**machine.environment, **home, "HF_ENDPOINT": machine.endpoint}
                if way == "direct":
                    command = [sys.executable, "-m", "swarm", "fetch", "org/m0", "--no-seed"]
                    environment = {**machine.environment, **home}
                began = time.monotonic()
                subprocess.run(command, env=environment, check=True, capture_output=True)
                seconds[way].append(time.monotonic() - began)
                machine.close()
            print(f"{way}: {seconds[way][-1]:.2f} s", flush=True)
    best = {way: min(found) for way, found in seconds.items()}
    # Pairs of neighbours in time: other load of the machine is in both.
    ratio = statistics.median(one / other for one, other in zip(seconds["direct"], seconds["face"], strict=True))
    size = sum(sizes)
    return {
        "bytes": size, "files": options.files, "hub_MB_per_s": options.hub, "seconds": seconds,
        "MB_per_s": {way: round(size / found / 1e6, 1) for way, found in best.items()},
        "face_of_direct": round(ratio, 2), "verdict": {f"face at least {FACE_LEAST:g} of direct": ratio >= FACE_LEAST},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--files", type=int, default=4, help="large files of a model")
    parser.add_argument("--mb", type=float, default=1.0, help="megabytes of each")
    parser.add_argument("--room", type=float, default=1 / 3, help="the limit, as a part of all models")
    parser.add_argument("--direct", action="store_true", help="compare with a direct fetch")
    parser.add_argument("--turns", type=int, default=3, help="of each way")
    parser.add_argument("--hub", type=float, default=0.0, help="MB/s of the hub in a comparison; 0 for no limit")
    parser.add_argument("--dir", default=None, help="where caches are made")
    options = parser.parse_args()
    found = direct(options) if options.direct else many(options)
    print(json.dumps(found))
    verdict = found["verdict"]
    assert isinstance(verdict, dict)
    print("; ".join(f"{what}: {'yes' if right else 'NO'}" for what, right in verdict.items()))
    sys.exit(0 if all(verdict.values()) else 1)


if __name__ == "__main__":
    main()
