"""Engines for `engines_gpu`: forked vLLM engines that are told what to do, and whole `vllm serve` processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

MODEL_ID = "bench/model"
PROMPTS, SERVER_PROMPTS, ANSWER_TOKENS = 50, 20, 24
WORK = Path(os.environ.get("WORK", "/tmp/engines_gpu"))
SHOWN = re.compile(
    r"swarm|took|ERROR|Error:|bytes|Using cache directory|Directly load|tier|fetch|WARNING (?!.*base.py)"
)
TOLD = re.compile(
    r"(Loading weights took|fetched [0-9.]+ .B|\w+ tier taken|compile cache|torch.compile took|Graph capturing|"
    r"\d+ of \d+ tensors are|init engine|Registry inspect|Model loading took).*"
)


@dataclass
class Run:
    """What all steps share."""

    model: Path
    deadline: float
    cpu: bool
    vocabulary: int
    out: Path
    began: float = field(default_factory=time.time)
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)  # of the disk engine, by model
    engines: list[Engine] = field(default_factory=list)

    current: ClassVar[Run]


def say(**what: Any) -> None:
    print(f"{time.time() - Run.current.began:6.1f} {json.dumps(what)}", flush=True)


class Engine:
    """A vLLM engine in a forked process, told by lines of JSON what to do."""

    def __init__(self, name: str, *, env: dict[str, str] | None = None, other_host: bool = False, **llm: Any) -> None:
        run = Run.current
        self.name, self.env = name, env or {}
        self.lines: list[tuple[float, str]] = []
        self.replies: list[Any] = []
        self.ended = threading.Event()
        told, self._tell = os.pipe()
        heard, says = os.pipe()
        self.began = time.time()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._tell)
            os.close(heard)
            for fd, to in ((told, 0), (says, 1), (says, 2)):
                os.dup2(fd, to)
            child(name, self.env, llm, other_host=other_host)
        os.close(told)
        os.close(says)
        run.engines.append(self)
        self._reader = threading.Thread(target=self._read, args=(heard,), daemon=True)
        self._reader.start()

    def _read(self, heard: int) -> None:
        with open(heard, "rb") as stream:
            for raw in stream:
                line = raw.decode(errors="replace").rstrip()
                if line.startswith("SAID "):
                    self.replies.append(json.loads(line[5:]))
                else:
                    self.lines.append((time.time() - self.began, line))
        self.ended.set()

    def wait(self, pattern: str, limit_s: float = 120, *, after: int = 0) -> bool:
        """Whether a line matches in time; False also when the engine ended."""
        until = min(time.time() + limit_s, Run.current.deadline)
        while not any(re.search(pattern, line) for _, line in self.lines[after:]):
            if self.ended.is_set() or time.time() > until:
                return False
            time.sleep(0.001)
        return True

    def at(self, pattern: str) -> float | None:
        return next((round(at, 3) for at, line in self.lines if re.search(pattern, line)), None)

    def said(self, pattern: str) -> list[str]:
        return [found[0] for _, line in self.lines if (found := re.search(pattern, line))]

    def tell(self, *words: Any, limit_s: float = 120) -> Any:
        """Calls a method of `Told`, and returns its result. Raises RuntimeError."""
        return self.reply(self.send(*words), limit_s)

    def send(self, *words: Any) -> int:
        """Calls a method of `Told`; returns the number of the reply."""
        number = len(self.replies)
        os.write(self._tell, json.dumps(words).encode() + b"\n")
        return number

    def reply(self, number: int, limit_s: float = 120) -> Any:
        until = min(time.time() + limit_s, Run.current.deadline)
        while len(self.replies) <= number:
            if self.ended.is_set() or time.time() > until:
                self.show(everything=True)
                raise RuntimeError(f"{self.name} does not answer; ended: {self.ended.is_set()}")
            time.sleep(0.001)
        if isinstance(found := self.replies[number], dict) and "raised" in found:
            self.show()
            raise RuntimeError(f"{self.name}: {found['raised']}")
        return found

    def ready(self) -> Engine:
        self.reply(0, 240)
        return self

    def show(self, most: int = 60, *, everything: bool = False) -> None:
        chosen = [(at, line) for at, line in list(self.lines) if everything or SHOWN.search(line)]
        for at, line in chosen[-most:]:
            print(f"    {self.name} {at:8.3f} {line[:300]}", flush=True)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self.ended.wait(5)


def child(name: str, env: dict[str, str], llm: dict[str, Any], *, other_host: bool) -> None:
    """The forked process: an engine that does what it is told, until it is killed."""
    try:
        os.setsid()
        home = WORK / name
        home.mkdir(parents=True, exist_ok=True)
        os.environ.update(environment(home, name) | env)
        os.chdir(home)
        if other_host:
            leave_host()
        Told(llm).obey()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(1)


def environment(home: Path, name: str) -> dict[str, str]:
    return {
        "SWARM_CACHE": str(WORK / "swarm"),
        "SWARM_MODEL_ID": MODEL_ID,
        "SWARM_NAME": name,
        "SWARM_MDNS": "0",
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **compilers(WORK / "shared"),
    }


def compilers(home: Path) -> dict[str, str]:
    """Where compilers keep their caches."""
    return {
        "VLLM_CACHE_ROOT": str(home / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
        "TRITON_CACHE_DIR": str(home / "triton"),
    }


def leave_host() -> None:
    """Makes this process believe that it is on another host: it has a boot id of its own. Needs root."""
    other = WORK / "other_boot_id"
    other.write_text("00000000-1111-2222-3333-444444444444\n")
    os.unshare(os.CLONE_NEWNS)  # type: ignore[attr-defined]  # Python 3.12
    for words in (["--make-rprivate", "/"], ["--bind", str(other), "/proc/sys/kernel/random/boot_id"]):
        subprocess.run(["mount", *words], check=True)


class Told:
    """The engine in its process; public methods are called by name."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        began = time.time()
        self._llm = LLM(**options)
        self._answer({"engine_s": round(time.time() - began, 2), "memory_gb": memory_gb()})

    def obey(self) -> None:
        for line in sys.stdin:
            name, *words = json.loads(line)
            try:
                self._answer(getattr(self, name)(*words))
            except Exception as error:
                traceback.print_exc()
                self._answer({"raised": f"{type(error).__name__}: {error}"})

    def _answer(self, reply: Any) -> None:
        print("SAID " + json.dumps(reply), flush=True)

    def tokens(self, prompts: list[list[int]]) -> list[list[int]]:
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False)
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = self._llm.generate(asked, greedy, use_tqdm=False)  # in equal batches in every engine
        return [list(output.outputs[0].token_ids) for output in found]

    def served(self) -> list[float]:
        """Waits until peers can fetch; host memory in GB."""
        from swarm.engines import vllm_loader

        (entry,) = vllm_loader.models.entries
        assert entry.loader.server.serving
        entry.loader.server.serving.result(60)
        return memory_gb()

    def rpc(self, method: str, keywords: dict[str, Any]) -> float:
        """Seconds that a call of the workers takes."""
        began = time.time()
        self._llm.collective_rpc(method, kwargs=keywords)
        return round(time.time() - began, 3)

    def sleep(self, level: int) -> float:
        began = time.time()
        self._llm.sleep(level)
        return round(time.time() - began, 3)

    def wake(self) -> float:
        began = time.time()
        self._llm.wake_up()
        return round(time.time() - began, 3)

    def version(self, name: str) -> None:
        """An update that brings the same weights under the name of a version."""
        self._llm.collective_rpc("reload_weights")
        if tell := getattr(self._llm.llm_engine, "set_weight_version", None):
            tell(name)
        else:
            from swarm.engines import vllm_loader

            vllm_loader.models.set_version(name)

    def busy(self, seconds: float, streams: int) -> list[list[float]]:
        """The time and the number of tokens of each step, of `streams` at once, for some seconds."""
        from vllm import SamplingParams

        long = SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True, detokenize=False)
        engine = self._llm.llm_engine
        for number in range(streams):
            engine.add_request(f"b{number}", {"prompt_token_ids": [300 + number] * 64}, long)
        steps, until = [], time.time() + seconds
        while time.time() < until:
            engine.step()
            steps.append(time.time())
        engine.abort_request([f"b{number}" for number in range(streams)])
        for _ in range(3):
            engine.step()
        return [[step] for step in steps]


def memory_gb() -> list[float]:
    """Peak and present host memory of this process."""
    status = Path("/proc/self/status").read_text()
    return [round(int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1e6, 2) for key in ("VmHWM", "VmRSS")]  # type: ignore[index]


def prompts() -> list[list[int]]:
    dice = random.Random(7)
    most = Run.current.vocabulary - 100
    return [
        [dice.randrange(300, most) for _ in range(dice.randrange(8, 60))]
        for _ in range(5 if Run.current.cpu else PROMPTS)
    ]


class Server:
    """A whole `vllm serve`."""

    started: ClassVar[list[Server]] = []

    def __init__(
        self, name: str, port: int, *words: str, env: dict[str, str], run: bool = False, log: str = "start.log"
    ) -> None:
        home = WORK / name
        home.mkdir(parents=True, exist_ok=True)
        model = MODEL_ID if run else str(Run.current.model)
        command = ["vllm", "serve", model, "--port", str(port), "--max-model-len", "4096", "--no-enable-prefix-caching",
                   "--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(4 << 30), *words]  # fmt: skip
        command = ["swarm", "run", "--", *command] if run else [*command, "--served-model-name", MODEL_ID]
        own = environment(home, name) | compilers(home) | ({"SWARM_CACHE": str(home / "swarm")} if run else {})
        del own["VLLM_ENABLE_V1_MULTIPROCESSING"]
        self.name, self.port, self.began = name, port, time.time()
        self.log = home / log
        with self.log.open("wb") as out:
            self._process = subprocess.Popen(
                command, env={**os.environ, **own, **env}, cwd=home, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.ready_s: float | None = None
        Server.started.append(self)

    def poll(self) -> bool:
        """Whether it answers, or has ended."""
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).close()
            self.ready_s = round(time.time() - self.began, 2)
            return True
        return self._process.poll() is not None

    def ready(self) -> Server:
        while not self.poll() and time.time() < Run.current.deadline:
            time.sleep(0.05)
        said = [found[0] for found in TOLD.finditer(self.log.read_text(errors="replace"))]
        say(start=f"{self.name}/{self.log.name}", ready_s=self.ready_s, said=[line[:160] for line in said])
        if self.ready_s is None:
            print(self.log.read_text(errors="replace")[-6000:], flush=True)
        return self

    def wait(self, words: str, limit_s: float = 60) -> bool:
        until = min(time.time() + limit_s, Run.current.deadline)
        while words not in self.log.read_text(errors="replace"):
            if time.time() > until:
                return False
            time.sleep(0.1)
        return True

    def compare(self) -> None:
        """Its answers with those of the first server."""
        found = []
        for prompt in prompts()[:SERVER_PROMPTS]:
            body = {"model": MODEL_ID, "prompt": prompt, "temperature": 0, "max_tokens": ANSWER_TOKENS,
                    "ignore_eos": True, "return_token_ids": True}  # fmt: skip
            address = f"http://127.0.0.1:{self.port}/v1/completions"
            request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                found.append(json.load(reply)["choices"][0]["token_ids"])
        wanted = Run.current.tokens.setdefault("server", found)
        same = sum(one == other for one, other in zip(found, wanted, strict=True))
        say(tokens_of=self.name, identical=f"{same} of {len(wanted)}", different=len({tuple(one) for one in found}))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(20)
