"""A seed and a newcomer on loopback: `swarm` beside iperf3, curl, aiohttp, cp and dd, interleaved in a run.

    python bench/pair.py [--gib 4] [--repeat 5] [--dir DIR] [--congestion cubic] [--out FILE]

Every method moves the same bytes: a checkpoint with the shapes of Qwen2.5, warm in the page cache. Ratios are taken
within a run only, because a machine drifts. Into memory, a whole `swarm.fetch` is timed from call to return in a warm
process, verification, finding the seed and reading the manifest included. The tensors were touched before: on a virtual
machine a fresh page can cost more than receiving its bytes, so fresh memory is measured beside populating it alone.
Such a machine hands freed memory back to its host within seconds, and memory that is freed and taken again at once is
twenty times cheaper. So every method that takes new memory (files do too, as page cache) begins after the same pause.

Into a directory, the whole command is timed, from its start to its exit; so are cp and dd. The time to the first byte
is bounded from above without looking into the process: the whole command for a model of 1.6 MB, from start to exit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import children
import models
from children import Child

from swarm.security import cluster_key

QUICK_REPEATS = 10  # of commands that take less than a second
READY_TIMEOUT_S = 120.0
SETTLE_S = 8.0  # Linux's free page reporting runs every 2 s; after 8 s of it little is left

FRESH, POPULATE = "swarm.fetch into fresh memory", "  fresh memory alone"
OUT, CP_SYNC, DD_SYNC = "swarm fetch --out", "  cp, then sync", "  dd conv=fdatasync"
OUT_NO_SYNC, CP, DD = "swarm fetch --out, no fsync", "  cp", "  dd"
TAKES_MEMORY = {FRESH, POPULATE, OUT, CP_SYNC, DD_SYNC, OUT_NO_SYNC, CP, DD}
TINY_BYTES = 1 << 20  # at least: the time for it is all start-up


@dataclass(frozen=True)
class Sample:
    """A run of a method. `cpu_s` by process; `inner_s` is the transfer alone, by the fetch's own report."""

    method: str
    round: int
    bytes: int
    seconds: float
    cpu_s: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int | None = None
    inner_s: float | None = None


def main() -> int:
    options = _options()
    congestion = children.isolate(options.congestion)
    with contextlib.ExitStack() as held:
        place = options.dir or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="swarm-bench-")))
        place.mkdir(parents=True, exist_ok=True)
        size = int(options.gib * (1 << 30))
        if children.available_bytes() < 4 * size:
            print(f"needs {4 * size >> 30} GiB of free memory: page cache for two copies, and tensors twice")
            return 1
        model = models.model(place.absolute(), size)
        models.warm(model)
        report: dict[str, Any] = {
            "host": children.host(),
            "command": ["bench/pair.py", *sys.argv[1:]],
            "congestion_control": congestion,
        }
        _print_host(report)
        bench = Bench(place.absolute(), model, congestion=options.congestion, settle_s=options.settle_s, held=held)
        samples = list(bench.samples(options.repeat, only=options.only))
        report |= {"model": model.name, "bytes": bench.size, "checked": bench.check(), "quick_s": bench.quick()}
    report["samples"] = [asdict(sample) for sample in samples]
    _print_table(samples)
    _print_quick(report["quick_s"])
    out = options.out or Path(__file__).parent / "results" / f"pair-{platform.node()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nraw numbers: {out}")
    return 0 if report["checked"] else 1


class Bench:
    """The processes that stay for the whole run, and the methods measured with them."""

    def __init__(
        self, place: Path, model: Path, *, congestion: str, settle_s: float, held: contextlib.ExitStack
    ) -> None:
        self.size = models.size_of(model)
        self._place = place
        self._model = model
        self._congestion = congestion
        self._settle_s = settle_s
        self._deadline_s = 60 + self.size / 50e6
        self._seed, self._seed_address = self._serve(held, model, "--no-mdns")
        self._tiny = models.model(place, TINY_BYTES)
        _, self._tiny_address = self._serve(held, self._tiny)
        cluster_key.create(place / "key")
        keyed = {"key_file": str(place / "key")}
        self._keyed = {
            encryption: self._serve(held, model, "--no-mdns", **keyed, data_encryption=encryption)
            for encryption in ("tls", "none")
        }
        self._traced = self._serve(held, model, "--no-mdns", "--trace", "seed.trace")
        self._fetcher = self._worker(held, "fetcher", str(model))
        self._fetcher.line(self._deadline_s)
        self._server = self._worker(held, "http-server", str(model))
        port = self._server.line(READY_TIMEOUT_S).split()[1]
        self._urls = [f"http://127.0.0.1:{port}/{file.name}" for file in sorted(model.iterdir())]
        self._client = self._worker(held, "http-client", *self._urls)
        self._client.line(READY_TIMEOUT_S)
        self._methods: dict[str, Callable[[], dict[str, Any]]] = {}
        self._choose(held)

    def samples(self, repeat: int, *, only: str) -> Iterator[Sample]:
        """Every method once a round, forth and back: all meet the same weather, none always the same neighbour."""
        chosen = {name: method for name, method in self._methods.items() if re.search(only, name)}
        for number in range(repeat):
            methods = list(chosen.items())
            for name, method in methods if number % 2 == 0 else reversed(methods):
                print(f"\rround {number + 1} of {repeat}: {name:<40}", end="", file=sys.stderr, flush=True)
                if name in TAKES_MEMORY:
                    time.sleep(self._settle_s)
                with self._clean():
                    yield Sample(name, number, self.size, **method())
        print(file=sys.stderr)

    def check(self) -> bool:
        """Whether a fetch into tensors leaves the very bytes there."""
        self._fetch("into")
        return bool(self._fetcher.ask({"do": "check"}, timeout_s=self._deadline_s)["equal"])

    def quick(self) -> dict[str, list[float]]:
        """Seconds of short commands, from start to exit."""
        fetch = ["fetch", self._tiny.name, "--no-seed", "--json", "--out", "out"]
        commands = {
            "swarm --version": ["--version"],
            "swarm status --peer": ["status", "--peer", self._tiny_address],
            "swarm fetch of 1.6 MB, --no-mdns --peer": [*fetch, "--no-mdns", "--peer", self._tiny_address],
            "swarm fetch of 1.6 MB, mDNS, no address": fetch,
        }
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(QUICK_REPEATS):
            for name, arguments in commands.items():
                with self._clean():
                    taken[name].append(self._run(children.swarm(*arguments)).seconds)
        return taken

    def _choose(self, held: contextlib.ExitStack) -> None:
        if shutil.which("iperf3"):
            port = _free_port()
            argv = ["iperf3", "-s", "-B", "127.0.0.1", "-p", str(port), "--forceflush"]
            self._iperf = held.enter_context(Child(argv, cwd=self._place))
            while "listening" not in self._iperf.line(READY_TIMEOUT_S):
                pass
            self._methods["iperf3"] = lambda: self._iperf3(port)
        else:
            print("iperf3 is not installed: no ratios")
        if shutil.which("curl"):
            self._methods["curl <- aiohttp sendfile"] = self._curl
        self._methods |= {
            "aiohttp client <- aiohttp sendfile": self._aiohttp,
            "swarm.fetch into warm tensors": lambda: self._fetch("into"),
            "  with a key, chunks in the open": lambda: self._fetch("into", encryption="none"),
            "  with a key, inside TLS": lambda: self._fetch("into", encryption="tls"),
            "  traced, scraped and on a dashboard": self._watched,
            "  pinned: BLAKE3 checked too": lambda: self._fetch("into", chunk_hash="blake3"),
            FRESH: lambda: self._fetch("fresh"),
            POPULATE: self._populate,
            OUT: lambda: self._fetch_out(fsync="true"),
            CP_SYNC: lambda: self._shell("cp -r --reflink=never MODEL out && sync -f out"),
            DD_SYNC: lambda: self._dd("conv=fdatasync"),
            OUT_NO_SYNC: lambda: self._fetch_out(fsync="false"),
            CP: lambda: self._shell("cp -r --reflink=never MODEL out"),
            DD: lambda: self._dd(""),
        }

    def _iperf3(self, port: int) -> dict[str, Any]:
        argv = ["iperf3", "-c", "127.0.0.1", "-p", str(port), "-n", str(self.size), "-C", self._congestion, "--json"]
        before_s = self._iperf.cpu_s()
        ran = self._run(argv)
        received = json.loads(ran.out)["end"]["sum_received"]
        cpu_s = {"client": ran.cpu_s, "server": self._iperf.cpu_s() - before_s}
        return {"seconds": received["seconds"] * self.size / received["bytes"], "cpu_s": cpu_s}

    def _curl(self) -> dict[str, Any]:
        before_s = self._server.cpu_s()
        ran = self._run(["curl", "-sS", "--fail", *(word for url in self._urls for word in ("-o", "/dev/null", url))])
        cpu_s = {"client": ran.cpu_s, "server": self._server.cpu_s() - before_s}
        return {"seconds": ran.seconds, "cpu_s": cpu_s, "peak_rss_bytes": ran.peak_rss_bytes}

    def _aiohttp(self) -> dict[str, Any]:
        return self._asked(self._client, "read", self._server)

    def _fetch(self, how: str, *, encryption: str | None = None, **settings: str) -> dict[str, Any]:
        if encryption is None:
            return self._asked(self._fetcher, how, self._seed, settings=settings)
        seed, address = self._keyed[encryption]
        keyed = {"key_file": str(self._place / "key"), "data_encryption": encryption}
        return self._asked(self._fetcher, how, seed, peer=address, settings=keyed)

    def _watched(self) -> dict[str, Any]:
        """Both ends are traced and scraped, and the seed's dashboard is open."""
        seed, address = self._traced
        newcomer = f"127.0.0.1:{_free_port()}"
        argv = [sys.executable, str(Path(__file__).with_name("watcher.py")), address, newcomer]
        with Child(argv, cwd=self._place) as watcher:
            watcher.line(READY_TIMEOUT_S)
            settings = {"listen": newcomer}
            return self._asked(self._fetcher, "into", seed, peer=address, settings=settings, trace="newcomer.trace")

    def _populate(self) -> dict[str, Any]:
        answer = self._fetcher.ask({"do": "populate", "bytes": self.size}, timeout_s=self._deadline_s)
        return {"seconds": answer["seconds"], "cpu_s": {"client": answer["cpu_s"]}}

    def _asked(
        self,
        client: Child,
        what: str,
        server: Child,
        *,
        peer: str | None = None,
        settings: Mapping[str, str] | None = None,
        trace: str | None = None,
    ) -> dict[str, Any]:
        before_s = server.cpu_s()
        question = {"do": what, "peer": peer or self._seed_address, "settings": dict(settings or {}), "trace": trace}
        answer = client.ask(question, timeout_s=self._deadline_s)
        return {
            "seconds": answer["seconds"],
            "cpu_s": {"client": answer["cpu_s"], "server": server.cpu_s() - before_s},
            "peak_rss_bytes": answer["peak_rss_bytes"],
            "inner_s": answer.get("transfer_s"),
        }

    def _fetch_out(self, *, fsync: str) -> dict[str, Any]:
        peer = ("--no-mdns", "--peer", self._seed_address)
        argv = children.swarm("fetch", self._model.name, "--out", "out", "--json", "--no-seed", *peer)
        before_s = self._seed.cpu_s()
        ran = self._run(argv, fsync=fsync)
        return {
            "seconds": ran.seconds,
            "cpu_s": {"client": ran.cpu_s, "server": self._seed.cpu_s() - before_s},
            "peak_rss_bytes": ran.peak_rss_bytes,
            "inner_s": json.loads(ran.out)["seconds"],
        }

    def _dd(self, how: str) -> dict[str, Any]:
        return self._shell(
            f'mkdir out && for f in MODEL/*; do dd if="$f" of="out/${{f##*/}}" bs=4M {how} status=none; done'
        )

    def _shell(self, script: str) -> dict[str, Any]:
        ran = self._run(["sh", "-ec", script.replace("MODEL", self._model.name)])
        return {"seconds": ran.seconds, "cpu_s": {"client": ran.cpu_s}, "peak_rss_bytes": ran.peak_rss_bytes}

    def _run(self, argv: list[str], **settings: str) -> children.Ran:
        environment = children.clean_environment(self._place, **settings)
        return children.run(argv, cwd=self._place, timeout_s=self._deadline_s, environment=environment)

    def _serve(self, held: contextlib.ExitStack, model: Path, *flags: str, **settings: str) -> tuple[Child, str]:
        environment = children.clean_environment(self._place, **settings)
        argv = children.swarm("serve", str(model), *flags)
        seed = held.enter_context(Child(argv, cwd=self._place, environment=environment))
        return seed, seed.line(self._deadline_s).split()[0]

    def _worker(self, held: contextlib.ExitStack, *arguments: str) -> Child:
        argv = [sys.executable, str(Path(__file__).with_name("workers.py")), *arguments]
        return held.enter_context(Child(argv, cwd=self._place))

    @contextlib.contextmanager
    def _clean(self) -> Iterator[None]:
        """Removes everything written to `out`, and waits until no earlier write is on its way to the disk."""
        try:
            yield
        finally:
            shutil.rmtree(self._place / "out", ignore_errors=True)
            children.sync(self._place)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gib", type=float, default=4.0, help="size of the model")
    parser.add_argument("--repeat", type=int, default=5, help="rounds; every method runs once in each")
    parser.add_argument(
        "--dir", type=Path, help="where models are made, kept and copied; default: a temporary directory"
    )
    parser.add_argument("--congestion", default="cubic", help="congestion control: bbr loses 25-45 %% on loopback")
    parser.add_argument("--settle-s", type=float, default=SETTLE_S, help="pause before what takes new memory")
    parser.add_argument("--only", default="", metavar="PATTERN", help="methods whose names match this; default: all")
    parser.add_argument("--out", type=Path, help="JSON file for the raw numbers")
    return parser.parse_args()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _print_host(report: dict[str, Any]) -> None:
    for name, value in report["host"].items():
        print(f"{name}: {value}")
    print(f"congestion control: {report['congestion_control']}\ncommand: {' '.join(report['command'])}")


def _print_table(samples: list[Sample]) -> None:
    """A line for each method, in the order of their first run; a second line for the transfer alone."""
    rows: dict[str, list[tuple[float, Sample]]] = {}
    for sample in samples:
        rows.setdefault(sample.method, []).append((sample.seconds, sample))
        if sample.inner_s is not None:
            rows.setdefault(f"    of it the transfer ({sample.method.strip()})", []).append((sample.inner_s, sample))
    base = {sample.round: sample.bytes / sample.seconds for sample in samples if sample.method == "iperf3"}
    print(f"\n{'median (min - max)':<60}{'GB/s':>20}{'s':>8}{'of iperf3':>20}{'CPU s/GB':>10}{'peak MB':>9}")
    for name, runs in rows.items():
        rates = [sample.bytes / seconds / 1e9 for seconds, sample in runs]
        ratios = [sample.bytes / seconds / base[sample.round] for seconds, sample in runs if base]
        cpu = statistics.median(sum(sample.cpu_s.values()) / sample.bytes * 1e9 for _, sample in runs)
        peaks = [sample.peak_rss_bytes / 1e6 for _, sample in runs if sample.peak_rss_bytes]
        print(
            f"{name:<60}{_spread(rates):>20}{statistics.median(seconds for seconds, _ in runs):>8.2f}"
            f"{_spread(ratios):>20}{cpu:>10.2f}{f'{max(peaks):.0f}' if peaks else '-':>9}"
        )


def _print_quick(taken: dict[str, list[float]]) -> None:
    print(f"\n{'from start to exit, median (min - max)':<60}{'ms':>20}")
    for name, seconds in taken.items():
        print(f"{name:<60}{_spread([1000 * one for one in seconds], digits=0):>20}")


def _spread(values: list[float], *, digits: int = 2) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
